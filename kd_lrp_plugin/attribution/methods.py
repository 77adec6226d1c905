"""Explanations of a finished model: maps by any method, and what a map tells of its model.

Training needs maps that can be trained through (:mod:`kd_lrp_plugin.relevance.recording`);
afterwards the methods that only ask the model again are welcome, too. All of them explain a logit,
but RISE, a probability.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd_lrp_plugin.relevance.methods import METHODS
from kd_lrp_plugin.relevance.recording import relevance_maps
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.registry import Registry
from kd_lrp_plugin.utils.validation import check_known, message

BATCH = 32
Maps = Callable[[nn.Module, Tensor, Tensor, str], Tensor]


@dataclass(frozen=True)
class Attribution:
    """A way to explain a model.

    Attributes:
        maps: (model, images (n, c, h, w), class indices (n,), layer) -> maps (n, h', w') without
            negative entries.
        layered: whether it looks at a layer; otherwise at the input, and the layer is ignored.
        slow: whether it asks the model hundreds of times for one image.
    """

    maps: Maps
    layered: bool = True
    slow: bool = False


class AttributionRegistry(Registry[Attribution]):
    """Ways to explain a model, by name.

    Every method of :data:`kd_lrp_plugin.relevance.methods.METHODS` is one, also those that a module
    of the user's own registers there later.
    """

    def register(self, entry: Attribution, name: str | None = None) -> Attribution:
        if name in METHODS:
            raise ValueError(message(self.kind, "a new name", repr(name), "Choose another name."))
        return super().register(entry, name)

    def __getitem__(self, key: str) -> Attribution:
        if key not in self._entries and key in METHODS:
            return Attribution(partial(_relevance, method=key))
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:
        return iter({**dict.fromkeys(METHODS), **self._entries})

    def __len__(self) -> int:
        return len({*METHODS, *self._entries})


ATTRIBUTIONS = AttributionRegistry("method")
INPUT = "input"
"""What stands for the layer of methods that have none."""


def attribute(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    targets: Int[Tensor, " n"],
    method: str,
    layer: str = INPUT,
) -> Float[Tensor, "n h2 w2"]:
    """Maps of why the model sees ``targets`` in ``images``, by any method.

    Args:
        model: in evaluation mode; left as it was.
        images: as the model takes them.
        targets: one class index per image.
        method: a name of :data:`ATTRIBUTIONS`.
        layer: name of a module, as for :func:`kd_lrp_plugin.relevance.recording.record`.

    Returns:
        Maps on the CPU, of the layer's size or, for methods without one, the images'.

    Raises:
        ValueError: for an unknown method or layer, a model in train mode, targets that do not
            fit, or a model that the method cannot handle.

    Example:
        >>> import timm
        >>> model = timm.create_model("mobilenetv2_035", num_classes=4).eval()
        >>> images, targets = torch.rand(2, 3, 64, 64), torch.tensor([0, 3])
        >>> tuple(attribute(model, images, targets, "score_cam", "blocks.4").shape)
        (2, 4, 4)
    """
    check_known("method", method, ATTRIBUTIONS)
    if model.training:
        got = "train mode, where images of a batch change each other's maps"
        raise ValueError(message("attribute", "evaluation mode", got, "Call model.eval()."))
    if images.ndim != 4 or targets.shape != images.shape[:1] or targets.is_floating_point():
        got = f"{tuple(images.shape)} and {tuple(targets.shape)} of {targets.dtype}"
        fix = "Give one class index per image."
        raise ValueError(message("attribute", "images (n, c, h, w) and targets (n,)", got, fix))
    batch = BATCH // 8 if ATTRIBUTIONS[method].slow else BATCH  # so that progress shows
    parts = list(zip(images.split(batch), targets.split(batch), strict=True))
    tracked = current_progress().track(parts, method, len(parts))
    maps = ATTRIBUTIONS[method].maps
    return torch.cat([maps(model, x, target, layer).detach().cpu() for x, target in tracked])


def _relevance(
    model: nn.Module, images: Tensor, targets: Tensor, layer: str, method: str
) -> Tensor:
    return relevance_maps(model, images, targets, [layer], method)[0]


def mean_colour(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c 1 1"]:
    return images.mean((2, 3), keepdim=True)
