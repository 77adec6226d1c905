"""Configs that begin with another: what ``_base_`` names, changed by what is written out."""

import os
from pathlib import Path

import yaml

from kd_lrp_plugin.config.nodes import compose, describe_mark, is_key, walk, walk_pairs
from kd_lrp_plugin.utils.validation import message

BASE = "_base_"
REPLACE = "!replace"
_MAPPING = "tag:yaml.org,2002:map"


def read_text(path: str | Path) -> str:
    """The text of a file.

    Raises:
        ValueError: if it is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        got, fix = f"other bytes ({error})", "Save it as UTF-8."
        raise ValueError(message(str(path), "text in UTF-8", got, fix)) from None


def compose_with_bases(path: str | Path, text: str) -> yaml.MappingNode:
    """The root node of a text, merged into those of the files that its ``_base_`` names.

    ``_base_`` is a path beside the file, or a list of them, of which later ones change what earlier
    ones say. A mapping is merged key by key, also into one with a tag, such as ``!import_call``;
    anything else, a list or what has a tag itself, takes the place of what was there, wherever that
    was used by an alias; a mapping with the tag ``!replace`` does, too. Aliases may name anchors of
    the bases.

    Args:
        path: of the file, for locations, and for what ``_base_`` names.
        text: YAML.

    Raises:
        FileNotFoundError: if a base is not there.
        ValueError: for text that is not YAML or no mapping, a ``_base_`` that is no path, or one
            that leads back to the file.
    """
    root, _ = _compose(Path(path), text, ())
    for node in walk(root):
        if node.tag == REPLACE:
            if not isinstance(node, yaml.MappingNode):
                got, fix = "something else", "Leave the tag out: all but mappings are replaced."
                where = f"{describe_mark(node.start_mark)}: {REPLACE}"
                raise ValueError(message(where, "a mapping", got, fix))
            node.tag = _MAPPING
    return root


def list_bases(path: str | Path) -> list[Path]:
    """The files that a config begins with, those that they begin with included."""
    found: dict[Path, None] = {}
    for base in _name_bases(Path(path), read_text(path)):
        found |= dict.fromkeys([*list_bases(base), base])
    return list(found)


class _AnyAnchor(dict):
    """Anchors of bases that have not been read: any alias names something."""

    def __contains__(self, _: object) -> bool:
        return True

    def __missing__(self, anchor: str) -> yaml.Node:
        return yaml.ScalarNode("tag:yaml.org,2002:null", anchor)


def _name_bases(path: Path, text: str) -> list[Path]:
    """The files that ``_base_`` of a text names."""
    if BASE not in text:
        return []
    root = compose(str(path), text, _AnyAnchor())
    mark, named = walk_pairs(root).get(BASE, (None, None))
    if mark is None or named is None:
        return []
    nodes = named.value if isinstance(named, yaml.SequenceNode) else [named]
    if not nodes or not all(
        isinstance(node, yaml.ScalarNode) and node.tag.endswith(":str") for node in nodes
    ):
        fix = f"For example {BASE}: ../_base.yaml."
        raise ValueError(message(f"{describe_mark(mark)}: {BASE}", "a path or paths", "none", fix))
    files = [Path(os.path.normpath(path.parent / node.value)) for node in nodes]
    for file in files:
        if not file.is_file():
            fix = "Name it as seen from the file that begins with it."
            where = f"{describe_mark(mark)}: {BASE}"
            raise FileNotFoundError(message(where, "a file", f"none at {file}", fix))
    return files


def _compose(
    path: Path, text: str, above: tuple[Path, ...]
) -> tuple[yaml.MappingNode, dict[str, yaml.Node]]:
    """The root of a file, and the anchors that another may name."""
    here = path.resolve()
    if here in above:
        chain = " -> ".join(str(file) for file in (*above[above.index(here) :], here))
        fix = "Take one of them out."
        raise ValueError(message(str(path), "bases that lead on", f"a circle: {chain}", fix))
    merged: yaml.MappingNode | None = None
    anchors: dict[str, yaml.Node] = {}
    for base in _name_bases(path, text):
        root, found = _compose(base, read_text(base), (*above, here))
        anchors |= found
        merged = root if merged is None else _merge(merged, root, anchors)
    own = dict(anchors)
    read = compose(str(path), text, own)
    if not isinstance(read, yaml.MappingNode):
        got = repr(read.value) if isinstance(read, yaml.ScalarNode) else "a list"
        fix = "See torchdistill_configs."
        raise ValueError(message(str(path), "a mapping of sections", got, fix))
    read.value = [(key, value) for key, value in read.value if key.value != BASE]
    if merged is None:
        return read, own
    return _merge(merged, read, own), own


def _merge(
    base: yaml.MappingNode, changes: yaml.MappingNode, anchors: dict[str, yaml.Node]
) -> yaml.MappingNode:
    """The base with changes, made in place; what an alias names changes with what it named."""
    replaced: list[tuple[yaml.Node, yaml.Node]] = []
    _merge_pairs(base, base, changes, replaced)
    for old, new in replaced:
        _substitute(base, old, new)
        for name, node in anchors.items():
            if node is old:
                anchors[name] = new
    return base


def _merge_pairs(
    root: yaml.Node,
    base: yaml.MappingNode,
    changes: yaml.MappingNode,
    replaced: list[tuple[yaml.Node, yaml.Node]],
) -> None:
    scalar = yaml.ScalarNode
    present = {key.value: i for i, (key, _) in enumerate(base.value) if isinstance(key, scalar)}
    for key, value in changes.value:
        index = present.get(key.value) if isinstance(key, scalar) else None
        if index is None:
            base.value.append((key, value))
            continue
        kept, old = base.value[index]
        if value is old:  # an alias of it
            continue
        both = isinstance(old, yaml.MappingNode) and isinstance(value, yaml.MappingNode)
        if both and value.tag == _MAPPING:
            _merge_pairs(root, old, value, replaced)
            continue
        kept.start_mark = key.start_mark  # where the value is written now
        base.value[index] = kept, value
        if not is_key(root, old):  # a data set's name, say: what uses it changes, not the name
            replaced.append((old, value))


def _substitute(root: yaml.Node, old: yaml.Node, new: yaml.Node) -> None:
    """Put a node in another's place, wherever that stands below ``root`` as a value."""
    for node in list(walk(root)):
        if node is new:
            continue
        if isinstance(node, yaml.MappingNode):
            node.value = [(key, new if value is old else value) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            node.value = [new if value is old else value for value in node.value]
