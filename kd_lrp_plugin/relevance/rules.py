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
from typing import Any, TypeAlias

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
        # Twenty times faster than torch.where on the CPU. A zero with a minus sign counts as
        # negative, which no ratio tells: without contributions there is none to hand back.
        shift = torch.copysign(_get_shift(z), z)
    return z + shift


@torch.no_grad()
def _get_shift(z: Tensor) -> Tensor:
    """How far :func:`stabilize` moves, for each sample."""
    # log2 of 0 is -inf, and of a layer that is all zero the smallest number stays, for 0 / 0.
    axes = tuple(range(1, z.ndim))
    size = z.abs().mean(axes, keepdim=True) if axes else z.abs()
    return (EPSILON * size.log2().floor().exp2()).clamp(min=torch.finfo(z.dtype).tiny)


def share(g: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """``g * (y / stabilize(z))``, with its derivative, in a third of the passes over memory."""
    return _Share.apply(g, y, z, _get_shift(z))


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, y: Tensor, z: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(g, y, z, shift)
        stable = torch.copysign(shift, z).add_(z)
        return torch.div(y, stable, out=stable).mul_(g)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g, y, z, shift = ctx.saved_tensors
        need_g, need_y, need_z, _ = ctx.needs_input_grad
        stable = torch.copysign(shift, z.detach()).add_(z)
        part = grads[0] / stable
        of_y = part * g if need_y or need_z else None
        of_z = (of_y * y / stable).neg_() if of_y is not None and need_z else None
        return part * y if need_g else None, of_y, of_z, None


Rule: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, LinearMap], Tensor]
RULES: Registry[Rule] = Registry("rule")


@RULES.register
def gradient(g: Tensor, x: Tensor, y: Tensor, w: Tensor, layer: LinearMap) -> Tensor:
    """The gradient, which is LRP-0 without bias (Bach et al., PLOS ONE 2015, eq. 56)."""
    return layer.transpose(g, w)


@RULES.register
def epsilon(g: Tensor, x: Tensor, y: Tensor, w: Tensor, layer: LinearMap) -> Tensor:
    """LRP-ε: in proportion to each contribution (Bach et al., PLOS ONE 2015, eq. 58)."""
    return layer.transpose(share(g, y, y), w)


@RULES.register
def zplus(g: Tensor, x: Tensor, y: Tensor, w: Tensor, layer: LinearMap) -> Tensor:
    """LRP-z⁺, also α1β0: in proportion to the positive contributions alone.

    Source: Bach et al., PLOS ONE 2015, eq. 60 with α = 1; Montavon et al., Pattern Recognition
    65 (2017), for inputs that are never negative.
    """
    upper = w.relu()
    if not _may_be_negative(x, layer):
        return layer.transpose(share(g, y, layer.apply(x, upper)), upper)
    lower, above = w - upper, x.relu()
    below, axis = x - above, layer.channel_axis
    if axis is None:
        r = share(g, y, layer.apply(above, upper) + layer.apply(below, lower))
        of_above, of_below = layer.transpose(r, upper), layer.transpose(r, lower)
    else:  # side by side, as one layer
        weights = torch.cat([upper, lower], 1)
        r = share(g, y, layer.apply(torch.cat([above, below], axis), weights))
        of_above, of_below = layer.transpose(r, weights).chunk(2, axis)
    # Many times faster than torch.where on the CPU, and between 0 and 1 as exact.
    return torch.lerp(of_above, of_below, (1 - _get_sign(x)) / 2)


@RULES.register
def gamma(g: Tensor, x: Tensor, y: Tensor, w: Tensor, layer: LinearMap) -> Tensor:
    """LRP-γ: contributions with the sign of the output count 1 + γ times.

    Source: Montavon et al., Explainable AI, LNCS 11700 (2019), ch. 10.2, for positive outputs.
    Deviation: a negative output (of a linear bottleneck, or a logit) prefers its negative
    contributions in the same way; with positive ones its denominator could vanish.

    With ``s`` the sign of the output, the contributions ``c`` of that sign are ``(c + s |c|) / 2``:
    the layer itself and that of the absolute values are all it takes, whatever the signs.
    """
    is_signed, size, sign = _may_be_negative(x, layer), w.abs(), _get_sign(y)
    axis = None if is_signed else layer.channel_axis
    if axis is None:
        total, spread = layer.apply(x, w), layer.apply(x.abs() if is_signed else x, size)
    else:
        total, spread = layer.apply(x, torch.cat([w, size])).chunk(2, axis)
    r = share(g, y, y + GAMMA / 2 * (total + sign * spread))
    if axis is None:
        favoured = layer.transpose(sign * r, GAMMA / 2 * size)
        return layer.transpose(r, (1 + GAMMA / 2) * w) + (
            _get_sign(x) * favoured if is_signed else favoured
        )
    weights = torch.cat([(1 + GAMMA / 2) * w, GAMMA / 2 * size])
    return layer.transpose(torch.cat([r, sign * r], axis), weights)


WITHOUT_VALUES: frozenset[Rule] = frozenset({gradient, epsilon, zplus, gamma})
"""Rules whose result is linear in the transposes in it: to derive it, nobody reads their values."""


def _may_be_negative(x: Tensor, layer: LinearMap) -> bool:
    """False where nothing is below zero, as behind a ReLU, where half of the work falls away."""
    if layer.is_nonnegative or not x.numel():
        return False
    # To ask another device is to wait for it, which costs more than the other half.
    return x.device.type != "cpu" or bool(x.detach().amin() < 0)


def _get_sign(x: Tensor) -> Tensor:
    """1 or -1; zero counts as positive."""
    return torch.copysign(x.new_ones(()), x.detach())


def activation(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """An activation hands its relevance on unchanged: ``x * g_x = y * g`` (Bach et al. 2015)."""
    return share(g, y, x)


def uniform(g: Tensor) -> Tensor:
    """A product of two matrices hands half to each (Achtibat et al., ICML 2024, prop. 3.3)."""
    return g / 2


def hard_sigmoid_gradient(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The plain gradient, written out because PyTorch cannot differentiate its own again."""
    return g * ((x > -3) & (x < 3)) / 6
