"""Records as Markdown tables."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kd_lrp_plugin.plots.text import one_line


def table(
    records: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, digits: int = 3
) -> str:
    """Records as a Markdown table with aligned columns, as fit for a terminal as for a page.

    Names of columns and values are text: whatever they hold, the table keeps its rows and columns.

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
    head = [_escape(column) for column in columns]
    cells = [[_cell(record.get(column), digits) for column in columns] for record in records]
    widths = [max(len(row[i]) for row in [head, *cells]) for i in range(len(columns))]
    right = [
        any(_is_number(record.get(c)) for record in records)
        and all(_is_number(record[c]) for record in records if record.get(c) is not None)
        for c in columns
    ]

    def line(row: Sequence[str]) -> str:
        padded = zip(row, widths, right, strict=True)
        return f"| {' | '.join(c.rjust(w) if r else c.ljust(w) for c, w, r in padded)} |"

    rule = "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True))
    return "\n".join([line(head), f"|{rule}|", *map(line, cells)])


def study_rows(content: Mapping[str, Any], measure: str) -> list[dict[str, Any]]:
    """A measure of a study: a row per cell, beside its paired difference where it has one.

    Args:
        content: of ``study.json``.
        measure: one of its measures.
    """

    def cell(record: Mapping[str, Any]) -> tuple:
        return record["configuration"], *record["point"].items()

    compared = {cell(r): r for r in content["comparisons"] if r["measure"] == measure}
    rows = []
    for record in content["table"]:
        if record["measure"] != measure:
            continue
        row = _names(content, record)
        std = _figure(record["std"])
        row["n"] = record["n"]
        row["mean ± std"] = _figure(record["mean"]) + (f" ± {std}" if std else "") or None
        row["95 % interval"] = _interval(record)
        if reference := content["compare_to"]:
            found = compared.get(cell(record), {})
            row[f"minus {reference}"] = _figure(found.get("mean"), "+") or None
            row["95 % interval of it"] = _interval(found, "+")
            row |= {"pairs": found.get("n"), "p": _probability(found.get("p"))}
            row["p (Holm)"] = _probability(found.get("p_holm"))
        rows.append(row)
    return rows


def fixed_measures(content: Mapping[str, Any]) -> list[str]:
    """The measures of a study that no seed changes, such as a count of parameters.

    Args:
        content: of ``study.json``.
    """
    cells: dict[tuple, list[Mapping[str, Any]]] = {}
    for run in content["runs"]:
        cells.setdefault((run["configuration"], *run["point"].items()), []).append(run["measures"])

    def is_fixed(measure: str) -> bool:
        found = [
            [of[measure] for of in some if of.get(measure) is not None] for some in cells.values()
        ]
        return any(len(v) > 1 for v in found) and all(len(set(v)) <= 1 for v in found)

    return [measure for measure in content["measures"] if is_fixed(measure)]


def fixed_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The measures that no seed changes side by side, a row for each cell of the study."""
    fixed = fixed_measures(content)
    rows: dict[tuple, dict[str, Any]] = {}
    for record in content["table"]:
        if record["measure"] in fixed:
            names = _names(content, record)
            row = rows.setdefault(tuple(names.values()), names | dict.fromkeys(fixed))
            value = record["mean"]
            row[record["measure"]] = value and (int(value) if value == int(value) else value)
    return list(rows.values())


def prepared_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a study has prepared with several seeds: mean and interval of each measure."""
    rows = []
    for record in content.get("prepared_table", []):
        if record["n"] > 1:
            found = f"{_figure(record['mean'])} ± {_figure(record['std'])}"
            row = {"prepared": record["configuration"], "measure": record["measure"]}
            rows.append(
                row | {"n": record["n"], "mean ± std": found, "95 % interval": _interval(record)}
            )
    return rows


