"""The autograd graph of a recorded forward pass: its relevance functions, and the walk over it."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn.parallel import DistributedDataParallel

from kd_lrp_plugin.utils.validation import message

# fmt: off
LINEAR_OPERATIONS = frozenset({
    "Add", "Sub", "Neg", "Sum", "Mean", "Cat", "Stack", "Split", "SplitWithSizes", "Unbind",
    "Select", "Slice", "Index", "Gather", "View", "UnsafeView", "ReshapeAlias", "AsStrided",
    "Permute", "Transpose", "T", "Expand", "Squeeze", "Unsqueeze", "Repeat", "Roll", "Flip",
    "Clone", "Alias", "Copy", "ToCopy", "ConstantPadNd", "CopySlices", "AvgPool2D",
    "AdaptiveAvgPool2D", "MkldnnAdaptiveAvgPool2D", "MaxPool2DWithIndices", "AdaptiveMaxPool2D",
    "NativeDropout", "UpsampleNearest2D", "UpsampleBilinear2D", "_DDPSink",
})
"""Autograd operations at which the gradient hands relevance back as it should be."""
# fmt: on
CHANGE_OF_A_VIEW = "CopySlices"
MATRIX_PRODUCT = "Bmm"
PRODUCTS = frozenset({"Mul", "Div", MATRIX_PRODUCT})
"""Linear, too, as long as one operand carries no relevance."""
SOFTMAX = "Softmax"
FUSED_ATTENTION = "ScaledDotProduct"
REENTRANT_CHECKPOINT = "CheckpointFunctionBackward"
WITHOUT_CHECKPOINTING = (
    "Switch gradient checkpointing off while the model is recorded: its second forward pass "
    "would not be the recorded one."
)

WITH_A_RULE = (
    "Make it a module (such as nn.ReLU), choose layers behind it, or the method "
    "gradient_activation."
)
OF_ATTENTION = (
    "Of attentions those of timm with attn_drop have a rule: choose layers behind this one, or "
    "the method gradient_activation."
)


class Switch:
    """Whether a relevance pass is on; all that a node of the graph knows of a propagation.

    A node that held the propagation would hold the outputs of its target layers, which hold the
    graph: a ring that Python cannot see, so that no step would ever be freed.
    """

    def __init__(self) -> None:
        self.on = False


@dataclass(frozen=True, eq=False)
class LayerRule:
    """How relevance is handed back through one call of one layer.

    Attributes:
        name: of the layer, for messages.
        switch: whether a relevance pass is on.
        rule: ``rule(g, *tensors)`` gives the factor of the source; None if no relevance flows.
        overwrites: whether the layer's output tensor itself may be handed on, instead of a copy.
        owns: operations between the rule and the matrix product in front of it, this included,
            which only the rule makes right.
    """

    name: str
    switch: Switch
    rule: Callable[..., Tensor] | None
    overwrites: bool = False
    owns: frozenset[str] = frozenset()


class RelevanceFunction(torch.autograd.Function):
    """``output`` unchanged; in a relevance pass its gradient goes to ``source`` by the rule."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        source: Tensor | None,
        layer_rule: LayerRule,
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.layer_rule = layer_rule
        ctx.n_tensors = len(tensors)
        ctx.save_for_backward(*tensors)
        if layer_rule.overwrites:
            # "Modified in place" costs nothing, and unlike a view it may be modified in place
            # again, as residual blocks do. Not for outputs that somebody has saved.
            ctx.mark_dirty(output)
            return output
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (g,) = grads
        layer_rule = ctx.layer_rule
        # The ordinary backward pass does not touch what the rule has saved: the model is free to
        # overwrite it, as it is without a recording.
        rest = (None,) * (1 + ctx.n_tensors)
        if not layer_rule.switch.on:
            return g, None, *rest
        if g is None or layer_rule.rule is None:
            return None, None, *rest
        try:
            tensors = ctx.saved_tensors
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise  # the graph has been freed
            fix = "Make the change out of place, or choose the method gradient_activation."
            got = "one that the model modifies in place afterwards"
            where = f"layer {layer_rule.name!r}"
            expected = "an input and weights that stay"
            raise ValueError(message(where, expected, got, fix)) from error
        return None, layer_rule.rule(g, *tensors), *rest


def is_relevance_function(node: Any) -> bool:
    return isinstance(getattr(node, "layer_rule", None), LayerRule)


