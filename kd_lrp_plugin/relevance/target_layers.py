"""Which layers of a model are recorded: names resolved, or chosen by the size of their outputs."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kd_lrp_plugin.utils.preserved import preserved
from kd_lrp_plugin.utils.registry import unknown_name
from kd_lrp_plugin.utils.validation import message

logger = logging.getLogger(__name__)

SIZES = (64, 32, 224, 299, 28)
"""Sides of the images of zeros that a model is traced with, until one fits its classifier: the
cheapest at which five halvings leave a map, then those of CIFAR, ImageNet, Inception and MNIST."""

_CHOSEN: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()


def choose_layers(model: nn.Module) -> list[str]:
    """Names of one layer per reduction of the image, without the last, in the order they run.

    Of timm's models ``feature_info`` tells them; of isotropic ones, such as ViT, the blocks that
    end a quarter of the depth are taken, without the last. Other models are run once, on zeros,
    and for each reduction by a power of two the last stage with maps of that size is taken: the
    last to run of the modules closest to the root. The choice is logged, and kept for as long as
    the model lives, so that recording a step costs no forward pass more.

    Args:
        model: the model, in any mode; its modes, buffers and the random numbers are left as they
            are. A model inside a wrapper, such as torchdistill's auxiliary ones, is found there.

    Returns:
        Names of modules whose output is, or becomes, maps (n, c, h, w).

    Raises:
        ValueError: if the model does not run on zeros of the usual sizes, or it has no maps, or
            maps of one size only.
    """
    if model not in _CHOSEN:
        names = _choose_by_feature_info(model) or _choose_by_trace(model)
        logger.info("layers of %s for 'auto': %s", type(model).__name__, names)
        _CHOSEN[model] = names
    return list(_CHOSEN[model])


def resolve_layers(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Names as they are, or with the prefix that they have got from a wrapper around the model.

    Raises:
        ValueError: for a name that the model does not have, with the nearest ones.
    """
    known = [name for name, _ in model.named_modules() if name]
    if not all(name in known for name in names):
        # One prefix for all, and only one: what a wrapper does, unlike a misspelling.
        prefixes = [name.removesuffix(names[0]) for name in known if name.endswith(f".{names[0]}")]
        fitting = [p for p in prefixes if all(p + name in known for name in names)]
        if len(fitting) == 1:
            return [fitting[0] + name for name in names]
    for name in names:
        if name not in known:
            raise ValueError(unknown_name("layer", name, known))
    return list(names)


def _choose_by_feature_info(model: nn.Module) -> list[str]:
    """timm's own word on its stages, also of a timm model inside a wrapper.

    Of an isotropic model, whose stages are its blocks, those that end a quarter of its depth.
    """
    for prefix, module in model.named_modules():
        info = getattr(module, "feature_info", None)
        if not info or not all(isinstance(e, dict) and "reduction" in e for e in info):
            continue
        last = max(entry["reduction"] for entry in info)
        by_reduction = {e["reduction"]: e["module"] for e in info if e["reduction"] < last}
        names = list(by_reduction.values()) or _list_quarters([e["module"] for e in info])
        if not set(names) <= {name for name, _ in module.named_modules()}:
            continue  # as of twins_svt_small, whose stages are no modules
        return [f"{prefix}.{name}" if prefix else name for name in names]
    return []


def _list_quarters(blocks: Sequence[str]) -> list[str]:
    """The blocks that end the first three quarters of the depth."""
    ends = sorted({math.ceil(len(blocks) * quarter / 4) for quarter in (1, 2, 3)})
    return [blocks[end - 1] for end in ends if end < len(blocks)]


@dataclass(frozen=True)
class _Output:
    """A module that has run, and the size of its maps."""

    name: str
    reduction: int
    is_single: bool = True
    is_channels_last: bool = False

    @property
    def depth(self) -> int:
        return self.name.count(".")


