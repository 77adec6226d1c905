"""What an audit opens: a run or a model, on its own images or on others."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kd_lrp_plugin.data.folder import FolderImages
from kd_lrp_plugin.evaluation.explain_inputs import ExplainOptions, LoadedRun, open_run
from kd_lrp_plugin.evaluation.explain_trials import find_layers
from kd_lrp_plugin.evaluation.export import timm_folder
from kd_lrp_plugin.evaluation.predictors import open_predictor
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.runs.loading import load_preparation
from kd_lrp_plugin.utils.preserved import preserved
from kd_lrp_plugin.utils.validation import message


def open_audited(
    folder: Path, options: ExplainOptions, data: str | Path | None = None
) -> LoadedRun:
    """A finished run, or a model in a folder of timm's, such as ``kd-lrp export`` writes.

    Args:
        folder: of it; what is found will be written there, too.
        options: layers, device and trust.
        data: a folder with a folder of images per class, in place of the run's test set; a model
            has no other images.

    Raises:
        FileNotFoundError: if there is no run or model, or no folder of images.
        ValueError: as of :func:`kd_lrp_plugin.evaluation.explain_inputs.open_run`; for a model
            without ``data`` or names of classes, or images of other classes.
    """
    if (folder / timm_folder.CONFIG).is_file():
        return _open_exported(folder, options, data)
    run = open_run(folder, "", options)
    if data is not None:
        bits, transform = load_preparation(run.folder.path, options.safe)
        run = _show_other_images(run, Path(data), transform, bits)
    return run


def _open_exported(folder: Path, options: ExplainOptions, data: str | Path | None) -> LoadedRun:
    if data is None:
        got, fix = "a model, which has no images of its own", "Give --data FOLDER."
        raise ValueError(message(f"audit {folder}", "images", got, fix))
    opened = open_predictor(folder, options.safe)
    assert opened.module is not None  # of a folder of timm's
    model = opened.module.eval().requires_grad_(False).to(options.device)
    run = LoadedRun(
        folder=RunFolder(folder),
        name="",
        summary={"classes": opened.classes, "preprocessing": {"bits": opened.bits}},
        models={"student": model},
        hashes={},
        test_set=None,
        test_hash="",
        labels=np.array([], int),
        probabilities={},
        layers={},
    )
    run = _show_other_images(run, Path(data), opened.prepare, opened.bits)
    run.summary["image_shape"] = list(run.test_set[0][0].shape)
    with preserved(model):
        run.layers["student"] = find_layers(model, options.layers)
    return run


def _show_other_images(
    run: LoadedRun, folder: Path, transform: Callable[[Any], Tensor], bits: int | None
) -> LoadedRun:
    """A run whose test set is a folder of images, prepared as the run prepares its own."""
    classes = run.summary["classes"]
    if not classes:
        fix = "Audit it on its own test set."
        raise ValueError(message("audit --data", "a run with names of classes", "none", fix))
    images = FolderImages(
        str(folder.resolve().parent),
        folder.resolve().name,
        classes=classes,
        transform=transform,
        bits=bits,
    )
    # The model's outputs are in the run's order of classes, which need not be the folder's.
    labels = np.array([classes.index(images.classes[label]) for label in images.targets])
    return replace(run, test_set=images, labels=labels, probabilities={})
