"""Training images for a teacher that is asked once about each: by what it knows them again."""

from collections.abc import Callable
from copy import copy
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from kd_lrp_plugin.data.companions import Companions
from kd_lrp_plugin.data.following import Following, sample_field
from kd_lrp_plugin.data.shortcuts import Marked
from kd_lrp_plugin.data.subclasses import Subclasses
from kd_lrp_plugin.data.unlabelled import WithUnlabelled
from kd_lrp_plugin.utils.preserved import Generators, preserved_generators
from kd_lrp_plugin.utils.validation import message

ROW = "teacher_row"
"""In what a batch brings along: which answer of the teacher belongs to the image."""
CELLS = "teacher_cells"
"""Likewise, by size of a map: where its cells come from in the plain image."""
_TRIALS = 4  # images, from all over a data set, by which it is judged
Item = tuple[Tensor, Any, dict[str, Any]]


class KeyedViews(Dataset):
    """Few fixed views of each image: its randomness is drawn from seed, image and view alone.

    Each item is drawn with the global generators of PyTorch, NumPy and Python brought to a state of
    its own, and put back afterwards: the same in every worker, order and process. In epoch e all
    images are seen in view ``e % views``.

    Args:
        where: who asks, for messages.
        images: items (image, label) or (image, label, companions).
        views: how many; 1 where nothing random is drawn.
        seed: of the views.

    Attributes:
        epoch: which the trainer sets as one begins.
        views: how many there are.

    Raises:
        ValueError: for images that draw from other generators than these; from an item, if it is
            random where those by which the data set was judged are not.

    Example:
        >>> from kd_lrp_plugin.data.phantom.dataset import Phantom
        >>> images = Phantom("train", size=3, image_size=32, augment=True)
        >>> views = KeyedViews("mine", images, views=2)
        >>> bool((views[0][0] == views[0][0]).all()), len(views), views.rows
        (True, 3, 6)
    """

    def __init__(self, where: str, images: Any, views: int = 4, seed: int = 0) -> None:
        self.images, self.views, self.seed, self.epoch = images, views, seed, 0
        self._where, self._still = where, False
        draws = [self._draws(where, index) for index in _choose_trials(images)]
        if not any(draws):
            self.views, self._still = 1, views > 1

    @property
    def rows(self) -> int:
        """Answers that the teacher has to give."""
        return self.views * len(self)

    @property
    def asked(self) -> Any:
        """The images that the teacher sees, of random views."""
        return self.images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        row = self.epoch % self.views * len(self) + index
        image, label, companions = self.ask(row)
        return image, label, {**companions, ROW: row}

    def ask(self, row: int) -> Item:
        """What the teacher is asked: image, label and companions of a row."""
        view, index = divmod(int(row), len(self))
        with preserved_generators():
            Generators.seed(self.seed, index, view)
            before = Generators.take()
            found = _complete(self.images[index])
            if self._still and not Generators.take().is_same(before):
                fix = "Set views: 1, or leave cache out."
                expected = f"images without randomness, such as item {_choose_trials(self)[0]}"
                raise ValueError(message(self._where, expected, f"a random item {index}", fix))
            return found

    def _draws(self, where: str, index: int) -> bool:
        with preserved_generators():
            Generators.seed(self.seed, index, 0)
            before = Generators.take()
            first = self.images[index][0]
            draws = not Generators.take().is_same(before)
        if not _is_same_again(self.ask, index, first):
            fix = "Take transforms that draw from PyTorch, NumPy or Python, as torchvision's do."
            got = f"two images from one state, of item {index}"
            expected = "augmentation by the global random number generators"
            raise ValueError(message(where, expected, got, fix))
        return draws


