"""``kd-lrp predict``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kd_lrp_plugin.cli.console import Safe, console, errors_in_words
from kd_lrp_plugin.evaluation import evaluate


def predict(
    run: Annotated[Path, typer.Argument(help="A run folder that kd-lrp distill has written.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    safe: Safe = False,
) -> None:
    """Classify image files with the student of a run. Not for clinical use."""
    with errors_in_words():
        records = evaluate.predict(run, images, safe)
    table = Table("file", "class", "probability")
    for record in records:
        table.add_row(record["file"], record["class"], f"{record['probability']:.3f}")
    console.print(table)
