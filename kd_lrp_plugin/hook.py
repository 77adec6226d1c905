"""The rim, continued: a student model that chooses itself when torchdistill builds it."""

import importlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchdistill.models.registry import MODEL_DICT, get_model, register_model

from kd_lrp_plugin.checks import check_known, message
from kd_lrp_plugin.processes import launched
from kd_lrp_plugin.progress import Silence, listening
from kd_lrp_plugin.question import (
    WHERE,
    Entry,
    Question,
    ask,
    batches_of,
    entries_of,
    entry_of,
)
from kd_lrp_plugin.ranking import costs_of, parse_budget, ranking, within
from kd_lrp_plugin.selection import Batch, Candidate, Teacher, measure
from kd_lrp_plugin.spaces import MobileNetV2, Space
from kd_lrp_plugin.students import load_weights

logger = logging.getLogger(__name__)

Costs = dict[str, dict[str, Any]]

LISTED = 40  # of a long ranking: what a table shows, and whose latency is measured
_LOOKING: ContextVar[bool] = ContextVar("looking", default=False)


def diswot_student(**asked: Any) -> nn.Module:
    """The best of some untrained students by a score, chosen once and built from then on.

    The choice is recorded in a file. Where that is, the student is built from it without a look
    at teacher, data or scores; so a second run, a resumed one and a test get the same student.
    Under torchrun the first process selects, and the others wait for its record.

    Args:
        **asked: see :class:`Question`.

    Returns:
        The student, untrained.

    Raises:
        ValueError: for an argument that :class:`Question` lacks, a record of another question, a
            budget that no candidate keeps, or a candidate that cannot be built, run or scored.

    Example:
        .. code-block:: yaml

            models:
              teacher_model: &teacher {key: timm_model, kwargs: {name: resnet10t, num_classes: 4}}
              student_model:
                key: diswot_student
                kwargs: {num_classes: 4, candidates: thesis, teacher: *teacher,
                  data: *train_images, budget: [params=1M], record: runs/choice.json}
    """
    question = ask(**asked)
    if _LOOKING.get() and not question.file.exists():
        entry = _stand_in(question)
    else:
        entry = _chosen(question)
    model = builder(entry)()
    model.__dict__["chosen"] = entry  # the driver writes it into its summary
    return model


register_model(diswot_student, key="diswot_student")


def _chosen(question: Question) -> Entry:
    rank, _ = launched()
    while rank > 0 and not question.file.exists():  # torchrun ends this process if the first fails
        time.sleep(0.2)
    if not question.file.exists():
        with torch.random.fork_rng(devices=[]):  # a run is the same with the record and without
            found = select(question, show=listening())
        keep(question, found)
        for record in found:
            if record["score"] is None:
                logger.warning("left out: %s: %s", record["candidate"], record["problem"])
        logger.warning(
            "%s chose %s; recorded in %s", question.score, found[0]["candidate"], question.file
        )
    return recorded(question)


# --- looking ------------------------------------------------------------------------------------


@contextmanager
def looking_only() -> Iterator[None]:
    """Inside, :func:`diswot_student` makes no choice and writes nothing.

    Where none is recorded, the first candidate that keeps the budget stands for the student, after
    everything that the question names was built.
    """
    token = _LOOKING.set(True)
    try:
        yield
    finally:
        _LOOKING.reset(token)


def _stand_in(question: Question) -> Entry:
    with torch.random.fork_rng(devices=[]):
        batches = batches_of(question)
        teacher_of(question).build()
        if question.search and question.space:
            return entry_of(next(iter(question.space)), question.num_classes)
        candidates, _, _ = _affordable(question, batches)
    return entries_of(question)[candidates[0].name]


# --- selecting ----------------------------------------------------------------------------------


