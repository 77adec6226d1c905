"""``kd-lrp audit``."""

from pathlib import Path
from typing import Annotated

import typer

from kd_lrp_plugin.cli.console import (
    Device,
    RichProgress,
    Safe,
    Trust,
    errors,
    errors_in_words,
    say,
)
from kd_lrp_plugin.plots import tables


def audit(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN|STUDY|MODEL...",
            help="Finished runs, the results of a study, or models in folders of timm's.",
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Other images than the run's test set: a folder with one folder per class.",
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(help="Of the maps. Default: the deepest before the last reduction."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Test images at most.", min=1)] = 400,
    fail_over: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Exit with 1 where replacing a region changes more of a student's predictions.",
            min=0.0,
            max=1.0,
        ),
    ] = None,
    device: Device = None,
    safe: Safe = False,
    trust: Trust = False,
) -> None:
    """Is a model looking where it should? What border, corners and background are worth to it.

    Where nothing should tell the class: the share of relevance there, beside its chance level and
    the teacher's; accuracy, and the share of predictions that change, once the region is blurred,
    has the mean colour, or is another image's. With masks also for the most relevant part outside
    of the object, the share of relevance in all that lies outside, and the accuracy with the object
    gone: a model that is still right sees something else. Writes audit.json and audit.png, the
    images with the largest effect, into each run folder; with --data audit-FOLDER.json and .png.
    Runs the code that a run's config names, as `explain` does. Examples:

        kd-lrp audit runs/phantom/kd/*/0

        kd-lrp audit runs/phantom_marked/kd/test_resnet_from_resnet10t/0 --fail-over 0.1

        kd-lrp audit runs/folder/ce/resnet10t/0 --data images/another_hospital

        kd-lrp audit exported_by_a_colleague --data images/our_hospital
    """
    over = []
    with RichProgress(), errors_in_words():
        from kd_lrp_plugin.evaluation.audit import AuditOptions, audit, name_files
        from kd_lrp_plugin.evaluation.explain_inputs import list_runs
        from kd_lrp_plugin.runs.trust import check_trusted
        from kd_lrp_plugin.utils.distributed import init_distributed

        folders = [folder for folder, _ in list_runs(runs)]
        check_trusted(folders, trust, safe)
        with init_distributed(device) as context:
            options = AuditOptions(layer, samples, data, context.device, safe)
            table, picture = name_files(options)
            for run in folders:
                found = audit(run, options)
                say(f"\n{run}, {found['images']} images\n")
                say(tables.table(tables.audit_rows(found)))
                for role, of in found["object_removed"].items():
                    if of:
                        before, after = of["accuracy_before"], of["accuracy"]
                        words = f"accuracy {after:.3f}, before {before:.3f}"
                        say(f"{role} with the object gone: {words}")
                say(f"written: {run}/{table}, {picture}")
                if fail_over is not None and found["most_flips"] > fail_over:
                    over.append((run, found["most_flips"]))
    for run, share in over:
        say(f"{run}: {share:.3f} of the predictions change, over {fail_over}", "red", errors)
    if over:
        raise typer.Exit(1)
