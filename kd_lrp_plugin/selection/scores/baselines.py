"""Baselines that see no teacher: counts, and what networks show untrained."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_lrp_plugin.selection.scores.observation import Observation, frozen
from kd_lrp_plugin.selection.scores.registry import SCORES, Score
from kd_lrp_plugin.utils.validation import message

RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.LeakyReLU)


def _run_with_inputs(
    network: Observation,
    kinds: tuple[type[nn.Module], ...],
    images: Tensor,
    see: Callable[[Tensor], object],
) -> None:
    """Run the network, and show the input of each module of some kinds."""
    modules = [module for module in network.model.modules() if isinstance(module, kinds)]
    if not modules:
        fix, kind = "Leave this score out for it.", kinds[0].__name__.lstrip("_")
        raise ValueError(message("score", f"a network with modules like {kind}", "none", fix))
    handles = [m.register_forward_pre_hook(lambda _, inputs: see(inputs[0])) for m in modules]
    try:
        with torch.no_grad(), frozen(network.model, network.train_mode):
            network.model(images)
    finally:
        for handle in handles:
            handle.remove()


def nwot(student: Observation, _: Observation) -> float:
    """Negated log determinant of how often rectifiers agree for two images."""
    kernel = torch.zeros(len(student.images), len(student.images), dtype=torch.float64)

    def count(inputs: Tensor) -> None:
        on = (inputs > 0).flatten(1).float()
        kernel.add_((on @ on.T + (1 - on) @ (1 - on).T).cpu())

    _run_with_inputs(student, RECTIFIERS, student.images, count)
    return -float(torch.linalg.slogdet(kernel).logabsdet)


def synflow(student: Observation, _: Observation) -> float:
    """Negated log of the synaptic flow: all weights positive, an image of ones, no rectifier."""
    model = copy.deepcopy(student.model).double().eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, RECTIFIERS):
            model.set_submodule(name, nn.Identity())
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.abs_()
    model(torch.ones_like(student.images[:1], dtype=torch.float64)).sum().backward()
    flows = [(p * p.grad).sum() for p in model.parameters() if p.grad is not None]
    return -math.log(float(torch.stack(flows).sum().detach()))


def bn_log_variance(student: Observation, _: Observation) -> float:
    """Negated sum of the log standard deviations of what batch norms normalise, on noise."""
    found: list[Tensor] = []

    def see(inputs: Tensor) -> None:
        found.append(inputs.var((0, 2, 3), unbiased=False).mean().log() / 2)

    # Drawn in the plain order and then laid out as the images are: randn_like draws in theirs.
    images = student.images
    noise = torch.empty_like(images).copy_(torch.randn(images.shape, dtype=images.dtype))
    _run_with_inputs(student, (_BatchNorm,), noise, see)
    return -float(torch.stack(found).sum())


for _name, _score in {
    "parameters": Score(lambda s, _: -float(s.parameters), "a count", sees_teacher=False),
    "macs": Score(lambda s, _: -float(s.macs), "a count", sees_teacher=False),
    "nwot": Score(nwot, "Mellor et al., ICML 2021, in its second version", "own", False),
    "synflow": Score(synflow, "Tanaka et al., NeurIPS 2020, without rectifiers", "own", False),
    "bn_log_variance": Score(
        bn_log_variance, "Lin et al., ICCV 2021, its term for batch norms", "normal", False
    ),
}.items():
    SCORES.register(_score, _name)
