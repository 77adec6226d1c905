"""What a run names by relative paths is found where the run was started, or refused."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from kd_lrp_plugin.report.sections import find_data_check, list_split_tables, read_selection
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.runs.loading import load_data_set

CONFIG = """\
dependencies: [kd_lrp_plugin.torchdistill]
datasets:
  mine/test: !import_call
    key: kd_lrp_plugin.torchdistill.folder_images
    init: {kwargs: {root: images, split: Testing, image_size: 16}}
test: {test_data_loader: {dataset_id: mine/test}}
"""
SUMMARY = {"test_accuracy": 1.0, "epochs": 1, "parameters": 1, "seconds": 1.0, "classes": []}


@pytest.fixture
def projects(tmp_path, monkeypatch) -> dict[str, Path]:
    """Two with equal names in them, each with a finished run; we are in the second."""
    for name, colour in (("first", "red"), ("second", "blue")):
        project = tmp_path / name
        for label in ("cat", "dog"):
            (project / "images/Testing" / label).mkdir(parents=True)
            Image.new("RGB", (16, 16), colour).save(project / "images/Testing" / label / "0.png")
        (project / "checked").mkdir()
        (project / "checked/summary.json").write_text(json.dumps({"leaks": {}}))
        (project / "select.json").write_text("{}")
        monkeypatch.chdir(project)
        run = RunFolder("runs/student")
        about = {**SUMMARY, "preprocessing": None, "image_shape": [3, 16, 16]}
        with run.claimed(CONFIG, {"seed": 0}):
            run.add_session({})
            (run / "summary.json").write_text(json.dumps(about))
    return {name: tmp_path / name for name in ("first", "second")}


class TestImages:
    def test_are_those_of_the_folder_in_which_the_run_was_started(self, projects, monkeypatch):
        assert load_data_set("runs/student", "test")[0][0][2].min() == 1  # blue
        with pytest.raises(ValueError, match=r"root .*first/images, got images as seen from"):
            load_data_set(projects["first"] / "runs/student", "test")
        shutil.rmtree("images")
        with pytest.raises(ValueError, match=r"got none .* Give the command in .*/first, where"):
            load_data_set(projects["first"] / "runs/student", "test")
        monkeypatch.chdir(projects["first"])
        assert load_data_set("runs/student", "test")[0][0][0].min() == 1

    def test_are_found_where_the_project_has_moved_to(self, projects, tmp_path, monkeypatch):
        moved = projects["first"].rename(tmp_path / "moved")
        monkeypatch.chdir(moved)
        assert load_data_set("runs/student", "test")[0][0][0].min() == 1

    def test_of_a_run_that_has_moved_alone_are_those_seen_from_here(self, projects, tmp_path):
        moved = Path("runs/student").rename(tmp_path / "alone")
        assert load_data_set(moved, "test")[0][0][2].min() == 1


@pytest.mark.parametrize("is_noted", [True, False], ids=["noted", "of an older version"])
def test_a_page_names_the_leak_check_and_the_ranking_of_the_runs_own_project(projects, is_noted):
    entry = {"init": {"kwargs": {"manifest": "checked/clean_split.csv"}}}
    student = {"key": "diswot_student", "kwargs": {"record": "select.json"}}
    config = {"datasets": {"mine/test": entry}, "models": {"student_model": student}}
    if not is_noted:
        file = projects["first"] / "runs/student/environment.json"
        file.write_text(json.dumps({"seed": 0, "sessions": [{}]}))
    run = {"name": "a", "folder": str(projects["first"] / "runs/student"), "config": config}
    (projects["first"] / "checked/clean_split.csv").touch()
    (projects["second"] / "checked/clean_split.csv").touch()
    assert find_data_check(list_split_tables([run])) == projects["first"] / "checked"
    (projects["first"] / "select.json").write_text(json.dumps({"ranking": [{}]}))
    with pytest.raises(ValueError, match=r"first/select\.json"):  # it is read, and damaged
        read_selection([run], None)
