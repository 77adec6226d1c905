"""What a training image brings along: its view without a marker, its mask, its group."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from kd_lrp_plugin.data.following import find_kind, list_steps
from kd_lrp_plugin.data.shortcuts import Marked, get_range
from kd_lrp_plugin.data.subclasses import Subclasses
from kd_lrp_plugin.data.validation import check_flags
from kd_lrp_plugin.utils.preserved import Generators, preserved_generators
from kd_lrp_plugin.utils.validation import message

_TRIALS = 10  # by which transforms are judged; a step that half of them take is hardly missed


class Companions(Dataset):
    """Items of a data set with what belongs to them: (image, label, companions).

    =============  ==============================================================================
    keyword        what is added
    =============  ==============================================================================
    ``clean``      "clean": the image without its marker, the same random augmentation
    ``mask``       "mask": the object's pixels, booleans (h, w) of the item's size, moved by the
                   same random augmentation, whatever that does to colours (an erased pixel stays
                   the object's); a pixel is the object's where more than half of it is.
                   "mask_known": False where no mask is known, and "mask" all False; an image that
                   is known to show nothing has an empty mask that is known.
    ``group``      "group": index among the sorted names of the data set's groups; "group_name"
    =============  ==============================================================================

    The image is what it would be alone, bit for bit, and so is the state in which the random
    number generators are left: those of PyTorch, NumPy and Python, from whose state the image's
    companions are drawn again. That is the same augmentation if a transform draws from these three
    alone, the same numbers whatever the pixels, and if nothing is drawn before the transform.
    Where it can be told that this does not hold, an error is raised: from here, if the same state
    gives two images, or a transform makes a blank page black or white that was not; from an item,
    if the companion leaves the generators in another state than the image.

    Args:
        images: a data set of ours, or a ``Subset`` of one, with items (image (c, h, w), label).
        clean, mask, group: what to add, one at least. ``clean`` and ``group`` are those of
            :class:`~kd_lrp_plugin.data.shortcuts.Marked`, ``mask`` that of its images or of data
            with ``mask(index)`` of the untransformed image and a ``transform`` of PIL images.

    Attributes:
        groups: names of all groups, sorted; empty unless asked for.

    Raises:
        ValueError: if nothing is asked for, or something that the data set does not have; see
            above.

    Example:
        >>> from kd_lrp_plugin.data.phantom.dataset import Phantom
        >>> images = Marked(Phantom("train", size=8, image_size=64, augment=True))
        >>> image, label, companions = Companions(images, clean=True, mask=True)[0]
        >>> companions["clean"].shape, companions["mask"].shape, companions["mask_known"]
        (torch.Size([3, 64, 64]), torch.Size([64, 64]), True)
    """

    def __init__(
        self, images: Any, clean: bool = False, mask: bool = False, group: bool = False
    ) -> None:
        check_flags("companions", clean=clean, mask=mask, group=group)
        if not (clean or mask or group):
            fix = "Such as {clean: True}."
            raise ValueError(message("companions", "clean, mask or group", "none of them", fix))
        self._indices: Sequence[int] = range(len(images))
        while isinstance(images, Subset):
            self._indices = [images.indices[index] for index in self._indices]
            images = images.dataset
        self.images, self.clean, self.mask = images, clean, mask
        names = (getattr(images, "groups", None) or []) if group else []
        got = type(images).__name__
        if group and not names:
            fix = "Wrap the images in marked, which puts them in groups."
            raise ValueError(message("companions: group", "data with groups", got, fix))
        if clean and not hasattr(images, "clean"):
            fix = "Wrap the images in marked; others have no marker to be without."
            raise ValueError(message("companions: clean", "marked data", got, fix))
        self.groups = sorted(set(names))
        with preserved_generators():
            _check_repeats(images)
            if mask:
                _check_masks(images)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int, dict[str, Any]]:
        index = self._indices[index]
        before = Generators.take()
        image, label = self.images[index]
        after = Generators.take()
        found: dict[str, Any] = {}
        if self.clean:
            before.restore()
            found["clean"] = self.images.clean(index)
            _check_state("clean", after)
        if self.mask:
            known = self.images.mask(index)
            found["mask"] = torch.zeros(image.shape[-2:], dtype=torch.bool)
            found["mask_known"] = known is not None
            if known is not None:
                before.restore()
                found["mask"] = _move(self.images, known)
                _check_state("mask", after)
        if self.groups:
            name = self.images.groups[index]
            found |= {"group": self.groups.index(name), "group_name": name}
        return image, label, found


def _move(images: Any, mask: Bool[np.ndarray, "h w"]) -> Bool[Tensor, "height width"]:
    """A mask by the transforms of the images, in the order in which an image meets them."""
    page = Image.fromarray(np.uint8(255) * mask.astype(np.uint8)).convert("RGB")
    low, high = (torch.as_tensor(of) for of in get_range(images))
    moved: Any = page
    for step in _list_steps(images):
        if find_kind(step) == "random colour":
            step(deepcopy(moved))  # draws what it draws for the image, and no more
        else:
            moved = step(moved)
    return (moved > (low + high) / 2).any(0)


def _list_steps(images: Any) -> list[Callable[[Any], Any]]:
    if isinstance(images, Subclasses):
        return _list_steps(images.images)
    if isinstance(images, Marked):
        return [*_list_steps(images.images), *(list_steps(images.after) if images.after else [])]
    return list_steps(images.transform)


def _check_state(name: str, after: Generators) -> None:
    if not Generators.take().is_same(after):
        got = "another number of them"
        fix = "Take transforms that draw the same numbers whatever the pixels."
        expected = "as many random numbers drawn as for the image"
        raise ValueError(message(f"companions: {name}", expected, got, fix))


def _check_repeats(images: Any) -> None:
    """Raise ``ValueError`` for items that differ although all generators are in one state."""
    before, first = Generators.take(), images[0][0]
    if not isinstance(first, Tensor):
        fix = "Give the data set a transform that makes tensors of PIL images."
        got = type(first).__name__
        raise ValueError(message("companions", "images that are tensors", got, fix))
    for _ in range(_TRIALS):
        before.restore()
        if not torch.equal(images[0][0], first):
            fix = "Take transforms that draw from PyTorch, NumPy or Python, as torchvision's do."
            got = "two images from one state"
            expected = "augmentation by the global random number generators"
            raise ValueError(message("companions", expected, got, fix))


def _check_masks(images: Any) -> None:
    """Raise ``ValueError`` for data without masks, or transforms that a mask does not survive."""
    find = getattr(images, "mask", lambda _: None)
    known = next((m for m in map(find, range(len(images))) if m is not None), None)
    if known is None:
        fix = (
            "folder_images reads <root>/masks/<split>/<class>/<name>.png, the phantom has its own."
        )
        expected = "data with a mask or more"
        got = f"none of {len(images)} images"
        raise ValueError(message("companions: mask", expected, got, fix))
    if not callable(getattr(images, "transform", None)):
        fix = "Give the data set a transform that makes tensors of PIL images."
        raise ValueError(message("companions: mask", "data with a transform", "none", fix))
    if mixed := [step for step in _list_steps(images) if find_kind(step) == "mixed"]:
        fix = "Take steps that do one or the other."
        expected = "steps that change colours or move pixels"
        raise ValueError(message("companions: mask", expected, f"both in {mixed[0]}", fix))
    blank = np.zeros_like(known)
    for _ in range(_TRIALS):
        if bool(_move(images, blank).any()) or not bool(_move(images, ~blank).any()):
            fix = "Leave out steps that invert, or erase with noise; flips and moves may stay."
            got = "other brightness"
            expected = "transforms by which black stays black, and white white"
            raise ValueError(message("companions: mask", expected, got, fix))
