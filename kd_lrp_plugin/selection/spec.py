"""What a selection is asked: checked once, and what a recorded selection must agree on."""

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_lrp_plugin.models.mobilenetv2 import MobileNetV2
from kd_lrp_plugin.selection.candidates import Batch, Entry
from kd_lrp_plugin.selection.ranking import parse_budget
from kd_lrp_plugin.selection.scores.registry import SCORES
from kd_lrp_plugin.selection.spaces import SPACES, Space
from kd_lrp_plugin.utils.validation import check_known, message

WHERE = "diswot_student"
MANY = 2000  # more candidates than anybody wants to score one by one


@dataclass(frozen=True)
class SelectionSpec:
    """What a selection is asked.

    Args:
        num_classes: outputs.
        record: file for the choice, such as one beside the checkpoint.
        data: a data set, by alias; its images are scored, in random batches. None is enough where
            the choice is recorded.
        teacher: an entry of ``models``, by alias; with ``src_ckpt`` it counts as trained.
        candidates: the name of a space, the choices of one ({width: [0.5, 1.0], ...}), or a list
            of timm's names and of entries {key: ..., kwargs: ...} of registered models.
        score: of :data:`kd_lrp_plugin.selection.scores.registry.SCORES`.
        budget: such as ["params=2.5M", "macs=300M", "latency=20ms"], or with a least amount, for
            an assistant between teacher and student: ["params=1M..2.5M"].
        batch_size: images in a batch.
        batches: how many batches.
        seeds: of the initialisations.
        layers: of the students, for maps and features; None for the last map before pooling.
        teacher_layers: the same of the teacher.
        exclude_failures: leave out candidates that cannot be built, run or scored, and say why,
            instead of refusing.
        search: look at so many students of a space by
            :func:`kd_lrp_plugin.selection.search.search`, instead of scoring all of them.

    Raises:
        ValueError: for a value that is none of these.
    """

    num_classes: int
    record: str | Path
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

    def __post_init__(self) -> None:
        for name, least in {"num_classes": 1, "batch_size": 1, "batches": 1, "search": 0}.items():
            value = getattr(self, name)
            self._need(name, isinstance(value, int) and value >= least, f"an integer >= {least}")
        self._need("record", self.record and isinstance(self.record, str | Path), "a file")
        check_known(f"{WHERE}: score", self.score, SCORES)
        example = "Such as [params=2.5M, macs=300M], or [] for none."
        self._need("budget", _lists(self.budget, str), "a list", example)
        parse_budget(self.budget)
        seeds = _lists(self.seeds, int) and len(self.seeds) > 0
        self._need("seeds", seeds, "a list of one integer or more", "Such as [0, 1, 2].")
        for name in ("layers", "teacher_layers"):
            given = getattr(self, name)
            expected = "a list of names, or none"
            self._need(name, given is None or _lists(given, str), expected, "Such as [layer3].")
        fix = "Such as {key: timm_model, kwargs: {name: resnet10t, num_classes: 4}}."
        self._need("teacher", _is_entry(self.teacher), "an entry of models", fix)
        self._check_candidates()
        self._check_data()

    def _need(self, name: str, fits: object, expected: str, fix: str = "") -> None:
        if not fits:
            got = repr(getattr(self, name))
            raise ValueError(message(f"{WHERE}: {name}", expected, got, fix))

    def _check_candidates(self) -> None:
        given, expected = self.candidates, "a space, its choices, or a list of models"
        if isinstance(given, str):
            check_known(f"{WHERE}: candidates", given, SPACES)
        listed = isinstance(given, list | tuple)
        fix = "Such as thesis, {width: [0.5, 1.0]}, or [resnet10t, mobilenetv2_050]."
        fits = given and (listed or isinstance(given, str | Mapping))
        self._need("candidates", fits, expected, fix)
        for item in given if listed else ():
            if not isinstance(item, str) and not _is_entry(item):
                fix = "Such as resnet10t, or {key: timm_model, kwargs: {name: resnet10t}}."
                expected = "names of timm and entries of models"
                raise ValueError(message(f"{WHERE}: candidates", expected, repr(item), fix))
        if self.search and listed:
            fix = "Name a space, or the choices of one."
            raise ValueError(message(f"{WHERE}: search", "a space of candidates", "a list", fix))

    def _check_data(self) -> None:
        data, n = self.data, self.batch_size * self.batches
        if data is None:
            return
        indexed = hasattr(data, "__len__") and hasattr(data, "__getitem__")
        fix = (
            "Alias the data set, not its name: `phantom/train: &images !import_call ...` and "
            "`data: *images`."
        )
        fits = indexed and not isinstance(data, str | Mapping)
        self._need("data", fits, "a data set of images and labels", fix)
        if len(data) < n:
            fix = "Lower batch_size or batches."
            raise ValueError(message(f"{WHERE}: data", f"{n} images", f"{len(data)} images", fix))

    @property
    def file(self) -> Path:
        """Of the record."""
        return Path(os.path.expandvars(self.record)).expanduser()

    @property
    def space(self) -> Space | None:
        """That the candidates are of; None for a list."""
        given = self.candidates
        if isinstance(given, str):
            return SPACES[given]
        return Space(given) if isinstance(given, Mapping) else None

    @cached_property
    def channels(self) -> int:
        """Of the images, and so of the candidates that are named alone; 3 without data."""
        if self.data is None:
            return 3
        with _same_draws():
            return _check_one_shape([self.data[0][0]])[0]

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> "SelectionSpec":
        """What is asked by some keywords, as they stand in YAML.

        Raises:
            ValueError: for one that this class does not have, or needs, or whose value is wrong.
        """
        known = {field.name: field.default is MISSING for field in fields(cls)}
        for key in kwargs:
            check_known(f"{WHERE}: keyword", key, known)
        if missing := [name for name, needed in known.items() if needed and name not in kwargs]:
            fix = "See torchdistill_configs/phantom/diswot."
            raise ValueError(message(WHERE, f"also {', '.join(missing)}", sorted(kwargs), fix))
        return cls(**kwargs)

    def identity(self) -> dict[str, Any]:
        """What a recorded selection must agree on, as JSON; without data, nothing is said of it."""
        teacher = {k: self.teacher.get(k) for k in ("key", "kwargs", "src_ckpt")}
        facts = {
            "num_classes": self.num_classes,
            "candidates": self.space.axes() if self.space else self._list_entries(3),
            "search": self.search,
            "teacher": teacher,
            "score": self.score,
            "budget": list(self.budget),
            "batch_size": self.batch_size,
            "batches": self.batches,
            "seeds": list(self.seeds),
            "layers": [self.layers, self.teacher_layers],
        }
        if self.data is not None:
            with _same_draws():
                shape = _check_one_shape([self.data[0][0]])
            facts["data"] = {"images": len(self.data), "shape": shape}
        return json.loads(json.dumps(facts, default=str))

    def entries(self) -> dict[str, Entry]:
        """The candidates as entries of ``models``, by name, for images of the data's channels.

        Raises:
            ValueError: for too many to score, or two of one name.
        """
        return self._list_entries(self.channels)

    def _list_entries(self, channels: int) -> dict[str, Entry]:
        space = self.space
        if space and len(space) > MANY:
            got, fix = f"{len(space):,}", "Search it, as by search: 500."
            raise ValueError(message(f"{WHERE}: candidates", f"{MANY} or fewer", got, fix))
        given: Any = space or self.candidates
        entries: dict[str, Entry] = {}
        for item in given:
            name, entry = self._name_entry(item, channels)
            if name in entries:
                fix = "Name each candidate once."
                raise ValueError(message(WHERE, "different candidates", name, fix))
            entries[name] = entry
        return entries

    def _name_entry(self, item: Any, channels: int) -> tuple[str, Entry]:
        if isinstance(item, MobileNetV2):
            return str(item), make_entry(item, self.num_classes, channels)
        if isinstance(item, str):
            kwargs: dict[str, Any] = {"name": item, "num_classes": self.num_classes}
            if channels != 3:
                kwargs["timm_kwargs"] = {"in_chans": channels}
            return item, {"key": "timm_model", "kwargs": kwargs}
        kwargs = dict(item.get("kwargs") or {})
        words = [f"{k}={v}" for k, v in kwargs.items() if k != "num_classes"]
        return " ".join([item["key"], *words]), {"key": item["key"], "kwargs": kwargs}

    def draw_batches(self) -> list[Batch]:
        """Random batches of the data, the same in every run, whatever its transform draws.

        Raises:
            ValueError: without data, or for images that are no tensors of one shape.
        """
        if self.data is None:
            fix = "Give the data set by alias; only a choice that is recorded needs none."
            raise ValueError(message(f"{WHERE}: data", "a data set", self.data, fix))
        with _same_draws():
            order = torch.randperm(len(self.data)).tolist()
            drawn = order[: self.batch_size * self.batches]
            images, targets = zip(*(self.data[index][:2] for index in drawn), strict=True)
        _check_one_shape(images)
        stacked = torch.stack(images), torch.tensor(targets)
        return list(zip(*(part.split(self.batch_size) for part in stacked), strict=True))


