"""Rank untrained students: scores over batches and seeds, budgets, what a score adds."""

import hashlib
import json
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import kendalltau, rankdata
from torch import Tensor, nn

from kd_lrp_plugin.checks import check_known, message
from kd_lrp_plugin.efficiency import count_macs, count_parameters, measure_latency
from kd_lrp_plugin.progress import Silence
from kd_lrp_plugin.scores import SCORES, Observation, normal_init

Batch = tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]
TEACHER_SEED = 1_000_003  # added to a seed for the teacher's initialisation
COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9}
BUDGETS = {  # by the name that users write: the cost, and its units
    "params": ("parameters", COUNTS),
    "macs": ("macs", COUNTS),
    "latency": ("latency", {"ms": 1e-3, "s": 1.0}),
}


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
    kept = Record(record, teacher, batches, scores)
    work = [
        (candidate, seed)
        for seed in seeds  # all with one seed, so that the teacher is observed once for it
        for candidate in candidates
        if kept.row(candidate, seed) is None
    ]
    task = Scorer(teacher, batches, scores)
    show = show or Silence()
    for (candidate, _), row in zip(
        work, show.track(_spread(task, work, jobs), "scoring", len(work)), strict=True
    ):
        kept.add(candidate, row)
    return [row for c in candidates for seed in seeds if (row := kept.row(c, seed)) is not None]


class Record:
    """Rows that are kept in a file of JSON lines, added to as they come.

    Args:
        file: of the lines; None keeps them in memory only.
        teacher: with the batches, what all values depend on beside candidate, seed and score;
            lines that were made with others are left alone.
        batches: see :func:`measure`.
        scores: that a row must have.
    """

    def __init__(
        self, file: Path | None, teacher: Teacher, batches: Sequence[Batch], scores: Sequence[str]
    ) -> None:
        self._file, self._scores = file, set(scores)
        self._setting = _fingerprint(teacher, batches) if file else ""
        self._rows: dict[tuple[str, str, int], dict[str, Any]] = {}
        self._read = 0
        if file and file.exists() and file.stat().st_size and file.read_bytes()[-1:] != b"\n":
            with file.open("a", encoding="utf-8") as lines:
                lines.write("\n")  # a kill has left half a line; the next has one of its own
        self.refresh()

    def refresh(self) -> None:
        """Read what other processes have added."""
        if self._file is None or not self._file.exists():
            return
        with self._file.open(encoding="utf-8") as lines:
            lines.seek(self._read)
            while (line := lines.readline()).endswith("\n"):
                self._read = lines.tell()
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if row.pop("setting") == self._setting and self._scores <= set(row["scores"]):
                    key = (row["candidate"], row.pop("layers"), row["seed"])
                    self._rows[key] = row

    def row(self, candidate: Candidate, seed: int) -> dict[str, Any] | None:
        return self._rows.get((candidate.name, repr(candidate.layers), seed))

    def add(self, candidate: Candidate, row: dict[str, Any]) -> None:
        layers = repr(candidate.layers)
        self._rows[candidate.name, layers, row["seed"]] = row
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"setting": self._setting, "layers": layers, **row}) + "\n")


def _fingerprint(teacher: Teacher, batches: Sequence[Batch]) -> str:
    digest = hashlib.sha256(repr((teacher.trained, teacher.layers)).encode())
    tensors = [tensor for batch in batches for tensor in batch]
    if teacher.trained:
        tensors += list(teacher.build().state_dict().values())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


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
                        students[score.init] = self._observe(model, candidate.layers)
                    teacher = self._teacher(seed, score.init)[place]
                    with torch.random.fork_rng(devices=[]):
                        torch.manual_seed(seed)  # of noise, if a score draws any
                        value = score.function(students[score.init][place], teacher)
                    if not math.isfinite(value):
                        raise ValueError(message(name, "a finite score", value, ""))
                    values[name].append(value)
                except (ValueError, RuntimeError) as error:
                    values[name].append(None)
                    problems[name] = str(error)
        return {"candidate": candidate.name, "seed": seed, "scores": values, "problems": problems}

    def _teacher(self, seed: int, init: str) -> list[Observation]:
        fixed = self.teacher.trained and init == "own"
        key = (None if fixed else seed, init)
        if key not in self._observed:
            for old in [old for old in self._observed if old[0] not in (None, seed)]:
                del self._observed[old]  # seeds come one after the other
            # Drawn from the student's seed, their first layers would be the same.
            model = seeded(self.teacher.build, seed + TEACHER_SEED, init)
            self._observed[key] = self._observe(model, self.teacher.layers, not fixed)
        return self._observed[key]

    def _observe(
        self, model: nn.Module, layers: tuple[str, ...] | None, train_mode: bool = True
    ) -> list[Observation]:
        return [Observation(model, *batch, layers, train_mode) for batch in self.batches]


