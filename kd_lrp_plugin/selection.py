"""Rank untrained students: scores over batches and seeds, budgets, what a score adds."""

import hashlib
import json
import math
import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import kendalltau, spearmanr
from torch import Tensor, nn

from kd_lrp_plugin.checks import check_known, message
from kd_lrp_plugin.progress import Silence
from kd_lrp_plugin.scores import SCORES, Observation, normal_init

Batch = tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]
UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "ms": 1e-3, "s": 1.0, "": 1.0}
BUDGETS = {"params": "parameters", "macs": "macs", "latency": "latency"}


@dataclass(frozen=True)
class Candidate:
    """A student that could be chosen.

    Attributes:
        name: unique among the candidates.
        build: makes it, with the initialisation that PyTorch's generator gives; can be pickled.
        layers: where maps and features are taken from; None for the last map before pooling.
    """

    name: str
    build: Callable[[], nn.Module]
    layers: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Teacher:
    """The teacher of a selection.

    Attributes:
        build: makes it, weights included if it is trained; can be pickled.
        trained: a trained one runs in evaluation mode and keeps its weights over the seeds.
        layers: as of a candidate.
    """

    build: Callable[[], nn.Module]
    trained: bool
    layers: tuple[str, ...] | None = None


def measure(
    candidates: Sequence[Candidate],
    teacher: Teacher,
    batches: Sequence[Batch],
    scores: Sequence[str],
    seeds: Sequence[int] = (0,),
    record: Path | None = None,
    jobs: int = 1,
    show: Silence | None = None,
) -> list[dict[str, Any]]:
    """Score every candidate with every seed and batch.

    A seed stands for one initialisation of student and, unless it is trained, teacher. A score
    that fails, or is not finite, is reported in its row; the others go on.

    Args:
        candidates: with names of their own.
        teacher: see :class:`Teacher`.
        batches: images and class indices.
        scores: of :data:`kd_lrp_plugin.scores.SCORES`.
        seeds: of the initialisations.
        record: a file of JSON lines to which rows are added as they come; what it holds already
            is not computed again.
        jobs: processes to share the work.
        show: told how far it is.

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
    setting = _fingerprint(teacher, batches) if record else ""
    done = _read(record, setting, scores) if record else {}
    work = [
        (candidate, seed)
        for seed in seeds  # all with one seed, so that the teacher is observed once for it
        for candidate in candidates
        if (candidate.name, seed) not in done
    ]
    task = _Task(teacher, list(batches), list(scores))
    show = show or Silence()
    for row in show.track(_spread(task, work, jobs), "scoring", len(work)):
        done[row["candidate"], row["seed"]] = row
        if record is not None:
            with record.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"setting": setting, **row}) + "\n")
    return [done[name, seed] for name in names for seed in seeds]


def _read(record: Path, setting: str, scores: Sequence[str]) -> dict[tuple[str, int], dict]:
    """Whole rows of this setting that have all scores; a kill may have left half a line."""
    text = record.read_text(encoding="utf-8") if record.exists() else ""
    if text and not text.endswith("\n"):
        record.write_text(text + "\n", encoding="utf-8")  # the next row gets a line of its own
    found = {}
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.pop("setting") == setting and set(scores) <= set(row["scores"]):
            found[row["candidate"], row["seed"]] = row
    return found


def _fingerprint(teacher: Teacher, batches: Sequence[Batch]) -> str:
    """What all values depend on beside candidate, seed and score, in sixteen digits."""
    digest = hashlib.sha256(repr((teacher.trained, teacher.layers)).encode())
    tensors = [tensor for batch in batches for tensor in batch]
    if teacher.trained:
        tensors += list(teacher.build().state_dict().values())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class _Task:
    """What a process needs to score candidates; it observes the teacher once per seed and batch."""

    def __init__(self, teacher: Teacher, batches: list[Batch], scores: list[str]) -> None:
        self.teacher, self.batches, self.scores = teacher, batches, scores
        self._observed: dict[tuple[int | None, int, str], Observation] = {}

    def __call__(self, candidate: Candidate, seed: int) -> dict[str, Any]:
        values: dict[str, list[float | None]] = {name: [] for name in self.scores}
        problems: dict[str, str] = {}
        for place, (images, targets) in enumerate(self.batches):
            students: dict[str, Observation] = {}
            for name in self.scores:
                score = SCORES[name]
                try:
                    if score.init not in students:
                        model = seeded(candidate.build, seed, score.init)
                        observed = Observation(model, images, targets, candidate.layers)
                        students[score.init] = observed
                    teacher = self._teacher(seed, place, score.init)
                    torch.manual_seed(seed)  # of noise, if a score draws any
                    value = score.function(students[score.init], teacher)
                    if not math.isfinite(value):
                        raise ValueError(message(name, "a finite score", value, ""))
                    values[name].append(value)
                except (ValueError, RuntimeError) as error:
                    values[name].append(None)
                    problems[name] = str(error)
        return {"candidate": candidate.name, "seed": seed, "scores": values, "problems": problems}

    def _teacher(self, seed: int, place: int, init: str) -> Observation:
        fixed = self.teacher.trained and init == "own"
        key = (None if fixed else seed, place, init)
        if key not in self._observed:
            for old in [old for old in self._observed if old[0] not in (None, seed)]:
                del self._observed[old]  # seeds come one after the other
            model = seeded(self.teacher.build, seed, init)
            images, targets = self.batches[place]
            layers = self.teacher.layers
            self._observed[key] = Observation(model, images, targets, layers, not fixed)
        return self._observed[key]


def seeded(build: Callable[[], nn.Module], seed: int, init: str = "own") -> nn.Module:
    """A network as it comes with a seed; of the generator, nothing is changed for others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        return normal_init(model) if init == "normal" else model


