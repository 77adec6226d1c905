"""Accuracy by group: images that a shortcut serves, misleads, or does not concern."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import binomtest

from kd_lrp_plugin.utils.validation import message


def group_metrics(
    probabilities: Float[np.ndarray, "n outputs"],
    labels: Int[np.ndarray, " n"],
    groups: Sequence[str],
    confidence: float = 0.95,
    teacher: Float[np.ndarray, "n outputs"] | None = None,
) -> dict[str, Any]:
    """How often a classifier is right in each group of images, and in the worst of them.

    Args:
        probabilities: of one model; a row per image.
        labels: class indices.
        groups: the name of each image's group.
        confidence: of the intervals, in (0, 1).
        teacher: probabilities of the teacher, for the same images.

    Returns:
        ``by_group``: by name, in the order of appearance, ``n``, ``accuracy``,
        ``accuracy_interval`` ([low, high], Wilson's) and, with a teacher, ``minus_teacher``, the
        accuracy minus the teacher's; ``worst_group`` and ``worst_group_accuracy``.

    Raises:
        ValueError: if there are no images, or not one label and one group for each.

    Example:
        >>> values = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
        >>> found = group_metrics(values, np.array([0, 1, 1]), ["none", "random", "random"])
        >>> found["worst_group"], found["worst_group_accuracy"]
        ('random', 0.5)

    Reference:
        Sagawa et al., ICLR 2020 (accuracy of the worst group); Wilson, JASA 1927 (interval).
    """
    if not len(groups) or not len(probabilities) == len(labels) == len(groups):
        got = f"{len(probabilities)} rows, {len(labels)} labels and {len(groups)} groups"
        fix = "Give one of each for every image."
        raise ValueError(message("group_metrics", "as many labels and groups as rows", got, fix))
    right = np.asarray(probabilities).argmax(1) == np.asarray(labels)
    of_teacher = None if teacher is None else np.asarray(teacher).argmax(1) == np.asarray(labels)
    names = np.asarray(groups)
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(groups):
        hits = right[names == name]
        interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(confidence, "wilson")
        found[name] = {
            "n": len(hits),
            "accuracy": float(hits.mean()),
            "accuracy_interval": [float(interval.low), float(interval.high)],
        }
        if of_teacher is not None:
            gap = hits.mean() - of_teacher[names == name].mean()
            found[name]["minus_teacher"] = float(gap)
    worst = min(found, key=lambda name: found[name]["accuracy"])
    return {
        "by_group": found,
        "worst_group": worst,
        "worst_group_accuracy": found[worst]["accuracy"],
    }
