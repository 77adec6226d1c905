"""What a project is made with: chosen from the images, each choice with its reason."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from kd_lrp_plugin.data.folder import FolderImages
from kd_lrp_plugin.metrics.efficiency import count_parameters
from kd_lrp_plugin.models.factory import LOCAL, build_model
from kd_lrp_plugin.project.listing import WHERE, Listing, name_splits
from kd_lrp_plugin.relevance.target_layers import choose_layers
from kd_lrp_plugin.utils.validation import check_known, message

METHODS = ("lrp_relative_l2", "lrp_cosine", "kd")
SIZES = (64, 96, 128, 160, 224)
TEACHER, STUDENT, PRETRAINED_STUDENT = "mobilenetv2_100", "mobilenetv2_035", "mobilenetv2_050"
CANDIDATES = ("test_resnet", "test_efficientnet", "mobilenetv2_035", "mobilenetv2_050", "resnet10t")
IMBALANCE = 1.5  # of the largest class over the smallest, above which classes are weighed
FEW = 1000  # images that need no process to read them ahead
STEPS, EPOCHS = 1000, (20, 100)  # MobileNetV2 from random weights learns nothing from few steps
LAYERS = 2
SHOWN = 12  # classes that are named


@dataclass(frozen=True)
class Models:
    """What the models are, as asked.

    Attributes:
        teacher, student: names of timm, or ``local-dir:FOLDER``; None for ours.
        method: what the student learns from: one of :data:`METHODS`.
        shortcut: keep the relevance term to the end, against a shortcut in the images.
        pretrained: begin with timm's weights.
        weights: by teacher and student, a local file to begin with.
    """

    teacher: str | None = None
    student: str | None = None
    method: str = METHODS[0]
    shortcut: bool = False
    pretrained: bool = False
    weights: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_known(f"{WHERE}: method", self.method, METHODS)
        for role in self.weights:
            check_known(f"{WHERE}: weights", role, ("teacher", "student"))
        if self.shortcut and self.method != METHODS[0]:
            fix = f"Leave it out, or choose {METHODS[0]}."
            got = f"--shortcut with {self.method}"
            raise ValueError(message(f"{WHERE}: method", METHODS[0], got, fix))
        if self.pretrained and self.weights:
            got = f"--pretrained and --weights of {sorted(self.weights)}"
            raise ValueError(message(WHERE, "one kind of weights", got, "Leave one of them out."))

    @property
    def names(self) -> dict[str, str]:
        """Of teacher and student."""
        student = self.student or (PRETRAINED_STUDENT if self.pretrained else STUDENT)
        return {"teacher": self.teacher or TEACHER, "student": student}


@dataclass(frozen=True)
class Choices:
    """All that the files of a project say.

    Attributes:
        classes: sorted names.
        splits: name by train, val (None: cut out of train) and test.
        counts: kept images by split and class.
        holdout: share of the training images for validation, where they are cut out.
        image_size: side in pixels.
        batch_size: of the training.
        epochs: of the training.
        workers: that read images ahead.
        is_weighed: whether the classes are, against their imbalance.
        images: by train, val and test, how many.
        bits: of 16-bit images, or None.
        names: of teacher and student.
        layers: of teacher and student, whose maps are compared.
        budget: parameters that a student may have.
        reasons: a sentence for each choice.
    """

    classes: list[str]
    splits: dict[str, str | None]
    counts: dict[str, dict[str, int]]
    holdout: float
    image_size: int
    batch_size: int
    epochs: int
    workers: int
    is_weighed: bool
    images: dict[str, int]
    bits: int | None
    names: dict[str, str]
    layers: dict[str, list[str]]
    budget: int
    reasons: list[str]


def choose(
    listing: Listing, summary: Mapping[str, Any], manifest: Path, models: Models, bits: int | None
) -> Choices:
    """Choose sizes, batch, epochs, weights and layers.

    Args:
        listing: of the images.
        summary: of their leak check.
        manifest: the clean split.
        models: as asked.
        bits: of 16-bit images, or None.

    Raises:
        ValueError: if what the leak check leaves is too little, or a model has no maps to compare.
        FileNotFoundError: if a model's folder or weights are not there.
    """
    counts, where = summary["clean"], f"{WHERE}: {listing.folder}"
    classes = sorted({image.label for image in listing.images})
    splits = name_splits(listing.folder, {image.split for image in listing.images})
    if splits["train"] == "":
        splits = {"train": "Training", "val": None, "test": "Testing"}
    for name in filter(None, splits.values()):
        if missing := [label for label in classes if not counts.get(name, {}).get(label)]:
            got = f"none of {missing} in {name}, of which duplicates are left out"
            fix = "Add images; kd-lrp check-data shows which are alike."
            if broken := summary["unreadable"]:
                file, why = next(iter(broken.items()))
                got += f"; {len(broken):,} cannot be read, such as {file}: {why}"
                fix = "Mend or add images; for 16-bit values give --bits."
            raise ValueError(message(where, "images of each class in each split", got, fix))
    train = counts[splits["train"]]
    smallest, largest = min(train.values()), max(train.values())
    holdout = 0.15 if smallest >= 20 else 0.25 if smallest > 3 else 0.34
    images = _count_images(listing.folder, manifest, splits, holdout)
    n = images["train"]
    batch_size = next((b for b in (32, 16, 8) if 8 * b <= n), min(4, n))
    epochs = min(EPOCHS[1], max(EPOCHS[0], math.ceil(STEPS / (n // batch_size))))
    median = summary["median_shorter_side"]
    image_size = max([s for s in SIZES if s <= median] or SIZES[:1])
    built = {
        role: build_model(name, len(classes), image_size=image_size)
        for role, name in models.names.items()
    }
    made = {
        "classes": classes,
        "splits": splits,
        "counts": counts,
        "holdout": holdout,
        "image_size": image_size,
        "batch_size": batch_size,
        "epochs": epochs,
        "workers": 0 if n < FEW else 2,
        "is_weighed": largest > IMBALANCE * smallest,
        "images": images,
        "bits": bits,
        "names": models.names,
        "layers": {} if models.method == "kd" else _choose_layers(built),
        "budget": max(map(count_parameters, built.values())),
    }
    reasons = [_explain_classes(listing, classes), *_explain_images(summary, made)]
    reasons += _explain_training(made, models)
    if listing.patients:
        known, column = len(listing.patients), listing.columns["patient"]
        reasons.insert(3, f"Images of one {column} stay together: known of {known:,} images.")
    return Choices(**made, reasons=reasons)


def _choose_layers(models: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    return {role: choose_layers(model)[-LAYERS:] for role, model in models.items()}


def _count_images(
    folder: Path, manifest: Path, splits: Mapping[str, str | None], holdout: float
) -> dict[str, int]:
    """How many are trained, validated and tested with, cut as the configs will cut them."""
    parts = {"train": "train", "val": "validation", "test": "all"}
    found = {}
    for kind, part in parts.items():
        name, part = splits[kind] or splits["train"], "all" if splits["val"] else part
        found[kind] = len(
            FolderImages(str(folder), str(name), part, holdout, manifest=str(manifest))
        )
    return found


def _explain_classes(listing: Listing, classes: Sequence[str]) -> str:
    shown = [*classes[:SHOWN], *(["..."] if len(classes) > SHOWN else [])]
    found = f"There are {len(classes)} classes: {', '.join(shown)}."
    if inner := listing.inner_folders:
        found += f" Folders in theirs, such as {inner[0]}, are not told apart; if those are the "
        found += "classes, give --classes NAME for each of them."
    return found


def _explain_images(summary: Mapping[str, Any], made: Mapping[str, Any]) -> list[str]:
    median, side = summary["median_shorter_side"], made["image_size"]
    size = f"Images are resized to {side} px: their median shorter side is {median:g} px, and "
    size += f"{side} is the " + ("largest of" if side <= median else "smallest of")
    size += f" {', '.join(map(str, SIZES))} px" + (" not above it." if side <= median else ".")
    found = [size]
    if {*summary["modes"]} <= {"1", "L", "LA", "I", "I;16", "I;16B"}:
        found.append(
            "They are grey, and are fed as three equal channels, as models of timm and their "
            "weights want it."
        )
    splits, images = made["splits"], made["images"]
    if splits["val"] is None:
        found.append(
            f"Validation images are cut out of {splits['train']}: {made['holdout']:.0%} of it, "
            "in runs of neighbouring files, never through a group."
        )
    if splits["test"] == "Testing" and "no split" in summary["splits"]:
        found.append("Test images are proposed by the leak check: a fifth, never through a group.")
    if splits["test"] and splits["test"].lower().startswith(("val", "dev")):
        found.append(f"There is no test set: {splits['test']} is taken for it.")
    left = summary["left_out"]
    leaks = sum(leak["duplicate"] for leak in summary["leaks"].values())
    if leaks:
        found.append(
            f"LEAK: {leaks:,} images of test or validation have a duplicate below them; the clean "
            "split is used, in which none has."
        )
    if left:
        words = ", ".join(f"{n:,} ({why})" for why, n in sorted(left.items()))
        found.append(f"Left out by the clean split: {words}.")
    found.append(
        f"So {images['train']:,} images train, {images['val']:,} choose the epoch, and "
        f"{images['test']:,} test."
    )
    return found


def _explain_training(made: Mapping[str, Any], models: Models) -> list[str]:
    train = made["counts"][made["splits"]["train"]]
    smallest, largest = min(train, key=train.get), max(train, key=train.get)
    ratio = f"{largest} has {train[largest] / train[smallest]:.1f} times the images of {smallest}"
    weighed = f"Classes are weighed: {ratio}."
    if not made["is_weighed"]:
        weighed = f"Classes are not weighed: none has over {IMBALANCE} times the images of another."
    begin = "random weights"
    if models.pretrained:
        begin = "timm's weights"
    elif models.weights:
        files = [f"{file} ({role})" for role, file in models.weights.items()]
        begin = f"the weights of {' and '.join(files)}, all else at random"
    methods = {
        "lrp_relative_l2": "soft labels and signed relative L2 of the relevance of a class against "
        "the others, "
        + (
            "kept to the end, against a shortcut"
            if models.shortcut
            else "which fades by 70 % of the epochs (--shortcut keeps it)"
        ),
        "lrp_cosine": "soft labels and cosine of relevance maps and relations",
        "kd": "soft labels alone",
    }
    names = made["names"]
    found = [
        f"A batch has {made['batch_size']} images: 32, or fewer where an epoch would have less "
        "than eight batches.",
        f"There are {made['epochs']} epochs: about {STEPS:,} steps, but {EPOCHS[0]} to "
        f"{EPOCHS[1]} epochs.",
        weighed,
        f"The teacher is {names['teacher']}, the student {names['student']}; they begin with "
        f"{begin}.",
        f"The student learns from {methods[models.method]}.",
    ]
    if models.method != "kd":
        at = " and ".join(f"{', '.join(made['layers'][r])} of the {r}" for r in names)
        found.append(f"Maps are compared at the last {LAYERS} reductions but one: {at}.")
    return found


def from_project(path: str, out: Path) -> str:
    """A path as seen from the project, in which its commands run; ``$NAME/...`` stays."""
    if path.startswith("$"):
        return path
    return Path(os.path.relpath(Path(path).expanduser().resolve(), out.resolve())).as_posix()


def name_from_project(name: str, out: Path) -> str:
    """The name of a model; the folder in it as seen from the project."""
    if not name.startswith(LOCAL):
        return name
    return LOCAL + from_project(name.removeprefix(LOCAL), out)