class FollowedViews(Dataset):
    """Images as they are without a cache, and how each was moved from its plain self.

    Args:
        where: who asks, for messages.
        images: a data set with a ``transform`` of torchvision's steps, perhaps in our wrappers.
        wrap: what wraps them for training, such as ``companions``.

    Attributes:
        sizes: heights and widths of the teacher's maps, which the trainer sets.
        plain: the same images, wrapped alike, without the random steps.

    Raises:
        ValueError: for steps that no map can follow, plain images of another shape, or ones that
            are random, as of a data set that moves images by other means than its ``transform``.
    """

    views = 1

    def __init__(self, where: str, images: Any, wrap: Callable[[Any], Any] = lambda i: i) -> None:
        self._followed: list[Following] = []
        self._where = where

        def follow(transform: Any) -> Following:
            self._followed.append(Following(where, transform))
            return self._followed[-1]

        self.images = wrap(change_transform(where, images, follow))
        self.plain = wrap(change_transform(where, images, lambda t: Following(where, t).plain()))
        self.sizes: list[tuple[int, int]] = []
        self.epoch = 0
        with preserved_generators():
            shapes = [tuple(part[0][0].shape) for part in (self.images, self.plain)]
        if shapes[0] != shapes[1]:
            fix = "Put Resize in front of random crops, to the size that they leave."
            expected = f"plain images of shape {shapes[0]}, as the random steps make them"
            raise ValueError(message(where, expected, shapes[1], fix))
        for index in _choose_trials(images):
            if not _is_same_again(self.ask, index, self.ask(index)[0]):
                self._refuse_random(index)

    @property
    def rows(self) -> int:
        """Answers that the teacher has to give."""
        return len(self)

    @property
    def asked(self) -> Any:
        """The images that the teacher sees."""
        return self.plain

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        for transform in self._followed:
            transform.field = None
        image, label, companions = _complete(self.images[index])
        field = next((f.field for f in self._followed if f.field is not None), None)
        cells = {name_size(size): sample_field(field, size) for size in self.sizes}
        return image, label, {**companions, ROW: int(index), CELLS: cells}

    def ask(self, row: int) -> Item:
        """What the teacher is asked: plain image, label and companions of a row."""
        with preserved_generators():
            before = Generators.take()
            found = _complete(self.plain[int(row)])
            if not Generators.take().is_same(before):
                self._refuse_random(int(row))
            return found

    def _refuse_random(self, index: int) -> NoReturn:
        fix = "Let steps of its transform alone draw what is random, or take cache: exact."
        expected = "plain images without randomness"
        raise ValueError(message(self._where, expected, f"a random item {index}", fix))


def _choose_trials(images: Any) -> list[int]:
    """Indices from all over a data set, whose parts may be augmented differently."""
    steps = max(1, min(_TRIALS, len(images)) - 1)
    return sorted({step * (len(images) - 1) // steps for step in range(steps + 1)})


def _is_same_again(ask: Callable[[int], Item], index: int, first: Tensor) -> bool:
    return all(torch.equal(ask(index)[0], first) for _ in range(_TRIALS))


def name_size(size: tuple[int, int]) -> str:
    """What the cells of maps of a size are found by.

    Example:
        >>> name_size((4, 7))
        '4x7'
    """
    return f"{size[0]}x{size[1]}"


def list_layers(images: Any) -> list[Any]:
    """A data set, and all that it wraps, from the outside in."""
    inner: list[Any] = []
    if isinstance(images, Subclasses | Marked | Companions):
        inner = [images.images]
    elif isinstance(images, WithUnlabelled):
        inner = [images.images, images.unlabelled]
    elif isinstance(images, Subset):
        inner = [images.dataset]
    return [images, *(layer for part in inner for layer in list_layers(part))]


def change_transform(where: str, images: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of a data set, in whose innermost parts another transform takes the place of theirs.

    Raises:
        ValueError: for a data set without a transform, or ``marked`` with one of its own.
    """
    found = copy(images)
    if isinstance(images, Marked) and images.after is not None:
        fix = "Leave transform of marked out, or take cache: exact."
        raise ValueError(message(where, "markers without a transform", images.after, fix))
    if len(list_layers(images)) > 1:
        for name in vars(images).keys() & {"images", "unlabelled", "dataset"}:
            setattr(found, name, change_transform(where, getattr(images, name), change))
        return found
    if not callable(getattr(images, "transform", None)):
        fix = "Give the data set a transform of torchvision's, or take cache: exact."
        got = f"{type(images).__name__} without"
        raise ValueError(message(where, "data with a transform", got, fix))
    found.transform = change(images.transform)
    memory = vars(images).get("_memory")
    if memory is not None and memory.transform is images.transform:
        found._memory = memory.change(found.transform, change)
    return found


def _complete(item: tuple) -> Item:
    image, label, *rest = item
    return image, label, dict(rest[0]) if rest else {}
