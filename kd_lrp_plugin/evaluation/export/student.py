"""A student as its run has tested it: what each of its exports is compared with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import nn

from kd_lrp_plugin.data.transforms import build_transform, describe_transform
from kd_lrp_plugin.evaluation.explain_inputs import load_tested_images
from kd_lrp_plugin.evaluation.predictors import FoldedModel, measure_calibration, no_gradients
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.runs.loading import (
    load_as_trained,
    load_policy,
    load_preparation,
    load_run,
)
from kd_lrp_plugin.runs.predictions import Predictions, name_outputs, read_predictions
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message

PARITY = 1e-3  # largest difference of a logit, in float32
BATCH = 32
Score = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class Student:
    """The student of a finished run, with all that its exports are compared with.

    Attributes:
        run: its folder.
        summary: of the run.
        model: as it is evaluated: its outputs are the logits of the classes.
        bare: as it was trained: without subclasses the same model, else with their logits.
        test_set: of the run.
        predictions: what the run's test has found.
        policy: how images are prepared.
        logits: of the test images.
    """

    run: RunFolder
    summary: dict[str, Any]
    model: nn.Module
    bare: nn.Module
    test_set: Any
    predictions: Predictions
    policy: dict[str, Any]
    logits: Float[np.ndarray, "n outputs"]

    @property
    def exported(self) -> nn.Module:
        """What becomes a graph: no hooks, no heads, classes as outputs."""
        subclass_of = self.summary.get("subclass_of")
        return FoldedModel(self.bare, subclass_of) if subclass_of else self.bare

    @property
    def image(self) -> torch.Tensor:
        """A batch of one test image."""
        return self.test_set[0][0][None]

    def describe(self, logits: Float[np.ndarray, "n outputs"]) -> dict[str, Any]:
        """What a file says of itself, with the calibration of its own logits."""
        classes = self.summary["classes"]
        output = "logits of the classes"
        if self.summary.get("subclass_of"):
            output += ", folded from those of their subclasses by log-sum-exp"
        return {
            "preprocessing": self.policy,
            "classes": name_outputs(classes, logits.shape[1]) if classes else [],
            "output": output,
            "calibration": measure_calibration(softmax(logits), self.predictions.labels, classes),
        }

    def compare(self, name: str, file: Path, logits: Float[np.ndarray, "n o"]) -> dict[str, Any]:
        """A row of the table of models: what one is worth, beside the student itself."""
        predicted = logits.argmax(1)
        return {
            "model": name,
            "file": file.name,
            "accuracy": float((predicted == self.predictions.labels).mean()),
            "agreement": float((predicted == self.logits.argmax(1)).mean()),
            "largest_difference": float(np.abs(logits - self.logits).max()),
            "megabytes": file.stat().st_size / 1e6,
        }


def open_student(run: RunFolder, safe: bool = False) -> Student:
    """The student of a finished run, checked against the run's predictions.

    Args:
        run: its folder.
        safe: see :func:`kd_lrp_plugin.runs.loading.load_run`.

    Raises:
        FileNotFoundError: if there is no finished run, or its test images are gone.
        ValueError: for weights or images that are not those of the predictions, or preprocessing
            that cannot be written down.
    """
    model, summary = load_run(run.path, safe)
    bare = load_as_trained(run.path, ("student",), safe)["student"]
    policy = load_policy(run.path, safe)
    _check_policy(run, policy, safe)
    predictions = read_predictions(run)
    test_set = load_tested_images(run, predictions, safe)
    _check_tested_alike(run, policy, test_set)
    logits = score_all(no_gradients(model), test_set)
    then = predictions.probabilities["student"]
    off = float(np.abs(softmax(logits) - then).max()) if logits.shape == then.shape else np.inf
    if not off <= 0.05:  # low precision, or another device, changes less
        fix = "Put the weights and images back that the run was tested with."
        got = f"probabilities that differ by up to {off:.2f}"
        raise ValueError(message(str(run.path), "the predictions in predictions.csv", got, fix))
    return Student(run, summary, model, bare, test_set, predictions, policy, logits)


def _check_policy(run: RunFolder, policy: Mapping[str, Any], safe: bool) -> None:
    """Raise ``ValueError`` unless the policy prepares an image of noise as the run does."""
    bits, prepare = load_preparation(run.path, safe)
    fixed = policy["crop"] is not None or isinstance(policy["resize"], list)
    height, width = (61, 83) if fixed else policy["size"]
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(noise)
    if bits != policy["bits"] or not torch.equal(prepare(image), build_transform(policy)(image)):
        fix = "Use torchvision's Resize, CenterCrop, ToTensor and Normalize."
        where = f"preprocessing of {run.path}"
        raise ValueError(message(where, "one that can be written down", "another", fix))


def _check_tested_alike(run: RunFolder, policy: Mapping[str, Any], test_set: Any) -> None:
    """Raise ``ValueError`` where test images are prepared by another policy: what is measured on
    them would not hold for the images that the policy prepares.
    """
    transform = getattr(test_set, "transform", None)
    if transform is None:  # a data set that prepares its images itself
        return
    where = f"preprocessing of {run.path}: test"
    shape = (policy["channels"], *policy["size"])
    found = describe_transform(where, transform, shape, policy["bits"])
    if differs := [key for key in found if found[key] != policy[key]]:
        of_validation, of_test = ({key: each[key] for key in differs} for each in (policy, found))
        fix = "Give both data sets one transform, and train the student again in another --out."
        raise ValueError(message(where, f"that of validation, {of_validation}", of_test, fix))


def score_all(score: Score, dataset: Any) -> Float[np.ndarray, "n outputs"]:
    """What a model makes of all images of a data set.

    Raises:
        ValueError: for outputs that are no finite logits, one row per image.
    """
    starts = range(0, len(dataset), BATCH)
    parts = []
    for start in current_progress().track(starts, "testing", len(starts)):
        chosen = range(start, min(start + BATCH, len(dataset)))
        images = torch.stack([dataset[index][0] for index in chosen])
        part = np.asarray(score(images), dtype=np.float64)
        if part.shape[:1] != (len(images),) or part.ndim != 2 or not np.isfinite(part).all():
            got, fix = f"shape {part.shape}, or nan or inf", "Train the student again."
            raise ValueError(message("export", "finite logits (n, outputs)", got, fix))
        parts.append(part)
    return np.concatenate(parts)


def softmax(logits: Float[np.ndarray, "n outputs"]) -> Float[np.ndarray, "n outputs"]:
    return torch.from_numpy(logits).softmax(1).numpy()


def check_parity(student: Student, name: str, logits: Float[np.ndarray, "n outputs"]) -> None:
    """Raise ``ValueError`` for logits of the test images that are not those of the student."""
    off = float(np.abs(logits - student.logits).max())
    if not off <= PARITY:
        got = f"{off:.2g} for one of {len(logits)} test images"
        fix = "Nothing is written. Report it with the config: the format computes something else."
        expected = f"logits within {PARITY:g} of the student's"
        raise ValueError(message(f"export: {name}", expected, got, fix))
