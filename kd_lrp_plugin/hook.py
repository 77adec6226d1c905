"""The rim, continued: a student model that chooses itself when torchdistill builds it."""

import importlib
import json
import logging
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchdistill.models.registry import MODEL_DICT, get_model, register_model

from kd_lrp_plugin.checks import check_known, message, strict
from kd_lrp_plugin.processes import launched
from kd_lrp_plugin.progress import Silence, listening
from kd_lrp_plugin.scores import SCORES
from kd_lrp_plugin.selection import (
    Batch,
    Candidate,
    Teacher,
    costs_of,
    measure,
    parse_budget,
    ranking,
    within,
)
from kd_lrp_plugin.spaces import SPACES, MobileNetV2, Space
from kd_lrp_plugin.students import load_weights

logger = logging.getLogger(__name__)

Entry = dict[str, Any]  # {"key": ..., "kwargs": ...}, as under ``models``


@dataclass(frozen=True)
class Question:
    """What a selection is asked.

    Args:
        num_classes: outputs.
        record: file for the choice, such as one beside the checkpoint.
        data: a data set, by alias; its images are scored, in random batches.
        teacher: an entry of ``models``, by alias; with ``src_ckpt`` it counts as trained.
        candidates: the name of a space, the choices of one ({width: [0.5, 1.0], ...}), or a list
            of timm's names and of entries {key: ..., kwargs: ...} of registered models.
        score: of :data:`kd_lrp_plugin.scores.SCORES`.
        budget: such as ["params=2.5M", "macs=300M", "latency=20ms"].
        batch_size: images in a batch.
        batches: how many batches.
        seeds: of the initialisations.
        layers: of the students, for maps and features; None for the last map before pooling.
        teacher_layers: the same of the teacher.
        exclude_failures: leave out candidates whose score fails, instead of refusing.
        search: look at so many students of a space by :func:`kd_lrp_plugin.search.search`, instead
            of scoring all of them.
    """

    num_classes: int
    record: str
    data: Any
    teacher: Mapping[str, Any]
    candidates: Any = "thesis"
    score: str = "diswot"
    budget: Sequence[str] = ()
    batch_size: int = 32
    batches: int = 1
    seeds: Sequence[int] = (0,)
    layers: Sequence[str] | None = None
    teacher_layers: Sequence[str] | None = None
    exclude_failures: bool = False
    search: int = 0

    @property
    def file(self) -> Path:
        """Of the record."""
        return Path(os.path.expandvars(self.record)).expanduser()

    def words(self) -> dict[str, Any]:
        """What a record must agree on, as JSON."""
        teacher = {k: self.teacher.get(k) for k in ("key", "kwargs", "src_ckpt")}
        space = space_of(self)
        told = {
            "candidates": space.axes() if space else entries_of(self),
            "search": self.search,
            "teacher": teacher,
            "score": self.score,
            "budget": list(self.budget),
            "batch_size": self.batch_size,
            "batches": self.batches,
            "seeds": list(self.seeds),
            "layers": [self.layers, self.teacher_layers],
        }
        return json.loads(json.dumps(told, default=str))


ask = strict("diswot_student")(Question)


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
            budget that no candidate keeps, or a candidate whose score fails.

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
    rank, _ = launched()
    while rank > 0 and not question.file.exists():  # torchrun ends this process if the first fails
        time.sleep(0.2)
    if not question.file.exists():
        with torch.random.fork_rng(devices=[]):  # a run is the same with the record and without
            found = select(question, show=listening())
        keep(question, found)
        logger.warning(
            "%s chose %s; recorded in %s", question.score, found[0]["candidate"], question.file
        )
    entry = recorded(question)
    model = builder(entry)()
    model.__dict__["chosen"] = entry  # the driver writes it into its summary
    return model


register_model(diswot_student, key="diswot_student")


# --- selecting ----------------------------------------------------------------------------------


def select(
    question: Question, jobs: int = 1, show: Silence | None = None, latency: bool = False
) -> list[dict[str, Any]]:
    """The ranking of the candidates that keep the budget, best first.

    Scores are kept beside the record, in ``<record>.scores.jsonl``, and used again.

    Raises:
        ValueError: see :func:`diswot_student`.
    """
    check_known("diswot_student: score", question.score, SCORES)
    budget = parse_budget(question.budget)
    batches = batches_of(question)
    question.file.parent.mkdir(parents=True, exist_ok=True)
    if question.search:
        return _searched(question, batches, budget, show)
    candidates = candidates_of(question)
    size, channels = batches[0][0].shape[-1], batches[0][0].shape[1]
    costs = costs_of(candidates, size, channels, latency or "latency" in budget, show)
    kept = within(budget, costs)
    if show and len(kept) < len(candidates):
        show.note(f"{len(candidates) - len(kept)} of {len(candidates)} students are over budget")
    candidates = [candidate for candidate in candidates if candidate.name in kept]
    scores = question.file.with_suffix(".scores.jsonl")
    rows = measure(
        *(candidates, teacher_of(question), batches, [question.score], question.seeds),
        *(scores, jobs, show),
    )
    records = ranking(rows, costs, question.score)
    failed = [record for record in records if record["score"] is None]
    if failed and (len(failed) == len(records) or not question.exclude_failures):
        shown = "; ".join(f"{r['candidate']}: {r['problem']}" for r in failed[:3])
        fix = "Choose another score or other layers, or set exclude_failures: True."
        got = f"{len(failed)} without, such as {shown}"
        raise ValueError(message("diswot_student", f"a {question.score} of each", got, fix))
    entries = entries_of(question)
    return [{**record, "entry": entries[record["candidate"]]} for record in records]


