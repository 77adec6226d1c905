"""The command line, continued: what shows whether a result holds. Each imports what it needs."""

from pathlib import Path
from typing import Annotated

import typer

from kd_lrp_plugin import report
from kd_lrp_plugin.console import (
    Device,
    Overrides,
    Safe,
    Show,
    console,
    errors_in_words,
    parse_seeds,
)
from kd_lrp_plugin.processes import joined

SHOWN = 40  # files of a kind


def study(
    file: Annotated[Path, typer.Argument(help="A study, such as torchdistill_configs/studies/*.")],
    seeds: Annotated[
        str | None,
        typer.Option(help="How many, as 5, or which, as 0,1,2 or 7,; default: those of the study."),
    ] = None,
    overrides: Overrides = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="AXIS=VALUE", help="A part: of the grid, or configuration=NAME; repeatable."
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at the same time.", min=1)] = 1,
    out: Annotated[
        Path | None, typer.Option(help="For the results; default runs/studies/STUDY.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="For the runs, which studies share.")] = Path("runs"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show every run, and how far it is; do nothing.")
    ] = False,
    device: Device = None,
    safe: Safe = False,
) -> None:
    """Train every configuration of a study with every seed, and compare them.

    A study is a YAML file: a question, configurations (config files with overrides), seeds, and
    perhaps a grid, models to prepare, a configuration that the others are paired with. What is
    finished, in this study or another, is not run again; after Ctrl-C or a kill the same command
    goes on; several may work side by side. Writes study.json, study.csv (a row per run), table.md
    (means, 95 % intervals, paired differences) and study.png, anew after every run. Examples:

        kd-lrp study torchdistill_configs/studies/phantom.yaml --dry-run

        kd-lrp study torchdistill_configs/studies/core.yaml --jobs 2 --seeds 5

        kd-lrp study torchdistill_configs/studies/low_data.yaml --only "images per class=5"

        kd-lrp study my_study.yaml --set train.num_epochs=1 --seeds 0,7 --out trial
    """
    from kd_lrp_plugin import plan, study, tally  # slow: scipy's statistics

    last = "What is finished stays; the same command goes on from there."
    with errors_in_words(last):
        chosen = parse_seeds(seeds)
        if dry_run:
            planned = plan.read_plan(file, overrides or [], chosen, runs, only or [])
            print(report.table(tally.outline(planned)))
            return
        folder = out or study.default_out(file)
        with Show() as show:
            found = study.run(
                *(file, overrides or [], chosen, folder, runs, jobs, device, show, safe, only or [])
            )
    print((folder / "table.md").read_text(encoding="utf-8"))
    print(f"written: {folder}/study.json, study.csv, table.md, study.png")
    if not found["final"]:
        raise typer.Exit(1)


def check_data(
    root: Annotated[Path, typer.Argument(help="Images in ROOT/SPLIT/CLASS/ or ROOT/CLASS/.")],
    out: Annotated[Path, typer.Option(help="Folder for the answer, outside of ROOT.")],
    test_share: Annotated[
        float, typer.Option(help="Of the images to propose as test set, if there are no splits.")
    ] = 0.2,
    group_by: Annotated[
        str | None,
        typer.Option(help="Column of the manifest, such as patient, that must not be divided."),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(help="CSV with columns file, perhaps split and class; ROOT/manifest.csv."),
    ] = None,
) -> None:
    """Does the test set leak? Faulty files, class balance, twins, and a split without them.

    Twins are images of the same pixels, or that look the same: re-encoded, resized, mirrored,
    brighter. Writes pairs.csv, pairs.png to judge them by eye, summary.json and clean_split.csv;
    the images stay as they are. `folder_images` reads the clean split by `manifest:
    DIR/clean_split.csv`. A call that was killed goes on when it is given again. Examples:

        kd-lrp check-data images --out checked

        kd-lrp check-data images --out checked --group-by patient --manifest patients.csv
    """
    from kd_lrp_plugin import leaks

    last = "What was read is kept; the same command goes on from there."
    with Show() as show, errors_in_words(last):
        found = leaks.check_data(root, out, test_share, group_by, manifest, show)
    for name in ("splits", "clean"):
        print(f"\n{'given' if name == 'splits' else 'clean split'}\n")
        rows = [
            {"split": split, **of, "all": sum(of.values())} for split, of in found[name].items()
        ]
        print(report.table(rows, list(dict.fromkeys(key for row in rows for key in row))))
    for name in ("sizes", "modes", "formats"):
        counts = [f"{value} ({n:,})" for value, n in found[name].items()]
        rest = f" and {len(counts) - 5} more" if len(counts) > 5 else ""
        print(f"{name}: {', '.join(counts[:5])}{rest}")
    for name in ("unreadable", "odd", "not_in_the_set"):
        for file, why in list(found[name].items())[:SHOWN]:
            print(f"{name.replace('_', ' ')}: {file}: {why}")
        if (more := len(found[name]) - SHOWN) > 0:
            print(f"{name.replace('_', ' ')}: {more:,} more, in summary.json")
    print("\npairs of twins\n")
    print(report.table([{"where": place, **n} for place, n in found["pairs"].items()]))
    print(f"\n{found['verdict']}")
    made = [name for name in leaks.OUTPUTS if (out / name).exists()]
    print(f"written to {out}: {', '.join(made)}")


