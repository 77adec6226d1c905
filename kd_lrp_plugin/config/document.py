"""A config before any of its tags is read: changed from the command line, searched, checked.

torchdistill's tags can call code, so all of this works on the nodes of the text.
"""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any

import yaml

from kd_lrp_plugin.utils.validation import check_known, message

# torchdistill's tags that make text of the items, or of the scalar, that they are given: where
# images and weights lie must be known by them.
TEXT_TAGS: dict[str, Callable[[Any], str]] = {
    "!join": lambda items: "".join(map(str, items)),
    "!pathjoin": lambda items: os.path.expanduser(os.path.join(*map(str, items))),
    "!expanduser": os.path.expanduser,
    "!abspath": os.path.abspath,
}


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
        return _UntaggedLoader("").construct_document(copy.deepcopy(self.root))

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


def describe_mark(mark: yaml.Mark) -> str:
    """A location as people read it."""
    if mark.name.startswith("--set"):
        return shorten(mark.name, 60, placeholder="...")
    return f"{mark.name}:{mark.line + 1}"


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
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        fix = "Save it as UTF-8."
        raise ValueError(
            message(str(path), "text in UTF-8", f"other bytes ({error})", fix)
        ) from None
    document = parse_document(path, text)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            fix = "For example train.num_epochs=2."
            raise ValueError(message("--set", "key=value", repr(override), fix))
        _apply(document.root, key, _number(_compose(f"--set {override}", value)))
    return document


def parse_document(path: str | Path, text: str) -> Document:
    """The document of a text.

    Args:
        path: of its file, for locations.
        text: YAML.

    Raises:
        ValueError: if it is not YAML, no mapping, or has a key twice.
    """
    root = _compose(str(path), text)
    if not isinstance(root, yaml.MappingNode):
        got = repr(root.value) if isinstance(root, yaml.ScalarNode) else "a list"
        fix = "See torchdistill_configs."
        raise ValueError(message(str(path), "a mapping of sections", got, fix))
    return Document(str(path), root)


class _UntaggedLoader(yaml.SafeLoader):
    """Calls nothing."""


def _construct_untagged(loader: yaml.SafeLoader, _: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return None


def _construct_text(loader: yaml.SafeLoader, node: yaml.Node) -> str | None:
    """What a tag of :data:`TEXT_TAGS` makes; None where another tag below it has its say."""
    for part in walk(node):
        if part.tag.startswith("!") and part.tag not in TEXT_TAGS:
            return None
    is_list = isinstance(node, yaml.SequenceNode)
    if isinstance(node, yaml.MappingNode) or is_list != (node.tag in ("!join", "!pathjoin")):
        return None
    given = loader.construct_sequence(node, True) if is_list else loader.construct_scalar(node)  # type: ignore
    return TEXT_TAGS[node.tag](given) if given or node.tag != "!pathjoin" else None


_UntaggedLoader.add_multi_constructor(None, _construct_untagged)
for _tag in TEXT_TAGS:
    _UntaggedLoader.add_constructor(_tag, _construct_text)


def _overridden(node: yaml.Node) -> bool:
    return node.start_mark is not None and node.start_mark.name.startswith("--set")


def walk_pairs(node: yaml.Node) -> dict[str, tuple[yaml.Mark, yaml.Node]]:
    """The children of a node by key, and the mark of each: that of the key, or of an override."""
    if isinstance(node, yaml.MappingNode):
        return {
            key.value: (child.start_mark if _overridden(child) else key.start_mark, child)
            for key, child in node.value
            if isinstance(key, yaml.ScalarNode)
        }
    if isinstance(node, yaml.SequenceNode):
        return {str(index): (child.start_mark, child) for index, child in enumerate(node.value)}
    return {}


def walk(node: yaml.Node) -> Iterator[yaml.Node]:
    """A node and all below it, each once."""
    seen: set[int] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        stack += reversed(_parts(node))


def _parts(node: yaml.Node) -> list[yaml.Node]:
    """The nodes directly below one, keys included."""
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _compose(where: str, text: str) -> yaml.Node:
    try:
        loader = yaml.FullLoader(text)
        loader.name = where  # what each node's mark names
        node = loader.get_single_node()
        if node is None:
            mark = loader.get_mark()
            return yaml.ScalarNode("tag:yaml.org,2002:null", "", mark, mark)
        _refuse_loops(node, set(), set())
        _refuse_duplicate_keys(node)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(message(where, "YAML", str(error), "Correct the text there.")) from error
    return node


def _refuse_loops(node: yaml.Node, above: set[int], done: set[int]) -> None:
    """Aliases may share a node, not stand inside of it: nothing could be read to its end."""
    if id(node) in above:
        expected, fix = "an alias of what stands elsewhere", "Take the alias out of it."
        got = "one inside of what it names"
        raise ValueError(message(describe_mark(node.start_mark), expected, got, fix))
    if id(node) not in done:
        for part in _parts(node):
            _refuse_loops(part, above | {id(node)}, done)
        done.add(id(node))


def _refuse_duplicate_keys(root: yaml.Node) -> None:
    """YAML forbids a key twice; PyYAML takes the last without a word."""
    for node in walk(root):
        first: dict[Any, yaml.Mark] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue
            # By value: `a` and "a" are one key, and so are `yes` and `true`, or 1 and 1.0.
            value = (
                key.value if key.tag.startswith("!") else _UntaggedLoader("").construct_object(key)
            )
            if value in first:
                both = map(describe_mark, (first[value], key.start_mark))
                got = f"{key.value!r} at {' and '.join(both)}"
                fix = "Delete one of them: which one counts would not show."
                if key.tag.endswith(":merge"):
                    fix = "Merge a list, as in <<: [*one, *other]."
                where = describe_mark(key.start_mark)
                raise ValueError(message(where, "each key once in a mapping", got, fix))
            first[value] = key.start_mark


def _apply(root: yaml.Node, key_path: str, value: yaml.Node) -> None:
    adds = key_path.startswith("+")
    *parents, last = key_path.removeprefix("+").split(".")
    node = root
    for key in parents:
        node = _children(node, key_path)[_known_key(root, node, key, key_path)]
    children = _children(node, key_path)
    if isinstance(node, yaml.MappingNode) and _is_key(root, children.get(last)):
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


def _is_key(root: yaml.Node, target: yaml.Node | None) -> bool:
    """Whether a mapping somewhere below ``root`` has this very node as a key."""
    if isinstance(root, yaml.MappingNode):
        return any(key is target or _is_key(value, target) for key, value in root.value)
    return isinstance(root, yaml.SequenceNode) and any(_is_key(n, target) for n in root.value)


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
