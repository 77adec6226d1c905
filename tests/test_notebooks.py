"""Every notebook is stored without outputs, and runs from its first cell to its last."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
MADE = {"quickstart.ipynb": ["quickstart/project/page.html"]}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / name, as_version=4)


def test_each_has_files_to_leave():
    assert sorted(MADE) == NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_stripped_and_every_cell_is_python(name):
    notebook = read(name)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    for cell in cells:
        assert cell.outputs == []
        assert cell.execution_count is None
        compile(cell.source, name, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_and_leaves_its_files(name, tmp_path, monkeypatch):
    monkeypatch.setenv("EPOCHS", "1")
    notebook = read(name)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=900, resources=resources).execute()
    for file in MADE[name]:
        assert (tmp_path / file).stat().st_size > 1000
    assert any("image/png" in output.get("data", {}) for output in notebook.cells[-3].outputs)
