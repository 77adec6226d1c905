"""What tells the images of a data set, as a model sees them, from others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from kd_lrp_plugin.data.views import list_layers
from kd_lrp_plugin.utils.files import hash_contents, hash_file

_SAMPLED = 8
_PATHS = ("root", "folder", "samples", "imgs", "cache")  # where they lie, and how they are kept


def identify_items(images: Any, ask: Callable[[int], tuple], rows: int) -> str:
    """A digest of a data set and of what it hands out.

    Files count by their bytes, images of a built-in set by their names, each wrapper by what can
    be written down of it, the transform by its text; eight items, spread over all, by their pixels.
    Where images have neither files nor names, all items count by their pixels.

    Args:
        images: the data set, whose layers are described.
        ask: the item of a row: image, label, companions.
        rows: how many there are.
    """
    layers = list_layers(images)
    facts = [_describe(layer) for layer in layers]
    leaves = [layer for layer in layers if len(list_layers(layer)) == 1]
    known = all(getattr(leaf, "samples", None) or getattr(leaf, "names", None) for leaf in leaves)
    step = max(1, rows // _SAMPLED) if known else 1
    pixels = [_hash_item(ask(row)) for row in range(0, rows, step)]
    return hash_contents(facts, pixels, rows)


def _describe(layer: Any) -> list[Any]:
    found: dict[str, Any] = {}
    said = getattr(layer, "__dict__", {})
    for name, value in said.items():
        if name.startswith("_") or name in _PATHS:
            continue
        try:
            found[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    files = [hash_file(Path(file)) for file, _ in said.get("samples", [])]
    names = [str(name) for name in getattr(layer, "names", [])] if not files else []
    return [type(layer).__name__, found, files, names, repr(said.get("transform"))]


def _hash_item(item: tuple) -> str:
    image, label, companions = item
    parts = [image, *(companions[key] for key in sorted(companions))]
    contents = [
        p.contiguous().numpy().tobytes() if isinstance(p, Tensor) else str(p) for p in parts
    ]
    return hash_contents(str(label), *contents)
