"""Students that could be chosen, and the teacher that chooses."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd_lrp_plugin.selection.scores.registry import normal_init

Batch = tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]


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


def reason(error: Exception) -> str:
    """Why a candidate fails; a message of the package says it all, others need their type."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def seeded(build: Callable[[], nn.Module], seed: int, init: str = "own") -> nn.Module:
    """A network as it comes with a seed; of the generator, nothing is changed for others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        return normal_init(model) if init == "normal" else model
