"""``kd-lrp report``."""

from pathlib import Path
from typing import Annotated

import typer

from kd_lrp_plugin.cli.console import RichProgress, errors_in_words, say


def report(
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
) -> None:
    """One HTML page about runs and studies, for the browser, the phone and the printer.

    Accuracy with intervals and cost of teacher and students side by side, confusion matrices,
    curves of every loss term, maps, rankings, tables of studies, the leak check, and the commands
    that make it all again. The page is one file below 5 MB that loads nothing. Files are read, and
    nothing is run: what is missing, such as the evaluation of a run, is said with the command that
    makes it. Examples:

        kd-lrp report runs/brain_mri/kd/*/0 --data-check check --out page.html

        kd-lrp report runs/studies/core --out core.html
    """
    with RichProgress(), errors_in_words():
        from kd_lrp_plugin.report import page

        size = page.write(folders, out, data_check, selection, maps)
    say(f"written: {out} ({size / 1e6:.1f} MB)")
