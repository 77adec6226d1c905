"""Handwritten digits from IDX files, as digits or by their parity."""

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch.utils.data import Dataset

from kd_lrp_plugin.data.memory import make_memory
from kd_lrp_plugin.data.samples import PARTS, check_holdout, find_folder
from kd_lrp_plugin.data.transforms import choose_transform
from kd_lrp_plugin.data.validation import check_integer
from kd_lrp_plugin.utils.files import hash_contents, hash_file
from kd_lrp_plugin.utils.validation import check_known, message

_WHERE = "Mnist"
_SPLITS = {"train": "train", "test": "t10k"}
_DIGITS = [str(digit) for digit in range(10)]
_FIX = "Put the published file back."


class Mnist(Dataset):
    """The MNIST digits, from files that lie in a folder; nothing is downloaded.

    Files are found by their beginning and ending, packed by gzip or not:
    ``train*-images*idx3-ubyte``, ``train*-labels*idx1-ubyte``, and ``t10k...`` for the test.
    Items are ``(transformed image, class index)``, in the order of the files.

    Args:
        root: folder of the files; empty for ``$KD_LRP_DATA/<name>``.
        split: train or test.
        part: all; train or validation: the first images, or the last ``holdout`` of them. So
            neighbours, which few writers wrote, are mostly in one of them.
        holdout: share of the split held out, in (0, 1).
        size: take so many of the part's images, the first; None for all.
        seed: draws those of ``size`` instead, by it alone; of one seed, few are among more.
        classes: digits, or parity: classes even and odd, with the digits as known subclasses.
        name: sub-folder of ``$KD_LRP_DATA``.
        image_size: side in pixels.
        transform: applied to the PIL image; without it, :func:`make_transforms`, unaugmented, for
            a mirrored digit is another sign.
        channels: 1, or 3 alike ones; a transform of one's own gets 3.
        cache: memory, to keep images that are resized in it, too, from the first epoch on; see
            :class:`kd_lrp_plugin.data.memory.PixelMemory`.

    Attributes:
        classes, targets, transform: names, class indices, and as given.
        names: of the images, such as "train 17": the split, and the place in its file from 0.
        subclasses, subclass_targets, subclass_of: names of the digits, each image's digit, and the
            class index of each; only by parity.

    Raises:
        FileNotFoundError: if the folder or a file is not there.
        ValueError: for an unknown split, part or kind of classes, several files that could be
            meant, a file that is damaged or of another kind, images and labels that differ in
            number, fewer images than ``size``, or a ``seed`` without it.

    Reference:
        LeCun, Bottou, Bengio and Haffner, Proceedings of the IEEE 1998; the files are LeCun,
        Cortes and Burges', given out under CC BY-SA 3.0.
    """

    def __init__(
        self,
        root: str | None = None,
        split: str = "train",
        part: str = "all",
        holdout: float = 0.15,
        size: int | None = None,
        classes: str = "digits",
        name: str = "mnist",
        image_size: int = 28,
        transform: Callable[[Image.Image], Any] | None = None,
        channels: int = 1,
        seed: int | None = None,
        cache: str | None = None,
    ) -> None:
        check_known(f"{_WHERE} split", split, _SPLITS)
        check_known(f"{_WHERE} part", part, PARTS)
        check_known(f"{_WHERE} classes", classes, ("digits", "parity"))
        check_holdout(_WHERE, holdout)
        check_integer(_WHERE, "image_size", image_size)
        self.transform = choose_transform(
            _WHERE, transform, image_size, False, 3 if transform else channels
        )
        files = find_idx_files(find_folder(root, name, _WHERE), split)
        images, labels = (read_idx(file, axes) for file, axes in zip(files, (3, 1), strict=True))
        if len(images) != len(labels) or not len(images):
            got = f"{len(images)} images and {len(labels)} labels in {files[0].parent}"
            raise ValueError(message(_WHERE, "a label for each image", got, _FIX))
        if labels.max() > 9:
            raise ValueError(message(f"{_WHERE} {files[1]}", "digits", int(labels.max()), _FIX))
        cut = len(images) - round(len(images) * holdout)
        taken = {"all": slice(None), "train": slice(cut), "validation": slice(cut, None)}[part]
        places = np.arange(len(images))[taken]
        if seed is not None:
            check_integer(_WHERE, "seed", seed, least=0)
            if size is None:
                got, fix = f"seed {seed} and no size", "Set size, or leave seed out."
                raise ValueError(message(_WHERE, "a size for what seed draws", got, fix))
            places = np.random.default_rng(seed).permutation(places)
        if size is not None:
            check_integer(_WHERE, "size", size)
            if size > len(places):
                got = f"{len(places)} in {part} of {files[0]}"
                raise ValueError(message(_WHERE, f"{size} images", got, "Lower size."))
            places = np.sort(places[:size])
        self._images, digits = images[places], labels[places].tolist()
        self.names = [f"{split} {place}" for place in places]
        if not digits:
            raise ValueError(message(_WHERE, "images in both parts", "none", "Change holdout."))
        self.classes, self.targets = list(_DIGITS), digits
        if classes == "parity":
            self.classes = ["even", "odd"]
            self.subclasses, self.subclass_targets = list(_DIGITS), digits
            self.subclass_of = [digit % 2 for digit in range(10)]
            self.targets = [digit % 2 for digit in digits]
        self._memory = make_memory(_WHERE, cache, self.names, self.transform)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if self._memory is not None and self.transform is self._memory.transform:
            kept = self._memory.item(self.names[index], lambda: self.image(index))
            return kept, self.targets[index]
        image = self.image(index)  # as it is where a wrapper has taken the transform over
        return image if self.transform is None else self.transform(image), self.targets[index]

    def image(self, index: int) -> Image.Image:
        """The untransformed image, in mode RGB."""
        return Image.fromarray(self._images[index]).convert("RGB")


