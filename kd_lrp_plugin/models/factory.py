"""The models: any timm architecture, one of three heads, weights from a local file.

Nothing here downloads. timm's ``pretrained`` is refused; :func:`load_weights` reads a file.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from torch import nn

from kd_lrp_plugin.models.heads import HEADS, place_head
from kd_lrp_plugin.models.weights import load_weights
from kd_lrp_plugin.utils.validation import check_known, message

logger = logging.getLogger(__name__)
# Arguments of timm that build_model decides, and what to use in their place.
OURS = {
    "pretrained": "Nothing is downloaded: give weights=PATH, a local .safetensors or .pth file.",
    "checkpoint_path": "Give weights=PATH.",
    "num_classes": "Give num_classes to build_model itself.",
    "drop_rate": "Give dropout to build_model itself.",
    "global_pool": "Choose the head: 'mlp' pools, 'flatten_mlp' does not.",
}


def build_model(
    name: str,
    num_classes: int,
    head: str = "linear",
    hidden: Sequence[int] = (256, 128),
    image_size: int = 224,
    weights: str | Path | None = None,
    dropout: float = 0.0,
    timm_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A timm model with one of the thesis' heads.

    Heads: "linear", timm's own, but started with small weights (standard deviation 0.01, as
    torchvision's MobileNetV2): timm's start grows as the classes get fewer, and four of them give
    a first cross entropy of 3 to 6 in place of 1.4; "mlp", linear layers with ReLU behind the
    model's own pooling; "flatten_mlp", the same layers on the whole last feature map, unpooled,
    which ties the model to one image size. The thesis does not state the activations of its
    heads: ReLU is our choice.

    Args:
        name: a name in ``timm.list_models()``.
        num_classes: outputs; 0 with the linear head for a model without classifier.
        head: "linear", "mlp" or "flatten_mlp".
        hidden: widths of the hidden layers of the two mlp heads.
        image_size: side of the square images in pixels; read by "flatten_mlp" alone.
        weights: a local file for :func:`load_weights`; None leaves the random initialisation.
        dropout: probability of dropping a feature in front of the head (timm's ``drop_rate``).
        timm_kwargs: anything else that ``timm.create_model`` takes for this model, such as
            ``{"pad_type": "same", "bn_eps": 1e-3}``.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: for an unknown name or head, an argument that is decided here, a head that
            does not fit the model, or weights of another model.
        TypeError: for an argument that timm does not know for this model.
        FileNotFoundError: if there is no file at ``weights``.

    Example:
        >>> import torch
        >>> model = build_model("mobilenetv2_035", num_classes=4, head="mlp")
        >>> model(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 4])

    Reference:
        Wightman, timm (PyTorch image models). Heads: [T], table 3.6, recovered from its counts.
    """
    where = "build_model"
    check_known(f"{where}: head", head, HEADS)
    least = 0 if head == "linear" else 1
    if num_classes < least:
        fix = "Give the number of classes of your data."
        raise ValueError(message(where, f"num_classes >= {least}", num_classes, fix))
    model = _create(where, name, num_classes, dropout, dict(timm_kwargs or {}))
    channels = (timm_kwargs or {}).get("in_chans", 3)
    place_head(model, name, num_classes, head, hidden, (channels, image_size, image_size))
    arguments: Any = {"model_name": name, "num_classes": num_classes, **(timm_kwargs or {})}
    arguments["drop_rate"] = dropout
    # A plain attribute, so that it is neither saved nor moved.
    model.__dict__["timm_arguments"] = (
        arguments if head == "linear" and _is_json(arguments) else None
    )
    if weights is not None:
        load_weights(model, weights, where)
    return model


def _is_json(arguments: Mapping[str, Any]) -> bool:
    try:
        json.dumps(arguments)
    except TypeError:
        return False
    return True


def timm_arguments(model: nn.Module) -> dict[str, Any] | None:
    """What ``timm.create_model`` needs to build this model without us.

    None where it cannot: the heads "mlp" and "flatten_mlp" are ours, other models are not timm's,
    and some arguments, such as classes of layers, cannot be written down.

    Example:
        >>> timm_arguments(build_model("mobilenetv2_035", num_classes=4))["model_name"]
        'mobilenetv2_035'
    """
    return getattr(model, "timm_arguments", None)


def thesis_teacher(num_classes: int = 4, image_size: int = 224) -> nn.Module:
    """The thesis' teacher: mobilenetv2_100, its last map flattened into a three-layer head.

    18,347,972 parameters with running statistics, as published, at 4 classes and 224 px.

    Reference:
        [T], table 3.6. Deviation: ReLU in the head, which [T] does not state.
    """
    return build_model("mobilenetv2_100", num_classes, "flatten_mlp", image_size=image_size)


def thesis_student(num_classes: int = 4) -> nn.Module:
    """The thesis' best student: the teacher with global average pooling before the same head.

    2,619,332 parameters with running statistics, as published, at 4 classes.

    Reference:
        [T], table 3.6. Deviation: ReLU in the head, which [T] does not state.
    """
    return build_model("mobilenetv2_100", num_classes, "mlp")


def _create(
    where: str, name: str, num_classes: int, dropout: float, kwargs: dict[str, Any]
) -> nn.Module:
    if not timm.is_model(name):
        check_known(f"{where}: name", name, timm.list_models())
    for key in OURS.keys() & kwargs.keys():
        if key != "pretrained" or kwargs.pop(key):
            expected = "timm_kwargs that build_model leaves open"
            raise ValueError(message(where, expected, repr(key), OURS[key]))
    if dropout:
        kwargs["drop_rate"] = dropout
    try:
        return timm.create_model(name, pretrained=False, num_classes=num_classes, **kwargs)
    except TypeError as error:
        fix = f"timm says: {error}. Remove or correct that argument."
        expected = f"arguments that timm's {name} takes"
        raise TypeError(message(where, expected, sorted(kwargs), fix)) from error
