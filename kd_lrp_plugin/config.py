"""The text of a config: read, changed from the command line, written again.

torchdistill's tags can call code, so overrides work on the text's nodes, before any tag is read.
"""

from collections.abc import Sequence
from pathlib import Path

import yaml

from kd_lrp_plugin.checks import check_known, message


def resolve_config(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """The text of a config with overrides applied, tags still unread.

    Args:
        path: a torchdistill YAML file.
        overrides: ``key.of.keys=value`` each, with the value in YAML; a number picks a list item,
            and ``+`` in front adds a key. An anchored value changes wherever it is used, except
            that the name of a data set keeps: only what refers to it changes.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a key that is not there (with the nearest ones), or text that is not YAML.
    """
    if not Path(path).is_file():
        fix = "Give the path of a YAML file, for example one of torchdistill_configs."
        raise FileNotFoundError(message("config", "a file", f"none at {path}", fix))
    root = _compose(str(path), Path(path).read_text(encoding="utf-8"))
    if not isinstance(root, yaml.MappingNode):
        fix = "See torchdistill_configs."
        raise ValueError(message(str(path), "a mapping of sections", repr(root.value), fix))
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            fix = "For example train.num_epochs=2."
            raise ValueError(message("--set", "key=value", repr(override), fix))
        _apply(root, key, _number(_compose(f"--set {key}", value)))
    return yaml.serialize(root, Dumper=yaml.SafeDumper, allow_unicode=True)


def _compose(where: str, text: str) -> yaml.Node:
    try:
        node = yaml.compose(text, Loader=yaml.FullLoader)
    except yaml.YAMLError as error:
        raise ValueError(message(where, "YAML", str(error), "Correct the text there.")) from error
    return node if node is not None else yaml.ScalarNode("tag:yaml.org,2002:null", "")


def _apply(root: yaml.Node, dotted: str, value: yaml.Node) -> None:
    adds = dotted.startswith("+")
    *parents, last = dotted.removeprefix("+").split(".")
    node = root
    for key in parents:
        node = _children(node, dotted)[_known_key(node, key, dotted)]
    children = _children(node, dotted)
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
        _known_key(node, last, dotted)


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


def _children(node: yaml.Node, dotted: str) -> dict[str, yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return {key.value: child for key, child in node.value}
    if isinstance(node, yaml.SequenceNode):
        return {str(place): child for place, child in enumerate(node.value)}
    fix = "Name a key further up."
    raise ValueError(message(f"--set {dotted}", "keys on the way", repr(node.value), fix))


def _known_key(node: yaml.Node, key: str, dotted: str) -> str:
    check_known(f"--set {dotted}: key", key, _children(node, dotted))
    return key


def only_sections(text: str, keep: Sequence[str]) -> str:
    """The text with only the top-level sections ``keep``; their aliases stay resolved."""
    root = _compose("config", text)
    root.value = [(key, value) for key, value in root.value if key.value in keep]
    return yaml.serialize(root, Dumper=yaml.SafeDumper, allow_unicode=True)
