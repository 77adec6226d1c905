"""The heads that a network may end in."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kd_lrp_plugin.utils.validation import message

HEADS = ("linear", "mlp", "flatten_mlp")


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
    if head == "linear" and (path := classifier_path(model)):
        _start_small(model.get_submodule(path))
    if head == "mlp":
        _replace_head(where, model, name, _pooled_width(where, model, name), hidden, num_classes)
    elif head == "flatten_mlp":
        width = _unpooled_width(where, model, name, (1, *image_shape))
        _replace_head(where, model, name, width, hidden, num_classes)


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


def classifier_path(model: Any) -> str | None:
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
    if features.ndim != 4 or not channels_first or classifier_path(model) is None:
        raise ValueError(message(where, expected, f"{name}: {tuple(features.shape)}", fix))
    return features.numel()


def _replace_head(
    where: str, model: Any, name: str, width: int, hidden: Sequence[int], num_classes: int
) -> None:
    path = classifier_path(model)
    if path is None:
        fix = "Use head='linear', or another model."
        raise ValueError(message(where, "a model with one classifier", name, fix))
    layers: list[nn.Module] = [_Flatten(width)]
    for inputs, outputs in zip([width, *hidden], hidden, strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    layers.append(nn.Linear([width, *hidden][-1], num_classes))
    model.set_submodule(path, nn.Sequential(*layers))
    model.num_classes = num_classes
