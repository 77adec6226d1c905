"""Images to train on: a procedural brain-MRI phantom, and folders with one sub-folder per class.

The phantom needs no files and no licence. It is a drawing, not anatomy: good for trying, testing
and demonstrating, no ground for any clinical claim.
"""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image
from torchvision.datasets import ImageFolder

from kd_lrp_plugin.data.splits import held_out, read_groups, read_kept
from kd_lrp_plugin.data.transforms import make_transforms
from kd_lrp_plugin.data.validation import check_integer, unreadable_images
from kd_lrp_plugin.utils.validation import check_known, message

logger = logging.getLogger(__name__)
_PARTS = ("all", "fit", "holdout")


class FolderImages(ImageFolder):
    """Images in ``<root>/<split>/<class>/``, as RGB; classes are the folders' sorted names.

    Where the data lie: ``root``, or with ``root`` empty ``$KD_LRP_DATA/<name>``.

    ``part`` cuts a validation set out of a split: ``fit`` and ``holdout`` are disjoint and make up
    ``all``. Neighbouring slices are mostly of one patient, and their file names neighbours too; so
    per class the files, sorted by name, are cut into runs of at most 32, and of these every
    ``1 / holdout``-th is held out. Where ``<root>/manifest.csv`` has columns ``file`` and ``group``
    (and perhaps ``split`` and ``class``), a group is never divided.

    With ``manifest``, a ``clean_split.csv`` of ``kd-lrp check-data``, the images are those that it
    keeps in the split, wherever under ``root`` they lie; its groups are not divided either.

    Args:
        root: folder of the data set, or None.
        split: sub-folder, for example Training.
        part: all, fit or holdout.
        holdout: share of the split held out, in (0, 1).
        classes: the folders that must be there, in any order.
        name: sub-folder of ``$KD_LRP_DATA``.
        image_size: side in pixels, see :func:`make_transforms`.
        transform: applied to the PIL image; without it, :func:`make_transforms` with ``augment``.
        augment: see :func:`make_transforms`; refused together with ``transform``.
        skip_corrupt: leave out the files that cannot be read, which are named in the log;
            every file is read for it. Otherwise the first one that is met raises an error.
        manifest: CSV with columns file (below ``root``), split, class, group and kept (1 or 0);
            the path may name environment variables. ``split`` is then one of the CSV's.
        per_class: keep so many images of each class, drawn by ``seed`` alone; of one seed, few are
            among more.
        seed: of ``per_class``.

    Raises:
        FileNotFoundError: if the folder, the manifest, or an image that it keeps is not there.
        ValueError: for an unknown part, other classes than asked for, a class too small to cut, or
            a manifest without these columns or this split.
    """

    samples: list[tuple[str, int]]

    def __init__(
        self,
        root: str | None = None,
        split: str = "Training",
        part: str = "all",
        holdout: float = 0.15,
        classes: Sequence[str] | None = None,
        name: str = "",
        image_size: int = 224,
        transform: Callable[[Image.Image], Any] | None = None,
        augment: bool = False,
        skip_corrupt: bool = False,
        manifest: str | None = None,
        per_class: int | None = None,
        seed: int = 0,
    ) -> None:
        check_known("FolderImages part", part, _PARTS)
        self.folder = find_folder(root, name)
        self._split, self._kept = split, read_kept(manifest, self.folder, split)
        where = self.folder if self._kept else self.folder / split
        if not where.is_dir():
            fix = "Set root in YAML, or KD_LRP_DATA in the environment, to where the data lie."
            raise FileNotFoundError(message("FolderImages", "a folder", f"none at {where}", fix))
        found, _ = self.find_classes(where)
        if classes is not None and found != sorted(classes):
            fix = "Rename the folders, or leave classes out."
            raise ValueError(
                message(f"FolderImages {where}", f"classes {sorted(classes)}", found, fix)
            )
        super().__init__(
            str(where), choose_transform("FolderImages", transform, image_size, augment)
        )
        if part != "all":
            held = self._held_out(holdout)
            self.samples = [s for s in self.samples if (s[0] in held) == (part == "holdout")]
        if skip_corrupt and (broken := unreadable_images(self)):
            shown = "; ".join(f"{file} ({why})" for file, why in broken.items())
            logger.warning("%d of %d images left out: %s", len(broken), len(self), shown)
            self.samples = [s for s in self.samples if s[0] not in broken]
        if per_class is not None:
            check_integer("FolderImages", "per_class", per_class)
            order = np.random.default_rng(seed).permutation(len(self.samples))
            labels = range(len(self.classes))
            of_class = [[i for i in order if self.samples[i][1] == label] for label in labels]
            if (least := min(map(len, of_class))) < per_class:
                got, fix = f"a class of {least}", "Lower it."
                raise ValueError(message("FolderImages", f"{per_class} per_class", got, fix))
            chosen = sorted(i for places in of_class for i in places[:per_class])
            self.samples = [self.samples[i] for i in chosen]
        self.imgs = self.samples
        self.targets = [label for _, label in self.samples]

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The manifest's classes, of all its splits; torchvision's way without one."""
        if not self._kept:
            return super().find_classes(directory)
        classes = sorted({row["class"] for row in self._kept})
        return classes, {name: label for label, name in enumerate(classes)}

    def make_dataset(
        self, directory: str | Path, class_to_idx: dict[str, int], **options: Any
    ) -> list[tuple[str, int]]:
        """The manifest's files of the split; torchvision's way without one."""
        if not self._kept:
            return super().make_dataset(directory, class_to_idx, **options)
        rows = [row for row in self._kept if row["split"] == self._split]
        return sorted((str(self.folder / row["file"]), class_to_idx[row["class"]]) for row in rows)

    def mask(self, index: int) -> Bool[np.ndarray, "h w"] | None:
        """Outline from ``<root>/masks/<split>/<class>/<name>.png``; None where there is none."""
        path = Path(self.samples[index][0])
        file = self.folder / "masks" / path.relative_to(self.folder).with_suffix(".png")
        return np.asarray(Image.open(file).convert("L")) > 0 if file.is_file() else None

    def _held_out(self, holdout: float) -> set[str]:
        if not 0 < holdout < 1:
            raise ValueError(message("FolderImages", "holdout in (0, 1)", holdout, "Use 0.15."))
        files = {Path(path).relative_to(self.folder).as_posix(): path for path, _ in self.samples}
        groups = {row["file"]: row["group"] for row in self._kept}
        groups = groups or read_groups(self.folder / "manifest.csv", files)
        paths: dict[str, list[str]] = {name: [] for name in self.classes}
        for path, label in self.samples:
            paths[self.classes[label]].append(path)
        held = held_out(paths, {files[f]: g for f, g in groups.items() if f in files}, holdout)
        for name, members in paths.items():
            if not 0 < (out := len(held.intersection(members))) < len(members):
                fix = f"Give more images than {len(members)} (or more groups), or part: all."
                got = f"{out} of {len(members)} of class {name!r}"
                raise ValueError(message("FolderImages", "some images held out", got, fix))
        return held


def find_folder(root: str | None, name: str) -> Path:
    """Where the images of :class:`FolderImages` lie.

    Raises:
        FileNotFoundError: if neither ``root`` nor KD_LRP_DATA says so.
    """
    if root:
        return Path(root).expanduser()
    if not os.environ.get("KD_LRP_DATA"):
        fix = "Set root in YAML, or KD_LRP_DATA in the environment, to where the data lie."
        got = f"root {root!r} and no KD_LRP_DATA (looking for {name!r})"
        raise FileNotFoundError(message("FolderImages", "a folder of images", got, fix))
    return Path(os.environ["KD_LRP_DATA"]).expanduser() / name


def choose_transform(
    where: str, transform: Callable[[Image.Image], Any] | None, image_size: int, augment: bool
) -> Callable[[Image.Image], Any]:
    if transform is None:
        return make_transforms(image_size, augment)
    if augment:
        fix = "Put the augmentation into the transform, or leave transform out."
        raise ValueError(message(where, "transform or augment", "both", fix))
    return transform
