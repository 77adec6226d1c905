"""Maps of a plain image, moved as a random transform has moved the image."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import functional as images

from kd_lrp_plugin.utils.preserved import Generators
from kd_lrp_plugin.utils.validation import message

RANDOM_MOVES = (
    "RandomHorizontalFlip",
    "RandomVerticalFlip",
    "RandomRotation",
    "RandomAffine",
    "RandomPerspective",
    "RandomCrop",
    "RandomResizedCrop",
)
FIXED_MOVES = ("Resize", "CenterCrop", "Pad")
RANDOM_COLOURS = (
    "ColorJitter",
    "RandomGrayscale",
    "RandomInvert",
    "RandomPosterize",
    "RandomSolarize",
    "RandomAutocontrast",
    "RandomEqualize",
    "RandomAdjustSharpness",
    "RandomErasing",
    "GaussianBlur",
    "GaussianNoise",
    "RandomPhotometricDistort",
    "RandomChannelPermutation",
)
FIXED_COLOURS = (
    "Grayscale",
    "RGB",
    "ToTensor",
    "PILToTensor",
    "ToImage",
    "ToDtype",
    "ToPureTensor",
    "ConvertImageDtype",
    "Normalize",
)
_POLICIES = ("AutoAugment", "RandAugment", "TrivialAugmentWide", "AugMix")
_NESTING = ("RandomApply", "RandomChoice", "RandomOrder")
_ORIGIN = -16.0  # of coordinates that are carried as pixels: no fill of an image is in [-16, -15]
Field = Float[Tensor, "2 height width"]


class Following:
    """A transform that keeps where each pixel of its latest image comes from.

    Each step of a ``Compose`` of torchvision's (of version 1 or 2) is taken as it would be, bit for
    bit, and each random one that moves pixels is taken again, from the same state of the random
    number generators, with coordinates in the place of colours.

    Args:
        where: who asks, for messages.
        transform: of PIL images.

    Attributes:
        transforms: its steps.
        field: of the latest image, the row and column in the plain image, each in [0, 1], that a
            pixel comes from; other values for pixels from outside; None where nothing moves.

    Raises:
        ValueError: for a step that is none of torchvision's that are known here, or one that
            resizes, cuts or pads all images alike behind a random one that moves them.
    """

    def __init__(self, where: str, transform: Any) -> None:
        self.transforms = list_steps(transform)
        self.field: Field | None = None
        self._where = where
        moved = False
        for step in self.transforms:
            kind = _classify(where, step)
            if kind == "fixed move" and moved:
                got = f"{type(step).__name__} behind a random move"
                fix = "Put it in front of flips, rotations and crops, or take cache: exact."
                raise ValueError(message(where, "random moves behind all others", got, fix))
            moved |= kind == "random move"

    def __call__(self, image: Any) -> Any:
        self.field = None
        for step in self.transforms:
            if _classify(self._where, step) == "random move":
                image = self._move(step, image)
            else:
                image = step(image)
        return image

    def _move(self, step: Callable[[Any], Any], image: Any) -> Any:
        _, height, width = images.get_dimensions(image)
        before = Generators.take()
        moved = step(image)
        after = Generators.take()
        before.restore()
        field = _start(height, width) if self.field is None else self.field
        # Three channels, as many as a fill by channel has.
        self.field = step(torch.stack([field[0], field[1], field[0]]) + _ORIGIN)[:2] - _ORIGIN
        if not Generators.take().is_same(after):
            got = f"{type(step).__name__} that draws others"
            fix = "Take cache: exact."
            expected = "as many random numbers for maps as for images"
            raise ValueError(message(self._where, expected, got, fix))
        return moved

    def plain(self) -> Callable[[Any], Any]:
        """The transform without its random steps."""
        kinds = ("fixed move", "fixed colour")
        return _Steps([s for s in self.transforms if _classify(self._where, s) in kinds])


class _Steps:
    """Steps one after another, under the name that ``Compose`` has for them."""

    def __init__(self, steps: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = list(steps)

    def __call__(self, image: Image.Image) -> Any:
        for step in self.transforms:
            image = step(image)
        return image

    def __repr__(self) -> str:
        return repr(self.transforms)


def list_steps(transform: Any) -> list[Any]:
    """The steps of a transform, those of each ``Compose`` of torchvision's in it one by one."""
    of_torchvision = type(transform).__name__ == "Compose" and _is_torchvision(transform)
    if not (of_torchvision or isinstance(transform, Following | _Steps)):
        return [transform]
    return [inner for step in transform.transforms for inner in list_steps(step)]


