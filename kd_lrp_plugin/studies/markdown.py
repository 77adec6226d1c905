"""The comparison of a study as Markdown."""

from collections.abc import Mapping
from typing import Any

from kd_lrp_plugin.metrics.statistics import detectable
from kd_lrp_plugin.plots.tables import (
    describe_primary,
    fixed_measures,
    fixed_rows,
    prepared_rows,
    primary_rows,
    study_rows,
    table,
)
from kd_lrp_plugin.plots.text import one_line


def study_markdown(content: Mapping[str, Any]) -> str:
    """``study.json`` as Markdown: a table for each measure, and how to read them."""
    parts = [f"# {one_line(content['question'])}", content["state"]]
    parts += [f"- {one_line(f'{label}: {why}')}" for label, why in content["failed"].items()]
    if content.get("primary"):
        words = one_line(describe_primary(content))
        parts.append(
            f"## Primary comparison\n\n{words}\n\n{table(primary_rows(content), digits=4)}"
        )
    fixed = fixed_measures(content)
    for measure in content["measures"]:
        if measure in fixed:
            continue
        rows = study_rows(content, measure)
        if any(row["n"] for row in rows):
            parts.append(f"## {one_line(measure)}\n\n{table(rows, digits=4)}")
        else:
            reason = "no finished run has it. Metrics of maps come with kd-lrp explain, those of "
            reason += "regions with kd-lrp audit."
            parts.append(f"## {one_line(measure)}\n\nNothing to show: {reason}")
        if best := _best(content, measure):
            parts.append(best)
    if fixed:
        parts.append(f"## The same at every seed\n\n{table(fixed_rows(content), digits=4)}")
    if rows := prepared_rows(content):
        parts.append(f"## Prepared\n\n{table(rows)}")
    parts.append("\n".join(_reading(content)))
    return "\n\n".join(parts) + "\n"


def _best(content: Mapping[str, Any], measure: str) -> str | None:
    """Where in the grid validation images are classified best; test images have no say."""
    known = [r for r in content["table"] if r["measure"] == measure and r["mean"] is not None]
    if measure != "val_accuracy" or not content["axes"] or not known:
        return None
    best = max(known, key=lambda record: record["mean"])
    where = ", ".join(f"{axis} {value}" for axis, value in best["point"].items())
    best_cell = one_line(f"Highest val_accuracy: {best['configuration']}{where and ', '}{where}")
    return f"{best_cell} ({best['mean']:.4f}). Choose by this, not by the test images below."


def _reading(content: Mapping[str, Any]) -> list[str]:
    most = max((record["n"] for record in content["table"]), default=0)
    lines = ["## How to read this", ""]
    if most < 2:
        lines.append("- One seed: no interval and no test. A difference here is an anecdote.")
    else:
        lines.append(
            "- Intervals are Student's t over seeds: what training again on the same images would "
            "give, not what other images would."
        )
    pairs = max((record["n"] for record in content["comparisons"]), default=0)
    if pairs > 1:
        lines += [
            "- Differences are of runs with the same seed; p is of the two-sided paired t-test, "
            "corrected by Holm for all tests of its table.",
            f"- With {pairs} pairs a mean difference must reach {detectable(pairs):.1f} times its "
            "standard deviation to be significantly different from zero, before any correction.",
        ]
    return lines
