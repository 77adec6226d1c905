"""``kd-lrp predict``."""

from pathlib import Path
from typing import Annotated

import typer

from kd_lrp_plugin.cli.console import Safe, Trust, errors_in_words, say
from kd_lrp_plugin.plots import tables


def predict(
    run: Annotated[Path, typer.Argument(help="A run folder that kd-lrp distill has written.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    safe: Safe = False,
    trust: Trust = False,
) -> None:
    """Classify image files with the student of a run. Not for clinical use.

    Runs the code that the run's config.yaml names; a run that was not made here needs --trust, or
    --safe, which refuses such code. Example:

        kd-lrp predict runs/phantom/kd/test_resnet_from_resnet10t/0 scan.png
    """
    with errors_in_words():
        from kd_lrp_plugin.evaluation import evaluate
        from kd_lrp_plugin.runs.trust import check_trusted

        check_trusted([run], trust, safe)
        records = evaluate.predict(run, images, safe)
    columns = ["file", "class", "probability", "subclass"]
    say(tables.table(records, [name for name in columns if name in records[0]]))
