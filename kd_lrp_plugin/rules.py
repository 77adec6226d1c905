r"""How relevance is handed back through one layer: one short declaration per rule.

Everything works in *gradient space*: a tensor ``x`` carries a factor ``g`` and its relevance is
``x * g``. Handing relevance back means turning the factor of a layer's output into the factor of
its input. Whatever is linear without bias (sums, pooling, reshaping) then needs no rule, for
there the factor is the gradient.

A rule serves one affine layer, a convolution together with the batch norm behind it or a linear
layer, with input ``x``, output ``y``, effective weight ``w`` and its linear map ``layer``:

    ``rule(g, x, y, w, layer) -> factor of x``
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import get_same_padding
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from kd_lrp_plugin.registry import Registry

EPSILON = 1e-6
"""Stabiliser of every division; float32 needs at least this much."""

GAMMA = 0.25
"""How much more the gamma rule counts contributions with the sign of the output."""


def stabilize(z: Tensor) -> Tensor:
    """``z`` moved away from zero by :data:`EPSILON`, keeping its sign (zero counts as positive)."""
    return z + torch.where(z < 0, -EPSILON, EPSILON)


# --- linear maps ------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearMap:
    """A layer without its bias: ``apply(x, w)`` and its transpose ``transpose(g, w)``."""

    apply: Callable[[Tensor, Tensor], Tensor]
    transpose: Callable[[Tensor, Tensor], Tensor]


LINEAR = LinearMap(apply=F.linear, transpose=lambda g, w: g @ w)
"""The map of :class:`torch.nn.Linear`."""


def convolution(
    shape: Sequence[int],
    stride: tuple[int, ...],
    padding: Sequence[int],
    dilation: tuple[int, ...],
    groups: int,
) -> LinearMap:
    """The map of a convolution on inputs of ``shape`` (n, c, h, w).

    Args:
        shape: of the input, before padding.
        stride: (vertical, horizontal), as in :class:`torch.nn.Conv2d`; likewise ``dilation``.
        padding: zeros to the (left, right, top, bottom), which may differ from side to side.
        dilation: see ``stride``.
        groups: as in :class:`torch.nn.Conv2d`.
    """
    left, right, top, bottom = padding
    n, c, h, w = shape
    even = left == right and top == bottom
    inner = (top, left) if even else (0, 0)
    outer = [0, 0, 0, 0] if even else [left, right, top, bottom]
    padded = (n, c, h + outer[2] + outer[3], w + outer[0] + outer[1])
    geometry = (stride, inner, dilation, groups)

    def apply(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x if even else F.pad(x, outer), weight, None, *geometry)

    def transpose(g: Tensor, weight: Tensor) -> Tensor:
        back = _TransposedConvolution.apply(g, weight, padded, geometry)
        return back if even else F.pad(back, [-p for p in outer])

    return LinearMap(apply, transpose)


def convolution_of(module: nn.Conv2d, source: Tensor) -> LinearMap:
    """The map of a module on ``source``, timm's convolutions with "same" padding included."""
    if isinstance(module, Conv2dSame):
        sizes = zip(
            source.shape[-2:], module.kernel_size, module.stride, module.dilation, strict=True
        )
        vertical, horizontal = (get_same_padding(*size) for size in sizes)
    else:
        padding = (0, 0) if module.padding == "valid" else module.padding
        vertical, horizontal = (2 * int(p) for p in padding)
    sides = (horizontal // 2, horizontal - horizontal // 2, vertical // 2, vertical - vertical // 2)
    return convolution(tuple(source.shape), module.stride, sides, module.dilation, module.groups)


class _TransposedConvolution(torch.autograd.Function):
    """The input gradient of a convolution, as a function of (output gradient, weight).

    PyTorch derives it too, but its double backward of grouped convolutions is a loop over the
    groups. Written as a function of its own, the derivative is one convolution and one weight
    gradient, whatever the groups.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor, shape: tuple, geometry: tuple) -> Tensor:
        ctx.save_for_backward(g, weight)
        ctx.geometry = geometry
        # Only the input's shape matters for its gradient, so one number stands for all of it.
        return _convolution_backward(g, g.new_zeros(()).expand(shape), weight, geometry, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = grads
        g, weight = ctx.saved_tensors
        need_g, need_weight = ctx.needs_input_grad[:2]
        return (
            F.conv2d(back, weight, None, *ctx.geometry) if need_g else None,
            _convolution_backward(g, back, weight, ctx.geometry, 1) if need_weight else None,
            None,
            None,
        )


def _convolution_backward(
    g: Tensor, x: Tensor, weight: Tensor, geometry: tuple, wanted: int
) -> Tensor:
    """Gradient of a convolution for its input (``wanted`` 0) or its weight (1)."""
    stride, padding, dilation, groups = geometry
    mask = [wanted == 0, wanted == 1, False]
    return torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
    )[wanted]


# --- rules ------------------------------------------------------------------------------------

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
    upper, lower = w.clamp(min=0), w.clamp(max=0)
    positive = _split_apply(x, upper, lower, layer)
    return _split_transpose(g * (y / stabilize(positive)), x, upper, lower, layer)


@RULES.register
def gamma(g: Tensor, x: Tensor, y: Tensor, w: Tensor, layer: LinearMap) -> Tensor:
    """LRP-γ: contributions with the sign of the output count 1 + γ times.

    Source: Montavon et al., Explainable AI, LNCS 11700 (2019), ch. 10.2, for positive outputs.
    Deviation: a negative output (of a linear bottleneck, or a logit) prefers its negative
    contributions in the same way; with positive ones its denominator could vanish.
    """
    upper, lower = w.clamp(min=0), w.clamp(max=0)
    is_positive = y >= 0
    positive = _split_apply(x, upper, lower, layer)
    negative = _split_apply(x, lower, upper, layer)
    ratio = g * (y / stabilize(y + GAMMA * torch.where(is_positive, positive, negative)))
    return (
        layer.transpose(ratio, w)
        + GAMMA * _split_transpose(ratio * is_positive, x, upper, lower, layer)
        + GAMMA * _split_transpose(ratio * ~is_positive, x, lower, upper, layer)
    )


def _split_apply(x: Tensor, w_above: Tensor, w_below: Tensor, layer: LinearMap) -> Tensor:
    """Positive inputs through one weight plus negative inputs through another."""
    total = layer.apply(x.clamp(min=0), w_above)
    if _any_negative(x):
        total = total + layer.apply(x.clamp(max=0), w_below)
    return total


def _split_transpose(
    r: Tensor, x: Tensor, w_above: Tensor, w_below: Tensor, layer: LinearMap
) -> Tensor:
    """The transpose of :func:`_split_apply`."""
    back = layer.transpose(r, w_above)
    if _any_negative(x):
        back = torch.where(x < 0, layer.transpose(r, w_below), back)
    return back


def _any_negative(x: Tensor) -> bool:
    """Behind a ReLU nothing is, and half of the work falls away."""
    return bool((x.detach() < 0).any())


# --- layers without weights -------------------------------------------------------------------


def activation(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """An activation hands its relevance on unchanged: ``x * g_x = y * g`` (Bach et al. 2015)."""
    return g * (y / stabilize(x))


def hard_sigmoid_gradient(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The plain gradient, written out because PyTorch cannot differentiate its own again."""
    return g * ((x > -3) & (x < 3)) / 6


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
        weight = (grads[0] * (2 * x.shape[1] / x.numel())).view_as(mean)
        return (x - mean) * weight


def norm_tensors(norm: BatchNorm, raw: Tensor | None) -> tuple[Tensor | None, ...]:
    """What :func:`norm_scale` needs: the norm's weight, and the variance or where it is from."""
    if norm.training or norm.running_var is None:
        return norm.weight, None, raw
    return norm.weight, norm.running_var, None


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


# --- methods ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A named way to turn the factors at a layer into a map.

    Attributes:
        convolution: rule for convolutions, each with the batch norm behind it.
        linear: rule for linear layers.
        pooled: whether a channel's factor is averaged over the map first, as Grad-CAM does.
    """

    convolution: Rule
    linear: Rule
    pooled: bool = False

    @property
    def is_gradient(self) -> bool:
        """Whether the factors are plain gradients, for which every operation is allowed."""
        return self.convolution is gradient

    @property
    def needs_output(self) -> bool:
        """Whether a rule reads the layer's output, which must then be kept."""
        return not self.is_gradient


METHODS: Registry[Method] = Registry("method")
METHODS.register(Method(gradient, gradient, pooled=True), "grad_cam")
METHODS.register(Method(gradient, gradient), "gradient_activation")
METHODS.register(Method(epsilon, epsilon), "lrp_epsilon")
METHODS.register(Method(zplus, zplus), "lrp_zplus")
METHODS.register(Method(gamma, gamma), "lrp_gamma")
METHODS.register(Method(zplus, epsilon), "lrp_composite")
