"""What the look of the images alone tells of their classes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from kd_lrp_plugin.data.leakage.images import SIDE, Fingerprint
from kd_lrp_plugin.utils.extras import imports_of_an_extra

with imports_of_an_extra():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

_BLOCK = 7  # sides of a thumbnail's pixels that are averaged: 8 x 8 are left
_MOST = 5000  # images of a part
_FEWEST = 20  # test images for a figure


def judge_by_look(
    rows: Sequence[Mapping[str, Any]], prints: Sequence[Fingerprint], first: str
) -> dict[str, Any] | None:
    """How many test images of a clean split a linear classifier of tiny thumbnails gets right.

    It knows no more than brightness and framing, which classes should not differ in unless their
    images were taken by others, elsewhere or otherwise: a network can be right for these reasons.

    Args:
        rows: of the clean split, in the order of ``prints``: ``split``, ``class``, ``kept``.
        prints: of the images, with a thumbnail.
        first: the split that is learned from; all others are tested.

    Returns:
        ``accuracy``, ``most_frequent`` (what always saying one class gets right), ``images`` (how
        many are tested) and ``side``; None where fewer than two classes, or 20 test images, are
        there to be told.
    """
    parts: dict[bool, list[int]] = {True: [], False: []}
    for index, row in enumerate(rows):
        if row["kept"]:
            parts[row["split"] == first].append(index)
    known = {str(rows[i]["class"]) for i in parts[True]}
    learned = _thin(parts[True])
    tested = _thin([i for i in parts[False] if str(rows[i]["class"]) in known])
    labels = [str(row["class"]) for row in rows]
    if (
        len(tested) < _FEWEST
        or min(len({labels[i] for i in some}) for some in (learned, tested)) < 2
    ):
        return None
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    classifier.fit(_pixels(prints, learned), [labels[i] for i in learned])
    truth = np.array([labels[i] for i in tested])
    right = classifier.predict(_pixels(prints, tested)) == truth
    return {
        "accuracy": float(right.mean()),
        "most_frequent": max(Counter(truth.tolist()).values()) / len(truth),
        "images": len(truth),
        "side": SIDE // _BLOCK,
    }


def _thin(indices: list[int]) -> list[int]:
    """At most as many as count, spread evenly."""
    step = max(1, -(-len(indices) // _MOST))
    return indices[::step]


def _pixels(prints: Sequence[Fingerprint], indices: Sequence[int]) -> Float[np.ndarray, "n pixels"]:
    stacked = np.frombuffer(b"".join(prints[i].thumbnail for i in indices), np.uint8)
    thumbnails: UInt8[np.ndarray, "n h b w b"] = stacked.reshape(
        len(indices), SIDE // _BLOCK, _BLOCK, SIDE // _BLOCK, _BLOCK
    )
    return thumbnails.mean((2, 4)).reshape(len(indices), -1)
