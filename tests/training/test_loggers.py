"""Where the epochs of a run are shown, and that a run which resumes goes on there."""

import json
import sys
from pathlib import Path

import pytest
from small_runs import BASELINE, SMALL, Stopped, StopsAt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from kd_lrp_plugin.cli.main import app
from kd_lrp_plugin.config.run_spec import LOGS, RunSpec
from kd_lrp_plugin.studies.plan import StudyOptions
from kd_lrp_plugin.studies.runner import run_study
from kd_lrp_plugin.training.loggers import check_installed
from kd_lrp_plugin.training.trainer import distill

TWO_EPOCHS = [*SMALL, "train.num_epochs=2"]


def spec(log: str, out: Path = Path("run")) -> RunSpec:
    return RunSpec(BASELINE, TWO_EPOCHS, out, device="cpu", log=log)


def stop_and_resume(log: str) -> list[dict[str, float]]:
    """The records of a run that was stopped in its second epoch."""
    with StopsAt("epoch 2"), pytest.raises(Stopped):
        distill(spec(log))
    distill(spec(log))
    return [json.loads(line) for line in Path("run/metrics.jsonl").open()]


def expected(records: list[dict[str, float]], name: str) -> list[tuple[int, float]]:
    return [(record["epoch"], pytest.approx(record[name])) for record in records]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def test_tensorboard_has_every_epoch_once_and_the_test():
    records = stop_and_resume("tensorboard")
    board = EventAccumulator("run")
    board.Reload()
    assert len(list(Path("run").glob("events.*"))) == 1
    shown = [(event.step, event.value) for event in board.Scalars("val_accuracy")]
    assert shown == expected(records, "val_accuracy")
    summary = json.loads(Path("run/summary.json").read_text())
    (tested,) = board.Scalars("test_accuracy")
    assert (tested.step, tested.value) == (
        summary["best_epoch"],
        pytest.approx(summary["test_accuracy"]),
    )


@pytest.mark.slow
class TestMlflow:
    @pytest.fixture(autouse=True)
    def mlflow(self, monkeypatch, tmp_path):
        mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
        return mlflow

    def test_a_stopped_run_goes_on_as_the_same_run_and_no_epoch_is_sent_twice(self, mlflow):
        records = stop_and_resume("mlflow")
        client = mlflow.MlflowClient()
        (run,) = client.search_runs(["0"])
        for name in ("epoch", "train_loss", "val_accuracy"):
            history = client.get_metric_history(run.info.run_id, name)
            sent = sorted((value.step, value.value) for value in history)
            assert sent == expected(records, name)
        summary = json.loads(Path("run/summary.json").read_text())
        assert run.data.metrics["test_accuracy"] == pytest.approx(summary["test_accuracy"])
        assert run.info.status == "FINISHED"
        assert run.info.run_name == "run"
        assert run.data.params["image_size"] == "48"
        assert run.data.params["datasets.phantom/train.init.kwargs.size"] == "16"

    def test_a_store_without_the_run_is_refused_and_the_run_resumes_with_it(
        self, monkeypatch, tmp_path
    ):
        with StopsAt("epoch 2"), pytest.raises(Stopped):
            distill(spec("mlflow"))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
        with pytest.raises(OSError, match=r"that has run \w+, begun at sqlite.*No epoch is lost"):
            distill(spec("mlflow"))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
        assert distill(spec("mlflow"))["epochs"] == 2


@pytest.mark.slow
class TestWandb:
    @pytest.fixture(autouse=True)
    def wandb(self, monkeypatch):
        wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
        return wandb

    def test_a_stopped_run_goes_on_under_the_same_name_without_a_network(self):
        stop_and_resume("wandb")
        folders = sorted(Path("wandb").glob("offline-run-*"))
        assert len(folders) == 2
        noted = json.loads(Path("run/environment.json").read_text())["loggers"]["wandb"]
        assert {folder.name.rpartition("-")[2] for folder in folders} == {noted["id"]}
        for folder in folders:
            assert (folder / f"run-{noted['id']}.wandb").stat().st_size > 100


class TestWhatIsNotThere:
    @pytest.fixture(params=sorted({*LOGS} - {"tensorboard"}))
    def absent(self, request, monkeypatch):
        monkeypatch.setitem(sys.modules, request.param, None)
        return request.param

    def test_is_said_before_a_run_begins(self, absent):
        with pytest.raises(ModuleNotFoundError, match=rf"pip install 'kd-lrp-plugin\[{absent}\]'"):
            distill(spec(absent))
        assert not Path("run").exists()

    def test_is_said_before_a_study_begins(self, absent):
        study = {"question": "?", "seeds": 1, "configurations": {"CE": {"config": str(BASELINE)}}}
        Path("study.yaml").write_text(json.dumps(study))
        with pytest.raises(ModuleNotFoundError, match=rf"kd-lrp-plugin\[{absent}\]"):
            run_study("study.yaml", StudyOptions(log=absent))
        assert not Path("runs").exists()

    def test_is_said_by_the_command(self, absent):
        ran = CliRunner().invoke(app, ["distill", str(BASELINE), "--log", absent])
        assert ran.exit_code == 1
        assert "pip install" in ran.output
        assert not Path("runs").exists()

    def test_an_unknown_logger_names_the_known_ones(self):
        ran = CliRunner().invoke(app, ["distill", str(BASELINE), "--log", "mlfow"])
        assert ran.exit_code == 1
        assert "Did you mean 'mlflow'?" in ran.output.replace("\n", " ")

    def test_tensorboard_is_looked_for_as_well(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorboard", None)
        monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
        with pytest.raises(ModuleNotFoundError, match=r"kd-lrp-plugin\[cli\]"):
            check_installed("tensorboard")


def test_the_runs_of_a_study_get_its_logger():
    from kd_lrp_plugin.studies.parser import read_plan

    study = {"question": "?", "seeds": 1, "configurations": {"CE": {"config": str(BASELINE)}}}
    Path("study.yaml").write_text(json.dumps(study))
    (run,) = read_plan("study.yaml").trainings()
    assert run.spec(StudyOptions(log="mlflow")).log == "mlflow"
