"""A config before any of its tags is read: changed from the command line, searched, checked.

torchdistill's tags can call code, so all of this works on the nodes of the text.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from kd_lrp_plugin.config.inheritance import compose_with_bases, read_text
from kd_lrp_plugin.config.nodes import (
    UntaggedLoader,
    compose,
    describe_mark,
    is_key,
    walk,
    walk_pairs,
)
from kd_lrp_plugin.utils.validation import check_known, message


@dataclass(frozen=True)
class Document:
    """A config with overrides applied: its nodes, its text, and its values without its tags.

    Attributes:
        path: its file.
        root: its nodes; each knows its location in the file, or the override that it came from.
        module_folders: where its modules are looked for; None for its own folder; see
            :func:`kd_lrp_plugin.config.build.import_dependencies`.
    """

    path: str
    root: yaml.MappingNode
    module_folders: tuple[Path, ...] | None = None

    @property
    def text(self) -> str:
        """The config as YAML, tags still unread."""
        return yaml.serialize(self.root, Dumper=yaml.SafeDumper, allow_unicode=True)

    @cached_property
    def values(self) -> dict[str, Any]:
        """The config without what its tags would call: for looking, not for running.

        Of what has a tag, mappings and lists are read; a scalar becomes None, for its text is not
        its value. What ``!join``, ``!pathjoin``, ``!expanduser`` and ``!abspath`` make of text is
        read as torchdistill reads it.

        Example:
            >>> parse_document("", "{a: 1, b: !import_call {key: os.getcwd}, c: !env X}").values
            {'a': 1, 'b': {'key': 'os.getcwd'}, 'c': None}
        """
        # From a copy: PyYAML writes what a merge key brings in into the nodes.
        return UntaggedLoader("").construct_document(copy.deepcopy(self.root))

    def only(self, *sections: str, without: str = "") -> "Document":
        """The config without its other top-level sections; their aliases stay resolved.

        Args:
            sections: to keep.
            without: a key to leave out of these sections.
        """

        def filtered(node: yaml.Node, keep: Callable[[str], bool]) -> Any:
            if not isinstance(node, yaml.MappingNode):
                return node
            pairs = [(key, value) for key, value in node.value if keep(key.value)]
            return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark)

        root = filtered(self.root, lambda key: key in sections)
        root.value = [(key, filtered(value, lambda k: k != without)) for key, value in root.value]
        return replace(self, root=root)

    def leave_out(self, section: str) -> "Document":
        """The config without one top-level section; aliases of what is in it stay resolved."""
        pairs = [(key, value) for key, value in self.root.value if key.value != section]
        root = self.root
        return replace(self, root=yaml.MappingNode(root.tag, pairs, root.start_mark, root.end_mark))

    def shares(self, section: str) -> bool:
        """Whether something of a top-level section stands elsewhere too, by an alias."""
        own = {id(node) for node in walk(self._follow(section)[0])}
        rest = walk(self.leave_out(section).root)
        return any(id(node) in own for node in rest)

    def get_text(self, key_path: str) -> str:
        """The YAML below a key, with all that its aliases name, tags still unread."""
        node, _, _ = self._follow(key_path)
        return yaml.serialize(node, Dumper=yaml.SafeDumper, allow_unicode=True)

    def holds(self, key_path: str) -> bool:
        """Whether there is such a key."""
        return not self._follow(key_path)[2]

    def encloses(self, key_path: str, mark: yaml.Mark) -> bool:
        """Whether there is such a key, and a node that begins at ``mark`` is its value or below."""
        node, _, rest = self._follow(key_path)
        return not rest and any(below.start_mark is mark for below in walk(node))

    def get_location(self, key_path: str) -> str:
        """Where a key stands, as ``file:line``, or the override that set it.

        Args:
            key_path: keys joined by dots; followed as far as they lead.
        """
        return describe_mark(self._follow(key_path)[1])

    def _follow(self, key_path: str) -> tuple[yaml.Node, yaml.Mark, str]:
        """The node where the keys lead, its location, and the keys that are left over."""
        node: yaml.Node = self.root
        mark = node.start_mark
        rest = key_path
        while rest:
            pairs = walk_pairs(node)
            # Keys may hold dots themselves: the longest that fits.
            fits = [key for key in pairs if rest == key or rest.startswith(f"{key}.")]
            if not fits:
                break
            key = max(fits, key=len)
            mark, node = pairs[key]
            rest = rest[len(key) + 1 :]
        return node, mark, rest


def resolve_config(path: str | Path, overrides: Sequence[str] = ()) -> Document:
    """A config with overrides applied.

    Args:
        path: a torchdistill YAML file.
        overrides: ``key.of.keys=value`` each, with the value in YAML; a number picks a list item,
            and ``+`` in front adds a key. An anchored value changes wherever it is used, except
            that the name of a data set keeps: only what refers to it changes.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a key that is not there (with the nearest ones), or text that is not YAML in
            UTF-8.
    """
    if not Path(path).is_file():
        fix = "Give the path of a YAML file, for example one of torchdistill_configs."
        raise FileNotFoundError(message("config", "a file", f"none at {path}", fix))
    document = parse_document(path, read_text(path))
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            fix = "For example train.num_epochs=2."
            raise ValueError(message("--set", "key=value", repr(override), fix))
        _apply(document.root, key, _number(compose(f"--set {override}", value)))
    return document


def parse_document(path: str | Path, text: str) -> Document:
    """The document of a text.

    Args:
        path: of its file, for locations.
        text: YAML.

    Raises:
        FileNotFoundError: if a file that ``_base_`` names is not there.
        ValueError: if it, or a base, is not YAML, no mapping, or has a key twice.
    """
    root = compose_with_bases(path, text)
    return Document(str(path), root)


def _apply(root: yaml.Node, key_path: str, value: yaml.Node) -> None:
    adds = key_path.startswith("+")
    *parents, last = key_path.removeprefix("+").split(".")
    node = root
    for key in parents:
        node = _children(node, key_path)[_known_key(root, node, key, key_path)]
    children = _children(node, key_path)
    if isinstance(node, yaml.MappingNode) and is_key(root, children.get(last)):
        # A data set's name, say: what uses it changes, not the name.
        node.value = [(k, value if k.value == last else child) for k, child in node.value]
    elif last in children:
        target = children[last]
        # In place, so that every alias of the node sees the new value.
        target.__class__ = value.__class__
        target.__dict__.update(value.__dict__)
    elif adds and isinstance(node, yaml.MappingNode):
        node.value.append((yaml.ScalarNode("tag:yaml.org,2002:str", last), value))
    else:
        _known_key(root, node, last, key_path)


def _list_key_paths(node: yaml.Node, above: str) -> Iterator[str]:
    for key, (_, child) in walk_pairs(node).items():
        yield f"{above}{key}"
        yield from _list_key_paths(child, f"{above}{key}.")


def _number(node: yaml.Node) -> yaml.Node:
    """YAML 1.1 takes 1e-3 for text; a person who types it means a number."""
    if isinstance(node, yaml.ScalarNode) and node.style is None and node.tag.endswith(":str"):
        try:
            float(node.value)
        except ValueError:
            return node
        node.tag = "tag:yaml.org,2002:float"
    return node


def _children(node: yaml.Node, key_path: str) -> dict[str, yaml.Node]:
    if isinstance(node, yaml.ScalarNode):
        fix = "Name a key further up."
        raise ValueError(message(f"--set {key_path}", "keys on the way", repr(node.value), fix))
    return {key: child for key, (_, child) in walk_pairs(node).items()}


def _known_key(root: yaml.Node, node: yaml.Node, key: str, key_path: str) -> str:
    asked = key_path.removeprefix("+")
    if key not in _children(node, key_path):
        # What stands further down is more likely meant than a neighbour of a similar name.
        below = [p for p in _list_key_paths(root, "") if p.endswith(f".{asked}")]
        if below and len(below) <= 3:
            hint = f"Did you mean {' or '.join(map(repr, below))}?"
            raise ValueError(message(f"--set {key_path}", "a key of the config", repr(asked), hint))
    check_known(f"--set {key_path}: key", key, _children(node, key_path))
    return key