def _is_torchvision(step: Any) -> bool:
    return type(step).__module__.startswith("torchvision.transforms")


def find_kind(step: Any) -> str | None:
    """What a step changes, and whether by chance: such as "random colour" or "fixed move".

    "mixed" for what may change colours as well as move pixels; None for a step that is unknown.
    """
    name = type(step).__name__
    if not _is_torchvision(step):
        return None
    if name in _NESTING:
        kinds = {find_kind(inner) for inner in step.transforms}
        if kinds <= {"random colour", "fixed colour"}:
            return "random colour"
        if kinds == {"random move"}:
            return "random move"
        return "mixed" if kinds & {"random colour", "mixed"} else None
    known = {
        "random move": RANDOM_MOVES,
        "fixed move": FIXED_MOVES,
        "random colour": RANDOM_COLOURS,
        "fixed colour": FIXED_COLOURS,
        "mixed": _POLICIES,
    }
    return next((kind for kind, names in known.items() if name in names), None)


def _classify(where: str, step: Any) -> str:
    if (kind := find_kind(step)) not in (None, "mixed"):
        return kind
    fix = f"Take cache: exact, or of torchvision's {', '.join(RANDOM_MOVES + RANDOM_COLOURS)}."
    raise ValueError(message(where, "steps that a map can follow", step, fix))


@lru_cache(maxsize=16)
def _start(height: int, width: int) -> Field:
    rows = (torch.arange(height, dtype=torch.float64) + 0.5) / height
    columns = (torch.arange(width, dtype=torch.float64) + 0.5) / width
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).float()


def sample_field(field: Field | None, size: tuple[int, int]) -> Float[Tensor, "h w 2"]:
    """Where the centre of each cell of a map comes from, for :func:`move_maps`.

    Args:
        field: of :class:`Following`; None where nothing moves.
        size: height and width of the map.

    Returns:
        Column and row, each in [-1, 1] from edge to edge; other values for what was outside.
    """
    if field is None:
        cells = _start(*size)
    else:  # in the middle of four pixels, a flip's coordinates are exact
        cells = functional.interpolate(
            field[None], size=size, mode="bilinear", align_corners=False
        )[0]
    return (2 * cells.flip(0) - 1).permute(1, 2, 0)


def move_maps(
    maps: Float[Tensor, "n *c h w"], cells: Float[Tensor, "n h w 2"]
) -> Float[Tensor, "n *c h w"]:
    """Maps of plain images, as they lie in the images that were moved.

    Flips are exact, up to the rounding of float32. Rotations, zooms and crops are approximate: a
    cell takes the value, between cell centres a bilinear one, of the point that its centre comes
    from, which at 4 x 4 cells of a map is coarse. The total is kept by flips alone: what leaves the
    image is lost, what enters it is zero, and a zoom spreads relevance over more cells.

    Args:
        maps: of the plain images; or features, which are moved alike.
        cells: from :func:`sample_field`, one for each map.

    Example:
        >>> from torchvision.transforms import RandomHorizontalFlip
        >>> flip = Following("mine", RandomHorizontalFlip(p=1.0))
        >>> _ = flip(Image.new("RGB", (8, 8)))
        >>> cells = sample_field(flip.field, (1, 2))
        >>> move_maps(torch.tensor([[[1.0, 2.0]]]), cells[None]).tolist()
        [[[2.0, 1.0]]]
    """
    shape = maps.shape
    stacked = maps.reshape(len(maps), -1, *shape[-2:])
    cells = cells.to(maps)
    inside = (cells.abs() <= 1).all(-1)[:, None]
    moved = functional.grid_sample(
        stacked, cells.clamp(-1, 1), "bilinear", padding_mode="border", align_corners=False
    )
    return (moved * inside).reshape(shape)
