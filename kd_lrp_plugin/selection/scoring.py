"""Score untrained students: over batches and seeds, in several processes, kept in a file."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd_lrp_plugin.selection.cache import ScoreCache
from kd_lrp_plugin.selection.candidates import (
    Candidate,
    ScoringSetup,
    build_seeded,
    describe_failure,
)
from kd_lrp_plugin.selection.scores.observation import Observation
from kd_lrp_plugin.selection.scores.registry import SCORES
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import check_known, message
from kd_lrp_plugin.utils.workers import Workforce

TEACHER_SEED = 1_000_003  # added to a seed for the teacher's initialisation


def score_candidates(
    candidates: Sequence[Candidate],
    setup: ScoringSetup,
    record: Path | None = None,
    jobs: int | None = None,
    scheduler: str | None = None,
) -> list[dict[str, Any]]:
    """Score every candidate with every seed and batch.

    A score that fails, or is not finite, is reported in its row; the others go on.

    Args:
        candidates: with names of their own.
        setup: teacher, batches, scores and seeds.
        record: a file of JSON lines to which rows are added as they come; what it holds already
            is not computed again.
        jobs: processes to share the work; one if None.
        scheduler: of dask workers that share it instead; see
            :func:`kd_lrp_plugin.utils.cluster.cluster_workers`.

    Returns:
        A row per candidate and seed, in their order: {"candidate", "seed", "scores": {name: [one
        value per batch, None where it failed]}, "problems": {name: why}}.

    Raises:
        ConnectionError: if no scheduler answers.
        ValueError: for an unknown score, candidates of one name, no batch, or jobs beside a
            scheduler.
    """
    workforce = Workforce(jobs, scheduler)
    for name in setup.scores:
        check_known("score", name, SCORES)
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(message("candidates", "different names", twice, "Name each once."))
    if not setup.batches or not names:
        got = f"{len(names)} candidates, {len(setup.batches)} batches"
        expected, fix = "a candidate and a batch or more", "Name some."
        raise ValueError(message("score_candidates", expected, got, fix))
    cache = ScoreCache(record, setup)
    work = [
        (candidate, seed)
        for seed in setup.seeds  # all with one seed, so that the teacher is observed once for it
        for candidate in candidates
        if cache.row(candidate, seed) is None
    ]
    folder = record.parent if record else Path()
    found = _score_all(Scorer(setup), work, workforce, folder)
    rows = current_progress().track(found, "scoring", len(work))
    for (candidate, _), row in zip(work, rows, strict=True):
        cache.add(candidate, row)
    wanted = [(candidate, seed) for candidate in candidates for seed in setup.seeds]
    return [row for pair in wanted if (row := cache.row(*pair)) is not None]


class Scorer:
    """Scores candidates; observes the teacher once per seed and batch."""

    def __init__(self, setup: ScoringSetup) -> None:
        self.setup = setup
        self._observed: dict[tuple[int | None, str], list[Observation]] = {}

    def __call__(self, candidate: Candidate, seed: int) -> dict[str, Any]:
        values: dict[str, list[float | None]] = {name: [] for name in self.setup.scores}
        problems: dict[str, str] = {}
        students: dict[str, list[Observation]] = {}
        for name in self.setup.scores:
            score = SCORES[name]
            for index in range(len(self.setup.batches)):
                try:
                    if score.init not in students:
                        model = build_seeded(candidate.build, seed, score.init)
                        students[score.init] = self._observe(model, candidate.layers, seed)
                    teacher = self._observe_teacher(seed, score.init)[index]
                    with torch.random.fork_rng(devices=[]):
                        torch.manual_seed(seed)  # of noise, if a score draws any
                        value = score.function(students[score.init][index], teacher)
                    if not math.isfinite(value):
                        raise ValueError(message(name, "a finite score", value, ""))
                    values[name].append(value)
                except Exception as error:  # a network of others may fail in any way
                    values[name].append(None)
                    problems[name] = describe_failure(error)
        return {"candidate": candidate.name, "seed": seed, "scores": values, "problems": problems}

    def _observe_teacher(self, seed: int, init: str) -> list[Observation]:
        given = self.setup.teacher
        fixed = given.trained and init == "own"
        key = (None if fixed else seed, init)
        if key not in self._observed:
            for old in [old for old in self._observed if old[0] not in (None, seed)]:
                del self._observed[old]  # seeds come one after the other
            # Drawn from the student's seed, their first layers would be the same.
            drawn = seed + TEACHER_SEED
            model = build_seeded(given.build, drawn, init)
            self._observed[key] = self._observe(model, given.layers, drawn, not fixed)
        return self._observed[key]

    def _observe(
        self, model: nn.Module, layers: tuple[str, ...] | None, seed: int, train_mode: bool = True
    ) -> list[Observation]:
        return [
            Observation(model, *batch, layers, train_mode, seed) for batch in self.setup.batches
        ]


def _score_all(
    scorer: Scorer,
    work: list[tuple[Candidate, int]],
    workforce: Workforce,
    folder: Path,
) -> Iterable[dict[str, Any]]:
    if workforce.is_alone or len(work) < 2:
        for candidate, seed in work:
            yield scorer(candidate, seed)
        return
    with workforce.open(folder, _begin_scoring, scorer) as pool:
        yield from pool.map(_score_in_worker, work)


_SCORER: list[Scorer] = []  # of a worker process


def _begin_scoring(scorer: Scorer) -> None:
    _SCORER[:] = [scorer]


def _score_in_worker(work: tuple[Candidate, int]) -> dict[str, Any]:
    return _SCORER[0](*work)
