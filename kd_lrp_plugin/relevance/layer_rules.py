"""Which rule serves which layer, told by what its forward pass is, not by its class alone.

An instance can have a forward pass of its own (adapters such as LoRA set one), a subclass can
override it, and a weight can be computed again for every call. A rule that took such a layer for
what its class says would be silently wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from timm.layers import LayerNorm, LayerNorm2d, LayerNorm2dFp32, LayerNormFp32
from timm.layers import activations as timm_act
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.linear import Linear as TimmLinear
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.utils import parametrize
from torch.utils.weak import WeakTensorKeyDictionary

from kd_lrp_plugin.relevance import linear_maps, norms, rules
from kd_lrp_plugin.relevance.graph import LayerRule, RelevanceFunction, Switch
from kd_lrp_plugin.relevance.linear_maps import LinearMap
from kd_lrp_plugin.relevance.methods import Method
from kd_lrp_plugin.relevance.recomputation import apply_activation_rule, apply_rule
from kd_lrp_plugin.utils.validation import message

# fmt: off
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SiLU, nn.Mish, nn.GELU, nn.Hardswish,
    nn.Hardtanh, nn.Tanh, timm_act.Swish, timm_act.Mish, timm_act.HardSwish, timm_act.Tanh,
    timm_act.GELU, timm_act.GELUTanh, timm_act.PReLU,
)
"""Elementwise modules that hand relevance on unchanged."""
WITH_WEIGHTS = (nn.PReLU, timm_act.PReLU)
"""Activations that are more than a function of their input."""
KEEPING = (nn.ReLU, nn.Tanh, timm_act.Tanh, nn.Hardsigmoid, timm_act.HardSigmoid)
"""Activations whose output autograd keeps, or might: it cannot be handed on as it is."""
SIGMOIDS = (nn.Sigmoid, nn.Hardsigmoid, timm_act.Sigmoid, timm_act.HardSigmoid)
"""Modules whose output is a factor, not a feature: no relevance flows through them. So is that of
softmax, but for methods that have relevance flow through the weights of an attention."""
HARD_SIGMOIDS = (nn.Hardsigmoid, timm_act.HardSigmoid)
LAYER_NORMS_2D = (LayerNorm2d, LayerNorm2dFp32)
"""Those over the channels of maps (n, c, h, w)."""
LAYER_NORMS = (nn.LayerNorm, LayerNorm, LayerNormFp32, *LAYER_NORMS_2D)
CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
LINEAR_LAYERS = (nn.Linear, TimmLinear)
# fmt: on


def runs_as(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether the module's forward pass is that of one of ``kinds``, also if it inherits it."""
    if not isinstance(module, kinds):
        return False
    forward = vars(module).get("forward", type(module).forward)
    if getattr(forward, "__self__", None) is module:
        forward = forward.__func__  # the class's own, bound again
    return (
        any(forward is kind.forward for kind in kinds)
        and type(module).__call__ is nn.Module.__call__
    )


def is_plain_convolution(module: nn.Module) -> bool:
    """Whether it is one linear map and a bias, with zeros around; timm's variants included."""
    return (
        runs_as(module, *CONVOLUTIONS)
        and getattr(type(module), "_conv_forward", None) is nn.Conv2d._conv_forward
        and "_conv_forward" not in vars(module)
        and module.padding_mode == "zeros"
        and module.padding != "same"
        and has_readable_weight(module)
    )


def has_readable_weight(module: nn.Module) -> bool:
    """Whether its weight is a parameter, the tensor that a hook has left, or a parametrization."""
    return (
        "weight" in module._parameters
        or "weight" in vars(module)
        or parametrize.is_parametrized(module, "weight")
    )


class ConvolutionOutput:
    """What a convolution has given, kept until a batch norm that reads it is one layer with it.

    Args:
        output: without the hook's own node behind it, which would hold itself.
    """

    def __init__(self, output: Tensor) -> None:
        self._output: Tensor | None = output

    def forget(self) -> None:
        self._output = None

    def read(self, x: Tensor, weight: Tensor, bias: Tensor | None, layer: LinearMap) -> Tensor:
        """The output; computed again where something else than the norm has read it, too."""
        if self._output is not None:
            return self._output
        output = layer.apply(x, weight)
        return output if bias is None else output + bias[:, None, None]


@dataclass(frozen=True, eq=False)
class ConvolutionCall:
    """A convolution as it has run, for the batch norm that may read its output next.

    A tensor is an object whose value can change in place; both versions say whether it has.
    """

    module: nn.Conv2d
    name: str
    weight: Tensor
    linear_map: LinearMap
    source: Tensor
    source_version: int
    output_version: int
    output: ConvolutionOutput


