"""Finished runs opened to be explained, and images of their test sets to explain them with."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor, nn

from kd_lrp_plugin.attribution.methods import ATTRIBUTIONS
from kd_lrp_plugin.evaluation.explain_trials import SLOW, Trial, find_layers, try_methods
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.runs.loading import (
    load_as_trained,
    load_models,
    load_test_set,
)
from kd_lrp_plugin.runs.predictions import Predictions, name_outputs, read_predictions
from kd_lrp_plugin.utils.files import check_keys, hash_contents, name_folders, read_json
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import check_known, message

TRIED = 32  # images, of all classes, on which a model must predict what it did

REPAIR_STUDY = "Delete it, and rerun kd-lrp study: it is made again from the runs, which stay."


@dataclass
class LoadedRun:
    """A finished run with its models and test set.

    Attributes:
        folder: of the run.
        name: what tells it from the other runs of the command.
        summary: of the run.
        models: by role, in evaluation mode.
        hashes: by role, of the weights and the size of the images.
        test_set: as the run was tested on it.
        test_hash: of the names and labels of its images.
        seen: a hash of some of these images as the models take them.
        labels: of the test set.
        probabilities: by role, as they are in predictions.csv.
        layers: by role, the target layers; those at one index belong together. The input for a
            model that has none.
        trials: by role, of the methods.
        of_subclasses: whether labels, outputs and names of classes are those of subclasses.
    """

    folder: RunFolder
    name: str
    summary: dict[str, Any]
    models: dict[str, nn.Module]
    hashes: dict[str, str]
    test_set: Any
    test_hash: str
    labels: Int[np.ndarray, " n"]
    probabilities: dict[str, Float[np.ndarray, "n outputs"]]
    layers: dict[str, list[str]]
    trials: dict[str, Trial] = field(default_factory=dict)
    seen: str = ""
    of_subclasses: bool = False

    @property
    def methods(self) -> dict[str, list[str]]:
        """By role, those that can handle the model."""
        return {role: trial.methods for role, trial in self.trials.items()}

    @property
    def device(self) -> torch.device:
        return next(next(iter(self.models.values())).parameters()).device

    def class_name(self, number: int) -> str:
        return name_outputs(self.summary["classes"], number + 1)[number]


@dataclass(frozen=True)
class Sample:
    """Images of the test set; the first of them, however many, have all classes alike."""

    images: Float[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    masks: Bool[Tensor, "n h w"] | None

    def first(self, n: int) -> "Sample":
        masks = None if self.masks is None else self.masks[:n]
        return Sample(self.images[:n], self.labels[:n], masks)


@dataclass(frozen=True)
class ExplainOptions:
    """What is to be explained, and how.

    Attributes:
        methods: names of :data:`~kd_lrp_plugin.attribution.methods.ATTRIBUTIONS`, or of what a
            module in a run's ``dependencies`` adds to it; without any, all that can handle a model.
        layers: names of modules; without any, the deepest before the last reduction, where maps
            still have locations to compare. Pictures show the first. A model without such a layer
            is explained by the methods that need none.
        roles: "student", "teacher" or both; a run without a teacher has none to explain.
        images: files to picture instead of test images; then no metric is computed.
        n: test images to picture: classes in turn, right and wrong predictions in turn.
        samples: images for all metrics, instead of the usual counts; half or a quarter of them
            for the randomisation.
        out: folder for all runs side by side.
        device: to compute on.
        safe: see :func:`kd_lrp_plugin.runs.loading.load_run`.
        subclasses: explain subclasses, of models that have an output for each, and not classes.
        quick: leave out methods that take long, unless they are named or the only ones.
        seeds: of the runs of a study, which are then named without; without any, all.

    Raises:
        ValueError: for an unknown role, or no images.
    """

    methods: Sequence[str] = ()
    layers: Sequence[str] = ()
    roles: Sequence[str] = ("student", "teacher")
    images: Sequence[str | Path] = ()
    n: int = 8
    samples: int | None = None
    out: str | Path | None = None
    device: torch.device | str = "cpu"
    safe: bool = False
    subclasses: bool = False
    quick: bool = False
    seeds: Sequence[int] = ()

    def __post_init__(self) -> None:
        for role in self.roles:
            check_known("model", role, ("student", "teacher"))
        if not self.roles or self.n < 1 or (self.samples is not None and self.samples < 1):
            got = f"{len(self.roles)} models, n {self.n} and samples {self.samples}"
            raise ValueError(message("explain", "one model and image at least", got, ""))


def open_run(
    folder: str | Path,
    name: str,
    options: ExplainOptions,
    trials: dict[tuple[str, ...], Trial] | None = None,
) -> LoadedRun:
    """A finished run with its models, checked against its predictions.

    Args:
        folder: of the run.
        name: to call it by.
        options: methods that are named must work; without any, all are tried, and those that do
            not work are noted.
        trials: of models that were opened before, which are not tried again; those of this run
            are added.

    Raises:
        FileNotFoundError: if there is no finished run, or no file of a teacher's weights.
        ValueError: for a run without the models or subclasses asked for, models, images or labels
            that are not those of its predictions, or a layer or method that does not fit a model.
    """
    run = RunFolder(folder)
    summary = run.summary()
    predictions = read_predictions(run)
    if options.subclasses:
        predictions = _take_subclasses(run, predictions)
        summary = {**summary, "classes": predictions.outputs}
    labels = predictions.labels
    fold = not options.subclasses
    load = load_models if fold else load_as_trained
    models = load(folder, options.roles, options.safe)  # imports dependencies as well
    for method in options.methods:
        check_known("method", method, ATTRIBUTIONS)
    if not models:
        fix = "Leave --model out."
        raise ValueError(message(str(folder), "a run with a teacher", "one without", fix))
    test_set = load_tested_images(run, predictions, options.safe, fold)
    opened = LoadedRun(
        folder=run,
        name=name,
        summary=summary,
        models=models,
        hashes={},
        test_set=test_set,
        test_hash=hash_contents(predictions.images, labels.tolist()),
        labels=labels,
        probabilities=predictions.probabilities,
        layers={},
        of_subclasses=options.subclasses,
    )
    indices = list(islice(interleave_classes(labels), TRIED))
    tried = make_sample(opened, indices, options.device)
    opened.seen = hash_contents(tried.images.cpu().numpy().tobytes())
    for role, model in models.items():
        model.to(options.device).requires_grad_(False)
        _check_predictions(opened, role, indices, tried.images)
        weights = [tensor.cpu().numpy().tobytes() for tensor in model.state_dict().values()]
        opened.hashes[role] = hash_contents(summary["image_shape"], *weights)
        opened.layers[role] = find_layers(model, options.layers)
        key = (opened.hashes[role], *opened.layers[role])
        known = {} if trials is None else trials
        if key not in known:
            few = (tried.images, tried.labels, options.methods, options.quick)
            known[key] = try_methods(model, opened.layers[role], *few)
            _note_refusals(f"{role} of {run.path}", known[key])
        opened.trials[role] = known[key]
    return opened


def _note_refusals(model: str, trial: Trial) -> None:
    for method, why in trial.without.items():
        if why != SLOW:
            current_progress().note(f"{model}, without {method}: {why}")


def _take_subclasses(run: RunFolder, predictions: Predictions) -> Predictions:
    """The subclasses of predictions in place of their classes."""
    labels = np.array(predictions.subclass_labels, int)
    if not len(labels) or (labels < 0).any():
        got = f"{(labels < 0).sum()} that nobody knows" if len(labels) else "none"
        fix = "Explain its classes: leave --subclasses out."
        expected = "test images of known subclasses"
        raise ValueError(message(f"explain {run.path}", expected, got, fix))
    return replace(
        predictions,
        labels=labels,
        probabilities=predictions.subclass_probabilities,
        outputs=predictions.subclasses,
    )


def load_tested_images(
    run: RunFolder, predictions: Predictions, safe: bool = False, fold: bool = True
) -> Any:
    """The test set of a run, which must be the one that it was tested on.

    Args:
        run: finished.
        predictions: in its predictions.csv, with labels of what is asked for.
        safe: see :func:`kd_lrp_plugin.runs.loading.load_run`.
        fold: whether the labels are classes where the outputs are subclasses.

    Raises:
        FileNotFoundError: if the images are gone.
        ValueError: if there are others, or of other names or classes.
    """
    labels = predictions.labels
    test_set = load_test_set(run.path, safe)
    named = "class_targets" if run.summary().get("subclass_of") and fold else "targets"
    if len(test_set) != len(labels) or list(getattr(test_set, named, labels)) != [*labels]:
        got = f"{len(test_set)} images, or other classes"
        fix = "Put the data back, or test the student again."
        raise ValueError(message(str(run.path), f"the {len(labels)} test images", got, fix))
    if renamed := _find_renamed(test_set, predictions.images):
        then, now = renamed
        fix = "Put the images back, or test the student again."
        raise ValueError(message(str(run.path), f"the test image {then}", f"{now} there", fix))
    return test_set


def _find_renamed(test_set: Any, images: Sequence[str]) -> tuple[str, str] | None:
    """The first image that is called otherwise than in the test, then and now; None without one."""
    samples = getattr(test_set, "samples", None)
    named = [str(file) for file, _ in samples] if samples else getattr(test_set, "names", None)
    if not named or images == [str(index) for index in range(len(images))]:  # nobody knows
        return None
    pairs = zip(images, named, strict=True)
    return next(((a, b) for a, b in pairs if a != b and not b.endswith(f"{os.sep}{a}")), None)


def _check_predictions(run: LoadedRun, role: str, indices: Sequence[int], images: Tensor) -> None:
    if role not in run.probabilities:  # features were compared: there is no record of logits
        return
    with torch.no_grad():
        now = run.models[role](images).float().softmax(1).cpu().numpy()
    off = float(np.abs(now - run.probabilities[role][indices]).max())
    # Low precision in training, or another device, changes less; nan is never as it was.
    if not off <= 0.05:
        fix = "Put the weights and images back that the run was tested with."
        got = f"probabilities that differ by up to {off:.2f}"
        where = f"{role} of {run.folder.path}"
        raise ValueError(message(where, "the predictions in predictions.csv", got, fix))


def make_sample(
    run: LoadedRun, indices: Sequence[int], device: torch.device | str = "cpu"
) -> Sample:
    """Images of the test set; with masks, if each of them has one."""
    masks = [mask for index in indices if (mask := _find_mask(run, index)) is not None]
    return Sample(
        torch.stack([run.test_set[index][0] for index in indices]).to(device),
        torch.tensor([int(run.labels[index]) for index in indices]).to(device),
        torch.stack(masks) if len(masks) == len(indices) else None,
    )


def _find_mask(run: LoadedRun, index: int) -> Bool[Tensor, "h w"] | None:
    """Where the test set knows it and the way from its image to the model's is a plain resize."""
    find = getattr(run.test_set, "mask", None)
    mask = find(index) if find and run.summary["preprocessing"] else None
    if mask is None or not mask.any():
        return None
    _, height, width = run.summary["image_shape"]
    picture = Image.fromarray(mask.astype(np.float32))
    shares = picture.resize((width, height), Image.Resampling.BOX)
    return torch.from_numpy(np.array(shares) >= 0.5)


