"""Duplicates side by side."""

from pathlib import Path

import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure

from kd_lrp_plugin.data.images import read_image
from kd_lrp_plugin.data.leakage.clean_split import DatasetAudit, describe_pair

_SHOWN = 12  # pairs in the picture


def pairs_figure(
    root: Path, audit: DatasetAudit, order: Int[np.ndarray, " pairs"], bits: int | None = None
) -> Figure:
    """Up to twelve pairs side by side: across splits, if there are any.

    First up to four exact ones, then others, spread evenly from the most to the least alike.
    """
    across = audit.across[order]
    chosen = order[across] if across.any() else order
    exact = chosen[audit.duplicates.kind[chosen] == 0]
    near = chosen[audit.duplicates.kind[chosen] > 0]
    exact = exact[: max(4, _SHOWN - len(near))]
    room = min(len(near), _SHOWN - len(exact))
    picked = [*exact, *near[np.linspace(0, len(near) - 1, room).astype(int)]]
    rows, columns = -(-len(picked) // 3), min(3, len(picked))
    figure = Figure(figsize=(4 * columns, 2.75 * rows + 0.4), dpi=100, layout="constrained")
    widths = [1, 1, 0.12] * columns
    axes = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    for ax in axes.flat:
        ax.set_axis_off()
    for number, k in enumerate(picked):
        pair = describe_pair(audit, k)
        line, column = divmod(number, 3)
        for ax, side in zip(axes[line, 3 * column :], ("file_a", "file_b"), strict=False):
            shown = read_image(root / pair[side], bits)
            shown.thumbnail((256, 256))
            ax.imshow(shown)
            ax.set_axis_on()
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel("\n".join(_short(name) for name in pair[side].split("/")), fontsize=8)
        words = f"{pair['kind']} {float(pair['similarity']):.3f}{', mirrored' * pair['mirrored']}"
        axes[line, 3 * column].set_title(words, loc="left", fontsize=10)
    where = "across splits" if across.any() else "within splits" if audit.splits[1:] else ""
    figure.suptitle(f"{len(picked)} of {len(chosen):,} pairs of duplicates {where}".rstrip())
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:12]}...{name[-13:]}"
