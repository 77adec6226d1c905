"""Which rule serves which layer, and the hooks that put it there for a forward pass.

Behind every layer that a rule serves stands a :class:`_Detour`: an identity whose backward pass
goes the ordinary way, except during a relevance pass, when it follows the rule to the layer's
input. So whoever takes a gradient during a relevance pass gets relevance.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from timm.layers import BatchNormAct2d
from timm.layers import activations as timm_act
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.linear import Linear as TimmLinear
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils.weak import WeakTensorKeyDictionary

from kd_lrp_plugin.relevance import batch_norm, linear_maps, rules
from kd_lrp_plugin.relevance.graph import (
    LINEAR_OPERATIONS,
    PRODUCTS,
    RelevanceFunction,
    Switch,
    grad_node,
    is_relevance_function,
)
from kd_lrp_plugin.relevance.linear_maps import LinearMap
from kd_lrp_plugin.relevance.methods import Method
from kd_lrp_plugin.utils.validation import message

# fmt: off
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SiLU, nn.Mish, nn.GELU, nn.Hardswish,
    nn.Hardtanh, nn.Tanh, timm_act.Swish, timm_act.Mish, timm_act.HardSwish, timm_act.Tanh,
    timm_act.GELU, timm_act.GELUTanh,
)
"""Elementwise modules that hand relevance on unchanged."""
GATES = (nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, timm_act.Sigmoid, timm_act.HardSigmoid)
"""Modules whose output is a factor, not a feature: no relevance flows through them."""
# fmt: on

PLAIN_CONVOLUTIONS = (nn.Conv2d.forward, Conv2dSame.forward)
"""What a convolution must do to be one linear map and a bias; timm's own variants included."""
PLAIN_LINEAR = (nn.Linear.forward, TimmLinear.forward)
# fmt: on

_LISTENED_TO: WeakSet[nn.Module] = WeakSet()


