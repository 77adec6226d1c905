"""Batch norm and layer norm as the affine maps that relevance sees."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm


def batch_variance(x: Float[Tensor, "n c *map"]) -> Float[Tensor, " c"]:
    """Biased variance of each channel over batch and map, as train-mode batch norm has it."""
    return _BatchVariance.apply(x)


class _BatchVariance(torch.autograd.Function):
    """``x.var`` over those axes, which PyTorch computes several times more slowly on the CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        axes = [0, *range(2, x.ndim)]
        mean = x.mean(axes, keepdim=True)
        ctx.save_for_backward(x, mean)
        return (x - mean).square_().mean(axes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        if torch.is_grad_enabled():  # derived again: the mean depends on x
            mean = x.mean([0, *range(2, x.ndim)], keepdim=True)
        weight = (grads[0] * (2 * x.shape[1] / x.numel())).view_as(mean)
        return (x - mean) * weight


def norm_tensors(norm: BatchNorm, weight: Tensor | None, raw: Tensor) -> tuple[Tensor | None, ...]:
    """What :func:`norm_scale` needs: the norm's weight, and the variance or where it is from."""
    if norm.training or norm.running_var is None:
        return weight, None, raw
    return weight, norm.running_var, None


def norm_scale(
    eps: float, weight: Tensor | None, variance: Tensor | None, raw: Tensor | None
) -> Tensor:
    """γ/√(variance + eps): batch norm as the affine map that relevance sees.

    The variance of a batch stays in the graph: no relevance flows through it, but the derivative
    of a loss on the map does.
    """
    if variance is None:
        assert raw is not None  # one of the two, by norm_tensors
        variance = batch_variance(raw)
    scale = (variance + eps).rsqrt()
    return scale if weight is None else scale * weight


def layer_norm_factor(
    g: Tensor, weight: Tensor | None, x: Tensor, axes: tuple[int, ...], eps: float
) -> Tensor:
    r"""The factor in front of a layer norm, whose deviation counts as a constant.

    .. math:: h = g \gamma / \sigma, \quad g_x = h - \mathrm{mean}(h)

    over the normalised axes. So the relevance in front is that behind, without the bias; of the
    plain gradient it would be zero, for the norm does not depend on the scale of its input. As
    in :func:`norm_scale` the deviation stays in the graph.

    Source: Achtibat et al., ICML 2024 (AttnLRP), proposition 3.4. Deviation: none.
    """
    scale = (x.var(axes, correction=0, keepdim=True) + eps).rsqrt()
    h = g * scale if weight is None else g * weight * scale
    return h - h.mean(axes, keepdim=True)
