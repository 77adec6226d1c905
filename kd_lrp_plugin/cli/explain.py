"""``kd-lrp explain``."""

from pathlib import Path
from typing import Annotated

import typer

from kd_lrp_plugin.cli.completion import complete_attribution, complete_role
from kd_lrp_plugin.cli.console import Device, RichProgress, Safe, Trust, errors_in_words, say
from kd_lrp_plugin.plots import tables


def explain(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN|STUDY...", help="Finished runs, or all of a study.")
    ],
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Such as grad_cam, lrp_composite, score_cam, lime or rise; repeatable. "
            "Default: all that can handle the model, of them only those that --quick leaves.",
            autocompletion=complete_attribution,
        ),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            help="Of the model, such as blocks.4; repeatable, which gives a table of methods and "
            "layers. Default: the deepest before the last reduction."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="student or teacher; default: both.", autocompletion=complete_role),
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(help="An image file to picture, without metrics; repeatable."),
    ] = None,
    n: Annotated[
        int, typer.Option("--n", help="Test images to picture, of all classes, with errors.", min=1)
    ] = 8,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Test images for every metric, a half or a quarter of them for the random "
            "networks. Default: all with a mask for quick methods, 32 for what takes long.",
            min=1,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for maps.png and explanations.csv of all runs.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick/--full",
            help="Leave out what asks a model hundreds of times for a map (Score-CAM, LIME, RISE), "
            "unless --method names it. Two runs of 60 images take about a minute; with --full "
            "many times as long.",
        ),
    ] = True,
    subclasses: Annotated[
        bool,
        typer.Option(
            "--subclasses", help="Explain subclasses, of a run that has them, and not classes."
        ),
    ] = False,
    seed: Annotated[
        list[int] | None,
        typer.Option(help="Of a study, the runs of this seed alone; repeatable. Default: all."),
    ] = None,
    device: Device = None,
    safe: Safe = False,
    trust: Trust = False,
) -> None:
    """Where do teacher and student look? Relevance maps side by side, and how good they are.

    Writes explanations.png and explanations.json into each run folder, and with --out all runs
    side by side. The metrics are of the true class: relevance inside the tumour's mask beside
    its chance level, agreement of student and teacher, insertion and deletion, and the likeness
    to the maps of a network with random weights, which should be near 0. What is computed is
    kept, so a command that was stopped resumes. Runs the code that the config.yaml of each run
    names; a run that was not made here needs --trust, or --safe, which refuses such code. Examples:

        kd-lrp explain runs/brain_mri/kd/*/0 --out compared --method grad_cam --method lrp_zplus

        kd-lrp explain runs/studies/core --seed 0 --layer blocks.4 --method gradient_activation

        kd-lrp explain RUN --model teacher --layer blocks.2 --layer blocks.4 --layer blocks.6

        kd-lrp explain RUN --images scan.jpg --method lrp_composite
    """
    roles = tuple(model or ("student", "teacher"))
    last = "What is finished stays; the same command resumes from there."
    with RichProgress(), errors_in_words(last):
        from kd_lrp_plugin.attribution import summary
        from kd_lrp_plugin.evaluation import explain, explain_inputs
        from kd_lrp_plugin.runs.trust import check_trusted
        from kd_lrp_plugin.utils.distributed import init_distributed

        check_trusted([run for run, _ in explain_inputs.list_runs(runs, seed or ())], trust, safe)
        with init_distributed(device) as context:
            options = explain_inputs.ExplainOptions(
                *(method or (), layer or (), roles, images or (), n, samples, out),
                device=context.device,
                safe=safe,
                subclasses=subclasses,
                quick=quick,
                seeds=seed or (),
            )
            rows = explain.explain(runs, options)
    parts = summary.brief(rows)
    for heading, part in parts.items():
        say(f"\n{heading}\n")
        say(tables.table(part))
    if parts:
        say(f"\n{summary.explain_columns(parts)}")
    if len({row["layer"] for row in rows} - {"input"}) > 1:
        for figure in summary.INSIDE:
            if not any(figure in row["metrics"] for row in rows):
                continue
            say(f"\n{figure}: {summary.METRICS[figure]}\n")
            say(tables.table(summary.by_layer(rows, figure)))
    name = f"explanations{'-subclasses' * subclasses}"
    made = [f"{name}-images.png"] if images else [f"{name}.json", f"{name}.png"]
    say(f"\nwritten to each run folder: {', '.join(made)}")
    if out is not None:
        say(f"written to {out}: maps.png, maps.json{'' if images else ', explanations.csv'}")
