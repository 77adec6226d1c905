"""Rules whose intermediate results are not kept for their derivative, but computed again.

What a rule reads is there anyway, for the ordinary backward pass. What it makes of that (modified
weights, halves of the input, contributions, ratios) would, kept for every layer, take more memory
than the step itself.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kd_lrp_plugin.relevance.linear_maps import LinearMap
from kd_lrp_plugin.relevance.rules import WITHOUT_VALUES, Rule

Compute = Callable[..., Tensor]


def apply_rule(
    rule: Rule,
    layer: LinearMap,
    g: Tensor,
    tensors: tuple[Tensor | None, Tensor | None, Tensor],
    scale: Tensor | None = None,
) -> Tensor:
    """The factor of a layer's input, as ``rule`` has it.

    Args:
        rule: of the layer.
        layer: its linear map.
        g: factor of the output.
        tensors: input, output and weight; the first two None for a rule that reads neither.
        scale: what the batch norm behind the layer multiplies each output channel by.
    """

    def compute(layer: LinearMap, g: Tensor, x: Any, y: Any, w: Tensor, scale: Any) -> Tensor:
        if scale is not None:
            w = w * scale.view(-1, *[1] * (w.ndim - 1))
        return rule(g, x, y, w, layer)

    again = layer.without_values() if rule in WITHOUT_VALUES else layer
    return _Recomputed.apply(partial(compute, layer), partial(compute, again), g, *tensors, scale)


def apply_activation_rule(
    rule: Callable[[Tensor, Tensor, Tensor], Tensor], module: nn.Module, g: Tensor, x: Tensor
) -> Tensor:
    """``rule(g, x, y)`` with the output ``y`` of ``module``, which has no weights, for ``x``.

    Its settings, such as a slope, must be those of the forward pass still.
    """

    def compute(g: Tensor, x: Tensor) -> Tensor:
        overwrites = getattr(module, "inplace", False)
        return rule(g, x, module.forward(x.clone() if overwrites else x))

    return _Recomputed.apply(compute, compute, g, x)


class _Recomputed(torch.autograd.Function):
    """``compute(*tensors)``; ``again`` has its derivative, and may do without its value."""

    @staticmethod
    def forward(ctx: Any, compute: Compute, again: Compute, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.again = again
        return compute(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        derives_again, needed = torch.is_grad_enabled(), ctx.needs_input_grad[2:]
        # Aliases, at which the derivative stops, for one tensor may be computed from another.
        tensors: list[Any] = [
            t if t is None else t.view_as(t) if derives_again else t.detach()
            for t in ctx.saved_tensors
        ]
        wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
        with torch.enable_grad(), torch.autocast(grads[0].device.type, enabled=False):
            if not derives_again:
                for tensor in wanted:
                    tensor.requires_grad_()
            result = ctx.again(*tensors)
            if not result.requires_grad:  # of a rule that is constant in all that is wanted
                return (None,) * (2 + len(tensors))
            found = torch.autograd.grad(
                result, wanted, grads[0], create_graph=derives_again, allow_unused=True
            )
        following = iter(found)
        return None, None, *(next(following) if need else None for need in needed)
