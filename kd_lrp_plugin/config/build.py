"""Content, stages and models of a config, built."""

import copy
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from torch import nn
from torchdistill.common import main_util, yaml_util
from torchdistill.models.official import get_image_classification_model
from torchdistill.models.registry import MODEL_DICT, get_model

from kd_lrp_plugin.config.document import Document
from kd_lrp_plugin.models.weights import fill, read_weights
from kd_lrp_plugin.utils.validation import check_known, message


@dataclass
class BuiltModel:
    """A model of a config, with the weights that its entry names.

    Attributes:
        module: the model.
        classes: of the checkpoint it was filled from, if that names any; its subclasses where it
            has an output for each of them.
    """

    module: nn.Module
    classes: tuple[str, ...] = ()


@dataclass
class Assembly:
    """All that a config names, built once.

    Attributes:
        content: of the config, from :func:`construct`; the data sets are in it.
        models: by their key in the config, such as "student_model".
    """

    content: dict[str, Any]
    models: dict[str, BuiltModel]

    def copy(self) -> "Assembly":
        """Another that can be trained, or changed in place, without a trace in this one."""
        memo: dict[int, Any] = {}
        # One memo: what the models share with the data sets, their copies share.
        content = _copy(self.content, memo)
        models = {}
        for role, built in self.models.items():
            try:
                models[role] = BuiltModel(copy.deepcopy(built.module, memo), built.classes)
            except Exception:  # such as weights that a hook has computed; shared, they would train
                models[role] = build_filled_model(content["models"][role], f"models.{role}")
        return Assembly(content, models)


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy in which only what refuses to be copied, such as an open file, is shared."""
    if id(value) in memo:
        return memo[id(value)]
    if type(value) is dict:
        found: dict[Any, Any] = {}
        memo[id(value)] = found
        found.update((key, _copy(part, memo)) for key, part in value.items())
        return found
    if type(value) is list:
        parts: list[Any] = []
        memo[id(value)] = parts
        parts.extend(_copy(part, memo) for part in value)
        return parts
    trial = dict(memo)  # a copy that fails half-way leaves what is half made in its memo
    try:
        made = copy.deepcopy(value, trial)
    except Exception:
        made = memo[id(value)] = value
    else:
        # A memo keeps what it has met alive under its own id, which is no object's that is copied,
        # but another's once this one is gone.
        memo.setdefault(id(memo), []).extend(trial.pop(id(trial), []))
        memo.update(trial)
    return made


def assemble(config: Document) -> Assembly:
    """Everything that a config names, built; the first error is raised."""
    content = construct(config)
    entries = content["models"].items()
    models = {role: build_filled_model(entry, f"models.{role}") for role, entry in entries}
    return Assembly(content, models)


def import_dependencies(config: Document) -> Any:
    """Import the modules that a config names under ``dependencies``; what it names.

    They register what they add: losses, rules, scores, models. So they come before any name of
    theirs is looked up. Modules are found where Python finds them, then in the current directory
    and beside the config, whether ``python -m`` or an installed script is what runs.

    Raises:
        ImportError: if there is no such module.
    """
    _add_module_folders(config)
    named = _construct(config.only("dependencies"), None).get("dependencies")
    main_util.import_dependencies(named)
    return named


def _add_module_folders(config: Document) -> None:
    beside = config.module_folders
    if beside is None:
        beside = (Path(config.path).parent,)
    for folder in (Path(), *beside):
        if (path := str(folder.resolve())) not in sys.path:
            sys.path.append(path)  # behind all else: no file there hides an installed package


def construct(
    config: Document, failed: Callable[[yaml.Mark, Exception], None] | None = None
) -> Any:
    """The content of a config: its dependencies imported, then torchdistill's tags called.

    Args:
        config: its nodes.
        failed: called with the mark and error of each tag that fails; its value is then None.
            Without it the first error is raised.
    """
    if not config.holds("dependencies"):
        _add_module_folders(config)  # tags, too, may name what lies beside the config
        return _construct(config, failed)
    dependencies = import_dependencies(config)
    return {"dependencies": dependencies, **_construct(config.leave_out("dependencies"), failed)}


def _construct(config: Document, failed: Callable[[yaml.Mark, Exception], None] | None) -> Any:
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
    return Loader("").construct_document(config.root)


def _within(inner: yaml.Node, outer: yaml.Node) -> bool:
    return (
        inner.start_mark.name == outer.start_mark.name
        and outer.start_mark.index <= inner.start_mark.index
        and inner.end_mark.index <= outer.end_mark.index
    )


def get_stages(train: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages of a ``train`` section by their key path, in order; itself if it has none."""
    names = [key for key in train if re.fullmatch(r"stage\d+", str(key))]
    names.sort(key=lambda name: int(name.removeprefix("stage")))
    # The section itself, no copy: what is set in a stage must be seen by torchdistill's box.
    return {f"train.{name}": train[name] for name in names} or {"train": cast(dict, train)}


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


def build_filled_model(entry: Mapping[str, Any], where: str) -> BuiltModel:
    """The model of an entry of ``models``, with the checkpoint that the entry names, if any.

    Raises:
        FileNotFoundError: if the checkpoint is not there; the entry's ``_made_by`` is quoted.
        ValueError: if it holds other things than tensors, or another model.
    """
    model = build_model_entry(entry, where)
    if not entry.get("src_ckpt"):
        return BuiltModel(model)
    file = Path(os.path.expandvars(entry["src_ckpt"])).expanduser()
    where = f"{where}.src_ckpt"
    if not file.is_file():
        made_by = entry.get("_made_by")
        fix = f"Make it with: {made_by}" if made_by else "Train it, or correct src_ckpt."
        raise FileNotFoundError(message(where, "a checkpoint", f"none at {file}", fix))
    state, classes = read_weights(file, where)
    fill(model, state, file, where, strict=True)
    return BuiltModel(model, classes)


def check_classes(
    built: BuiltModel, entry: Mapping[str, Any], where: str, classes: list[str]
) -> None:
    """Raise ``ValueError`` if a checkpoint was trained on other classes than the data have."""
    if built.classes and classes and list(built.classes) != classes:
        got = {"checkpoint": list(built.classes), "data": classes}
        fix = "Use a checkpoint that was trained on these classes, in this order."
        where = f"{where}.src_ckpt {entry['src_ckpt']}"
        raise ValueError(message(where, "the classes of the data", got, fix))
