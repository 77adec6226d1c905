"""Search a space too large to rank: Optuna's NSGA-II on score, MACs and parameters."""

import hashlib
import logging
from collections.abc import Callable, Mapping
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

OVER_BUDGET = 1e9  # stands for the score of a student that is not scored, being over budget


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
    budget = budget or {}
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(logging.WARNING)
    size, channels = batches[0][0].shape[-1], batches[0][0].shape[1]
    question = (score, space.axes(), sorted(budget.items()), seeds, layers)
    study = optuna.create_study(
        study_name=hashlib.sha256(repr(question).encode()).hexdigest()[:16],
        directions=["minimize"] * 3,
        sampler=optuna.samplers.NSGAIISampler(population_size=min(50, max(4, trials // 5))),
        storage=JournalStorage(JournalFileBackend(str(folder / "study.journal"))),
        load_if_exists=True,
    )
    students: dict[str, MobileNetV2] = {}
    costs: dict[str, dict[str, float]] = {}

    kept = Record(folder / "scores.jsonl", teacher, batches, [score])
    scorer = Scorer(teacher, batches, [score])

    def scored(candidate: Candidate, seed: int) -> dict[str, Any]:
        kept.refresh()
        if kept.row(candidate, seed) is None:
            kept.add(candidate, scorer(candidate, seed))
        return kept.row(candidate, seed) or {}

    def see(trial: optuna.Trial) -> tuple[float, float, float]:
        axes = space.axes()
        chosen = {
            name: values[trial.suggest_categorical(name, list(range(len(values))))]
            for name, values in axes.items()
        }
        student = space.student(chosen)
        candidate = Candidate(str(student), build(student), layers)
        cost = (
            costs.get(candidate.name)
            or costs_of([candidate], size, channels, "latency" in budget)[candidate.name]
        )
        costs[candidate.name] = cost
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

    finished = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    left = range(max(0, trials - len(finished)))
    for _ in (show or Silence()).track(left, "searching", len(left)):
        study.optimize(see, n_trials=1)
    for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE]):
        axes = space.axes()
        student = space.student({name: axes[name][trial.params[name]] for name in axes})
        if trial.values[0] < OVER_BUDGET:
            students[str(student)] = student
            costs[str(student)] = dict(trial.user_attrs)
    if not students:
        fix = "Allow more trials or a larger budget."
        raise ValueError(message("search", "a student within budget", "none", fix))
    candidates = [Candidate(name, build(student), layers) for name, student in students.items()]
    rows = [scored(candidate, seed) for candidate in candidates for seed in seeds]
    return students, rows, {name: costs[name] for name in students}
