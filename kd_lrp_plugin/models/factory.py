"""The models: any timm architecture, one of three heads, weights from a file or, if asked, timm's.

Only ``pretrained=True`` may download; ``weights`` is a local file for :func:`load_weights`.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from kd_lrp_plugin.models.heads import HEADS, place_head
from kd_lrp_plugin.models.weights import fill, hash_state, load_weights
from kd_lrp_plugin.utils.files import read_json
from kd_lrp_plugin.utils.validation import check_known, message

logger = logging.getLogger(__name__)
LOCAL = "local-dir:"  # timm's word in front of a folder
HUB = ("hf-hub:", "hf_hub:")  # ... and of a repository of the Hugging Face Hub
# Arguments of timm that build_model decides, and what to use in their place.
OURS = {
    "pretrained": "Give pretrained to build_model itself, or weights=PATH, a local file.",
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
    pretrained: bool = False,
) -> nn.Module:
    """A timm model with one of the thesis' heads.

    Heads: "linear", timm's own, but started with small weights (standard deviation 0.01, as
    torchvision's MobileNetV2): timm's start grows as the classes get fewer, and four of them give
    a first cross entropy of 3 to 6 in place of 1.4; "mlp", linear layers with ReLU behind the
    model's own pooling; "flatten_mlp", the same layers on the whole last feature map, unpooled,
    which ties the model to one image size. The thesis does not state the activations of its
    heads: ReLU is our choice.

    Args:
        name: a name in ``timm.list_models()``, or ``local-dir:FOLDER`` with a folder that timm can
            read: config.json and weights, which count if ``pretrained``. ``hf-hub:`` is refused,
            with the commands that make such a folder: a run must be read without a network.
        num_classes: outputs; 0 with the linear head for a model without classifier.
        head: "linear", "mlp" or "flatten_mlp".
        hidden: widths of the hidden layers of the two mlp heads.
        image_size: side of the square images in pixels; read by "flatten_mlp" alone.
        weights: a local file for :func:`load_weights`; None leaves the random initialisation.
        dropout: probability of dropping a feature in front of the head (timm's ``drop_rate``).
        timm_kwargs: anything else that ``timm.create_model`` takes for this model, such as
            ``{"pad_type": "same", "bn_eps": 1e-3}``.
        pretrained: begin with timm's weights for this name, from its local cache or else its hub; a
            classifier that does not fit is left as it is, as by ``weights``.

    Attributes:
        pretrained_hash: of the model that is returned: what tells timm's weights from others; None
            if it does not begin with any.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: for an unknown name or head, an argument that is decided here, a head that
            does not fit the model, weights of another model, or two kinds of them.
        TypeError: for an argument that timm does not know for this model.
        FileNotFoundError: if there is no file at ``weights``, no such local folder, or no way to
            timm's weights; says how to fetch them elsewhere.

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
    if not isinstance(pretrained, bool) or (pretrained and weights is not None):
        got = f"pretrained {pretrained!r}" + f" and {weights}" * (weights is not None)
        raise ValueError(message(where, "pretrained: True, or weights", got, "Give one of them."))
    kwargs = _check_name(where, name, dict(timm_kwargs or {}))
    model = _create(where, name, {**kwargs, "num_classes": num_classes, "drop_rate": dropout})
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
    if pretrained:
        state = _read_pretrained(where, name, kwargs)
        fill(model, state, f"timm's {name}", where, strict=False)
        model.__dict__["pretrained_hash"] = hash_state(state)
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


def get_pretrained_hash(model: nn.Module) -> str | None:
    """What tells the weights of timm that a model began with from others; None without any."""
    return getattr(model, "pretrained_hash", None)


def _check_name(where: str, name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that timm is to get, of a name that it knows."""
    if name.startswith(LOCAL):
        folder = Path(name.removeprefix(LOCAL))
        fix = "Give a folder that timm.models.save_for_hf has written, or that was downloaded."
        if not (folder / "config.json").is_file():
            got = f"none in {folder}"
            raise FileNotFoundError(message(f"{where}: name", "a config.json of timm", got, fix))
        architecture = read_json(folder / "config.json", fix, architecture=str)["architecture"]
        check_known(f"{folder / 'config.json'}: architecture", architecture, timm.list_models())
    elif name.lower().startswith(HUB):
        raise ValueError(_refuse_hub(where, name))
    elif not timm.is_model(name):
        check_known(f"{where}: name", name, timm.list_models())
    for key in OURS.keys() & kwargs.keys():
        if key != "pretrained" or kwargs.pop(key):
            expected = "timm_kwargs that build_model leaves open"
            raise ValueError(message(where, expected, repr(key), OURS[key]))
    return kwargs


def _refuse_hub(where: str, name: str) -> str:
    """Even the architecture would have to be fetched, again by whoever reads a run later."""
    repository = name.partition(":")[2]
    folder = repository.rpartition("/")[2] or "FOLDER"
    fix = (
        f"Where there is a network, give: hf download {repository} --local-dir {folder}; copy the "
        f"folder to this machine, wherever you like, and give {LOCAL}PATH/{folder} as the name, "
        "with pretrained: True for its weights."
    )
    expected = "a name of timm, or a folder of timm's on this machine"
    if repository.startswith("timm/") and timm.is_model(folder):
        fix = f"Give {folder} with pretrained: True. Or: {fix[0].lower()}{fix[1:]}"
    return message(f"{where}: name", expected, repr(name), fix)


def _create(where: str, name: str, kwargs: dict[str, Any], pretrained: bool = False) -> nn.Module:
    if not kwargs.get("drop_rate"):
        kwargs.pop("drop_rate", None)
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except TypeError as error:
        fix = f"timm says: {error}. Remove or correct that argument."
        expected = f"arguments that timm's {name} takes"
        raise TypeError(message(where, expected, sorted(kwargs), fix)) from error


def _read_pretrained(where: str, name: str, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """timm's weights for a name, with the classifier that belongs to them."""
    if not name.startswith(LOCAL) and not timm.is_model_pretrained(name):
        near = [n for n in timm.list_pretrained() if n.startswith(name.split("_")[0])][:8]
        fix = "Leave pretrained out, give weights, or choose another model."
        got = f"none for {name}; there are some for {near}"
        raise ValueError(message(f"{where}: pretrained", "weights of timm", got, fix))
    try:
        return _create(where, name, kwargs, pretrained=True).state_dict()
    except TypeError:
        raise
    except Exception as error:  # timm's hub, its cache and their network fail in many ways
        words = next(iter(str(error).splitlines()), "")
        got = f"{type(error).__name__}: {words}"
        if name.startswith(LOCAL):
            fix = "Put model.safetensors beside its config.json, or leave pretrained out."
            expected = f"weights in {name.removeprefix(LOCAL)}"
            raise FileNotFoundError(message(f"{where}: pretrained", expected, got, fix)) from error
        made = f"timm.create_model({name!r}, pretrained=True{''.join(_as_words(kwargs))})"
        fix = (
            'Without a network, give this where there is one: python -c "import timm; from '
            f"safetensors.torch import save_file; save_file({made}.state_dict(), "
            f"'{name}.safetensors')\"; copy the file to this machine, wherever you like, and set "
            "weights to its path in place of pretrained."
        )
        expected = f"the weights of {name} in timm's cache or hub"
        raise FileNotFoundError(message(f"{where}: pretrained", expected, got, fix)) from error


def _as_words(kwargs: Mapping[str, Any]) -> list[str]:
    return [f", {key}={value!r}" for key, value in kwargs.items()]
