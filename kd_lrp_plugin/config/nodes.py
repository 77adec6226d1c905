"""The nodes of YAML: composed, walked, and read without what their tags would call."""

import os
from collections.abc import Callable, Iterator, Mapping
from textwrap import shorten
from typing import Any

import yaml

from kd_lrp_plugin.utils.validation import message

# torchdistill's tags that make text of the items, or of the scalar, that they are given: where
# images and weights lie must be known by them.
TEXT_TAGS: dict[str, Callable[[Any], str]] = {
    "!join": lambda items: "".join(map(str, items)),
    "!pathjoin": lambda items: os.path.expanduser(os.path.join(*map(str, items))),
    "!expanduser": os.path.expanduser,
    "!abspath": os.path.abspath,
}


class UntaggedLoader(yaml.SafeLoader):
    """Reads values, and calls nothing: of what has a tag, a scalar becomes None."""


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


UntaggedLoader.add_multi_constructor(None, _construct_untagged)
for _tag in TEXT_TAGS:
    UntaggedLoader.add_constructor(_tag, _construct_text)


def describe_mark(mark: yaml.Mark) -> str:
    """A location as people read it."""
    if mark.name.startswith("--set"):
        return shorten(mark.name, 60, placeholder="...")
    return f"{mark.name}:{mark.line + 1}"


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


class _Composer(yaml.FullLoader):
    """Finds aliases among the anchors of other documents too, and keeps those of its own."""

    def __init__(self, text: str, inherited: Mapping[str, yaml.Node]) -> None:
        super().__init__(text)
        self.inherited, self.found = inherited, dict(inherited)

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            anchor = self.peek_event().anchor
            if anchor not in self.anchors and anchor in self.inherited:
                self.get_event()
                return self.inherited[anchor]
        node = super().compose_node(parent, index)
        self.found |= self.anchors
        return node


def compose(where: str, text: str, anchors: dict[str, yaml.Node] | None = None) -> yaml.Node:
    """The root node of a text.

    Args:
        where: what the mark of each node names.
        text: YAML.
        anchors: of other documents, which its aliases may name; its own are added.

    Raises:
        ValueError: if it is not YAML, or has a key twice.
    """
    try:
        loader = _Composer(text, {} if anchors is None else anchors)
        loader.name = where
        node = loader.get_single_node()
        if node is None:
            mark = loader.get_mark()
            return yaml.ScalarNode("tag:yaml.org,2002:null", "", mark, mark)
        _refuse_loops(node, set(), set())
        _refuse_duplicate_keys(node)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(message(where, "YAML", str(error), "Correct the text there.")) from error
    if anchors is not None:
        anchors |= loader.found
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
                key.value if key.tag.startswith("!") else UntaggedLoader("").construct_object(key)
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


def is_key(root: yaml.Node, target: yaml.Node | None) -> bool:
    """Whether a mapping somewhere below ``root`` has this very node as a key."""
    if isinstance(root, yaml.MappingNode):
        return any(key is target or is_key(value, target) for key, value in root.value)
    return isinstance(root, yaml.SequenceNode) and any(is_key(n, target) for n in root.value)