def group_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The accuracy of each model in each group of ``evaluation.json``; empty without groups."""
    rows = []
    for role in ("student", "teacher"):
        groups = (evaluation.get(role) or {}).get("groups") or {}
        for name, of in groups.get("by_group", {}).items():
            low, high = of["accuracy_interval"]
            row = {"model": role, "group": name, "n": of["n"], "accuracy": of["accuracy"]}
            row |= {"95 % interval": f"{low:.3f}-{high:.3f}"}
            rows.append(row | {"minus teacher": of.get("minus_teacher")})
    return rows


def audit_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The regions of ``audit.json``, a row for each model and region."""
    rows = []
    for role, regions in found["relevance"].items():
        for name, of in regions.items():
            row = {"model": role, "region": name, "relevance": of["mean"], "chance": of["chance"]}
            replaced = found["replaced"][role].get(name, {})
            first: dict[str, float] = next(iter(replaced.values()), {})
            row["accuracy"] = first.get("accuracy_before")
            for how, values in replaced.items():
                row[how] = values["accuracy"]
                row[f"flips by {how}"] = values["flips"]
            rows.append(row)
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def export_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The models of ``export.json``, a row each."""
    return [
        {
            "model": row["model"],
            "accuracy": row["accuracy"],
            "agreement": row["agreement"],
            "logits differ by": f"{row['largest_difference']:.1e}",
            "MB": row["megabytes"],
            "ms per image": row["latency_ms"],
        }
        for row in record["models"]
    ]


def describe_export(record: Mapping[str, Any]) -> str:
    """How the models of ``export.json`` were compared, and how int8 was chosen."""
    text = (
        f"On the {record['images']:,} test images; agreement with the student in PyTorch; one "
        "image at one thread, in turn."
    )
    if of_int8 := record.get("int8"):
        text += (
            f" int8: {of_int8['float_layers']} of {of_int8['layers']} layers with weights in float "
            f"give an agreement of {of_int8['validation_agreement']:.3f} on "
            f"{of_int8['validation_images']:,} validation images "
            f"(asked for: {of_int8['agreement_bound']:g}); ranges of "
            f"{of_int8['calibration_images']:,} training images."
        )
    return text


def primary_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The primary comparison of a study, a row for each configuration that it is compared with.

    Args:
        content: of ``study.json``, with a primary comparison.
    """
    primary = content["primary"]
    return [
        {
            f"{primary['configuration']} minus": record["reference"],
            "difference": _figure(record["mean"], "+") or None,
            "95 % interval": _interval(record, "+"),
            "pairs": record["n"],
            "of": len(primary["seeds"]),
            "p": _probability(record["p"]),
            "p (Holm)": _probability(record["p_holm"]),
        }
        for record in primary["differences"]
    ]


def describe_primary(content: Mapping[str, Any]) -> str:
    """What the study's file registers, and whether it can be judged, in a sentence or two."""
    primary = content["primary"]
    where = "".join(f", {axis} {value}" for axis, value in primary["where"].items())
    seeds = ", ".join(map(str, primary["seeds"]))
    state = "All are in." if primary["complete"] else "Not all are in: nothing is to be judged yet."
    return f"Registered in the study's file: {primary['measure']}{where}; seeds {seeds}. {state}"


def _names(content: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that say which cell of a study a row is of."""
    values = {axis: record["point"].get(axis) for axis in content["axes"]}
    texts = {axis: value if value is None else str(value) for axis, value in values.items()}
    return {"configuration": record["configuration"], **texts}


def _figure(value: float | None, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}.4f}"


def _probability(value: float | None) -> float | str | None:
    """What four digits would show as nothing is said to be below."""
    return "< 0.0001" if value is not None and value < 0.0001 else value


def _interval(record: Mapping[str, Any], sign: str = "") -> str | None:
    if record.get("low") is None:
        return None
    return f"{_figure(record['low'], sign)} to {_figure(record['high'], sign)}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: object, digits: int) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:,.{digits}f}"
    if _is_number(value):
        return f"{value:,}"
    return _escape(value)


def _escape(value: object) -> str:
    """Text that ends neither a cell nor a row."""
    # A backslash before the pipe would undo the one that is put there.
    return re.sub(r"(\\*)\|", r"\1\1\\|", one_line(value))
