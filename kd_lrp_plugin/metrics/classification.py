"""How good a student is beyond its loss: its predictions, and what its teacher makes of them.

Pure functions from probabilities and labels to records that JSON can hold, for a whole data set;
a figure that is not defined (the recall of a class without images) is None. Figures of relevance
maps are in :mod:`kd_lrp_plugin.attribution.localisation`.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kd_lrp_plugin.utils.extras import imports_of_an_extra
from kd_lrp_plugin.utils.validation import message

with imports_of_an_extra():
    from sklearn.metrics import (
        confusion_matrix,
        log_loss,
        precision_recall_fscore_support,
        roc_auc_score,
    )

BINS = 15  # of the confidence, as in Guo et al.
_SUM_TOLERANCE = 1e-3


def classification_metrics(
    probabilities: Float[np.ndarray | Tensor, "n outputs"],
    labels: Int[np.ndarray | Tensor, " n"],
    classes: Sequence[str],
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
    images: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """Figures of a classifier on one data set, of two classes or more.

    A class without images has no recall, F1 and AUC: they are None, and the means over classes
    (``balanced_accuracy``, ``macro_f1``, ``macro_auc``) leave it out. A class that is never
    predicted has no precision (None), and ``macro_precision`` leaves it out;
    its F1 is 0. Nothing in the result is nan.

    Args:
        probabilities: softmax outputs; each row sums to one.
        labels: indices into ``classes``.
        classes: names in the order of the outputs. A model may have further outputs: they are
            named by their numbers, and count as classes without images.
        resamples: of the images, for the interval.
        seed: of the resampling.
        confidence: share of the resampled accuracies inside the interval.
        images: what each row is of, if rows may be of one image, as those of its variants; they are
            drawn together, since they do not tell as much as other images would.

    Returns:
        A record that JSON can hold: ``n``, ``accuracy``, ``accuracy_interval`` ([low, high],
        percentile bootstrap over images), ``balanced_accuracy`` (mean recall), ``macro_precision``,
        ``macro_f1``,
        ``macro_auc`` (one class against the rest; None where all images are of one class),
        ``log_loss`` (in nats, no probability below 2.2e-16), ``calibration_error`` (expected,
        of the largest probability, 15 even bins), ``confusion_matrix`` (rows: true classes) and
        ``per_class``, a list of records with ``class``, ``precision``, ``recall``, ``f1``,
        ``auc`` and ``support`` (the number of images).

    Raises:
        ValueError: if there are no images, shapes do not fit, labels are out of range or rows
            are not probabilities.
        TypeError: if labels are not integers.

    Example:
        >>> probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.2, 0.8]])
        >>> figures = classification_metrics(probabilities, np.array([0, 0, 0, 1]), ["no", "yes"])
        >>> figures["accuracy"], figures["confusion_matrix"]
        (0.75, [[2, 1], [0, 1]])

    Reference:
        Efron and Tibshirani, 1993, ch. 13 (percentile interval); Guo et al., ICML 2017, eq. 3
        (calibration error). Deviation: bins are closed on the left, the last one on both sides.
    """
    where = "classification_metrics"
    values, truth = check_probabilities(where, probabilities), check_labels(where, labels)
    n, outputs = values.shape
    if len(classes) > outputs or len(truth) != n:
        got = f"{values.shape}, {truth.shape} and {len(classes)} classes"
        fix = "Give one label per image, and one column per class at least."
        expected = "probabilities (n, outputs), labels (n,) and no more classes than outputs"
        raise ValueError(message(where, expected, got, fix))
    check_label_range(where, truth, len(classes))
    if resamples < 1 or not 0 < confidence < 1:
        got = f"{resamples} and {confidence}"
        raise ValueError(message(where, "resamples >= 1 and confidence in (0, 1)", got, ""))

    if images is not None and len(images) != n:
        fix = "Name the image of each row."
        raise ValueError(message(where, f"{n} images, one per row", len(images), fix))

    names = [*map(str, classes), *map(str, range(len(classes), outputs))]
    numbers = np.arange(outputs)
    predicted = values.argmax(1)
    right = predicted == truth
    accuracy = float(right.mean())
    precision, recall, f1, support = precision_recall_fscore_support(
        truth, predicted, labels=numbers, zero_division=np.nan
    )
    f1 = np.where(support > 0, f1, np.nan)  # scikit-learn: 0 for a class without images
    auc = _areas(values, truth)
    columns = zip(names, precision, recall, f1, auc, support, strict=True)
    return {
        "n": n,
        "accuracy": accuracy,
        "accuracy_interval": _interval(right, images, resamples, seed, confidence),
        "balanced_accuracy": defined_mean(recall),
        "macro_precision": defined_mean(precision),
        "macro_f1": defined_mean(f1),
        "macro_auc": defined_mean(auc),
        "log_loss": float(log_loss(truth, values, labels=numbers)),
        "calibration_error": _calibration_error(values, truth),
        "confusion_matrix": confusion_matrix(truth, predicted, labels=numbers).tolist(),
        "per_class": [
            {
                "class": name,
                "precision": _defined(p),
                "recall": _defined(r),
                "f1": _defined(f),
                "auc": _defined(a),
                "support": int(s),
            }
            for name, p, r, f, a, s in columns
        ],
    }


def macro_auc(
    probabilities: Float[np.ndarray | Tensor, "n outputs"], labels: Int[np.ndarray | Tensor, " n"]
) -> float | None:
    """The ``macro_auc`` of :func:`classification_metrics` alone.

    Of two classes it is the area under the ROC curve.

    Args:
        probabilities: softmax outputs; each row sums to one.
        labels: indices of the outputs.

    Returns:
        The mean over the classes that have images; None where all images are of one class.

    Raises:
        ValueError: see :func:`classification_metrics`.
        TypeError: if labels are not integers.

    Example:
        >>> probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.5, 0.5]])
        >>> round(macro_auc(probabilities, np.array([0, 0, 0, 1])), 3)
        0.667
    """
    values, truth = (
        check_probabilities("macro_auc", probabilities),
        check_labels("macro_auc", labels),
    )
    if len(truth) != len(values):
        got, fix = f"{values.shape} and {truth.shape}", "Give one label per image."
        raise ValueError(message("macro_auc", "probabilities (n, outputs), labels (n,)", got, fix))
    check_label_range("macro_auc", truth, values.shape[1])
    return defined_mean(_areas(values, truth))


def _areas(values: Float[np.ndarray, "n outputs"], truth: Int[np.ndarray, " n"]) -> list[float]:
    """The area under the ROC curve of each class against the rest; nan without one of these."""
    support = np.bincount(truth, minlength=values.shape[1])
    return [
        roc_auc_score(truth == k, values[:, k]) if 0 < count < len(truth) else math.nan
        for k, count in enumerate(support)
    ]


def _interval(
    right: Bool[np.ndarray, " n"],
    images: Sequence[Hashable] | None,
    resamples: int,
    seed: int,
    confidence: float,
) -> list[float]:
    draw, tail = np.random.default_rng(seed), (1 - confidence) / 2
    numbers = {image: number for number, image in enumerate(dict.fromkeys(images or ()))}
    if images is None or len(numbers) == len(right):
        # Each image drawn again is right with probability `accuracy`: the number of right ones in a
        # resample is binomial, so no image needs to be drawn.
        found = draw.binomial(len(right), right.mean(), resamples) / len(right)
    else:
        owners = np.array([numbers[image] for image in images])
        rows, hits = np.bincount(owners), np.bincount(owners, right)
        drawn = (draw.integers(len(rows), size=len(rows)) for _ in range(resamples))
        found = np.array([hits[some].sum() / rows[some].sum() for some in drawn])
    return np.quantile(found, [tail, 1 - tail]).tolist()


def _calibration_error(
    values: Float[np.ndarray, "n outputs"], truth: Int[np.ndarray, " n"]
) -> float:
    with imports_of_an_extra():  # seconds: not when other figures are wanted
        from torchmetrics.functional import calibration_error

    # torchmetrics counts in float32 and gives a confidence of exactly 1 a bin of its own; the
    # next smaller number lies in the last bin, where it belongs.
    below_one = torch.from_numpy(values.clip(max=1 - 2**-24))
    return calibration_error(
        below_one,
        torch.from_numpy(truth),
        task="multiclass",
        num_classes=values.shape[1],
        n_bins=BINS,
        norm="l1",
    ).item()


def defined_mean(values: Any) -> float | None:
    """Mean of the values that are defined; None without any."""
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if known.size else None


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def check_probabilities(where: str, values: np.ndarray | Tensor) -> Float[np.ndarray, "n outputs"]:
    """In float64, every row divided by its sum."""
    checked = torch.as_tensor(values).detach().cpu().double().numpy()
    if checked.ndim != 2 or len(checked) == 0 or checked.shape[1] < 2:
        fix = "Give softmax outputs of one image at least, a column per class."
        expected = "probabilities (n, outputs), n >= 1 and outputs >= 2"
        raise ValueError(message(where, expected, checked.shape, fix))
    if not np.isfinite(checked).all():
        bad = int((~np.isfinite(checked)).any(1).sum())
        fix = "Look for nan in the weights or the images."
        raise ValueError(message(where, "finite probabilities", f"{bad} rows with others", fix))
    sums = checked.sum(1)
    worst = int(np.abs(sums - 1).argmax())
    if abs(sums[worst] - 1) > _SUM_TOLERANCE or checked.min() < 0:
        got = f"a row that sums to {sums[worst]:.4g}, least entry {checked.min():.4g}"
        fix = "Give logits.float().softmax(1)."
        raise ValueError(message(where, "rows of probabilities that sum to one", got, fix))
    return checked / sums[:, None]


def check_labels(where: str, labels: np.ndarray | Tensor) -> Int[np.ndarray, " n"]:
    checked = torch.as_tensor(labels).detach().cpu()
    if checked.is_floating_point() or checked.dtype == torch.bool:
        fix = "Give class indices, as in labels.long()."
        raise TypeError(message(where, "integer labels", checked.dtype, fix))
    if checked.ndim != 1:
        fix = "Give one index per image."
        raise ValueError(message(where, "labels (n,)", tuple(checked.shape), fix))
    return checked.long().numpy()


def check_label_range(where: str, labels: Int[np.ndarray, " n"], classes: int) -> None:
    wrong = np.unique(labels[(labels < 0) | (labels >= classes)])
    if len(wrong):
        fix = "Give the classes in the order of the labels."
        raise ValueError(message(where, f"labels in [0, {classes})", wrong[:10].tolist(), fix))
