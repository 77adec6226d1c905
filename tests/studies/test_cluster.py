"""A study on other machines: the rules are those of this one, whatever becomes of a worker."""

import json
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from dask_cluster import dask_workers
from small_runs import BASELINE, SMALL
from typer.testing import CliRunner

from kd_lrp_plugin.cli.main import app
from kd_lrp_plugin.runs.folder import LOCK
from kd_lrp_plugin.studies import executors
from kd_lrp_plugin.studies.executors import StudyExecutor, open_processes
from kd_lrp_plugin.studies.parser import read_plan
from kd_lrp_plugin.studies.plan import StudyOptions
from kd_lrp_plugin.studies.runner import run_study
from kd_lrp_plugin.utils import files
from kd_lrp_plugin.utils.progress import NullProgress
from kd_lrp_plugin.utils.workers import BUSY, ProcessJob, ProcessPool


class Notes(NullProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def write_study(folder: Path, seeds: int = 1, **configurations: list[str]) -> Path:
    """A study of the small student, each configuration with its overrides."""
    content = {
        "question": "Does it end?",
        "seeds": seeds,
        "set": [*SMALL, "train.num_epochs=3", "train.scheduler.kwargs.total_steps=3"],
        "configurations": {
            name: {"config": str(BASELINE), "set": set_} for name, set_ in configurations.items()
        },
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def finish(folder: Path) -> None:
    """Leave in a folder what a finished run leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("best.pt", "student.safetensors", "predictions.csv"):
        (folder / name).touch()
    lines = [json.dumps({"epoch": epoch, "val_accuracy": 0.5}) + "\n" for epoch in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "evaluation.json").write_text(json.dumps({"student": {"macro_f1": 0.5}}))
    summary = {"test_accuracy": 0.5, "seconds": 1, "epochs": 3, "parameters": 9, "classes": []}
    summary |= {"preprocessing": None, "image_shape": [3, 8, 8]}
    (folder / "summary.json").write_text(json.dumps(summary))


class LostError(Exception):
    """Raised by a future whose worker was lost, as dask raises its KilledWorker."""


class Lossy:
    """What is run of a job in a thread that stands for another machine.

    Args:
        outcomes: of each start in turn: an epoch more or none, and an exit code or an error.
    """

    def __init__(self, *outcomes: tuple[int, int | Exception]) -> None:
        self.outcomes, self.jobs = list(outcomes), []

    def __call__(self, job: ProcessJob) -> int:
        self.jobs.append(job)
        folder = job.lock.parent
        epochs, outcome = self.outcomes.pop(0)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "metrics.jsonl").open("a") as lines:
            lines.write("{}\n" * epochs)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome == 0:
            finish(folder)
        return outcome


class TestExecutor:
    """Any executor of concurrent.futures will do; no dask is needed."""

    @pytest.fixture
    def work(self, tmp_path):
        """Runs the one run of a study by pretended outcomes; gives failures, notes and jobs."""
        plan = read_plan(write_study(tmp_path, CE=[]), root=tmp_path / "runs")
        self.folder = plan.runs[0].folder

        def work(*outcomes, patience: float = 0, sees=None):
            run, failed, notes = Lossy(*outcomes), {}, Notes()
            with ThreadPoolExecutor(1) as threads, notes:
                pool = ProcessPool(sees or threads, run, 2, lost=(LostError,), patience=patience)
                executor = StudyExecutor(
                    plan.runs, StudyOptions(scheduler="tcp://here"), 2, failed, str, pool
                )
                list(executor.work())
            return failed, notes.notes, run.jobs

        return work

    def test_a_run_whose_worker_is_lost_goes_on_with_another(self, work):
        failed, notes, jobs = work((1, LostError()), (1, -15), (0, 0))
        assert not failed
        assert notes[:2] == ["CE, seed 0: its worker is lost; it goes on with another"] * 2
        assert len(jobs) == 3

    def test_one_that_is_lost_without_an_epoch_in_between_is_given_up(self, work):
        failed, _, jobs = work((1, LostError()), (0, -9), (0, LostError()))
        assert len(jobs) == 3
        assert "lost again and again" in failed[self.folder]

    def test_one_that_another_process_holds_is_waited_for(self, work, tmp_path):
        """As of a worker that is out of reach, and trains still."""
        self.folder.mkdir(parents=True)
        held = files.locked(self.folder / LOCK)
        held.__enter__()
        threading.Timer(0.7, lambda: held.__exit__(None, None, None)).start()
        failed, notes, jobs = work((0, BUSY), (0, 0))
        assert (failed, len(jobs)) == ({}, 2)
        assert notes[0] == "CE, seed 0: another process is running it; waiting"

    def test_a_job_knows_where_it_works_and_with_which_threads(self, work, monkeypatch):
        monkeypatch.setenv("KD_LRP_DATA", "/somewhere")
        _, _, (job,) = work((0, 0))
        assert job.directory == Path.cwd()
        assert job.lock == self.folder.absolute() / LOCK
        numbers = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "2")
        assert job.environment == {**numbers, "KD_LRP_DATA": "/somewhere"}
        assert Path(json.loads(job.words[-1])["out"]) == self.folder

    def test_files_that_are_seen_late_are_waited_for(self, work):
        """As over a network file system."""

        threading.Timer(0.7, lambda: finish(self.folder)).start()

        class Done:
            def submit(self, *_) -> Future:
                future: Future[int] = Future()
                future.set_result(0)
                return future

        failed, _, _ = work(patience=30, sees=Done())
        assert not failed
        (self.folder / "summary.json").unlink()
        failed, _, _ = work(patience=0, sees=Done())
        assert failed[self.folder] == "exit code 0: no output"

    def test_an_error_of_the_worker_is_the_reason_of_the_failure(self, work):
        failed, _, _ = work((0, ValueError("worker one: expected torch 2, got torch 1.")))
        assert failed[self.folder] == "worker one: expected torch 2, got torch 1."

    def test_a_scheduler_that_is_gone_ends_the_study_with_its_address(self, work):
        class Gone:
            def submit(self, *_) -> Future:
                future: Future[int] = Future()
                future.cancel()
                return future

        with pytest.raises(
            ConnectionError, match=r"--scheduler tcp://here: .*gone\. Start it again"
        ):
            work(sees=Gone())

    def test_jobs_beside_a_scheduler_are_refused_before_anything(self, tmp_path):
        with pytest.raises(ValueError, match=r"--jobs: expected none beside --scheduler, got 2"):
            open_processes(StudyOptions(jobs=2, scheduler="tcp://127.0.0.1:1"))
        words = ["study", str(write_study(tmp_path, CE=[])), "--out", str(tmp_path / "out")]
        words += ["--runs", str(tmp_path / "runs")]
        done = CliRunner().invoke(app, [*words, "--scheduler", "nothing://here"])
        assert done.exit_code == 1
        assert "--scheduler nothing://here: expected a scheduler that answers" in " ".join(
            done.output.split()
        )
        assert not (tmp_path / "out").exists()


# A run that notes the process of its worker, and waits before its second epoch until it may go on.
WAITING = """
import os, time
from kd_lrp_plugin.studies.executors import run_job
from kd_lrp_plugin.training.trainer import Trainer
train_epoch = Trainer._train_epoch
def wait(self):
    if self.epoch == 1:
        (self.folder.path.parent / f"{os.getppid()}.worker").touch()
        while not (self.folder.path.parent.parent / "go").exists():
            time.sleep(0.05)
    return train_epoch(self)
Trainer._train_epoch = wait
run_job()
"""


@pytest.mark.slow
class TestDask:
    @pytest.fixture
    def workers(self, tmp_path):
        with dask_workers(tmp_path) as found:
            for _ in range(2):
                found.start("--nthreads", "1")
            yield found

    def test_a_worker_that_is_killed_costs_its_run_an_epoch(self, workers, tmp_path, monkeypatch):
        monkeypatch.setattr(executors, "COMMAND", ("-c", WAITING))
        file, root = write_study(tmp_path, CE=[], other=["batch_size=4"]), tmp_path / "runs"
        first, second = (run.folder for run in read_plan(file, root=root).runs)
        killed: list[str] = []

        def kill() -> None:
            """Once both wait, the worker of one; then both may go on."""
            while not all(list(folder.parent.glob("*.worker")) for folder in (first, second)):
                time.sleep(0.05)
            killed.append((first / "metrics.jsonl").read_text())
            (file,) = first.parent.glob("*.worker")
            os.kill(int(file.stem), 9)
            (first.parent.parent / "go").touch()

        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        options = StudyOptions(root=root, out=tmp_path / "out", scheduler=workers.address)
        found = run_study(file, options)
        assert found["final"]
        assert [process.poll() for process in workers.processes].count(-9) == 1
        sessions = {
            folder: json.loads((folder / "environment.json").read_text())["sessions"]
            for folder in (first, second)
        }
        assert [len(sessions[folder]) for folder in (first, second)] == [2, 1]
        metrics = (first / "metrics.jsonl").read_text()
        assert (killed[0].count("\n"), metrics.count("\n")) == (1, 3)
        assert metrics.startswith(killed[0])
        assert not list(root.glob(".kd_lrp*"))
        assert run_study(file, options)["final"]  # and nothing is run again
        assert len(json.loads((second / "environment.json").read_text())["sessions"]) == 1

    def test_a_stop_here_ends_the_runs_there(self, workers, tmp_path, monkeypatch):
        monkeypatch.setattr(executors, "COMMAND", ("-c", WAITING))
        file, root = write_study(tmp_path, CE=[]), tmp_path / "runs"
        (folder,) = (run.folder for run in read_plan(file, root=root).runs)
        options = StudyOptions(root=root, out=tmp_path / "out", scheduler=workers.address)

        class Stops(NullProgress):
            def track(self, items, what, total):
                for item in items:
                    yield item
                    if what == "epochs":
                        raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), Stops():
            run_study(file, options)
        assert not files.is_locked(folder / LOCK)
        assert (folder / "metrics.jsonl").read_text().count("\n") == 1
        assert not list(root.glob(".kd_lrp*"))
        assert all(process.poll() is None for process in workers.processes)
        (folder.parent.parent / "go").touch()
        assert run_study(file, options)["final"]
        sessions = json.loads((folder / "environment.json").read_text())["sessions"]
        assert len(sessions) == 2
