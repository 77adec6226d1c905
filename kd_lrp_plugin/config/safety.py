"""Which YAML tags, imports and keys run no code of the config's author."""

import copy
from typing import Any

import yaml

from kd_lrp_plugin.config.document import Document
from kd_lrp_plugin.config.nodes import TEXT_TAGS, describe_mark, walk, walk_pairs
from kd_lrp_plugin.utils.validation import message

# What --safe lets a tag import or call, without its last name; none of it runs other code.
HARMLESS = {
    "kd_lrp_plugin.torchdistill": (
        "recorder",
        "phantom",
        "folder_images",
        "csv_images",
        "mnist",
        "marked",
        "subclasses",
        "with_unlabelled",
        "kmeans_subclasses",
        "weight_schedule",
        "class_weights",
        "mixup",
    ),
    "torch.utils.data": ("RandomSampler", "SequentialSampler"),
    "torch": ("tensor",),
    "torchvision.transforms": (
        "Compose",
        "Resize",
        "CenterCrop",
        "RandomCrop",
        "RandomResizedCrop",
        "RandomHorizontalFlip",
        "RandomVerticalFlip",
        "RandomRotation",
        "RandomAffine",
        "ColorJitter",
        "Grayscale",
        "ToTensor",
        "Normalize",
        "RandomErasing",
    ),
}
_CALL_TAGS = ("!import_get", "!import_call")
_UNKNOWN = object()  # what another tag would make


class _ValueLoader(yaml.SafeLoader):
    """Makes text where a tag makes text, and calls nothing else."""


def _construct_text(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if node.tag not in TEXT_TAGS:
        return _UNKNOWN
    is_list = isinstance(node, yaml.SequenceNode)
    given = loader.construct_sequence(node, True) if is_list else loader.construct_scalar(node)  # type: ignore
    return TEXT_TAGS[node.tag](given)


_ValueLoader.add_multi_constructor(None, _construct_text)


def _get_value(node: yaml.Node) -> Any:
    """What will be read there; something that is on no list where that cannot be known."""
    try:
        return _ValueLoader("").construct_document(copy.deepcopy(node))
    except Exception:  # whoever reads the config raises the error
        return _UNKNOWN


def _list_names(value: Any) -> list[Any]:
    """Every scalar of a value, for any of them may name a module; nothing for null."""
    if isinstance(value, dict):  # {name: module, package: ...}, or one that is no dependency
        return [name for part in value.values() for name in _list_names(part)]
    if isinstance(value, list | tuple | set):
        return [name for part in value for name in _list_names(part)]
    return [] if value is None else [value]


def unsafe_tags(config: Document) -> list[str]:
    """What of a config could run code beyond :data:`HARMLESS`, a message with its location each."""
    found = []
    for node in walk(config.root):
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            # A merge would bring in what is not looked at here; other keys could be made by tags.
            if not isinstance(key, yaml.ScalarNode) or key.tag.startswith("!"):
                found.append((key, "a key that is not plain text"))
            elif key.tag.endswith(":merge"):
                found.append((key, "a merge key"))
        if node.tag.startswith("tag:yaml.org,2002:python/"):
            found.append((node, node.tag))
        elif node.tag in _CALL_TAGS:
            values = {key: _get_value(child) for key, (_, child) in walk_pairs(node).items()}
            named = ".".join(
                str(values[key]) for key in ("package", "key") if values.get(key) is not None
            )
            package, _, name = named.rpartition(".")
            if name not in HARMLESS.get(package, ()):
                found.append((node, f"{node.tag} of {named!r}"))
        elif node.tag.startswith("!") and node.tag not in TEXT_TAGS:
            found.append((node, node.tag))
    pairs = walk_pairs(config.root)
    if "dependencies" in pairs:
        node = pairs["dependencies"][1]
        value = _get_value(node)
        # torchdistill takes the keys of a mapping for the names of modules.
        for name in _list_names(list(value) if isinstance(value, dict) else value):
            if name not in HARMLESS:
                shown = "what a tag makes" if name is _UNKNOWN else repr(name)
                found.append((node, f"a dependency on {shown}"))
    for node in walk(config.root):
        if (hub := walk_pairs(node).get("repo_or_dir")) and _get_value(hub[1]):
            found.append((hub[1], "repo_or_dir, which loads a model's code"))
    fix = "Read the config, and leave --safe out if you trust it."
    return [
        message(describe_mark(n.start_mark), "calls known as harmless", got, fix)
        for n, got in found
    ]
