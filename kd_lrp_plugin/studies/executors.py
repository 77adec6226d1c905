"""The runs of a study in processes of their own, which end when this one does."""

import itertools
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kd_lrp_plugin.config.run_spec import LOGS, RunSpec
from kd_lrp_plugin.evaluation.evaluate import evaluate
from kd_lrp_plugin.runs.folder import LOCK, RunFolder
from kd_lrp_plugin.studies.plan import StudyOptions, StudyRun
from kd_lrp_plugin.studies.status import (
    count_epochs_left,
    get_log,
    is_finished,
    is_running,
    is_trained,
)
from kd_lrp_plugin.training.trainer import distill
from kd_lrp_plugin.utils.files import Busy, locked
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.workers import end_with_parent

logger = logging.getLogger(__name__)
BUSY = 75  # exit code of a process whose run another one is running (EX_TEMPFAIL)
COMMAND = (sys.executable, "-c", "from kd_lrp_plugin.studies.executors import run_job; run_job()")
FAILED = "The run has failed: "  # before an error, in the log of its run


class StudyExecutor:
    """Runs in processes, some at a time.

    Args:
        todo: runs; what a run needs is among them or finished.
        options: how many at the same time, and where.
        threads: of each process; a run that resumes keeps those that it began with, for their
            number changes its weights.
        failed: filled with the reason of each failure, by folder.
        after: called after each run.
    """

    def __init__(
        self,
        todo: Sequence[StudyRun],
        options: StudyOptions,
        threads: int,
        failed: dict[Path, str],
        after: Callable[[], object],
    ) -> None:
        self.waiting, self.options, self.threads = list(todo), options, threads
        self.failed, self.after = failed, after
        self.active: dict[Path, tuple[StudyRun, subprocess.Popen[bytes]]] = {}
        self._noted: set[Path] = set()

    def work(self) -> Iterator[None]:
        """Run everything; yields once for each epoch that is finished, by whomever."""
        runs, left = list(self.waiting), sum(map(count_epochs_left, self.waiting))
        try:
            while self.waiting or self.active:
                self._begin()
                time.sleep(0.2)
                self._end()
                now = sum(count_epochs_left(run) for run in runs if run.folder not in self.failed)
                yield from itertools.repeat(None, left - now)
                left = now
        finally:
            self._stop()

    def _begin(self) -> None:
        for run in list(self.waiting):
            failed = [need for need in run.needs if need in self.failed]
            if is_finished(run) or failed:
                self.waiting.remove(run)
                if failed:
                    self.failed[run.folder] = f"not begun, for {failed[0]} has failed"
                    current_progress().note(f"{run.label}: {self.failed[run.folder]}")
                self.after()
            elif len(self.active) < self.options.jobs and all(map(is_trained, run.needs)):
                if not is_running(run.folder):
                    self.waiting.remove(run)
                    self.active[run.folder] = run, self.start(run)
                elif run.folder not in self._noted:
                    self._noted.add(run.folder)
                    current_progress().note(f"{run.label}: another process is running it; waiting")

    def start(self, run: StudyRun) -> subprocess.Popen[bytes]:
        """The process of a run; it ends when its standard input is closed."""
        job = run.spec(self.options)
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        threads = RunFolder(run.folder).threads or self.threads
        with get_log(run).open("wb") as log:
            return subprocess.Popen(
                [*COMMAND, json.dumps(job.to_json())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                start_new_session=True,  # Ctrl-C is for this process alone, which ends that one
            )

    def _end(self) -> None:
        for folder, (run, process) in list(self.active.items()):
            code = process.poll()
            if code is None:
                continue
            del self.active[folder]
            if is_finished(run):
                summary = RunFolder(folder).summary()
                accuracy = f"{summary['test_accuracy']:.4f}"
                outcome = f"test accuracy {accuracy}, {summary['seconds'] / 60:.1f} min"
            elif code == BUSY:
                self.waiting.append(run)
                continue
            else:
                self.failed[folder] = _read_failure(get_log(run), code)
                outcome = f"failed: {self.failed[folder]} (log: {get_log(run)})"
            self.after()
            current_progress().note(f"{run.label}: {outcome}")

    def _stop(self) -> None:
        for _, process in self.active.values():
            if process.stdin:
                process.stdin.close()
        for _, process in self.active.values():
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def count_threads(jobs: int) -> int:
    """Threads for each of so many processes, unless ``OMP_NUM_THREADS`` says how many."""
    if (given := os.environ.get("OMP_NUM_THREADS", "")).isdigit() and int(given) > 0:
        return int(given)
    can_tell = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if can_tell else os.cpu_count() or 1
    return max(1, cores // jobs)


def _read_failure(log: Path, code: int) -> str:
    output = log.read_text(encoding="utf-8", errors="replace")
    if code < 0:
        return f"ended by signal {-code}; 9 may mean too little memory for so many jobs"
    if FAILED in output:
        return output.rpartition(FAILED)[2].strip()
    return f"exit code {code}: {output.strip().splitlines()[-1] if output.strip() else 'no output'}"


def run_job() -> None:
    """One run, in a process of its own; ends when its standard input does."""
    job = RunSpec(**json.loads(sys.argv[1]))
    sets = [word for override in job.overrides for word in ("--set", override)]
    command = ["distill", str(job.config), *sets, "--seed", str(job.seed), "--out", str(job.folder)]
    command += ["--log", job.log] if job.log != LOGS[0] else []
    sys.argv = ["kd-lrp", *command]  # what would do the same, for the run's record
    logging.basicConfig(level=logging.INFO)
    end_with_parent(interrupt=True)  # every file of a run is intact at any time
    try:
        distill(job)
        with locked(job.folder / LOCK):
            if not (job.folder / "evaluation.json").exists():
                evaluate(job.folder, safe=job.safe)
    except Busy:
        sys.exit(BUSY)
    except KeyboardInterrupt:
        os._exit(130)
    except Exception as error:
        logger.exception("the run has failed")
        reason = str(error) if isinstance(error, ValueError | OSError) else repr(error)
        sys.stderr.write(f"{FAILED}{reason}\n")
        sys.exit(1)
