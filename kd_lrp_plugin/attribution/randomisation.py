"""Cascading randomisation: maps of a network whose layers forget what they learnt."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from kd_lrp_plugin.attribution.localisation import rank_correlation
from kd_lrp_plugin.attribution.methods import BATCH, INPUT, attribute
from kd_lrp_plugin.relevance.methods import METHODS
from kd_lrp_plugin.relevance.recording import relevance_maps
from kd_lrp_plugin.utils.validation import check_same_shape


def randomisation(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    maps: Float[Tensor, "n h2 w2"],
    method: str,
    layer: str = INPUT,
    points: int = 4,
) -> dict[str, Float[Tensor, " n"]]:
    """How like its maps are to those of the model once its layers have forgotten what they learnt.

    From the classifier downwards, layer after layer is initialised again. A method whose maps
    stay the same does not explain the model but, say, the edges of the image. The changed network
    is explained for the class that it predicts, for it has learnt none; where the output of that
    is negative, which leaves LRP's maps without a positive part, for its negation.

    Args:
        model: in evaluation mode; left as it is.
        images: as the model takes them.
        maps: of :func:`attribute` by this method, for this model.
        method: a name of :data:`ATTRIBUTIONS`.
        layer: as for :func:`attribute`.
        points: how often to compare, from the classifier alone to all layers.

    Returns:
        From the name of the lowest layer that is new to Spearman's correlation of each pair of
        maps; nan where one of them is the same everywhere. The last entry is a random model.

    Raises:
        ValueError: as :func:`attribute`.

    Reference:
        Adebayo et al., NeurIPS 2018, cascading randomisation (sec. 3.1), Spearman's correlation
        without taking absolute values. Layers are all modules that PyTorch can reset, in the
        reversed order of their definition. Deviations: the class, there the true one; batch norms
        that are reset take their statistics from ``images``, without which the features of a
        random network vanish.
    """
    found = {}
    for name, changed in _forgetting(model, images, points):
        with torch.no_grad():
            logits = changed(images)
        highest, predicted = logits.max(1)
        if method in METHODS:
            signs = functional.one_hot(predicted, logits.shape[1]) * highest.sign()[:, None]
            parts = zip(images.split(BATCH), signs.split(BATCH), strict=True)
            parts_of_maps = (relevance_maps(changed, x, sign, [layer], method) for x, sign in parts)
            again = torch.cat([found[0].detach().cpu() for found in parts_of_maps])
        else:
            again = attribute(changed, images, predicted, method, layer)
        check_same_shape("randomisation", "Give this method's maps.", maps=maps, again=again)
        found[name] = rank_correlation(again, maps)
    return found


def _forgetting(model: nn.Module, images: Tensor, points: int) -> Iterator[tuple[str, nn.Module]]:
    """The same copy of a model, with more and more of its layers reset."""
    copy = deepcopy(model)
    layers = [(n, m) for n, m in copy.named_modules() if hasattr(m, "reset_parameters")][::-1]
    stops = {round(stop) for stop in np.linspace(0, len(layers) - 1, points)}
    norms = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for index, (name, module) in enumerate(layers):
            module.reset_parameters()
            if hasattr(module, "running_mean"):
                norms.append(module)
            if index in stops:
                _measure(copy, norms, images)
                yield name, copy


@torch.no_grad()
def _measure(model: nn.Module, norms: list[Any], images: Tensor) -> None:
    """Let norms take the statistics of images."""
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    model(images)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.eval()
        norm.momentum = momentum
