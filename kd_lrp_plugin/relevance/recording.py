"""Relevance maps of a model at named layers, made from the forward pass that happened anyway.

Captum computes the attribution. It sees an ordinary gradient; where the method is LRP, the
recorded graph hands back relevance instead (:mod:`kd_lrp_plugin.relevance.hooks`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from captum.attr import LayerGradientXActivation
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from kd_lrp_plugin.relevance.hooks import Propagation
from kd_lrp_plugin.relevance.methods import METHODS
from kd_lrp_plugin.relevance.target_layers import choose_layers, resolve_layers
from kd_lrp_plugin.utils.preserved import preserved
from kd_lrp_plugin.utils.validation import check_class_weights, check_known, message

_SETTLED: WeakKeyDictionary[nn.Module, set[tuple]] = WeakKeyDictionary()
"""What has been looked at for each model: layers, method and size of the graph."""
CANCELLATION = 1e-3
"""Sums over channels below this part of their terms' sizes are no relevance but their rounding."""


def relevance_maps(
    model: nn.Module,
    images: Float[Tensor, "n channels height width"],
    targets: Int[Tensor, " n"] | Float[Tensor, "n classes"],
    layers: Sequence[str] | str = "auto",
    method: str = "gradient_activation",
    create_graph: bool = False,
    signed: bool = False,
) -> list[Float[Tensor, "n h w"]]:
    """Relevance maps of ``images``: one forward pass and one backward pass.

    Arguments, result and errors are those of :func:`record` and :meth:`Recording.maps`. The
    model is left as it was found, running statistics of a batch norm in train mode included.

    Example:
        >>> import timm
        >>> model = timm.create_model("mobilenetv2_035", num_classes=4).eval()
        >>> images, targets = torch.rand(2, 3, 64, 64), torch.tensor([0, 3])
        >>> [tuple(m.shape) for m in relevance_maps(model, images, targets, ["blocks.4"])]
        [(2, 4, 4)]
    """
    with preserved(model):
        with record(model, layers, method) as recording:
            logits = model(images)
        return recording.maps(logits, targets, create_graph, signed)


@contextmanager
def record(
    model: nn.Module,
    layers: Sequence[str] | str = "auto",
    method: str = "gradient_activation",
) -> Iterator["Recording"]:
    """Record the forward passes of ``model`` inside the context, with gradients enabled.

    A model without trainable parameters, such as a frozen teacher, keeps a graph from its first
    target layer on only. Under ``torch.autocast`` a forward pass continues in float32 from the
    first target layer that runs, so that features, logits, maps and their derivative are float32.
    Fused attention, which has no second derivative, is off meanwhile. When the context closes, the
    model is as it was.

    Args:
        model: any module that ends in logits (n, classes). Of a ``DistributedDataParallel`` the
            module inside is recorded.
        layers: names of modules with output (n, c, h, w), (n, h, w, c) or of tokens (n, l, c), or
            "auto" for one per reduction of the image or quarter of the depth, without the last
            (:func:`~kd_lrp_plugin.relevance.target_layers.choose_layers`).
        method: a name of :data:`kd_lrp_plugin.relevance.methods.METHODS`.

    Yields:
        The recording of the latest forward pass, of use after the context has closed, too.

    Raises:
        ValueError: for an unknown method or layer, or a model or layer that cannot be recorded;
            a compiled model, one with weights in half precision and one under gradient
            checkpointing are among them.

    Example:
        >>> import timm
        >>> student = timm.create_model("mobilenetv2_035", num_classes=4)
        >>> with record(student, ["blocks.4"], method="lrp_zplus") as recording:
        ...     logits = student(torch.rand(2, 3, 64, 64))
        >>> (student_map,) = recording.maps(logits, torch.tensor([0, 3]), create_graph=True)
        >>> student_map.mean().backward()
    """
    check_known("method", method, METHODS)
    root = _unwrap(model)
    _check_as_written(model)
    names = _get_layer_names(root, layers)
    propagation = Propagation(root, names, METHODS[method], method)
    with torch.enable_grad(), propagation.installed(), _naming_changes(f"record {names}"):
        yield Recording(names, method, propagation)


