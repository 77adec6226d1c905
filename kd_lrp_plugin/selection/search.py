"""Search a space too large to rank: Optuna's NSGA-II on score, MACs and parameters."""

import errno
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from kd_lrp_plugin.models.mobilenetv2 import MobileNetV2
from kd_lrp_plugin.selection.cache import ScoreCache
from kd_lrp_plugin.selection.candidates import Candidate, ScoringSetup, describe_entry
from kd_lrp_plugin.selection.ranking import Budget, excess, filter_by_budget, measure_costs
from kd_lrp_plugin.selection.scoring import Scorer
from kd_lrp_plugin.selection.spaces import Space
from kd_lrp_plugin.utils.extras import imports_of_an_extra
from kd_lrp_plugin.utils.files import damaged, hash_contents
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message
from kd_lrp_plugin.utils.workers import Workforce

with imports_of_an_extra():
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
    from optuna.trial import FrozenTrial, TrialState

try:
    import fcntl
except ImportError:  # Windows: two processes may score the same student
    fcntl = None  # type: ignore[assignment]
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
UNKNOWN = 1e15  # stands for what a student over budget, or one that fails, would have


class SearchResult(NamedTuple):
    """What a search has seen.

    Attributes:
        students: within budget, or with a problem, by name.
        rows: of those within budget, as of
            :func:`kd_lrp_plugin.selection.scoring.score_candidates`.
        costs: of those within budget, as of :func:`kd_lrp_plugin.selection.ranking.measure_costs`.
        problems: why the others cannot be built or run, by name.
    """

    students: dict[str, MobileNetV2]
    rows: list[dict[str, Any]]
    costs: dict[str, dict[str, float]]
    problems: dict[str, str]


@dataclass(frozen=True)
class SearchTask:
    """What is searched, and for what.

    Attributes:
        space: see :class:`kd_lrp_plugin.selection.spaces.Space`.
        make_candidate: makes the candidate of a student, named by its text; can be pickled.
        setup: teacher, images, seeds and the one score.
        trials: of the study in all, those of an earlier call included.
        budget: of :func:`kd_lrp_plugin.selection.ranking.parse_budget`.
    """

    space: Space
    make_candidate: Callable[[MobileNetV2], Candidate]
    setup: ScoringSetup
    trials: int
    budget: Budget = field(default_factory=dict)


def search(
    task: SearchTask, folder: Path, jobs: int | None = None, scheduler: str | None = None
) -> SearchResult:
    """Look at some students of a space, more of those that no other one beats.

    The study is a journal in ``folder``: the same call resumes it, and several processes that are
    given the same folder share it. No architecture is scored twice: scores are kept in
    ``scores.jsonl``, costs in the study. A student over budget costs no score. Another teacher,
    other images or another task make a study of their own. One process draws the same students
    each time; how several of them take turns is up to the system.

    Args:
        task: space, students, score, number of trials and budget.
        folder: for ``study.journal`` and ``scores.jsonl``.
        jobs: processes to share the work; one if None.
        scheduler: of dask workers that share it instead; see
            :func:`kd_lrp_plugin.utils.cluster.cluster_workers`.

    Returns:
        What it has seen, earlier calls included.

    Raises:
        ConnectionError: if no scheduler answers.
        ValueError: if no student within budget was seen (names the nearest), if the journal is
            damaged, or for jobs or a budget of latency beside a scheduler.

    Reference:
        Deb et al., 2002 (NSGA-II), by Optuna (Akiba et al., KDD 2019). The thesis and DisWOT name
        an evolutionary search over one score.
    """
    workforce = Workforce(jobs, scheduler)
    if scheduler is not None and "latency" in task.budget:
        fix = "Leave the scheduler out, or give a budget of macs."
        expected = "a budget that is the same on each machine, beside --scheduler"
        raise ValueError(message("budget", expected, "latency", fix))
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(logging.WARNING)
    worker = SearchWorker(task, folder.resolve())
    missing = max(0, task.trials - len(worker.finished()))
    trials = _run_trials(worker, missing, workforce)
    for _ in current_progress().track(trials, "searching", missing):
        pass
    seen = {trial.user_attrs["candidate"]: trial for trial in worker.finished()}
    costs = {name: dict(t.user_attrs["costs"]) for name, t in seen.items() if t.user_attrs["costs"]}
    problems = {name: t.user_attrs["problem"] for name, t in seen.items() if name not in costs}
    try:
        kept = filter_by_budget(task.budget, costs) if costs else []
    except ValueError as error:
        raise ValueError(
            f"{error} That is of {len(seen)} seen; more trials may find one."
        ) from None
    students = {name: worker.student(seen[name].params) for name in (*kept, *problems)}
    pairs = [(task.make_candidate(students[name]), seed) for name in kept for seed in worker.seeds]
    rows = [worker.row(*pair) for pair in pairs]
    return SearchResult(students, rows, {name: costs[name] for name in kept}, problems)


