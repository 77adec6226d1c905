"""Files of a finished run that are cut short or changed: named by every command, or repaired."""

import json
import os
import shutil
import traceback
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_runs import BASELINE, CPU, SMALL, outcome, same
from typer.testing import CliRunner

from kd_lrp_plugin.cli.main import app
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.runs.folder import OUTPUTS, RunFolder
from kd_lrp_plugin.runs.loading import load_run
from kd_lrp_plugin.runs.predictions import read_predictions
from kd_lrp_plugin.runs.provenance import check_weights_file
from kd_lrp_plugin.training.trainer import distill

EXPECTED = (ValueError, OSError)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    distill(RunSpec(BASELINE, SMALL, folder, device="cpu"))
    Image.new("L", (48, 48), 90).save(folder.parent / "one.png")
    words = ["explain", str(folder), "--method", "grad_cam", "--samples", "2", "--n", "1"]
    for command in (["evaluate", str(folder), "--resamples", "100"], words):
        assert CliRunner().invoke(app, command).exit_code == 0
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    shutil.copy(finished.parent / "one.png", tmp_path / "one.png")
    return shutil.copytree(finished, tmp_path / "run")


def damages(content: bytes, cuts: int, flips: int) -> list[bytes]:
    """Cut short at every few bytes, and with single bytes changed."""
    step = max(1, len(content) // cuts)
    found = [content[:end] for end in range(0, len(content), step)]
    for index in range(step // 2, len(content), max(1, len(content) // flips)):
        for byte in (0xFF, content[index] ^ 1):
            found.append(content[:index] + bytes([byte]) + content[index + 1 :])
    return found


def answer(command: list[str]) -> str | None:
    """The words of the error of a command; None if it works. No error is unexpected."""
    result = CliRunner().invoke(app, command)
    error = result.exception
    if error is not None and not isinstance(error, SystemExit):
        raise AssertionError("".join(traceback.format_exception(error)))
    assert "Traceback" not in result.output
    assert (result.exit_code == 0) == (error is None)
    return None if error is None else result.output


READERS = {
    "summary": lambda run: RunFolder(run).summary(),
    "metrics": lambda run: RunFolder(run).read_metrics(),
    "predictions": lambda run: read_predictions(RunFolder(run)),
    "damage": lambda run: RunFolder(run).find_damage(),
}


class TestEveryCut:
    """All readers of a folder, at many damages: fast, so that it can be many."""

    @pytest.mark.parametrize(
        ("name", "readers"),
        [
            ("summary.json", ("summary", "damage")),
            ("environment.json", ("predictions", "damage")),
            ("metrics.jsonl", ("metrics", "damage")),
            ("predictions.csv", ("predictions", "damage")),
        ],
    )
    def test_is_named_or_harmless(self, name, readers, run):
        content = (run / name).read_bytes()
        about = (run / "environment.json").read_bytes()
        intact = {reader: repr(READERS[reader](run)) for reader in readers}
        for known in (True, False):  # also in a run of an older version, without hashes
            if not known and name != "environment.json":
                words = json.loads(about)
                del words["outputs"]
                (run / "environment.json").write_text(json.dumps(words))
            for damage in damages(content, 150, 60):
                (run / name).write_bytes(damage)
                for reader in readers:
                    try:
                        found = READERS[reader](run)
                    except EXPECTED as error:
                        words = str(error)
                    else:
                        words = ""
                    if words:
                        # A hash that has changed is taken for another file.
                        assert name in words or "predictions.csv: " in words, damage[-80:]
                        assert "delete the folder" not in words.lower()
                    elif reader == "damage" and known and name in OUTPUTS:
                        assert name in found
                    elif known and name in OUTPUTS:
                        assert repr(found) == intact[reader]

    @pytest.mark.parametrize("name", ["best.pt", "student.safetensors"])
    def test_of_weights_is_noticed(self, name, run, tmp_path):
        content = (run / name).read_bytes()
        for damage in damages(content, 20, 20):
            (run / name).write_bytes(damage)
            with pytest.raises(ValueError, match=rf"{name}: .*kd-lrp distill.* repairs it"):
                check_weights_file(run / name)
            assert set(RunFolder(run).find_damage()) == {name}


class TestCommands:
    @pytest.mark.parametrize(
        "how",
        [
            *("half", "a list"),
            *(pytest.param(how, marks=pytest.mark.slow) for how in ("empty", "no text", "no keys")),
        ],
    )
    @pytest.mark.parametrize(
        "name",
        [
            *("summary.json", "environment.json", "metrics.jsonl", "predictions.csv", "best.pt"),
            *("evaluation.json", "explanations.json"),
        ],
    )
    def test_name_the_file_and_keep_the_checkpoints(self, name, how, run, tmp_path):
        file = run / name
        content = file.read_bytes()
        damage = {"half": content[: len(content) // 2], "empty": b"", "no text": b"\xff\xfe\x00"}
        damage |= {"a list": b"[1, 2]\n", "no keys": b"{}\n"}
        file.write_bytes(damage[how])
        page = str(tmp_path / "page.html")
        commands = {
            "evaluate": ["evaluate", str(run), "--resamples", "100"],
            "predict": ["predict", str(run), str(tmp_path / "one.png")],
            "explain": ["explain", str(run), "--method", "grad_cam", "--samples", "2", "--n", "1"],
            "report": ["report", str(run), "--out", page],
        }
        reads = {
            "summary.json": set(commands),
            "environment.json": set(commands),
            "metrics.jsonl": {"report"},
            "predictions.csv": {"evaluate", "explain", "report"},
            "best.pt": {"evaluate", "predict", "explain"},
            "evaluation.json": {"report"},
            "explanations.json": {"explain", "report"},
        }
        if name == "evaluation.json":
            del commands["evaluate"]  # which makes it again
        for command, words in commands.items():
            error = answer(words)
            if command in reads[name]:
                assert error is not None, command
                assert name in error.replace("\n", ""), error
                assert "delete the folder" not in error.lower()
            else:
                assert error is None, (command, error)
        assert (run / "last.pt").exists()

    @pytest.mark.parametrize("name", [*OUTPUTS, "summary.json"])
    @pytest.mark.parametrize("how", ["gone", "half", "one bit"])
    def test_distill_rerun_repairs(self, name, how, run, finished):
        file = run / name
        content = bytearray(file.read_bytes())
        if how == "gone":
            file.unlink()
        elif how == "half":
            file.write_bytes(content[: len(content) // 2])
        else:
            content[len(content) // 2] ^= 0x80
            file.write_bytes(content)
        distill(RunSpec(BASELINE, SMALL, run, device="cpu"))
        assert same(outcome(run), outcome(finished))
        assert RunFolder(run).find_damage() == {}
        lines = [(folder / "metrics.jsonl").read_text() for folder in (run, finished)]
        assert lines[0] == lines[1]  # times included: nothing was trained again

    def test_a_run_without_its_environment_resumes(self, run, finished):
        """What the error about a damaged one advises."""
        (run / "environment.json").write_text("{")
        with pytest.raises(ValueError, match=r"environment\.json: .*Rename it, .*checkpoints stay"):
            distill(RunSpec(BASELINE, SMALL, run, device="cpu"))
        (run / "environment.json").rename(run / "damaged")
        distill(RunSpec(BASELINE, SMALL, run, device="cpu"))
        (run / "summary.json").unlink()
        (run / "environment.json").unlink()
        with pytest.raises(FileExistsError, match="a checkpoint of this run, got seed 0"):
            distill(RunSpec(BASELINE, SMALL, run, 3, "cpu"))
        (run / "environment.json").unlink()
        distill(RunSpec(BASELINE, SMALL, run, device="cpu"))
        assert same(outcome(run), outcome(finished))

    def test_without_a_checkpoint_a_damaged_run_is_not_trained_again(self, run):
        (run / "last.pt").unlink()
        (run / "best.pt").write_bytes(b"")
        with pytest.raises(ValueError, match=r"where best\.pt are damaged and no checkpoint"):
            distill(RunSpec(BASELINE, SMALL, run, device="cpu"))
        assert (run / "summary.json").exists()


def test_a_damaged_teacher_is_named_with_its_repair(run, tmp_path):
    """Also where only the hash can tell: an archive's checksums cover its content alone."""
    from small_runs import KD

    teacher = ["models.teacher_model.kwargs.name=test_resnet"]
    teacher += [f"models.teacher_model.src_ckpt={run}/best.pt"]
    content = bytearray((run / "best.pt").read_bytes())
    content[-1] ^= 1
    (run / "best.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"best\.pt: .*other bytes\. kd-lrp distill"):
        distill(RunSpec(KD, [*SMALL, *teacher], tmp_path / "kd", device="cpu"))


class TestWeightsThatAreNotFinite:
    @pytest.fixture
    def broken(self, run) -> Path:
        """As a run that diverged in its last step left it before it was checked for."""
        best = torch.load(run / "best.pt", weights_only=True)
        best["model"]["fc.weight"][0, 0] = torch.nan
        torch.save(best, run / "best.pt")
        about = json.loads((run / "environment.json").read_text())
        del about["outputs"]
        (run / "environment.json").write_text(json.dumps(about))
        return run

    def test_are_named_by_whoever_loads_them(self, broken, tmp_path):
        for command in (["predict", str(tmp_path / "one.png")], ["explain", "--n", "1"]):
            error = answer([command[0], str(broken), *command[1:]])
            assert error is not None
            assert "finite" in error
            assert "fc.weight" in error
        with pytest.raises(ValueError, match="finite"):
            load_run(broken)

    def test_predictions_of_them_are_no_numbers(self, broken):
        text = (broken / "predictions.csv").read_text().splitlines()
        cells = text[1].split(",")
        text[1] = ",".join([*cells[:2], *["nan"] * (len(cells) - 2)])
        (broken / "predictions.csv").write_text("\n".join(text) + "\n")
        error = answer(["evaluate", str(broken), "--resamples", "100"])
        assert error is not None
        assert "finite predictions of the student" in error


def test_a_finished_run_on_a_disk_that_cannot_be_written_is_finished(run, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("kd_lrp_plugin.utils.files.locked", refuse)
    before = {file.name: file.stat().st_mtime_ns for file in run.iterdir()}
    found = distill(RunSpec(BASELINE, SMALL, run, device="cpu"))
    assert found == json.loads((run / "summary.json").read_text())
    assert {file.name: file.stat().st_mtime_ns for file in run.iterdir()} == before


def test_a_folder_of_other_things_is_refused_without_a_trace(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds \['thesis\.tex'\]"):
        distill(RunSpec(BASELINE, SMALL, tmp_path / "thesis", device=str(CPU.device)))
    assert os.listdir(tmp_path / "thesis") == ["thesis.tex"]
