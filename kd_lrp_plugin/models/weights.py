"""Weights from local files."""

import argparse
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kd_lrp_plugin.models.heads import classifier_path
from kd_lrp_plugin.utils.files import hash_contents
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message


def load_weights(
    model: nn.Module, path: str | Path, where: str = "load_weights", strict: bool = False
) -> list[str]:
    """Fill ``model`` from a local file; a classifier that does not fit is left as it is.

    The classifier is taken from the file if all of its tensors fit, else none of them is, which
    is said, as information: weights of other classes are a usual start. Everything else must fit
    exactly; the counters of batch norm may be absent. Names and shapes do not tell padding or
    epsilon apart: build the model as the weights want it.

    Args:
        model: filled in place; untouched if an error is raised.
        path: .safetensors, or .pt/.pth with a state dict, bare or under the key "model"; may
            name environment variables, as in ``$KD_LRP_DATA/weights/x.safetensors``.
        where: the name of the caller, for messages.
        strict: the classifier, too, must fit: for a trained model that is to be used as it is.

    Returns:
        Names of the classifier's tensors that the file did not fill; empty if all were.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds anything but plain tensors, or weights of another model.

    Example:
        >>> import tempfile
        >>> from kd_lrp_plugin.models.factory import build_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "five_classes.pth")
        ...     torch.save(build_model("mobilenetv2_035", 5).state_dict(), path)
        ...     load_weights(build_model("mobilenetv2_035", 4), path)
        ['classifier.weight', 'classifier.bias']
    """
    state, _ = read_weights(path, where)
    return fill(model, state, path, where, strict)


def fill(
    model: nn.Module, state: Mapping[str, Tensor], path: str | Path, where: str, strict: bool
) -> list[str]:
    """What :func:`load_weights` does with a state that has been read from ``path``."""
    own = model.state_dict()
    head = classifier_path(model)

    def in_head(key: str) -> bool:
        return head is not None and key.startswith(f"{head}.")

    differ = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    differ += [key for key in state if key not in own]
    differ += [key for key in own if key in state and own[key].shape != state[key].shape]
    wrong = differ if strict else [key for key in differ if not in_head(key)]
    if wrong:
        shown = [_difference(key, own, state) for key in wrong[:3]]
        raise ValueError(
            message(
                where,
                f"the weights of this model in {path}",
                f"{len(wrong)} tensors that differ, first {'; '.join(shown)}",
                "Build the model that the weights were saved from: the same name, width, "
                f"timm_kwargs{' and num_classes' if strict else ''}.",
            )
        )
    if not differ:
        model.load_state_dict(state, strict=False)
        return []
    left = [key for key in own if in_head(key)]
    body = {key: tensor for key, tensor in state.items() if not in_head(key)}
    model.load_state_dict(body, strict=False)
    told = f"{where}: the classifier of {path} does not fit; left as it was: {left}"
    current_progress().note(told)
    return left


def read_weights(
    path: str | Path, where: str = "read_weights"
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """A state dict, and the names of the classes that our own checkpoints keep beside it.

    Args and errors are those of :func:`load_weights`.
    """
    given, path = path, Path(path)
    if not path.is_file():  # one that is there may have a dollar sign in its own name
        path = Path(os.path.expandvars(given)).expanduser()
    if not path.is_file():
        fix = "Give the path of a local file; nothing is downloaded."
        raise FileNotFoundError(message(where, "a weights file", repr(str(path)), fix))
    try:
        if path.suffix == ".safetensors":
            return load_file(path), ()
        # A checkpoint of torchdistill's scripts carries their arguments, a harmless Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        fix = "Save model.state_dict(), as .safetensors or with torch.save."
        got = f"{str(path)!r} ({type(error).__name__})"  # its text advises unsafe loading
        raise ValueError(message(where, "a file of plain tensors", got, fix)) from error
    container = content if isinstance(content, Mapping) else {}
    state = container.get("model", content)
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        fix = "Save model.state_dict(), bare or under the key 'model'."
        raise ValueError(message(where, "a state dict", f"other content in {str(path)!r}", fix))
    return dict(state), tuple(container.get("classes") or ())


def hash_state(state: Mapping[str, Tensor]) -> str:
    """What tells tensors from others, by names, types, shapes and bytes.

    Example:
        >>> state = {"weight": torch.zeros(2)}
        >>> hash_state(state) == hash_state({"weight": torch.zeros(2)})
        True
        >>> hash_state(state) == hash_state({"weight": torch.ones(2)})
        False
    """
    parts: list[Any] = []
    for key, tensor in state.items():
        plain = tensor.detach().cpu().contiguous()
        parts += [[key, str(plain.dtype), list(plain.shape)]]
        parts += [plain.reshape(-1).view(torch.uint8).numpy().tobytes()]
    return hash_contents(*parts)


def _difference(key: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    if key not in state:
        return f"{key} (absent)"
    if key not in own:
        return f"{key} (not in the model)"
    return f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
