"""Where the output of a layer has its channels and its positions: three layouts become one.

Convolutional nets hand on maps (n, c, h, w), window transformers such as Swin (n, h, w, c), and
isotropic ones such as ViT and DeiT tokens (n, l, c): those of classes and registers, then one for
each patch, row by row. What is recorded are maps, of which the layer's output is made again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import LayerNorm2d, LayerNorm2dFp32
from timm.models.nest import NestLevel
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from kd_lrp_plugin.utils.validation import message

CHANNELS_FIRST = (nn.Conv2d, BatchNorm, LayerNorm2d, LayerNorm2dFp32)
"""Modules that take and give maps (n, c, h, w)."""
CHANNELS_LAST = (nn.Linear, nn.LayerNorm)
"""Modules that work on the last axis; what is in both is not."""
EXPECTED = "an output (n, c, h, w), (n, h, w, c), or of tokens (n, l, c)"
SAME_ASPECT = 1.25
"""Two reductions that differ by no more are one, of an image that is not square."""


@dataclass(frozen=True)
class Layout:
    """How to read an output as maps.

    Attributes:
        channels_last: whether a map has them there.
        grid: rows and columns of the tokens; None if it is a map.
        prefix: tokens in front of those of the patches.
    """

    channels_last: bool = False
    grid: tuple[int, int] | None = None
    prefix: int = 0

    def to_maps(self, output: Float[Tensor, "n first *rest"]) -> Float[Tensor, "n c h w"]:
        """Channels behind the batch, positions in rows and columns; tokens of no patch left out."""
        if self.grid is not None:
            return output[:, self.prefix :].mT.unflatten(2, self.grid)
        return output.permute(0, 3, 1, 2) if self.channels_last else output

    def from_maps(self, maps: Float[Tensor, "n c h w"], output: Tensor) -> Tensor:
        """The output that ``maps`` are of, made from them and the other tokens of ``output``."""
        if self.grid is not None:
            tokens = maps.flatten(2).mT
            return torch.cat([output[:, : self.prefix], tokens], 1) if self.prefix else tokens
        return maps.permute(0, 2, 3, 1) if self.channels_last else maps


def find_layout(
    model: nn.Module, name: str, output: object, images: Sequence[int] | None
) -> Layout:
    """The layout of what the layer ``name`` has given for ``images``.

    Of the two readings of four axes the one is right whose maps are the image, reduced. Where both
    are, the kinds of the layers in it tell; convolutions alone have one reading.

    Args:
        model: that holds the layer.
        name: of the layer.
        output: of the layer.
        images: shape (n, c, h, w) of the model's input; None if it is not known.

    Raises:
        ValueError: if the output has no positions, or not one map per image.
    """
    where = f"layer {name!r}"
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        got = str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            message(where, EXPECTED, got, "Choose a layer before pooling and flattening.")
        )
    if images is not None and len(output) != images[0]:
        got = f"{len(output)} for {images[0]} images, as inside the windows of an attention"
        raise ValueError(
            message(where, "one map per image", got, "Choose the block around the layer.")
        )
    if output.ndim == 3:
        return _find_token_grid(where, model, name, output, images)
    return Layout(_has_channels_last(where, model, name, output.shape[1:], images))


def _enclosing(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The layer and the modules around it, the nearest first."""
    parts = name.split(".")
    for length in range(len(parts), -1, -1):
        yield model.get_submodule(".".join(parts[:length]))


def _find_token_grid(
    where: str, model: nn.Module, name: str, output: Tensor, images: Sequence[int] | None
) -> Layout:
    """The grid by timm's ``patch_embed``, and which tokens stand in front of it."""
    for module in _enclosing(model, name):
        embed: Any = getattr(module, "patch_embed", None)
        grid = getattr(embed, "grid_size", None)
        if images is not None and hasattr(embed, "dynamic_feat_size"):
            grid = embed.dynamic_feat_size(tuple(images[2:]))
        if grid is None:
            continue
        rows, columns = (int(side) for side in grid)
        known = getattr(module, "num_prefix_tokens", 0)
        prefix = output.shape[1] - rows * columns
        if prefix not in (0, known):
            expected = f"{rows} x {columns} tokens of patches behind {known} others"
            got = f"{output.shape[1]}, pooled, cropped or dropped"
            fix = "Choose a layer whose tokens are those of all patches."
            raise ValueError(message(where, expected, got, fix))
        return Layout(grid=(rows, columns), prefix=prefix)
    got = f"{tuple(output.shape)} and no timm patch_embed around it that has a grid"
    raise ValueError(message(where, EXPECTED, got, "Choose a layer whose output is a map."))


def _has_channels_last(
    where: str, model: nn.Module, name: str, shape: Sequence[int], images: Sequence[int] | None
) -> bool:
    layer, *around = _enclosing(model, name)
    if isinstance(layer, CHANNELS_FIRST):
        return False
    if any(hasattr(module, "fused_attn") or isinstance(module, NestLevel) for module in around):
        got = f"{shape[0]} x {shape[1]} x {shape[2]} inside an attention or what cuts maps for it"
        raise ValueError(message(where, EXPECTED, got, "Choose the attention or the block."))
    kinds = {_get_side(module) for module in layer.modules()}
    formats = (getattr(module, "output_fmt", None) for module in (layer, *around))
    says_last = next((f for f in formats if f is not None), "NCHW") == "NHWC"  # timm's word
    if "first" in kinds and "last" not in kinds and not says_last:
        return False
    if images is not None:
        first, last = _reduces(images, shape[1:]), _reduces(images, shape[:2])
        if first != last:
            return last
        if not first and "last" in kinds:
            got = f"{tuple(shape)}, of which no two axes are those of {tuple(images[2:])}"
            raise ValueError(message(where, EXPECTED, got, "Choose the block around the layer."))
    return says_last or ("last" in kinds and "first" not in kinds)


def _get_side(module: nn.Module) -> str:
    if isinstance(module, CHANNELS_FIRST):
        return "first"
    return "last" if isinstance(module, CHANNELS_LAST) else ""


def _reduces(images: Sequence[int], size: Sequence[int]) -> bool:
    """Whether maps of ``size`` are the images, both sides reduced alike."""
    (height, width), (h, w) = images[2:], size
    if height == width:
        return h == w
    ratio = (height * w) / (width * h)
    return 1 / SAME_ASPECT < ratio < SAME_ASPECT
