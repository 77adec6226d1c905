"""The command line: help, one tiny run and its use, errors in words."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from kd_lrp_plugin.cli import app
from kd_lrp_plugin.data import Phantom

CONFIG = Path(__file__).resolve().parent.parent / "torchdistill_configs/phantom/ce/test_resnet.yaml"
TINY = ["image_size=32", "batch_size=4", "num_workers=0", "train.num_epochs=1"]
TINY += [f"datasets.phantom/{split}.init.kwargs.size=8" for split in ("train", "val", "test")]
SETS = [argument for override in TINY for argument in ("--set", override)]


def call(*arguments: object) -> Result:
    env = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200", "TERMINAL_WIDTH": "200"}
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=env)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["distill", "predict", "--verbose"]),
        (["distill"], ["--set", "KEY=VALUE", "--out", "--seed", "--device", "without a teacher"]),
        (["predict"], ["RUN", "IMAGES", "Not for clinical use"]),
    ],
)
def test_help_names_every_argument(arguments, words):
    result = call(*arguments, "--help")
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    assert [word for word in words if word not in text] == []


def test_no_argument_shows_the_help():
    assert "distill" in call().output


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("cli") / "run"
    return folder, call("distill", CONFIG, *SETS, "--out", folder, "--device", "cpu")


def test_distill_tells_each_epoch_and_the_test(finished):
    folder, result = finished
    assert result.exit_code == 0, result.output
    assert "epoch   1  loss" in result.output
    assert "test accuracy" in result.output
    assert (folder / "summary.json").is_file()


def test_predict_shows_a_row_per_image(finished, tmp_path):
    folder, _ = finished
    Phantom("test", size=4, image_size=32).image(0).save(tmp_path / "a.png")
    result = call("predict", folder, tmp_path / "a.png", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    assert sum(any(name in line for name in Phantom.classes) for line in _lines(result)) == 2


def _lines(result: Result) -> list[str]:
    return result.output.splitlines()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["distill", "absent.yaml"], "config: expected a file, got none at absent.yaml."),
        (["distill", CONFIG, "--set", "sise=3"], "--set sise: key: expected one of"),
        (["distill", CONFIG, "--set", "image_size"], "--set: expected key=value"),
        (["predict", "absent", "a.png"], "run: expected a finished run, got none at absent."),
    ],
)
def test_an_error_is_its_message_and_exit_code_1(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 1
    assert result.stderr.count("Error:") == 1
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_folder_is_an_error_in_words(finished):
    folder, _ = finished
    result = call("distill", CONFIG, *SETS, "--out", folder)
    assert result.exit_code == 1
    assert "Choose another --out or --seed" in " ".join(result.stderr.split())


def test_the_module_runs_as_a_program_and_its_errors_are_one_line(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "kd_lrp_plugin.cli", "distill", "absent.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr.strip().splitlines() == [
        "Error: config: expected a file, got none at absent.yaml. "
        "Give the path of a YAML file, for example one of torchdistill_configs."
    ]