def _choose_by_trace(model: nn.Module) -> list[str]:
    traced = _trace_any(model)
    outputs = [output for output in traced if not output.is_channels_last]
    deepest = max((output.reduction for output in outputs), default=0)
    by_reduction: dict[int, _Output] = {}
    reached = 0  # behind the first map of half the size comes no stage, but a branch or a decoder
    for output in outputs:
        reached = max(reached, output.reduction)
        before = by_reduction.get(output.reduction)
        if reached > output.reduction or output.reduction == deepest or not output.is_single:
            continue
        if before is None or output.depth <= before.depth:
            by_reduction[output.reduction] = output
    depth = min((output.depth for output in by_reduction.values()), default=math.inf)
    if any(o.is_channels_last and o.depth < depth for o in traced):  # as of a swin transformer
        by_reduction.clear()
    if not traced:
        fix = "Name layers, if it has any; else choose losses and methods that need none."
        got = f"{type(model).__name__}, which has none"
        raise ValueError(message("layers", "a model with maps (n, c, h, w)", got, fix))
    if not by_reduction:
        got = f"{type(model).__name__}, whose stages have none that shrink"
        expected = "a model with maps (n, c, h, w) of two sizes or more for 'auto'"
        raise ValueError(message("layers", expected, got, "Name the layers."))
    return [by_reduction[reduction].name for reduction in sorted(by_reduction)]


def _trace_any(model: nn.Module) -> list[_Output]:
    """The trace of the model, or of the largest module inside that runs on images alone."""
    failures: list[str] = []
    prefix, module = "", model
    while True:
        for side in SIZES:
            try:
                found = _trace(module, side)
            except Exception as error:  # of any kind
                failures.append(f"{side} px: {error}")
            else:
                return [replace(output, name=prefix + output.name) for output in found]
        # A wrapper may want more than images; the model that it holds is its largest child.
        children = list(module.named_children())
        if not children:
            break
        name, module = max(children, key=lambda c: sum(p.numel() for p in c[1].parameters()))
        prefix += f"{name}."
    got = f"{type(model).__name__}, which fails: {failures[0]}"
    fix = "Name the layers."
    raise ValueError(message("layers", "a model that runs on zeros for 'auto'", got, fix))


def _trace(model: nn.Module, side: int) -> list[_Output]:
    """Modules with square maps, in the order in which they finish, of one forward pass on zeros."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    # Not first.weight: of a parametrized layer, reading that can change its buffers.
    weight = next((first or model).parameters(), torch.zeros(1))
    channels = first.in_channels if first is not None else getattr(model, "in_chans", 3)
    runs: dict[str, int] = {}
    outputs: list[_Output] = []
    has_begun = False

    def listen(name: str, module: nn.Module) -> RemovableHandle:
        def read(module: nn.Module, _: tuple, output: object) -> None:
            nonlocal has_begun
            has_begun = has_begun or any(True for _ in module.parameters())
            runs[name] = runs.get(name, 0) + 1
            if not (has_begun and isinstance(output, Tensor) and output.ndim == 4):
                return
            second, third, fourth = output.shape[1:]  # c, h, w or h, w, c
            channels_last = second == third != fourth
            if (channels_last or third == fourth) and 1 < third <= side:
                reduction = round(math.log2(side / third))
                outputs.append(_Output(name, reduction, is_channels_last=channels_last))

        return module.register_forward_hook(read)

    images = torch.zeros(2, channels, side, side, device=weight.device, dtype=weight.dtype)
    named = [(name, module) for name, module in model.named_modules() if name]
    # A parametrization hands out weights, which have four axes, too.
    handles = [listen(n, m) for n, m in named if "parametrizations" not in n.split(".")]
    try:
        devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
        with preserved(model), torch.random.fork_rng(devices), torch.no_grad():
            logits = model.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ValueError("it does not end in logits (n, classes)")
    return [replace(output, is_single=runs[output.name] == 1) for output in outputs]