def report_page(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN|STUDY...", help="Finished runs, and studies.")
    ],
    out: Annotated[Path, typer.Option(help="The page; an older one of kd-lrp is replaced.")],
    data_check: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What kd-lrp check-data has written.")
    ] = None,
    selection: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Record of a chosen student; default: that of a run."),
    ] = None,
    maps: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What kd-lrp explain has written with --out.")
    ] = None,
    safe: Safe = False,
) -> None:
    """One HTML page about runs and studies, for the browser, the phone and the printer.

    Accuracy with intervals and cost of teacher and students side by side, confusion matrices,
    curves of every loss term, maps, rankings, tables of studies, the leak check, and the commands
    that make it all again. The page is one file below 5 MB that loads nothing. Runs that are not
    evaluated yet are evaluated first; what is missing is said, with the command that makes it.
    Examples:

        kd-lrp report runs/brain_mri/kd/*/0 --data-check check --out page.html

        kd-lrp report runs/studies/core --out core.html
    """
    from kd_lrp_plugin import page

    with Show() as show, errors_in_words():
        size = page.write(folders, out, data_check, selection, maps, show, safe)
    console.print(f"written: {out} ({size / 1e6:.1f} MB)", soft_wrap=True, highlight=False)


def explain(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN|STUDY...", help="Finished runs, or all of a study.")
    ],
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Such as grad_cam, lrp_composite, score_cam or lime; repeatable. "
            "Default: all that can handle the model."
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
        list[str] | None, typer.Option(help="student or teacher; default: both.")
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(help="An image file to picture, without figures; repeatable."),
    ] = None,
    n: Annotated[
        int, typer.Option("--n", help="Test images to picture, of all classes, with errors.", min=1)
    ] = 8,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Test images for every figure, a half or a quarter of them for the random "
            "networks. Default: all with a mask for quick methods, 32 for what takes long.",
            min=1,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for maps.png and explanations.csv of all runs.")
    ] = None,
    device: Device = None,
    safe: Safe = False,
) -> None:
    """Where do teacher and student look? Relevance maps side by side, and how good they are.

    Writes explanations.png and explanations.json into each run folder, and with --out all runs
    side by side. The figures are of the true class: relevance inside the tumour's mask beside
    its chance level, agreement of student and teacher, insertion and deletion, and the likeness
    to the maps of a network with random weights, which should be near 0. What is computed is
    kept, so a command that was stopped goes on. Examples:

        kd-lrp explain runs/brain_mri/kd/*/0 --out compared --method grad_cam --method lrp_zplus

        kd-lrp explain runs/studies/core --layer blocks.4 --method gradient_activation

        kd-lrp explain RUN --model teacher --layer blocks.2 --layer blocks.4 --layer blocks.6

        kd-lrp explain RUN --images scan.jpg --method lrp_composite
    """
    from kd_lrp_plugin import explaining, tables

    roles = tuple(model or ("student", "teacher"))
    last = "What is finished stays; the same command goes on from there."
    with Show() as show, errors_in_words(last), joined(device) as here:
        options = (method or (), layer or (), roles, images or (), n, samples, out)
        rows = explaining.explain(runs, *options, here.device, safe, show)
    if rows:
        print(report.table(tables.records(rows)))
    if len({row["layer"] for row in rows} - {"input"}) > 1:
        for figure in ("mass_inside", "rank_accuracy", "pointing_game"):
            print(f"\n{figure}: {tables.FIGURES[figure]}\n")
            print(report.table(tables.by_layer(rows, figure)))
    made = ["explanations-images.png"] if images else ["explanations.json", "explanations.png"]
    print(f"\nwritten to each run folder: {', '.join(made)}")
    if out is not None:
        print(f"written to {out}: maps.png, maps.json{'' if images else ', explanations.csv'}")
