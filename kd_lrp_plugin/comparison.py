"""Rows of runs become a study's table, its paired differences, its page of words, its picture.

A row is a mapping with ``configuration``, ``point`` (value by axis of the grid), ``seed`` and
``measures`` (value by name, None where a run has none).
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kd_lrp_plugin.report import table
from kd_lrp_plugin.statistics import describe, detectable, holm, paired_difference

Row = Mapping[str, Any]
Cell = tuple[str, tuple[tuple[str, Any], ...]]  # a configuration and its place in the grid


def cells_of(rows: Sequence[Row]) -> dict[Cell, list[Row]]:
    """The rows of each configuration and place in the grid, in the order of appearance."""
    cells: dict[Cell, list[Row]] = {}
    for row in rows:
        cells.setdefault((row["configuration"], tuple(row["point"].items())), []).append(row)
    return cells


def values_of(rows: Sequence[Row], measure: str) -> dict[int, float]:
    """The values of a measure by seed, of the runs that have one."""
    found = {row["seed"]: row["measures"].get(measure) for row in rows}
    return {seed: value for seed, value in found.items() if value is not None}


def value_at(node: Any, dotted: str) -> float | None:
    """The finite number at a dotted path, or None; keys may hold dots themselves.

    Example:
        >>> value_at({"maps": {"blocks.4": [{"mass": 1}]}}, "maps.blocks.4.0.mass")
        1.0
    """
    if isinstance(node, list):
        node = {str(place): value for place, value in enumerate(node)}
    if not isinstance(node, Mapping):
        return None
    value = node.get(dotted)
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    for key in node:
        if dotted.startswith(f"{key}."):
            value = value_at(node[key], dotted[len(key) + 1 :])
            if value is not None:
                return value
    return None


def summarise(rows: Sequence[Row], measures: Sequence[str]) -> list[dict[str, Any]]:
    """A record for each cell and measure, with the figures of :func:`statistics.describe`."""
    return [
        {
            "measure": measure,
            "configuration": name,
            "point": dict(point),
            **describe(list(values_of(some, measure).values())),
        }
        for measure in measures
        for (name, point), some in cells_of(rows).items()
    ]


def compare(
    rows: Sequence[Row], measures: Sequence[str], reference: str | None
) -> list[dict[str, Any]]:
    """A record for each cell and measure: how far it lies above the reference.

    The reference of a cell is the configuration ``reference`` at the cell's values on the axes
    that it has. Only runs of the same seed are compared.

    Returns:
        Records with the figures of :func:`statistics.paired_difference`; ``p_holm`` is corrected
        for all comparisons of the measure.
    """
    cells = cells_of(rows)
    found: list[dict[str, Any]] = []
    for measure in measures:
        family: list[dict[str, Any]] = []
        for (name, point), some in cells.items():
            for (other, place), reference_rows in cells.items():
                if other == reference != name and set(place) <= set(point):
                    pairs = values_of(some, measure), values_of(reference_rows, measure)
                    record = {"measure": measure, "configuration": name, "point": dict(point)}
                    record |= {"reference": other, **paired_difference(*pairs)}
                    family.append(record)
        corrected = holm([record["p"] for record in family])
        found += [r | {"p_holm": p} for r, p in zip(family, corrected, strict=True)]
    return found


# --- words ----------------------------------------------------------------------------------------


def page(content: Mapping[str, Any]) -> str:
    """``study.json`` as Markdown: a table for each measure, and how to read them."""
    parts = [f"# {content['question']}", content["state"]]
    parts += [f"- {label}: {words}" for label, words in content["failed"].items()]
    for measure in content["measures"]:
        rows = _table_rows(content, measure)
        if any(row["n"] for row in rows):
            parts.append(f"## {measure}\n\n{table(rows, digits=4)}")
        else:
            words = "no finished run has it. Figures of maps come with kd-lrp explain."
            parts.append(f"## {measure}\n\nNothing to show: {words}")
        if best := _best(content, measure):
            parts.append(best)
    parts.append("\n".join(_reading(content)))
    return "\n\n".join(parts) + "\n"


def _table_rows(content: Mapping[str, Any], measure: str) -> list[dict[str, Any]]:
    compared = {
        (record["configuration"], *record["point"].items()): record
        for record in content["comparisons"]
        if record["measure"] == measure
    }
    rows = []
    for record in content["table"]:
        if record["measure"] != measure:
            continue
        row = {"configuration": record["configuration"]}
        row |= {
            a: str(v) if (v := record["point"].get(a)) is not None else v for a in content["axes"]
        }
        row |= {"n": record["n"], "mean ± std": _with_spread(record["mean"], record["std"])}
        row["95 % interval"] = _interval(record)
        if content["compare_to"]:
            found = compared.get((record["configuration"], *record["point"].items()), {})
            row[f"minus {content['compare_to']}"] = _shown(found.get("mean"), "+")
            row["95 % interval of it"] = _interval(found, "+")
            row |= {"pairs": found.get("n"), "p": found.get("p"), "p (Holm)": found.get("p_holm")}
        rows.append(row)
    return rows


def _shown(value: float | None, sign: str = "") -> str | None:
    if value is None:
        return None
    return f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}.4f}"


def _with_spread(mean: float | None, std: float | None) -> str | None:
    return _shown(mean) if std is None else f"{_shown(mean)} ± {_shown(std)}"


def _interval(record: Mapping[str, Any], sign: str = "") -> str | None:
    if record.get("low") is None:
        return None
    return f"{_shown(record['low'], sign)} to {_shown(record['high'], sign)}"


def _best(content: Mapping[str, Any], measure: str) -> str | None:
    """Where in the grid validation images are classified best; test images have no say."""
    known = [r for r in content["table"] if r["measure"] == measure and r["mean"] is not None]
    if measure != "val_accuracy" or not content["axes"] or not known:
        return None
    best = max(known, key=lambda record: record["mean"])
    where = ", ".join(f"{axis} {value}" for axis, value in best["point"].items())
    words = f"Highest val_accuracy: {best['configuration']}{where and ', '}{where}"
    return f"{words} ({best['mean']:.4f}). Choose by this, not by the test images below."


def _reading(content: Mapping[str, Any]) -> list[str]:
    most = max((record["n"] for record in content["table"]), default=0)
    lines = ["## How to read this", ""]
    if most < 2:
        lines.append("- One seed: no interval and no test. A difference here is an anecdote.")
    else:
        lines.append(
            "- Intervals are Student's t over seeds: what training anew on the same images would "
            "give, not what other images would."
        )
    pairs = max((record["n"] for record in content["comparisons"]), default=0)
    if pairs > 1:
        lines += [
            "- Differences are of runs with the same seed; p is of the two-sided paired t-test, "
            "corrected by Holm for all tests of its table.",
            f"- With {pairs} pairs a mean difference must reach {detectable(pairs):.1f} times its "
            "standard deviation to be told from none, before any correction.",
        ]
    return lines


# --- picture --------------------------------------------------------------------------------------

_SHOWN = 4  # measures in one picture
_LINES = 7  # more of them cannot be told apart
_TITLE = 32  # letters in a line above a plot


def study_figure(content: Mapping[str, Any]) -> Figure:
    """A dot for each run, the mean and its interval; with a grid, lines over its first axis.

    Where the lines would be too many, places in the grid stand below each other instead.

    Args:
        content: of ``study.json``.

    Returns:
        A figure of its own, outside of pyplot; of the first four measures that runs have.
    """
    known = {r["measure"] for r in content["table"] if r["n"]}
    measures = [m for m in content["measures"] if m in known][:_SHOWN] or content["measures"][:1]
    cells = cells_of(content["runs"])
    first = next(iter(content["axes"]), None)
    others = {(name, *(p for p in point if p[0] != first)) for name, point in cells}
    lines = first is not None and len(others) <= _LINES
    width = (3.4 if lines else 2.6) * len(measures) + (0 if lines else 2.2)
    height = 3.8 if lines else 1.4 + 0.32 * len(cells)
    figure = Figure(figsize=(max(width, 5), height), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(measures), squeeze=False, sharey=False)[0]
    for measure, ax in zip(measures, axes, strict=True):
        (_draw_lines if lines else _draw_dots)(ax, content, measure)
        words = textwrap.wrap(measure.replace(".", ". "), _TITLE)
        ax.set_title("\n".join(words).replace(". ", "."), fontsize=10)
        ax.grid(alpha=0.3)
        ax.tick_params(labelsize=8)
    if lines:
        handles = dict(zip(*axes[0].get_legend_handles_labels()[::-1], strict=True))
        columns = max(1, int(width * 12 / (8 + max(map(len, handles), default=1))))
        figure.legend(
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
    figure.suptitle(title, fontsize=10, wrap=True)
    return figure


def _draw_dots(ax: Axes, content: Mapping[str, Any], measure: str) -> None:
    names = []
    for place, ((name, point), rows) in enumerate(cells_of(content["runs"]).items()):
        names.append(", ".join([name, *(f"{axis} {value}" for axis, value in point)]))
        values = list(values_of(rows, measure).values())
        found = describe(values)
        colour = "#c01818" if name == content["compare_to"] else "#2f6f9f"
        ax.plot(values, [place] * len(values), "o", color=colour, alpha=0.45, markersize=5)
        if found["mean"] is not None:
            ax.plot([found["mean"]], [place], "|", color=colour, markersize=15, markeredgewidth=2)
        if found["low"] is not None:
            ax.plot([found["low"], found["high"]], [place] * 2, color=colour, linewidth=1.5)
        if name == content["compare_to"] and found["mean"] is not None:
            ax.axvline(found["mean"], color=colour, linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_ylim(len(names) - 0.5, -0.5)


def _draw_lines(ax: Axes, content: Mapping[str, Any], measure: str) -> None:
    axis, values = next(iter(content["axes"].items()))
    series: dict[str, list[tuple[Any, list[Row]]]] = {}
    for (name, point), rows in cells_of(content["runs"]).items():
        rest = [f"{other} {value}" for other, value in point if other != axis]
        series.setdefault(", ".join([name, *rest]), []).append((dict(point).get(axis), rows))
    colours = [f"C{place % 10}" for place in range(len(series))]
    offsets = [0.05 * (place - (len(series) - 1) / 2) for place in range(len(series))]
    places = {value: place for place, value in enumerate(values)}
    for (name, found), colour, offset in zip(series.items(), colours, offsets, strict=True):
        drawn = []
        for value, rows in found:
            numbers = list(values_of(rows, measure).values())
            summary = describe(numbers)
            if not numbers:
                continue
            if value is None:  # not crossed with this axis: a level for all of it
                ax.axhline(summary["mean"], color=colour, linestyle="--", label=name)
                continue
            x = places[value] + offset
            drawn.append((x, summary["mean"]))
            ax.plot([x] * len(numbers), numbers, "o", color=colour, alpha=0.35, markersize=3.5)
            if summary["low"] is not None:
                ax.plot([x] * 2, [summary["low"], summary["high"]], color=colour, linewidth=1)
        if drawn:
            ax.plot(*zip(*drawn, strict=True), "-o", color=colour, markersize=4, label=name)
    ax.set_xticks(range(len(values)), [str(value) for value in values], fontsize=8)
    ax.set_xlabel(axis, fontsize=9)