class LayerRules:
    """Puts the rules of one method behind the layers of one forward pass.

    Attributes:
        weights: latest value of each parametrized weight, by its layer. Reading ``layer.weight``
            would compute it again, which moves the buffers of a spectral norm in train mode.
        without_gradient: whether nothing but relevance ever flows back, so that the ordinary graph
            need not be kept.
    """

    def __init__(self, method: Method, targets: set[nn.Module]) -> None:
        self.switch = Switch()
        self.weights: dict[nn.Module, Tensor] = {}
        self.without_gradient = False
        self._method = method
        self._targets = targets
        self._convolutions = WeakTensorKeyDictionary()
        self._nonnegative = WeakTensorKeyDictionary()  # to the version that is

    def clear(self) -> None:
        self.weights.clear()
        self._convolutions.clear()
        self._nonnegative.clear()

    def serve_convolution(
        self, name: str, module: nn.Conv2d, source: Tensor, output: Tensor
    ) -> Tensor | None:
        if source.ndim != 4:
            if self._method.is_gradient:
                return None
            fix = "Keep the batch axis."
            got = f"{tuple(source.shape)}"
            raise ValueError(message(f"layer {name!r}", "an input (n, c, h, w)", got, fix))
        linear_map = self._knows_sign(source, linear_maps.make_convolution(module, source))
        weight = self._read_weight(module)
        rule = self._method.convolution
        kept = ConvolutionOutput(self._cut(output))
        if self._method.needs_output:
            layer_rule = LayerRule(name, self.switch, _apply_convolution(rule, linear_map, kept))
            result = self._insert(layer_rule, output, source, weight, source, module.bias)
        else:
            apply = _apply_affine(rule, linear_map)
            layer_rule = LayerRule(name, self.switch, apply, overwrites=True)
            result = self._insert(layer_rule, output, source, weight, None, None)
        self._convolutions[result] = ConvolutionCall(
            module, name, weight, linear_map, source, source._version, result._version, kept
        )
        return result

    def serve_linear(self, name: str, module: nn.Linear, source: Tensor, output: Tensor) -> Tensor:
        linear_map = self._knows_sign(source, linear_maps.LINEAR)
        rule = _apply_affine(self._method.linear, linear_map)
        kept = (source, output) if self._method.needs_output else (None, None)
        layer_rule = LayerRule(name, self.switch, rule)
        return self._insert(layer_rule, output, source, self._read_weight(module), *kept)

    def serve_norm(
        self, name: str, module: BatchNorm, raw: Tensor, output: Tensor, stays: bool = False
    ) -> Tensor:
        """A batch norm, together with the convolution that ``raw`` is the output of, if any.

        Args:
            name: of the norm.
            module: the norm.
            raw: its input.
            output: of the norm.
            stays: whether nothing will change the output in place, as where an activation reads it.
        """
        tensors = norms.norm_tensors(module, self._read_weight(module), raw)
        call = self._take_convolution(name, raw)
        if call is None:
            rule = _apply_norm(module.eps)
            layer_rule = LayerRule(name, self.switch, rule, overwrites=True)
            return self._insert(layer_rule, output, raw, *tensors)
        call.output.forget()
        needs_output = self._method.needs_output
        rule = _apply_affine(self._method.convolution, call.linear_map, module.eps)
        return self._insert(
            LayerRule(call.name, self.switch, rule, overwrites=stays or not needs_output),
            output,
            call.source,
            call.weight,
            *((call.source, output) if needs_output else (None, None)),
            *tensors,
        )

    def serve_layer_norm(self, name: str, module: Any, source: Tensor, output: Tensor) -> Tensor:
        weight, eps = self._read_weight(module), module.eps
        is_2d = runs_as(module, *LAYER_NORMS_2D)
        axes = (1,) if is_2d else tuple(range(-len(module.normalized_shape), 0))

        def rule(g: Tensor, weight: Tensor | None, x: Tensor) -> Tensor:
            if weight is not None and is_2d:
                weight = weight[:, None, None]
            return norms.layer_norm_factor(g, weight, x, axes, eps)

        # The output for maps is a view, which is nobody's to hand on.
        layer_rule = LayerRule(name, self.switch, rule, overwrites=not is_2d)
        return self._insert(layer_rule, output, source, weight, source)

    def _take_convolution(self, name: str, raw: Tensor) -> ConvolutionCall | None:
        """The convolution to be taken as one layer with the norm that reads ``raw``."""
        call = self._convolutions.pop(raw, None)
        if call is None or raw._version != call.output_version:
            # Changed in place since, as by ``y += shortcut``, it is no convolution's output.
            return None
        if raw._backward_hooks and self._method.is_gradient:
            return None  # a hook on the tensor changes gradients that would pass it by
        if call.module in self._targets:
            if not self._method.is_gradient:
                fix = "Choose the batch norm behind it: for LRP the two are one layer."
                got = "a convolution with one"
                where = f"layer {call.name!r}"
                raise ValueError(message(where, "no batch norm behind it", got, fix))
            return None
        if call.source._version != call.source_version:
            # The tensor now stands for another value, and for another node of the graph.
            if not self._method.is_gradient:
                fix = "Make the change out of place."
                got = f"one that is modified in place before {name!r} has run"
                raise ValueError(message(f"layer {call.name!r}", "an input that stays", got, fix))
            return None
        return call

    def serve_activation(
        self,
        rule: Callable[..., Tensor],
        name: str,
        module: Any,
        source: Tensor,
        output: Tensor,
    ) -> Tensor:
        if isinstance(module, WITH_WEIGHTS):
            return self._insert(LayerRule(name, self.switch, rule), output, source, source, output)

        def apply(g: Tensor, x: Tensor) -> Tensor:
            return apply_activation_rule(rule, module, g, x)

        layer_rule = LayerRule(name, self.switch, apply, overwrites=not isinstance(module, KEEPING))
        result = self._insert(layer_rule, output, source, source)
        if runs_as(module, nn.ReLU) or (runs_as(module, nn.Hardtanh) and module.min_val >= 0):
            self._nonnegative[result] = result._version
        return result

    def serve_gate(self, name: str, output: Tensor) -> Tensor:
        return self._insert(LayerRule(name, self.switch, None), output, None)

    def serve_product(self, name: str, owns: frozenset[str], output: Tensor) -> Tensor:
        """Half for each factor of the product in front; ``owns`` as in :class:`LayerRule`."""
        layer_rule = LayerRule(name, self.switch, rules.uniform, owns=owns)
        return self._insert(layer_rule, output, output)

    def _insert(
        self, layer_rule: LayerRule, output: Tensor, source: Tensor | None, *tensors: Tensor | None
    ) -> Tensor:
        tensors = tuple(self._cut(tensor) for tensor in tensors)
        return RelevanceFunction.apply(self._cut(output), source, layer_rule, *tensors)

    def _cut(self, tensor: Any) -> Any:
        """The tensor, without its graph where that need not be kept."""
        return tensor.detach() if self.without_gradient and tensor is not None else tensor

    def _knows_sign(self, source: Tensor, linear_map: LinearMap) -> LinearMap:
        """The map, told that its input is not negative, where that comes straight from a ReLU.

        A change of the values in between is seen by the tensor's version, but not one past it
        (``output.data``).
        """
        if self._nonnegative.get(source) == source._version:
            return replace(linear_map, is_nonnegative=True)
        return linear_map

    def _read_weight(self, module: nn.Module) -> Any:
        # Without a value it is in parametrize.cached(), where reading costs and moves nothing.
        found = self.weights.get(module)
        return module.weight if found is None else found


def _apply_affine(
    rule: rules.Rule, linear_map: LinearMap, eps: float | None = None
) -> Callable[..., Tensor]:
    """The rule on ``(weight, x, y)`` and, with the ``eps`` of a norm, on the norm's tensors."""

    def apply(g: Tensor, weight: Tensor, x: Any, y: Any, *norm: Tensor | None) -> Tensor:
        scale = None if eps is None else norms.norm_scale(eps, *norm)
        return apply_rule(rule, linear_map, g, (x, y, weight), scale)

    return apply


def _apply_convolution(
    rule: rules.Rule, linear_map: LinearMap, output: ConvolutionOutput
) -> Callable[..., Tensor]:
    """The rule of a convolution without a norm behind it, on ``(weight, x, bias)``."""

    def apply(g: Tensor, weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        y = output.read(x, weight, bias, linear_map)
        return apply_rule(rule, linear_map, g, (x, y, weight))

    return apply


def _apply_norm(eps: float) -> Callable[..., Tensor]:
    def apply(g: Tensor, *norm: Tensor | None) -> Tensor:
        return g * norms.norm_scale(eps, *norm).view(-1, *[1] * (g.ndim - 2))

    return apply
