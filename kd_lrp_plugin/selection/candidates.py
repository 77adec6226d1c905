"""Students that could be chosen, and the teacher that chooses."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd_lrp_plugin.selection.scores.registry import normal_init

Batch = tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]
Entry = dict[str, Any]  # {"key": ..., "kwargs": ...}, as under ``models``


@dataclass(frozen=True)
class Candidate:
    """A student that could be chosen.

    Attributes:
        name: unique among the candidates.
        build: makes it, with the initialisation that PyTorch's generator gives; can be pickled.
        layers: where maps and features are taken from; None for the last map before pooling.
        entry: what it is under ``models``: cached scores are of this.
    """

    name: str
    build: Callable[[], nn.Module]
    layers: tuple[str, ...] | None = None
    entry: Entry | None = None

    @property
    def identity(self) -> tuple[str, str, str]:
        """What its cached scores are filed under."""
        return self.name, repr(self.layers), describe_entry(self.entry)


@dataclass(frozen=True)
class Teacher:
    """The teacher of a selection.

    Attributes:
        build: makes it, weights included if it is trained; can be pickled.
        trained: a trained one runs in evaluation mode and keeps its weights over the seeds.
        layers: as of a candidate.
        entry: as of a candidate; tells what its weights do not show, such as a rate of dropout.
    """

    build: Callable[[], nn.Module]
    trained: bool
    layers: tuple[str, ...] | None = None
    entry: Entry | None = None


@dataclass(frozen=True)
class ScoringSetup:
    """What candidates are scored by.

    Attributes:
        teacher: see :class:`Teacher`.
        batches: images and class indices.
        scores: of :data:`kd_lrp_plugin.selection.scores.registry.SCORES`.
        seeds: of the initialisations, of student and, unless it is trained, teacher.
    """

    teacher: Teacher
    batches: Sequence[Batch]
    scores: Sequence[str]
    seeds: Sequence[int] = (0,)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        height, width = self.batches[0][0].shape[-2:]
        return height, width

    @property
    def channels(self) -> int:
        return self.batches[0][0].shape[1]


def describe_entry(entry: Entry | None) -> str:
    """An entry as text, the same whatever the order of its keys; nothing for none."""
    return "" if entry is None else json.dumps(entry, sort_keys=True, default=str)


def describe_failure(error: Exception) -> str:
    """Why a candidate fails; a message of the package says it all, others need their type."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def build_seeded(build: Callable[[], nn.Module], seed: int, init: str = "own") -> nn.Module:
    """A network as it comes with a seed; of the generator, nothing is changed for others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        return normal_init(model) if init == "normal" else model
