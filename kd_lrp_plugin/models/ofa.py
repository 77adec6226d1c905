"""A network found by search: the once-for-all subnet of 595 million multiply-accumulates."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.mobilenetv3 import MobileNetV3
from torch import nn

from kd_lrp_plugin.models.heads import HEADS, place_head
from kd_lrp_plugin.models.weights import load_weights
from kd_lrp_plugin.utils.validation import check_known, message

# Channels, stride of the first block, timm's word for ReLU or hard-swish, squeeze-and-excitation;
# kernel and expansion of each block. As in the network published by the reference of ofa_595.
STAGES = (
    (24, 1, "re", False, ((3, 1),)),
    (32, 2, "re", False, ((3, 3), (5, 4), (3, 3))),
    (48, 2, "re", True, ((5, 4), (5, 4), (3, 6), (5, 3))),
    (96, 2, "hs", False, ((7, 6), (5, 6), (3, 3), (5, 4))),
    (136, 1, "hs", True, ((3, 6), (5, 6), (7, 6), (3, 4))),
    (192, 2, "hs", True, ((3, 6), (3, 6), (5, 6), (3, 3))),
)
STEM, LAST, FEATURES = 24, 1152, 1536
WHERE = "ofa_595"


def ofa_595(
    num_classes: int,
    head: str = "linear",
    hidden: Sequence[int] = (256, 128),
    image_size: int = 224,
    weights: str | Path | None = None,
    dropout: float = 0.2,
    in_chans: int = 3,
) -> nn.Module:
    """The student of 595 M: 20 inverted residuals, some with squeeze-and-excitation.

    9,135,928 parameters at 1000 classes; 595,189,032 MACs at 236 px, the size it was found for,
    and 512,861,680 at 224. It is timm's ``MobileNetV3``, with ``blocks.0`` to ``blocks.6`` as
    layers of which the last is a single convolution.

    Args:
        num_classes: outputs; 0 with the linear head for a model without classifier.
        head: see :func:`kd_lrp_plugin.models.factory.build_model`. The two mlp heads stand in the
            place of the classifier, behind the layer of 1536 features, which stays.
        hidden: widths of the hidden layers of the two mlp heads.
        image_size: side of the square images in pixels; read by "flatten_mlp" alone.
        weights: a local file for :func:`kd_lrp_plugin.models.weights.load_weights`; None leaves
            the random initialisation.
        dropout: probability of dropping a feature in front of the head.
        in_chans: channels of the images.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: for an unknown head, too few classes or channels, a dropout outside [0, 1), or
            weights of another model.
        FileNotFoundError: if there is no file at ``weights``.

    Example:
        >>> import torch
        >>> ofa_595(num_classes=3)(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 3])

    Reference:
        Cai, Gan, Wang, Zhang and Han, ICLR 2020, "Once-for-all: train one network and specialize
        it for efficient deployment"; the subnet published as flops-595M_top1-80.0_finetune-75.
        Student of [X]. Deviation: the classifier starts with small weights, see ``build_model``.
    """
    check_known(f"{WHERE}: head", head, HEADS)
    for name, value, least in (
        ("num_classes", num_classes, 0 if head == "linear" else 1),
        ("in_chans", in_chans, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            expected, fix = f"a whole number >= {least}", "Give what your data have."
            raise ValueError(message(f"{WHERE}: {name}", expected, value, fix))
    if not 0 <= dropout < 1:
        raise ValueError(message(f"{WHERE}: dropout", "0 <= p < 1", dropout, "Use 0.2."))
    gate = partial(
        SqueezeExcite,
        gate_layer="hard_sigmoid",
        rd_round_fn=round_channels,
        force_act_layer=nn.ReLU,
    )
    model = MobileNetV3(
        block_args=decode_arch_def([*_spell_stages(), [f"cn_r1_k1_s1_c{LAST}_nhs"]]),
        num_classes=num_classes,
        num_features=FEATURES,
        in_chans=in_chans,
        stem_size=STEM,
        fix_stem=True,
        head_bias=False,
        act_layer=nn.Hardswish,
        norm_layer=nn.BatchNorm2d,
        se_layer=gate,
        round_chs_fn=partial(round_channels, multiplier=1.0),
        drop_rate=dropout,
    )
    place_head(model, WHERE, num_classes, head, hidden, (in_chans, image_size, image_size))
    if weights is not None:
        load_weights(model, weights, WHERE)
    return model


def _spell_stages() -> list[list[str]]:
    """The stages as timm's builder reads them."""
    stages = []
    for channels, first, activation, gated, blocks in STAGES:
        ending = f"_c{channels}{'_se0.25' * gated}_n{activation}"
        words = []
        for number, (kernel, expansion) in enumerate(blocks):
            kind, expand = ("ds", "") if expansion == 1 else ("ir", f"_e{expansion}")
            stride = 1 if number else first
            words.append(f"{kind}_r1_k{kernel}_s{stride}{expand}{ending}")
        stages.append(words)
    return stages