def _searched(
    question: Question, batches: list[Batch], budget: dict[str, float], show: Silence | None
) -> list[dict[str, Any]]:
    space = space_of(question)
    if space is None:
        got, fix = "a list", "Name a space, or the choices of one."
        raise ValueError(message("diswot_student: search", "a space of candidates", got, fix))
    from kd_lrp_plugin.search import search  # Optuna takes a second to import

    students, rows, costs = search(
        space,
        lambda student: builder(_entry(student, question.num_classes)),
        teacher_of(question),
        batches,
        question.score,
        question.search,
        folder=question.file.with_suffix(".search"),
        budget=budget,
        seeds=tuple(question.seeds),
        layers=tuple(question.layers) if question.layers else None,
        show=show,
    )
    found = ranking(rows, costs, question.score)
    classes = question.num_classes
    return [{**r, "entry": _entry(students[r["candidate"]], classes)} for r in found]


def keep(question: Question, records: Sequence[Mapping[str, Any]]) -> None:
    """Write the record of a choice: the first of the ranking."""
    file = question.file
    content = {
        "candidate": records[0]["candidate"],
        "entry": records[0]["entry"],
        "question": question.words(),
        "ranking": list(records),
    }
    draft = file.with_name(f"{file.name}.draft")
    draft.write_text(json.dumps(content, indent=2), encoding="utf-8")
    draft.replace(file)


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
        raise ValueError(message("diswot_student", "the question of the record", got, fix))
    return content["entry"]


# --- candidates, teacher, data ------------------------------------------------------------------


MANY = 2000  # more candidates than anybody wants to score one by one


def space_of(question: Question) -> Space | None:
    """The space that the candidates are; None for a list."""
    given = question.candidates
    if isinstance(given, str):
        check_known("diswot_student: candidates", given, SPACES)
        return SPACES[given]
    return Space(given) if isinstance(given, Mapping) else None


def _entry(student: MobileNetV2, num_classes: int) -> Entry:
    return {"key": "timm_mobilenetv2", "kwargs": {**asdict(student), "num_classes": num_classes}}


def entries_of(question: Question) -> dict[str, Entry]:
    """The candidates as entries of ``models``, by name."""
    space = space_of(question)
    if space and len(space) > MANY:
        got, fix = f"{len(space):,}", "Search it, as by search: 500."
        expected = f"{MANY} candidates or fewer"
        raise ValueError(message("diswot_student: candidates", expected, got, fix))
    given: Any = space or question.candidates
    classes = {"num_classes": question.num_classes}
    entries: dict[str, Entry] = {}
    for item in given:
        if isinstance(item, MobileNetV2):
            name, entry = str(item), _entry(item, question.num_classes)
        elif isinstance(item, str):
            entry, name = {"key": "timm_model", "kwargs": {"name": item, **classes}}, item
        else:
            entry = {"key": item["key"], "kwargs": dict(item.get("kwargs") or {})}
            check_known("diswot_student: candidates: key", entry["key"], MODEL_DICT)
            words = [f"{k}={v}" for k, v in entry["kwargs"].items() if k != "num_classes"]
            name = " ".join([entry["key"], *words])
        if name in entries:
            fix = "Name each candidate once."
            raise ValueError(message("diswot_student", "different candidates", name, fix))
        entries[name] = entry
    return entries


def candidates_of(question: Question) -> list[Candidate]:
    layers = tuple(question.layers) if question.layers else None
    entries = entries_of(question).items()
    return [Candidate(name, builder(entry), layers) for name, entry in entries]


def teacher_of(question: Question) -> Teacher:
    checkpoint = question.teacher.get("src_ckpt")
    entry = {"key": question.teacher["key"], "kwargs": dict(question.teacher["kwargs"])}
    layers = tuple(question.teacher_layers) if question.teacher_layers else None
    return Teacher(builder(entry, checkpoint), bool(checkpoint), layers)


def batches_of(question: Question) -> list[Batch]:
    """Random batches of the data, the same in every run, whatever its transform draws."""
    n = question.batch_size * question.batches
    if len(question.data) < n:
        got, fix = f"{len(question.data)} images", "Lower batch_size or batches."
        raise ValueError(message("diswot_student", f"{n} images", got, fix))
    # Transforms draw from the global generators.
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        places = torch.randperm(len(question.data))[:n].tolist()
        images, targets = zip(*(question.data[place] for place in places), strict=True)
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    sizes = question.batch_size
    stacked = torch.stack(images).split(sizes), torch.tensor(targets).split(sizes)
    return list(zip(*stacked, strict=True))


def builder(entry: Entry, checkpoint: str | None = None) -> Callable[[], nn.Module]:
    """Makes the model of an entry, in another process as well."""
    check_known("diswot_student: key", entry["key"], MODEL_DICT)
    module = MODEL_DICT[entry["key"]].__module__
    return partial(_build, module, entry["key"], entry["kwargs"], checkpoint)


def _build(module: str, key: str, kwargs: Mapping[str, Any], checkpoint: str | None) -> nn.Module:
    importlib.import_module("kd_lrp_plugin.torchdistill")
    if module != "__main__":
        importlib.import_module(module)  # a new process has registered nothing yet
    model = get_model(key, None, **kwargs)
    if checkpoint:
        load_weights(model, checkpoint, "diswot_student: teacher")
    return model
