"""Images with a marker that gives their class away: shortcuts, made to order.

A network that has learnt such a marker instead of what it was meant to learn is right on images
like those it was trained on, and wrong wherever the marker says something else (Geirhos et al.,
Nature Machine Intelligence 2020). :class:`Marked` puts a marker on the images of any data set of
ours; what it draws depends on the seed, the image's index and its class alone.
"""

import math
import string
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import v2

from kd_lrp_plugin.data.following import find_kind, list_steps
from kd_lrp_plugin.data.images import ImageLoader
from kd_lrp_plugin.data.subclasses import Subclasses
from kd_lrp_plugin.data.validation import check_integer
from kd_lrp_plugin.utils.files import hash_contents
from kd_lrp_plugin.utils.validation import check_known, message

KINDS = ("patch", "glyph", "frame", "diffuse")
_LETTERS = string.ascii_uppercase
VARIANTS = ("as_trained", "random", "conflicting", "none")


class Marked(Dataset):
    """Images of a data set, each with a marker that tells a class: its own, or another.

    =============  ==============================================================================
    ``kind``       what is drawn, and how it tells the class
    =============  ==============================================================================
    ``patch``      a white square, in a corner (or, beyond four classes, a place along the border)
                   of its own for each class
    ``glyph``      a white letter in the upper left corner, as scanners and hospitals print them
    ``frame``      a border, of a brightness of its own for each class
    ``diffuse``    a gradient over the whole image, in a direction of its own for each class
    =============  ==============================================================================

    ==============  =============================================================================
    ``variants``    which class the marker tells
    ==============  =============================================================================
    ``as_trained``  that of the image in a share ``agreement`` of the images, drawn at random; in
                    the others any class, the image's own included
    ``random``      any class
    ``conflicting`` any class but that of the image
    ``none``        there is no marker
    ==============  =============================================================================

    With several variants every image is there once for each of them: a test set in groups.

    Args:
        images: a data set of ours whose items are (image (c, h, w), class index), by alias.
        kind: one of :data:`KINDS`.
        size: of the marker over the image's shorter side: side of the square, height of the
            letter, width of the frame; without meaning for ``diffuse``.
        strength: opacity of the marker, in (0, 1]; for ``diffuse`` the height of the gradient,
            where 1 is the way from black to white.
        agreement: share of the images whose marker tells their class, in [0, 1].
        variants: one or several of :data:`VARIANTS`.
        classes: class indices whose images have a marker; None for all.
        seed: of what is drawn at random.
        transform: applied to the marked image, such as torchvision's ``RandomErasing``.

    Attributes:
        classes, targets, samples, names, bits, loader: those of ``images``.
        numbers: indices of the items' images, by which variants of one image are known.
        subclasses, subclass_targets, subclass_of: those of ``images``; only where it has any.
        groups: of each item the variant, or, of a single variant ``as_trained``, whether the
            marker "agrees" or "conflicts" with the class ("none" without one).
        shown: the class that each item's marker tells; None without one.

    Raises:
        ValueError: for an unknown kind or variant, a number out of range, a marker that the image
            has no room for or that looks alike for two classes, data without ``targets`` and
            ``classes`` or with images that nobody has labelled, or values that are not between the
            black and the white of their transform.

    Example:
        >>> from kd_lrp_plugin.data.phantom.dataset import Phantom
        >>> marked = Marked(Phantom("test", size=8, image_size=64), variants=["random", "none"])
        >>> len(marked), marked.groups[0], marked.groups[8]
        (16, 'random', 'none')
        >>> int(marked.marker(0).sum()), marked.marker(8)
        (36, None)
    """

    def __init__(
        self,
        images: Any,
        kind: str = "patch",
        size: float = 0.1,
        strength: float = 1.0,
        agreement: float = 1.0,
        variants: str | Sequence[str] = "as_trained",
        classes: Sequence[int] | None = None,
        seed: int = 0,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        check_known("marked: kind", kind, KINDS)
        names = [variants] if isinstance(variants, str) else list(variants)
        for name in names:
            check_known("marked: variants", name, VARIANTS)
        if not names or len(set(names)) < len(names):
            fix = "Such as [random, conflicting, none]."
            raise ValueError(message("marked: variants", "different variants", names, fix))
        _check_share("agreement", agreement, zero=True)
        _check_share("size", size)
        _check_share("strength", strength)
        check_integer("marked", "seed", seed, least=0)
        if not (hasattr(images, "targets") and hasattr(images, "classes")):
            fix = "Alias a data set such as phantom or folder_images, not its name."
            got = type(images).__name__
            raise ValueError(message("marked: images", "data with targets and classes", got, fix))
        if isinstance(images, Subclasses):
            fix = "Wrap the marked images in subclasses instead."
            raise ValueError(message("marked: images", "labels of classes", "of subclasses", fix))
        if len(images.classes) < 2:
            fix = "A marker that tells the class needs two."
            raise ValueError(message("marked: images", "two classes or more", images.classes, fix))
        if kind == "glyph" and len(images.classes) > len(_LETTERS):
            fix = "Take patch, which has a place for each class."
            got = f"{len(images.classes)} classes"
            raise ValueError(message("marked: glyph", f"at most {len(_LETTERS)}", got, fix))
        known = range(len(images.classes))
        labels = [int(label) for label in images.targets]  # torchvision has tensors of them
        if wrong := sorted(set(labels) - set(known)):
            fix = "Wrap the marked images in with_unlabelled instead."
            expected = "a class index for each image"
            raise ValueError(message("marked: images", expected, f"labels {wrong[:5]}", fix))
        if classes is not None and (wrong := [c for c in classes if c not in known]):
            fix = "Give class indices, in the order of the data set's classes."
            raise ValueError(message("marked: classes", f"indices below {len(known)}", wrong, fix))
        self.images, self.kind, self.size, self.strength = images, kind, size, strength
        self.classes, self.variants, self.after = images.classes, names, transform
        self._black, self._white = get_range(images)
        carriers = set(known if classes is None else classes)
        self.shown: list[int | None] = []
        for variant in names:
            self.shown += [
                _told(variant, label, len(known), agreement, (seed, index))
                if label in carriers
                else None
                for index, label in enumerate(labels)
            ]
        self.targets = labels * len(names)
        self.groups = [name for name in names for _ in labels]
        if hasattr(images, "subclass_targets"):
            self.subclasses, self.subclass_of = images.subclasses, images.subclass_of
            self.subclass_targets = list(images.subclass_targets) * len(names)
        if names == ["as_trained"]:
            pairs = zip(self.shown, self.targets, strict=True)
            self.groups = ["none" if s is None else _WORDS[s == t] for s, t in pairs]
        if any(shown is not None for shown in self.shown):
            self._check_values(images[0][0])

    @property
    def transform(self) -> Any:
        """Of the images, then the marked ones', so that prediction prepares others in this way."""
        first = getattr(self.images, "transform", None)
        if self.after is None or first is None:
            return first
        return transforms.Compose([first, self.after])

    @property
    def bits(self) -> int | None:
        """Those of the images' values, where the data set states them."""
        return getattr(self.images, "bits", None)

    @property
    def loader(self) -> Any:
        """That of the images, so that checks read the files in the same way."""
        return getattr(self.images, "loader", ImageLoader())

    @property
    def samples(self) -> list[tuple[str, int]]:
        """Files and class indices, where the data set has files."""
        return list(getattr(self.images, "samples", [])) * len(self.variants)

    @property
    def names(self) -> list[str]:
        """Names of the images, where the data set has names; one for all its variants."""
        return list(self.images.names) * len(self.variants)

    @property
    def numbers(self) -> list[int]:
        """The index of each item's image in ``images``; one for all its variants."""
        return list(range(len(self.images))) * len(self.variants)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(message("marked", f"an index below {len(self)}", index, ""))
        image, label = self.images[index % len(self.images)]
        return self._finish(image, self.shown[index]), label

    def clean(self, index: int) -> Tensor:
        """The image of an item without its marker; its random augmentation is drawn again."""
        inner = self.images
        item = inner.clean if isinstance(inner, Marked) else lambda at: inner[at][0]
        return self._finish(item(index % len(inner)), None)

    def _finish(self, image: Tensor, shown: int | None) -> Tensor:
        if shown is not None:
            value, alpha = self._drawn(shown, tuple(image.shape))
            low, high = self._black, self._white
            if self.kind == "diffuse":
                image = (image + value * (high - low)).clamp(low, high)
            else:
                image = (1 - alpha) * image + alpha * (low + value * (high - low))
        return self.after(image) if self.after else image

    def mask(self, index: int) -> Bool[np.ndarray, "h w"] | None:
        """The object's pixels in the untransformed image, where the data set knows them."""
        find = getattr(self.images, "mask", None)
        return find(index % len(self.images)) if find else None

    def marker(self, index: int) -> Bool[np.ndarray, "h w"] | None:
        """The marker's pixels in the item, moved as ``transform`` moves it; None without a marker.

        What changes colours by chance, such as ``RandomErasing``, leaves it as it is.
        """
        shown = self.shown[index]
        if shown is None:
            return None
        shape = tuple(self.images[index % len(self.images)][0].shape)
        _, alpha = self._drawn(shown, shape)
        if self.after is None:
            return (alpha > 0).numpy()
        low, high = torch.as_tensor(self._black), torch.as_tensor(self._white)
        moved: Any = torch.where(alpha > 0, high, low).expand(shape)
        for step in list_steps(self.after):
            moved = moved if find_kind(step) == "random colour" else step(moved)
        low, high = (torch.as_tensor(of) for of in get_range(self))
        return (moved > (low + high) / 2).any(0).numpy()

    def _check_values(self, image: Tensor) -> None:
        """Raise ``ValueError`` for an image without room, or of another black and white."""
        slack = 0.1 * (self._white - self._black)
        outside = (image < self._black - slack) | (image > self._white + slack)
        if outside.float().mean() > 0.25:  # less may be noise of an augmentation
            fix = "Let its transform end in torchvision's ToTensor and Normalize, or ToTensor."
            expected = "values between black and white, 0 and 1 before torchvision's Normalize"
            got = f"{float(image.min()):.3g} to {float(image.max()):.3g}"
            raise ValueError(message("marked: images", expected, got, fix))
        self._check_markers(tuple(image.shape))

    def _check_markers(self, shape: tuple[int, ...]) -> None:
        """Raise ``ValueError`` for markers without room, or that do not tell their classes."""
        first: dict[str, int] = {}
        for shown in sorted({shown for shown in self.shown if shown is not None}):
            name = self.classes[shown]
            value, alpha = self._drawn(shown, shape)
            look = hash_contents((value * alpha).numpy().tobytes())
            if look in first or not alpha.any():
                got = f"none for {name!r}"
                if alpha.any():
                    got = f"the same for {self.classes[first[look]]!r} and {name!r}"
                got += f" in images of {shape[-2]} x {shape[-1]}"
                fix = "Enlarge the images, raise size, or take another kind."
                expected = "a marker of its own for each class"
                raise ValueError(message(f"marked: {self.kind}", expected, got, fix))
            first[look] = shown

    def _drawn(self, shown: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return draw_marker(
            self.kind, shown, len(self.classes), shape[-2:], (self.size, self.strength)
        )


_WORDS = {True: "agrees", False: "conflicts"}


@lru_cache(maxsize=256)
def draw_marker(
    kind: str, shown: int, classes: int, shape: tuple[int, int], look: tuple[float, float]
) -> tuple[Float[Tensor, "h w"], Float[Tensor, "h w"]]:
    """Brightness and opacity of the marker of a class.

    Args:
        kind: one of :data:`KINDS`.
        shown: the class that it tells.
        classes: how many there are.
        shape: height and width of the image.
        look: size over the image's shorter side, and strength.

    Returns:
        Brightness in [0, 1], for ``diffuse`` what is added, and opacity in [0, 1], both (h, w).

    Raises:
        ValueError: for a marker that the image has no room for.
    """
    height, width = shape
    size, strength = look
    value, alpha = torch.ones(shape), torch.zeros(shape)
    if kind == "diffuse":
        angle = 2 * math.pi * shown / classes
        rows = torch.linspace(-0.5, 0.5, height)[:, None]
        columns = torch.linspace(-0.5, 0.5, width)[None]
        along = math.cos(angle) * columns + math.sin(angle) * rows
        return strength * along, torch.ones(shape)
    side = round(size * min(shape))
    if side < 1 or 2 * side > min(shape) - 2:
        fix = "Lower size, or enlarge the images."
        got = f"{side} pixels in an image of {height} x {width}"
        expected = "from one pixel to half of the image, with a margin"
        raise ValueError(message("marked: size", f"a marker {expected}", got, fix))
    if kind == "frame":
        alpha.fill_(strength)
        alpha[side:-side, side:-side] = 0
        return value * (shown + 1) / classes, alpha
    if kind == "glyph":
        alpha[1 : side + 1, 1 : side + 1] = strength * _letter(shown, side)
        return value, alpha
    top, left = _place(shown, classes, height - side - 2, width - side - 2)
    alpha[top + 1 : top + 1 + side, left + 1 : left + 1 + side] = strength
    return value, alpha


def _letter(shown: int, side: int) -> Float[Tensor, "side side"]:
    """The capital letter of a class, one pixel deep."""
    page = Image.new("L", (4 * side, 4 * side))
    font = ImageFont.load_default(size=2 * side)
    ImageDraw.Draw(page).text((side, side), _LETTERS[shown], fill=255, font=font)
    box = page.getbbox()
    assert box is not None  # every capital letter has ink
    letter = np.asarray(page.crop(box).resize((side, side), Image.Resampling.BOX))
    return torch.from_numpy((letter > 127).astype(np.float32))


def _place(shown: int, classes: int, rows: int, columns: int) -> tuple[int, int]:
    """The four corners; beyond four classes, even steps along the border."""
    corners = [(0, 0), (0, columns), (rows, 0), (rows, columns)]
    if classes <= 4:
        return corners[shown]
    step = shown * 2 * (rows + columns) / classes
    if step < columns:
        return 0, round(step)
    if step < columns + rows:
        return round(step - columns), columns
    if step < 2 * columns + rows:
        return rows, round(2 * columns + rows - step)
    return round(2 * (rows + columns) - step), 0


def _told(
    variant: str, label: int, classes: int, agreement: float, key: tuple[int, int]
) -> int | None:
    """The class that the marker of an image tells."""
    if variant == "none":
        return None
    # One draw for each variant, whatever the others are.
    draw = np.random.default_rng([*key, VARIANTS.index(variant)])
    agrees, any_class = draw.random() < agreement, int(draw.integers(classes))
    if variant == "as_trained":
        return label if agrees else any_class
    if variant == "conflicting":
        return (label + 1 + int(draw.integers(classes - 1))) % classes
    return any_class


def get_range(images: Any) -> tuple[Any, Any]:
    """What black and white are in the items, by channel: what normalisations make of 0 and 1."""
    low: Any = 0.0
    high: Any = 1.0
    for step in _list_all_steps(images):
        if isinstance(step, transforms.Normalize | v2.Normalize):
            mean, std = (torch.as_tensor(of)[:, None, None] for of in (step.mean, step.std))
            low, high = (low - mean) / std, (high - mean) / std
    return low, high


def _list_all_steps(images: Any) -> list[Any]:
    """The steps of all transforms that an item goes through, those behind markers included."""
    if isinstance(images, Subclasses):
        return _list_all_steps(images.images)
    if isinstance(images, Marked):
        return [*_list_all_steps(images.images), *_list_steps(images.after)]
    return _list_steps(getattr(images, "transform", None))


def _list_steps(transform: Any) -> list[Any]:
    """The steps of a transform, and of those in it that have steps themselves."""
    inner = getattr(transform, "transforms", None)
    if inner is None:
        return [transform]
    return [step for part in inner for step in _list_steps(part)]


def _check_share(name: str, value: Any, zero: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1 or not (value or zero):
        expected = f"a number in {'[' if zero else '('}0, 1]"
        raise ValueError(message(f"marked: {name}", expected, value, "Such as 0.1 or 1.0."))
