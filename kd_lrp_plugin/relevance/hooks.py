"""The hooks that put rules behind layers for a forward pass, and remember the target layers.

Behind every layer that a rule serves stands a
:class:`~kd_lrp_plugin.relevance.graph.RelevanceFunction`: an identity whose backward pass goes
the ordinary way, except during a relevance pass, when it follows the rule to the layer's input.
So whoever takes a gradient during a relevance pass gets relevance.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.utils import parametrize

from kd_lrp_plugin.relevance import rules
from kd_lrp_plugin.relevance.attention import is_attention, serve_attention
from kd_lrp_plugin.relevance.graph import find_carriers, get_grad_node, refuse_checkpointing
from kd_lrp_plugin.relevance.layer_hooks import FusedNormInput, LayerHooks
from kd_lrp_plugin.relevance.layer_rules import (
    ACTIVATIONS,
    HARD_SIGMOIDS,
    LAYER_NORMS,
    LINEAR_LAYERS,
    SIGMOIDS,
    LayerRules,
    has_readable_weight,
    is_plain_convolution,
    runs_as,
)
from kd_lrp_plugin.relevance.layouts import Layout, find_layout
from kd_lrp_plugin.relevance.methods import Method
from kd_lrp_plugin.utils.validation import message

_RECORDED: WeakSet[nn.Module] = WeakSet()

CHECKPOINTING = {
    "grad_checkpointing": "Call set_grad_checkpointing(False) of the model before it is recorded.",
    "gradient_checkpointing": "Call gradient_checkpointing_disable() before it is recorded.",
    "memory_efficient": "Set it to False before the model is recorded.",
}
"""Attributes of timm's, transformers' and torchvision's modules that run them twice; what to do."""


