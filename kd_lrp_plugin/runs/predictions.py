"""``predictions.csv``: probabilities of student and teacher on the test set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from kd_lrp_plugin.runs.record import RERUN, RunRecord
from kd_lrp_plugin.utils.files import damaged, read_csv, to_csv

_REPAIR = f"Delete it, and rerun {RERUN.rstrip(',')}: it tests the weights that are kept."

GROUP = "group"  # title of the column that a data set with groups adds


@dataclass(frozen=True)
class Predictions:
    """What ``predictions.csv`` holds.

    Attributes:
        images: names or indices of the images.
        labels: their classes.
        probabilities: by role, "student" or "teacher".
        outputs: names of the outputs, see :func:`name_outputs`.
        groups: of the images; empty where the data set has none.
    """

    images: list[str]
    labels: Int[np.ndarray, " n"]
    probabilities: dict[str, Float[np.ndarray, "n outputs"]]
    outputs: list[str]
    groups: list[str] = field(default_factory=list)


def name_outputs(classes: Sequence[str], n: int) -> list[str]:
    """Names of a model's outputs: the classes, then what a wider head has beyond them.

    Example:
        >>> name_outputs(["cat", "dog"], 3), name_outputs([], 2)
        (['cat', 'dog', 'output 2'], ['0', '1'])
    """
    if not classes:
        return [str(i) for i in range(n)]
    return [classes[i] if i < len(classes) else f"output {i}" for i in range(n)]


def predictions_csv(
    predictions: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    names: Sequence[str] | None,
    groups: Sequence[str] | None = None,
) -> str:
    """A table with a row per image: its name or index, class, perhaps group, all probabilities.

    Args:
        predictions: of :meth:`kd_lrp_plugin.training.meter.Meter.predictions`.
        classes: their names, see :func:`name_outputs`.
        names: of the images.
        groups: of the images, where the data set has any.
    """
    roles = [role for role in ("student", "teacher") if predictions and predictions[0][role]]
    widths = [len(predictions[0][role]) for role in roles]
    known = name_outputs(classes, max([*widths, 1, *(row["label"] + 1 for row in predictions)]))
    titles = [
        f"{role}: {known[i]}" for role, n in zip(roles, widths, strict=True) for i in range(n)
    ]
    rows = [
        [names[i] if names else i, known[row["label"]], *(groups[i : i + 1] if groups else [])]
        + [f"{p:.9g}" for role in roles for p in row[role]]
        for i, row in enumerate(predictions)
    ]
    return to_csv(["image", "label", *([GROUP] if groups else []), *titles], rows)


def read_predictions(folder: RunRecord) -> Predictions:
    """What :func:`predictions_csv` has written, as it was at the end of the run.

    Raises:
        ValueError: if it is damaged, or holds no probabilities, as those of a student whose weights
            are not finite.
    """
    file = folder.check_output("predictions.csv")
    titles, *rows = read_csv(file, _REPAIR)
    columns: dict[str, list[int]] = {}
    first = 3 if titles[2:3] == [GROUP] else 2
    for index, title in enumerate(titles[first:], start=first):
        columns.setdefault(title.partition(": ")[0], []).append(index)
    if titles[:2] != ["image", "label"] or not rows or "student" not in columns:
        raise damaged(file, "predictions of a student", f"columns {titles[:3]}", _REPAIR)
    if columns.keys() - {"student", "teacher"}:
        raise damaged(file, "columns of student and teacher", f"{sorted(columns)}", _REPAIR)
    outputs = [titles[index].partition(": ")[2] for index in columns["student"]]
    if unknown := sorted({row[1] for row in rows} - set(outputs)):
        raise damaged(file, f"labels among {outputs}", unknown[:3], _REPAIR)
    probabilities = {}
    for role, indices in columns.items():
        try:
            values = np.array([[float(row[index]) for index in indices] for row in rows])
        except ValueError as error:
            raise damaged(file, "numbers", error, _REPAIR) from error
        if not np.isfinite(values).all():
            fix = f"Its weights, or those it was trained with, are broken: train the {role} again."
            got = f"{int((~np.isfinite(values)).any(1).sum())} of {len(values)} that are not"
            raise damaged(file, f"finite predictions of the {role}", got, fix)
        if values.min() < 0 or np.abs(values.sum(1) - 1).max() > 1e-3:
            raise damaged(file, f"probabilities of the {role}", "other numbers", _REPAIR)
        probabilities[role] = values
    labels = np.array([outputs.index(row[1]) for row in rows])
    groups = [row[2] for row in rows] if first == 3 else []
    return Predictions([row[0] for row in rows], labels, probabilities, outputs, groups)