def _spread(task: _Task, work: list[tuple[Candidate, int]], jobs: int) -> Iterable[dict[str, Any]]:
    if jobs == 1 or len(work) < 2:
        for candidate, seed in work:
            yield task(candidate, seed)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a threaded PyTorch may hang
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, context, _begin, (task, threads)) as pool:
        try:
            yield from pool.map(_go_on, work)
        finally:
            pool.shutdown(cancel_futures=True)


_TASK: list[_Task] = []  # of a worker process


def _begin(task: _Task, threads: int) -> None:
    torch.set_num_threads(threads)
    _TASK.append(task)


def _go_on(work: tuple[Candidate, int]) -> dict[str, Any]:
    return _TASK[0](*work)


# --- what is ranked -----------------------------------------------------------------------------


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and spread of each score by candidate, over batches and seeds.

    Returns:
        By candidate: {"score": (mean, standard deviation)}, None for a score that failed once or
        more, and under "problems" why.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        entry = found.setdefault(row["candidate"], {"problems": {}})
        entry["problems"] |= row["problems"]
        for name, values in row["scores"].items():
            entry.setdefault(name, []).extend(values)
    for entry in found.values():
        for name, values in entry.items():
            if name != "problems":
                bad = any(value is None for value in values)
                entry[name] = None if bad else (float(np.mean(values)), float(np.std(values)))
    return found


def ranks(values: Sequence[float | None]) -> list[int | None]:
    """Places from 1, the lowest value first; equal ones share the better place."""
    known = sorted(value for value in values if value is not None)
    return [None if value is None else known.index(value) + 1 for value in values]


def pareto_front(costs: Sequence[Sequence[float]]) -> list[bool]:
    """Which points no other one beats: at most as much everywhere, and less somewhere.

    Example:
        >>> pareto_front([(1, 9), (2, 2), (3, 3)])
        [True, True, False]
    """
    points = np.asarray(costs, dtype=float)
    return [
        not any(((other <= point).all() and (other < point).any()) for other in points)
        for point in points
    ]


def parse_budget(texts: Sequence[str]) -> dict[str, float]:
    """Budgets such as ``params=2.5M``, ``macs=300M``, ``latency=20ms``, as numbers and seconds.

    Raises:
        ValueError: for an unknown quantity, or a value that is no positive number.

    Example:
        >>> parse_budget(["params=2.5M", "latency=20ms"])
        {'parameters': 2500000.0, 'latency': 0.02}
    """
    budget = {}
    for text in texts:
        name, _, value = text.partition("=")
        check_known("--budget", name.strip(), BUDGETS)
        number = value.strip().rstrip("KMGms")
        unit = value.strip()[len(number) :]
        fix = "For example params=2.5M, macs=300M or latency=20ms."
        try:
            amount = float(number) * UNITS[unit]
        except (ValueError, KeyError):
            raise ValueError(message("--budget", "name=number and unit", repr(text), fix)) from None
        if not 0 < amount < math.inf:
            raise ValueError(message("--budget", "a number above 0", repr(text), fix))
        budget[BUDGETS[name.strip()]] = amount
    return budget