class Recording:
    """The latest forward pass inside the context of :func:`record`.

    Attributes:
        layers: names of the target layers.
        method: name of the method.
    """

    def __init__(self, layers: list[str], method: str, propagation: Propagation) -> None:
        self.layers = layers
        self.method = method
        self._propagation = propagation

    @property
    def activations(self) -> list[Float[Tensor, "n c h w"]]:
        """Output of each target layer as maps, in the model's graph: features for a relation loss.

        Of tokens those of the patches, on their grid.
        """
        self._propagation.check_recorded()
        return [self._propagation.outputs[layer] for layer in self.layers]

    def maps(
        self,
        logits: Float[Tensor, "n classes"] | Any,
        targets: Int[Tensor, " n"] | Float[Tensor, "n classes"],
        create_graph: bool = False,
        signed: bool = False,
    ) -> list[Float[Tensor, "n h w"]]:
        """Relevance of ``targets`` at each target layer.

        Args:
            logits: output of the recorded forward pass, as the model returned it; in a tuple, a
                dictionary or a dataclass, :func:`find_logits` finds them.
            targets: a class index per image, or a weight per image and class: what is explained
                is the weighted sum of logits. The weights need not sum to one.
            create_graph: keep the graph of the maps, so that a loss on them reaches the weights.
            signed: the sum over channels as it is, instead of its positive part.

        Returns:
            One map (n, h, w) per layer, in the order of ``layers``.

        Raises:
            ValueError: if targets and logits do not fit, if a layer is not on the way to the
                logits, if the method has no rule for an operation on this way, if activation
                times gradient cancels at a layer, as it does in front of some norms, or if all
                relevance of a layer is on its class tokens, which no map shows.

        Reference:
            The thesis, eq. 2.5-2.6 (Grad-CAM) and 2.17-2.18 (activation times gradient). For
            Grad-CAM the gradient form (Selvaraju et al., ICCV 2017, eq. 1-2) replaces the
            weights of the last layer, which exist per channel only behind global average
            pooling. Deviation: no relevance flows through the statistics of a batch, nor, but for
            Grad-CAM, through the deviation of a layer norm.
        """
        logits = find_logits("maps", logits)
        if logits.ndim != 2:
            fix = "Record a model that ends in a classifier."
            raise ValueError(message("maps", "logits (n, classes)", tuple(logits.shape), fix))
        # CUDA stops of its own accord at an index that there is no logit for.
        check_class_weights("maps", targets, logits, look=not targets.is_cuda)
        with _naming_changes(self.method):
            self._propagation.check_path(logits)
        with torch.autocast(logits.device.type, enabled=False):
            return self._maps(logits, targets, create_graph, signed)

    def _maps(
        self, logits: Tensor, targets: Tensor, create_graph: bool, signed: bool
    ) -> list[Tensor]:
        with torch.enable_grad():  # the maps of a validation step need no graph, their making does
            if targets.is_floating_point():
                scores = (logits * targets).sum(1)
            else:
                scores = logits.gather(1, targets[:, None].long()).squeeze(1)
        activations = self.activations
        replay = _Replay(activations, scores)
        captum = LayerGradientXActivation(replay, list(replay.layers), multiply_by_inputs=False)
        graph = {"create_graph": create_graph, "retain_graph": True}
        with self._propagation.relevance_pass(), _naming_changes(self.method):
            factors = captum.attribute(scores, grad_kwargs=graph)
        settled = self._is_settled()
        if not settled:
            self._check_patches(factors, targets)
        if METHODS[self.method].pooled:
            factors = [factor.mean((2, 3), keepdim=True) for factor in factors]
        with torch.set_grad_enabled(create_graph):
            terms = [a * factor for a, factor in zip(activations, factors, strict=True)]
            maps = [term.sum(1) for term in terms]
            if not settled and self._check_cancellation(terms, maps):
                self._settle()
            return maps if signed else [m.relu() for m in maps]

    def _is_settled(self) -> bool:
        """Whether maps of the same graph have been looked at, which is to wait for the device.

        What is looked for lies in how a model is made, not in its weights or in the images.
        """
        return self._get_kind() in _SETTLED.get(self._propagation.model, ())

    def _settle(self) -> None:
        _SETTLED.setdefault(self._propagation.model, set()).add(self._get_kind())

    def _get_kind(self) -> tuple:
        return (tuple(self.layers), self.method, self._propagation.n_nodes)

    @torch.no_grad()
    def _check_patches(self, factors: Sequence[Tensor], targets: Tensor) -> None:
        """Raise ``ValueError`` where other tokens than those of patches have all relevance."""
        if targets.is_floating_point() and not targets.any():
            return  # nothing is asked for
        for layer, factor in zip(self.layers, factors, strict=True):
            if self._propagation.layouts[layer].prefix and not factor.any():
                got = "none: all of it is on the class tokens, which alone are read behind it"
                fix = "Choose a layer in front of the last attention."
                where = f"{self.method} at layer {layer!r}"
                raise ValueError(message(where, "relevance of the patches", got, fix))

    @torch.no_grad()
    def _check_cancellation(self, terms: list[Tensor], maps: list[Tensor]) -> bool:
        """Raise ``ValueError`` where the sums over channels are all rounding.

        Returns whether all layers have relevance, so that there was something to look at.

        What reads a layer only through a norm over its channels does not depend on their common
        scale, so that by Euler's theorem on homogeneous functions their activations times
        gradients sum to zero, at every position. A LayerNorm has a rule against that. Others are
        measured rather than looked up in the graph, for they are written in many ways (RMSNorm, by
        hand), also behind other operations. A norm over the positions, too (GroupNorm), makes only
        the total of a map zero.
        """
        sizes = [(m.abs().sum(), term.abs().sum()) for m, term in zip(maps, terms, strict=True)]
        is_plain = METHODS[self.method].is_gradient and not METHODS[self.method].pooled
        cancels = torch.stack([m < CANCELLATION * term for m, term in sizes])
        some = torch.stack([m > 0 for m, _ in sizes]).all()
        # One synchronisation with the device for all layers.
        does_cancel, has_relevance = torch.stack([cancels.any(), some]).tolist()
        if not (is_plain and does_cancel):
            return has_relevance
        index = int(cancels.int().argmax())
        got = f"sums over channels that cancel, {float(sizes[index][0] / sizes[index][1]):.0e} of"
        fix = (
            "In front of a norm over channels such as RMSNorm they do whatever the weights. "
            "Choose a layer behind that norm, or the method grad_cam."
        )
        where = f"{self.method} at layer {self.layers[index]!r}"
        raise ValueError(message(where, "a map", f"{got} their terms", fix))


