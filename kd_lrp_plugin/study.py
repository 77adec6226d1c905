"""Studies: the runs of a plan in processes of their own, and what they say together.

Every run is one of the driver's, in a process that ends when this one does, however that ends. A
run at which another process is already, such as another study, is left to it and waited for. What
is finished is never run again; :mod:`kd_lrp_plugin.plan` says when two runs are the same.
"""

import _thread
import csv
import io
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from kd_lrp_plugin.checking import check
from kd_lrp_plugin.checks import message
from kd_lrp_plugin.comparison import compare, page, study_figure, summarise, value_at
from kd_lrp_plugin.config import Config, resolve_config, unsafe_tags
from kd_lrp_plugin.experiment import build_model_of, construct
from kd_lrp_plugin.plan import (
    Plan,
    Run,
    at_work,
    epochs_left,
    finished,
    log_of,
    read_plan,
    state_of,
)
from kd_lrp_plugin.processes import joined
from kd_lrp_plugin.progress import Silence
from kd_lrp_plugin.results import evaluate
from kd_lrp_plugin.runs import LOCK, RunFolder
from kd_lrp_plugin.training import distill

logger = logging.getLogger(__name__)

BUSY = 75  # exit code of a process that found another one at work (EX_TEMPFAIL)
COMMAND = (sys.executable, "-c", "from kd_lrp_plugin.study import work; work()")
FAILED = "Error: "  # before the words of an error, in the log of a run


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
        The content of ``study.json``; see :func:`results`.

    Raises:
        FileExistsError: if ``out`` holds the results of another study, or of seeds beyond these.
        FileNotFoundError: if there is no such file, or none that a config names.
        ValueError: for a study or a config that cannot be run.
    """
    show = show or Silence()
    plan = read_plan(file, overrides, seeds, root, only)
    folder = Path(out) if out is not None else default_out(file)
    check_out(folder, plan)
    _refuse_problems(plan, device, show, safe)
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[Path, str] = {}
    rounds = {seed: place for place, seed in enumerate(plan.seeds)}
    # Seed by seed, so that a study which is still at work compares like with like.
    in_turn = sorted(plan.trainings(), key=lambda run: rounds.get(run.seed, 0))
    todo = [run for run in in_turn if not finished(run)]
    if not todo:
        show.note(f"all {len(plan.trainings())} runs are finished already")
    work = _Work(todo, jobs, device, safe, show, failed, lambda: write(plan, folder, failed))
    for _ in show.track(work.off(), "epochs", sum(map(epochs_left, todo))):
        pass
    return write(plan, folder, failed)


def default_out(file: str | Path) -> Path:
    """``runs/studies/<study>``."""
    return Path("runs", "studies", Path(file).stem)


# --- before ---------------------------------------------------------------------------------------


def _refuse_problems(plan: Plan, device: str | None, show: Silence, safe: bool) -> None:
    """Check every config that has not begun; for a model still to prepare an untrained one stands.

    So a teacher that does not fit is found before it is trained.
    """
    begun = {run.folder.parent for run in plan.trainings() if (run.folder / "last.pt").exists()}
    prepare = {run.folder for run in plan.prepared if not RunFolder(run.folder).finished}
    new = {
        run.folder.parent: run
        for run in plan.trainings()
        if run.folder in prepare or run.folder.parent not in begun
    }
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as place, joined(device) as here, _quiet():
        untrained = {folder: Path(place, folder.parent.name, folder.name) for folder in prepare}
        for run in show.track(new.values(), "checking", len(new)):
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


def check_out(folder: Path, plan: Plan) -> None:
    """Raise FileExistsError where results would overwrite those of another study, or of more seeds.

    Those of fewer seeds, or of an older version of the file, can be made again from the runs.
    """
    file = folder / "study.json"
    if not file.exists():
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    differs = []
    if Path(before["file"]).name != plan.file.name:
        differs.append(f"the study {Path(before['file']).name}")
    if before["overrides"] != list(plan.overrides):
        differs.append(f"--set {before['overrides']}")
    if plan.only and before["only"] != list(plan.only):
        differs.append(f"--only {before['only']}" if before["only"] else "the whole study")
    if more := sorted(set(before["seeds"]) - set(plan.seeds)):
        differs.append(f"further seeds {more}")
    if differs:
        fix = "Choose another --out, or give the same as then."
        got = f"{folder}, which holds {' and '.join(differs)}"
        raise FileExistsError(message("study", "a folder for these results", got, fix))


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
            self.show.note(f"{run.label}: {words}")
            self.after()

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
    if FAILED in said:
        return said.rpartition(FAILED)[2].strip()
    if code < 0:
        return f"ended by signal {-code}; 9 may mean too little memory for so many jobs"
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
    except (BlockingIOError, Timeout):
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


# --- after ----------------------------------------------------------------------------------------


def results(plan: Plan, failed: Mapping[Path, str] | None = None) -> dict[str, Any]:
    """What the finished runs of a plan say.

    Returns:
        ``file``, ``question``, ``overrides``, ``only``, ``seeds``, ``axes``, ``compare_to`` and
        ``measures`` of the plan; ``runs``, a row for each, with its state and measures, and
        ``prepared``, the same; ``table`` of :func:`comparison.summarise` and ``comparisons`` of
        :func:`comparison.compare`; ``final``, whether all is finished, and ``state``, the same in
        words; ``failed``, words by label.
    """
    failed = failed or {}
    rows, prepared = (
        [_row(run, plan.measures) for run in runs] for runs in (plan.runs, plan.prepared)
    )
    done = sum(row["state"] == "finished" for row in rows)
    final = done == len(rows)
    state = f"All {len(rows)} runs are finished."
    if not final:
        state = f"Not final: {done} of {len(rows)} runs are finished."
    return {
        "file": plan.file.as_posix(),
        "question": plan.question,
        "final": final,
        "state": state,
        "failed": {r.label: failed[r.folder] for r in plan.trainings() if r.folder in failed},
        "overrides": list(plan.overrides),
        "only": list(plan.only),
        "seeds": list(plan.seeds),
        "axes": {axis: list(values) for axis, values in plan.axes.items()},
        "compare_to": plan.compare_to,
        "measures": list(plan.measures),
        "prepared": prepared,
        "runs": rows,
        "table": summarise(rows, plan.measures),
        "comparisons": compare(rows, plan.measures, plan.compare_to),
    }


def _row(run: Run, measures: Sequence[str]) -> dict[str, Any]:
    sources: list[Any] = []
    if finished(run):
        names = ("summary.json", "evaluation.json", "explanations.json")
        files = [run.folder / name for name in names]
        found = [json.loads(f.read_text(encoding="utf-8")) if f.exists() else {} for f in files]
        lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        last = {"last": json.loads(lines[-1])}
        sources = [found[0], found[1]["student"], found[1], _means(found[2]), last]
    values = {}
    for measure in measures:
        numbers = (value_at(source, measure) for source in sources)
        values[measure] = next((number for number in numbers if number is not None), None)
    return {
        "configuration": run.name,
        "point": dict(run.point),
        "seed": run.seed,
        "state": state_of(run),
        "folder": str(run.folder),
        "measures": values,
    }


def _means(explanations: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of maps by model, method, layer and name; those of more samples count."""
    found: dict[str, Any] = {}
    for row in sorted(explanations.get("rows", []), key=lambda row: row["samples"] or float("inf")):
        layers = found.setdefault(row["model"], {}).setdefault(row["method"], {})
        figures = layers.setdefault(str(row["layer"]), {})
        figures |= {name: of["mean"] for name, of in row["figures"].items()}
    return found


def write(plan: Plan, folder: Path, failed: Mapping[Path, str] | None = None) -> dict[str, Any]:
    """Write study.json, study.csv, table.md and study.png, and return the content of the first."""
    content = results(plan, failed)
    text = io.StringIO()
    axes = list(plan.axes)
    columns = ["configuration", *axes, "seed", "state", "folder", *plan.measures]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in content["runs"]:
        flat = {**row, **row["point"], **row["measures"]}
        writer.writerow([flat.get(column) for column in columns])
    picture = io.BytesIO()
    study_figure(content).savefig(picture, format="png")
    _put(folder / "study.csv", text.getvalue().encode())
    _put(folder / "table.md", page(content).encode())
    _put(folder / "study.png", picture.getvalue())
    _put(folder / "study.json", json.dumps(content, indent=2).encode())
    return content


def _put(file: Path, content: bytes) -> None:
    """All of a file or nothing; several studies may write the same."""
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".draft", delete=False) as draft:
        draft.write(content)
    Path(draft.name).chmod(0o644)
    Path(draft.name).replace(file)
