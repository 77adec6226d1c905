"""Images to train on, in folders with one sub-folder per class."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image
from torchvision.datasets import ImageFolder

from kd_lrp_plugin.data.images import ImageLoader, ascii_name, is_text, read_mask
from kd_lrp_plugin.data.layout import Layout, is_image, read_layout, walk
from kd_lrp_plugin.data.splits import held_out, read_groups, read_kept, read_table
from kd_lrp_plugin.data.transforms import make_transforms
from kd_lrp_plugin.data.validation import check_flags, check_integer, unreadable_images
from kd_lrp_plugin.utils.files import hash_contents, hash_file
from kd_lrp_plugin.utils.validation import check_known, message

logger = logging.getLogger(__name__)
_PARTS = ("all", "train", "validation")
_SHOWN = 5  # files or folders named in a message


class FolderImages(ImageFolder):
    """Images in ``<root>/<split>/<class>/``, as RGB; classes are the folders' sorted names.

    Where the data lie: ``root``, or with ``root`` empty ``$KD_LRP_DATA/<name>``. What counts as an
    image of a class, :mod:`kd_lrp_plugin.data.layout` says; what is left out is named in the log.
    How images are read, :mod:`kd_lrp_plugin.data.images` says.

    ``part`` cuts a validation set out of a split: ``train`` and ``validation`` are disjoint and
    make up ``all``. Neighbouring slices are mostly of one patient, and their file names neighbours
    too; so per class the files, sorted by name, are cut into runs of at most 32, and of these every
    ``1 / holdout``-th is held out. Where ``<root>/manifest.csv`` has columns ``file`` and ``group``
    (and perhaps ``split`` and ``class``), a group is never divided; an image that it does not name
    is a group of its own, which the log tells.

    With ``manifest``, a ``clean_split.csv`` of ``kd-lrp check-data``, the images are those that it
    keeps in the split, wherever under ``root`` they lie; its groups are not divided either.

    Args:
        root: folder of the data set, or None.
        split: sub-folder, for example Training.
        part: all, train or validation.
        holdout: share of the split held out, in (0, 1).
        classes: the folders that must be there, in any order; those that look like folders of
            masks, or like splits, are classes only if they are named here.
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
        bits: how many the values of 16-bit and integer images have, such as 12; None for all of
            the mode.

    Attributes:
        bits: as given.
        folder: root of the data set.

    Raises:
        FileNotFoundError: if the folder, the manifest, or an image that it keeps is not there.
        ValueError: for an unknown part, folders that are no class folders, other classes than
            asked for, a class too small to cut, or a manifest without these columns or this split.
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
        bits: int | None = None,
    ) -> None:
        check_known("FolderImages part", part, _PARTS)
        check_integer("FolderImages", "image_size", image_size)
        check_integer("FolderImages", "seed", seed, least=0)
        check_flags("FolderImages", augment=augment, skip_corrupt=skip_corrupt)
        if bits is not None:
            check_integer("FolderImages", "bits", bits, least=9)
        self.bits = bits
        self.folder = find_folder(root, name)
        if not is_text(self.folder):
            got = ascii_name(self.folder)
            raise ValueError(message("FolderImages root", "a name in UTF-8", got, "Rename it."))
        self._split = split
        self._kept = read_kept(manifest, self.folder, split)
        where = self.folder if self._kept else self.folder / split
        if not where.is_dir():
            fix = "Set root in YAML, or KD_LRP_DATA in the environment, to where the data lie."
            raise FileNotFoundError(message("FolderImages", "a folder", f"none at {where}", fix))
        self._layout = None if self._kept else self._read_layout(where, classes or ())
        found, _ = self.find_classes(where)
        if classes is not None and found != sorted(classes):
            fix = "Rename the folders, or leave classes out."
            raise ValueError(
                message(f"FolderImages {where}", f"classes {sorted(classes)}", found, fix)
            )
        super().__init__(
            str(where),
            choose_transform("FolderImages", transform, image_size, augment),
            loader=ImageLoader(bits),
        )
        if part != "all":
            held = self._held_out(holdout)
            self.samples = [s for s in self.samples if (s[0] in held) == (part == "validation")]
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
            chosen = sorted(i for indices in of_class for i in indices[:per_class])
            self.samples = [self.samples[i] for i in chosen]
        self.imgs = self.samples
        self.targets = [label for _, label in self.samples]

    def _read_layout(self, where: Path, classes: Sequence[str]) -> Layout:
        layout = read_layout(where, classes)
        for problem in layout.problems:
            raise ValueError(problem)
        if layout.empty or not layout.classes:
            got = f"none in {layout.empty}" if layout.empty else "no folder with images"
            fix = "Delete the folder, or put images into it (.png, .jpg, .tif, ...)."
            expected = "one or more in each class folder"
            raise ValueError(message(f"images {where}", expected, got, fix))
        if layout.ignored:
            named = [f"{file} ({why})" for file, why in layout.ignored.items()]
            shown = "; ".join(named[:_SHOWN]) + " ..." * (len(named) > _SHOWN)
            logger.warning("%d files or folders of %s left out: %s", len(named), where, shown)
        return layout

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The manifest's classes, of all its splits; the class folders without one."""
        names = self._layout.classes if self._layout else {row["class"] for row in self._kept}
        return sorted(names), {name: label for label, name in enumerate(sorted(names))}

    def make_dataset(
        self, directory: str | Path, class_to_idx: dict[str, int], **options: Any
    ) -> list[tuple[str, int]]:
        """The manifest's files of the split; those of the class folders without one."""
        if self._layout:
            images = self._layout.images
            return [(os.path.join(directory, *p), class_to_idx[p[0]]) for p in images]
        rows = [row for row in self._kept if row["split"] == self._split]
        return sorted((str(self.folder / row["file"]), class_to_idx[row["class"]]) for row in rows)

    def mask(self, index: int) -> Bool[np.ndarray, "h w"] | None:
        """Outline from ``<root>/masks/<split>/<class>/<name>.png``; None where there is none.

        Raises:
            ValueError: if it cannot be read, see :func:`kd_lrp_plugin.data.images.read_mask`.
        """
        path = Path(self.samples[index][0])
        file = self.folder / "masks" / path.relative_to(self.folder).with_suffix(".png")
        return read_mask(file, path) if file.is_file() else None

    def _held_out(self, holdout: float) -> set[str]:
        if not 0 < holdout < 1:
            raise ValueError(message("FolderImages", "holdout in (0, 1)", holdout, "Use 0.15."))
        files = {Path(path).relative_to(self.folder).as_posix(): path for path, _ in self.samples}
        groups = {row["file"]: row["group"] for row in self._kept if row["group"]}
        if not self._kept:
            table = self.folder / "manifest.csv"
            groups = read_groups(table, files)
            if table.is_file() and len(groups) < len(files) and "group" in read_table(table)[0]:
                missing = len(files) - len(groups)
                logger.warning("%s: no group of %d of %d images", table, missing, len(files))
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