def get_grad_node(tensor: Tensor) -> Any:
    """The autograd node that a gradient for ``tensor`` arrives at, None if there is none."""
    return get_gradient_edge(tensor).node if tensor.requires_grad else None


def refuse_checkpointing(where: str) -> None:
    """Raise ``ValueError`` within ``torch.utils.checkpoint``, not reentrant.

    It is known by the hooks that it sets on saved tensors. The reentrant form runs without
    gradients and leaves a node of its own, which :func:`find_carriers` meets.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint":
        got = "one under gradient checkpointing"
        raise ValueError(
            message(where, "a forward pass that runs once", got, WITHOUT_CHECKPOINTING)
        )


def find_carriers(
    logits: Tensor, targets: Iterable[Tensor], method: str, is_gradient: bool
) -> dict[Any, bool]:
    """For each autograd node behind ``logits`` whether relevance flows through it to a target.

    Args:
        logits: where relevance comes from.
        targets: outputs of the target layers.
        method: for messages.
        is_gradient: whether the method hands back plain gradients, for which every operation is
            right. For another, each such node must be a relevance function or linear.

    Raises:
        ValueError: for an operation that has no rule.
    """
    wanted = {get_grad_node(target) for target in targets}
    carriers: dict[Any, bool] = {}
    consumers: Counter[Any] = Counter()
    owners: list[Any] = []
    unowned: dict[Any, ValueError] = {}
    stack = [get_grad_node(logits)]
    # Depth first and from the end, without recursion: a deep network has thousands of nodes.
    while stack:
        node = stack[-1]
        if node is None or node in carriers:
            stack.pop()
            continue
        inputs = _list_inputs(node)
        if waiting := [i for i in inputs if i is not None and i not in carriers]:
            stack.extend(waiting)
            continue
        carried = [carriers.get(i, False) for i in inputs]
        carriers[node] = any(carried) or node in wanted
        if any(carried):
            consumers.update(compress(inputs, carried))
            if is_relevance_function(node):
                owners += [node] if node.layer_rule.owns else []
            elif error := _find_error(node, carried, method, is_gradient):
                if _get_kind(node) not in (SOFTMAX, MATRIX_PRODUCT) or _is_someone_s_own(node):
                    raise error
                unowned[node] = error
            elif _get_kind(node) == CHANGE_OF_A_VIEW and not is_gradient:
                _check_change_of_view(node, carriers, method)
        stack.pop()
    for owner in owners:
        for node in _find_owned(owner, carriers, consumers, wanted, method):
            unowned.pop(node, None)
    if unowned:
        raise next(iter(unowned.values()))
    _check_gates(carriers, method)
    return carriers


def _check_gates(carriers: dict[Any, bool], method: str) -> None:
    """Raise ``ValueError`` unless all that gates let through ends as a factor of features.

    A gate takes no relevance, which is right for a factor, whose product hands all of it to the
    features. What adds its output to features would lose its share without a word.

    Args:
        carriers: the nodes, the inputs of each before it.
        method: for messages.
    """
    gates = [n for n in carriers if is_relevance_function(n) and n.layer_rule.rule is None]
    gated = {node: node.layer_rule.name for node in gates}
    parameters: set[Any] = set()
    for node, carries in carriers.items() if gates else ():
        kind, inputs = _get_kind(node), [i for i in _list_inputs(node) if i is not None]
        if hasattr(node, "variable") or (
            inputs and kind in LINEAR_OPERATIONS and parameters.issuperset(inputs)
        ):
            parameters.add(node)
        squashed = [gated[i] for i in inputs if i in gated]
        is_factor = kind in PRODUCTS and any(i not in gated and i not in parameters for i in inputs)
        if not squashed or is_factor:
            continue
        if carries and any(carriers[i] for i in inputs):
            expected = "a sigmoid or softmax that is a factor of features"
            fix = "Choose layers behind it, or the method gradient_activation."
            got = f"the output of {squashed[0]!r} in {node.name()}"
            raise ValueError(message(method, expected, got, fix))
        gated[node] = squashed[0]


def _list_inputs(node: Any) -> list[Any]:
    """The nodes that relevance may flow on to."""
    inputs = [following for following, _ in node.next_functions]
    if is_relevance_function(node):
        return inputs[1:2] if node.layer_rule.rule is not None else []
    return inputs


def _find_owned(
    owner: Any, carriers: dict[Any, bool], consumers: Counter[Any], wanted: set[Any], method: str
) -> list[Any]:
    """The operations of an attention that the rule ``owner`` makes right, back to the product.

    All relevance on the way must be the owner's: nothing else may read what lies there, or add to
    it. In between, every operation hands on a part that does not depend on how much there is, and
    there is no target layer: the owner has halved its relevance in advance, for the product.
    """
    layer_rule, owned, node = owner.layer_rule, [], owner
    while _get_kind(node) != MATRIX_PRODUCT:
        carried = [i for i in _list_inputs(node) if carriers.get(i, False)]
        is_target = not wanted.isdisjoint(carried)
        if len(carried) != 1 or consumers[carried[0]] != 1 or is_target:
            expected = "one product of two matrices in front, read by nothing else"
            fix = "Choose another method, such as lrp_epsilon, or layers behind this one."
            got = "a target layer" if is_target else f"{node.name()} of {len(carried)} inputs"
            raise ValueError(message(f"{method} at {layer_rule.name!r}", expected, got, fix))
        (node,) = carried
        owned += [node] if _get_kind(node) in layer_rule.owns else []
    return owned


def _find_error(
    node: Any, carried: list[bool], method: str, is_gradient: bool
) -> ValueError | None:
    """None if the gradient of ``node`` hands relevance back as it should."""
    operation = node.name().removeprefix("torch::autograd::").rstrip("0123456789")
    if operation == REENTRANT_CHECKPOINT:
        expected, fix = "a forward pass that runs once", WITHOUT_CHECKPOINTING
        return ValueError(message(method, expected, "gradient checkpointing behind the layer", fix))
    if operation.startswith(FUSED_ATTENTION):
        fix = "Leave the choice of torch.nn.attention.sdpa_kernel to the recording."
        return ValueError(message(method, "attention as separate operations", operation, fix))
    if is_gradient and not getattr(node, "_saved_training", False):
        return None  # the gradient is right everywhere but through the statistics of a batch
    kind = _get_kind(node)
    if _is_someone_s_own(node):
        operation += " of a function of its own"
    elif kind in LINEAR_OPERATIONS or (
        kind in PRODUCTS and sum(carried) == 1 and not (kind == "Div" and not carried[0])
    ):
        return None
    fix = OF_ATTENTION if kind in (SOFTMAX, MATRIX_PRODUCT) else WITH_A_RULE
    return ValueError(message(method, "operations that have a rule", operation, fix))


def _is_someone_s_own(node: Any) -> bool:
    """Whether it is of a ``torch.autograd.Function``, whose name says nothing, be it ``Add``."""
    function = getattr(node, "_forward_cls", None)
    return function is not None and function.__module__ != DistributedDataParallel.__module__


def _check_change_of_view(node: Any, carriers: dict[Any, bool], method: str) -> None:
    """Raise ``ValueError`` unless what has changed a view of a tensor in place was linear.

    One node stands for ``y[:, :2] = z``, for ``y[:, :2].add_(z)`` and for ``y[:, :2].sigmoid_()``,
    and hides which. Its backward pass tells: of a linear operation it consists of linear ones, and
    depends on nothing that carries relevance.
    """
    (metadata,) = node._input_metadata
    with torch.enable_grad():
        probe = torch.ones(
            metadata.shape, dtype=metadata.dtype, device=metadata.device, requires_grad=True
        )
        grads = node(probe)
    grads = grads if isinstance(grads, tuple) else (grads,)
    inputs = [following for following, _ in node.next_functions]
    stack = [
        get_grad_node(grad)
        for grad, following in zip(grads, inputs, strict=False)
        if grad is not None and carriers.get(following, False)
    ]
    seen = {None, get_grad_node(probe)}
    while stack:
        inner = stack.pop()
        if inner in seen:
            continue
        seen.add(inner)
        if inner in carriers:
            is_linear = not carriers[inner]  # a factor, such as a gate, or what is features again
        else:
            is_linear = _get_kind(inner) in LINEAR_OPERATIONS | PRODUCTS
            stack.extend(following for following, _ in inner.next_functions)
        if not is_linear:
            got = "a change in place of a part of a tensor, CopySlices, that is not linear"
            raise ValueError(message(method, "operations that have a rule", got, WITH_A_RULE))


def _get_kind(node: Any) -> str:
    """The operation of an autograd node, without the marks that PyTorch puts around its name."""
    name = node.name().removeprefix("torch::autograd::").rstrip("0123456789")
    return name.replace("Backwards", "Backward").removesuffix("Backward")
