"""Data sets and what wraps them by name, and the class weights that make up for imbalance."""

from typing import Any

import numpy as np
from torchdistill.datasets.registry import register_dataset, register_dataset_wrapper

from kd_lrp_plugin.data import csv_images as tables
from kd_lrp_plugin.data import folder, shortcuts
from kd_lrp_plugin.data import mnist as digits
from kd_lrp_plugin.data.companions import Companions
from kd_lrp_plugin.data.phantom import dataset
from kd_lrp_plugin.data.subclasses import Subclasses
from kd_lrp_plugin.data.unlabelled import WithUnlabelled
from kd_lrp_plugin.utils.validation import UNLABELLED, message, strict

phantom = register_dataset(strict("phantom")(dataset.Phantom), key="phantom")
marked = register_dataset(strict("marked")(shortcuts.Marked), key="marked")
folder_images = register_dataset(strict("folder_images")(folder.FolderImages), key="folder_images")
companions = register_dataset_wrapper(strict("companions")(Companions), key="companions")
csv_images = register_dataset(strict("csv_images")(tables.CsvImages), key="csv_images")
mnist = register_dataset(strict("mnist")(digits.Mnist), key="mnist")
subclasses = register_dataset(strict("subclasses")(Subclasses), key="subclasses")
with_unlabelled = register_dataset(strict("with_unlabelled")(WithUnlabelled), key="with_unlabelled")


@strict("class_weights")
def class_weights(dataset: Any) -> list[float]:
    """Weights that make up for the imbalance of a data set: n / (classes * images of the class).

    Args:
        dataset: one with ``targets``, class indices; ``classes``, if it has them, says how many.
            Of :func:`subclasses` it is they that are weighed.

    Returns:
        One weight per class; their mean over the images is 1.

    Raises:
        ValueError: for a data set without targets, or without an image of some class.

    Example:
        A YAML alias hands over the data set itself, without building another:

        .. code-block:: yaml

            datasets:
              &train_set mri/train: &train_images !import_call
                key: kd_lrp_plugin.torchdistill.folder_images
                init: {kwargs: {root: data/mri, split: Training}}
            train:
              criterion:
                key: DisWOTPlusLoss
                kwargs:
                  class_weights: !import_call
                    key: kd_lrp_plugin.torchdistill.class_weights
                    init: {kwargs: {dataset: *train_images}}

    Reference:
        King and Zeng, 2001; scikit-learn's ``compute_class_weight("balanced", ...)``.
    """
    targets = np.asarray(getattr(dataset, "targets", []))
    targets = targets[targets != UNLABELLED]
    if not targets.size:
        fix = "Give the alias of a data set node, such as *train_images."
        got = f"{type(dataset).__name__} without any"
        raise ValueError(message("class_weights", "a data set with targets", got, fix))
    if isinstance(dataset, Subclasses) and not dataset.known:
        got, fix = "subclasses that nobody knows", "Give the images inside of them."
        raise ValueError(message("class_weights", "known labels", got, fix))
    named = "subclasses" if isinstance(dataset, Subclasses) else "classes"
    names = getattr(dataset, named, None) or range(int(targets.max()) + 1)
    counts = np.bincount(targets, minlength=len(names))
    if absent := [name for name, count in zip(names, counts, strict=True) if not count]:
        fix = "Leave the class out of the data sets, or the class weights out."
        got = f"none of {absent}"
        raise ValueError(message("class_weights", "an image or more of each class", got, fix))
    return (len(targets) / (len(names) * counts)).tolist()
