"""Plain records become tables and figures. Nothing here knows of models, tensors or files."""

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

CAPTION = "Relevance is laid over the image, each map divided by its own maximum."


def table(
    records: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, digits: int = 3
) -> str:
    """Records as a Markdown table with aligned columns, as fit for a terminal as for a page.

    Args:
        records: one mapping per row, from column to value. Whole numbers get separators of
            thousands; None, nan and absent values show as a dash.
        columns: which ones to show, in this order; all of the first record's by default.
        digits: of fractions, behind the point.

    Raises:
        ValueError: if no record has a value for one of ``columns``.

    Example:
        >>> records = [{"student": "small", "accuracy": 0.91, "parameters": 410208}]
        >>> print(table([*records, {"student": "tiny", "parameters": 9}]))
        | student | accuracy | parameters |
        |---------|---------:|-----------:|
        | small   |    0.910 |    410,208 |
        | tiny    |        - |          9 |
    """
    columns = list(columns if columns is not None else records[0] if records else [])
    for column in columns:
        if records and not any(column in record for record in records):
            known = sorted({key for record in records for key in record})
            raise ValueError(f"table: expected columns among {known}, got {column!r}.")
    cells = [[_cell(record.get(column), digits) for column in columns] for record in records]
    widths = [max(len(row[i]) for row in [columns, *cells]) for i in range(len(columns))]
    right = [
        any(_is_number(record.get(c)) for record in records)
        and all(_is_number(record[c]) for record in records if record.get(c) is not None)
        for c in columns
    ]

    def line(row: Sequence[str]) -> str:
        padded = zip(row, widths, right, strict=True)
        return f"| {' | '.join(c.rjust(w) if r else c.ljust(w) for c, w, r in padded)} |"

    rule = "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True))
    return "\n".join([line(columns), f"|{rule}|", *map(line, cells)])


class MapRow(NamedTuple):
    """One image and the relevance maps of it, for :func:`map_figure`.

    Attributes:
        label: the image's class; further lines may follow.
        image: grey or RGB; integers in [0, 255] or fractions in [0, 1].
        maps: from a column's heading to its relevance map, of any size. Relevance below zero is
            not shown.
        predictions: from a column's heading, or "image", to the class and the confidence, in
            [0, 1], to print under that map.
        mask: the object's pixels, in the image's size; its outline is drawn.
        known: whether the label says the class; otherwise no prediction is called wrong.
    """

    label: str
    image: Shaped[np.ndarray, "h w *channels"]
    maps: Mapping[str, Float[np.ndarray, "_ _"]]
    predictions: Mapping[str, tuple[str, float]] = {}
    mask: Bool[np.ndarray, "h w"] | None = None
    known: bool = True


