"""Finished runs: the student again, its predictions on new images, and its full evaluation."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from kd_lrp_plugin.config.build import build_model_entry, construct, get_stages
from kd_lrp_plugin.config.document import Document, resolve_config
from kd_lrp_plugin.config.nodes import walk_pairs
from kd_lrp_plugin.config.safety import unsafe_tags
from kd_lrp_plugin.data.transforms import describe_transform, preparation
from kd_lrp_plugin.losses import fold_logits
from kd_lrp_plugin.models.weights import load_weights
from kd_lrp_plugin.runs.provenance import check_weights_file
from kd_lrp_plugin.runs.record import RunRecord
from kd_lrp_plugin.utils.files import hash_file
from kd_lrp_plugin.utils.validation import message

_PATHS = ("root", "manifest", "csv")  # arguments of data sets


def load_run(folder: str | Path, safe: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """The trained student of a run folder, in evaluation mode, and the run's summary.

    Of a run with subclasses its outputs are the logits of the classes, see :func:`load_models`.

    Args:
        folder: a finished run; its config is a program, run only those that you trust.
        safe: refuse tags beyond :data:`kd_lrp_plugin.config.safety.HARMLESS`.

    Raises:
        FileNotFoundError: if the folder holds no finished run.
        ValueError: for a config that is not safe, if it must be.
    """
    summary = RunRecord(folder).summary()
    return load_models(folder, ("student",), safe)["student"], summary


def load_models(
    folder: str | Path, roles: Sequence[str] = ("student", "teacher"), safe: bool = False
) -> dict[str, nn.Module]:
    """The models of a run folder as they stood at its end, in evaluation mode.

    Of a run with subclasses the models return logits of the classes, whose softmax adds up that of
    their subclasses (:func:`kd_lrp_plugin.losses.fold_logits`). A class is explained by the mean of
    its subclasses' logits, weighted by their share in its probability, which is the gradient of
    its own logit.

    A teacher's ``src_ckpt`` is looked for where the config says, a relative path as
    :meth:`~kd_lrp_plugin.runs.record.RunRecord.list_places` has it, and must be the file that the
    run was trained with.

    Args:
        folder: a finished run.
        roles: "student" and "teacher"; a run without a teacher has none to load.
        safe: see :func:`load_run`.

    Returns:
        By role, those that the run has, students first.

    Raises:
        FileNotFoundError: if the folder holds no finished run, or the teacher's weights are no
            longer where they were.
        ValueError: for a config that is not safe, if it must be, a teacher whose weights were
            not read from a file, or weights of another model.
    """
    models = load_as_trained(folder, roles, safe)
    if subclass_of := RunRecord(folder).summary().get("subclass_of"):
        for model in models.values():
            model.register_forward_hook(partial(_report_classes, tuple(subclass_of)))
    return models


def load_as_trained(
    folder: str | Path, roles: Sequence[str] = ("student", "teacher"), safe: bool = False
) -> dict[str, nn.Module]:
    """As :func:`load_models`, but of a run with subclasses the models return the logits of these.

    Args and errors are those of :func:`load_models`.
    """
    run = RunRecord(folder)
    summary = run.summary()
    entries = read_model_entries(run, summary, safe)
    models = {}
    for role in sorted(set(roles) & set(entries)):
        models[role] = build_untrained(role, entries)
        if role == "student":
            file = run.check_output("best.pt")
        else:
            file = check_weights_file(_find_teacher_file(run, entries[role]))
        load_weights(models[role], file, f"{role} of {run.path}", strict=True)
        _check_finite(models[role], f"{role} of {run.path}")
        models[role].eval()
    return models


def _report_classes(
    subclass_of: Sequence[int], _: nn.Module, __: Any, logits: Float[Tensor, "n subclasses"]
) -> Float[Tensor, "n classes"]:
    """Logits of the classes, by operations that are linear, so that any method explains them."""
    given = logits.detach()
    folded = fold_logits(given, subclass_of)
    owners = torch.tensor(subclass_of, device=logits.device)
    members = owners == torch.arange(folded.shape[1], device=logits.device)[:, None]
    shares = (given[:, None] - folded[:, :, None]).masked_fill(~members, -torch.inf).exp()
    linear = (logits[:, None] * shares).sum(2)
    return linear + (folded - linear.detach())


def _check_finite(model: nn.Module, where: str) -> None:
    """Raise ValueError where weights are nan or infinite, as after a training that diverged."""
    state = model.state_dict()
    broken = [key for key, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        got = f"{len(broken)} of {len(state)} that are not, first {broken[0]}"
        fix = "Train it again, for example with a lower learning rate, in another --out."
        raise ValueError(message(where, "tensors of finite numbers", got, fix))


def _find_teacher_file(run: RunRecord, entry: Mapping[str, Any]) -> Path:
    key = "src_ckpt" if entry.get("src_ckpt") else "weights"
    source = entry.get("src_ckpt") or entry["kwargs"].get("weights")
    where = f"teacher of {run.path}"
    if not source:
        fix = "Train the teacher first and name its file, or leave it out: --model student."
        raise ValueError(message(where, "a src_ckpt in the config", "none", fix))
    found = [file for file in run.list_places(source) if file.is_file()]
    if not found:
        fix = (
            "Put it back, or give the command in the folder in which the run was started; "
            "--model student does without."
        )
        raise FileNotFoundError(message(where, f"its weights {source}", "no such file", fix))
    trained_with = run.read_environment().get("files", {}).get(f"models.teacher_model.{key}")
    if trained_with is None:
        return found[0]
    for file in found:
        if hash_file(file) == trained_with:
            return file
    got, fix = f"others, at {found[0]}", "Put them back; --model student does without."
    raise ValueError(message(where, "the weights that it was trained with", got, fix))


def load_transform(folder: str | Path, safe: bool = False) -> Callable[[Image.Image], Tensor]:
    """How a run prepares images for its models in validation; see :func:`load_preparation`."""
    return load_preparation(folder, safe)[1]


def load_preparation(
    folder: str | Path, safe: bool = False
) -> tuple[int | None, Callable[[Image.Image], Tensor]]:
    """How a run reads images, and prepares them for its models in validation.

    A transform of the config's own, such as torchvision's ``Compose``, is built from the config,
    without its images where they are not needed for it.

    Args:
        folder: a finished run.
        safe: see :func:`load_run`.

    Returns:
        ``bits`` of :func:`kd_lrp_plugin.data.images.read_image`, and the transform of an image in
        RGB.

    Raises:
        FileNotFoundError: if the folder holds no finished run.
        ValueError: if the transform is not known, or the config is not safe, if it must be.
    """
    bits, prepare, summary = _find_transform(RunRecord(folder), safe)
    mode = "RGB" if summary["preprocessing"] or summary["image_shape"][0] != 1 else "L"
    return bits, lambda image: prepare(image.convert(mode))


def load_policy(folder: str | Path, safe: bool = False) -> dict[str, Any]:
    """How a run prepares images in validation, as JSON can hold it.

    Args:
        folder: a finished run.
        safe: see :func:`load_run`.

    Returns:
        The policy of :func:`kd_lrp_plugin.data.transforms.describe_transform`.

    Raises:
        FileNotFoundError: if the folder holds no finished run.
        ValueError: if the transform is not known or cannot be written down; names the step.
    """
    bits, prepare, summary = _find_transform(RunRecord(folder), safe)
    where = f"preprocessing of {folder}"
    return describe_transform(where, prepare, summary["image_shape"], bits)


def _find_transform(run: RunRecord, safe: bool) -> tuple[int | None, Any, dict[str, Any]]:
    """``bits``, the transform and the run's summary."""
    summary = run.summary()
    if (policy := summary["preprocessing"]) is not None:
        shape = [policy.get("channels", 3), *2 * [policy["image_size"]]]
        if shape != summary["image_shape"]:  # what the test has found would not hold
            got, fix = f"{shape}, tested as {summary['image_shape']}", "Give both one image_size."
            where = f"preprocessing of {run.path}"
            raise ValueError(message(where, "images validated and tested in one shape", got, fix))
        return *preparation(summary["preprocessing"]), summary
    return *_build_transform(run, _read_config(run, safe)), summary


