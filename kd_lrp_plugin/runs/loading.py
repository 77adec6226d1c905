"""Finished runs: the student again, its predictions on new images, and its full evaluation."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kd_lrp_plugin.config.build import build_model_entry, construct
from kd_lrp_plugin.config.document import Document, resolve_config
from kd_lrp_plugin.config.safety import unsafe_tags
from kd_lrp_plugin.models.weights import load_weights
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.utils.validation import message


def load_run(folder: str | Path, safe: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """The trained student of a run folder, in evaluation mode, and the run's summary.

    Args:
        folder: a finished run; its config is a program, run only those that you trust.
        safe: refuse tags beyond :data:`kd_lrp_plugin.config.safety.HARMLESS`.

    Raises:
        FileNotFoundError: if the folder holds no finished run.
        ValueError: for a config that is not safe, if it must be.
    """
    summary = RunFolder(folder).summary()
    return load_models(folder, ("student",), safe)["student"], summary


def load_models(
    folder: str | Path, roles: Sequence[str] = ("student", "teacher"), safe: bool = False
) -> dict[str, nn.Module]:
    """The models of a run folder as they stood at its end, in evaluation mode.

    A teacher's ``src_ckpt`` is looked for where the config says; if it says so by a relative
    path, then also beside the folders above the run's, since the command may have been given in
    one of them.

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
    run = RunFolder(folder)
    summary = run.summary()
    entries = read_model_entries(run, summary, safe)
    models = {}
    for role in sorted(set(roles) & set(entries)):
        models[role] = build_untrained(role, entries)
        file = run / "best.pt" if role == "student" else _teacher_file(run, entries[role])
        load_weights(models[role], file, f"{role} of {run.path}", strict=True)
        models[role].eval()
    return models


def _teacher_file(run: RunFolder, entry: Mapping[str, Any]) -> Path:
    source = entry.get("src_ckpt") or entry["kwargs"].get("weights")
    where = f"teacher of {run.path}"
    if not source:
        fix = "Train the teacher first and name its file, or leave it out: --model student."
        raise ValueError(message(where, "a src_ckpt in the config", "none", fix))
    named = Path(os.path.expandvars(source)).expanduser()
    places = [base / named for base in (Path(), *run.path.resolve().parents)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        fix = (
            "Put it back, or give the command in the folder in which the run was started; "
            "--model student does without."
        )
        raise FileNotFoundError(message(where, f"its weights {named}", "no such file", fix))
    return found


def load_test_set(folder: str | Path, safe: bool = False) -> Any:
    """The data set that a run was tested on, built from its config; the others are not touched.

    Args:
        folder: a run.
        safe: see :func:`load_run`.

    Raises:
        FileNotFoundError: if the folder holds no finished run, or the images are not there.
        ValueError: for a config that is not safe, if it must be.
    """
    run = RunFolder(folder)
    run.summary()
    config = _config(run, safe)
    name = construct(config.only("test"))["test"]["test_data_loader"]["dataset_id"]
    config = config.only("dependencies", "datasets")
    for key, section in config.root.value:
        if key.value == "datasets":
            section.value = [pair for pair in section.value if pair[0].value == name]
    return construct(config)["datasets"][name]


def _config(run: RunFolder, safe: bool) -> Document:
    config = resolve_config(run / "config.yaml")
    if safe and (problems := unsafe_tags(config)):
        raise ValueError("\n".join(problems))
    return config


def read_model_entries(
    run: RunFolder, summary: Mapping[str, Any], safe: bool
) -> dict[str, dict[str, Any]]:
    """What the config says of student and, if there was one, teacher."""
    config = _config(run, safe)
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
    kwargs = {key: value for key, value in entry["kwargs"].items() if key != "weights"}
    return build_model_entry({**entry, "kwargs": kwargs}, f"models.{role}")
