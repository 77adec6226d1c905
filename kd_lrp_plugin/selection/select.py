"""A student chosen among untrained ones: ranked or searched, and the choice recorded."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn

from kd_lrp_plugin.models.mobilenetv2 import MobileNetV2
from kd_lrp_plugin.selection.candidates import Candidate, Entry, ScoringSetup, Teacher
from kd_lrp_plugin.selection.ranking import (
    Budget,
    filter_by_budget,
    measure_costs,
    parse_budget,
    rank_candidates,
)
from kd_lrp_plugin.selection.scoring import score_candidates
from kd_lrp_plugin.selection.spaces import Space
from kd_lrp_plugin.selection.spec import WHERE, SelectionSpec, make_entry
from kd_lrp_plugin.utils.files import check_keys, read_json, write_json, write_json_once
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message
from kd_lrp_plugin.utils.workers import Workforce

Builder = Callable[..., Callable[[], nn.Module]]
Costs = dict[str, dict[str, Any]]
LISTED = 40  # of a long ranking: what a table shows, and whose latency is measured
_DRY_RUN: ContextVar[bool] = ContextVar("dry_run", default=False)


def is_dry_run() -> bool:
    """Whether this is inside of :func:`dry_run`."""
    return _DRY_RUN.get()


@contextmanager
def dry_run() -> Iterator[None]:
    """Inside, :func:`diswot_student` makes no choice and writes nothing.

    Where none is recorded, the first candidate that keeps the budget stands for the student, after
    everything that the selection names was built.
    """
    token = _DRY_RUN.set(True)
    try:
        yield
    finally:
        _DRY_RUN.reset(token)


@dataclass(frozen=True)
class Selection:
    """What is asked, and what can build the models that it names.

    Scores are cached beside the record, in ``<record>.scores.jsonl``, and used again.

    Attributes:
        spec: what is asked.
        builder: makes, of an entry of ``models`` and a checkpoint or none, what builds the model;
            that can be pickled.
    """

    spec: SelectionSpec
    builder: Builder

    def rank(
        self, jobs: int | None = None, latency: bool = False, scheduler: str | None = None
    ) -> list[dict[str, Any]]:
        """The candidates that keep the budget, best first.

        Args:
            jobs: processes to share the work; one if None.
            latency: measure it even if the budget does not name it; of a search, that of the
                first :data:`LISTED`.
            scheduler: of dask workers that share the work instead.

        Returns:
            See :func:`kd_lrp_plugin.selection.ranking.rank_candidates`; a candidate that cannot be
            built or run has no costs. Each record has the candidate's "entry" of ``models``.

        Raises:
            ValueError: see :func:`diswot_student`.
        """
        workforce, setup = Workforce(jobs, scheduler), self.setup
        self.spec.file.parent.mkdir(parents=True, exist_ok=True)
        workforce.check(self.spec.file.parent)
        if self.spec.search and self.spec.space:
            return self._search(self.spec.space, workforce, latency)
        candidates, costs, problems = self._measure(latency)
        file = self.spec.file.with_suffix(".scores.jsonl")
        rows = score_candidates(candidates, setup, file, jobs, scheduler)
        entries = self.spec.entries()
        return [{**r, "entry": entries[r["candidate"]]} for r in self._rank(rows, costs, problems)]

    def first_affordable(self) -> Entry:
        """A candidate that keeps the budget, after everything that is asked for was built.

        Raises:
            ValueError: for what :meth:`rank` would stumble over before it scores.
        """
        setup = self.setup
        setup.teacher.build()
        if self.spec.search and self.spec.space:
            return self._make_entry(next(iter(self.spec.space)))
        candidates, _, _ = self._measure()
        return self.spec.entries()[candidates[0].name]

    @cached_property
    def setup(self) -> ScoringSetup:
        """Teacher and images, and what is scored with them."""
        spec = self.spec
        return ScoringSetup(self._teacher(), spec.draw_batches(), [spec.score], tuple(spec.seeds))

    @cached_property
    def budget(self) -> Budget:
        return parse_budget(self.spec.budget)

    def _teacher(self) -> Teacher:
        given, checkpoint = self.spec.teacher, self.spec.teacher.get("src_ckpt")
        entry = {"key": given["key"], "kwargs": dict(given.get("kwargs") or {})}
        layers = _as_tuple(self.spec.teacher_layers)
        return Teacher(self.builder(entry, checkpoint), bool(checkpoint), layers, entry)

    @property
    def _make_entry(self) -> Callable[[MobileNetV2], Entry]:
        spec = self.spec
        return partial(make_entry, num_classes=spec.num_classes, channels=spec.channels)

    def _measure(self, latency: bool = False) -> tuple[list[Candidate], Costs, dict[str, str]]:
        """The candidates that keep the budget, what all cost, and why some cannot be built."""
        layers = _as_tuple(self.spec.layers)
        candidates = [
            Candidate(name, self.builder(entry), layers, entry)
            for name, entry in self.spec.entries().items()
        ]
        latency = latency or "latency" in self.budget
        size, channels = self.setup.image_size, self.setup.channels
        costs, problems = measure_costs(candidates, size, channels, latency)
        self._refuse(problems, len(candidates))
        kept = filter_by_budget(self.budget, costs)
        if over := sorted({*costs} - {*kept}):
            shown = ", ".join([*over[:3], *(["..."] if len(over) > 3 else [])])
            current_progress().note(
                f"outside of the budget: {len(over)} of {len(candidates)} students ({shown})"
            )
        return [candidate for candidate in candidates if candidate.name in kept], costs, problems

    def _search(self, space: Space, workforce: Workforce, latency: bool) -> list[dict[str, Any]]:
        # Optuna takes a second to import, and few selections search.
        from kd_lrp_plugin.selection.search import SearchTask, search

        make_candidate = partial(
            _make_candidate,
            builder=self.builder,
            make=self._make_entry,
            layers=_as_tuple(self.spec.layers),
        )
        task = SearchTask(space, make_candidate, self.setup, self.spec.search, self.budget)
        found = search(
            task, self.spec.file.with_suffix(".search"), workforce.jobs, workforce.scheduler
        )
        costs: Costs = found.costs
        records = self._rank(found.rows, costs, found.problems)
        if latency and "latency" not in self.budget:
            listed = [record["candidate"] for record in records[:LISTED]]
            first = [make_candidate(found.students[name]) for name in listed]
            timed, _ = measure_costs(first, self.setup.image_size, self.setup.channels)
            costs = {
                name: {**cost, "latency": timed.get(name, {}).get("latency")}
                for name, cost in costs.items()
            }
            records = self._rank(found.rows, costs, found.problems)
        return [{**r, "entry": self._make_entry(found.students[r["candidate"]])} for r in records]

    def _rank(
        self, rows: Sequence[Mapping[str, Any]], costs: Costs, problems: Mapping[str, str]
    ) -> list[dict[str, Any]]:
        """The ranking, with those at its end that have no costs."""
        if not rows:
            self._refuse(problems, len(problems))
        records = rank_candidates(rows, costs, self.spec.score)
        failed = {r["candidate"]: r["problem"] for r in records if r["score"] is None}
        self._refuse({**problems, **failed}, len(records) + len(problems))
        nothing = {**dict.fromkeys(records[0]), "front": False}
        return records + [
            {**nothing, "candidate": name, "problem": why} for name, why in problems.items()
        ]

    def _refuse(self, problems: Mapping[str, str], among: int) -> None:
        spec = self.spec
        if problems and (len(problems) == among or not spec.exclude_failures):
            shown = "; ".join(f"{name}: {why}" for name, why in list(problems.items())[:3])
            fix = (
                "Choose another score or other layers, or set exclude_failures: True. What has "
                f"failed is kept beside {spec.file}: delete it there to try again."
            )
            got = f"{len(problems)} without, such as {shown}"
            raise ValueError(message(WHERE, f"a {spec.score} of each", got, fix))


def save_choice(
    spec: SelectionSpec, records: Sequence[Mapping[str, Any]], file: Path | None = None
) -> None:
    """Record a selection, the first of the ranking; one that is there already stays.

    Args:
        spec: what was asked.
        records: the ranking.
        file: elsewhere, for a preview; overwritten each time.
    """
    content = {
        "candidate": records[0]["candidate"],
        "entry": records[0]["entry"],
        "question": spec.identity(),
        "ranking": list(records),
    }
    if file:
        write_json(file, content)
    else:
        write_json_once(spec.file, content)  # another process may train its choice already


def load_choice(spec: SelectionSpec) -> Entry:
    """The entry of a recorded selection.

    Raises:
        ValueError: if it was asked for something else, or is damaged.
    """
    content = read_choice(spec.file)
    asked, now = content["question"], spec.identity()
    differ = [key for key in now if asked.get(key) != now[key]]
    if differ:
        got = f"another {', '.join(differ)} in {spec.file}"
        fix = "Delete the record to select again, or set them back."
        raise ValueError(message(WHERE, "what the record was asked", got, fix))
    return content["entry"]


def read_choice(file: Path) -> dict[str, Any]:
    """A recorded selection, whole.

    Raises:
        ValueError: if it is damaged; names the repair, which scores nothing again.
    """
    fix = (
        "Delete this file and give the same command again: it chooses by the scores that are "
        "cached beside it, and computes none of them again."
    )
    content = read_json(file, fix, candidate=str, entry=dict, question=dict, ranking=list)
    check_keys(file, content["entry"], fix, key=str, kwargs=dict)
    return content


def _make_candidate(
    student: MobileNetV2,
    builder: Builder,
    make: Callable[[MobileNetV2], Entry],
    layers: tuple[str, ...] | None,
) -> Candidate:
    entry = make(student)
    return Candidate(str(student), builder(entry), layers, entry)


def _as_tuple(layers: Sequence[str] | None) -> tuple[str, ...] | None:
    return tuple(layers) if layers else None
