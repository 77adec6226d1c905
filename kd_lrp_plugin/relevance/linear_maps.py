"""Layers as linear maps with their transposes, cheap to derive twice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import get_same_padding
from torch import Tensor, nn


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


def make_convolution(module: nn.Conv2d, source: Tensor) -> LinearMap:
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
