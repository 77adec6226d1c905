"""Layers as linear maps with their transposes, cheap to derive twice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import get_same_padding
from torch import Tensor, nn


@dataclass(frozen=True)
class LinearMap:
    """A layer without its bias: ``apply(x, w)`` and its transpose ``transpose(g, w)``.

    Attributes:
        apply: the map.
        gradients: ``input_gradient(g, w)``, which is the transpose, and ``weight_gradient(g, x,
            w)``, not to be derived again.
        get_input_shape: of the input, told by ``(g, w)``.
        channel_axis: of inputs and outputs; None if an output does not read all channels. In the
            weight, axis 1 is that of the inputs, axis 0 that of the outputs.
        is_nonnegative: whether the input is known to have no negative entry.
        has_values: whether the value of a transpose is of interest, or its derivative alone.
    """

    apply: Callable[[Tensor, Tensor], Tensor]
    gradients: tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]
    get_input_shape: Callable[[Tensor, Tensor], Sequence[int]]
    channel_axis: int | None = None
    is_nonnegative: bool = False
    has_values: bool = True

    def transpose(self, g: Tensor, w: Tensor) -> Tensor:
        return _Transpose.apply(g, w, self)

    def without_values(self) -> "LinearMap":
        """The same map, whose transposes have a derivative but no value: not a number."""
        return replace(self, has_values=False)


class _Transpose(torch.autograd.Function):
    """The input gradient of a layer, as a function of (output gradient, weight).

    PyTorch derives it too, but its double backward of grouped convolutions is a loop over the
    groups. Written as a function of its own, the derivative is one convolution and one weight
    gradient, whatever the groups.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor, layer: LinearMap) -> Tensor:
        ctx.save_for_backward(g, weight)
        ctx.layer = layer
        if layer.has_values:
            return layer.gradients[0](g, weight)
        return g.new_full((), float("nan")).expand(*layer.get_input_shape(g, weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = grads
        g, weight = ctx.saved_tensors
        need_g, need_weight = ctx.needs_input_grad[:2]
        return (
            ctx.layer.apply(back, weight) if need_g else None,
            ctx.layer.gradients[1](g, back, weight) if need_weight else None,
            None,
        )


LINEAR = LinearMap(
    apply=F.linear,
    gradients=(
        lambda g, w: g @ w,
        lambda g, x, w: g.reshape(-1, len(w)).mT @ x.reshape(-1, w.shape[1]),
    ),
    get_input_shape=lambda g, w: (*g.shape[:-1], w.shape[1]),
    channel_axis=-1,
)
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
        shape: of the input, before padding; how many channels it has, the weight tells.
        stride: (vertical, horizontal), as in :class:`torch.nn.Conv2d`; likewise ``dilation``.
        padding: zeros to the (left, right, top, bottom), which may differ from side to side.
        dilation: see ``stride``.
        groups: as in :class:`torch.nn.Conv2d`.
    """
    left, right, top, bottom = padding
    even = left == right and top == bottom
    inner = (top, left) if even else (0, 0)
    outer = [0, 0, 0, 0] if even else [left, right, top, bottom]
    sides = (shape[2] + outer[2] + outer[3], shape[3] + outer[0] + outer[1])

    def pad(x: Tensor) -> Tensor:
        return x if even else F.pad(x, outer)

    def apply(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(pad(x), w, None, stride, inner, dilation, groups)

    def transpose(g: Tensor, w: Tensor) -> Tensor:
        # Several times faster on the CPU than the input gradient of a convolution.
        left_over = [
            (sides[i] + 2 * inner[i] - dilation[i] * (w.shape[2 + i] - 1) - 1) % stride[i]
            for i in (0, 1)
        ]
        back = F.conv_transpose2d(g, w, None, stride, inner, left_over, groups, dilation)
        return back if even else F.pad(back, [-p for p in outer])

    def weight_gradient(g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return torch.ops.aten.convolution_backward(
            g, pad(x), w, None, stride, inner, dilation, False, [0, 0], groups, [False, True, False]
        )[1]

    return LinearMap(
        apply,
        (transpose, weight_gradient),
        lambda g, w: (len(g), w.shape[1] * groups, *shape[2:]),
        channel_axis=1 if groups == 1 else None,
    )


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
