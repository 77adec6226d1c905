"""Subclasses that nobody knows, found among the features of a trained model."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_lrp_plugin.config.build import build_filled_model
from kd_lrp_plugin.data.clusters import (
    WHERE,
    FoundSubclasses,
    Table,
    check_enough,
    find_clusters,
    name_subclasses,
    read_subclass_table,
    write_table,
)
from kd_lrp_plugin.data.validation import check_integer
from kd_lrp_plugin.models.features import read_features
from kd_lrp_plugin.selection.select import is_dry_run
from kd_lrp_plugin.utils.distributed import rank_and_world_size
from kd_lrp_plugin.utils.files import hash_contents, hash_file
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message, strict

_BATCH = 256
_TRIALS = 8  # images that are read twice; an augmentation of chance one half is hardly missed


@strict(WHERE)
def kmeans_subclasses(
    images: Any, model: Mapping[str, Any], per_class: int, seed: int = 0
) -> FoundSubclasses:
    """Subclasses within each class, by k-means of a trained model's features.

    A teacher and its student must have them from one and the same call: by their names alone those
    of another model would pass, so checkpoints keep what they were found by.

    They are found once and written beside the model's checkpoint, as ``subclasses-*.csv``: image,
    class, subclass. Another model, number, seed or set of images has another file; while it is
    there, it is read. Features are the inputs of the model's last linear layer
    (:func:`kd_lrp_plugin.models.features.read_features`).

    Args:
        images: a data set with names, of the package, without augmentation, by alias: what the
            clusters are found in. Images that are trained with must be among them; validation and
            test images need not, whose subclasses stay unknown (``per_class`` of ``subclasses``).
        model: an entry as of ``models``, with its checkpoint: of a model trained on the classes.
        per_class: clusters of each class.
        seed: of k-means.

    Returns:
        By the name of each image its class and its subclass, "cat 1" and so on, which ``table`` of
        ``subclasses`` takes.

    Raises:
        FileNotFoundError: if the checkpoint is not there.
        ValueError: for a model without a checkpoint or a last linear layer, images that are
            augmented or have no names, or clusters that there are not; see
            :func:`kd_lrp_plugin.data.clusters.find_clusters`.

    Example:
        .. code-block:: yaml

            datasets:
              digits/train: &train_digits !import_call
                key: kd_lrp_plugin.torchdistill.mnist
                init: {kwargs: {split: train, part: train}}
              &train_set found/train: &train_images !import_call
                key: kd_lrp_plugin.torchdistill.subclasses
                init:
                  kwargs:
                    images: *train_digits
                    table: !import_call
                      key: kd_lrp_plugin.torchdistill.kmeans_subclasses
                      init:
                        kwargs:
                          images: *train_digits
                          model: {key: mnist_cnn, kwargs: {}, src_ckpt: plain/best.pt}
                          per_class: 4
              &val_set found/val: !import_call
                key: kd_lrp_plugin.torchdistill.subclasses
                init: {kwargs: {images: *val_digits, per_class: 4}}

    Reference:
        Sajedi and Plataniotis, 2021 and Müller, Kornblith and Hinton, 2020, for subclasses of a
        teacher; that k-means finds them is ours.
    """
    check_integer(WHERE, "per_class", per_class)
    check_integer(WHERE, "seed", seed, least=0)
    names = getattr(images, "names", None)
    if names is None:
        got, fix = type(images).__name__, "Alias a data set of kd_lrp_plugin, not a part of it."
        raise ValueError(message(f"{WHERE}: images", "data with names of the images", got, fix))
    if len(set(names)) < len(names):
        got, fix = "images of one name", "Take one variant of marked: its clusters are of names."
        raise ValueError(message(f"{WHERE}: images", "images of different names", got, fix))
    if not isinstance(model, Mapping) or not model.get("src_ckpt"):
        got = f"{model!r}"[:80]
        fix = "Train it first, and name its best.pt in src_ckpt."
        raise ValueError(message(f"{WHERE}: model", "an entry with a src_ckpt", got, fix))
    file = _name_file(images, model, per_class, seed)
    if not file.is_file():
        if is_dry_run():
            check_enough(images.targets, images.classes, per_class)
            numbers = _take_turns(images.targets, per_class)
            return _with_source(_tabulate(images, numbers, per_class), file)
        rank, _ = rank_and_world_size()
        while rank > 0 and not file.is_file():  # torchrun ends this process if the first fails
            time.sleep(0.2)
        if rank == 0:
            with torch.random.fork_rng(devices=[]):  # a run is the same with the file and without
                _check_plain(images)
                built = build_filled_model(model, f"{WHERE}: model")
                features = read_features(built.module, _read_batches(images)).numpy()
            numbers = find_clusters(features, images.targets, images.classes, per_class, seed)
            write_table(file, _tabulate(images, numbers, per_class))
    return _with_source(read_subclass_table(file), file)


def _with_source(table: Table, file: Path) -> FoundSubclasses:
    found = FoundSubclasses(table)
    found.source = file.stem
    return found


def _name_file(images: Any, model: Mapping[str, Any], per_class: int, seed: int) -> Path:
    """Beside the checkpoint; another for whatever the clusters depend on."""
    checkpoint = Path(os.path.expandvars(model["src_ckpt"])).expanduser()
    if not checkpoint.is_file():  # says who makes it
        build_filled_model(model, f"{WHERE}: model")
    about = json.dumps([model.get("key"), model.get("kwargs")], default=repr)
    of_images = [list(images.names), list(images.targets), list(images.classes)]
    first = images[0][0]
    pixels = first.numpy().tobytes() if isinstance(first, Tensor) else b""
    key = hash_contents([hash_file(checkpoint), about, per_class, seed], of_images, pixels)
    return checkpoint.with_name(f"subclasses-{key}.csv")


def _tabulate(images: Any, numbers: list[int], per_class: int) -> Table:
    named = name_subclasses(images.classes, per_class)
    return {
        name: (images.classes[label], named[label * per_class + number])
        for name, label, number in zip(images.names, images.targets, numbers, strict=True)
    }


def _take_turns(targets: list[int], per_class: int) -> list[int]:
    seen: dict[int, int] = {}
    numbers = []
    for label in targets:
        numbers.append(seen.get(label, 0) % per_class)
        seen[label] = seen.get(label, 0) + 1
    return numbers


def _check_plain(images: Any) -> None:
    """Raise ValueError for images that are not the same each time."""
    for index in range(min(_TRIALS, len(images))):
        first, again = images[index][0], images[index][0]
        if not isinstance(first, Tensor):
            got, fix = type(first).__name__, "Give the data set a transform that makes tensors."
            raise ValueError(message(f"{WHERE}: images", "tensors", got, fix))
        if not torch.equal(first, again):
            got = "an image that differs when it is read again"
            fix = "Alias another data set of the same images, without augment."
            raise ValueError(message(f"{WHERE}: images", "no augmentation", got, fix))


def _read_batches(images: Any) -> Iterator[Tensor]:
    starts = range(0, len(images), _BATCH)
    for start in current_progress().track(starts, "features for k-means", len(starts)):
        yield torch.stack(
            [images[index][0] for index in range(start, min(start + _BATCH, len(images)))]
        )
