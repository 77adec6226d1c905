"""The few input checks, and the one form of their messages.

Every message reads ``{where}: expected {what}, got {value}. {what to do}``. A public function
checks its input once; inner code trusts it. Commands that compute nothing use these messages too,
so PyTorch is imported where it is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from kd_lrp_plugin.utils.registry import unknown_name

if TYPE_CHECKING:
    from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
UNLABELLED = -100
"""The label of an image whose class nobody knows; PyTorch's cross entropy ignores it."""


def message(where: str, expected: str, got: object, fix: str) -> str:
    """One error message in the house form.

    Example:
        >>> message("kl_divergence", "a temperature above 0", -1, "Use 4, the paper's value.")
        "kl_divergence: expected a temperature above 0, got -1. Use 4, the paper's value."
    """
    return f"{where}: expected {expected}, got {got}. {fix}".strip()


def check_same_shape(where: str, fix: str, **tensors: Tensor) -> None:
    """Raise ``ValueError`` unless all named tensors have one shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(message(where, "tensors of one shape", shapes, fix))


def check_known(where: str, name: object, known: Mapping[str, object] | Iterable[str]) -> None:
    """Raise ``ValueError`` with the nearest names unless ``name`` is one of ``known``."""
    names = list(known)
    if name not in names:
        raise ValueError(unknown_name(where, name, names))


def check_targets(where: str, targets: Tensor, logits: Tensor) -> None:
    """Raise ``ValueError`` unless ``targets`` are labels for ``logits``: indices or soft labels.

    Indices have shape (n,) and lie in ``[0, classes)``; soft labels have the logits' shape, and are
    probabilities: several classes at once (multi-label targets) are not supported.
    """
    check_class_weights(where, targets, logits)
    if not targets.is_floating_point() or not len(targets):
        return
    import torch  # not when the module is imported, which a command's help does

    # Labels that mixing or smoothing has rounded in half precision are probabilities, too.
    tolerance = 1e-3 if targets.dtype in (torch.float32, torch.float64) else 1e-2
    totals = targets.double().sum(1)
    if not bool((targets >= 0).all() and ((totals - 1).abs() <= tolerance).all()):
        lowest = float(targets.min())
        got = f"sums from {float(totals.min()):.4g} to {float(totals.max()):.4g}"
        got += f" and values down to {lowest:.4g}" if lowest < 0 else ""
        fix = "Give class indices or soft labels; multi-label targets are not supported."
        raise ValueError(message(where, "probabilities that sum to one per image", got, fix))


def find_labelled(targets: Tensor) -> Tensor | None:
    """Which images of a batch (n,) have a label; None where all have."""
    if targets.is_floating_point() or targets.ndim != 1:
        return None
    known = targets != UNLABELLED
    return None if bool(known.all()) else known


def check_class_weights(where: str, targets: Tensor, logits: Tensor, look: bool = True) -> None:
    """Raise ``ValueError`` unless ``targets`` are class indices or class weights for ``logits``.

    Indices have shape (n,) and lie in ``[0, classes)``; weights have the logits' shape. Without
    ``look`` their values are not asked for, which is to wait for their device.
    """
    import torch

    n, classes = logits.shape
    if targets.is_floating_point():
        if targets.shape != logits.shape:
            raise ValueError(
                message(
                    where,
                    f"class weights of shape {(n, classes)}",
                    tuple(targets.shape),
                    "Give one weight per class, or integer class indices of shape (n,).",
                )
            )
        return
    if targets.shape != (n,) or targets.dtype == torch.bool:
        raise ValueError(
            message(
                where,
                f"class indices of shape {(n,)}",
                f"{tuple(targets.shape)} of {targets.dtype}",
                "Give one index per image, or floating-point weights of shape (n, classes).",
            )
        )
    if look and n and (int(targets.min()) < 0 or int(targets.max()) >= classes):
        raise ValueError(
            message(
                where,
                f"labels in [0, {classes}), since the head has {classes} outputs",
                sorted(set(torch.unique(targets).tolist())),
                "Set num_classes of the model to the number of classes; where the outputs are "
                "subclasses that nobody knows, take a loss of subclasses.",
            )
        )


def strict(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Refuse keywords that the function does not have, with the nearest ones."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        known = inspect.signature(function).parameters

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            for key in kwargs:
                check_known(f"{name}: keyword", key, known)
            return function(*args, **kwargs)

        return call

    return decorate
