"""Score untrained students: over batches and seeds, in several processes, kept in a file."""

import hashlib
import json
import math
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd_lrp_plugin.checks import check_known, message
from kd_lrp_plugin.progress import Silence
from kd_lrp_plugin.scores import SCORES, Observation, normal_init

Batch = tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]
TEACHER_SEED = 1_000_003  # added to a seed for the teacher's initialisation


@dataclass(frozen=True)
class Candidate:
    """A student that could be chosen.

    Attributes:
        name: unique among the candidates.
        build: makes it, with the initialisation that PyTorch's generator gives; can be pickled.
        layers: where maps and features are taken from; None for the last map before pooling.
        about: what it is, as text, such as its entry in YAML: kept scores are of this.
    """

    name: str
    build: Callable[[], nn.Module]
    layers: tuple[str, ...] | None = None
    about: str = ""


@dataclass(frozen=True)
class Teacher:
    """The teacher of a selection.

    Attributes:
        build: makes it, weights included if it is trained; can be pickled.
        trained: a trained one runs in evaluation mode and keeps its weights over the seeds.
        layers: as of a candidate.
        about: as of a candidate; what its weights do not show, such as a rate of dropout.
    """

    build: Callable[[], nn.Module]
    trained: bool
    layers: tuple[str, ...] | None = None
    about: str = ""


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

    Attributes:
        setting: of teacher and batches, a fingerprint.
    """

    def __init__(
        self, file: Path | None, teacher: Teacher, batches: Sequence[Batch], scores: Sequence[str]
    ) -> None:
        self._file, self._scores = file, set(scores)
        self.setting = _fingerprint(teacher, batches) if file else ""
        self._rows: dict[tuple[str | int, ...], dict[str, Any]] = {}
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
                if row.pop("setting") == self.setting and self._scores <= set(row["scores"]):
                    self._rows[(*row.pop("of"), row["seed"])] = row

    def row(self, candidate: Candidate, seed: int) -> dict[str, Any] | None:
        return self._rows.get((*_identity(candidate), seed))

    def add(self, candidate: Candidate, row: dict[str, Any]) -> None:
        of = _identity(candidate)
        self._rows[(*of, row["seed"])] = row
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"setting": self.setting, "of": of, **row}) + "\n")


def _identity(candidate: Candidate) -> tuple[str, str, str]:
    return candidate.name, repr(candidate.layers), candidate.about


def _fingerprint(teacher: Teacher, batches: Sequence[Batch]) -> str:
    """Also a random teacher is told by its weights: those of one seed."""
    told = (teacher.trained, teacher.layers, teacher.about)
    digest = hashlib.sha256(repr(told).encode())
    tensors = [tensor for batch in batches for tensor in batch]
    for tensor in (*tensors, *seeded(teacher.build, 0).state_dict().values()):
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


def reason(error: Exception) -> str:
    """Why a candidate fails; a message of the package says it all, others need their type."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def seeded(build: Callable[[], nn.Module], seed: int, init: str = "own") -> nn.Module:
    """A network as it comes with a seed; of the generator, nothing is changed for others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        return normal_init(model) if init == "normal" else model


# --- processes ----------------------------------------------------------------------------------


@contextmanager
def workers(
    jobs: int, begin: Callable[..., object] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """Processes that share the threads of this one, and end when it does, even by a kill.

    Args:
        jobs: how many.
        begin: is called first in each of them, with ``arguments``; all can be pickled.
        *arguments: of ``begin``.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    # A fork starts at once, but may hang in a parallel region; with one thread there is none.
    forks = threads == 1 and sys.platform == "linux" and not torch.cuda.is_initialized()
    context: Any = multiprocessing.get_context("fork" if forks else "spawn")
    with ProcessPoolExecutor(jobs, context, _begin, (threads, begin, arguments)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(threads: int, begin: Callable[..., object] | None, arguments: Sequence[Any]) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    if begin:
        begin(*arguments)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)  # the main thread waits for work that nobody sends any more


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
