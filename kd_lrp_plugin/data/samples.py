"""Which images of a data set are taken: of a part, that can be read, few of each class."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_lrp_plugin.data.splits import held_out
from kd_lrp_plugin.data.validation import check_integer, unreadable_images
from kd_lrp_plugin.utils.validation import message

logger = logging.getLogger(__name__)
PARTS = ("all", "train", "validation")
Sample = tuple[str, int]
"""A file and its class index."""


def find_folder(root: str | None, name: str, where: str = "FolderImages") -> Path:
    """Where the images of a data set lie.

    Raises:
        FileNotFoundError: if neither ``root`` nor KD_LRP_DATA says so.
    """
    if root:
        return Path(root).expanduser()
    if not os.environ.get("KD_LRP_DATA"):
        fix = "Set root in YAML, or KD_LRP_DATA in the environment, to where the data lie."
        got = f"root {root!r} and no KD_LRP_DATA (looking for {name!r})"
        raise FileNotFoundError(message(where, "a folder of images", got, fix))
    return Path(os.environ["KD_LRP_DATA"]).expanduser() / name


def check_holdout(where: str, holdout: float) -> None:
    if isinstance(holdout, bool) or not isinstance(holdout, int | float) or not 0 < holdout < 1:
        raise ValueError(message(where, "holdout in (0, 1)", holdout, "Use 0.15."))


def take_part(
    where: str,
    samples: Sequence[Sample],
    classes: Sequence[str],
    groups: Mapping[str, str],
    part: str,
    holdout: float,
) -> list[Sample]:
    """The part ``train`` or ``validation`` of the images, cut by :func:`held_out`.

    Args:
        where: who asks, for messages.
        samples: all of them.
        classes: names of the classes.
        groups: by file, what the cut must not divide.
        part: one of the two.
        holdout: share that is held out.

    Raises:
        ValueError: for a share out of (0, 1), or a class of which none or all would be held out.
    """
    check_holdout(where, holdout)
    files: dict[str, list[str]] = {name: [] for name in classes}
    for file, label in samples:
        files[classes[label]].append(file)
    held = held_out(files, groups, holdout)
    for name, members in files.items():
        if not 0 < (out := len(held.intersection(members))) < len(members):
            fix = f"Give more images than {len(members)} (or more groups), or part: all."
            got = f"{out} of {len(members)} of class {name!r}"
            raise ValueError(message(where, "some images held out", got, fix))
    return [sample for sample in samples if (sample[0] in held) == (part == "validation")]


def take_readable(dataset: Any) -> list[Sample]:
    """The images of a data set that can be read; the others are named in the log."""
    broken = unreadable_images(dataset)
    if broken:
        shown = "; ".join(f"{file} ({why})" for file, why in broken.items())
        logger.warning("%d of %d images left out: %s", len(broken), len(dataset), shown)
    return [sample for sample in dataset.samples if sample[0] not in broken]


def take_per_class(
    where: str, samples: Sequence[Sample], classes: int, per_class: int, seed: int
) -> list[Sample]:
    """So many images of each class, drawn by ``seed`` alone; of one seed, few are among more.

    Raises:
        ValueError: if a class has fewer.
    """
    check_integer(where, "per_class", per_class)
    order = np.random.default_rng(seed).permutation(len(samples))
    of_class = [[i for i in order if samples[i][1] == label] for label in range(classes)]
    if (least := min(map(len, of_class))) < per_class:
        got, fix = f"a class of {least}", "Lower it."
        raise ValueError(message(where, f"{per_class} per_class", got, fix))
    return [samples[i] for i in sorted(i for indices in of_class for i in indices[:per_class])]
