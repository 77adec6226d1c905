"""Rows of runs become a study's table, its paired differences, its page of Markdown, its figure.

A row is a mapping with ``configuration``, ``point`` (value by axis of the grid), ``seed`` and
``measures`` (value by name, None where a run has none).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kd_lrp_plugin.metrics.statistics import describe, holm, paired_difference

Row = Mapping[str, Any]
Cell = tuple[str, tuple[tuple[str, Any], ...]]  # a configuration and its point of the grid


def group_cells(rows: Sequence[Row]) -> dict[Cell, list[Row]]:
    """The rows of each configuration and point of the grid, in the order of appearance."""
    cells: dict[Cell, list[Row]] = {}
    for row in rows:
        cells.setdefault((row["configuration"], tuple(row["point"].items())), []).append(row)
    return cells


def get_values(rows: Sequence[Row], measure: str) -> dict[int, float]:
    """The values of a measure by seed, of the runs that have one."""
    found = {row["seed"]: row["measures"].get(measure) for row in rows}
    return {seed: value for seed, value in found.items() if value is not None}


def value_at(node: Any, key_path: str) -> float | None:
    """The finite number at a key path, or None; keys may hold dots themselves.

    Example:
        >>> value_at({"maps": {"blocks.4": [{"mass": 1}]}}, "maps.blocks.4.0.mass")
        1.0
    """
    if isinstance(node, list):
        node = {str(index): value for index, value in enumerate(node)}
    if not isinstance(node, Mapping):
        return None
    value = node.get(key_path)
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    for key in node:
        if key_path.startswith(f"{key}."):
            value = value_at(node[key], key_path[len(key) + 1 :])
            if value is not None:
                return value
    return None


def summarise(rows: Sequence[Row], measures: Sequence[str]) -> list[dict[str, Any]]:
    """A record for each cell and measure, with what :func:`statistics.describe` returns."""
    return [
        {
            "measure": measure,
            "configuration": name,
            "point": dict(point),
            **describe(list(get_values(some, measure).values())),
        }
        for measure in measures
        for (name, point), some in group_cells(rows).items()
    ]


def compare(
    rows: Sequence[Row], measures: Sequence[str], reference: str | None
) -> list[dict[str, Any]]:
    """A record for each cell and measure: how far it lies above the reference.

    The reference of a cell is the configuration ``reference`` at the cell's values on the axes
    that it has. Only runs of the same seed are compared.

    Returns:
        Records with what :func:`statistics.paired_difference` returns; ``p_holm`` is corrected
        for all comparisons of the measure.
    """
    cells = group_cells(rows)
    found: list[dict[str, Any]] = []
    for measure in measures:
        family: list[dict[str, Any]] = []
        for (name, point), some in cells.items():
            for (other, other_point), reference_rows in cells.items():
                if other == reference != name and set(other_point) <= set(point):
                    pairs = get_values(some, measure), get_values(reference_rows, measure)
                    record = {"measure": measure, "configuration": name, "point": dict(point)}
                    record |= {"reference": other, **paired_difference(*pairs)}
                    family.append(record)
        corrected = holm([record["p"] for record in family])
        found += [r | {"p_holm": p} for r, p in zip(family, corrected, strict=True)]
    return found
