"""The runs of a study in processes of their own, which end when this one does."""

import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager
from pathlib import Path

from kd_lrp_plugin.config.run_spec import LOGS, RunSpec
from kd_lrp_plugin.evaluation.evaluate import evaluate
from kd_lrp_plugin.runs.folder import LOCK, RunFolder
from kd_lrp_plugin.studies.plan import StudyOptions, StudyRun
from kd_lrp_plugin.studies.status import (
    count_epochs_done,
    count_epochs_left,
    get_log,
    is_finished,
    is_running,
    is_trained,
)
from kd_lrp_plugin.training.trainer import distill
from kd_lrp_plugin.utils.files import Busy, locked
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message
from kd_lrp_plugin.utils.workers import (
    BUSY,
    ProcessJob,
    ProcessPool,
    check_jobs,
    end_with_parent,
    local_processes,
)

logger = logging.getLogger(__name__)
COMMAND = ("-c", "from kd_lrp_plugin.studies.executors import run_job; run_job()")
FAILED = "The run has failed: "  # before an error, in the log of its run
LOST = "its worker was lost again and again; it may have too little memory for so many threads"
LOSSES = 3  # how often a run may lose its machine without an epoch in between
PASSED_ON = ("KD_LRP_DATA",)  # variables that say where files lie, on each machine


def open_processes(options: StudyOptions) -> AbstractContextManager[ProcessPool]:
    """Where the processes of a study run: on this machine, or on dask workers.

    Raises:
        ModuleNotFoundError: for a scheduler without the extra ``cluster``.
        ValueError: for jobs beside a scheduler.
    """
    check_jobs(options.jobs, options.scheduler)
    if options.scheduler is None:
        return local_processes(options.jobs or 1)
    from kd_lrp_plugin.utils.cluster import cluster_processes  # dask takes half a second to import

    return cluster_processes(options.scheduler, Path(options.root), options.device)


class StudyExecutor:
    """Runs in processes, some at a time.

    Args:
        todo: runs; what a run needs is among them or finished.
        options: how they are to be run.
        threads: of each process; a run that resumes keeps those that it began with, for their
            number changes its weights.
        failed: filled with the reason of each failure, by folder.
        after: called after each run.
        pool: where the processes run.
    """

    def __init__(
        self,
        todo: Sequence[StudyRun],
        options: StudyOptions,
        threads: int,
        failed: dict[Path, str],
        after: Callable[[], object],
        pool: ProcessPool,
    ) -> None:
        self.waiting, self.options, self.threads = list(todo), options, threads
        self.failed, self.after, self.pool = failed, after, pool
        self.active: dict[Path, tuple[StudyRun, Future[int]]] = {}
        self._noted: set[Path] = set()
        self._ended: dict[Path, float] = {}
        self._losses: dict[Path, list[int]] = {}  # the epochs that were done at each

    def work(self) -> Iterator[None]:
        """Run everything; yields once for each epoch that is finished, by whomever.

        Raises:
            ConnectionError: if the scheduler of the workers is gone.
        """
        runs, left = list(self.waiting), sum(map(count_epochs_left, self.waiting))
        while self.waiting or self.active:
            self._begin()
            time.sleep(0.2)
            self._end()
            now = sum(count_epochs_left(run) for run in runs if run.folder not in self.failed)
            yield from itertools.repeat(None, left - now)
            left = now

    def _begin(self) -> None:
        for run in list(self.waiting):
            failed = [need for need in run.needs if need in self.failed]
            has_slot = self.pool.slots is None or len(self.active) < self.pool.slots
            if is_finished(run) or failed:
                self.waiting.remove(run)
                if failed:
                    self.failed[run.folder] = f"not begun, for {failed[0]} has failed"
                    current_progress().note(f"{run.label}: {self.failed[run.folder]}")
                self.after()
            elif has_slot and all(map(is_trained, run.needs)):
                if not is_running(run.folder):
                    self.waiting.remove(run)
                    self.active[run.folder] = run, self.start(run)
                elif run.folder not in self._noted:
                    self._noted.add(run.folder)
                    current_progress().note(f"{run.label}: another process is running it; waiting")

    def start(self, run: StudyRun) -> "Future[int]":
        """The exit code of the process of a run, when it has ended."""
        content = json.dumps(run.spec(self.options).to_json())
        threads = str(RunFolder(run.folder).threads or self.threads)
        # MKL's own variable would win, and a dask worker sets it.
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        environment |= {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        log, lock = get_log(run).absolute(), run.folder.absolute() / LOCK
        words = (*COMMAND, content)
        return self.pool.submit(ProcessJob(words, Path.cwd(), log, lock, environment))

    def _end(self) -> None:
        for folder, (run, future) in list(self.active.items()):
            if not future.done():
                continue
            code, reason = self._get_outcome(run, future)
            if is_finished(run):
                summary = RunFolder(folder).summary()
                accuracy = f"{summary['test_accuracy']:.4f}"
                outcome = f"test accuracy {accuracy}, {summary['seconds'] / 60:.1f} min"
            elif code == 0 and self._may_be_seen_later(folder):
                continue
            elif code == BUSY or (reason == LOST and self._may_try_again(run)):
                del self.active[folder]
                self.waiting.append(run)
                continue
            else:
                self.failed[folder] = reason
                outcome = f"failed: {reason} (log: {get_log(run)})"
            del self.active[folder]
            self.after()
            current_progress().note(f"{run.label}: {outcome}")

    def _get_outcome(self, run: StudyRun, future: "Future[int]") -> tuple[int | None, str]:
        """The exit code of a process, None for one without; and what is wrong with it."""
        try:
            code = future.result()
        except CancelledError as error:
            fix = "Start it again; the same command then resumes."
            got = "one that is gone"
            where = f"--scheduler {self.options.scheduler}"
            raise ConnectionError(message(where, "a scheduler that answers", got, fix)) from error
        except self.pool.lost:
            return None, LOST
        except Exception as error:  # of a worker that cannot start the process
            return None, str(error) if isinstance(error, ValueError | OSError) else repr(error)
        if self.pool.lost and code < 0:  # as where a machine is shut down
            return code, LOST
        return code, _read_failure(get_log(run), code)

    def _may_be_seen_later(self, folder: Path) -> bool:
        """Whether a network file system may still show what a process has left."""
        ended = self._ended.setdefault(folder, time.monotonic())
        return time.monotonic() < ended + self.pool.patience

    def _may_try_again(self, run: StudyRun) -> bool:
        """Whether a run that has lost its machine goes on with another."""
        losses = self._losses.setdefault(run.folder, [])
        losses.append(count_epochs_done(run))
        again = losses.count(losses[-1]) < LOSSES
        if again:
            current_progress().note(f"{run.label}: its worker is lost; it goes on with another")
        return again


def _read_failure(log: Path, code: int) -> str:
    if code < 0:
        return f"ended by signal {-code}; 9 may mean too little memory for so many jobs"
    output = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
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
            if not RunFolder(job.folder).evaluated:
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
