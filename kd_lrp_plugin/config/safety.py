"""Which YAML tags, imports and keys run no code of the config's author."""

import yaml

from kd_lrp_plugin.config.document import Config, walk, walk_pairs
from kd_lrp_plugin.utils.validation import message

# What --safe lets a tag import or call, without its last name; none of it runs other code.
HARMLESS = {
    "kd_lrp_plugin.torchdistill": (
        "recorder",
        "phantom",
        "folder_images",
        "marked",
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
    ),
}
_TEXT_TAGS = ("!join", "!pathjoin", "!expanduser", "!abspath")
_CALL_TAGS = ("!import_get", "!import_call")


def unsafe_tags(config: Config) -> list[str]:
    """What of a config could run code beyond :data:`HARMLESS`, a message with its place each."""
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
            values = {key: child for key, (_, child) in walk_pairs(node).items()}
            named = ".".join(
                str(values[key].value) for key in ("package", "key") if values.get(key) is not None
            )
            package, _, name = named.rpartition(".")
            if name not in HARMLESS.get(package, ()):
                found.append((node, f"{node.tag} of {named!r}"))
        elif node.tag.startswith("!") and node.tag not in _TEXT_TAGS:
            found.append((node, node.tag))
    pairs = walk_pairs(config.root)
    if "dependencies" in pairs:
        for node in walk(pairs["dependencies"][1]):
            if isinstance(node, yaml.ScalarNode) and node.value not in ("", *HARMLESS):
                found.append((node, f"a dependency on {node.value!r}"))
    for node in walk(config.root):
        if (hub := walk_pairs(node).get("repo_or_dir")) and hub[1].value:
            found.append((hub[1], "repo_or_dir, which loads a model's code"))
    fix = "Read the config, and leave --safe out if you trust it."
    return [
        message(config.show(n.start_mark), "calls known as harmless", got, fix) for n, got in found
    ]