def within(budget: Mapping[str, float], costs: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The candidates that keep a budget.

    Args:
        budget: of :func:`parse_budget`.
        costs: parameters, macs and latency by candidate.

    Raises:
        ValueError: if none does; says what the nearest one needs.
    """
    kept = [n for n, cost in costs.items() if all(cost[k] <= most for k, most in budget.items())]
    if not kept:
        over = {n: max(cost[k] / most for k, most in budget.items()) for n, cost in costs.items()}
        near = min(over, key=over.__getitem__)
        needs = ", ".join(f"{k} {costs[near][k]:,g}" for k in budget)
        fix = f"The nearest is {near}, which needs {needs}."
        got = ", ".join(f"{k} <= {most:,g}" for k, most in budget.items())
        raise ValueError(message("budget", "one that some candidate keeps", got, fix))
    return kept


# --- does a score select? -----------------------------------------------------------------------

NEAR = 0.1  # by this share of the smaller, networks "of equal size" may differ in parameters


def ranking_quality(
    scores: Sequence[float],
    accuracies: Sequence[float],
    parameters: Sequence[float],
    budgets: int = 6,
) -> dict[str, float]:
    """How well scores (lower is better) order networks by accuracy.

    Args:
        scores: one per network.
        accuracies: of the trained networks.
        parameters: their sizes.
        budgets: number of parameter budgets for the regret, evenly spaced among the sizes in rank.

    Returns:
        "spearman" and "kendall" of the negated scores with the accuracies; "iso_concordance", the
        share of pairs of equal size (:data:`NEAR`) and different accuracy in right order, ties in
        score counting one half (nan without such pairs); "regret", the mean over the budgets of
        the best accuracy within it less that of the best score within it.
    """
    order, truth, size = (np.asarray(v, dtype=float) for v in (scores, accuracies, parameters))
    constant = np.ptp(order) == 0
    first, second = np.triu_indices(len(truth), 1)
    near = np.abs(size[first] - size[second]) <= NEAR * np.minimum(size[first], size[second])
    near &= truth[first] != truth[second]
    gaps = np.sign(order[second] - order[first]) * np.sign(truth[first] - truth[second])
    concordant = (gaps[near] + 1) / 2
    limits = np.quantile(size, np.linspace(0, 1, budgets + 1)[1:])
    regrets = []
    for limit in limits:
        inside = size <= limit
        best = truth[inside][order[inside] == order[inside].min()].mean()
        regrets.append(truth[inside].max() - best)
    return {
        "spearman": 0.0 if constant else float(spearmanr(-order, truth).statistic),
        "kendall": 0.0 if constant else float(kendalltau(-order, truth).statistic),
        "iso_concordance": float(concordant.mean()) if near.any() else math.nan,
        "regret": float(np.mean(regrets)),
    }


def compare_quality(
    one: Sequence[float],
    other: Sequence[float],
    accuracies: Sequence[float],
    parameters: Sequence[float],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float, float]]:
    """Difference of :func:`ranking_quality` of two scores, with a paired bootstrap interval.

    Returns:
        By figure: difference, and the 2.5th and 97.5th percentile over resamples of the networks.
    """
    arrays = [np.asarray(v, dtype=float) for v in (one, other, accuracies, parameters)]

    def differences(places: np.ndarray) -> dict[str, float]:
        a, b, truth, size = (array[places] for array in arrays)
        first, second = ranking_quality(a, truth, size), ranking_quality(b, truth, size)
        return {name: first[name] - second[name] for name in first}

    found = differences(np.arange(len(arrays[0])))
    n, draw = len(arrays[0]), np.random.default_rng(seed)
    drawn = [differences(draw.integers(0, n, n)) for _ in range(resamples)]
    return {
        name: (value, *np.nanpercentile([d[name] for d in drawn], [2.5, 97.5]).tolist())
        for name, value in found.items()
    }