def _build_transform(run: RunRecord, config: Document) -> tuple[int | None, Any]:
    where = f"transform of {run.path}"
    train = config.values.get("train") or {}
    stage = next(iter(get_stages(train).values()))
    name = str(stage["val_data_loader"]["dataset_id"])
    nodes = {key: node for key, (_, node) in walk_pairs(config.root).items()}
    node: yaml.Node | None = nodes["datasets"]
    for key in (name, "init", "kwargs"):
        pairs = walk_pairs(node) if node is not None else {}
        node = pairs[key][1] if key in pairs else None
    given = {key: pair[1] for key, pair in walk_pairs(node).items()} if node is not None else {}
    if "transform" in given and "images" not in given:  # so the images need not be here
        parts = config.only("dependencies").root
        found = [
            (yaml.ScalarNode("tag:yaml.org,2002:str", key), given[key])
            for key in ("transform", "bits")
            if key in given
        ]
        parts.value = [*parts.value, *found]
        dataset = SimpleNamespace(**construct(replace(config, root=parts)))
    else:
        dataset = _build_dataset(config, name, run)
        while hasattr(dataset, "dataset"):  # a subset
            dataset = dataset.dataset
    prepare = getattr(dataset, "transform", None)
    if not callable(prepare):
        fix = "Load the model with runs.loading.load_run, and prepare the images as in training."
        raise ValueError(message(where, f"a transform of {name!r}", repr(prepare), fix))
    return getattr(dataset, "bits", None), prepare


