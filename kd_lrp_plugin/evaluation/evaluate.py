"""The full evaluation of a finished run, and its predictions on new images."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from kd_lrp_plugin.data.transforms import make_transforms
from kd_lrp_plugin.metrics.agreement import compare_predictions
from kd_lrp_plugin.metrics.classification import classification_metrics
from kd_lrp_plugin.metrics.efficiency import cost
from kd_lrp_plugin.metrics.groups import group_metrics
from kd_lrp_plugin.plots.figures import confusion_figure, reliability_figure
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.runs.loading import build_untrained, load_run, read_model_entries
from kd_lrp_plugin.runs.predictions import read_prediction_groups, read_predictions
from kd_lrp_plugin.utils.validation import message


def predict(
    folder: str | Path, images: Sequence[str | Path], safe: bool = False
) -> list[dict[str, Any]]:
    """What the student of a run makes of image files.

    Args:
        folder: a finished run.
        images: files.
        safe: see :func:`load_run`.

    Returns:
        One record per image: file, class and its probability, and all probabilities by class.

    Raises:
        FileNotFoundError: if there is no run or no image.
        ValueError: for a file that is no image, or a run with a preprocessing of its own.
    """
    model, summary = load_run(folder, safe)
    if summary["preprocessing"] is None:
        fix = "Load the model with results.load_run, and prepare the images as in training."
        raise ValueError(message("predict", "a known preprocessing", "a custom one", fix))
    prepare = make_transforms(**summary["preprocessing"])
    records = []
    for file in images:
        try:
            with Image.open(file) as image:
                batch = prepare(image.convert("RGB"))[None]
        except FileNotFoundError:
            raise FileNotFoundError(message("predict", "an image", f"none at {file}", "")) from None
        except OSError as error:
            raise ValueError(message(f"predict {file}", "an image", str(error), "")) from error
        with torch.no_grad():
            probabilities = model(batch)[0].softmax(0)
        names = summary["classes"] or [str(place) for place in range(len(probabilities))]
        by_class = dict(zip(names, probabilities.tolist(), strict=False))
        best = max(by_class, key=by_class.__getitem__)
        records.append(
            {"file": str(file), "class": best, "probability": by_class[best], "all": by_class}
        )
    return records


def evaluate(folder: str | Path, resamples: int = 2000, safe: bool = False) -> dict[str, Any]:
    """Everything that can be said of a run from its predictions on the test set and its models.

    Writes ``evaluation.json``, ``confusion.png`` and ``reliability.png`` into the run folder.

    Args:
        folder: a finished run.
        resamples: of the bootstrap interval of the accuracy.
        safe: see :func:`load_run`.

    Returns:
        By "student", and "teacher" where the run has one: the figures of
        :func:`~kd_lrp_plugin.metrics.classification.classification_metrics` and, under "cost",
        those of :func:`~kd_lrp_plugin.metrics.efficiency.cost`, None for images that are not
        square. Under "student_and_teacher" those of
        :func:`~kd_lrp_plugin.metrics.agreement.compare_predictions`.

    Raises:
        FileNotFoundError: if the folder holds no finished run.
    """
    run = RunFolder(folder)
    summary = run.summary()
    text = (run / "predictions.csv").read_text(encoding="utf-8")
    labels, probabilities = read_predictions(text)
    groups = read_prediction_groups(text)
    classes = summary["classes"] or [str(i) for i in range(probabilities["student"].shape[1])]
    found: dict[str, Any] = {}
    entries = read_model_entries(run, summary, safe)
    for role, values in probabilities.items():
        figures = classification_metrics(values, labels, classes, resamples)
        channels, height, width = summary["image_shape"]
        figures["cost"] = (
            cost(build_untrained(role, entries), height, channels) if height == width else None
        )
        if groups:
            figures["groups"] = group_metrics(values, labels, groups)
        found[role] = figures
    if "teacher" in probabilities:
        found["student_and_teacher"] = compare_predictions(
            probabilities["student"], probabilities["teacher"], labels
        )
    names = [row["class"] for row in found["student"]["per_class"]]
    matrices = {role: found[role]["confusion_matrix"] for role in probabilities}
    curves = {
        role: (values.max(1), values.argmax(1) == labels) for role, values in probabilities.items()
    }
    confusion, reliability = confusion_figure(matrices, names), reliability_figure(curves)
    run.put("confusion.png", lambda file: confusion.savefig(file, format="png"))
    run.put("reliability.png", lambda file: reliability.savefig(file, format="png"))
    run.write("evaluation.json", json.dumps(found, indent=2))  # last: with it, all is there
    return found
