"""Relevance through timm's attention modules: CP-LRP, and AttnLRP.

An attention is two products, of queries with keys and of the softmax of that, the weights, with the
values. CP-LRP takes the weights for factors: behind ``attn_drop`` stands a gate. AttnLRP hands half
of the relevance of each product to each of its operands, and through softmax takes the gradient:
a rule in front of ``proj`` halves what comes to the second product, one behind ``attn_drop`` what
comes to the first. In between lie operations that are not linear in features, which the walk over
the graph refuses elsewhere; these rules own them, back to their product.

Window partition, shift and padding, class tokens, LayerScale and DropPath are linear and need no
rule; position embeddings and relative-position biases are biases.

Source: Ali et al., ICML 2022 (CP-LRP); Achtibat et al., ICML 2024, sec. 3.2-3.3 (AttnLRP).
Deviation: none; both hand relevance back through biases as LRP-ε does, which keep their part.
"""

from functools import partial

from torch import nn

from kd_lrp_plugin.relevance.graph import MATRIX_PRODUCT, SOFTMAX
from kd_lrp_plugin.relevance.layer_hooks import LayerHooks
from kd_lrp_plugin.relevance.layer_rules import LayerRules
from kd_lrp_plugin.relevance.methods import Method


def is_attention(module: nn.Module) -> bool:
    """Whether it is one of timm's, which can all do without the fused operation."""
    return "fused_attn" in vars(module) or hasattr(type(module), "fused_attn")


def serve_attention(
    name: str, module: nn.Module, method: Method, hooks: LayerHooks, layer_rules: LayerRules
) -> None:
    """Run an attention as separate operations, with the rules of ``method`` where it has some.

    The fused operation has no second derivative.
    """
    hooks.set(module, "fused_attn", False)
    if method.is_gradient:
        return
    weights, projection = getattr(module, "attn_drop", None), getattr(module, "proj", None)
    if not method.through_weights:
        if isinstance(weights, nn.Module):  # without, softmax is refused by name
            gate = partial(layer_rules.serve_gate, name)
            hooks.put_behind(name, weights, lambda _, output: gate(output))
    elif isinstance(weights, nn.Module) and isinstance(projection, nn.Module):
        of_scores = frozenset({SOFTMAX, MATRIX_PRODUCT})
        half_of_scores = partial(layer_rules.serve_product, name, of_scores)
        hooks.put_behind(name, weights, lambda _, output: half_of_scores(output))
        of_values = frozenset({MATRIX_PRODUCT})
        hooks.put_before(projection, partial(layer_rules.serve_product, name, of_values))
    else:
        hooks.refuse(name, module, "an attention with attn_drop and proj")
