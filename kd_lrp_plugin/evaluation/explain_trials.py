"""Which methods can explain a model, tried on a few images, and how long they will take."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd_lrp_plugin.attribution import faithfulness
from kd_lrp_plugin.attribution.methods import ATTRIBUTIONS, INPUT, attribute
from kd_lrp_plugin.relevance.recording import record

TIMED = 8  # images, to see how long a quick method takes
SLOW = "takes long; kd-lrp explain --full has it, or --method with its name"


class Trial(NamedTuple):
    """What is known of a model's methods.

    Attributes:
        methods: those that can handle it.
        without: why not the others, by method.
        seconds: for a map of an image, by method; under "", for the model's output.
    """

    methods: list[str]
    without: dict[str, str]
    seconds: dict[str, float]

    def estimate(self, method: str, images: int, few: int) -> float:
        """Seconds, roughly, that the metrics of a method take.

        Args:
            method: one that can handle the model.
            images: how many get a map.
            few: how many of them serve what asks the model again and again.
        """
        slow = ATTRIBUTIONS[method].slow
        again = 2 * (few // 4) if slow else 4 * (few // 2)  # maps of networks made random
        asked = 2 * (faithfulness.STEPS + 1) * few
        maps = (min(images, few) if slow else images) + again
        return maps * self.seconds[method] + asked * self.seconds[""]


def find_layers(model: nn.Module, asked: Sequence[str]) -> list[str]:
    """Those asked for, which must be there; else the one chosen, or the input if none can be."""
    if asked:
        with record(model, [*asked]) as recording:
            return recording.layers
    try:
        return choose_layer(model)
    except ValueError:  # methods without layers do not mind; of the others it is said why
        return [INPUT]


def choose_layer(model: nn.Module) -> list[str]:
    """The deepest before the last reduction."""
    with record(model, "auto") as recording:
        return recording.layers[-1:]


def try_methods(
    model: nn.Module,
    layers: Sequence[str],
    images: Float[Tensor, "n c h w"],
    targets: Int[Tensor, " n"],
    methods: Sequence[str] = (),
    quick: bool = False,
) -> Trial:
    """Try methods on a few images.

    Args:
        model: in evaluation mode.
        layers: of :func:`find_layers`.
        images: as the model takes them; the first are enough.
        targets: one class index per image.
        methods: each of them must work; without any, all are tried.
        quick: without ``methods``, leave out what takes long, unless nothing else works.

    Raises:
        ValueError: if one of ``methods``, or no method at all, can handle the model.
    """
    refused: dict[str, ValueError] = {}
    asked = [*methods] or [*ATTRIBUTIONS]
    later = [name for name in asked if ATTRIBUTIONS[name].slow] if quick and not methods else []
    images, targets = images[:TIMED], targets[:TIMED]
    started = time.perf_counter()
    with torch.no_grad():
        model(images)
    seconds = {"": (time.perf_counter() - started) / len(images)}

    def find_able(names: Sequence[str]) -> list[str]:
        for name in names:
            n = 1 if ATTRIBUTIONS[name].slow else len(images)
            started = time.perf_counter()
            try:
                for layer in layers:
                    if layer == INPUT and ATTRIBUTIONS[name].layered:
                        choose_layer(model)  # raises what left the model without one
                    attribute(model, images[:n], targets[:n], name, layer)
            except ValueError as error:
                refused[name] = error
            seconds[name] = (time.perf_counter() - started) / n / len(layers)
        return [name for name in names if name not in refused]

    able = find_able([name for name in asked if name not in later])
    if not able and later:
        able, later = find_able(later), []
    if refused and (methods or not able):
        raise next(iter(refused.values()))
    reasons = {name: str(error) for name, error in refused.items()}
    return Trial(able, reasons | dict.fromkeys(later, SLOW), seconds)
