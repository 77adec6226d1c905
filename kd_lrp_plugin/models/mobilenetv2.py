"""MobileNetV2 of any width, depth, kernels, expansions, pooling, dropout and head."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.efficientnet import EfficientNet
from torch import nn

from kd_lrp_plugin.models.heads import HEADS, place_head
from kd_lrp_plugin.utils.validation import check_known, message

# MobileNetV2's stages: blocks, stride and channels at width and depth 1.
_STAGES = ((1, 1, 16), (2, 2, 24), (3, 2, 32), (4, 2, 64), (3, 1, 96), (3, 2, 160), (1, 1, 320))


@dataclass(frozen=True)
class MobileNetV2:
    """One MobileNetV2.

    Attributes:
        width: multiplier of all channels but those of the last convolution, which never has fewer
            than 1280.
        depth: multiplier of the blocks in each stage, rounded up.
        kernels: side of the depthwise convolutions in each of the seven stages.
        expansions: of the blocks in stages two to seven; the first has none.
        pooling: of timm: "avg", "max" or "avgmax".
        head: see :func:`kd_lrp_plugin.models.factory.build_model`.
        dropout: probability of dropping a feature in front of the head.

    Raises:
        ValueError: for a value that makes no network.

    Reference:
        Sandler et al., CVPR 2018, table 2; multipliers as timm rounds them.
    """

    width: float = 1.0
    depth: float = 1.0
    kernels: tuple[int, ...] = (3,) * 7
    expansions: tuple[int, ...] = (6,) * 6
    pooling: str = "avg"
    head: str = "linear"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("kernels", "expansions"):  # lists come from YAML and JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        where = "MobileNetV2"
        check_known(f"{where}: head", self.head, HEADS)
        check_known(f"{where}: pooling", self.pooling, ("avg", "max", "avgmax"))
        for name in ("width", "depth"):
            if not 0 < getattr(self, name) < math.inf:
                fix = "Use 1 for the network of the paper."
                raise ValueError(message(f"{where}: {name}", "> 0", getattr(self, name), fix))
        if len(self.kernels) != 7 or any(k < 1 or k % 2 == 0 for k in self.kernels):
            fix = "For example [3, 3, 3, 5, 3, 5, 3]."
            raise ValueError(message(f"{where}: kernels", "seven odd sides", self.kernels, fix))
        if len(self.expansions) != 6 or any(e < 1 for e in self.expansions):
            fix = "For example [6, 6, 6, 6, 6, 6]."
            raise ValueError(message(f"{where}: expansions", "six >= 1", self.expansions, fix))

    def __str__(self) -> str:
        """What it is called in tables and records: only what differs from the paper's network."""
        words = [f"width{self.width:g}", f"depth{self.depth:g}"]
        if self.kernels != (3,) * 7:
            words.append("k" + "".join(map(str, self.kernels)))
        if self.expansions != (6,) * 6:
            words.append("e" + "".join(map(str, self.expansions)))
        words += [word for word in (self.pooling,) if word != "avg"]
        words.append(self.head)
        return "-".join([*words, *([f"drop{self.dropout:g}"] if self.dropout else [])])

    def build(
        self,
        num_classes: int,
        image_size: int = 224,
        hidden: Sequence[int] = (256, 128),
        in_chans: int = 3,
    ) -> nn.Module:
        """The network, untrained, in training mode.

        Args:
            num_classes: outputs.
            image_size: side of the images in pixels; read by the head "flatten_mlp" alone.
            hidden: widths of the hidden layers of the two mlp heads.
            in_chans: channels of the images.

        Example:
            >>> model = MobileNetV2(width=0.35).build(num_classes=4)
            >>> sum(parameter.numel() for parameter in model.parameters())
            401252
        """
        channels = partial(round_channels, multiplier=self.width)
        model = EfficientNet(
            block_args=decode_arch_def(self._blocks(), depth_multiplier=self.depth),
            num_classes=num_classes,
            num_features=max(1280, channels(1280)),
            in_chans=in_chans,
            stem_size=32,
            round_chs_fn=channels,
            norm_layer=nn.BatchNorm2d,
            act_layer=nn.ReLU6,
            global_pool=self.pooling,
            drop_rate=self.dropout,
        )
        shape = (in_chans, image_size, image_size)
        place_head(model, str(self), num_classes, self.head, hidden, shape)
        return model

    def _blocks(self) -> list[list[str]]:
        names = []
        expansions = (0, *self.expansions)
        for (repeats, stride, channels), kernel, expansion in zip(
            _STAGES, self.kernels, expansions, strict=True
        ):
            kind = (
                f"ir_r{repeats}_k{kernel}_s{stride}_e{expansion}"
                if expansion
                else (f"ds_r{repeats}_k{kernel}_s{stride}")
            )
            names.append([f"{kind}_c{channels}"])
        return names


def mobilenetv2(
    num_classes: int,
    image_size: int = 224,
    hidden: Sequence[int] = (256, 128),
    in_chans: int = 3,
    **choices: Any,
) -> nn.Module:
    """:meth:`MobileNetV2.build` of the architecture that ``choices`` describe.

    Example:
        >>> model = mobilenetv2(num_classes=4, width=0.5, kernels=[3, 3, 5, 5, 5, 5, 3])
    """
    for key in choices:
        check_known("mobilenetv2: keyword", key, [field.name for field in fields(MobileNetV2)])
    return MobileNetV2(**choices).build(num_classes, image_size, hidden, in_chans)