def find_logits(where: str, output: Any) -> Tensor:
    """The logits in what a model has returned.

    A tensor is them. Otherwise it is what is called ``logits`` in a dictionary, a named tuple or a
    dataclass (GoogLeNet and Inception in train mode, transformers' models), or else the only
    tensor (n, classes) in it.

    Raises:
        ValueError: if it is not clear which they are.

    Example:
        >>> find_logits("maps", (torch.zeros(2, 8, 4, 4), torch.zeros(2, 3))).shape
        torch.Size([2, 3])
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        entries = dict(output)
    elif is_dataclass(output) and not isinstance(output, type):
        entries = {field.name: getattr(output, field.name) for field in fields(output)}
    elif hasattr(output, "_asdict"):  # a named tuple
        entries = output._asdict()
    elif isinstance(output, Sequence):
        entries = dict(enumerate(output))
    else:
        entries = {}
    tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    matrices = {key: value for key, value in tensors.items() if value.ndim == 2}
    candidates = {"logits": tensors["logits"]} if "logits" in tensors else matrices
    if len(candidates) != 1:
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        got = f"{type(output).__name__} of {shapes}" if entries else type(output).__name__
        fix = "Pass the tensor of the logits itself, or return it under the name 'logits'."
        raise ValueError(message(where, "one output that is the logits (n, classes)", got, fix))
    (logits,) = candidates.values()
    return logits


@contextmanager
def _naming_changes(where: str) -> Iterator[None]:
    """Autograd's own refusals of changes in place, as errors of the house."""
    try:
        yield
    except RuntimeError as error:
        _, changed, rest = str(error).partition("modified by an inplace operation: ")
        if not changed and "a leaf Variable that requires grad" not in str(error):
            raise
        # The leaf is the output of a target layer in a frozen model: its graph begins there.
        got = f"a change in place of {rest.partition(';')[0] or 'the output of a target layer'}"
        fix = "Make the change out of place, or choose the module around the layer."
        raise ValueError(message(where, "values that stay", got, fix)) from error


class _Replay(nn.Module):
    """A recorded forward pass in the form that Captum asks for: layers, run by ``forward``."""

    def __init__(self, activations: list[Tensor], scores: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in activations)
        self._activations = activations
        self._scores = scores

    def forward(self, _: Tensor) -> Tensor:
        for layer, activation in zip(self.layers, self._activations, strict=True):
            layer(activation)
        return self._scores


def _unwrap(model: nn.Module) -> nn.Module:
    if isinstance(model, DataParallel):
        fix = "Use DistributedDataParallel, one process per device."
        raise ValueError(
            message("record", "a model whose activations lead to its logits", "DataParallel", fix)
        )
    if not isinstance(model, DistributedDataParallel):
        return model
    if model.static_graph:
        fix = "Drop static_graph: with it, gradients of a relevance loss are silently wrong."
        raise ValueError(message("record", "static_graph=False", "static_graph=True", fix))
    return model.module


def _check_as_written(model: nn.Module) -> None:
    """Neither compiled, for hooks would be left out, nor in half precision."""
    for name, module in model.named_modules():
        if isinstance(module, OptimizedModule) or module._compiled_call_impl is not None:
            fix = "torch.compile is for losses without relevance; leave the model uncompiled."
            got = f"one compiled at {name!r}" if name else "a compiled one"
            raise ValueError(message("record", "a model as written", got, fix))
        for own, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype in (torch.float16, torch.bfloat16):
                fix = "Keep the weights in float32, and run the model under torch.autocast."
                got = f"{'.'.join(filter(None, (name, own)))!r} in {parameter.dtype}"
                raise ValueError(message("record", "weights in float32", got, fix))


def _get_layer_names(model: nn.Module, layers: Sequence[str] | str) -> list[str]:
    if layers == "auto":
        return choose_layers(model)
    names = [layers] if isinstance(layers, str) else list(layers)
    if not names:
        raise ValueError(message("layers", "at least one layer name", names, "Name the layers."))
    names = resolve_layers(model, names)
    if len(set(names)) < len(names):
        raise ValueError(message("layers", "different names", names, "Name each layer once."))
    return names
