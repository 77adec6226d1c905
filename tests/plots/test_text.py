"""Names in figures and tables: drawn and read back as they are."""

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

NAMES = hostile_names(12)


def drawn(figure: Figure, tmp_path) -> list[str]:
    """All texts of a figure, drawn as pixels and as a vector that XML can be read from."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(tmp_path / "figure.png", dpi=30)
    figure.savefig(tmp_path / "figure.svg")
    minidom.parse(str(tmp_path / "figure.svg"))
    vector(figure)
    texts = list(figure.texts)
    for ax in figure.get_axes():
        texts += [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        texts += [*ax.get_xticklabels(), *ax.get_yticklabels()]
        legend = ax.get_legend()
        texts += legend.get_texts() if legend else []
    for legend in figure.legends:
        texts += legend.get_texts()
    return [text.get_text() for text in texts]


def study(name: str, axes: dict) -> dict:
    points = [dict(zip(axes, values, strict=True)) for values in zip(*axes.values(), strict=True)]
    rows = [
        {
            **{"configuration": c, "point": point, "seed": seed, "label": c},
            "measures": {name: 0.5 + seed / 10},
        }
        for c in (name, "other")
        for point in points or [{}]
        for seed in (0, 1)
    ]
    records = [
        {
            **{"measure": name, "configuration": c, "point": point, "n": 2, "mean": 0.5},
            **{"std": 0.1, "low": 0.4, "high": 0.6},
        }
        for c in (name, "other")
        for point in points or [{}]
    ]
    return {
        **{"question": name, "state": "", "final": True, "failed": {name: name}, "axes": axes},
        **{"measures": [name], "compare_to": name, "runs": rows, "table": records},
        "comparisons": [],
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_draws_every_name(name, tmp_path):
    plain, line = plain_text(name), plain_text(name, lines=True)
    matrix, curve = [[3, 1], [0, 2]], ([0.9, 0.5], [True, False])
    score = {"candidate": name, "score": 1.0, "spread": 0.1, "parameters": 10.0, "front": True}
    figures = {
        "confusion": confusion_figure({name: matrix}, [name, "b"], name),
        "reliability": reliability_figure({name: curve}, name),
        "curves": curves_figure([{"epoch": 1, f"train_{name}": 1.0}], name),
        "selection": selection_figure([score], name),
        "maps": map_figure(
            [MapRow(name, np.zeros((8, 8)), {name: np.eye(2)}, {name: (name, 0.5)})], name, name
        ),
        "study": study_figure(study(name, {})),
        "study over a grid": study_figure(study(name, {name: ["x", name]})),
    }
    found = {kind: drawn(figure, tmp_path) for kind, figure in figures.items()}
    assert found["confusion"].count(plain) == 3  # title, two axes
    assert f"{plain}\naccuracy 0.833" in found["confusion"]
    assert plain in found["reliability"]
    assert plain in found["curves"]
    assert plain in found["selection"]
    assert line in found["maps"]
    for kind in ("study", "study over a grid"):
        assert any(plain in text for text in found[kind])
    words = re.sub(r"\s", "", "".join(found["study over a grid"]))
    assert words.count(re.sub(r"\s", "", plain)) >= 4  # title, axis, tick, legend


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
    lines = study_markdown(study(name, {name: ["x", name]})).split("\n")
    assert lines[0] == f"# {one_line(name)}"
    assert f"## {one_line(name)}" in lines
    rows = [cells(line) for line in lines if line.startswith("|") and "---" not in line]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert rows[1][0] == one_line(name)
