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
SUBCLASS = "subclass"  # of the one that data with subclasses add; empty where it is unknown
_ROLES = ("student", "teacher")


@dataclass(frozen=True)
class Predictions:
    """What ``predictions.csv`` holds.

    Attributes:
        images: names or indices of the images.
        labels: their classes.
        probabilities: by role, "student" or "teacher".
        outputs: names of the outputs, see :func:`name_outputs`.
        groups: of the images; empty where the data set has none.
        subclasses: names of the subclasses; empty where the outputs are classes.
        subclass_labels: indices of the images' subclasses, -1 where it is unknown.
        subclass_probabilities: by role, of the models that have an output per subclass; of a class
            they add up to its own.
    """

    images: list[str]
    labels: Int[np.ndarray, " n"]
    probabilities: dict[str, Float[np.ndarray, "n outputs"]]
    outputs: list[str]
    groups: list[str] = field(default_factory=list)
    subclasses: list[str] = field(default_factory=list)
    subclass_labels: list[int] = field(default_factory=list)
    subclass_probabilities: dict[str, Float[np.ndarray, "n subclasses"]] = field(
        default_factory=dict
    )


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
    subclasses: Sequence[str] = (),
) -> str:
    """A table with a row per image: its name or index, class, perhaps group, all probabilities.

    With subclasses there is a column of the image's own, and their probabilities are behind those
    of the classes.

    Args:
        predictions: of :meth:`kd_lrp_plugin.training.meter.Meter.predictions`.
        classes: their names, see :func:`name_outputs`.
        names: of the images.
        groups: of the images, where the data set has any.
        subclasses: names of the subclasses, where the outputs are theirs.
    """
    roles = [role for role in _ROLES if predictions and predictions[0][role]]
    inner = [f"{role} {SUBCLASS}" for role in roles] if subclasses else []
    widths = [len(predictions[0][role]) for role in roles]
    known = name_outputs(classes, max([*widths, 1, *(row["label"] + 1 for row in predictions)]))
    titles = [
        f"{role}: {known[i]}" for role, n in zip(roles, widths, strict=True) for i in range(n)
    ]
    titles += [f"{role}: {name}" for role in inner for name in subclasses]
    rows = [
        [names[i] if names else i, known[row["label"]], *(groups[i : i + 1] if groups else [])]
        + ([_name(subclasses, row[SUBCLASS])] if subclasses else [])
        + [f"{p:.9g}" for role in (*roles, *inner) for p in row[role]]
        for i, row in enumerate(predictions)
    ]
    first = [*([GROUP] if groups else []), *([SUBCLASS] if subclasses else [])]
    return to_csv(["image", "label", *first, *titles], rows)


def _name(subclasses: Sequence[str], index: int | None) -> str:
    return "" if index is None else subclasses[index]


def read_predictions(folder: RunRecord) -> Predictions:
    """What :func:`predictions_csv` has written, as it was at the end of the run.

    Raises:
        ValueError: if it is damaged, or holds no probabilities, as those of a student whose weights
            are not finite.
    """
    file = folder.check_output("predictions.csv")
    titles, *rows = read_csv(file, _REPAIR)
    columns: dict[str, list[int]] = {}
    has_groups = titles[2:3] == [GROUP]
    first = 3 if has_groups else 2
    has_subclasses = titles[first : first + 1] == [SUBCLASS]
    first += has_subclasses
    for index, title in enumerate(titles[first:], start=first):
        columns.setdefault(title.partition(": ")[0], []).append(index)
    if titles[:2] != ["image", "label"] or not rows or "student" not in columns:
        raise damaged(file, "predictions of a student", f"columns {titles[:3]}", _REPAIR)
    inner = {f"{role} {SUBCLASS}": role for role in _ROLES} if has_subclasses else {}
    if columns.keys() - {*_ROLES, *inner}:
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
            model = inner.get(role, role)
            fix = f"Its weights, or those it was trained with, are broken: train the {model} again."
            got = f"{int((~np.isfinite(values)).any(1).sum())} of {len(values)} that are not"
            raise damaged(file, f"finite predictions of the {role}", got, fix)
        if values.min() < 0 or np.abs(values.sum(1) - 1).max() > 1e-3:
            raise damaged(file, f"probabilities of the {role}", "other numbers", _REPAIR)
        probabilities[role] = values
    labels = np.array([outputs.index(row[1]) for row in rows])
    groups = [row[2] for row in rows] if has_groups else []
    of_subclasses = {inner[role]: probabilities.pop(role) for role in inner if role in columns}
    subclasses: list[str] = []
    own: list[int] = []
    if has_subclasses:
        named = columns.get(f"student {SUBCLASS}", [])
        subclasses = [titles[index].partition(": ")[2] for index in named]
        cells = [row[first - 1] for row in rows]
        if unknown := sorted(set(cells) - {"", *subclasses}):
            raise damaged(file, f"subclasses among {subclasses}", unknown[:3], _REPAIR)
        own = [subclasses.index(cell) if cell else -1 for cell in cells]
    images = [row[0] for row in rows]
    return Predictions(
        images, labels, probabilities, outputs, groups, subclasses, own, of_subclasses
    )