def select(
    question: Question, jobs: int = 1, show: Silence | None = None, latency: bool = False
) -> list[dict[str, Any]]:
    """The ranking of the candidates that keep the budget, best first.

    Scores are kept beside the record, in ``<record>.scores.jsonl``, and used again.

    Args:
        question: what is asked.
        jobs: processes to share the work.
        show: told how far it is.
        latency: measure it even if the budget does not name it; of a search, that of the first
            :data:`LISTED`.

    Returns:
        See :func:`kd_lrp_plugin.ranking.ranking`; a candidate that cannot be built or run has no
        costs. Each record has the candidate's "entry" of ``models``.

    Raises:
        ValueError: see :func:`diswot_student`.
    """
    batches = batches_of(question)
    question.file.parent.mkdir(parents=True, exist_ok=True)
    if question.search and question.space:
        return _searched(question, question.space, batches, jobs, show, latency)
    candidates, costs, problems = _affordable(question, batches, latency, show)
    rows = measure(
        *(candidates, teacher_of(question), batches, [question.score], question.seeds),
        *(question.file.with_suffix(".scores.jsonl"), jobs, show),
    )
    records = _ranked(question, rows, costs, problems)
    entries = entries_of(question)
    return [{**record, "entry": entries[record["candidate"]]} for record in records]


def _affordable(
    question: Question, batches: list[Batch], latency: bool = False, show: Silence | None = None
) -> tuple[list[Candidate], Costs, dict[str, str]]:
    """The candidates that keep the budget, what all cost, and why some cannot be built or run."""
    budget, candidates = parse_budget(question.budget), candidates_of(question)
    latency = latency or "latency" in budget
    costs, problems = costs_of(candidates, *_shape(batches), latency, show)
    _refuse(question, problems, len(candidates))
    kept = within(budget, costs)
    if show and len(kept) < len(costs):
        show.note(f"{len(costs) - len(kept)} of {len(candidates)} students are over budget")
    return [candidate for candidate in candidates if candidate.name in kept], costs, problems


def _refuse(question: Question, problems: Mapping[str, str], among: int) -> None:
    if problems and (len(problems) == among or not question.exclude_failures):
        shown = "; ".join(f"{name}: {why}" for name, why in list(problems.items())[:3])
        fix = (
            "Choose another score or other layers, or set exclude_failures: True. What has failed "
            f"is kept beside {question.file}: delete it there to try again."
        )
        got = f"{len(problems)} without, such as {shown}"
        raise ValueError(message(WHERE, f"a {question.score} of each", got, fix))


def _ranked(
    question: Question,
    rows: Sequence[Mapping[str, Any]],
    costs: Costs,
    problems: Mapping[str, str],
) -> list[dict[str, Any]]:
    """The ranking, with those at its end that have no costs."""
    if not rows:
        _refuse(question, problems, len(problems))
    records = ranking(rows, costs, question.score)
    failed = {r["candidate"]: r["problem"] for r in records if r["score"] is None}
    _refuse(question, {**problems, **failed}, len(records) + len(problems))
    nothing = {**dict.fromkeys(records[0]), "front": False}
    return records + [
        {**nothing, "candidate": name, "problem": why} for name, why in problems.items()
    ]


def _searched(
    question: Question,
    space: Space,
    batches: list[Batch],
    jobs: int,
    show: Silence | None,
    latency: bool,
) -> list[dict[str, Any]]:
    from kd_lrp_plugin.search import search  # Optuna takes a second to import

    budget, classes = parse_budget(question.budget), question.num_classes
    candidate_of = partial(_student, num_classes=classes, layers=_of(question.layers))
    students, rows, costs, problems = search(
        *(space, candidate_of, teacher_of(question), batches, question.score, question.search),
        folder=question.file.with_suffix(".search"),
        budget=budget,
        seeds=tuple(question.seeds),
        jobs=jobs,
        show=show,
    )
    records = _ranked(question, rows, costs, problems)
    if latency and "latency" not in budget:
        first = [candidate_of(students[record["candidate"]]) for record in records[:LISTED]]
        timed, _ = costs_of(first, *_shape(batches), True, show)
        known: Costs = {
            name: {**cost, "latency": timed[name]["latency"] if name in timed else None}
            for name, cost in costs.items()
        }
        records = _ranked(question, rows, known, problems)
    return [{**r, "entry": entry_of(students[r["candidate"]], classes)} for r in records]


