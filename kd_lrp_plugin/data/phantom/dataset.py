"""The built-in brain-MRI phantom as a data set: it needs no files and no licence."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from torch.utils.data import Dataset

from kd_lrp_plugin.data.phantom.drawing import CLASSES, Scene, draw
from kd_lrp_plugin.data.transforms import choose_transform
from kd_lrp_plugin.data.validation import check_flags, check_integer
from kd_lrp_plugin.utils.validation import check_known, message

_SPLITS = {"train": 0, "val": 1, "test": 2}


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
        cache: keep drawn images and masks (a byte for a pixel of each) in memory; for training over
            several epochs. Each worker process of a loader has its own cache.
        channels: 3, or 1 for a model of grey images.

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
        channels: int = 3,
    ) -> None:
        check_known("Phantom split", split, _SPLITS)
        check_integer("Phantom", "size", size)
        check_integer("Phantom", "image_size", image_size, least=32)
        check_integer("Phantom", "seed", seed, least=0)
        check_flags("Phantom", augment=augment, cache=cache)
        self.split, self.size, self.image_size, self.seed = split, size, image_size, seed
        self.transform = choose_transform("Phantom", transform, image_size, augment, channels)
        self._cache: dict[int, tuple[np.ndarray, np.ndarray]] | None = {} if cache else None
        self.targets = [self._label(index) for index in range(size)]

    @property
    def names(self) -> list[str]:
        """What tells each image from others: split, seed and index."""
        return [f"{self.split} {self.seed} {index}" for index in range(self.size)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Any, int]:
        index = self._check_index(index)
        image = self.image(index)  # as it is where a wrapper has taken the transform over
        return image if self.transform is None else self.transform(image), self.targets[index]

    def image(self, index: int) -> Image.Image:
        """The untransformed image, in mode RGB."""
        return Image.fromarray(self._draw(index)[0]).convert("RGB")

    def mask(self, index: int) -> Bool[np.ndarray, "h w"]:
        """The tumour's pixels in the untransformed image; none in class notumor."""
        return self._draw(index)[1]

    def _draw(self, index: int) -> tuple[UInt8[np.ndarray, "h w"], Bool[np.ndarray, "h w"]]:
        index = self._check_index(index)
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        scene = self.scene(index)
        if self._cache is not None:
            self._cache[index] = scene.image, scene.tumour
        return scene.image, scene.tumour

    def scene(self, index: int) -> Scene:
        """The untransformed image with masks and landmarks."""
        index = self._check_index(index)
        return draw(CLASSES[self.targets[index]], self.image_size, self._rng(0, index))

    def _label(self, index: int) -> int:
        block, position = divmod(index, len(CLASSES))
        return int(self._rng(1, block).permutation(len(CLASSES))[position])

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([_SPLITS[self.split], self.seed, *key])

    def _check_index(self, index: int) -> int:
        if not -self.size <= index < self.size:
            # IndexError also ends plain iteration over the dataset.
            raise IndexError(message("Phantom", f"an index below {self.size}", index, ""))
        return index % self.size
