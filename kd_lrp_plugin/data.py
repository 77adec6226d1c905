"""Images to train on: a procedural brain-MRI phantom, and folders with one sub-folder per class.

The phantom needs no files and no licence. It is a drawing, not anatomy: good for trying, testing
and demonstrating, no ground for any clinical claim.
"""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from kd_lrp_plugin.checks import check_known, message
from kd_lrp_plugin.phantom import CLASSES, Scene, draw
from kd_lrp_plugin.progress import Silence
from kd_lrp_plugin.splits import held_out, read_groups, read_kept

logger = logging.getLogger(__name__)

_PARTS = ("all", "fit", "holdout")
_SPLITS = {"train": 0, "val": 1, "test": 2}


def make_transforms(
    image_size: int, augment: bool = False, mean: float = 0.5, std: float = 0.5
) -> Callable[[Image.Image], Any]:
    """PIL image -> normalised tensor of shape (3, ``image_size``, ``image_size``).

    With ``augment``: left-right flips, rotation up to 10 degrees, shift up to 5 %, zoom 0.9 to 1.1.
    ``mean`` and ``std`` apply to all channels; 0.5 and 0.5 map [0, 1] to [-1, 1], which is what the
    MobileNetV2 weights of TensorFlow's origin expect.

    Raises:
        ValueError: if ``image_size`` is not a positive integer or ``std`` not positive.
    """
    _check_integer("make_transforms", "image_size", image_size)
    if std <= 0:
        raise ValueError(message("make_transforms", "std above 0", std, "Use 0.5."))
    bilinear = transforms.InterpolationMode.BILINEAR
    steps: list[Any] = [transforms.Resize((image_size, image_size), antialias=True)]
    if augment:
        steps += [
            transforms.RandomHorizontalFlip(),
            transforms.RandomAffine(
                10, translate=(0.05, 0.05), scale=(0.9, 1.1), interpolation=bilinear
            ),
        ]
    steps += [transforms.ToTensor(), transforms.Normalize([mean] * 3, [std] * 3)]
    return transforms.Compose(steps)


def preprocessing(dataset: Any) -> dict[str, Any] | None:
    """The arguments of :func:`make_transforms` that prepare images as the data set does.

    None if its transform is anything but a bilinear resize to a square and a normalisation that
    is the same for all channels.
    """
    steps = getattr(getattr(dataset, "transform", None), "transforms", [])
    kinds = (transforms.Resize, transforms.ToTensor, transforms.Normalize)
    if len(steps) != 3 or not all(isinstance(s, k) for s, k in zip(steps, kinds, strict=True)):
        return None
    resize, _, normalize = steps
    sides = resize.size if isinstance(resize.size, Sequence) else []
    if len(sides) != 2 or resize.interpolation != transforms.InterpolationMode.BILINEAR:
        return None
    means, stds = set(map(float, normalize.mean)), set(map(float, normalize.std))
    if len(set(sides)) > 1 or len(means) > 1 or len(stds) > 1:
        return None
    return {"image_size": sides[0], "mean": means.pop(), "std": stds.pop()}


def check_same_classes(**datasets: Any) -> None:
    """Raise ``ValueError`` unless all named datasets list the same classes in the same order.

    Example:
        >>> check_same_classes(train=Phantom(split="train"), test=Phantom(split="test"))
    """
    classes = {name: list(dataset.classes) for name, dataset in datasets.items()}
    if len({tuple(names) for names in classes.values()}) > 1:
        fix = "Give every set the same class folders; their sorted order numbers the classes."
        raise ValueError(message("datasets", "sets with the same classes", classes, fix))