class Propagation:
    """The rules of one method on one model, and the target layers where relevance is read.

    Attributes:
        outputs: of each target layer in the latest forward pass, by name, as maps (n, c, h, w).
        layouts: of the tensors that the model has in their place.
        model: that is recorded.
        n_nodes: of the graph behind the logits that were last asked about.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], method: Method, name: str) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.layouts: dict[str, Layout] = {}
        self.n_nodes = 0
        self.model = model
        self._layers = layers
        self._method = method
        self._name = name
        self._rules = LayerRules(method, {model.get_submodule(layer) for layer in layers})
        self._frozen = not any(parameter.requires_grad for parameter in model.parameters())
        self._versions: dict[str, int] = {}
        self._image_shape: Sequence[int] | None = None
        self._autocast = WideAutocast()
        self._fused_norms: list[FusedNormInput] = []
        self._in_place: list[nn.Module] = []
        self._hooks = LayerHooks(name)
        # A checkpointed part of the model runs a second time, in the backward pass: not recorded.
        self._is_over = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Serve the forward passes inside the context; leave no trace on the model."""
        modules = set(self.model.modules()) if _RECORDED else set()
        if any(not modules.isdisjoint(recorded.modules()) for recorded in list(_RECORDED)):
            fix = "Close the first recording, or ask it for all layers."
            raise ValueError(message("record", "a model that is not being recorded", "one", fix))
        try:
            _RECORDED.add(self.model)
            self._install()
            with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
                yield
        finally:
            _RECORDED.discard(self.model)
            self._hooks.undo()
            self._forget_calls()

    @contextmanager
    def relevance_pass(self) -> Iterator[None]:
        """Gradients taken inside the context follow the rules."""
        self._rules.switch.on = True
        try:
            yield
        finally:
            self._rules.switch.on = False

    # --- installing -----------------------------------------------------------------------------

    def _install(self) -> None:
        modules = dict(self.model.named_modules())
        self._hooks.listen()
        begin = self.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._hooks.add(begin.remove)
        self._hooks.add(self.model.register_forward_hook(self._end, always_call=True).remove)
        self._hooks.add(self._end)
        for name, module in modules.items():
            if "parametrizations" not in name.split("."):  # these make weights, not features
                self._prepare(name, module)
                self._install_rule(name, module)
        for name in self._layers:
            # Behind the hooks of the user: the next layer reads what they return.
            hook = partial(self._remember, name)
            self._hooks.add(modules[name].register_forward_hook(hook).remove)

    def _prepare(self, name: str, module: nn.Module) -> None:
        """See to it that it runs once, spares its input, and hands out computed weights."""
        # Not by getattr, which of a module is slow where there is none, as nearly everywhere.
        attributes = vars(module)
        for attribute, fix in CHECKPOINTING.items():
            if attributes.get(attribute) is True:
                got = f"gradient checkpointing: {attribute} of {name or 'the model'!r} is True"
                raise ValueError(message("record", "a forward pass that runs once", got, fix))
        if attributes.get("inplace", getattr(type(module), "inplace", False)) is True:
            self._in_place.append(module)
        if "parametrizations" in module._modules and parametrize.is_parametrized(module, "weight"):
            self._watch_weight(module)

    def _install_rule(self, name: str, module: nn.Module) -> None:
        """Every kind of layer, and what stands behind it."""
        hooks, method, layer_rules = self._hooks, self._method, self._rules
        lrp = not method.is_gradient
        gates = SIGMOIDS if method.through_weights else (*SIGMOIDS, nn.Softmax)
        if is_attention(module):
            serve_attention(name, module, method, hooks, layer_rules)
        elif isinstance(module, nn.Conv2d):
            if is_plain_convolution(module):
                hooks.put_behind(name, module, partial(layer_rules.serve_convolution, name, module))
            elif lrp:
                expected = (
                    "a convolution with zero padding, its own weights and its class's forward"
                )
                hooks.refuse(name, module, expected)
        elif isinstance(module, BatchNorm):
            self._install_norm(name, module)
        elif isinstance(module, nn.Linear):
            if runs_as(module, *LINEAR_LAYERS) and has_readable_weight(module):
                hooks.put_behind(name, module, partial(layer_rules.serve_linear, name, module))
            elif lrp:
                hooks.refuse(name, module, "a linear layer with its own weights and forward")
        elif runs_as(module, *LAYER_NORMS) and has_readable_weight(module):
            if not method.is_grad_cam:
                hooks.put_behind(name, module, partial(layer_rules.serve_layer_norm, name, module))
        elif lrp and runs_as(module, *gates):
            gate = partial(layer_rules.serve_gate, name)
            hooks.put_behind(name, module, lambda _, output: gate(output))
        elif lrp and runs_as(module, *ACTIVATIONS):
            serve = partial(layer_rules.serve_activation, rules.activation, name, module)
            hooks.put_behind(name, module, serve)
        elif runs_as(module, *HARD_SIGMOIDS):
            serve = partial(layer_rules.serve_activation, rules.hard_sigmoid_gradient, name, module)
            hooks.put_behind(name, module, serve)

    def _install_norm(self, name: str, module: BatchNorm) -> None:
        serve = partial(self._rules.serve_norm, name, module)
        if runs_as(module, BatchNormAct2d) and has_readable_weight(module):
            # Its activation reads the output, and does not work in place while it is recorded.
            act: Any = module.act
            stays = runs_as(act, *ACTIVATIONS)
            fused = FusedNormInput(name, partial(serve, stays=stays))
            hook = module.register_forward_pre_hook(fused.keep, with_kwargs=True)
            self._hooks.add(hook.remove)
            self._fused_norms.append(fused)
            drop: Any = module.drop
            self._hooks.put_behind(name, drop, fused.serve_drop)
            self._hooks.put_behind(name, module, fused.check)
        elif runs_as(module, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and (
            has_readable_weight(module)
        ):
            self._hooks.put_behind(name, module, serve)
        elif not self._method.is_gradient or module.training:
            # over several processes, or with more than the norm
            self._hooks.refuse(name, module, "a batch norm of PyTorch or timm, within one process")

    def _watch_weight(self, module: nn.Module) -> None:
        def keep(_: nn.Module, __: tuple, weight: Tensor) -> None:
            if not self._is_over:
                self._rules.weights[module] = weight

        parametrization = module.get_submodule("parametrizations.weight")
        handle = parametrization.register_forward_hook(keep)
        self._hooks.add(handle.remove)

    # --- during a forward pass --------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._is_over = self._hooks.is_recording = False
        inputs = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim == 4)
        self._image_shape = next((x.shape for x in inputs), None)
        self.outputs.clear()
        self._forget_calls()

    def _end(self, *_: object) -> None:
        self._is_over, self._hooks.is_recording = True, False
        self._autocast.restore()

    def _forget_calls(self) -> None:
        for fused in self._fused_norms:
            fused.forget()
        self._rules.clear()

    def _remember(self, name: str, module: nn.Module, inputs: tuple, output: Any) -> Any:
        """Keep the output of a target layer, with a graph from there on."""
        if self._is_over:
            return None
        where = f"layer {name!r}"
        layout = find_layout(self.model, name, output, self._image_shape)
        if name in self.outputs:
            fix = "Choose a layer that runs once."
            raise ValueError(message(where, "one call in a forward pass", "a second", fix))
        if torch.is_inference(output):
            fix = "Leave torch.inference_mode for a recorded forward pass."
            raise ValueError(message(where, "an output with a graph", "inference mode", fix))
        refuse_checkpointing(where)
        output = self._autocast.widen(output)
        if not self.outputs:
            # Through a frozen model that starts here, nothing else ever flows back: the
            # ordinary graph need not be kept.
            self._rules.without_gradient = self._frozen and not output.requires_grad
            for spared in self._in_place:  # from here on, what a layer reads is kept
                if spared.inplace:
                    self._hooks.set(spared, "inplace", False)
        maps = layout.to_maps(output)
        kept = maps if maps.requires_grad else maps.detach().requires_grad_()
        self.outputs[name], self.layouts[name] = kept, layout
        self._versions[name] = kept._version
        self._hooks.is_recording = True
        return layout.from_maps(kept, output)

    # --- checks before a relevance pass -----------------------------------------------------------

    def check_recorded(self) -> None:
        """Raise ``ValueError`` unless every target layer has run, and its output has stayed."""
        if missing := [name for name in self._layers if name not in self.outputs]:
            fix = "Run the model inside the context, and choose layers that it uses."
            raise ValueError(message(self._name, f"a forward pass through {missing}", "none", fix))
        for name, output in self.outputs.items():
            if output._version != self._versions[name]:
                fix = "Choose the module around it, whose output stays as it is."
                got = "one that the model modifies in place afterwards"
                raise ValueError(message(f"layer {name!r}", "an output that stays", got, fix))

    def check_path(self, logits: Tensor) -> None:
        """Raise ``ValueError`` unless relevance can flow from ``logits`` to every target layer."""
        self.check_recorded()
        outputs = self.outputs.values()
        carriers = find_carriers(logits, outputs, self._name, self._method.is_gradient)
        self.n_nodes = len(carriers)
        for name, output in self.outputs.items():
            if not carriers.get(get_grad_node(output), False):
                fix = (
                    "Pass the model's output of the recorded forward pass, computed with gradients "
                    "enabled, and choose layers before the head."
                )
                got = "logits that do not depend on it"
                raise ValueError(message(f"layer {name!r}", "a way from the logits", got, fix))


class WideAutocast:
    """Autocast that casts up to float32 from a target layer on, until the forward pass ends."""

    def __init__(self) -> None:
        self._found: dict[str, torch.dtype] = {}

    def widen(self, output: Tensor) -> Tensor:
        """``output`` in float32 if under autocast, which casts up to float32 from here on."""
        kind = output.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            # Unlike switching it off, this also serves a branch around the layer.
            self._found.setdefault(kind, torch.get_autocast_dtype(kind))
            torch.set_autocast_dtype(kind, torch.float32)
            output = output.to(torch.promote_types(output.dtype, torch.float32))
        return output

    def restore(self) -> None:
        for kind, found in self._found.items():
            if torch.get_autocast_dtype(kind) == torch.float32:  # else the model has restored it
                torch.set_autocast_dtype(kind, found)
        self._found.clear()
