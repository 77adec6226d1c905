"""What a student and its teacher agree on, and which of them is right."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.special import rel_entr
from scipy.stats import binomtest
from torch import Tensor

from kd_lrp_plugin.metrics.classification import (
    check_label_range,
    check_labels,
    check_probabilities,
    defined_mean,
)
from kd_lrp_plugin.utils.validation import message

_SMALLEST = float(np.finfo(np.float64).eps)  # scikit-learn's log_loss has the same floor


def compare_predictions(
    student: Float[np.ndarray | Tensor, "n outputs"],
    teacher: Float[np.ndarray | Tensor, "n outputs"],
    labels: Int[np.ndarray | Tensor, " n"],
    images: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    r"""Where a student and its teacher say the same, and which of them is right.

    Args:
        student: softmax outputs; each row sums to one.
        teacher: softmax outputs for the same images.
        labels: class indices.
        images: what each row is of, if rows may be of one image, as those of its variants.

    Returns:
        A record that JSON can hold: ``n``; ``agreement`` (share of images with the same
        prediction), also among those where the teacher is right and where it is wrong
        (``agreement_where_teacher_right``, ``agreement_where_teacher_wrong``; None without such
        images); ``kl_divergence`` (mean of :math:`KL(teacher \| student)` in nats, no
        probability below 2.2e-16); the counts ``both_right``, ``only_student_right``,
        ``only_teacher_right`` and ``both_wrong``; ``accuracy_difference`` (student minus teacher)
        and its two-sided ``p_value``: how often models of equal accuracy differ as much.

    Raises:
        ValueError: if there are no images, shapes do not fit, labels are out of range or rows
            are not probabilities.
        TypeError: if labels are not integers.

    Example:
        >>> student = np.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]])
        >>> teacher = np.array([[0.8, 0.2], [0.9, 0.1], [0.6, 0.4]])
        >>> record = compare_predictions(student, teacher, np.array([0, 0, 1]))
        >>> record["agreement_where_teacher_right"], record["agreement_where_teacher_wrong"]
        (0.5, 1.0)

    Reference:
        McNemar, Psychometrika 1947, in its exact form (a binomial test on the images that only
        one of them gets right). Deviation: of an image with several rows, the one that gets more of
        them right.
    """
    where = "compare_predictions"
    ours, theirs = check_probabilities(where, student), check_probabilities(where, teacher)
    truth = check_labels(where, labels)
    if ours.shape != theirs.shape or len(truth) != len(ours):
        shapes = {"student": ours.shape, "teacher": theirs.shape, "labels": truth.shape}
        expected = "probabilities of one shape (n, outputs) and labels (n,)"
        raise ValueError(message(where, expected, shapes, "Give both models the same images."))
    check_label_range(where, truth, ours.shape[1])
    if images is not None and len(images) != len(truth):
        fix = "Name the image of each row."
        raise ValueError(message(where, f"{len(truth)} images, one per row", len(images), fix))

    same = ours.argmax(1) == theirs.argmax(1)
    right, taught = ours.argmax(1) == truth, theirs.argmax(1) == truth
    gained, lost = int((right & ~taught).sum()), int((taught & ~right).sum())
    balance: Counter[Hashable] = Counter()
    for image, step in zip(images or range(len(truth)), right.astype(int) - taught, strict=True):
        balance[image] += int(step)
    better, worse = (sum(sign * of > 0 for of in balance.values()) for sign in (1, -1))
    divergence = rel_entr(theirs.clip(_SMALLEST), ours.clip(_SMALLEST)).sum(1).mean()
    return {
        "n": len(truth),
        "agreement": defined_mean(same),
        "agreement_where_teacher_right": defined_mean(same[taught]),
        "agreement_where_teacher_wrong": defined_mean(same[~taught]),
        "kl_divergence": float(divergence),
        "both_right": int((right & taught).sum()),
        "only_student_right": gained,
        "only_teacher_right": lost,
        "both_wrong": int((~right & ~taught).sum()),
        "accuracy_difference": (gained - lost) / len(truth),
        "p_value": float(binomtest(better, better + worse).pvalue) if better + worse else 1.0,
    }