def _shape(batches: list[Batch]) -> tuple[int, int]:
    """Side of the images, and their channels."""
    images, _ = batches[0]
    return images.shape[-1], images.shape[1]


def keep(
    question: Question, records: Sequence[Mapping[str, Any]], file: Path | None = None
) -> None:
    """Write the record of a choice, the first of the ranking; one that is there already stays.

    Args:
        question: what was asked.
        records: the ranking.
        file: elsewhere, for a look; written anew each time.
    """
    content = {
        "candidate": records[0]["candidate"],
        "entry": records[0]["entry"],
        "question": question.words(),
        "ranking": list(records),
    }
    place = (file or question.file).parent
    with tempfile.NamedTemporaryFile("w", dir=place, encoding="utf-8", delete=False) as draft:
        draft.write(json.dumps(content, indent=2))
    Path(draft.name).chmod(0o644)
    if file:
        Path(draft.name).replace(file)
        return
    try:
        os.link(draft.name, question.file)
    except FileExistsError:  # another process has chosen, and trains its choice
        pass
    except OSError:  # a file system without links
        if not question.file.exists():
            Path(draft.name).replace(question.file)
    Path(draft.name).unlink(missing_ok=True)


def recorded(question: Question) -> Entry:
    """The entry that a record holds.

    Raises:
        ValueError: if it is the record of another question.
    """
    file = question.file
    content = json.loads(file.read_text(encoding="utf-8"))
    asked, now = content["question"], question.words()
    differ = [key for key in now if asked.get(key) != now[key]]
    if differ:
        got = f"another {', '.join(differ)} in {file}"
        fix = "Delete the record to select again, or set them back."
        raise ValueError(message(WHERE, "the question of the record", got, fix))
    return content["entry"]


# --- candidates and teacher ---------------------------------------------------------------------


def candidates_of(question: Question) -> list[Candidate]:
    layers = _of(question.layers)
    return [_candidate(name, entry, layers) for name, entry in entries_of(question).items()]


def _candidate(name: str, entry: Entry, layers: tuple[str, ...] | None) -> Candidate:
    return Candidate(name, builder(entry), layers, _told(entry))


def _student(student: MobileNetV2, num_classes: int, layers: tuple[str, ...] | None) -> Candidate:
    return _candidate(str(student), entry_of(student, num_classes), layers)


def teacher_of(question: Question) -> Teacher:
    checkpoint = question.teacher.get("src_ckpt")
    entry = {"key": question.teacher["key"], "kwargs": dict(question.teacher.get("kwargs") or {})}
    layers = _of(question.teacher_layers)
    return Teacher(builder(entry, checkpoint), bool(checkpoint), layers, _told(entry))


def _of(layers: Sequence[str] | None) -> tuple[str, ...] | None:
    return tuple(layers) if layers else None


def _told(entry: Entry) -> str:
    return json.dumps(entry, sort_keys=True, default=str)


def builder(entry: Entry, checkpoint: str | None = None) -> Callable[[], nn.Module]:
    """Makes the model of an entry, in another process as well."""
    _register()
    check_known(f"{WHERE}: key", entry["key"], MODEL_DICT)
    module = MODEL_DICT[entry["key"]].__module__
    return partial(_build, module, entry["key"], entry["kwargs"], checkpoint)


def _build(module: str, key: str, kwargs: Mapping[str, Any], checkpoint: str | None) -> nn.Module:
    _register(module)
    model = get_model(key, None, **kwargs)
    if checkpoint:
        load_weights(model, checkpoint, f"{WHERE}: teacher")
    return model


def _register(module: str = "__main__") -> None:
    """A new process has registered no models yet: neither ours, nor those of a module."""
    importlib.import_module("kd_lrp_plugin.torchdistill")
    if module != "__main__":
        importlib.import_module(module)
