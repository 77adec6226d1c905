"""``kd-lrp export``."""

from pathlib import Path
from typing import Annotated

import typer

from kd_lrp_plugin.cli.completion import complete_format
from kd_lrp_plugin.cli.console import RichProgress, Safe, Trust, errors_in_words, say
from kd_lrp_plugin.plots import tables


def export(
    run: Annotated[Path, typer.Argument(help="A run folder that kd-lrp distill has finished.")],
    format: Annotated[
        str, typer.Option(help="onnx, timm or pt2.", autocompletion=complete_format)
    ] = "onnx",
    int8: Annotated[
        bool, typer.Option("--int8", help="Also an ONNX file in int8, calibrated and measured.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A new folder. Default: export-FORMAT in the run folder, where kd-lrp report "
            "finds it.",
        ),
    ] = None,
    agreement: Annotated[
        float,
        typer.Option(
            help="Of int8 with float32 on validation images; first layers stay in float until it "
            "is reached.",
            min=0.0,
            max=1.0,
        ),
    ] = 0.98,
    data_check: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="What kd-lrp check-data has written, for the model card."),
    ] = None,
    safe: Safe = False,
    trust: Trust = False,
) -> None:
    """The student of a run as ONNX, for timm, or as PyTorch's own archive. Not for clinical use.

    Writes a new folder with export.json; nothing is overwritten, and nothing is written that does
    not compute the student's logits again, to 1e-3, on all test images. int8 is static, by channel,
    with the ranges of training images; its accuracy, its agreement and its size are measured on
    the test images. Latency is of one image at one thread, of this machine, now. Needs the run's
    data. Runs the code that the run's config.yaml names; a run that was not made here needs
    --trust, or --safe, which refuses such code. Examples:

        kd-lrp export RUN --int8 --out student

        kd-lrp export RUN --format timm --data-check check
    """
    with RichProgress(), errors_in_words("Nothing is written."):
        from kd_lrp_plugin.evaluation.export.export import ExportOptions
        from kd_lrp_plugin.evaluation.export.export import export as write
        from kd_lrp_plugin.runs.trust import check_trusted

        options = ExportOptions(format, int8, out, agreement, data_check, safe)
        check_trusted([run], trust, safe)
        record = write(run, options)
    say(tables.table(tables.export_rows(record)))
    say(f"\n{tables.describe_export(record)}")
    say(f"written: {out or run / f'export-{format}'}")
