"""``predictions.csv``: probabilities of student and teacher on the test set."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kd_lrp_plugin.utils.files import to_csv


def predictions_csv(
    predictions: Sequence[Mapping[str, Any]], classes: Sequence[str], names: Sequence[str] | None
) -> str:
    """A table with a row per image: its name or number, its class, all probabilities.

    Args:
        predictions: of :meth:`kd_lrp_plugin.training.meter.Meter.predictions`.
        classes: their names; outputs beyond them go by number.
        names: of the images.
    """
    roles = [role for role in ("student", "teacher") if predictions and predictions[0][role]]

    def name(place: int) -> str:
        return classes[place] if place < len(classes) else str(place)

    titles = [f"{role}: {name(i)}" for role in roles for i in range(len(predictions[0][role]))]
    rows = [
        [names[i] if names else i, name(row["label"])]
        + [f"{p:.9g}" for role in roles for p in row[role]]
        for i, row in enumerate(predictions)
    ]
    return to_csv(["image", "label", *titles], rows)


def read_predictions(text: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What :func:`predictions_csv` has written.

    Returns:
        Labels (n,), and by role ("student", "teacher") probabilities (n, outputs).
    """
    titles, *rows = csv.reader(io.StringIO(text))
    places: dict[str, list[int]] = {}
    for place, title in enumerate(titles[2:], start=2):
        places.setdefault(title.partition(": ")[0], []).append(place)
    names = [titles[place].partition(": ")[2] for place in places["student"]]
    labels = np.array([names.index(row[1]) for row in rows])
    return labels, {
        role: np.array([[float(row[place]) for place in columns] for row in rows])
        for role, columns in places.items()
    }
