"""Runs from elsewhere run no code unless the user vouches for them."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from small_runs import BASELINE, SMALL
from typer.testing import CliRunner

from kd_lrp_plugin.cli.main import app
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.runs import trust
from kd_lrp_plugin.training import trainer


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "ce/0"
    trainer.distill(RunSpec(BASELINE, SMALL, folder, device="cpu"))
    return folder


@pytest.fixture
def hostile(made, tmp_path) -> Path:
    """The run as somebody might send it: its config runs code."""
    run = Path(shutil.copytree(made, tmp_path / "sent/ce/0"))
    text = (run / "config.yaml").read_text()
    mark = f"!import_call {{key: os.mkdir, init: {{args: [{tmp_path}/ran]}}}}"
    text = text.replace("models:\n", f"models:\n  extra_model: {mark}\n", 1)
    (run / "config.yaml").write_text(text)
    return run


def call(*words: object):
    return CliRunner().invoke(app, list(map(str, words)))


def commands(run: Path, tmp_path: Path) -> list[list[object]]:
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    return [
        ["evaluate", run, "--resamples", 100],
        ["predict", run, tmp_path / "image.png"],
        ["explain", run, "--n", 1, "--samples", 1, "--method", "grad_cam"],
    ]


def test_a_run_that_was_made_here_is_opened(made, tmp_path):
    for command in commands(made, tmp_path):
        result = call(*command)
        assert result.exit_code == 0, result.output


def test_a_run_from_elsewhere_is_asked_for_and_runs_nothing(hostile, tmp_path):
    for command in commands(hostile, tmp_path):
        result = call(*command)
        assert result.exit_code == 1
        assert "a run that was made here" in result.output
        assert "--trust" in result.output
        assert not (tmp_path / "ran").exists()
        result = call(*command, "--safe")
        assert result.exit_code == 1
        assert "calls known as harmless" in result.output
        assert not (tmp_path / "ran").exists()
    call(*commands(hostile, tmp_path)[0], "--trust")
    assert (tmp_path / "ran").exists()


def test_a_study_with_a_run_from_elsewhere_is_asked_for_too(hostile, tmp_path):
    row = {"state": "finished", "configuration": "CE", "point": {}, "seed": 0}
    content = {"runs": [{**row, "folder": str(hostile)}]}
    (tmp_path / "study").mkdir()
    (tmp_path / "study/study.json").write_text(json.dumps(content))
    result = call("explain", tmp_path / "study", "--samples", 1)
    assert result.exit_code == 1
    assert "a run that was made here" in result.output
    assert not (tmp_path / "ran").exists()


def test_a_folder_may_move_and_a_changed_config_is_from_elsewhere(made, tmp_path):
    run = Path(shutil.copytree(made, tmp_path / "moved"))
    evaluate = ["evaluate", run, "--resamples", 100]
    assert call(*evaluate).exit_code == 0
    with (run / "config.yaml").open("a") as file:
        file.write("# changed\n")
    assert call(*evaluate).exit_code == 1
    assert call(*evaluate, "--safe").exit_code == 0  # this config names harmless calls alone
    assert call(*evaluate).exit_code == 1
    assert call(*evaluate, "--trust").exit_code == 0
    assert call(*evaluate).exit_code == 0


def test_another_user_does_not_trust_what_one_has_made(made, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    assert call("evaluate", made, "--resamples", 100).exit_code == 1


def test_where_nothing_can_be_noted_training_goes_on_and_trust_is_asked_for(
    tmp_path, monkeypatch, made
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    trust.remember("text")
    assert not trust.is_made_here("text")
    with pytest.raises(PermissionError, match="give --trust"):
        trust.check_trusted([made], trust=False, safe=False)
    trust.check_trusted([made], trust=True, safe=False)


def test_the_help_says_that_code_is_run():
    for command in ("evaluate", "predict", "explain"):
        shown = " ".join(call(command, "--help").output.split())
        assert "Runs the code" in shown
        assert "--trust" in shown
