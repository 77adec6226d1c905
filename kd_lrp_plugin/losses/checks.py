"""The registry of the losses, and what they check of their input."""

from collections.abc import Callable

from torch import Tensor

from kd_lrp_plugin.utils.registry import Registry
from kd_lrp_plugin.utils.validation import message

LOSSES: Registry[Callable[..., Tensor]] = Registry("loss")
MAPS = "maps of shape (n, h, w)"
FEATURES = "features of shape (n, c, h, w)"
LOGITS = "logits of shape (n, classes)"


def check_axes(where: str, expected: str, at_least: int, *tensors: Tensor) -> None:
    """Raise ``ValueError`` unless all have the axes of ``expected``, and so many samples."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    axes = expected.count(",") + 1
    if any(len(shape) != axes or shape[0] < at_least or 0 in shape[1:] for shape in shapes):
        wanted = f"{expected}, n >= {at_least}" if at_least else expected
        fix = (
            "Use a larger batch (drop_last=True drops a short last one)."
            if any(shape[:1] == (1,) for shape in shapes) and at_least > 1
            else "Keep the batch axis, and give maps, features and logits to their own losses."
        )
        raise ValueError(message(where, wanted, " and ".join(map(str, shapes)), fix))
