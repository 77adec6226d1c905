"""Search a space too large to rank: Optuna's NSGA-II on score, MACs and parameters."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from torch import nn

from kd_lrp_plugin.checks import message
from kd_lrp_plugin.progress import Silence
from kd_lrp_plugin.selection import Batch, Candidate, Record, Scorer, Teacher, costs_of
from kd_lrp_plugin.spaces import MobileNetV2, Space

OVER_BUDGET = 1e9  # stands for the score of a student that is over budget, or cannot be scored


def search(
    space: Space,
    build: Callable[[MobileNetV2], Callable[[], nn.Module]],
    teacher: Teacher,
    batches: list[Batch],
    score: str,
    trials: int,
    folder: Path,
    budget: Mapping[str, float] | None = None,
    seeds: tuple[int, ...] = (0,),
    layers: tuple[str, ...] | None = None,
    show: Silence | None = None,
) -> tuple[dict[str, MobileNetV2], list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Look at ``trials`` students of a space, more of those that no other one beats.

    The study is a journal in ``folder``: given again, the search goes on, and several processes
    that are given the same folder share it. No architecture is scored twice: scores are kept by
    name in ``scores.jsonl``, costs in the study. A student over budget costs no score.

    Args:
        space: see :class:`kd_lrp_plugin.spaces.Space`.
        build: makes the ``build`` of a candidate.
        teacher: see :func:`kd_lrp_plugin.selection.measure`, as batches, score and seeds.
        batches: of images and class indices.
        score: of :data:`kd_lrp_plugin.scores.SCORES`.
        trials: of the study in all, those of an earlier call included.
        folder: for ``study.journal`` and ``scores.jsonl``.
        budget: of :func:`kd_lrp_plugin.selection.parse_budget`.
        seeds: of the initialisations.
        layers: of the students.
        show: told how far it is.

    Returns:
        The students within budget that were scored, by name, their rows as of ``measure``, and
        their costs as of ``costs_of``.

    Raises:
        ValueError: if no student within budget was found.

    Reference:
        Deb et al., 2002 (NSGA-II), by Optuna (Akiba et al., KDD 2019). The thesis and DisWOT name
        an evolutionary search over one score.
    """
    budget, axes = budget or {}, space.axes()
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(logging.WARNING)
    size, channels = batches[0][0].shape[-1], batches[0][0].shape[1]
    question = (score, axes, sorted(budget.items()), seeds, layers)
    study = optuna.create_study(
        study_name=hashlib.sha256(repr(question).encode()).hexdigest()[:16],
        directions=["minimize"] * 3,
        sampler=optuna.samplers.NSGAIISampler(population_size=min(50, max(4, trials // 5))),
        storage=JournalStorage(JournalFileBackend(str(folder / "study.journal"))),
        load_if_exists=True,
    )
    kept = Record(folder / "scores.jsonl", teacher, batches, [score])
    scorer = Scorer(teacher, batches, [score])

    def finished() -> list[optuna.trial.FrozenTrial]:
        states = [optuna.trial.TrialState.COMPLETE]
        return study.get_trials(deepcopy=False, states=states)

    def student_of(places: Mapping[str, int]) -> MobileNetV2:
        return space.student({name: axes[name][place] for name, place in places.items()})

    def scored(candidate: Candidate, seed: int) -> dict[str, Any]:
        kept.refresh()
        row = kept.row(candidate, seed)
        if row is None:
            row = scorer(candidate, seed)
            kept.add(candidate, row)
        return row

    costs = {str(student_of(trial.params)): dict(trial.user_attrs) for trial in finished()}

    def look(trial: optuna.Trial) -> tuple[float, float, float]:
        student = student_of(
            {name: trial.suggest_categorical(name, range(len(axes[name]))) for name in axes}
        )
        candidate = Candidate(str(student), build(student), layers)
        if candidate.name not in costs:
            costs.update(costs_of([candidate], size, channels, "latency" in budget))
        cost = costs[candidate.name]
        over = max((cost[k] / most - 1 for k, most in budget.items()), default=0.0)
        trial.set_constraint("budget", over)
        for key, value in cost.items():
            trial.set_user_attr(key, value)
        value = OVER_BUDGET
        if over <= 0:
            found = [v for seed in seeds for v in scored(candidate, seed)["scores"][score]]
            if None not in found:
                value = sum(found) / len(found)
        return value, cost["macs"], cost["parameters"]

    def looks() -> Iterator[None]:
        while len(finished()) < trials:  # other processes add to the same study
            study.optimize(look, n_trials=1)
            yield

    for _ in (show or Silence()).track(looks(), "searching", max(0, trials - len(finished()))):
        pass
    within = [trial for trial in finished() if trial.values[0] < OVER_BUDGET]
    students = {str(student): student for student in (student_of(t.params) for t in within)}
    if not students:
        fix = "Allow more trials or a larger budget."
        raise ValueError(message("search", "a student within budget", "none", fix))
    costs |= {str(student_of(trial.params)): dict(trial.user_attrs) for trial in within}
    candidates = [Candidate(name, build(student), layers) for name, student in students.items()]
    rows = [scored(candidate, seed) for candidate in candidates for seed in seeds]
    return students, rows, {name: costs[name] for name in students}
