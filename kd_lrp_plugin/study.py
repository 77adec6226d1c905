"""Studies: the runs of a plan in processes of their own, and what they say together.

Every run is one of the driver's, in a process that ends when this one does, however that ends. A
run at which another process is already, such as another study, is left to it and waited for. What
is finished is never run again; :mod:`kd_lrp_plugin.plan` says when two runs are the same.
"""

import _thread
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from kd_lrp_plugin.checking import check
from kd_lrp_plugin.checks import message
from kd_lrp_plugin.config import Config, resolve_config, unsafe_tags
from kd_lrp_plugin.experiment import build_model_of, construct
from kd_lrp_plugin.hook import looking_only
from kd_lrp_plugin.plan import Plan, Run, read_plan
from kd_lrp_plugin.processes import joined
from kd_lrp_plugin.progress import Silence
from kd_lrp_plugin.provenance import files_of
from kd_lrp_plugin.results import evaluate
from kd_lrp_plugin.runs import LOCK, Busy, RunFolder
from kd_lrp_plugin.tally import at_work, check_out, epochs_left, finished, log_of, write
from kd_lrp_plugin.training import distill

logger = logging.getLogger(__name__)

BUSY = 75  # exit code of a process that found another one at work (EX_TEMPFAIL)
COMMAND = (sys.executable, "-c", "from kd_lrp_plugin.study import work; work()")
FAILED = "The run has failed: "  # before the words of an error, in its log