def _run_trials(worker: "SearchWorker", missing: int, workforce: Workforce) -> Iterator[None]:
    fresh = replace(worker)  # a forked process must open a study of its own
    if workforce.is_alone or missing < 2:
        for _ in range(missing):
            fresh()
            yield
        return
    with workforce.open(worker.folder, _begin_search, fresh) as pool:
        yield from pool.map(_run_trial, range(missing))


_WORKER: "list[SearchWorker]" = []  # of a worker process


def _begin_search(worker: "SearchWorker") -> None:
    optuna.logging.set_verbosity(logging.WARNING)
    here = hash_contents(socket.gethostname(), os.getpid())  # else all would draw the same students
    _WORKER[:] = [replace(worker, draw=int(here[:7], 16))]


def _run_trial(_: int) -> None:
    _WORKER[0]()


@dataclass(frozen=True)
class SearchWorker:
    """One process's part in a search; its study is opened when it is first used.

    Attributes:
        task: what is searched.
        folder: of the study.
        draw: what this process's draws depend on, beside the trials that it finds.
    """

    task: SearchTask
    folder: Path
    draw: int = 0

    def __call__(self) -> None:
        """One more trial, unless other processes have added the last one."""
        if len(self.finished()) < self.task.trials:
            self.study.optimize(self._evaluate, n_trials=1)

    @cached_property
    def axes(self) -> dict[str, Any]:
        return self.task.space.axes()

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.task.setup.seeds)

    @cached_property
    def score(self) -> str:
        (score,) = self.task.setup.scores
        return score

    @cached_property
    def cache(self) -> ScoreCache:
        return ScoreCache(self.folder / "scores.jsonl", self.task.setup)

    @cached_property
    def scorers(self) -> dict[int, Scorer]:
        """One for each seed, since each observes the teacher for one seed only."""
        return {seed: Scorer(self.task.setup) for seed in self.seeds}

    @cached_property
    def study(self) -> optuna.Study:
        one = self.task.make_candidate(next(iter(self.task.space)))  # tells of what kind all are
        kind = describe_entry(one.entry), one.layers
        asked = self.score, self.axes, sorted(self.task.budget.items()), self.seeds
        identity = repr((*asked, self.cache.setting, kind))
        storage = open_journal(self.folder / "study.journal")
        name = hash_contents(identity.encode())
        study = optuna.create_study(
            study_name=name, directions=["minimize"] * 3, storage=storage, load_if_exists=True
        )
        # What a resumed search drew before, it would draw again from the same seed.
        begun = len(study.get_trials(deepcopy=False))
        study.sampler = optuna.samplers.NSGAIISampler(
            population_size=min(50, max(4, self.task.trials // 5)), seed=self.draw + begun
        )
        return study

    def finished(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])

    def student(self, chosen: Mapping[str, int]) -> MobileNetV2:
        """The student of one index per axis."""
        values = {name: self.axes[name][index] for name, index in chosen.items()}
        return self.task.space.student(values)

    def row(self, candidate: Candidate, seed: int) -> dict[str, Any]:
        """Cached, or scored now."""
        with _alone(self.folder / "scoring.lock", candidate.name):
            self.cache.refresh()
            row = self.cache.row(candidate, seed)
            if row is None:
                row = self.scorers[seed](candidate, seed)
                with _alone(self.folder / "adding.lock", "scores"):  # over a network, appends clash
                    self.cache.add(candidate, row)
        return row

    def _evaluate(self, trial: optuna.Trial) -> tuple[float, float, float]:
        chosen = {
            name: trial.suggest_categorical(name, range(len(values)))
            for name, values in self.axes.items()
        }
        candidate = self.task.make_candidate(self.student(chosen))
        costs, problem = self._measure(candidate)
        for key, value in {"candidate": candidate.name, "costs": costs, "problem": problem}.items():
            trial.set_user_attr(key, value)
        budget = self.task.budget
        over = excess(budget, {**dict.fromkeys(budget, UNKNOWN), **costs})
        values: list[float | None] = [None]
        if costs and over <= 0:
            rows = [self.row(candidate, seed) for seed in self.seeds]
            values = [value for row in rows for value in row["scores"][self.score]]
        known = [value for value in values if value is not None]
        score = sum(known) / len(known) if len(known) == len(values) else UNKNOWN
        trial.set_constraint("student", over if over > 0 else float(score == UNKNOWN))
        return score, costs.get("macs", UNKNOWN), costs.get("parameters", UNKNOWN)

    def _measure(self, candidate: Candidate) -> tuple[dict[str, Any], str | None]:
        for trial in self.finished():
            if trial.user_attrs["candidate"] == candidate.name:
                return trial.user_attrs["costs"], trial.user_attrs["problem"]
        size, channels = self.task.setup.image_size, self.task.setup.channels
        latency = "latency" in self.task.budget
        costs, problems = measure_costs([candidate], size, channels, latency)
        return costs.get(candidate.name, {}), problems.get(candidate.name)


@contextmanager
def _alone(file: Path, name: str) -> Iterator[None]:
    """Other processes wait here that have the same name; a killed one lets them go on."""
    with file.open("a") as lock:
        if fcntl:
            offset = int(hash_contents(name.encode())[:15], 16)
            with suppress(OSError):  # of a file system without locks
                fcntl.lockf(lock, fcntl.LOCK_EX, 1, offset)
        yield


# --- the journal --------------------------------------------------------------------------------


class JournalLock(JournalFileOpenLock):
    """A lock of the operating system, which ends with the process that holds it.

    Optuna's usual one is a link that a killed process leaves behind; to a relative path it leads
    nowhere, and is waited for without end. Where the file system has no locks, the parent class
    takes over: a file, removed when nobody has touched it for half a minute.

    Args:
        journal: the file to lock; beside it lies ``<journal>.held``.
    """

    def __init__(self, journal: Path) -> None:
        super().__init__(f"{journal.resolve()}.held")
        self._file = f"{journal.resolve()}.held"
        self._handle: int | None = None
        self._has_locks = fcntl is not None

    def acquire(self) -> bool:
        """Wait for the lock, and hold it."""
        if not self._has_locks:
            return super().acquire()
        handle = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            os.close(handle)
            if error.errno not in NO_LOCKS:
                raise
            self._has_locks = False
            return super().acquire()
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        return True

    def release(self) -> None:
        """Let others have it."""
        if not self._has_locks:
            super().release()
        elif self._handle is not None:
            os.close(self._handle)
            self._handle = None


def open_journal(file: Path) -> JournalStorage:
    """A journal without half a line at its end, which a power cut or a full disk has left.

    Raises:
        ValueError: if it is damaged elsewhere; names the repair, which scores nothing again.
    """
    lock = JournalLock(file)
    backend = JournalFileBackend(str(file), lock)
    lock.acquire()
    try:
        with file.open("rb+") as journal:
            content = journal.read()
            journal.truncate(content.rfind(b"\n") + 1)
    finally:
        lock.release()
    try:
        return JournalStorage(backend)
    except Exception as error:  # whatever replaying a line of nonsense may raise
        fix = (
            "Delete this file and give the same command again: the search begins again, and takes "
            "all scores from scores.jsonl beside it."
        )
        got = f"one that cannot be read ({type(error).__name__}: {error})"
        raise damaged(file, "an intact journal", got, fix) from error