def map_figure(rows: Sequence[MapRow], title: str = "", outline: str = "tumour") -> Figure:
    """A row per image: the image, and each of its maps laid over it, in one colour scale.

    Every map is divided by its own maximum, so colours compare places within a map, not amounts
    between maps; the figure says so. A wrong prediction, one that differs from the first line of
    the row's label, is set in red with a cross.

    Args:
        rows: with the same columns in each.
        title: above the figure.
        outline: what the masks show, for the caption.

    Returns:
        A figure of its own, outside of pyplot: ``figure.savefig(path)``.

    Raises:
        ValueError: if there are no rows, or their columns differ.

    Example:
        >>> image, heat = np.zeros((8, 8)), np.eye(2)
        >>> map_figure([MapRow("glioma", image, {"teacher": heat})]).get_axes()[1].get_title()
        'teacher'
    """
    columns = [list(row.maps) for row in rows]
    if not rows or any(names != columns[0] for names in columns):
        got = columns if rows else "no rows"
        fix = "Give each row a map for every column."
        raise ValueError(f"map_figure: expected rows with the same columns, got {got}. {fix}")
    height, width = len(rows), 1 + len(columns[0])
    printed = any(row.predictions for row in rows)
    size = (1.75 * width + 1.2, (2.0 if printed else 1.78) * height + 0.9)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(height, width, squeeze=False)
    for row, line in zip(rows, axes, strict=True):
        base = _rgb(row.image)
        _show(line[0], base, row.mask)
        line[0].set_ylabel(row.label, fontsize=11)
        for ax, name in zip(line, ["image", *row.maps], strict=True):
            if name in row.predictions:
                _caption(ax, row.label if row.known else None, *row.predictions[name])
        for ax, relevance in zip(line[1:], row.maps.values(), strict=True):
            _show(ax, _overlay(base, np.asarray(relevance)), row.mask)
            if not (np.asarray(relevance) > 0).any():
                sign = ax.text(0.5, 0.06, "no relevance", transform=ax.transAxes, ha="center")
                sign.set(color="white", backgroundcolor="#000000a0", fontsize=9)
    for ax, name in zip(axes[0], ["image", *columns[0]], strict=True):
        lines = [textwrap.fill(line, 20) for line in name.splitlines()]
        ax.set_title("\n".join(lines), fontsize=11, verticalalignment="bottom")
    scale = ScalarMappable(cmap=_blended(np.full(3, 0.35)))
    bar = figure.colorbar(
        scale, ax=axes, shrink=min(1, 2.5 / height), aspect=25, pad=0.01, ticks=[0, 0.5, 1]
    )
    bar.set_label("relevance / maximum of the map", fontsize=10)
    masked = any(row.mask is not None and np.any(row.mask) for row in rows)
    caption = CAPTION + (f" Outline: {outline}." if masked else "")
    figure.supxlabel(textwrap.fill(caption, int(15 * size[0])), fontsize=9)
    if title:
        figure.suptitle(textwrap.fill(title, int(10 * size[0])), fontsize=13)
    return figure


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
    # A dict, as a set in the order of appearance: a term may join in a later stage.
    parts = [key.partition("_") for record in records for key in record]
    names = list(dict.fromkeys(name for part, _, name in parts if part in ("train", "val")))
    if not names:
        fix = "Train for one epoch at least."
        raise ValueError(f"curves_figure: expected values train_x or val_x, got none. {fix}")
    names.sort(key=lambda name: {"accuracy": 0, "loss": 1}.get(name, 2))
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
        ax.set_title(name, fontsize=10)
        ax.set_xlim(epochs[0] - margin, epochs[-1] + margin)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.3)
    for ax in figure.get_axes()[len(names) :]:
        ax.set_visible(False)
    figure.get_axes()[0].legend(fontsize=8)
    figure.supxlabel("epoch" + (" (thin line: a new stage)" if borders else ""), fontsize=9)
    if title:
        figure.suptitle(title, fontsize=12)
    return figure


