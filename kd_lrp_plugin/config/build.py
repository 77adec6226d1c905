"""Content, stages and models of a config, built."""

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torchdistill.common import main_util, yaml_util
from torchdistill.models.official import get_image_classification_model
from torchdistill.models.registry import MODEL_DICT, get_model

from kd_lrp_plugin.config.document import Document
from kd_lrp_plugin.models.weights import load_weights
from kd_lrp_plugin.utils.validation import check_known, message


def construct(
    config: Document, failed: Callable[[yaml.Mark, Exception], None] | None = None
) -> Any:
    """The content of a config: torchdistill's tags called, its dependencies imported.

    Args:
        config: its nodes.
        failed: told each tag that fails, with its mark; its value is then None. Without it the
            first error is raised.
    """
    with tempfile.TemporaryDirectory() as folder:  # so that torchdistill registers its tags
        Path(folder, "empty.yaml").touch()
        yaml_util.load_yaml_file(str(Path(folder, "empty.yaml")))

    class Loader(yaml.FullLoader):
        """Constructors of its own: those of PyYAML's class are for everybody."""

    broken: list[yaml.Node] = []

    def guarded(make: Callable[[Any, yaml.Node], Any]) -> Callable[[Any, yaml.Node], Any]:
        def call(loader: Any, node: yaml.Node) -> Any:
            try:
                return make(loader, node)
            except Exception as error:
                if failed is None:
                    raise
                if not any(_within(inner, node) for inner in broken):
                    failed(node.start_mark, error)
                broken.append(node)
                return None

        return call

    tags = [str(tag) for tag in yaml.FullLoader.yaml_constructors if str(tag).startswith("!")]

    def unknown(_: Any, suffix: str, __: yaml.Node) -> None:
        check_known("tag", f"!{suffix}", tags)

    for tag in tags:
        Loader.add_constructor(tag, guarded(yaml.FullLoader.yaml_constructors[tag]))
    Loader.add_multi_constructor(
        "!", lambda loader, suffix, node: guarded(lambda a, b: unknown(a, suffix, b))(loader, node)
    )
    content = Loader("").construct_document(config.root)
    if isinstance(content, dict):
        main_util.import_dependencies(content.get("dependencies"))
    return content


def _within(inner: yaml.Node, outer: yaml.Node) -> bool:
    return (
        inner.start_mark.name == outer.start_mark.name
        and outer.start_mark.index <= inner.start_mark.index
        and inner.end_mark.index <= outer.end_mark.index
    )


def get_stages(train: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages of a ``train`` section by their dotted name, in order; one if it has none."""
    names = [key for key in train if re.fullmatch(r"stage\d+", key)]
    names.sort(key=lambda name: int(name.removeprefix("stage")))
    return {f"train.{name}": train[name] for name in names} or {"train": dict(train)}


def build_model_entry(entry: Mapping[str, Any], where: str = "models") -> nn.Module:
    """The model of an entry of ``models``: torchvision's, or one registered with torchdistill."""
    for key in ("key", "kwargs"):
        if not isinstance(entry, Mapping) or key not in entry:
            fix = "For example {key: timm_model, kwargs: {name: mobilenetv2_100, num_classes: 4}}."
            raise ValueError(message(where, f"an entry with {key!r}", entry, fix))
    model = get_image_classification_model(entry, False)
    if model is None:
        if not entry.get("repo_or_dir"):
            check_known(f"{where}.key", entry["key"], MODEL_DICT)
        model = get_model(entry["key"], entry.get("repo_or_dir"), **entry["kwargs"])
    return model


def fill_model(model: nn.Module, entry: Mapping[str, Any], where: str, classes: list[str]) -> None:
    """Load the checkpoint that an entry of ``models`` names, if it names one.

    Raises:
        FileNotFoundError: if it is not there; the entry's ``_made_by`` is quoted.
        ValueError: if it holds other things than tensors, another model, or other classes.
    """
    if not entry.get("src_ckpt"):
        return
    file = Path(os.path.expandvars(entry["src_ckpt"])).expanduser()
    where = f"{where}.src_ckpt"
    if not file.is_file():
        made_by = entry.get("_made_by")
        fix = f"Make it with: {made_by}" if made_by else "Train it, or correct src_ckpt."
        raise FileNotFoundError(message(where, "a checkpoint", f"none at {file}", fix))
    load_weights(model, file, where)
    if file.suffix == ".safetensors" or not classes:
        return
    found = torch.load(file, map_location="cpu", weights_only=True)
    names = found.get("classes") if isinstance(found, dict) else None
    if names and list(names) != classes:
        got = {"checkpoint": names, "data": classes}
        fix = "Use a checkpoint that was trained on these classes, in this order."
        raise ValueError(message(f"{where} {file}", "the classes of the data", got, fix))