class Phantom(Dataset):
    """Procedural brain-MRI slices in four classes told apart by where and how the tumour sits.

    Glioma: irregular, patchy or ring-shaped, with oedema, inside the tissue. Meningioma: smooth,
    even, with its base on the skull's inner border. Pituitary: smooth, small, at the sella in the
    midline of the skull base. Notumor: none. View, pose, contrast, bias field, noise and harmless
    look-alikes (vessels, calcifications, cysts, a bright sinus, a normal gland) are drawn
    independently of the class.

    Image ``index`` depends only on ``(split, seed, index)``: not on ``size``, call order, worker or
    any global state. ``image_size`` changes the sampling and the noise, not what is drawn. Each
    split and seed is an independent random stream, so no two share an image. Each run of four
    indices holds every class once.

    Args:
        split: train, val or test.
        size: number of images.
        image_size: side in pixels.
        seed: of the random stream.
        transform: applied to the PIL image; without it, :func:`make_transforms` with ``augment``.
        augment: see :func:`make_transforms`; refused together with ``transform``.
        cache: keep drawn images (uint8) in memory; for training over several epochs. Each worker
            process of a loader has its own cache.

    Items are ``(transformed image, label)``.

    Raises:
        ValueError: for an unknown split, a size or image size below 1 (image size below 32), a
            negative seed, or ``augment`` given together with ``transform``.

    Example:
        >>> data = Phantom(split="test", size=8, image_size=64)
        >>> image, label = data[0]
        >>> image.shape, data.classes[label] in CLASSES, data.mask(0).shape
        (torch.Size([3, 64, 64]), True, (64, 64))
    """

    classes = CLASSES

    def __init__(
        self,
        split: str = "train",
        size: int = 2000,
        image_size: int = 96,
        seed: int = 0,
        transform: Callable[[Image.Image], Any] | None = None,
        augment: bool = False,
        cache: bool = False,
    ) -> None:
        check_known("Phantom split", split, _SPLITS)
        _check_integer("Phantom", "size", size)
        _check_integer("Phantom", "image_size", image_size, least=32)
        _check_integer("Phantom", "seed", seed, least=0)
        self.split, self.size, self.image_size, self.seed = split, size, image_size, seed
        self.transform = _choose_transform("Phantom", transform, image_size, augment)
        self._cache: dict[int, np.ndarray] | None = {} if cache else None
        self.targets = [self._label(index) for index in range(size)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Any, int]:
        index = self._check_index(index)
        return self.transform(self.image(index)), self.targets[index]

    def image(self, index: int) -> Image.Image:
        """The untransformed image, in mode RGB."""
        index = self._check_index(index)
        grey = self._cache.get(index) if self._cache is not None else None
        if grey is None:
            grey = self.scene(index).image
            if self._cache is not None:
                self._cache[index] = grey
        return Image.fromarray(grey).convert("RGB")

    def mask(self, index: int) -> Bool[np.ndarray, "h w"]:
        """The tumour's pixels in the untransformed image; none in class notumor."""
        return self.scene(index).tumour

    def scene(self, index: int) -> Scene:
        """The untransformed image with masks and landmarks."""
        index = self._check_index(index)
        return draw(CLASSES[self.targets[index]], self.image_size, self._rng(0, index))

    def _label(self, index: int) -> int:
        block, place = divmod(index, len(CLASSES))
        return int(self._rng(1, block).permutation(len(CLASSES))[place])

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([_SPLITS[self.split], self.seed, *key])

    def _check_index(self, index: int) -> int:
        if not -self.size <= index < self.size:
            # IndexError also ends plain iteration over the dataset.
            raise IndexError(message("Phantom", f"an index below {self.size}", index, ""))
        return index % self.size


# --- Folders -------------------------------------------------------------------------------------


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
            str(where), _choose_transform("FolderImages", transform, image_size, augment)
        )
        if part != "all":
            held = self._held_out(holdout)
            self.samples = [s for s in self.samples if (s[0] in held) == (part == "holdout")]
        if skip_corrupt and (broken := unreadable_images(self)):
            shown = "; ".join(f"{file} ({why})" for file, why in broken.items())
            logger.warning("%d of %d images left out: %s", len(broken), len(self), shown)
            self.samples = [s for s in self.samples if s[0] not in broken]
        if per_class is not None:
            _check_integer("FolderImages", "per_class", per_class)
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


def unreadable_images(dataset: Any, show: Silence | None = None) -> dict[str, str]:
    """The files of a data set that cannot be read to the end, and why.

    Args:
        dataset: with ``samples`` (file, label), as torchvision's folders have; of others nothing
            is known, and nothing returned.
        show: told how far the reading is.

    Example:
        >>> unreadable_images(Phantom(size=4))
        {}
    """
    files = [str(file) for file, _ in getattr(dataset, "samples", [])]
    stamps = [os.stat(f).st_mtime_ns if os.path.exists(f) else 0 for f in files]
    with ThreadPoolExecutor() as pool:
        reasons = pool.map(_why_unreadable, files, stamps)
        tracked = (show or Silence()).track(reasons, "reading images", len(files))
        return {file: why for file, why in zip(files, tracked, strict=True) if why}


@cache
def _why_unreadable(file: str, stamp: int) -> str | None:
    """Asked again for an unchanged file, the answer is remembered."""
    try:
        with Image.open(file) as image:
            image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds
        return f"{type(error).__name__}: {error}".replace(f"'{file}'", "it")
    return None


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


def _choose_transform(
    where: str, transform: Callable[[Image.Image], Any] | None, image_size: int, augment: bool
) -> Callable[[Image.Image], Any]:
    if transform is None:
        return make_transforms(image_size, augment)
    if augment:
        fix = "Put the augmentation into the transform, or leave transform out."
        raise ValueError(message(where, "transform or augment", "both", fix))
    return transform


def _check_integer(where: str, name: str, value: object, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(message(where, f"an integer {name} of {least} or more", repr(value), ""))
