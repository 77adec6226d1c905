"""Plain records become figures. Nothing here knows of models, tensors or files."""

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from kd_lrp_plugin.plots.text import PLAIN, plain_legend, plain_text
from kd_lrp_plugin.utils.extras import imports_of_an_extra

with imports_of_an_extra():
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

CAPTION = "Relevance is laid over the image, each map divided by its own maximum."


def list_quantities(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names x of values ``train_x`` and ``val_x``: accuracy, loss, then as they appear.

    A term that is the loss wherever it has a value, as the only one with weight 1 is, is left out.

    Example:
        >>> list_quantities([{"epoch": 1, "train_loss": 2.0}, {"epoch": 2, "val_accuracy": 0.5}])
        ['accuracy', 'loss']
    """
    # A dict, as a set in the order of appearance: a term may join in a later stage.
    parts = [key.partition("_") for record in records for key in record]
    names = dict.fromkeys(name for part, _, name in parts if part in ("train", "val"))
    different = [name for name in names if name == "loss" or not _is_loss(records, name)]
    return sorted(different, key=lambda name: {"accuracy": 0, "loss": 1}.get(name, 2))


def _is_loss(records: Sequence[Mapping[str, Any]], name: str) -> bool:
    pairs = [
        (record.get(f"{part}_{name}"), record.get(f"{part}_loss"))
        for record in records
        for part in ("train", "val")
    ]
    known = [(value, loss) for value, loss in pairs if value is not None]
    # The loss is a mean of sums, a term a sum of means: they are rounded differently.
    return bool(known) and all(
        loss is not None and math.isclose(value, loss, rel_tol=1e-5) for value, loss in known
    )


def curves_figure(records: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """One panel per quantity over the epochs: training and validation in one panel.

    Args:
        records: one per epoch, with the key "epoch" and values named ``train_x`` and ``val_x``;
            None and absent values are gaps. Where the value of "stage" changes, a thin line
            separates the epochs.
        title: above the figure.

    Returns:
        A figure of its own, outside of pyplot.

    Raises:
        ValueError: if no record has a value to draw.

    Example:
        >>> records = [{"epoch": 1, "train_loss": 2.0, "val_loss": 3.0}]
        >>> [ax.get_title() for ax in curves_figure(records).get_axes()]
        ['loss']
    """
    names = list_quantities(records)
    if not names:
        fix = "Train for one epoch at least."
        raise ValueError(f"curves_figure: expected values train_x or val_x, got none. {fix}")
    width = min(4, len(names))
    height = -(-len(names) // width)
    figure = Figure(figsize=(2.9 * width, 2.3 * height), dpi=120, layout="constrained")
    axes = figure.subplots(height, width, squeeze=False).flat
    epochs = [record["epoch"] for record in records]
    borders = [
        (one["epoch"] + next_["epoch"]) / 2
        for one, next_ in itertools.pairwise(records)
        if one.get("stage") != next_.get("stage")
    ]
    margin = 0.05 * (epochs[-1] - epochs[0]) or 0.5
    for name, ax in zip(names, axes, strict=False):
        for part, style in {"train": "--", "val": "-"}.items():
            values = np.array([record.get(f"{part}_{name}") for record in records], dtype=float)
            ax.plot(epochs, values, style, marker="." if len(epochs) < 30 else "", label=part)
        for border in borders:
            ax.axvline(border, color="0.4", linewidth=0.7)
        ax.set_title(plain_text(name), fontsize=10, **PLAIN)
        ax.set_xlim(epochs[0] - margin, epochs[-1] + margin)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.3)
    for ax in figure.get_axes()[len(names) :]:
        ax.set_visible(False)
    figure.get_axes()[0].legend(fontsize=8)
    figure.supxlabel("epoch" + (" (thin line: a new stage)" if borders else ""), fontsize=9)
    if title:
        figure.suptitle(plain_text(title, lines=True), fontsize=12, **PLAIN)
    return figure


def confusion_figure(
    matrices: Mapping[str, Sequence[Sequence[int]]], classes: Sequence[str], title: str = ""
) -> Figure:
    """A panel per model: how many images of each true class it predicts to be of which.

    Args:
        matrices: from a model's name to its counts, a row per true class and a column per
            predicted one.
        classes: names of the first rows; further ones are named by their numbers.
        title: above the figure.

    Returns:
        A figure of its own, outside of pyplot. Colours are shares of the true class, so that
        rare classes can be read like common ones.

    Raises:
        ValueError: if there is no matrix, or one is not square or smaller than ``classes``.

    Example:
        >>> figure = confusion_figure({"student": [[8, 2], [0, 10]]}, ["no", "yes"])
        >>> figure.get_axes()[0].get_title()
        'student\\naccuracy 0.900'
    """
    counts = {name: np.asarray(matrix, dtype=int) for name, matrix in matrices.items()}
    sizes = [matrix.shape for matrix in counts.values()]
    if not sizes or any(len(s) != 2 or s[0] != s[1] or s[0] < len(classes) for s in sizes):
        fix = "Give every model a row and a column per class."
        expected = f"square matrices of at least {len(classes)} classes"
        raise ValueError(f"confusion_figure: expected {expected}, got {sizes or 'none'}. {fix}")
    classes = [plain_text(name) for name in classes]
    side = max(2.2, 0.45 * max(size[0] for size in sizes) + 0.6)
    longest = max(map(len, classes), default=1)
    words = 0.085 * min(longest, 20)  # inches of the longest name
    shape = (len(counts) * (side + words + 0.3) + 0.8, side + 0.75 * words + 1.0)
    figure = Figure(figsize=shape, dpi=120, layout="constrained")
    axes = figure.subplots(1, len(counts), squeeze=False)[0]
    for (name, matrix), ax in zip(counts.items(), axes, strict=True):
        total = matrix.sum(1, keepdims=True)
        shares = matrix / total.clip(1)
        # Cells nearly square by the figure's size: forced ones would push words out of it.
        shown = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (row, column), count in np.ndenumerate(matrix):
            colour = "white" if shares[row, column] > 0.5 else "0.6" if count == 0 else "black"
            ax.text(column, row, f"{count}", ha="center", va="center", color=colour, fontsize=8)
        names = [*classes, *map(str, range(len(classes), len(matrix)))]
        ax.set_xticks(range(len(names)), names, fontsize=9, **PLAIN)
        ax.set_yticks(range(len(names)), names, fontsize=9, **PLAIN)
        if longest > 3:
            ax.tick_params(axis="x", labelrotation=45)
            for label in ax.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")
        accuracy = np.trace(matrix) / max(matrix.sum(), 1)
        ax.set_title(f"{plain_text(name)}\naccuracy {accuracy:.3f}", fontsize=10, **PLAIN)
        ax.set_xlabel("predicted class", fontsize=9)
    axes[0].set_ylabel("true class", fontsize=9)
    bar = figure.colorbar(shown, ax=axes, shrink=0.8, aspect=20, pad=0.02, ticks=[0, 0.5, 1])
    bar.set_label("share of the true class", fontsize=9)
    if title:
        figure.suptitle(plain_text(title, lines=True), fontsize=12, **PLAIN)
    return figure


def reliability_figure(
    curves: Mapping[str, tuple[Any, Any]], title: str = "", bins: int = 15
) -> Figure:
    """Share of right predictions over their confidence, and how often each confidence occurs.

    A model whose confidence is its accuracy lies on the diagonal; below it, it is too sure.

    Args:
        curves: from a model's name, as the legend shall have it, to the confidence of each of
            its predictions, in [0, 1], and whether each is right.
        title: above the figure.
        bins: of even width, as in the expected calibration error.

    Returns:
        A figure of its own, outside of pyplot. Points stand at the mean confidence of their bin;
        bins without predictions have none.

    Raises:
        ValueError: if there is no curve, or one is empty, of two lengths or outside of [0, 1].

    Example:
        >>> figure = reliability_figure({"student": ([0.9, 0.8, 0.6], [True, True, False])})
        >>> figure.get_axes()[0].get_ylabel()
        'accuracy'
    """
    if not curves:
        raise ValueError("reliability_figure: expected one curve at least, got none.")
    figure = Figure(figsize=(4.2, 4.8), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    edges = np.linspace(0, 1, bins + 1)
    (calibrated,) = upper.plot([0, 1], [0, 1], "--", color="0.5", linewidth=1, label="calibrated")
    drawn = {"calibrated": calibrated}
    for name, curve in curves.items():
        confidences, correct = (np.asarray(values, dtype=float) for values in curve)
        shapes = [confidences.shape, correct.shape]
        inside = ((confidences >= 0) & (confidences <= 1)).all()
        if shapes[0] != shapes[1] or confidences.ndim != 1 or not confidences.size or not inside:
            expected = "as many confidences in [0, 1] as predictions"
            fix = "Give the largest probability of each image."
            got = f"{shapes} for {name!r}"
            raise ValueError(f"reliability_figure: expected {expected}, got {got}. {fix}")
        counts, _ = np.histogram(confidences, edges)
        used = counts > 0
        sums = [np.histogram(confidences, edges, weights=w)[0] for w in (confidences, correct)]
        means, accuracies = (values[used] / counts[used] for values in sums)
        (line,) = upper.plot(means, accuracies, "o-", markersize=4, label=name)
        drawn[f"{name} ({len(correct):,} images)"] = line
        lower.stairs(counts, edges, color=line.get_color(), linewidth=1.5)
    upper.set(xlim=(0, 1), ylim=(0, 1.02))
    upper.set_ylabel("accuracy", fontsize=9)
    plain_legend(upper, drawn.values(), drawn, fontsize=8, loc="best")
    upper.grid(alpha=0.3)
    lower.set_yscale("symlog", linthresh=1)
    lower.set_ylabel("images", fontsize=9)
    lower.set_xlabel("confidence (largest probability)", fontsize=9)
    lower.grid(alpha=0.3)
    if title:
        figure.suptitle(plain_text(title, lines=True), fontsize=12, **PLAIN)
    return figure


def roc_figure(
    scores: Mapping[str, Any], labels: Any, classes: Sequence[str], title: str = ""
) -> Figure:
    """A panel per class: the share of its images found over the share of others taken for it.

    Args:
        scores: from a model's name to its probabilities, a row per image and a column per class.
        labels: the class of each image.
        classes: names of the first columns; only classes with and without images are drawn.
        title: above the figure.

    Returns:
        A figure of its own, outside of pyplot. Panels say how many images are of the class, the
        legend the area under each curve.

    Raises:
        ValueError: if there is no model, no class that some but not all images are of, or not a
            row per image.

    Example:
        >>> figure = roc_figure({"student": [[0.9, 0.1], [0.2, 0.8]]}, [0, 1], ["no", "yes"])
        >>> figure.get_axes()[0].get_title()
        'no\\n1 of 2 images'

    Reference:
        Fawcett, Pattern Recognition Letters 2006, algorithm 1. Deviation: none.
    """
    truth = np.asarray(labels)
    tables = {name: np.asarray(values, dtype=float) for name, values in scores.items()}
    shapes = {name: values.shape for name, values in tables.items()}
    drawn = [k for k in range(len(classes)) if 0 < (truth == k).sum() < len(truth)]
    fits = all(len(s) == 2 and s[0] == len(truth) and s[1] >= len(classes) for s in shapes.values())
    if not tables or not drawn or not fits:
        expected = "probabilities of every image and class, and images of two classes"
        got = f"{shapes} for {len(truth)} images and {len(classes)} classes"
        fix = "Give all predictions of a test set."
        raise ValueError(f"roc_figure: expected {expected}, got {got}. {fix}")
    width = min(4, len(drawn))
    height = -(-len(drawn) // width)
    figure = Figure(figsize=(2.7 * width, 3.0 * height + 0.4), dpi=120, layout="constrained")
    axes = figure.subplots(height, width, squeeze=False).flat
    for k, ax in zip(drawn, axes, strict=False):
        ax.plot([0, 1], [0, 1], "--", color="0.5", linewidth=1)
        curves = {}
        for name, values in tables.items():
            false, found = _find_rates(values[:, k], truth == k)
            (line,) = ax.plot(false, found, linewidth=1.5)
            curves[f"{name}, area {np.trapezoid(found, false):.3f}"] = line
        plain_legend(ax, curves.values(), curves, fontsize=7, loc="lower right")
        name = textwrap.fill(plain_text(classes[k]), 24)
        count = f"{(truth == k).sum():,} of {len(truth):,} images"
        ax.set_title(f"{name}\n{count}", fontsize=9, **PLAIN)
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        ax.grid(alpha=0.3)
    for ax in figure.get_axes()[len(drawn) :]:
        ax.set_visible(False)
    figure.supxlabel("false positive rate", fontsize=9)
    figure.supylabel("true positive rate", fontsize=9)
    if title:
        figure.suptitle(plain_text(title, lines=True), fontsize=12, **PLAIN)
    return figure


def _find_rates(
    scores: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """False and true positive rates; equal scores are one step."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    found = np.append(0, np.cumsum(right[order])[last])
    false = np.append(0, np.cumsum(~right[order])[last])
    return false / false[-1], found / found[-1]


def selection_figure(records: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Score over parameters, a point per candidate, with its deviation; the Pareto front in red.

    Args:
        records: with "candidate", "score" (None is left out), "std", "parameters", "front".
        title: above the figure.

    Returns:
        A figure of its own, outside of pyplot.
    """
    scored = [record for record in records if record.get("score") is not None]
    figure = Figure(figsize=(7, 4.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for front, colour, label in ((False, "#5b8db8", None), (True, "#c01818", "Pareto front")):
        part = [record for record in scored if bool(record["front"]) == front]
        x, y = ([record[name] for record in part] for name in ("parameters", "score"))
        deviations = [record["std"] for record in part]
        axes.errorbar(x, y, deviations, fmt="o", color=colour, markersize=4, capsize=2, label=label)
    sizes = [math.log(record["parameters"]) for record in scored]
    middle = (min(sizes) + max(sizes)) / 2 if sizes else 0.0
    if len(scored) <= 24:
        for record in scored:
            position = (record["parameters"], record["score"])
            name = plain_text(record["candidate"])
            # Towards the middle of the axes, so that no name leaves them.
            left = math.log(record["parameters"]) > middle
            axes.annotate(
                name,
                position,
                (-4 if left else 4, 3),
                textcoords="offset points",
                fontsize=6,
                ha="right" if left else "left",
                **PLAIN,
            )
    axes.set(xlabel="parameters", ylabel="score", xscale="log")
    axes.margins(x=0.15, y=0.1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.supxlabel("Bars: standard deviation over batches and initialisations.", fontsize=8)
    if title:
        figure.suptitle(plain_text(title, lines=True), fontsize=11, **PLAIN)
    return figure
