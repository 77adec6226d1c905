"""The models: any timm architecture, one of three heads, weights from a local file.

Nothing here downloads. timm's ``pretrained`` is refused; :func:`load_weights` reads a file.
"""

import argparse
import json
import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kd_lrp_plugin.checks import check_known, message

logger = logging.getLogger(__name__)

HEADS = ("linear", "mlp", "flatten_mlp")

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
    model.__dict__["timm_arguments"] = arguments if head == "linear" and _plain(arguments) else None
    if weights is not None:
        load_weights(model, weights, where)
    return model


def place_head(
    model: Any,
    name: str,
    num_classes: int,
    head: str = "linear",
    hidden: Sequence[int] = (256, 128),
    image_shape: tuple[int, int, int] = (3, 224, 224),
) -> None:
    """Give a model of timm's kind one of the heads of :func:`build_model`, in place.

    Args:
        model: with ``get_classifier`` and ``reset_classifier``.
        name: of the model, for messages.
        num_classes: outputs.
        head: see :func:`build_model`.
        hidden: widths of the hidden layers of the two mlp heads.
        image_shape: channels, height, width; read by "flatten_mlp" alone.

    Raises:
        ValueError: if the head does not fit the model.
    """
    where = "build_model"
    if head == "linear" and (path := _classifier_path(model)):
        _start_small(model.get_submodule(path))
    if head == "mlp":
        _replace_head(where, model, name, _pooled_width(where, model, name), hidden, num_classes)
    elif head == "flatten_mlp":
        width = _unpooled_width(where, model, name, (1, *image_shape))
        _replace_head(where, model, name, width, hidden, num_classes)


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


def _plain(arguments: Mapping[str, Any]) -> bool:
    try:
        json.dumps(arguments)
    except TypeError:
        return False
    return True


def load_weights(model: nn.Module, path: str | Path, where: str = "load_weights") -> list[str]:
    """Fill ``model`` from a local file; a classifier that does not fit is left as it is.

    The classifier is taken from the file if all of its tensors fit, else none of them is, which
    is logged. Everything else must fit exactly; the counters of batch norm may be absent. Names
    and shapes do not tell padding or epsilon apart: build the model as the weights want it.

    Args:
        model: filled in place; untouched if an error is raised.
        path: .safetensors, or .pt/.pth with a state dict, bare or under the key "model"; may
            name environment variables, as in ``$KD_LRP_DATA/weights/x.safetensors``.
        where: the name of the caller, for messages.

    Returns:
        Names of the classifier's tensors that the file did not fill; empty if all were.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds anything but plain tensors, or weights of another model.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "five_classes.pth")
        ...     torch.save(build_model("mobilenetv2_035", 5).state_dict(), path)
        ...     load_weights(build_model("mobilenetv2_035", 4), path)
        ['classifier.weight', 'classifier.bias']
    """
    state = _read(where, Path(os.path.expandvars(path)).expanduser())
    own = model.state_dict()
    head = _classifier_path(model)

    def in_head(key: str) -> bool:
        return head is not None and key.startswith(f"{head}.")

    differ = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    differ += [key for key in state if key not in own]
    differ += [key for key in own if key in state and own[key].shape != state[key].shape]
    wrong = [key for key in differ if not in_head(key)]
    if wrong:
        shown = [_difference(key, own, state) for key in wrong[:3]]
        raise ValueError(
            message(
                where,
                f"the weights of this model in {path}",
                f"{len(wrong)} tensors that differ, first {'; '.join(shown)}",
                "Build the model that the weights were saved from: the same name, width and "
                "timm_kwargs.",
            )
        )
    if not differ:
        model.load_state_dict(state, strict=False)
        return []
    left = [key for key in own if in_head(key)]
    body = {key: tensor for key, tensor in state.items() if not in_head(key)}
    model.load_state_dict(body, strict=False)
    logger.warning("%s: the classifier of %s does not fit; left as it was: %s", where, path, left)
    return left


class _Flatten(nn.Module):
    """Flattening that names the way out where the images have another size than the head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, features: Float[Tensor, "n ..."]) -> Float[Tensor, "n width"]:
        flat = features.flatten(1)
        if flat.shape[1] != self.width:
            got = f"{flat.shape[1]} from a map of shape {tuple(features.shape[1:])}"
            fix = "Feed images of the image_size that the model was built for."
            raise ValueError(message("flatten_mlp", f"{self.width} features", got, fix))
        return flat


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


def _classifier_path(model: Any) -> str | None:
    """The path of timm's classifier in the model; None where there is not exactly one."""
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    if not isinstance(classifier, nn.Module):
        return None
    return next((path for path, module in model.named_modules() if module is classifier), None)


def _start_small(classifier: nn.Module) -> None:
    if isinstance(classifier, nn.Linear):
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)


def _pooled_width(where: str, model: Any, name: str) -> int:
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear | nn.Conv2d):
        got = f"{type(classifier).__name__} in {name}"
        fix = "Use head='linear', or another model."
        raise ValueError(message(where, "one linear classifier for head='mlp'", got, fix))
    return classifier.weight.shape[1]


def _unpooled_width(where: str, model: Any, name: str, shape: tuple[int, ...]) -> int:
    """Remove pooling and classifier, and measure what comes out."""
    expected = "a model whose unpooled features are (n, c, h, w), for head='flatten_mlp'"
    fix = "Use head='mlp', or another model."
    try:
        model.reset_classifier(0, global_pool="")
    except (AssertionError, TypeError) as error:
        raise ValueError(message(where, expected, f"{name}: {error}", fix)) from error
    with torch.no_grad():
        features = model.eval()(torch.zeros(shape))
    model.train()
    channels_first = getattr(model, "output_fmt", "NCHW") == "NCHW"
    if features.ndim != 4 or not channels_first or _classifier_path(model) is None:
        raise ValueError(message(where, expected, f"{name}: {tuple(features.shape)}", fix))
    return features.numel()


def _replace_head(
    where: str, model: Any, name: str, width: int, hidden: Sequence[int], num_classes: int
) -> None:
    path = _classifier_path(model)
    if path is None:
        fix = "Use head='linear', or another model."
        raise ValueError(message(where, "a model with one classifier", name, fix))
    layers: list[nn.Module] = [_Flatten(width)]
    for inputs, outputs in zip([width, *hidden], hidden, strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    layers.append(nn.Linear([width, *hidden][-1], num_classes))
    model.set_submodule(path, nn.Sequential(*layers))
    model.num_classes = num_classes


def _read(where: str, path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        fix = "Give the path of a local file; nothing is downloaded."
        raise FileNotFoundError(message(where, "a weights file", repr(str(path)), fix))
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # A checkpoint of torchdistill's scripts carries their arguments, a harmless Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        fix = "Save model.state_dict(), as .safetensors or with torch.save."
        got = f"{str(path)!r} ({type(error).__name__})"  # its text advises unsafe loading
        raise ValueError(message(where, "a file of plain tensors", got, fix)) from error
    state = state.get("model", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        fix = "Save model.state_dict(), bare or under the key 'model'."
        raise ValueError(message(where, "a state dict", f"other content in {str(path)!r}", fix))
    return dict(state)


def _difference(key: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    if key not in state:
        return f"{key} (absent)"
    if key not in own:
        return f"{key} (not in the model)"
    return f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