def interleave_classes(labels: Int[np.ndarray, " n"]) -> Iterator[int]:
    """All indices, the classes in turn, each in a random order."""
    shuffle = np.random.default_rng(0).permutation
    rest = [list(shuffle(np.flatnonzero(labels == k))) for k in np.unique(labels)]
    while any(rest):
        yield from (int(of_class.pop()) for of_class in rest if of_class)


def sample_indices(run: LoadedRun, most: int) -> list[int]:
    """Indices of images with a mask; of any images where the test set has no masks."""
    masked: list[int] = []
    for index in interleave_classes(run.labels):
        if len(masked) == most:
            break
        if _find_mask(run, index) is not None:
            masked.append(index)
    return masked or list(interleave_classes(run.labels))[:most]


def read_study(file: Path) -> dict[str, Any]:
    """The content of a ``study.json``, intact.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged.
    """
    content = read_json(file, REPAIR_STUDY, runs=list)
    for row in content["runs"]:
        kinds = {"configuration": str, "point": dict, "seed": int, "state": str, "folder": str}
        check_keys(file, row, REPAIR_STUDY, **kinds)
    return content


def list_runs(folders: Sequence[Path], seeds: Sequence[int] = ()) -> list[tuple[Path, str]]:
    """Runs and what to call them; for the folder of a study's results, its finished runs.

    Args:
        folders: of runs and studies.
        seeds: of a study's runs; without any, all.

    Raises:
        ValueError: if a run is there twice, a study has no finished run of these seeds, or there
            are seeds and no study.
    """
    found: list[tuple[Path, str]] = []
    plain = [folder for folder in folders if not (folder / "study.json").is_file()]
    if seeds and len(plain) == len(folders):
        fix = "Name the folder of its results, or leave --seed out."
        raise ValueError(message("explain: seeds", "a study", [str(f) for f in folders], fix))
    names = dict(zip(plain, name_folders(plain), strict=True)) if plain else {}
    for folder in folders:
        if folder in names:
            found.append((folder, names[folder]))
            continue
        content = read_study(folder / "study.json")
        done = [row for row in content["runs"] if row["state"] == "finished"]
        if not done:
            fix = "The same kd-lrp study command resumes."
            raise ValueError(message(str(folder), "a study with a finished run", "none", fix))
        known = sorted({row["seed"] for row in done})
        if unknown := sorted({*seeds}.difference(known)):
            fix = f"It has finished runs of {known}."
            raise ValueError(message(str(folder), "seeds of its runs", unknown, fix))
        done = [row for row in done if not seeds or row["seed"] in seeds]
        for row in done:
            parts = [row["configuration"], *(f"{k} {v}" for k, v in row["point"].items())]
            parts += [f"seed {row['seed']}"] if len(seeds) != 1 else []
            found.append((Path(row["folder"]), ", ".join(parts)))
    _check_different([path for path, _ in found])
    return found


def _check_different(folders: Sequence[Path]) -> None:
    if len({folder.resolve() for folder in folders}) < len(folders):
        got = [str(folder) for folder in folders]
        raise ValueError(message("explain", "each run once", got, "Leave one out."))
