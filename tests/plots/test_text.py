"""Names in figures and tables: drawn and read back as they are."""

import base64
import io
import re
import warnings
from xml.dom import minidom

import numpy as np
import pytest
from hostile_names import KNOWN, hostile_names
from matplotlib.figure import Figure

from kd_lrp_plugin.plots.figures import (
    confusion_figure,
    curves_figure,
    reliability_figure,
    selection_figure,
)
from kd_lrp_plugin.plots.maps import MapRow, map_figure
from kd_lrp_plugin.plots.tables import table
from kd_lrp_plugin.plots.text import one_line, plain_text
from kd_lrp_plugin.report.images import vector
from kd_lrp_plugin.studies.figure import study_figure
from kd_lrp_plugin.studies.markdown import study_markdown

NAMES = list(dict.fromkeys(hostile_names(12)))
PLAIN_NAMES = [plain_text(name) for name in NAMES]


def drawn(figure: Figure) -> list[str]:
    """All texts of a figure, which is drawn as pixels and as a vector that is valid XML."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Glyph")
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        figure.savefig(io.BytesIO(), dpi=20)
        source = vector(figure)["source"]
    minidom.parseString(base64.b64decode(source.partition("base64,")[2]))
    texts = list(figure.texts)
    for ax in figure.get_axes():
        texts += [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        texts += [*ax.get_xticklabels(), *ax.get_yticklabels()]
        legend = ax.get_legend()
        texts += legend.get_texts() if legend else []
    for legend in figure.legends:
        texts += legend.get_texts()
    return [text.get_text() for text in texts]


def study(names: list[str], axis: str | None = None) -> dict:
    """A study whose question, measure, configurations and axis are called so."""
    points = [{axis: value} for value in ("x", names[0])] if axis else [{}]
    cells = [(name, point) for name in names for point in points]
    measure = names[0]
    rows = [
        {
            "configuration": name,
            "point": point,
            "seed": seed,
            "measures": {measure: 0.5 + seed / 10},
        }
        for name, point in cells
        for seed in (0, 1)
    ]
    numbers = {"n": 2, "mean": 0.5, "std": 0.1, "low": 0.4, "high": 0.6}
    table = [
        {"measure": measure, "configuration": name, "point": point, **numbers}
        for name, point in cells
    ]
    return {
        **{"question": measure, "state": "", "final": True, "failed": {measure: measure}},
        **{"axes": {axis: ["x", names[0]]} if axis else {}, "measures": [measure]},
        **{"compare_to": measure, "runs": rows, "table": table, "comparisons": []},
    }


def test_the_confusion_matrices_name_models_and_classes():
    matrix = np.eye(len(NAMES), dtype=int)
    texts = drawn(confusion_figure(dict.fromkeys(NAMES[:4], matrix), NAMES, NAMES[3]))
    assert all(texts.count(name) >= 8 for name in PLAIN_NAMES)
    assert all(f"{name}\naccuracy 1.000" in texts for name in PLAIN_NAMES[:4])


def test_the_reliability_curves_name_models_also_those_that_begin_with_an_underscore():
    curve = ([0.9, 0.5], [True, False])
    texts = drawn(reliability_figure(dict.fromkeys(NAMES, curve), NAMES[3]))
    assert {"calibrated", *(f"{name} (2 images)" for name in PLAIN_NAMES)} <= set(texts)


def test_the_curves_name_every_term():
    texts = drawn(curves_figure([{"epoch": 1} | {f"train_{n}": 1.0 for n in NAMES}], NAMES[3]))
    assert set(PLAIN_NAMES) <= set(texts)


def test_the_selection_names_every_candidate():
    records = [
        {"candidate": n, "score": k, "std": 0.1, "parameters": 10.0**k, "front": k > 2}
        for k, n in enumerate(NAMES)
    ]
    assert set(PLAIN_NAMES) <= set(drawn(selection_figure(records[:20], NAMES[3]))) | set(
        PLAIN_NAMES[20:]
    )


def test_the_maps_name_classes_and_columns():
    columns = {name: np.eye(2) for name in NAMES[:6]}
    rows = [MapRow(n, np.zeros((8, 8)), columns, {"image": (n, 0.5)}) for n in NAMES]
    texts = drawn(map_figure(rows, NAMES[3], outline=NAMES[4]))
    words = {"".join(text.split()) for text in texts}  # long ones are on several lines
    assert {"".join(plain_text(name, lines=True).split()) for name in NAMES} <= words
    found = {text.removesuffix("✗") for text in words}
    assert {"".join(f"{name} 0.50".split()) for name in PLAIN_NAMES} <= found


@pytest.mark.parametrize("name", KNOWN)
def test_a_studys_figure_names_its_measure_configurations_and_axis(name):
    names = [name, "other"]
    dots = drawn(study_figure(study(names)))
    assert plain_text(name) in dots
    lines = drawn(study_figure(study(names, axis=name)))
    assert lines.count(plain_text(name)) >= 3  # the axis, its value, the legend


def cells(line: str) -> list[str]:
    """Of a row of a table, as GitHub's Markdown divides it: at pipes without a backslash."""
    parts, current, backslashes = [], "", 0
    for character in line:
        if character == "|" and backslashes % 2 == 0:
            parts.append(current)
            current = ""
        else:
            current += character
        backslashes = backslashes + 1 if character == "\\" else 0
    assert not current
    assert parts[0] == ""
    return [
        re.sub(r"(\\+)\|", lambda m: m[1][: len(m[1]) // 2] + "|", p).strip() for p in parts[1:]
    ]


@pytest.mark.parametrize("name", hostile_names(40, seed=1))
def test_a_table_keeps_its_rows_and_columns(name):
    text = table([{name + "h": name, "n": 1}, {name + "h": "x", "n": 2}])
    lines = text.split("\n")
    assert len(lines) == 4
    assert cells(lines[0]) == [one_line(name + "h").strip(), "n"]
    assert cells(lines[2]) == [one_line(name).strip(), "1"]
    assert len(text.splitlines()) == 4


@pytest.mark.parametrize("name", KNOWN)
def test_a_studys_page_keeps_its_headings_and_tables(name):
    lines = study_markdown(study([name, "other"], axis=name)).split("\n")
    assert lines[0] == f"# {one_line(name)}"
    assert f"## {one_line(name)}" in lines
    rows = [cells(line) for line in lines if line.startswith("|") and "---" not in line]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert rows[1][0] == one_line(name)
