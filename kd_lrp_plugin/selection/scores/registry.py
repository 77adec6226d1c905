"""The registry of scores, and the initialisation that DisWOT's code draws."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from kd_lrp_plugin.selection.scores.observation import Observation
from kd_lrp_plugin.utils.registry import Registry

Function = Callable[[Observation, Observation], float]


@dataclass(frozen=True)
class Score:
    """A registered score.

    Attributes:
        function: of the student's and the teacher's observation; lower is better.
        source: where it is from.
        init: "own", each network as it was built, or "normal", all weights drawn from N(0, 1) as
            DisWOT's code does (:func:`normal_init`), student and teacher alike.
        sees_teacher: whether the teacher matters.
    """

    function: Function
    source: str
    init: Literal["own", "normal"] = "own"
    sees_teacher: bool = True


SCORES: Registry[Score] = Registry("score")


def normal_init(model: nn.Module) -> nn.Module:
    """Weights of convolutions and linear layers from N(0, 1), biases 0, norms 1 and 0; in place.

    Reference:
        The published code of DisWOT, and Zen-NAS (Lin et al., ICCV 2021) before it.
    """
    with torch.no_grad():
        for module in model.modules():
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if isinstance(weight, nn.Parameter):
                drawn = isinstance(module, nn.Conv2d | nn.Linear)
                nn.init.normal_(weight) if drawn else nn.init.ones_(weight)
            if isinstance(bias, nn.Parameter):
                nn.init.zeros_(bias)
    return model
