"""The command line ``kd-lrp``: its commands."""

import logging
from typing import Annotated

import typer

from kd_lrp_plugin.cli import (
    check,
    check_data,
    distill,
    evaluate,
    explain,
    predict,
    report,
    select,
    study,
)

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Explanation-guided knowledge distillation on torchdistill configs.",
)


@app.callback()
def main(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the log.")] = False):
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING)
    logging.getLogger().setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.INFO if verbose else logging.WARNING)


app.command()(distill.distill)
app.command()(check.check)
app.command()(evaluate.evaluate)
app.command()(select.select)
app.command()(predict.predict)
app.command()(study.study)
app.command()(check_data.check_data)
app.command()(explain.explain)
app.command()(report.report)