def identify_images(folder: Path, split: str, manifest: str | None = None) -> str | None:
    """What tells the images of a split, by name and size, and their table from others.

    Args:
        folder: root of the data set; names count from here.
        split: sub-folder; with a manifest, all of ``folder`` counts.
        manifest: as for :class:`FolderImages`; by default the table of groups, if there is one.

    Returns:
        A digest, the same wherever the folder lies; None where there is none.
    """
    where = folder if manifest else folder / split
    if not where.is_dir():
        return None
    below = where.relative_to(folder).parts
    sizes = sorted(
        ("/".join((*below, *parts)), os.path.getsize(where.joinpath(*parts)))
        for parts in walk(where).files
        if is_image(parts[-1]) and where.joinpath(*parts).exists()
    )
    table = Path(os.path.expandvars(manifest or folder / "manifest.csv")).expanduser()
    return hash_contents([sizes, hash_file(table) if table.is_file() else None])


def choose_transform(
    where: str, transform: Callable[[Image.Image], Any] | None, image_size: int, augment: bool
) -> Callable[[Image.Image], Any]:
    if transform is None:
        return make_transforms(image_size, augment)
    if augment:
        fix = "Put the augmentation into the transform, or leave transform out."
        raise ValueError(message(where, "transform or augment", "both", fix))
    return transform