def find_idx_files(folder: Path, split: str) -> list[Path]:
    """The files of a split, of images and of labels.

    Raises:
        FileNotFoundError: if one is not there.
        ValueError: if several could be meant.
    """
    found = []
    for pattern in ("images*idx3-ubyte", "labels*idx1-ubyte"):
        wanted = f"{_SPLITS[split]}*-{pattern}"
        files = sorted(file for end in ("", ".gz") for file in folder.glob(wanted + end))
        if not files:
            fix = "Set root in YAML, or KD_LRP_DATA in the environment, to where the files lie."
            expected = f"a file {wanted} or {wanted}.gz"
            raise FileNotFoundError(message(_WHERE, expected, f"none in {folder}", fix))
        if len(files) > 1:
            names, fix = [file.name for file in files], "Move the others elsewhere."
            raise ValueError(message(f"{_WHERE} {folder}", f"one {wanted}", names, fix))
        found += files
    return found


def identify_digits(folder: Path, split: str) -> str:
    """What tells the files of a split from others: their bytes.

    Raises:
        FileNotFoundError, ValueError: see :func:`find_idx_files`.
    """
    return hash_contents([hash_file(file) for file in find_idx_files(folder, split)])


def read_idx(file: Path, axes: int) -> UInt8[np.ndarray, "..."]:
    """The bytes that an IDX file holds, packed by gzip or not.

    Args:
        file: a header of a magic number and the lengths, big-endian, and then the values.
        axes: 3 for images, 1 for labels.

    Raises:
        ValueError: for another magic number, or more or fewer values than the header says.
    """
    where, content = f"{_WHERE} {file}", file.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(message(where, "a whole gzip file", error, _FIX)) from None
    magic = bytes([0, 0, 8, axes])  # 8 stands for unsigned bytes
    if content[:4] != magic:
        got = content[:4].hex() or "an empty file"
        raise ValueError(message(where, f"the magic number {magic.hex()}", got, _FIX))
    start = 4 + 4 * axes
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    expected = start + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        got = f"{len(content):,} bytes"
        raise ValueError(message(where, f"{expected:,} bytes for {shape} values", got, _FIX))
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
