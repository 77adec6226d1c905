"""Search a space too large to rank: Optuna's NSGA-II on score, MACs and parameters."""

import fcntl
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from kd_lrp_plugin.models.mobilenetv2 import MobileNetV2
from kd_lrp_plugin.selection.cache import ScoreCache
from kd_lrp_plugin.selection.candidates import Batch, Candidate, Teacher
from kd_lrp_plugin.selection.ranking import filter_by_budget, measure_costs
from kd_lrp_plugin.selection.scoring import Scorer
from kd_lrp_plugin.selection.spaces import Space
from kd_lrp_plugin.utils.extras import imports_of_an_extra
from kd_lrp_plugin.utils.files import hash_contents
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.workers import workers

with imports_of_an_extra():
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
    from optuna.trial import FrozenTrial, TrialState

try:
    import fcntl
except ImportError:  # Windows: two processes may score the same student
    fcntl = None  # type: ignore[assignment]
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


def search(
    space: Space,
    candidate_of: Callable[[MobileNetV2], Candidate],
    teacher: Teacher,
    batches: list[Batch],
    score: str,
    trials: int,
    folder: Path,
    budget: Mapping[str, float] | None = None,
    seeds: tuple[int, ...] = (0,),
    jobs: int = 1,
) -> SearchResult:
    """Look at ``trials`` students of a space, more of those that no other one beats.

    The study is a journal in ``folder``: given again, the search goes on, and several processes
    that are given the same folder share it. No architecture is scored twice: scores are kept in
    ``scores.jsonl``, costs in the study. A student over budget costs no score. Another teacher,
    other images or another question make a study of their own.

    Args:
        space: see :class:`kd_lrp_plugin.selection.spaces.Space`.
        candidate_of: makes the candidate of a student, named by its text; can be pickled.
        teacher: see :func:`kd_lrp_plugin.selection.scoring.score_candidates`, as batches, score and
            seeds.
        batches: of images and class indices.
        score: of :data:`kd_lrp_plugin.selection.scores.registry.SCORES`.
        trials: of the study in all, those of an earlier call included.
        folder: for ``study.journal`` and ``scores.jsonl``.
        budget: of :func:`kd_lrp_plugin.selection.ranking.parse_budget`.
        seeds: of the initialisations.
        jobs: processes to share the work.

    Returns:
        What it has seen, earlier calls included.

    Raises:
        ValueError: if no student within budget was seen; names the nearest.

    Reference:
        Deb et al., 2002 (NSGA-II), by Optuna (Akiba et al., KDD 2019). The thesis and DisWOT name
        an evolutionary search over one score.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(logging.WARNING)
    question = (score, trials, folder.resolve(), budget or {}, seeds)
    here = SearchWorker(space, candidate_of, teacher, batches, *question)
    missing = max(0, trials - len(here.finished()))
    for _ in current_progress().track(_looks(here, missing, jobs), "searching", missing):
        pass
    seen = {trial.user_attrs["candidate"]: trial for trial in here.finished()}
    costs = {name: dict(t.user_attrs["costs"]) for name, t in seen.items() if t.user_attrs["costs"]}
    problems = {name: t.user_attrs["problem"] for name, t in seen.items() if name not in costs}
    try:
        kept = filter_by_budget(here.budget, costs) if costs else []
    except ValueError as error:
        raise ValueError(
            f"{error} That is of {len(seen)} seen; more trials may find one."
        ) from None
    students = {name: here.student(seen[name].params) for name in (*kept, *problems)}
    rows = [here.row(candidate_of(students[name]), seed) for name in kept for seed in seeds]
    return SearchResult(students, rows, {name: costs[name] for name in kept}, problems)


def _looks(part: "SearchWorker", missing: int, jobs: int) -> Iterator[None]:
    fresh = replace(part)  # a forked process must open a study of its own
    if jobs == 1 or missing < 2:
        for _ in range(missing):
            fresh()
            yield
        return
    with workers(jobs, _begin, fresh) as pool:
        yield from pool.map(_look, range(missing))


_PART: "list[SearchWorker]" = []  # of a worker process


def _begin(part: "SearchWorker") -> None:
    optuna.logging.set_verbosity(logging.WARNING)
    _PART.append(part)


def _look(_: int) -> None:
    _PART[0]()


@dataclass(frozen=True)
class SearchWorker:
    """One process's part in a search; its study is opened when it is first used."""

    space: Space
    candidate_of: Callable[[MobileNetV2], Candidate]
    teacher: Teacher
    batches: list[Batch]
    score: str
    trials: int
    folder: Path
    budget: Mapping[str, float]
    seeds: tuple[int, ...]

    def __call__(self) -> None:
        """One more trial, unless other processes have added the last one."""
        if len(self.finished()) < self.trials:
            self.study.optimize(self._look, n_trials=1)

    @cached_property
    def axes(self) -> dict[str, Any]:
        return self.space.axes()

    @cached_property
    def kept(self) -> ScoreCache:
        return ScoreCache(self.folder / "scores.jsonl", self.teacher, self.batches, [self.score])

    @cached_property
    def scorers(self) -> dict[int, Scorer]:
        """One for each seed, since each observes the teacher for one seed only."""
        return {seed: Scorer(self.teacher, self.batches, [self.score]) for seed in self.seeds}

    @cached_property
    def study(self) -> optuna.Study:
        one = self.candidate_of(next(iter(self.space)))  # tells of what kind all are
        kind, asked = (one.about, one.layers), (self.score, self.axes, sorted(self.budget.items()))
        question = repr((*asked, self.seeds, self.kept.setting, kind))
        return optuna.create_study(
            study_name=hash_contents(question.encode()),
            directions=["minimize"] * 3,
            sampler=optuna.samplers.NSGAIISampler(
                population_size=min(50, max(4, self.trials // 5))
            ),
            storage=JournalStorage(_mended(self.folder / "study.journal")),
            load_if_exists=True,
        )

    def finished(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])

    def student(self, places: Mapping[str, int]) -> MobileNetV2:
        return self.space.student({name: self.axes[name][place] for name, place in places.items()})

    def row(self, candidate: Candidate, seed: int) -> dict[str, Any]:
        """Kept, or scored now."""
        with _alone(self.folder / "scoring.lock", candidate.name):
            self.kept.refresh()
            row = self.kept.row(candidate, seed)
            if row is None:
                row = self.scorers[seed](candidate, seed)
                self.kept.add(candidate, row)
        return row

    def _look(self, trial: optuna.Trial) -> tuple[float, float, float]:
        places = {
            name: trial.suggest_categorical(name, range(len(values)))
            for name, values in self.axes.items()
        }
        candidate = self.candidate_of(self.student(places))
        costs, problem = self._costs(candidate)
        for key, value in {"candidate": candidate.name, "costs": costs, "problem": problem}.items():
            trial.set_user_attr(key, value)
        over = max((costs.get(k, UNKNOWN) / most - 1 for k, most in self.budget.items()), default=0)
        values: list[float | None] = [None]
        if costs and over <= 0:
            rows = [self.row(candidate, seed) for seed in self.seeds]
            values = [value for row in rows for value in row["scores"][self.score]]
        known = [value for value in values if value is not None]
        score = sum(known) / len(known) if len(known) == len(values) else UNKNOWN
        trial.set_constraint("student", over if over > 0 else float(score == UNKNOWN))
        return score, costs.get("macs", UNKNOWN), costs.get("parameters", UNKNOWN)

    def _costs(self, candidate: Candidate) -> tuple[dict[str, float], str | None]:
        for trial in self.finished():
            if trial.user_attrs["candidate"] == candidate.name:
                return trial.user_attrs["costs"], trial.user_attrs["problem"]
        images, _ = self.batches[0]
        size, channels = images.shape[-1], images.shape[1]
        costs, problems = measure_costs([candidate], size, channels, "latency" in self.budget)
        return costs.get(candidate.name, {}), problems.get(candidate.name)


@contextmanager
def _alone(file: Path, name: str) -> Iterator[None]:
    """Other processes wait here that have the same name; a killed one lets them go on."""
    with file.open("a") as lock:
        if fcntl:
            place = int(hash_contents(name.encode())[:15], 16)
            with suppress(OSError):  # of a file system without locks
                fcntl.lockf(lock, fcntl.LOCK_EX, 1, place)
        yield


def _mended(journal: Path) -> JournalFileBackend:
    """A journal without half a line at its end, which a power cut or a full disk has left."""
    lock = JournalFileSymlinkLock(str(journal))
    backend = JournalFileBackend(str(journal), lock)
    lock.acquire()
    try:
        with journal.open("rb+") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
    finally:
        lock.release()
    return backend
