"""What tells the files that a config names from others, wherever they lie."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kd_lrp_plugin.config.document import Document
from kd_lrp_plugin.data.csv_images import identify_csv_images
from kd_lrp_plugin.data.folder import identify_images
from kd_lrp_plugin.data.mnist import identify_digits
from kd_lrp_plugin.data.samples import find_folder
from kd_lrp_plugin.runs.record import OUTPUTS, RunRecord
from kd_lrp_plugin.utils.files import hash_file


def list_files(config: Document) -> dict[str, str | None]:
    """A hash for each set of image files, checkpoint and file of weights that a config names.

    Images count by name and size; weights, tables and MNIST's digits by their bytes; subclasses by
    their table, or by the checkpoint of the model among whose features they are found.

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
        key = str(_mapping(entry).get("key")).rpartition(".")[2]
        if key in _IDENTIFIERS:
            kwargs = _mapping(_mapping(entry.get("init")).get("kwargs"))
            try:
                found[f"datasets.{name}"] = _IDENTIFIERS[key](kwargs)
            except (KeyError, OSError, TypeError, ValueError):
                found[f"datasets.{name}"] = None
        elif key == "subclasses":
            kwargs = _mapping(_mapping(entry.get("init")).get("kwargs"))
            if file := _find_subclass_source(kwargs.get("table")):
                found[f"datasets.{name}.table"] = _hash_file(file)
    for role, entry in _mapping(content.get("models")).items():
        weights = _mapping(_mapping(entry).get("kwargs")).get("weights")
        for key, file in (("src_ckpt", _mapping(entry).get("src_ckpt")), ("weights", weights)):
            found[f"models.{role}.{key}"] = _hash_file(str(file)) if file else "none"
    return found


def find_split_tables(run: RunRecord, config: Mapping[str, Any]) -> set[Path]:
    """The split tables that the data sets of a run's config name, wherever they lie now.

    Args:
        run: its folder.
        config: its values.
    """
    entries = [_mapping(entry) for entry in _mapping(config.get("datasets")).values()]
    named = [
        _mapping(_mapping(entry.get("init")).get("kwargs")).get("manifest") for entry in entries
    ]
    return {run.find_place(str(table)).resolve() for table in named if table}


def check_weights_file(file: Path) -> Path:
    """A file of weights, which must be intact if a finished run has written it.

    Raises:
        ValueError: if it is not as that run has written it; says how to repair it.
    """
    run = RunRecord(file.resolve().parent)
    return file if file.name not in OUTPUTS or not run.finished else run.check_output(file.name)


def _mapping(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _identify_folder(kwargs: Mapping[str, Any]) -> str | None:
    split, manifest = kwargs.get("split", "Training"), kwargs.get("manifest")
    folder = find_folder(kwargs.get("root"), str(kwargs.get("name", "")))
    return identify_images(folder, str(split), str(manifest) if manifest else None)


def _identify_table(kwargs: Mapping[str, Any]) -> str:
    root = find_folder(kwargs.get("root"), str(kwargs.get("name", "")))
    return identify_csv_images(root, kwargs["csv"], kwargs["file"], str(kwargs.get("folder", "")))


def _find_subclass_source(table: Any) -> str | None:
    kwargs = _mapping(_mapping(_mapping(table).get("init")).get("kwargs"))
    found = table if isinstance(table, str) else _mapping(kwargs.get("model")).get("src_ckpt")
    return str(found) if found else None


def _identify_mnist(kwargs: Mapping[str, Any]) -> str:
    folder = find_folder(kwargs.get("root"), str(kwargs.get("name", "mnist")))
    return identify_digits(folder, str(kwargs.get("split", "train")))


_IDENTIFIERS: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "folder_images": _identify_folder,
    "csv_images": _identify_table,
    "mnist": _identify_mnist,
}


def _hash_file(name: str) -> str | None:
    file = Path(os.path.expandvars(name)).expanduser()
    return hash_file(check_weights_file(file)) if file.is_file() else None
