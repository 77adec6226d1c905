"""Relevance maps of a model at named layers, made from the forward pass that happened anyway.

Captum computes the attribution. It sees an ordinary gradient; where the method is LRP, the
recorded graph hands back relevance instead (:mod:`kd_lrp_plugin.relevance.hooks`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from captum.attr import LayerGradientXActivation
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from kd_lrp_plugin.relevance.hooks import Propagation
from kd_lrp_plugin.relevance.layers import choose_layers, resolve_layers
from kd_lrp_plugin.relevance.methods import METHODS
from kd_lrp_plugin.utils.validation import check_known, check_targets, message


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
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with record(model, layers, method) as recording:
            logits = model(images)
        return recording.maps(logits, targets, create_graph, signed)
    finally:
        for buffer, found in kept:
            buffer.data = found


@contextmanager
def record(
    model: nn.Module,
    layers: Sequence[str] | str = "auto",
    method: str = "gradient_activation",
) -> Iterator["Recording"]:
    """Record the forward passes of ``model`` inside the context, with gradients enabled.

    A model without trainable parameters, such as a frozen teacher, keeps a graph from its first
    tapped layer on only. Under ``torch.autocast`` a forward pass goes on in float32 from the first
    tapped layer that runs, so that features, logits, maps and their derivative are float32. When
    the context closes, the model is as it was.

    Args:
        model: any module that ends in logits (n, classes). Of a ``DistributedDataParallel`` the
            module inside is recorded.
        layers: names of modules with output (n, c, h, w), or "auto" for one per reduction of the
            image, without the last; see :func:`kd_lrp_plugin.relevance.layers.choose_layers`.
        method: a name of :data:`kd_lrp_plugin.relevance.methods.METHODS`.

    Yields:
        The recording of the latest forward pass, of use after the context has closed, too.

    Raises:
        ValueError: for an unknown method or layer, or a model or layer that cannot be recorded;
            a compiled model and one with weights in half precision are among them.

    Example:
        >>> import timm
        >>> student = timm.create_model("mobilenetv2_035", num_classes=4)
        >>> with record(student, ["blocks.4"], method="lrp_zplus") as recording:
        ...     logits = student(torch.rand(2, 3, 64, 64))
        >>> (student_map,) = recording.maps(logits, torch.tensor([0, 3]), create_graph=True)
        >>> student_map.mean().backward()
    """
    check_known("method", method, METHODS)
    root = _unwrapped(model)
    _check_as_written(model)
    names = _layer_names(root, layers)
    propagation = Propagation(root, names, METHODS[method], method)
    with torch.enable_grad(), propagation.listening():
        yield Recording(names, method, propagation)


class Recording:
    """The latest forward pass that :func:`record` has heard.

    Attributes:
        layers: names of the tapped layers.
        method: name of the method.
    """

    def __init__(self, layers: list[str], method: str, propagation: Propagation) -> None:
        self.layers = layers
        self.method = method
        self._propagation = propagation

    @property
    def activations(self) -> list[Float[Tensor, "n c h w"]]:
        """Output of each tapped layer, in the model's graph: features for a relation loss."""
        self._propagation.check_heard()
        return [self._propagation.taps[layer] for layer in self.layers]

    def maps(
        self,
        logits: Float[Tensor, "n classes"],
        targets: Int[Tensor, " n"] | Float[Tensor, "n classes"],
        create_graph: bool = False,
        signed: bool = False,
    ) -> list[Float[Tensor, "n h w"]]:
        """Relevance of ``targets`` at each tapped layer.

        Args:
            logits: output of the recorded forward pass, as the model returned it.
            targets: a class index per image, or a weight per image and class: what is explained
                is the weighted sum of logits.
            create_graph: keep the graph of the maps, so that a loss on them reaches the weights.
            signed: the sum over channels as it is, instead of its positive part.

        Returns:
            One map (n, h, w) per layer, in the order of ``layers``.

        Raises:
            ValueError: if targets and logits do not fit, if a layer is not on the way to the
                logits, or if the method has no rule for an operation on this way.

        Reference:
            The thesis, eq. 2.5-2.6 (Grad-CAM) and 2.17-2.18 (activation times gradient). For
            Grad-CAM the gradient form (Selvaraju et al., ICCV 2017, eq. 1-2) replaces the
            weights of the last layer, which exist per channel only behind global average
            pooling. Deviation: no relevance flows through the statistics of a batch.
        """
        if logits.ndim != 2:
            fix = "Record a model that ends in a classifier."
            raise ValueError(message("maps", "logits (n, classes)", tuple(logits.shape), fix))
        check_targets("maps", targets, logits)
        self._propagation.check_way(logits)
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
        captum = LayerGradientXActivation(replay, list(replay.taps), multiply_by_inputs=False)
        graph = {"create_graph": create_graph, "retain_graph": True}
        with self._propagation.relevance_pass():
            factors = captum.attribute(scores, grad_kwargs=graph)
        if METHODS[self.method].pooled:
            factors = [factor.mean((2, 3), keepdim=True) for factor in factors]
        with torch.set_grad_enabled(create_graph):
            maps = [(a * factor).sum(1) for a, factor in zip(activations, factors, strict=True)]
            return maps if signed else [m.relu() for m in maps]


class _Replay(nn.Module):
    """A recorded forward pass in the form that Captum asks for: layers, run by ``forward``."""

    def __init__(self, activations: list[Tensor], scores: Tensor) -> None:
        super().__init__()
        self.taps = nn.ModuleList(nn.Identity() for _ in activations)
        self._activations = activations
        self._scores = scores

    def forward(self, _: Tensor) -> Tensor:
        for tap, activation in zip(self.taps, self._activations, strict=True):
            tap(activation)
        return self._scores


def _unwrapped(model: nn.Module) -> nn.Module:
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
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            fix = "Keep the weights in float32, and run the model under torch.autocast."
            got = f"{name!r} in {parameter.dtype}"
            raise ValueError(message("record", "weights in float32", got, fix))


def _layer_names(model: nn.Module, layers: Sequence[str] | str) -> list[str]:
    if getattr(model, "output_fmt", "NCHW") not in ("NCHW", None):
        got = f"{type(model).__name__}, whose maps are {model.output_fmt}"
        raise ValueError(message("record", "layers with output (n, c, h, w)", got, "Use a CNN."))
    if layers == "auto":
        return choose_layers(model)
    names = [layers] if isinstance(layers, str) else list(layers)
    if not names:
        raise ValueError(message("layers", "at least one layer name", names, "Name the layers."))
    names = resolve_layers(model, names)
    if len(set(names)) < len(names):
        raise ValueError(message("layers", "different names", names, "Name each layer once."))
    return names