def run(
    file: str | Path,
    overrides: Sequence[str] = (),
    seeds: int | Sequence[int] | None = None,
    out: str | Path | None = None,
    root: str | Path = "runs",
    jobs: int = 1,
    device: str | None = None,
    show: Silence | None = None,
    safe: bool = False,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Train and evaluate every run of a study that is not finished, and compare.

    Args:
        file: see :mod:`kd_lrp_plugin.plan`.
        overrides: further ones for every run.
        seeds: how many, or which; those of the file if None.
        out: folder for the results, :func:`default_out` if None; they are written anew after every
            run.
        root: folder of the runs, which other studies may share.
        jobs: runs at the same time.
        device: see :func:`kd_lrp_plugin.processes.joined`.
        show: told how the work goes.
        safe: refuse tags beyond :data:`kd_lrp_plugin.config.HARMLESS`.
        only: a part of it, see :func:`kd_lrp_plugin.plan.read_plan`.

    Returns:
        The content of ``study.json``; see :func:`kd_lrp_plugin.tally.results`.

    Raises:
        FileExistsError: if ``out`` holds the results of another study, or of seeds beyond these,
            or a run was made with other images or weights than lie there now.
        FileNotFoundError: if there is no such file, or none that a config names.
        ValueError: for a study or a config that cannot be run.
    """
    show = show or Silence()
    plan = read_plan(file, overrides, seeds, root, only)
    folder = Path(out) if out is not None else default_out(file)
    check_out(folder, plan)
    _refuse_other_files(plan)
    _refuse_problems(plan, device, show, safe)
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[Path, str] = {}

    def keep() -> None:
        try:
            check_out(folder, plan)
            write(plan, folder, failed)
        except FileExistsError as error:  # another process has begun to write there since
            show.note(f"results are not written: {error}")

    keep()
    rounds = {seed: place for place, seed in enumerate(plan.seeds)}
    # Seed by seed, so that a study which is still at work compares like with like.
    in_turn = sorted(plan.trainings(), key=lambda run: rounds.get(run.seed, 0))
    todo = [run for run in in_turn if not finished(run)]
    if not todo:
        show.note(f"all {len(plan.trainings())} runs are finished already")
    work = _Work(todo, jobs, device, safe, show, failed, keep)
    for _ in show.track(work.off(), "epochs", sum(map(epochs_left, todo))):
        pass
    check_out(folder, plan)
    return write(plan, folder, failed)


def default_out(file: str | Path) -> Path:
    """``runs/studies/<study>``."""
    return Path("runs", "studies", Path(file).stem)


# --- before ---------------------------------------------------------------------------------------


def _refuse_other_files(plan: Plan) -> None:
    """Raise FileExistsError where a run that has begun saw other images or weights."""
    for run in plan.trainings():
        if not run.folder.exists():
            continue
        files = files_of(resolve_config(run.config, run.overrides).text)
        if changed := RunFolder(run.folder).changed({"files": files}):
            fix = "Put them back, choose another --runs, or delete the run."
            where, got = f"{run.label} ({run.folder})", "; ".join(changed)
            raise FileExistsError(message(where, "the files that the run began with", got, fix))


def _refuse_problems(plan: Plan, device: str | None, show: Silence, safe: bool) -> None:
    """Check every config that has not begun; for a model still to prepare an untrained one stands.

    So a teacher that does not fit is found before it is trained; no student is chosen by it.
    """
    prepare = {run.folder for run in plan.prepared if not RunFolder(run.folder).finished}
    new = [run for run in plan.prepared if run.folder in prepare]
    seen = {run.folder.parent for run in new}  # one seed of each is enough
    seen |= {run.folder.parent for run in plan.trainings() if (run.folder / "last.pt").exists()}
    for run in plan.trainings():
        if run.folder.parent not in seen:
            seen.add(run.folder.parent)
            new.append(run)
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as place, joined(device) as here, _quiet(), looking_only():
        untrained = {folder: Path(place, folder.parent.name, folder.name) for folder in prepare}
        for run in show.track(new, "checking", len(new)):
            changes, missing = run.overrides, [need for need in run.needs if need in prepare]
            for need in missing:
                changes = tuple(c.replace(str(need), str(untrained[need])) for c in changes)
            config = resolve_config(run.config, changes)
            found = unsafe_tags(config) if safe else []
            if not found and all(untrained[need].exists() for need in missing):
                found = check(config, here).problems
                if run.folder in prepare and not found:
                    _save_untrained(config, untrained[run.folder])
            problems += [f"{plan.file}: {run.cell}: {problem}" for problem in found]
    if problems:
        raise ValueError("\n".join(problems))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that every run will have in its log."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _save_untrained(config: Config, folder: Path) -> None:
    models = construct(config.only("dependencies", "datasets", "models"))["models"]
    model = build_model_of(models.get("student_model") or models["model"])
    folder.mkdir(parents=True)
    torch.save({"model": model.state_dict()}, folder / "best.pt")


# --- the work -------------------------------------------------------------------------------------


class _Work:
    """Runs in processes, some at a time.

    Args:
        todo: runs; what a run needs is among them or finished.
        jobs: processes at the same time.
        device: theirs.
        safe: see :func:`run`.
        show: told what ends.
        failed: filled with the words of what fails, by folder.
        after: called after each run.
    """

    def __init__(
        self,
        todo: Sequence[Run],
        jobs: int,
        device: str | None,
        safe: bool,
        show: Silence,
        failed: dict[Path, str],
        after: Callable[[], object],
    ) -> None:
        self.waiting, self.jobs, self.device, self.safe = list(todo), jobs, device, safe
        self.show, self.failed, self.after = show, failed, after
        self.active: dict[Path, tuple[Run, subprocess.Popen[bytes]]] = {}
        self._told: set[Path] = set()

    def off(self) -> Iterator[None]:
        """Work off everything; yields once for each epoch that is finished, by whomever."""
        runs, left = list(self.waiting), sum(map(epochs_left, self.waiting))
        try:
            while self.waiting or self.active:
                self._begin()
                time.sleep(0.2)
                self._end()
                now = sum(epochs_left(run) for run in runs if run.folder not in self.failed)
                yield from itertools.repeat(None, left - now)
                left = now
        finally:
            self._stop()

    def _begin(self) -> None:
        for run in list(self.waiting):
            lost = [need for need in run.needs if need in self.failed]
            if finished(run) or lost:
                self.waiting.remove(run)
                if lost:
                    self.failed[run.folder] = f"not begun, for {lost[0]} has failed"
                    self.show.note(f"{run.label}: {self.failed[run.folder]}")
                self.after()
            elif len(self.active) < self.jobs and all(RunFolder(n).finished for n in run.needs):
                if not at_work(run.folder):
                    self.waiting.remove(run)
                    self.active[run.folder] = run, self._started(run)
                elif run.folder not in self._told:
                    self._told.add(run.folder)
                    self.show.note(f"{run.label}: another process is at work on it; waiting")

    def _started(self, run: Run) -> subprocess.Popen[bytes]:
        job = {
            "path": str(run.config),
            "overrides": run.overrides,
            "out": str(run.folder),
            "seed": run.seed,
            "device": self.device,
            "safe": self.safe,
        }
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        with log_of(run).open("wb") as log:
            return subprocess.Popen(
                [*COMMAND, json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={"OMP_NUM_THREADS": str(max(1, _cores() // self.jobs)), **os.environ},
                start_new_session=True,  # Ctrl-C is for this process alone, which ends that one
            )

    def _end(self) -> None:
        for folder, (run, process) in list(self.active.items()):
            code = process.poll()
            if code is None:
                continue
            del self.active[folder]
            if finished(run):
                summary = RunFolder(folder).summary()
                accuracy = f"{summary['test_accuracy']:.4f}"
                words = f"test accuracy {accuracy}, {summary['seconds'] / 60:.1f} min"
            elif code == BUSY:
                self.waiting.append(run)
                continue
            else:
                self.failed[folder] = _words_of(log_of(run), code)
                words = f"failed: {self.failed[folder]} (log: {log_of(run)})"
            self.after()
            self.show.note(f"{run.label}: {words}")

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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _words_of(log: Path, code: int) -> str:
    said = log.read_text(encoding="utf-8", errors="replace")
    if code < 0:
        return f"ended by signal {-code}; 9 may mean too little memory for so many jobs"
    if FAILED in said:
        return said.rpartition(FAILED)[2].strip()
    return f"exit code {code}: {said.strip().splitlines()[-1] if said.strip() else 'no words'}"


def work() -> None:
    """One run, in a process of its own; ends when its standard input does."""
    job = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup and & switch it off
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        distill(**job)
        with FileLock(Path(job["out"], LOCK), blocking=False):
            if not Path(job["out"], "evaluation.json").exists():
                evaluate(job["out"], safe=job["safe"])
    except (Busy, Timeout):
        sys.exit(BUSY)
    except KeyboardInterrupt:
        os._exit(130)
    except Exception as error:
        logger.exception("the run has failed")
        words = str(error) if isinstance(error, ValueError | OSError) else repr(error)
        sys.stderr.write(f"{FAILED}{words}\n")
        sys.exit(1)


def _end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock a forked loader would inherit
        pass
    for _ in range(4):  # one alone is lost where it meets a destructor, which swallows it
        _thread.interrupt_main()
        time.sleep(5)
    os._exit(130)  # every file of a run is whole at any time
