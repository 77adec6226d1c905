"""What a classifier makes of images before it decides."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kd_lrp_plugin.utils.preserved import preserved
from kd_lrp_plugin.utils.validation import message


def read_features(
    model: nn.Module, batches: Iterable[Float[Tensor, "n c h w"]]
) -> Float[Tensor, "n d"]:
    """Features of images: what the linear layer is given whose output the logits are.

    Args:
        model: a classifier; it is used in evaluation mode, and left as it was.
        batches: of images.

    Raises:
        ValueError: for a model whose logits are not the output of a linear layer, as they are.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(3, 2))
        >>> read_features(model, [torch.tensor([[-1.0, 0.0, 2.0]])])
        tensor([[0., 0., 2.]])
    """
    latest: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        latest[:] = [inputs[0], output]

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [layer.register_forward_hook(keep) for layer in layers]
    found = []
    try:
        with preserved(model), torch.no_grad():
            model.eval()
            for images in batches:
                latest.clear()
                logits = model(images)
                if not latest or latest[0].ndim != 2 or not _is_same(latest[1], logits):
                    got = type(model).__name__
                    fix = "Take a classifier that ends in a linear layer, such as one of timm's."
                    raise ValueError(message("features", "a last linear layer", got, fix))
                found.append(latest[0].float().clone())
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(found)


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
