"""The comparison of a study as a figure."""

import textwrap
from collections.abc import Mapping
from typing import Any

from kd_lrp_plugin.metrics.statistics import describe
from kd_lrp_plugin.plots.tables import fixed_measures
from kd_lrp_plugin.plots.text import PLAIN, one_line, plain_legend, plain_text
from kd_lrp_plugin.studies.comparison import Row, get_values, group_cells
from kd_lrp_plugin.utils.extras import imports_of_an_extra

with imports_of_an_extra():
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWN = 4  # measures in one picture
_LINES = 7  # more of them look alike
_NAMED = "named"  # id of the lines that the legend names
_TITLE = 32  # letters in a line above a plot
_LABELS = 42  # letters in a line below one


def study_figure(content: Mapping[str, Any]) -> Figure:
    """A dot for each run, the mean and its interval; with a grid, over its first axis: lines if it
    has numbers.

    Where the lines would be too many, points of the grid stand below each other instead.

    Args:
        content: of ``study.json``.

    Returns:
        A figure of its own, outside of pyplot; of the first four measures that runs have, and
        of those that no seed changes only where there is no other.
    """
    known = {r["measure"] for r in content["table"] if r["n"]}
    fixed = fixed_measures(content)
    measures = [m for m in content["measures"] if m in known]
    measures = [m for m in measures if m not in fixed] or measures
    measures = measures[:_SHOWN] or content["measures"][:1]
    cells = group_cells(content["runs"])
    first = next(iter(content["axes"]), None)
    others = {(name, *(p for p in point if p[0] != first)) for name, point in cells}
    lines = first is not None and len(others) <= _LINES
    width = (3.4 if lines else 2.6) * len(measures) + (0 if lines else 2.2)
    height = 3.8 if lines else 1.4 + 0.32 * len(cells)
    figure = Figure(figsize=(max(width, 5), height), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(measures), squeeze=False, sharey=False)[0]
    for measure, ax in zip(measures, axes, strict=True):
        (_draw_lines if lines else _draw_dots)(ax, content, measure)
        title_lines = textwrap.wrap(plain_text(measure).replace(".", ". "), _TITLE)
        ax.set_title("\n".join(title_lines).replace(". ", "."), fontsize=10, **PLAIN)
        ax.grid(alpha=0.3)
        ax.tick_params(labelsize=8)
    if lines:
        handles = {line.get_label(): line for line in axes[0].get_lines() if line.get_gid()}
        columns = max(1, int(width * 12 / (8 + max(map(len, handles), default=1))))
        plain_legend(
            figure,
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=min(columns, len(handles)),
            fontsize=8,
            title="Pale dots: seeds. Upright: 95 % interval of the mean.",
            title_fontsize=8,
        )
    else:
        for ax in axes[1:]:
            ax.tick_params(labelleft=False)
        figure.supxlabel("Dots: seeds. Bar: mean and its 95 % interval.", fontsize=8)
    title = content["question"] + ("" if content["final"] else f"\n{content['state']}")
    # matplotlib's own wrap takes the text for a formula, whatever it is asked.
    letters = int(12 * max(width, 5))
    wrapped = "\n".join(textwrap.fill(one_line(line), letters) for line in title.splitlines())
    figure.suptitle(wrapped, fontsize=10, **PLAIN)
    return figure


def _draw_dots(ax: Axes, content: Mapping[str, Any], measure: str) -> None:
    names = []
    for index, ((name, point), rows) in enumerate(group_cells(content["runs"]).items()):
        parts = [name, *(f"{axis} {value}" for axis, value in point)]
        names.append(plain_text(", ".join(parts)))
        values = list(get_values(rows, measure).values())
        found = describe(values)
        colour = "#c01818" if name == content["compare_to"] else "#2f6f9f"
        ax.plot(values, [index] * len(values), "o", color=colour, alpha=0.45, markersize=5)
        if found["mean"] is not None:
            ax.plot([found["mean"]], [index], "|", color=colour, markersize=15, markeredgewidth=2)
        if found["low"] is not None:
            ax.plot([found["low"], found["high"]], [index] * 2, color=colour, linewidth=1.5)
        if name == content["compare_to"] and found["mean"] is not None:
            ax.axvline(found["mean"], color=colour, linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(names)), names, fontsize=8, **PLAIN)
    ax.set_ylim(len(names) - 0.5, -0.5)


def _draw_lines(ax: Axes, content: Mapping[str, Any], measure: str) -> None:
    axis, values = next(iter(content["axes"].items()))
    series: dict[str, list[tuple[Any, list[Row]]]] = {}
    for (name, point), rows in group_cells(content["runs"]).items():
        rest = [f"{other} {value}" for other, value in point if other != axis]
        series.setdefault(", ".join([name, *rest]), []).append((dict(point).get(axis), rows))
    colours = [f"C{index % 10}" for index in range(len(series))]
    offsets = [0.05 * (index - (len(series) - 1) / 2) for index in range(len(series))]
    positions = {value: index for index, value in enumerate(values)}
    ordered = all(isinstance(value, int | float) for value in values)
    style = "-o" if ordered else "o"  # nothing lies between two names
    for (name, found), colour, offset in zip(series.items(), colours, offsets, strict=True):
        drawn = []
        for value, rows in found:
            seed_values = list(get_values(rows, measure).values())
            summary = describe(seed_values)
            if not seed_values:
                continue
            if value is None:  # not crossed with this axis: a level for all of it
                ax.axhline(summary["mean"], color=colour, linestyle="--", label=name, gid=_NAMED)
                continue
            x = positions[value] + offset
            drawn.append((x, summary["mean"]))
            ax.plot(
                [x] * len(seed_values), seed_values, "o", color=colour, alpha=0.35, markersize=3.5
            )
            if summary["low"] is not None:
                ax.plot([x] * 2, [summary["low"], summary["high"]], color=colour, linewidth=1)
        if drawn:
            ax.plot(
                *zip(*drawn, strict=True), style, color=colour, markersize=4, label=name, gid=_NAMED
            )
    room = max(1, _LABELS // len(values))
    labels = [
        textwrap.fill(plain_text(value), room, break_long_words=False, break_on_hyphens=False)
        for value in values
    ]
    fits = all(len(line) <= room for label in labels for line in label.splitlines())
    turned: dict[str, Any] = {} if fits else {"rotation": 25, "ha": "right"}
    ax.set_xticks(range(len(values)), labels, fontsize=8, **turned, **PLAIN)
    ax.set_xlabel(plain_text(axis), fontsize=9, **PLAIN)
