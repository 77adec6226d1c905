"""Score untrained students: over batches and seeds, in several processes, kept in a file."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd_lrp_plugin.selection.cache import ScoreCache
from kd_lrp_plugin.selection.candidates import Batch, Candidate, Teacher, reason, seeded
from kd_lrp_plugin.selection.scores.observation import Observation
from kd_lrp_plugin.selection.scores.registry import SCORES
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import check_known, message
from kd_lrp_plugin.utils.workers import workers

TEACHER_SEED = 1_000_003  # added to a seed for the teacher's initialisation


def score_candidates(
    candidates: Sequence[Candidate],
    teacher: Teacher,
    batches: Sequence[Batch],
    scores: Sequence[str],
    seeds: Sequence[int] = (0,),
    record: Path | None = None,
    jobs: int = 1,
) -> list[dict[str, Any]]:
    """Score every candidate with every seed and batch.

    A seed stands for one initialisation of student and, unless it is trained, teacher. A score
    that fails, or is not finite, is reported in its row; the others go on.

    Args:
        candidates: with names of their own.
        teacher: see :class:`Teacher`.
        batches: images and class indices.
        scores: of :data:`kd_lrp_plugin.selection.scores.registry.SCORES`.
        seeds: of the initialisations.
        record: a file of JSON lines to which rows are added as they come; what it holds already
            is not computed again.
        jobs: processes to share the work.

    Returns:
        A row per candidate and seed, in their order: {"candidate", "seed", "scores": {name: [one
        value per batch, None where it failed]}, "problems": {name: why}}.

    Raises:
        ValueError: for an unknown score, candidates of one name, or no batch.
    """
    for name in scores:
        check_known("score", name, SCORES)
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(message("candidates", "different names", twice, "Name each once."))
    if not batches or not names:
        got = f"{len(names)} candidates, {len(batches)} batches"
        raise ValueError(message("measure", "a candidate and a batch or more", got, ""))
    kept = ScoreCache(record, teacher, batches, scores)
    work = [
        (candidate, seed)
        for seed in seeds  # all with one seed, so that the teacher is observed once for it
        for candidate in candidates
        if kept.row(candidate, seed) is None
    ]
    task = Scorer(teacher, batches, scores)
    for (candidate, _), row in zip(
        work, current_progress().track(_spread(task, work, jobs), "scoring", len(work)), strict=True
    ):
        kept.add(candidate, row)
    return [row for c in candidates for seed in seeds if (row := kept.row(c, seed)) is not None]


class Scorer:
    """Scores candidates; observes the teacher once per seed and batch."""

    def __init__(self, teacher: Teacher, batches: Sequence[Batch], scores: Sequence[str]) -> None:
        self.teacher, self.batches, self.scores = teacher, list(batches), list(scores)
        self._observed: dict[tuple[int | None, str], list[Observation]] = {}

    def __call__(self, candidate: Candidate, seed: int) -> dict[str, Any]:
        values: dict[str, list[float | None]] = {name: [] for name in self.scores}
        problems: dict[str, str] = {}
        students: dict[str, list[Observation]] = {}
        for name in self.scores:
            score = SCORES[name]
            for place in range(len(self.batches)):
                try:
                    if score.init not in students:
                        model = seeded(candidate.build, seed, score.init)
                        students[score.init] = self._observe(model, candidate.layers, seed)
                    teacher = self._teacher(seed, score.init)[place]
                    with torch.random.fork_rng(devices=[]):
                        torch.manual_seed(seed)  # of noise, if a score draws any
                        value = score.function(students[score.init][place], teacher)
                    if not math.isfinite(value):
                        raise ValueError(message(name, "a finite score", value, ""))
                    values[name].append(value)
                except Exception as error:  # a network of others may fail in any way
                    values[name].append(None)
                    problems[name] = reason(error)
        return {"candidate": candidate.name, "seed": seed, "scores": values, "problems": problems}

    def _teacher(self, seed: int, init: str) -> list[Observation]:
        fixed = self.teacher.trained and init == "own"
        key = (None if fixed else seed, init)
        if key not in self._observed:
            for old in [old for old in self._observed if old[0] not in (None, seed)]:
                del self._observed[old]  # seeds come one after the other
            # Drawn from the student's seed, their first layers would be the same.
            drawn = seed + TEACHER_SEED
            model = seeded(self.teacher.build, drawn, init)
            self._observed[key] = self._observe(model, self.teacher.layers, drawn, not fixed)
        return self._observed[key]

    def _observe(
        self, model: nn.Module, layers: tuple[str, ...] | None, seed: int, train_mode: bool = True
    ) -> list[Observation]:
        return [Observation(model, *batch, layers, train_mode, seed) for batch in self.batches]


def _spread(task: Scorer, work: list[tuple[Candidate, int]], jobs: int) -> Iterable[dict[str, Any]]:
    if jobs == 1 or len(work) < 2:
        for candidate, seed in work:
            yield task(candidate, seed)
        return
    with workers(jobs, _begin_scoring, task) as pool:
        yield from pool.map(_go_on, work)


_TASK: list[Scorer] = []  # of a worker process


def _begin_scoring(task: Scorer) -> None:
    _TASK.append(task)


def _go_on(work: tuple[Candidate, int]) -> dict[str, Any]:
    return _TASK[0](*work)