def make_entry(student: MobileNetV2, num_classes: int, channels: int = 3) -> Entry:
    """A student of a space as an entry of ``models``."""
    kwargs = {**asdict(student), "num_classes": num_classes}
    if channels != 3:
        kwargs["in_chans"] = channels
    return {"key": "timm_mobilenetv2", "kwargs": kwargs}


def _lists(given: object, kind: type) -> bool:
    return isinstance(given, list | tuple) and all(isinstance(item, kind) for item in given)


def _is_entry(given: object) -> bool:
    if not isinstance(given, Mapping) or not isinstance(given.get("key"), str):
        return False
    return isinstance(given.get("kwargs") or {}, Mapping)


def _check_one_shape(images: Sequence[Any]) -> list[int]:
    shapes = {
        str(list(image.shape)) if isinstance(image, Tensor) else type(image).__name__
        for image in images
    }
    if len(shapes) > 1 or not isinstance(images[0], Tensor):
        got = ", ".join(sorted(shapes))
        fix = "Resize them to one size, and make them tensors, by its transform."
        raise ValueError(message(f"{WHERE}: data", "images of one shape, as tensors", got, fix))
    return list(images[0].shape)


@contextmanager
def _same_draws() -> Iterator[None]:
    """What is drawn inside is the same each time, and nothing is changed for others."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
