r"""How relevance is handed back through one layer: one short declaration per rule.

Everything works in *gradient space*: a tensor ``x`` carries a factor ``g`` and its relevance is
``x * g``. Handing relevance back means turning the factor of a layer's output into the factor of
its input. Whatever is linear without bias (sums, pooling, reshaping) then needs no rule, for
there the factor is the gradient.

A rule serves one affine layer, a convolution together with the batch norm behind it or a linear
layer, with input ``x``, output ``y``, effective weight ``w`` and its linear map ``layer``:

    ``rule(g, x, y, w, layer) -> factor of x``

It must be differentiable twice, for a loss on the maps derives it again, and may not write into
what it is given.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from kd_lrp_plugin.relevance.linear_maps import LinearMap
from kd_lrp_plugin.utils.registry import Registry

EPSILON = 1e-7
"""Stabiliser of every division, in parts of the size of what it divides by."""
GAMMA = 0.25
"""How much more the gamma rule counts contributions with the sign of the output."""


def stabilize(z: Tensor) -> Tensor:
    """``z`` moved away from zero by :data:`EPSILON` of its size; zero counts as positive.

    The size is that of a layer for one sample: the mean of ``|z|`` over all axes but the first,
    rounded down to a power of two. So relevance depends on the scale of the weights as little as
    the layer does, and the images of a batch do not mix. Rounding makes the size a constant
    between two powers of two: the derivative that takes it for one is exact, at no cost.

    Source: zennit's ``Stabilizer(norm_scale=True)`` has the root mean square. Deviation: the mean,
    whose sum does not overflow, and the rounding.
    """
    with torch.no_grad():
        # log2 of 0 is -inf, and of a layer that is all zero the smallest number stays, for 0 / 0.
        axes = tuple(range(1, z.ndim))
        size = z.abs() if not axes else torch.linalg.vector_norm(z, 1, axes)
        size = size * (len(z) / max(z.numel(), 1))
        shift = (EPSILON * size.log2().floor().exp2()).clamp(min=torch.finfo(z.dtype).tiny)
        shift = shift.view(-1, *[1] * (z.ndim - 1))
        # Twenty times faster than torch.where on the CPU. A zero with a minus sign counts as
        # negative, which no ratio tells: without contributions there is none to hand back.
        shift = torch.copysign(shift, z)
    return z + shift


Rule: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, LinearMap], Tensor]
RULES: Registry[Rule] = Registry("rule")


@RULES.register
def gradient(g: Tensor, x: Tensor, y: Tensor, w: Tensor, layer: LinearMap) -> Tensor:
    """The gradient, which is LRP-0 without bias (Bach et al., PLOS ONE 2015, eq. 56)."""
    return layer.transpose(g, w)


@RULES.register
def epsilon(g: Tensor, x: Tensor, y: Tensor, w: Tensor, layer: LinearMap) -> Tensor:
    """LRP-ε: in proportion to each contribution (Bach et al., PLOS ONE 2015, eq. 58)."""
    return layer.transpose(g * (y / stabilize(y)), w)


@RULES.register
def zplus(g: Tensor, x: Tensor, y: Tensor, w: Tensor, layer: LinearMap) -> Tensor:
    """LRP-z⁺, also α1β0: in proportion to the positive contributions alone.

    Source: Bach et al., PLOS ONE 2015, eq. 60 with α = 1; Montavon et al., Pattern Recognition
    65 (2017), for inputs that are never negative.
    """
    upper, lower, below = w.clamp(min=0), w.clamp(max=0), _find_negative(x)
    positive = _split_apply(x, below, upper, lower, layer)
    return _split_transpose(g * (y / stabilize(positive)), below, upper, lower, layer)


@RULES.register
def gamma(g: Tensor, x: Tensor, y: Tensor, w: Tensor, layer: LinearMap) -> Tensor:
    """LRP-γ: contributions with the sign of the output count 1 + γ times.

    Source: Montavon et al., Explainable AI, LNCS 11700 (2019), ch. 10.2, for positive outputs.
    Deviation: a negative output (of a linear bottleneck, or a logit) prefers its negative
    contributions in the same way; with positive ones its denominator could vanish.
    """
    upper, lower, below = w.clamp(min=0), w.clamp(max=0), _find_negative(x)
    is_positive = y >= 0
    positive = _split_apply(x, below, upper, lower, layer)
    negative = _split_apply(x, below, lower, upper, layer)
    ratio = g * (y / stabilize(y + GAMMA * torch.where(is_positive, positive, negative)))
    return (
        layer.transpose(ratio, w)
        + GAMMA * _split_transpose(ratio * is_positive, below, upper, lower, layer)
        + GAMMA * _split_transpose(ratio * ~is_positive, below, lower, upper, layer)
    )


def _find_negative(x: Tensor) -> Tensor | None:
    """Where ``x`` is negative; None behind a ReLU, where half of the work falls away."""
    below = x.detach() < 0
    return below if bool(below.any()) else None


def _split_apply(
    x: Tensor, below: Tensor | None, w_above: Tensor, w_below: Tensor, layer: LinearMap
) -> Tensor:
    """Positive inputs through one weight plus negative inputs through another."""
    total = layer.apply(x.clamp(min=0), w_above)
    if below is not None:
        total = total + layer.apply(x.clamp(max=0), w_below)
    return total


def _split_transpose(
    r: Tensor, below: Tensor | None, w_above: Tensor, w_below: Tensor, layer: LinearMap
) -> Tensor:
    """The transpose of :func:`_split_apply`."""
    back = layer.transpose(r, w_above)
    if below is not None:
        back = torch.where(below, layer.transpose(r, w_below), back)
    return back


def activation(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """An activation hands its relevance on unchanged: ``x * g_x = y * g`` (Bach et al. 2015)."""
    return g * (y / stabilize(x))


def uniform(g: Tensor) -> Tensor:
    """A product of two matrices hands half to each (Achtibat et al., ICML 2024, prop. 3.3)."""
    return g / 2


def hard_sigmoid_gradient(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The plain gradient, written out because PyTorch cannot differentiate its own again."""
    return g * ((x > -3) & (x < 3)) / 6
