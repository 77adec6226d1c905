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
from kd_lrp_plugin.data.layout import ClassFolders, Layout, is_image, read_layout, walk
from kd_lrp_plugin.data.memory import make_memory
from kd_lrp_plugin.data.samples import (
    PARTS,
    find_folder,
    take_part,
    take_per_class,
    take_readable,
)
from kd_lrp_plugin.data.splits import (
    check_spelling,
    find_column,
    read_groups,
    read_kept,
    read_table,
)
from kd_lrp_plugin.data.transforms import choose_transform
from kd_lrp_plugin.data.validation import check_flags, check_integer
from kd_lrp_plugin.utils.files import hash_contents, hash_file
from kd_lrp_plugin.utils.validation import check_known, message

logger = logging.getLogger(__name__)
_SHOWN = 5  # files or folders named in a message


class FolderImages(ImageFolder):
    """Images in ``<root>/<split>/<class>/``, RGB or grey; classes are the folders' sorted names.

    With ``images`` and ``masks`` they lie in ``<class>/<images>/`` and their masks, under the same
    names, in ``<class>/<masks>/``, as in COVID-QU-Ex. With ``classes`` the class folders may lie at
    any depth below the split, as in LC25000.

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
            masks, or like splits, or hold images in several sub-folders, are classes only if they
            are named here.
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
        channels: 3, or 1 for a model of grey images.
        groups: a column of ``manifest``, or without it of ``<root>/manifest.csv``, that tells the
            natural groups of the images, such as their hospital or scanner, by which ``evaluate``
            reports the accuracy. A cut may divide these: what it must not, such as a patient, is
            in column ``group``, whatever this says.
        images: sub-folder of each class folder with its images; what lies beside it is left out.
        masks: folder with the masks in the place of ``images`` in the path of an image, or without
            that beside the image; endings may be .png instead. How many images have none, the log
            tells. None for ``<root>/masks/<split>/<class>/<name>.png``.
        cache: memory, to keep the resized images in it from the first epoch on; see
            :class:`kd_lrp_plugin.data.memory.PixelMemory`.

    Attributes:
        bits: as given.
        folder: root of the data set.
        groups: the group of each image; only where the argument is given.

    Raises:
        FileNotFoundError: if the folder, the manifest, or an image that it keeps is not there.
        ValueError: for an unknown part, folders that are no class folders, other classes than
            asked for, a class too small to cut, a manifest without these columns or this split,
            an image without one of the natural ``groups`` or outside of ``images``, images of a
            class in several sub-folders, or ``masks`` that no image has.
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
        channels: int = 3,
        groups: str | None = None,
        images: str | None = None,
        masks: str | None = None,
        cache: str | None = None,
    ) -> None:
        check_known("FolderImages part", part, PARTS)
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
        self._folders = ClassFolders(tuple(classes or ()), images or "", masks or "")
        self._kept = read_kept(manifest, self.folder, split)
        where = self.folder if self._kept else self.folder / split
        if not where.is_dir():
            fix = "Set root in YAML, or KD_LRP_DATA in the environment, to where the data lie."
            raise FileNotFoundError(message("FolderImages", "a folder", f"none at {where}", fix))
        self._layout = None if self._kept else self._read_layout(where)
        found, _ = self.find_classes(where)
        if classes is not None and found != sorted(classes):
            fix = "Rename the folders, or leave classes out."
            raise ValueError(
                message(f"FolderImages {where}", f"classes {sorted(classes)}", found, fix)
            )
        super().__init__(
            str(where),
            choose_transform("FolderImages", transform, image_size, augment, channels),
            loader=ImageLoader(bits),
        )
        if part != "all":
            together = self._read_undivided()
            self.samples = take_part(
                "FolderImages", self.samples, self.classes, together, part, holdout
            )
        if skip_corrupt:
            self.samples = take_readable(self)
        if per_class is not None:
            self.samples = take_per_class(
                "FolderImages", self.samples, len(self.classes), per_class, seed
            )
        self.imgs = self.samples
        self.targets = [label for _, label in self.samples]
        if groups is not None:
            self.groups = self._read_groups(manifest, groups)
        if masks:
            self._tell_unmasked()
        files = [file for file, _ in self.samples]
        self._memory = make_memory("FolderImages", cache, files, self.transform)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        memory = self._memory
        if memory is None or self.transform is not memory.transform:  # a wrapper has taken it over
            return super().__getitem__(index)
        file, target = self.samples[index]
        return memory.item(file, lambda: self.loader(file)), target

    def _read_layout(self, where: Path) -> Layout:
        layout = read_layout(where, self._folders)
        for problem in layout.problems:
            raise ValueError(problem)
        if layout.empty or not layout.classes:
            got = f"none in {layout.empty}" if layout.empty else "no folder with images"
            fix = "Delete the folder, or put images into it (.png, .jpg, .tif, ...)."
            expected = "one or more in each class folder"
            raise ValueError(message(f"images {where}", expected, got, fix))
        masks = self._folders.masks  # what is asked for is not left out
        ignored = {f: why for f, why in layout.ignored.items() if Path(f).name != masks}
        if ignored:
            named = [f"{file} ({why})" for file, why in ignored.items()]
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
            images = self._layout.images.items()
            return [(os.path.join(directory, *path), class_to_idx[name]) for path, name in images]
        rows = [row for row in self._kept if row["split"] == self._split]
        inner = self._folders.images
        if outside := [r["file"] for r in rows if inner not in ("", *Path(r["file"]).parts[:-1])]:
            got = f"{len(outside)} that do not, such as {outside[0]!r}"
            expected, fix = (
                f"files that lie in a folder {inner!r}",
                "Correct images, or leave it out.",
            )
            raise ValueError(message("FolderImages manifest", expected, got, fix))
        return sorted((str(self.folder / row["file"]), class_to_idx[row["class"]]) for row in rows)

    @property
    def names(self) -> list[str]:
        """Paths of the images below ``folder``."""
        return [Path(file).relative_to(self.folder).as_posix() for file, _ in self.samples]

    def mask(self, index: int) -> Bool[np.ndarray, "h w"] | None:
        """The mask of an image, wherever masks lie; None where there is none.

        Raises:
            ValueError: if it cannot be read, see :func:`kd_lrp_plugin.data.images.read_mask`.
        """
        path = Path(self.samples[index][0])
        below = path.relative_to(self.folder)
        if self._folders.masks:
            found = self._folders.find_mask(self.folder, below)
            return read_mask(found, path) if found else None
        file = self.folder / "masks" / below.with_suffix(".png")
        return read_mask(file, path) if file.is_file() else None

    def _tell_unmasked(self) -> None:
        files = [os.path.relpath(path, self.folder) for path, _ in self.samples]
        if count := self._folders.count_unmasked("FolderImages", self.folder, files):
            some = f"{count:,} of {len(files):,} images of {self.root}"
            logger.warning("%s have no mask in %r", some, self._folders.masks)

    def _read_undivided(self) -> dict[str, str]:
        """By file, the group that a cut must not divide, of column ``group``."""
        files = {Path(path).relative_to(self.folder).as_posix(): path for path, _ in self.samples}
        groups = {row["file"]: row["group"] for row in self._kept if row["group"]}
        if not self._kept:
            table = self.folder / "manifest.csv"
            groups = read_groups(table, files)
            if table.is_file() and len(groups) < len(files) and "group" in read_table(table)[0]:
                missing = len(files) - len(groups)
                logger.warning("%s: no group of %d of %d images", table, missing, len(files))
        return {files[file]: group for file, group in groups.items() if file in files}

    def _read_groups(self, manifest: str | None, column: str) -> list[str]:
        """The natural group of each image."""
        table = Path(os.path.expandvars(manifest or self.folder / "manifest.csv")).expanduser()
        if not table.is_file():
            got, fix = f"none at {table}", f"Write one, with columns file and {column}."
            raise FileNotFoundError(message("FolderImages groups", "a table", got, fix))
        column = find_column("FolderImages groups", table, column, read_table(table)[0])
        files = [Path(path).relative_to(self.folder).as_posix() for path, _ in self.samples]
        found = read_groups(table, files, column)
        if lacking := [file for file in files if file not in found]:
            got = f"none of {len(lacking)} of {len(files)}, such as {lacking[0]!r}"
            expected, fix = f"a {column} of every image", "Fill them in, or leave groups out."
            raise ValueError(message(f"FolderImages groups: {table}", expected, got, fix))
        check_spelling(f"FolderImages groups: {table}", "groups", set(found.values()))
        return [found[file] for file in files]


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
