"""Finished runs: the student again, its predictions on new images, and its full evaluation."""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from kd_lrp_plugin.checks import message
from kd_lrp_plugin.config import Config, resolve_config, unsafe_tags
from kd_lrp_plugin.data import make_transforms
from kd_lrp_plugin.efficiency import cost
from kd_lrp_plugin.evaluation import classification_metrics, compare_predictions
from kd_lrp_plugin.experiment import build_model_of, construct
from kd_lrp_plugin.report import confusion_figure, reliability_figure
from kd_lrp_plugin.runs import RunFolder
from kd_lrp_plugin.students import load_weights


def load_run(folder: str | Path, safe: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """The trained student of a run folder, in evaluation mode, and the run's summary.

    Args:
        folder: a finished run; its config is a program, run only those that you trust.
        safe: refuse tags beyond :data:`kd_lrp_plugin.config.HARMLESS`.

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
    entries = _model_entries(run, summary, safe)
    models = {}
    for role in sorted(set(roles) & set(entries)):
        models[role] = _untrained(role, entries)
        file = run / "best.pt" if role == "student" else _teacher_file(run, entries[role])
        load_weights(models[role], file, f"{role} of {run.path}")
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


def _config(run: RunFolder, safe: bool) -> Config:
    config = resolve_config(run / "config.yaml")
    if safe and (problems := unsafe_tags(config)):
        raise ValueError("\n".join(problems))
    return config


def _model_entries(
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


def _untrained(role: str, entries: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    entry = entries[role]
    kwargs = {key: value for key, value in entry["kwargs"].items() if key != "weights"}
    return build_model_of({**entry, "kwargs": kwargs}, f"models.{role}")


def predict(
    folder: str | Path, images: Sequence[str | Path], safe: bool = False
) -> list[dict[str, Any]]:
    """What the student of a run makes of image files.

    Args:
        folder: a finished run.
        images: files.
        safe: see :func:`load_run`.

    Returns:
        One record per image: file, class and its probability, and all probabilities by class.

    Raises:
        FileNotFoundError: if there is no run or no image.
        ValueError: for a file that is no image, or a run with a preprocessing of its own.
    """
    model, summary = load_run(folder, safe)
    if summary["preprocessing"] is None:
        fix = "Load the model with results.load_run, and prepare the images as in training."
        raise ValueError(message("predict", "a known preprocessing", "a custom one", fix))
    prepare = make_transforms(**summary["preprocessing"])
    records = []
    for file in images:
        try:
            with Image.open(file) as image:
                batch = prepare(image.convert("RGB"))[None]
        except FileNotFoundError:
            raise FileNotFoundError(message("predict", "an image", f"none at {file}", "")) from None
        except OSError as error:
            raise ValueError(message(f"predict {file}", "an image", str(error), "")) from error
        with torch.no_grad():
            probabilities = model(batch)[0].softmax(0)
        names = summary["classes"] or [str(place) for place in range(len(probabilities))]
        by_class = dict(zip(names, probabilities.tolist(), strict=False))
        best = max(by_class, key=by_class.__getitem__)
        records.append(
            {"file": str(file), "class": best, "probability": by_class[best], "all": by_class}
        )
    return records


def evaluate(folder: str | Path, resamples: int = 2000, safe: bool = False) -> dict[str, Any]:
    """Everything that can be said of a run from its predictions on the test set and its models.

    Writes ``evaluation.json``, ``confusion.png`` and ``reliability.png`` into the run folder.

    Args:
        folder: a finished run.
        resamples: of the bootstrap interval of the accuracy.
        safe: see :func:`load_run`.

    Returns:
        By "student", and "teacher" where the run has one: the figures of
        :func:`~kd_lrp_plugin.evaluation.classification_metrics` and, under "cost", those of
        :func:`~kd_lrp_plugin.efficiency.cost`, None for images that are not square. Under
        "student_and_teacher" those of :func:`~kd_lrp_plugin.evaluation.compare_predictions`.

    Raises:
        FileNotFoundError: if the folder holds no finished run.
    """
    run = RunFolder(folder)
    summary = run.summary()
    labels, probabilities = read_predictions((run / "predictions.csv").read_text(encoding="utf-8"))
    classes = summary["classes"] or [str(i) for i in range(probabilities["student"].shape[1])]
    found: dict[str, Any] = {}
    entries = _model_entries(run, summary, safe)
    for role, values in probabilities.items():
        figures = classification_metrics(values, labels, classes, resamples)
        channels, height, width = summary["image_shape"]
        figures["cost"] = (
            cost(_untrained(role, entries), height, channels) if height == width else None
        )
        found[role] = figures
    if "teacher" in probabilities:
        found["student_and_teacher"] = compare_predictions(
            probabilities["student"], probabilities["teacher"], labels
        )
    names = [row["class"] for row in found["student"]["per_class"]]
    matrices = {role: found[role]["confusion_matrix"] for role in probabilities}
    curves = {
        role: (values.max(1), values.argmax(1) == labels) for role, values in probabilities.items()
    }
    confusion, reliability = confusion_figure(matrices, names), reliability_figure(curves)
    run.put("confusion.png", lambda file: confusion.savefig(file, format="png"))
    run.put("reliability.png", lambda file: reliability.savefig(file, format="png"))
    run.write("evaluation.json", json.dumps(found, indent=2))  # last: with it, all is there
    return found


# --- predictions.csv ------------------------------------------------------------------------------


def predictions_csv(
    predictions: Sequence[Mapping[str, Any]], classes: Sequence[str], names: Sequence[str] | None
) -> str:
    """A table with a row per image: its name or number, its class, all probabilities.

    Args:
        predictions: of :meth:`kd_lrp_plugin.meter.Meter.predictions`.
        classes: their names; outputs beyond them go by number.
        names: of the images.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    roles = [role for role in ("student", "teacher") if predictions and predictions[0][role]]

    def name(place: int) -> str:
        return classes[place] if place < len(classes) else str(place)

    titles = [f"{role}: {name(i)}" for role in roles for i in range(len(predictions[0][role]))]
    writer.writerow(["image", "label", *titles])
    for place, row in enumerate(predictions):
        values = [f"{p:.9g}" for role in roles for p in row[role]]
        writer.writerow([names[place] if names else place, name(row["label"]), *values])
    return text.getvalue()


def read_predictions(text: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What :func:`predictions_csv` has written.

    Returns:
        Labels (n,), and by role ("student", "teacher") probabilities (n, outputs).
    """
    titles, *rows = csv.reader(io.StringIO(text))
    places: dict[str, list[int]] = {}
    for place, title in enumerate(titles[2:], start=2):
        places.setdefault(title.partition(": ")[0], []).append(place)
    names = [titles[place].partition(": ")[2] for place in places["student"]]
    labels = np.array([names.index(row[1]) for row in rows])
    return labels, {
        role: np.array([[float(row[place]) for place in columns] for row in rows])
        for role, columns in places.items()
    }
