"""A student chosen among untrained ones: ranked or searched, and the choice recorded."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from kd_lrp_plugin.models.mobilenetv2 import MobileNetV2
from kd_lrp_plugin.selection.candidates import Batch, Candidate, Teacher
from kd_lrp_plugin.selection.ranking import (
    filter_by_budget,
    measure_costs,
    parse_budget,
    rank_candidates,
)
from kd_lrp_plugin.selection.scoring import score_candidates
from kd_lrp_plugin.selection.spaces import Space
from kd_lrp_plugin.selection.spec import (
    WHERE,
    Entry,
    SelectionSpec,
    draw_batches,
    list_entries,
    make_entry,
)
from kd_lrp_plugin.utils.files import read_json, write_json, write_json_once
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message

logger = logging.getLogger(__name__)
Builder = Callable[..., Callable[[], nn.Module]]
Costs = dict[str, dict[str, Any]]
LISTED = 40  # of a long ranking: what a table shows, and whose latency is measured
_PREVIEW: ContextVar[bool] = ContextVar("preview", default=False)


def is_preview() -> bool:
    """Whether this is inside of :func:`preview`."""
    return _PREVIEW.get()


@contextmanager
def preview() -> Iterator[None]:
    """Inside, :func:`diswot_student` makes no choice and writes nothing.

    Where none is recorded, the first candidate that keeps the budget stands for the student, after
    everything that the question names was built.
    """
    token = _PREVIEW.set(True)
    try:
        yield
    finally:
        _PREVIEW.reset(token)


def select(
    question: SelectionSpec,
    builder: Builder,
    jobs: int = 1,
    latency: bool = False,
) -> list[dict[str, Any]]:
    """The ranking of the candidates that keep the budget, best first.

    Scores are kept beside the record, in ``<record>.scores.jsonl``, and used again.

    Args:
        question: what is asked.
        builder: makes, of an entry of ``models`` and a checkpoint or none, what builds the model.
        jobs: processes to share the work.
        latency: measure it even if the budget does not name it; of a search, that of the first
            :data:`LISTED`.

    Returns:
        See :func:`kd_lrp_plugin.selection.ranking.rank_candidates`; a candidate that cannot be
        built or run has no costs. Each record has the candidate's "entry" of ``models``.

    Raises:
        ValueError: see :func:`diswot_student`.
    """
    batches = draw_batches(question)
    question.file.parent.mkdir(parents=True, exist_ok=True)
    if question.search and question.space:
        return _searched(question, builder, question.space, batches, jobs, latency)
    candidates, costs, problems = list_affordable(question, builder, batches, latency)
    rows = score_candidates(
        *(candidates, get_teacher(question, builder), batches, [question.score], question.seeds),
        *(question.file.with_suffix(".scores.jsonl"), jobs),
    )
    records = _ranked(question, rows, costs, problems)
    entries = list_entries(question)
    return [{**record, "entry": entries[record["candidate"]]} for record in records]


def list_affordable(
    question: SelectionSpec,
    builder: Builder,
    batches: list[Batch],
    latency: bool = False,
) -> tuple[list[Candidate], Costs, dict[str, str]]:
    """The candidates that keep the budget, what all cost, and why some cannot be built or run."""
    budget, candidates = parse_budget(question.budget), list_candidates(question, builder)
    latency = latency or "latency" in budget
    costs, problems = measure_costs(candidates, *_shape(batches), latency)
    _refuse(question, problems, len(candidates))
    kept = filter_by_budget(budget, costs)
    if len(kept) < len(costs):
        current_progress().note(
            f"{len(costs) - len(kept)} of {len(candidates)} students are over budget"
        )
    return [candidate for candidate in candidates if candidate.name in kept], costs, problems


def _refuse(question: SelectionSpec, problems: Mapping[str, str], among: int) -> None:
    if problems and (len(problems) == among or not question.exclude_failures):
        shown = "; ".join(f"{name}: {why}" for name, why in list(problems.items())[:3])
        fix = (
            "Choose another score or other layers, or set exclude_failures: True. What has failed "
            f"is kept beside {question.file}: delete it there to try again."
        )
        got = f"{len(problems)} without, such as {shown}"
        raise ValueError(message(WHERE, f"a {question.score} of each", got, fix))


def _ranked(
    question: SelectionSpec,
    rows: Sequence[Mapping[str, Any]],
    costs: Costs,
    problems: Mapping[str, str],
) -> list[dict[str, Any]]:
    """The ranking, with those at its end that have no costs."""
    if not rows:
        _refuse(question, problems, len(problems))
    records = rank_candidates(rows, costs, question.score)
    failed = {r["candidate"]: r["problem"] for r in records if r["score"] is None}
    _refuse(question, {**problems, **failed}, len(records) + len(problems))
    nothing = {**dict.fromkeys(records[0]), "front": False}
    return records + [
        {**nothing, "candidate": name, "problem": why} for name, why in problems.items()
    ]


def _searched(
    question: SelectionSpec,
    builder: Builder,
    space: Space,
    batches: list[Batch],
    jobs: int,
    latency: bool,
) -> list[dict[str, Any]]:
    from kd_lrp_plugin.selection.search import search  # Optuna takes a second to import

    budget, classes = parse_budget(question.budget), question.num_classes
    candidate_of = partial(
        _student, builder=builder, num_classes=classes, layers=_as_tuple(question.layers)
    )
    students, rows, costs, problems = search(
        *(
            space,
            candidate_of,
            get_teacher(question, builder),
            batches,
            question.score,
            question.search,
        ),
        folder=question.file.with_suffix(".search"),
        budget=budget,
        seeds=tuple(question.seeds),
        jobs=jobs,
    )
    records = _ranked(question, rows, costs, problems)
    if latency and "latency" not in budget:
        first = [candidate_of(students[record["candidate"]]) for record in records[:LISTED]]
        timed, _ = measure_costs(first, *_shape(batches), True)
        known: Costs = {
            name: {**cost, "latency": timed[name]["latency"] if name in timed else None}
            for name, cost in costs.items()
        }
        records = _ranked(question, rows, known, problems)
    return [{**r, "entry": make_entry(students[r["candidate"]], classes)} for r in records]


def _shape(batches: list[Batch]) -> tuple[int, int]:
    """Side of the images, and their channels."""
    images, _ = batches[0]
    return images.shape[-1], images.shape[1]


def save_choice(
    question: SelectionSpec, records: Sequence[Mapping[str, Any]], file: Path | None = None
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
    if file:
        write_json(file, content)
    else:
        write_json_once(question.file, content)  # another process may train its choice already


def load_choice(question: SelectionSpec) -> Entry:
    """The entry that a record holds.

    Raises:
        ValueError: if it is the record of another question.
    """
    file = question.file
    fix = "Rename it to select again from the scores that are kept."
    content = read_json(file, fix, question=dict, entry=dict)
    asked, now = content["question"], question.words()
    differ = [key for key in now if asked.get(key) != now[key]]
    if differ:
        got = f"another {', '.join(differ)} in {file}"
        fix = "Delete the record to select again, or set them back."
        raise ValueError(message(WHERE, "the question of the record", got, fix))
    return content["entry"]


def list_candidates(question: SelectionSpec, builder: Builder) -> list[Candidate]:
    layers = _as_tuple(question.layers)
    return [
        _candidate(builder, name, entry, layers) for name, entry in list_entries(question).items()
    ]


def _candidate(
    builder: Builder, name: str, entry: Entry, layers: tuple[str, ...] | None
) -> Candidate:
    return Candidate(name, builder(entry), layers, _describe_entry(entry))


def _student(
    student: MobileNetV2, builder: Builder, num_classes: int, layers: tuple[str, ...] | None
) -> Candidate:
    return _candidate(builder, str(student), make_entry(student, num_classes), layers)


def get_teacher(question: SelectionSpec, builder: Builder) -> Teacher:
    checkpoint = question.teacher.get("src_ckpt")
    entry = {"key": question.teacher["key"], "kwargs": dict(question.teacher.get("kwargs") or {})}
    layers = _as_tuple(question.teacher_layers)
    return Teacher(builder(entry, checkpoint), bool(checkpoint), layers, _describe_entry(entry))


def _as_tuple(layers: Sequence[str] | None) -> tuple[str, ...] | None:
    return tuple(layers) if layers else None


def _describe_entry(entry: Entry) -> str:
    return json.dumps(entry, sort_keys=True, default=str)
