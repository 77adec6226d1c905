"""Nodes of the autograd graph that hand back relevance, and those that need no rule."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

# fmt: off
LINEAR_OPERATIONS = frozenset({
    "Add", "Sub", "Neg", "Sum", "Mean", "Cat", "Stack", "Split", "SplitWithSizes", "Unbind",
    "Select", "Slice", "Index", "Gather", "View", "UnsafeView", "ReshapeAlias", "AsStrided",
    "Permute", "Transpose", "T", "Expand", "Squeeze", "Unsqueeze", "Repeat", "Roll", "Flip",
    "Clone", "Alias", "ToCopy", "ConstantPadNd", "CopySlices", "AvgPool2D", "AdaptiveAvgPool2D",
    "MkldnnAdaptiveAvgPool2D", "MaxPool2DWithIndices", "AdaptiveMaxPool2D", "NativeDropout",
    "UpsampleNearest2D", "UpsampleBilinear2D", "_DDPSink",
})
"""Autograd operations at which the gradient hands relevance back as it should be."""
PRODUCTS = frozenset({"Mul", "Div", "Bmm"})
"""Linear, too, as long as one operand carries no relevance."""

class Switch:
    """Whether a relevance pass is on; all that a node of the graph knows of a propagation.

    A node that held the propagation would hold its taps, which hold the graph: a ring that
    Python cannot see, so that no step would ever be freed.
    """

    def __init__(self) -> None:
        self.on = False



class RelevanceFunction(torch.autograd.Function):
    """``output`` unchanged; in a relevance pass its gradient goes to ``source`` by ``rule``.

    ``rule(g, *tensors)`` gives the factor of ``source``; without a source no relevance flows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        source: Tensor | None,
        switch: Switch,
        rule: Callable[..., Tensor] | None,
        overwrites: bool,
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.switch = switch
        ctx.rule = rule
        ctx.save_for_backward(*tensors)
        if overwrites:
            # "Modified in place" costs nothing, and unlike a view it may be modified in place
            # again, as residual blocks do. Not for outputs that somebody has saved.
            ctx.mark_dirty(output)
            return output
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (g,) = grads
        rest = (None,) * (3 + len(ctx.saved_tensors))
        if not ctx.switch.on:
            return g, None, *rest
        if g is None or ctx.rule is None:
            return None, None, *rest
        return None, ctx.rule(g, *ctx.saved_tensors), *rest



def is_relevance_function(node: Any) -> bool:
    return isinstance(getattr(node, "switch", None), Switch)



def grad_node(tensor: Tensor) -> Any:
    """The autograd node that a gradient for ``tensor`` arrives at, None if there is none."""
    return get_gradient_edge(tensor).node if tensor.requires_grad else None