def load_test_set(folder: str | Path, safe: bool = False) -> Any:
    """The data set that a run was tested on; see :func:`load_data_set`."""
    return load_data_set(folder, "test", safe)


def load_data_set(folder: str | Path, part: str, safe: bool = False) -> Any:
    """A data set of a run, built from its config; the others are not touched.

    Args:
        folder: a run.
        part: "train" or "val", those of the first stage, or "test".
        safe: see :func:`load_run`.

    Raises:
        FileNotFoundError: if the folder holds no finished run, or the images are not there.
        ValueError: for a config that is not safe, if it must be.
    """
    run = RunRecord(folder)
    run.summary()
    config = _read_config(run, safe)
    if part == "test":
        name = construct(config.only("test"))["test"]["test_data_loader"]["dataset_id"]
    else:
        stage = next(iter(get_stages(config.values.get("train") or {}).values()))
        name = str(stage[f"{part}_data_loader"]["dataset_id"])
    return _build_dataset(config, name, run)


def _build_dataset(config: Document, name: str, run: RunRecord) -> Any:
    _check_seen_alike(run, f"{name} of {run.path}", config.values["datasets"][name])
    config = config.only("dependencies", "datasets")
    for key, section in config.root.value:
        if key.value == "datasets":
            section.value = [pair for pair in section.value if pair[0].value == name]
    return construct(config)["datasets"][name]


def _check_seen_alike(run: RunRecord, where: str, entry: Any) -> None:
    """Raise ``ValueError`` where a relative path means something else here than in the training."""
    if not isinstance(entry, dict) or run.started_in is None:
        return
    for key, value in entry.items():
        _check_seen_alike(run, where, value)
        if key not in _PATHS or not isinstance(value, str):
            continue
        then, now = run.list_places(value)[0], Path(os.path.expandvars(value)).expanduser()
        if then.exists() and not (now.exists() and now.samefile(then)):
            got = f"{now if now.exists() else 'none'} as seen from {Path.cwd()}"
            fix = f"Give the command in {run.started_in}, where the run was started."
            raise ValueError(message(where, f"{key} {then}", got, fix))


def _read_config(run: RunRecord, safe: bool) -> Document:
    config = resolve_config(run / "config.yaml")
    if safe and (problems := unsafe_tags(config)):
        raise ValueError("\n".join(problems))
    # Modules of the user's own lay beside the config that was given; none belongs into a run.
    beside = None if safe else run.module_folder
    return replace(config, module_folders=(Path(beside),) if beside else ())


def read_model_entries(
    run: RunRecord, summary: Mapping[str, Any], safe: bool
) -> dict[str, dict[str, Any]]:
    """What the config says of student and, if there was one, teacher."""
    config = _read_config(run, safe)
    # A student that was chosen may need its data to be read in; its choice is known already.
    chosen = summary.get("student")
    without = "student_model" if chosen else ""
    content = construct(config.only("dependencies", "models", without=without))
    entries = dict(content["models"])
    if chosen:  # nothing else of it: a repo_or_dir, say, would run code
        entries["student_model"] = {key: chosen[key] for key in ("key", "kwargs")}
    return {
        "teacher" if name == "teacher_model" else "student": entry
        for name, entry in entries.items()
    }


def build_untrained(role: str, entries: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    entry = entries[role]
    initial = ("weights", "pretrained")  # those of the run's end take their place
    kwargs = {key: value for key, value in entry["kwargs"].items() if key not in initial}
    return build_model_entry({**entry, "kwargs": kwargs}, f"models.{role}")
