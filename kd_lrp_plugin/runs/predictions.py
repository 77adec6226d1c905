"""``predictions.csv``: probabilities of student and teacher on the test set."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def predictions_csv(
    predictions: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    names: Sequence[str] | None,
    groups: Sequence[str] | None = None,
) -> str:
    """A table with a row per image: its name or number, class, perhaps group, all probabilities.

    Args:
        predictions: of :meth:`kd_lrp_plugin.training.meter.Meter.predictions`.
        classes: their names; outputs beyond them go by number.
        names: of the images.
        groups: of the images, where the data set has any.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    roles = [role for role in ("student", "teacher") if predictions and predictions[0][role]]

    def name(place: int) -> str:
        return classes[place] if place < len(classes) else str(place)

    titles = [f"{role}: {name(i)}" for role in roles for i in range(len(predictions[0][role]))]
    writer.writerow(["image", "label", *(["group"] if groups else []), *titles])
    for place, row in enumerate(predictions):
        values = [f"{p:.9g}" for role in roles for p in row[role]]
        writer.writerow(
            [
                names[place] if names else place,
                name(row["label"]),
                *(groups[place : place + 1] if groups else []),
                *values,
            ]
        )
    return text.getvalue()


def read_predictions(text: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What :func:`predictions_csv` has written.

    Returns:
        Labels (n,), and by role ("student", "teacher") probabilities (n, outputs).
    """
    titles, *rows = csv.reader(io.StringIO(text))
    places: dict[str, list[int]] = {}
    first = 3 if titles[2:3] == ["group"] else 2
    for place, title in enumerate(titles[first:], start=first):
        places.setdefault(title.partition(": ")[0], []).append(place)
    names = [titles[place].partition(": ")[2] for place in places["student"]]
    labels = np.array([names.index(row[1]) for row in rows])
    return labels, {
        role: np.array([[float(row[place]) for place in columns] for row in rows])
        for role, columns in places.items()
    }


def read_prediction_groups(text: str) -> list[str]:
    """The group of each image in what :func:`predictions_csv` has written; empty without any."""
    titles, *rows = csv.reader(io.StringIO(text))
    return [row[2] for row in rows] if titles[2:3] == ["group"] else []