class Propagation:
    """The rules of one method on one model, and the taps where relevance is read.

    Attributes:
        taps: output of each tapped layer in the latest forward pass, by name.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], method: Method, name: str) -> None:
        self.taps: dict[str, Tensor] = {}
        self._switch = Switch()
        self._model = model
        self._layers = layers
        self._method = method
        self._name = name
        self._only_relevance = False
        self._frozen = not any(parameter.requires_grad for parameter in model.parameters())
        self._tapped = {model.get_submodule(name) for name in layers}
        self._versions: dict[str, int] = {}
        self._autocast: dict[str, torch.dtype] = {}
        self._undo: list[Callable[[], None]] = []
        self._convolved = WeakTensorKeyDictionary()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Serve the forward passes inside the context; leave no trace on the model."""
        if self._model in _LISTENED_TO:
            fix = "Close the first recording, or ask it for all layers."
            raise ValueError(message("record", "a model that is not being recorded", "one", fix))
        try:
            _LISTENED_TO.add(self._model)
            self._install()
            yield
        finally:
            _LISTENED_TO.discard(self._model)
            while self._undo:
                self._undo.pop()()
            self._convolved.clear()

    @contextmanager
    def relevance_pass(self) -> Iterator[None]:
        """Gradients taken inside the context follow the rules."""
        self._switch.on = True
        try:
            yield
        finally:
            self._switch.on = False

    # --- hooks --------------------------------------------------------------------------------

    def _install(self) -> None:
        modules = dict(self._model.named_modules())
        self._undo.append(self._model.register_forward_pre_hook(self._begin).remove)
        self._undo.append(self._model.register_forward_hook(self._end, always_call=True).remove)
        self._undo.append(self._end)
        for name, module in modules.items():
            self._install_rule(name, module)
        for name in self._layers:
            self._behind(modules[name], self._tap(name), from_tap_on=False)

    def _install_rule(self, name: str, module: nn.Module) -> None:
        """Every kind of layer, and what stands behind it."""
        lrp = not self._method.is_gradient
        if getattr(module, "inplace", False):
            self._undo.append(module.register_forward_pre_hook(self._spare_input).remove)
        if hasattr(module, "fused_attn"):  # timm's attention
            self._set(module, "fused_attn", False)  # the fused one has no second derivative
            if lrp and isinstance(module.attn_drop, nn.Module):
                self._behind(module.attn_drop, self._gate)
        elif isinstance(module, nn.Conv2d):
            if type(module).forward in PLAIN_CONVOLUTIONS and not _padded_oddly(module):
                self._behind(module, self._convolution)
            elif lrp:
                self._refuse(name, module, "a convolution with zero padding and its own weights")
        elif isinstance(module, BatchNormAct2d) and _runs(module, BatchNormAct2d):
            # The value before the activation passes through `drop`; the input is seen here only.
            inputs: list[Tensor] = []
            self._undo.append(
                module.register_forward_pre_hook(
                    lambda _, args: inputs.extend(args[:1] if self.taps else ())
                ).remove
            )
            self._behind(module.drop, lambda _, __, y: self._norm(module, inputs.pop(), y))
        elif isinstance(module, BatchNorm) and _runs(module, BatchNorm):
            self._behind(module, lambda m, args, y: self._norm(m, args[0], y))
        elif isinstance(module, BatchNorm):  # over several processes, or with more than the norm
            if lrp or module.training:
                self._refuse(name, module, "a batch norm of PyTorch or timm, within one process")
        elif type(module).forward in PLAIN_LINEAR:
            self._behind(module, self._linear)
        elif lrp and isinstance(module, GATES):
            self._behind(module, self._gate)
        elif lrp and isinstance(module, ACTIVATIONS):
            self._behind(module, self._activation(rules.activation))
        elif isinstance(module, (nn.Hardsigmoid, timm_act.HardSigmoid)):
            self._behind(module, self._activation(rules.hard_sigmoid_gradient))

    def _behind(
        self, module: nn.Module, hook: Callable[..., Tensor | None], from_tap_on: bool = True
    ) -> None:
        def behind(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
            return hook(module, inputs, output) if self.taps or not from_tap_on else None

        self._undo.append(module.register_forward_hook(behind).remove)

    def _set(self, module: nn.Module, name: str, value: object) -> None:
        found = getattr(module, name)
        self._undo.append(lambda: setattr(module, name, found))
        setattr(module, name, value)

    def _begin(self, module: nn.Module, inputs: tuple) -> None:
        self.taps.clear()
        self._convolved.clear()

    def _end(self, *_: object) -> None:
        for kind, found in self._autocast.items():
            if torch.get_autocast_dtype(kind) == torch.float32:  # else the model has restored it
                torch.set_autocast_dtype(kind, found)
        self._autocast.clear()

    def _widened(self, output: Tensor) -> Tensor:
        """``output`` in float32 if under autocast, which casts up to float32 from here on."""
        kind = output.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            # Unlike switching it off, this also serves a branch around the tap.
            self._autocast.setdefault(kind, torch.get_autocast_dtype(kind))
            torch.set_autocast_dtype(kind, torch.float32)
            output = output.to(torch.promote_types(output.dtype, torch.float32))
        return output

    def _spare_input(self, module: nn.Module, inputs: tuple) -> None:
        if self.taps and module.inplace:
            self._set(module, "inplace", False)

    def _tap(self, name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, inputs: tuple, output: object) -> Tensor | None:
            where = f"layer {name!r}"
            if not isinstance(output, Tensor) or output.ndim != 4:
                got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                fix = "Choose a layer before pooling and flattening."
                raise ValueError(message(where, "an output (n, c, h, w)", got, fix))
            if name in self.taps:
                fix = "Choose a layer that runs once."
                raise ValueError(message(where, "one call in a forward pass", "a second", fix))
            if torch.is_inference(output):
                fix = "Leave torch.inference_mode for a recorded forward pass."
                raise ValueError(message(where, "an output with a graph", "inference mode", fix))
            output = self._widened(output)
            if not self.taps:
                # Through a frozen model that starts here, nothing else ever flows back: the
                # ordinary graph need not be kept.
                self._only_relevance = self._frozen and not output.requires_grad
            tap = output if output.requires_grad else output.detach().requires_grad_()
            self.taps[name] = tap
            self._versions[name] = tap._version
            return tap

        return hook

    def _refuse(self, name: str, module: nn.Module, expected: str) -> None:
        def hook(*_: object) -> None:
            fix = "Choose another method, or layers behind this one."
            raise ValueError(
                message(f"{self._name} at {name!r}", expected, type(module).__name__, fix)
            )

        self._behind(module, hook)

    # --- what stands behind a layer -----------------------------------------------------------

    def _detour(
        self,
        output: Tensor,
        source: Tensor | None,
        rule: Callable[..., Tensor] | None,
        *tensors: Tensor | None,
        overwrites: bool = False,
    ) -> Tensor:
        if self._only_relevance:
            output = output.detach()
        return RelevanceFunction.apply(output, source, self._switch, rule, overwrites, *tensors)

    def _affine(
        self,
        output: Tensor,
        source: Tensor,
        layer: nn.Conv2d | nn.Linear,
        rule: rules.Rule,
        linear_map: LinearMap,
        norm: BatchNorm | None = None,
        raw: Tensor | None = None,
    ) -> Tensor:
        """Detour around a layer, or around a convolution and its ``norm`` with input ``raw``."""
        weights = batch_norm.norm_tensors(norm, raw) if norm is not None else ()
        needs = self._method.needs_output

        def propagate(g: Tensor, *tensors: Any) -> Tensor:
            weight, x, y, *scale = tensors
            if norm is not None:
                factor = batch_norm.norm_scale(norm.eps, *scale)
                weight = weight * factor.view(-1, 1, 1, 1)
            return rule(g, x, y, weight, linear_map)

        kept = (source, output) if needs else (None, None)
        overwrites = not needs and isinstance(layer, nn.Conv2d)
        return self._detour(
            output, source, propagate, layer.weight, *kept, *weights, overwrites=overwrites
        )

    def _convolution(self, module: nn.Conv2d, inputs: tuple, output: Tensor) -> Tensor:
        (source,) = inputs
        linear_map = linear_maps.make_convolution(module, source)
        result = self._affine(output, source, module, self._method.convolution, linear_map)
        self._convolved[result] = (module, source, linear_map)
        return result

    def _norm(self, module: BatchNorm, raw: Tensor, output: Tensor) -> Tensor:
        convolution, source, linear_map = self._convolved.pop(raw, (None, raw, None))
        if convolution in self._tapped:
            self._check_norm_apart(convolution)
        elif convolution is not None:
            rule = self._method.convolution
            return self._affine(output, source, convolution, rule, linear_map, module, raw)

        def propagate(g: Tensor, *tensors: Any) -> Tensor:
            scale = batch_norm.norm_scale(module.eps, *tensors)
            return g * scale.view(-1, *[1] * (g.ndim - 2))

        tensors = batch_norm.norm_tensors(module, raw)
        return self._detour(output, raw, propagate, *tensors, overwrites=True)

    def _linear(self, module: nn.Linear, inputs: tuple, output: Tensor) -> Tensor:
        return self._affine(output, inputs[0], module, self._method.linear, linear_maps.LINEAR)

    def _activation(self, rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            (source,) = inputs
            return self._detour(output, source, rule, source, output)

        return hook

    def _gate(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return self._detour(output, None, None)

    def _check_norm_apart(self, convolution: nn.Module) -> None:
        if not self._method.is_gradient:
            (name,) = (n for n, m in self._model.named_modules() if m is convolution)
            fix = "Choose the batch norm behind it: for LRP the two are one layer."
            got = "a convolution with one"
            raise ValueError(message(f"layer {name!r}", "no batch norm behind it", got, fix))

    # --- checks before a relevance pass -------------------------------------------------------

    def check_heard(self) -> None:
        """Raise ``ValueError`` unless a forward pass has gone through every tapped layer."""
        if missing := [name for name in self._layers if name not in self.taps]:
            fix = "Run the model inside the context, and choose layers that it uses."
            raise ValueError(message(self._name, f"a forward pass through {missing}", "none", fix))

    def check_way(self, logits: Tensor) -> None:
        """Raise ``ValueError`` unless relevance can flow from ``logits`` to every tap."""
        self.check_heard()
        for name, tap in self.taps.items():
            if tap._version != self._versions[name]:
                fix = "Choose the module around it, whose output stays as it is."
                got = "one that the model modifies in place afterwards"
                raise ValueError(message(f"layer {name!r}", "an output that stays", got, fix))
        alive = self._alive(logits)
        for name, tap in self.taps.items():
            if not alive.get(grad_node(tap), False):
                fix = (
                    "Pass the model's output of the recorded forward pass, computed with gradients "
                    "enabled, and choose layers before the head."
                )
                got = "logits that do not depend on it"
                raise ValueError(message(f"layer {name!r}", "a way from the logits", got, fix))

    def _alive(self, logits: Tensor) -> dict[Any, bool]:
        """For each autograd node behind ``logits`` whether relevance flows through it to a tap.

        For a method other than the gradient, every such node must be a detour or linear.
        """
        taps = {grad_node(tap) for tap in self.taps.values()}
        alive: dict[Any, bool] = {}
        stack = [grad_node(logits)]
        while stack:
            node = stack[-1]
            if node is None or node in alive:
                stack.pop()
                continue
            inputs = [following for following, _ in node.next_functions]
            if is_relevance_function(node):
                inputs = inputs[1:2] if node.rule is not None else []
            if waiting := [i for i in inputs if i is not None and i not in alive]:
                stack.extend(waiting)
                continue
            carried = [alive.get(i, False) for i in inputs]
            alive[node] = any(carried) or node in taps
            self._check_node(node, carried)
            stack.pop()
        return alive

    def _check_node(self, node: Any, carried: list[bool]) -> None:
        if not any(carried) or is_relevance_function(node):
            return
        if self._method.is_gradient and not getattr(node, "_saved_training", False):
            return  # the gradient is right everywhere but through the statistics of a batch
        operation = node.name().removeprefix("torch::autograd::").rstrip("0123456789")
        kind = operation.removesuffix("Backward")
        if kind in LINEAR_OPERATIONS or (
            kind in PRODUCTS and sum(carried) == 1 and not (kind == "Div" and not carried[0])
        ):
            return
        fix = (
            "Make it a module (such as nn.ReLU), choose layers behind it, or the method "
            "gradient_activation."
        )
        raise ValueError(message(self._name, "operations that have a rule", operation, fix))


def _padded_oddly(module: nn.Conv2d) -> bool:
    return module.padding_mode != "zeros" or module.padding == "same"


def _runs(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module's forward pass is that of ``kind``, also if it inherits it."""
    return type(module).forward is kind.forward
