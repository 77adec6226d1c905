"""What tells the images of a data set, as a model sees them, from others."""

import json
import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import Tensor

from kd_lrp_plugin.data.views import list_layers
from kd_lrp_plugin.utils.files import hash_contents, hash_file

_SAMPLED = 8
_PATHS = ("root", "folder", "samples", "imgs", "cache")  # where they lie, and how they are kept
_INDICES = ("indices", "_indices")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_STATED = ("torchvision", "kd_lrp_plugin")  # packages whose transforms say all in their text


def identify_items(images: Any, ask: Callable[[int], tuple], rows: int) -> str:
    """A digest of a data set and of what it hands out.

    Files count by their bytes, images of a built-in set by their names, each wrapper by what can
    be written down of it, transforms by their text and settings; eight items, spread over all, by
    their pixels.
    All items count by their pixels where images have neither files nor names, one for each, and
    where a part of a data set cannot be written down, such as a transform of one's own.

    Args:
        images: the data set, whose layers are described.
        ask: the item of a row: image, label, companions.
        rows: how many there are.
    """
    layers = list_layers(images)
    facts, known = zip(*map(_describe, layers), strict=True)
    step = max(1, rows // _SAMPLED) if all(known) else 1
    pixels = [_hash_item(ask(row)) for row in range(0, rows, step)]
    return hash_contents(facts, pixels, rows)


def _describe(layer: Any) -> tuple[list[Any], bool]:
    """What can be written down of a layer, and whether that is all that decides its images."""
    inner = list_layers(layer)[1:]
    found: dict[str, Any] = {}
    known = True
    ours = type(layer).__module__.partition(".")[0] == "kd_lrp_plugin"
    for name, value in getattr(layer, "__dict__", {}).items():
        if name in _INDICES:
            found[name] = list(map(int, value))
        elif name.startswith("_"):  # may change as images are read, so that it cannot count
            known &= ours or name.startswith("__")
        elif name not in _PATHS and not any(value is part for part in inner):
            found[name], stated = _write(value)
            known &= stated
    files, names = _hash_files(layer), [] if inner else list(map(str, _list(layer, "names")))
    return [type(layer).__name__, found, files, names], known and bool(inner or files or names)


def _list(layer: Any, name: str) -> list[Any]:
    """What a layer has of that name, if there is one for each item."""
    found = list(getattr(layer, name, None) or [])
    return found if len(found) == len(layer) else []


def _hash_files(layer: Any) -> list[Any]:
    entries = _list(layer, "samples") if "samples" in getattr(layer, "__dict__", {}) else []
    try:
        return [hash_file(Path(entry[0])) for entry in entries]
    except (TypeError, LookupError, OSError):  # samples that are no files
        return []


def _write(value: Any) -> tuple[Any, bool]:
    """A value as JSON, and whether that says all of it."""
    try:
        return json.loads(json.dumps(value)), True
    except (TypeError, ValueError):
        pass
    if isinstance(value, FunctionType):
        return f"{value.__module__}.{value.__qualname__}", _is_stated(value)
    text = repr(value) if callable(value) else type(value).__name__
    stated = _is_stated(value) and not _ADDRESS.search(text)
    return [_ADDRESS.sub("", text), _list_settings(value) if stated else []], stated


def _list_settings(value: Any) -> Any:
    """What a transform was made with, of which torchvision's text may leave some out."""
    if isinstance(value, list | tuple):
        return [_list_settings(part) for part in value]
    settings = {} if isinstance(value, Enum) else getattr(value, "__dict__", {})
    inner = {n: _list_settings(part) for n, part in settings.items() if not n.startswith("_")}
    return [type(value).__name__, inner] if inner else _ADDRESS.sub("", str(value))


def _is_stated(value: Any) -> bool:
    stated = (
        str(getattr(value, "__module__", "")).partition(".")[0] in _STATED
        and type(value).__name__ != "Lambda"
    )
    return stated and all(map(_is_stated, getattr(value, "transforms", None) or []))


def _hash_item(item: tuple) -> str:
    image, label, companions = item
    parts = [image, *(companions[key] for key in sorted(companions))]
    contents = [
        p.contiguous().numpy().tobytes() if isinstance(p, Tensor) else str(p) for p in parts
    ]
    return hash_contents(str(label), *contents)