def seeded(build: Callable[[], nn.Module], seed: int, init: str = "own") -> nn.Module:
    """A network as it comes with a seed; of the generator, nothing is changed for others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        return normal_init(model) if init == "normal" else model


def _spread(task: Scorer, work: list[tuple[Candidate, int]], jobs: int) -> Iterable[dict[str, Any]]:
    if jobs == 1 or len(work) < 2:
        for candidate, seed in work:
            yield task(candidate, seed)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    # A fork starts at once, but may hang in a parallel region; with one thread there is none.
    forks = threads == 1 and sys.platform == "linux" and not torch.cuda.is_initialized()
    context: Any = multiprocessing.get_context("fork" if forks else "spawn")
    with ProcessPoolExecutor(jobs, context, _begin, (task, threads)) as pool:
        try:
            yield from pool.map(_go_on, work)
        finally:
            pool.shutdown(cancel_futures=True)


_TASK: list[Scorer] = []  # of a worker process


def _begin(task: Scorer, threads: int) -> None:
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
    numbers = np.array(values, dtype=float)
    places = rankdata(numbers, method="min", nan_policy="omit")
    return [None if np.isnan(place) else int(place) for place in places]


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
        name, _, value = (part.strip() for part in text.partition("="))
        check_known("budget", name, BUDGETS)
        cost, units = BUDGETS[name]
        number = value.rstrip("KMGms")
        try:
            amount = float(number) * units[value[len(number) :].strip()]
        except (ValueError, KeyError):
            expected = f"{name}=NUMBER with a unit of {[u or 'none' for u in units]}"
            fix = "For example params=2.5M, macs=300M or latency=20ms."
            raise ValueError(message("budget", expected, repr(text), fix)) from None
        if not 0 < amount < math.inf:
            raise ValueError(message("budget", "a number above 0", repr(text), "Raise it."))
        budget[cost] = amount
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


# --- a ranking ----------------------------------------------------------------------------------


def costs_of(
    candidates: Sequence[Candidate],
    image_size: int,
    channels: int = 3,
    latency: bool = True,
    show: Silence | None = None,
) -> dict[str, dict[str, float]]:
    """Parameters, macs and, if asked for, latency (seconds per image at batch 1) by candidate."""
    found = {}
    for candidate in (show or Silence()).track(candidates, "counting", len(candidates)):
        model = seeded(candidate.build, 0)
        found[candidate.name] = {
            "parameters": float(count_parameters(model)),
            "macs": float(count_macs(model, image_size, channels)),
        }
        if latency:
            found[candidate.name]["latency"] = measure_latency(model, image_size, 1, channels)
    return found


def ranking(
    rows: Sequence[Mapping[str, Any]], costs: Mapping[str, Mapping[str, float]], score: str
) -> list[dict[str, Any]]:
    """What :func:`measure` and :func:`costs_of` have found, a record per candidate, best first.

    Returns:
        Records with the candidate's name, the score's mean and spread, each cost, the rank by each
        of them, and whether the candidate is on the front of low score and few parameters and
        macs. A candidate without the score comes last, with the problem.
    """
    summary = summarise(rows)
    names = list(summary)
    means = [summary[name][score][0] if summary[name][score] else None for name in names]
    by_cost = {k: ranks([costs[name][k] for name in names]) for k in costs[names[0]]}
    by_score = ranks(means)
    known = {i: value for i, value in enumerate(means) if value is not None}
    points = [
        (value, costs[names[i]]["parameters"], costs[names[i]]["macs"])
        for i, value in known.items()
    ]
    front = dict(zip(known, pareto_front(points), strict=True))
    records = []
    for i, name in enumerate(names):
        record: dict[str, Any] = {"candidate": name, "score": means[i], "spread": None}
        if summary[name][score]:
            record["spread"] = summary[name][score][1]
        record |= costs[name]
        record["rank by score"] = by_score[i]
        record |= {f"rank by {cost}": places[i] for cost, places in by_cost.items()}
        record["front"] = front.get(i, False)
        record["problem"] = summary[name]["problems"].get(score)
        records.append(record)
    return sorted(records, key=lambda record: (record["score"] is None, record["score"] or 0.0))


def verdict(records: Sequence[Mapping[str, Any]]) -> str:
    """In plain words, what the score says that the parameter count does not."""
    scored = [record for record in records if record["score"] is not None]
    if len(scored) < 3:
        return "Too few candidates have a score to say what it adds to the parameter count."
    scores = [record["score"] for record in scored]
    sizes = [record["parameters"] for record in scored]
    if len(set(scores)) == 1:
        return "The score is the same for all: it says nothing."
    tau = kendalltau(scores, sizes).statistic
    spread = float(np.median([record["spread"] for record in scored]))
    steps = np.diff(sorted(scores))
    words = []
    if abs(tau) >= 0.9:
        order = "smallest" if tau > 0 else "largest"
        words.append(
            f"The score adds nothing to the parameter count here: it puts the {order} first "
            f"(Kendall {tau:.2f} with the parameters)."
        )
    else:
        words.append(
            f"The score is no mere parameter count here (Kendall {tau:.2f} with the parameters)."
        )
    if spread > float(np.median(steps)):
        words.append(
            f"Neighbours in the ranking are not told apart: the spread over initialisations and "
            f"batches is {spread:.3g}, a step of the ranking {float(np.median(steps)):.3g}."
        )
    words.append("Whether it finds accurate students, only trained ones can tell.")
    return " ".join(words)
