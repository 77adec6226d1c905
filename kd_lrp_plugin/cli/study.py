"""``kd-lrp study``."""

from pathlib import Path
from typing import Annotated

import typer

from kd_lrp_plugin.cli.console import (
    Device,
    Log,
    Overrides,
    RichProgress,
    Safe,
    Scheduler,
    errors_in_words,
    parse_seeds,
    say,
)
from kd_lrp_plugin.plots import tables


def study(
    file: Annotated[Path, typer.Argument(help="A study, such as torchdistill_configs/studies/*.")],
    seeds: Annotated[
        str | None,
        typer.Option(
            help="How many, as 5 (the study's first), or which, as 0,1,2 or 7,; default: all of it."
        ),
    ] = None,
    overrides: Overrides = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="AXIS=VALUE", help="A part: of the grid, or configuration=NAME; repeatable."
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs at the same time on this machine; default 1.", min=1)
    ] = None,
    scheduler: Scheduler = None,
    out: Annotated[
        Path | None, typer.Option(help="For the results; default runs/studies/STUDY.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="For the runs, which studies share.")] = Path("runs"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show every run, and how far it is; do nothing.")
    ] = False,
    device: Device = None,
    safe: Safe = False,
    log: Log = "tensorboard",
) -> None:
    """Train every configuration of a study with every seed, and compare them.

    A study is a YAML file: a question, configurations (config files with overrides), seeds, and
    perhaps a grid, models to prepare, a configuration that the others are paired with. What is
    finished, in this study or another, is not run again; after Ctrl-C or a kill the same command
    resumes; several may work side by side. Writes study.json, study.csv (a row per run), table.md
    (means, 95 % intervals, paired differences) and study.png, again after every run. Examples:

        kd-lrp study torchdistill_configs/studies/phantom.yaml --dry-run

        kd-lrp study torchdistill_configs/studies/core.yaml --jobs 2 --seeds 5

        kd-lrp study torchdistill_configs/studies/low_data.yaml --only "images per class=5"

        kd-lrp study torchdistill_configs/studies/core.yaml --scheduler tcp://host:8786

        kd-lrp study my_study.yaml --set train.num_epochs=1 --seeds 0,7 --out trial
    """
    last = "What is finished stays; the same command resumes from there."
    with errors_in_words(last):
        chosen = parse_seeds(seeds)
        if dry_run:
            from kd_lrp_plugin.studies import parser, status

            planned = parser.read_plan(file, overrides or [], chosen, runs, only or [])
            say(tables.table(status.list_status(planned)))
            return
        from kd_lrp_plugin.studies import plan, runner

        options = plan.StudyOptions(
            overrides=overrides or (),
            seeds=chosen,
            only=only or (),
            root=runs,
            out=out,
            jobs=jobs,
            device=device,
            safe=safe,
            log=log,
            scheduler=scheduler,
        )
        folder = options.get_folder(file)
        with RichProgress():
            found = runner.run_study(file, options)
    say((folder / "table.md").read_text(encoding="utf-8"))
    say(f"written: {folder}/study.json, study.csv, table.md, study.png")
    if not found["final"]:
        raise typer.Exit(1)
