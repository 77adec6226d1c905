"""A model that predicts, whatever it lies in: a run, an exported folder, an ONNX file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from kd_lrp_plugin.data.transforms import build_transform
from kd_lrp_plugin.evaluation.export import onnx_graph, timm_folder
from kd_lrp_plugin.losses import fold_logits
from kd_lrp_plugin.metrics.classification import BINS, classification_metrics
from kd_lrp_plugin.runs.loading import load_as_trained, load_preparation, load_run
from kd_lrp_plugin.runs.predictions import name_outputs, read_predictions
from kd_lrp_plugin.runs.record import RunRecord
from kd_lrp_plugin.utils.validation import message

ONNX, PT2 = "student.onnx", "student.pt2"


@dataclass(frozen=True)
class Predictor:
    """A model that classifies images.

    Attributes:
        name: what it was opened from.
        classes: names of its classes, empty if they have none.
        bits: of the images, see :func:`kd_lrp_plugin.data.images.read_image`.
        prepare: from an image in RGB to what the model takes.
        whole: whether nothing of an image is cut away.
        score: from prepared images to the logits of the classes, or of the subclasses.
        calibration: of :func:`measure_calibration`; None where it is not known.
        module: the PyTorch module behind it, if there is one; its outputs are the classes.
        subclasses, subclass_of: names of what is scored and the class index of each, where that
            are subclasses; an export has classes alone.
    """

    name: str
    classes: list[str]
    bits: int | None
    prepare: Callable[[Image.Image], Tensor]
    whole: bool
    score: Callable[[Float[Tensor, "n c h w"]], Float[Tensor, "n outputs"]]
    calibration: dict[str, Any] | None
    module: nn.Module | None = None
    subclasses: Sequence[str] = ()
    subclass_of: Sequence[int] = ()


def open_predictor(source: str | Path, safe: bool = False) -> Predictor:
    """A model that predicts.

    Args:
        source: a finished run; a folder that ``kd-lrp export`` has written, of which
            ``student.onnx`` or the timm model is taken; or an ONNX file of such a folder.
        safe: see :func:`kd_lrp_plugin.runs.loading.load_run`.

    Raises:
        FileNotFoundError: if there is nothing of the kind.
        ModuleNotFoundError: for ONNX without the extra ``export``.
        ValueError: if what is there is damaged, or cannot be used.
    """
    path = Path(source)
    if path.is_file():
        return _open_onnx(path)
    if (path / ONNX).is_file():
        return _open_onnx(path / ONNX)
    if (path / timm_folder.CONFIG).is_file():
        return _open_timm(path)
    if (path / PT2).is_file():
        fix = "Give the run, or export it with --format onnx or timm; torch.export.load opens it."
        got = f"{path / PT2}, which can run code when it is opened"
        raise ValueError(message("predict", "a run, an ONNX file or a timm folder", got, fix))
    return _open_run(path, safe)


def _open_run(folder: Path, safe: bool) -> Predictor:
    model, summary = load_run(folder, safe)
    bits, prepare = load_preparation(folder, safe)
    whole = summary["preprocessing"] is not None
    calibration = _read_calibration(folder, summary["classes"])
    subclasses, subclass_of = summary.get("subclasses", ()), summary.get("subclass_of", ())
    scored = load_as_trained(folder, ("student",), safe)["student"] if subclasses else model
    return Predictor(
        str(folder),
        summary["classes"],
        bits,
        prepare,
        whole,
        no_gradients(scored),
        calibration,
        model,
        subclasses,
        subclass_of,
    )


def _read_calibration(folder: Path, classes: list[str]) -> dict[str, Any] | None:
    try:
        found = read_predictions(RunRecord(folder))
        return measure_calibration(found.probabilities["student"], found.labels, classes)
    except (ValueError, FileNotFoundError):  # the model predicts all the same
        return None


def _open_onnx(file: Path) -> Predictor:
    about = onnx_graph.read_metadata(file)
    score = onnx_graph.make_scorer(onnx_graph.open_session(file))
    return _describe(
        file, about, lambda images: torch.from_numpy(score(images.contiguous().numpy()))
    )


def _open_timm(folder: Path) -> Predictor:
    model, about = timm_folder.load_folder(folder)
    module = FoldedModel(model, about["subclass_of"]) if about.get("subclass_of") else model
    return _describe(folder, about, no_gradients(module), module)


def _describe(
    source: Path, about: Mapping[str, Any], score: Callable, module: nn.Module | None = None
) -> Predictor:
    policy = about["preprocessing"]
    try:
        prepare, bits = build_transform(policy), policy["bits"]
        whole = policy["crop"] is None and isinstance(policy["resize"], list)
    except (KeyError, TypeError, ValueError) as error:
        got, fix = f"another ({type(error).__name__}: {error})", "Export it again."
        raise ValueError(message(str(source), "preprocessing of ours", got, fix)) from error
    classes, calibration = about["classes"], about["calibration"]
    return Predictor(str(source), classes, bits, prepare, whole, score, calibration, module)


class FoldedModel(nn.Module):
    """A model of subclasses that returns the logits of their classes.

    Args:
        model: its outputs are the logits of the subclasses.
        subclass_of: the class index of each.
    """

    def __init__(self, model: nn.Module, subclass_of: list[int]) -> None:
        super().__init__()
        self.model, self.subclass_of = model, list(subclass_of)
        self.eval()

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        return fold_logits(self.model(images), self.subclass_of)


def no_gradients(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """From a model, a function from images to logits, as float32 without gradients."""

    def score(images: Tensor) -> Tensor:
        with torch.no_grad():
            return model(images).float()

    return score


def measure_calibration(probabilities: Any, labels: Any, classes: list[str]) -> dict[str, Any]:
    """What a model's probabilities are worth on its test set; they are calibrated by nothing.

    Args:
        probabilities: softmax outputs (n, outputs).
        labels: class indices.
        classes: their names.

    Returns:
        A record that JSON can hold: ``method`` ("softmax, temperature 1"), ``images``,
        ``accuracy``, ``mean_confidence``, ``calibration_error`` (expected, of ``bins`` even bins)
        and ``log_loss``.
    """
    outputs = name_outputs(classes, probabilities.shape[1])
    found = classification_metrics(probabilities, labels, outputs, resamples=1)
    return {
        "method": "softmax, temperature 1",
        "images": found["n"],
        "accuracy": found["accuracy"],
        "mean_confidence": float(probabilities.max(1).mean()),
        "calibration_error": found["calibration_error"],
        "bins": BINS,
        "log_loss": found["log_loss"],
    }


def describe_calibration(calibration: Mapping[str, Any] | None) -> str:
    """:func:`measure_calibration` in a sentence or two.

    Example:
        >>> describe_calibration(None)
        'Probabilities: softmax, temperature 1, not calibrated; their error is not known.'
    """
    start = "Probabilities: softmax, temperature 1, not calibrated"
    if calibration is None:
        return f"{start}; their error is not known."
    return (
        f"{start}. On the {calibration['images']:,} test images their mean confidence is "
        f"{calibration['mean_confidence']:.3f} and the accuracy {calibration['accuracy']:.3f}; "
        f"calibration error {calibration['calibration_error']:.3f}."
    )
