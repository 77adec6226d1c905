"""Figures of relevance maps over their images."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped
from PIL import Image

from kd_lrp_plugin.plots.figures import CAPTION
from kd_lrp_plugin.plots.text import PLAIN, plain_text
from kd_lrp_plugin.utils.extras import imports_of_an_extra

with imports_of_an_extra():
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap, ListedColormap
    from matplotlib.figure import Figure

WRAPPED = 20  # characters of a line beside or below a panel


class MapRow(NamedTuple):
    """One image and the relevance maps of it, for :func:`map_figure`.

    Attributes:
        label: the image's class; further lines may follow.
        image: grey, perhaps with a last axis of one, or RGB; integers in [0, 255] or fractions
            in [0, 1].
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

    Every map is divided by its own maximum, so colours compare positions within a map, not amounts
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
        words = [
            textwrap.fill(part, WRAPPED) for part in plain_text(row.label, lines=True).split("\n")
        ]
        line[0].set_ylabel("\n".join(words), fontsize=11, **PLAIN)
        for ax, name in zip(line, ["image", *row.maps], strict=True):
            if name in row.predictions:
                _caption(ax, row.label if row.known else None, *row.predictions[name])
        for ax, relevance in zip(line[1:], row.maps.values(), strict=True):
            _show(ax, _overlay(base, np.asarray(relevance)), row.mask)
            if not (np.asarray(relevance) > 0).any():
                sign = ax.text(0.5, 0.06, "no relevance", transform=ax.transAxes, ha="center")
                sign.set(color="white", backgroundcolor="#000000a0", fontsize=9)
    for ax, name in zip(axes[0], ["image", *columns[0]], strict=True):
        lines = [textwrap.fill(line, WRAPPED) for line in plain_text(name, lines=True).split("\n")]
        ax.set_title("\n".join(lines), fontsize=11, verticalalignment="bottom", **PLAIN)
    scale = ScalarMappable(cmap=_blended(np.full(3, 0.35)))
    bar = figure.colorbar(
        scale, ax=axes, shrink=min(1, 2.5 / height), aspect=25, pad=0.01, ticks=[0, 0.5, 1]
    )
    bar.set_label("relevance / maximum of the map", fontsize=10)
    masked = any(row.mask is not None and np.any(row.mask) for row in rows)
    caption = CAPTION + (f" Outline: {plain_text(outline)}." if masked else "")
    figure.supxlabel(textwrap.fill(caption, int(15 * size[0])), fontsize=9, **PLAIN)
    if title:
        heading = textwrap.fill(plain_text(title), int(10 * size[0]))
        figure.suptitle(heading, fontsize=13, **PLAIN)
    return figure


_HEAT = colormaps["inferno"]
_OUTLINE = "#3ce0ff"


def _rgb(image: Any) -> Float[np.ndarray, "h w 3"]:
    image = np.asarray(image)
    values = image / 255 if np.issubdtype(image.dtype, np.integer) else image.clip(0, 1)
    values = values[..., None] if values.ndim == 2 else values
    return np.repeat(values, 3, axis=2) if values.shape[2] == 1 else values


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
    # A panel is as wide as 20 characters: a longer line would run into its neighbour.
    words = textwrap.fill(f"{plain_text(predicted)} {confidence:.2f}{sign}", WRAPPED)
    ax.set_xlabel(words, fontsize=10, color=colour, **PLAIN)
