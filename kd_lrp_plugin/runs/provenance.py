"""What tells the files that a config names from others, wherever they lie."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_lrp_plugin.config.document import Document
from kd_lrp_plugin.data.folder import find_folder, identify_images
from kd_lrp_plugin.runs.record import OUTPUTS, RunRecord
from kd_lrp_plugin.utils.files import hash_file


def list_files(config: Document) -> dict[str, str | None]:
    """A hash for each image folder, checkpoint and file of weights that a config names.

    Images count by name and size, weights and tables by their bytes.

    Args:
        config: nothing in it is called, and nothing need be right.

    Returns:
        By key path in the config; "none" where it names no file, None where none lies there.

    Raises:
        ValueError: if a finished run has written a file that is no longer as it was.

    Example:
        >>> from kd_lrp_plugin.config.document import parse_document
        >>> text = "models: {model: {key: timm_model, kwargs: {weights: gone.pt}}}"
        >>> list_files(parse_document("my.yaml", text))
        {'models.model.src_ckpt': 'none', 'models.model.weights': None}
    """
    content = config.values
    found: dict[str, str | None] = {}
    for name, entry in _mapping(content.get("datasets")).items():
        if str(_mapping(entry).get("key")).endswith("folder_images"):
            kwargs = _mapping(_mapping(entry.get("init")).get("kwargs"))
            found[f"datasets.{name}"] = _hash_images(kwargs)
    for role, entry in _mapping(content.get("models")).items():
        weights = _mapping(_mapping(entry).get("kwargs")).get("weights")
        for key, file in (("src_ckpt", _mapping(entry).get("src_ckpt")), ("weights", weights)):
            found[f"models.{role}.{key}"] = _hash_file(str(file)) if file else "none"
    return found


def check_weights_file(file: Path) -> Path:
    """A file of weights, which must be intact if a finished run has written it.

    Raises:
        ValueError: if it is not as that run has written it; says how to repair it.
    """
    run = RunRecord(file.resolve().parent)
    return file if file.name not in OUTPUTS or not run.finished else run.check_output(file.name)


def _mapping(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _hash_images(kwargs: Mapping[str, Any]) -> str | None:
    split, manifest = kwargs.get("split", "Training"), kwargs.get("manifest")
    try:
        folder = find_folder(kwargs.get("root"), str(kwargs.get("name", "")))
        return identify_images(folder, str(split), str(manifest) if manifest else None)
    except (OSError, TypeError, ValueError):
        return None


def _hash_file(name: str) -> str | None:
    file = Path(os.path.expandvars(name)).expanduser()
    return hash_file(check_weights_file(file)) if file.is_file() else None
