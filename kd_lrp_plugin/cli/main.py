"""The command line ``kd-lrp``: its commands.

Nothing that a command computes with is imported here or at the head of a command's file: help and
every TAB would have to wait for it.
"""

import logging
import sys
from typing import Annotated

from kd_lrp_plugin.utils.extras import explain_missing

try:
    import typer

    from kd_lrp_plugin.cli import (
        audit,
        check,
        check_data,
        configs,
        distill,
        evaluate,
        explain,
        export,
        init,
        predict,
        report,
        select,
        study,
    )
except ModuleNotFoundError as missing:
    if (what_to_install := explain_missing(missing)) is None:
        raise

    def app() -> None:
        """Says what to install."""
        sys.exit(what_to_install)

else:
    app = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        help="Explanation-guided knowledge distillation on torchdistill configs.",
    )

    def _show_version(asked: bool) -> None:
        if asked:
            from kd_lrp_plugin import __version__

            typer.echo(f"kd-lrp {__version__}")
            raise typer.Exit

    @app.callback()
    def main(
        verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the log.")] = False,
        version: Annotated[
            bool,
            typer.Option(
                "--version", callback=_show_version, is_eager=True, help="Show the version."
            ),
        ] = False,
    ) -> None:
        logging.basicConfig(level=logging.INFO if verbose else logging.WARNING)
        logging.getLogger().setLevel(logging.INFO)
        for handler in logging.getLogger().handlers:
            handler.setLevel(logging.INFO if verbose else logging.WARNING)

    app.command()(init.init)
    app.command()(distill.distill)
    app.command()(check.check)
    app.command()(evaluate.evaluate)
    app.command()(select.select)
    app.command()(predict.predict)
    app.command()(export.export)
    app.command()(study.study)
    app.command()(check_data.check_data)
    app.command()(explain.explain)
    app.command()(audit.audit)
    app.command()(report.report)
    app.command()(configs.configs)
