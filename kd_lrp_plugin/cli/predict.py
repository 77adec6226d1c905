"""``kd-lrp predict``."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from kd_lrp_plugin.cli.completion import complete_attribution
from kd_lrp_plugin.cli.console import RichProgress, Safe, Trust, errors, errors_in_words, say
from kd_lrp_plugin.plots import tables


def predict(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|EXPORT|ONNX",
            help="A finished run, a folder that kd-lrp export has written, or an ONNX file of it.",
        ),
    ],
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE|FOLDER|TABLE...",
            help="Image files, folders of images, and tables (.csv, .tsv) that list images.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv",
            help="A new table of all probabilities; a .json beside it has command and calibration.",
        ),
    ] = None,
    maps: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="A new folder for a picture of each image with its relevance map."
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="Of the maps.", autocompletion=complete_attribution)
    ] = "grad_cam",
    column: Annotated[
        str, typer.Option(help="Of the tables: its files count from the table's folder.")
    ] = "file",
    safe: Safe = False,
    trust: Trust = False,
) -> None:
    """Classify images with the student of a run, or with what it was exported to. Not for
    clinical use.

    Images are prepared as in the run's validation. What the probabilities are worth is said: the
    calibration error on the run's test set. An image that cannot be read is named, the others are
    predicted, and the command exits with 1. Runs the code that the run's config.yaml names; a run
    that was not made here needs --trust, or --safe, which refuses such code. Examples:

        kd-lrp predict runs/phantom/kd/test_resnet_from_resnet10t/0 scan.png

        kd-lrp predict RUN scans --out predictions.csv --maps maps --method lrp_composite

        kd-lrp predict student/student-int8.onnx patients.csv --column image --out predictions.csv
    """
    with RichProgress(), errors_in_words():
        from kd_lrp_plugin.evaluation import predict
        from kd_lrp_plugin.evaluation.predictors import describe_calibration, open_predictor
        from kd_lrp_plugin.runs.trust import check_trusted

        predict.check_new(out)
        check_trusted([model], trust, safe)
        files = predict.list_images(images, column)
        opened = open_predictor(model, safe)
        drawn = predict.MapWriter(maps, opened, method) if maps is not None else None
        records = list(predict.predict_each(opened, files, drawn))
        if out is not None:
            predict.write_predictions(out, records, opened, drawn is not None)
    good = [record for record in records if "problem" not in record]
    if out is None:
        columns = ["file", "class", "probability"]
        say(tables.table(good, columns + ["subclass"] * bool(opened.subclasses)))
    else:
        counts = Counter(record["class"] for record in good)
        say(tables.table([{"class": name, "images": n} for name, n in counts.most_common()]))
        say(f"\nwritten: {out}, {out.with_suffix('.json')}")
    if maps is not None:
        say(f"written: {len(good)} pictures in {maps}")
    say(f"\n{describe_calibration(opened.calibration)}")
    for record in records:
        if "problem" in record:
            say(record["problem"], "red", errors)
    if len(good) < len(records):
        raise typer.Exit(1)