def confusion_figure(
    matrices: Mapping[str, Sequence[Sequence[int]]], classes: Sequence[str], title: str = ""
) -> Figure:
    """A panel per model: how many images of each class it takes for which.

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
        ax.set_xticks(range(len(names)), names, fontsize=9)
        ax.set_yticks(range(len(names)), names, fontsize=9)
        if longest > 3:
            ax.tick_params(axis="x", labelrotation=45)
            for label in ax.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")
        accuracy = np.trace(matrix) / max(matrix.sum(), 1)
        ax.set_title(f"{name}\naccuracy {accuracy:.3f}", fontsize=10)
        ax.set_xlabel("predicted class", fontsize=9)
    axes[0].set_ylabel("true class", fontsize=9)
    bar = figure.colorbar(shown, ax=axes, shrink=0.8, aspect=20, pad=0.02, ticks=[0, 0.5, 1])
    bar.set_label("share of the true class", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=12)
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
    upper.plot([0, 1], [0, 1], "--", color="0.5", linewidth=1, label="calibrated")
    for name, curve in curves.items():
        confidences, correct = (np.asarray(values, dtype=float) for values in curve)
        shapes = [confidences.shape, correct.shape]
        inside = ((confidences >= 0) & (confidences <= 1)).all()
        if shapes[0] != shapes[1] or confidences.ndim != 1 or not confidences.size or not inside:
            expected = "as many confidences in [0, 1] as answers"
            fix = "Give the largest probability of each image."
            got = f"{shapes} for {name!r}"
            raise ValueError(f"reliability_figure: expected {expected}, got {got}. {fix}")
        counts, _ = np.histogram(confidences, edges)
        used = counts > 0
        sums = [np.histogram(confidences, edges, weights=w)[0] for w in (confidences, correct)]
        means, accuracies = (values[used] / counts[used] for values in sums)
        (line,) = upper.plot(means, accuracies, "o-", markersize=4, label=name)
        lower.stairs(counts, edges, color=line.get_color(), linewidth=1.5)
    upper.set(xlim=(0, 1), ylim=(0, 1.02))
    upper.set_ylabel("accuracy", fontsize=9)
    upper.legend(fontsize=8, loc="upper left")
    upper.grid(alpha=0.3)
    lower.set_yscale("symlog", linthresh=1)
    lower.set_ylabel("images", fontsize=9)
    lower.set_xlabel("confidence (largest probability)", fontsize=9)
    lower.grid(alpha=0.3)
    if title:
        figure.suptitle(title, fontsize=12)
    return figure


def selection_figure(records: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Score over parameters, a point per candidate, with its spread; the front in red.

    Args:
        records: with "candidate", "score" (None is left out), "spread", "parameters", "front".
        title: above the figure.

    Returns:
        A figure of its own, outside of pyplot.
    """
    scored = [record for record in records if record.get("score") is not None]
    figure = Figure(figsize=(7, 4.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for front, colour, label in ((False, "#5b8db8", None), (True, "#c01818", "front")):
        part = [record for record in scored if bool(record["front"]) == front]
        x, y = ([record[name] for record in part] for name in ("parameters", "score"))
        spread = [record["spread"] for record in part]
        axes.errorbar(x, y, spread, fmt="o", color=colour, markersize=4, capsize=2, label=label)
    if len(scored) <= 24:
        for record in scored:
            place = (record["parameters"], record["score"])
            axes.annotate(
                record["candidate"], place, (3, 3), textcoords="offset points", fontsize=6
            )
    axes.set(xlabel="parameters", ylabel="score", xscale="log")
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.supxlabel("Bars: standard deviation over batches and initialisations.", fontsize=8)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


# --- drawing ------------------------------------------------------------------------------------

_HEAT = colormaps["inferno"]
_OUTLINE = "#3ce0ff"


def _rgb(image: Any) -> Float[np.ndarray, "h w 3"]:
    image = np.asarray(image)
    values = image / 255 if np.issubdtype(image.dtype, np.integer) else image.clip(0, 1)
    return np.repeat(values[..., None], 3, axis=2) if values.ndim == 2 else values


def _blend(base: Any, heat: Any) -> Any:
    """Colours of relevance ``heat`` (in [0, 1]) over ``base``: the stronger, the more opaque."""
    opacity = 0.85 * heat[..., None] ** 0.8
    return (1 - opacity) * base + opacity * _HEAT(heat)[..., :3]


def _blended(base: Float[np.ndarray, " 3"]) -> Colormap:
    """The colour scale as it looks over an even ``base``."""
    return ListedColormap(_blend(base, np.linspace(0, 1, 256)))


def _overlay(
    base: Float[np.ndarray, "height width 3"], relevance: Float[np.ndarray, "h w"]
) -> Float[np.ndarray, "height width 3"]:
    size = (base.shape[1], base.shape[0])
    positive = Image.fromarray(relevance.clip(0).astype(np.float32))
    heat = np.asarray(positive.resize(size, Image.Resampling.BILINEAR))
    return _blend(base, heat / (heat.max() or 1))


def _show(ax: Axes, picture: Float[np.ndarray, "h w 3"], mask: Any) -> None:
    ax.imshow(picture, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set_visible(False)
    if mask is not None and np.any(mask):
        ax.contour(np.asarray(mask), levels=[0.5], colors=[_OUTLINE], linewidths=1)


def _caption(ax: Axes, label: str | None, predicted: str, confidence: float) -> None:
    right = label is None or predicted == label.split("\n")[0]
    colour = "black" if right else "#c01818"
    sign = "" if right else " ✗"
    ax.set_xlabel(f"{predicted} {confidence:.2f}{sign}", fontsize=10, color=colour)


# --- cells --------------------------------------------------------------------------------------


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: object, digits: int) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:,.{digits}f}"
    if _is_number(value):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")
