"""What is pictured of runs: images of test sets or of files, as people and models see them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from kd_lrp_plugin.data.images import read_image
from kd_lrp_plugin.evaluation.explain_inputs import LoadedRun, interleave_classes
from kd_lrp_plugin.runs.loading import load_preparation
from kd_lrp_plugin.utils.validation import message

SIDE = 256  # of pictures, in pixels at most
ALIKE = 0.95  # correlation, in 16 x 16 pixels, of one image in two sizes or contrasts


@dataclass(frozen=True)
class DisplayImage:
    """An image to picture: what people see of it, and what the model does."""

    label: str
    picture: Any
    image: Float[Tensor, "c h w"]
    mask: Bool[np.ndarray, "h w"] | None = None
    known: bool = True


def choose_images(run: LoadedRun, n: int) -> Callable[[LoadedRun], list[DisplayImage]]:
    """Test images to picture: the classes in turn, and right and wrong predictions in turn.

    Args:
        run: whose student is right or wrong.
        n: how many.

    Returns:
        A function from a run with the same test images to these images, as its models see them.
    """
    right = run.probabilities["student"].argmax(1) == run.labels
    classes = np.unique(run.labels)
    rest: dict[tuple[int, bool], list[int]] = {(k, r): [] for k in classes for r in (True, False)}
    for index in interleave_classes(run.labels):
        rest[run.labels[index], bool(right[index])].append(index)
    indices: list[int] = []
    for turn in range(n):
        lap, number = divmod(turn, len(classes))
        wanted = (lap + number) % 2 == 0
        fits = rest[classes[number], wanted] or rest[classes[number], not wanted]
        if fits:
            indices.append(fits.pop(0))

    def display(other: LoadedRun) -> list[DisplayImage]:
        return [_display_test_image(other, index) for index in indices]

    return display


def _display_test_image(run: LoadedRun, index: int) -> DisplayImage:
    image = run.test_set[index][0]
    name = run.class_name(int(run.labels[index]))
    found = _find_picture(run.test_set, index) if run.summary["preprocessing"] else None
    if found is None:
        return DisplayImage(name, picture_tensor(image), image)
    small = shrink_picture(found)
    find = getattr(run.test_set, "mask", None)
    mask = find(index) if find else None
    if mask is not None:
        mask = np.asarray(Image.fromarray(mask).resize(small.size, Image.Resampling.NEAREST))
    return DisplayImage(name, np.asarray(small), image, mask)


def _find_picture(test_set: Any, index: int) -> Image.Image | None:
    """An image of a data set as it is before its transform; None where the set does not show it."""
    if hasattr(test_set, "image"):
        return test_set.image(index)
    samples, load = (getattr(test_set, name, None) for name in ("samples", "loader"))
    return load(samples[index][0]) if samples and load else None


def picture_tensor(image: Float[Tensor, "c h w"]) -> Float[np.ndarray, "h w c"]:
    """What a model sees of an image that may be cut, in [0, 1]: its maps fit nothing else."""
    low, high = image.min(), image.max()
    return ((image - low) / (high - low).clamp(min=1e-12)).permute(1, 2, 0).numpy()


def shrink_picture(picture: Image.Image) -> Image.Image:
    copy = picture.convert("RGB")
    copy.thumbnail((SIDE, SIDE))
    return copy


def read_images(
    runs: Sequence[LoadedRun], images: Sequence[str | Path], safe: bool = False
) -> Callable[[LoadedRun], list[DisplayImage]]:
    """Image files to picture, read and prepared as each run has it.

    Raises:
        FileNotFoundError: if one is not there.
        ValueError: if one cannot be read, or the preprocessing of a run is not known.
    """
    preparations = {run.name: load_preparation(run.folder.path, safe) for run in runs}
    pictures = {
        bits: [read_image(file, bits, "explain") for file in images]
        for bits in {bits for bits, _ in preparations.values()}
    }

    def display(run: LoadedRun) -> list[DisplayImage]:
        bits, prepare = preparations[run.name]
        found = []
        for file, picture in zip(images, pictures[bits], strict=True):
            image = prepare(picture)
            whole = run.summary["preprocessing"] is not None
            shown = np.asarray(shrink_picture(picture)) if whole else picture_tensor(image)
            found.append(DisplayImage(Path(file).stem, shown, image, known=False))
        return found

    return display


def check_pictured_alike(
    runs: Sequence[LoadedRun], displayed: Sequence[Sequence[DisplayImage]]
) -> None:
    """Raise an error unless the images of all runs are the same, and cut in the same way.

    A picture of several runs lays the maps of all over the image of the first. Sizes and contrasts
    may differ.

    Raises:
        ValueError: with the runs.
    """
    first, *others = ([_outline(one.picture) for one in images] for images in displayed)
    for run, pictures in zip(runs[1:], others, strict=True):
        for number, (one, other) in enumerate(zip(first, pictures, strict=True)):
            if float((one * other).mean()) < ALIKE:
                got = f"another in {run.name!r} than in {runs[0].name!r}, or one cut otherwise"
                fix = "Leave --out out, or explain each by itself."
                expected = f"one image {number + 1} to lay all maps over"
                raise ValueError(message("explain --out", expected, got, fix))


def _outline(picture: Any) -> Float[np.ndarray, "16 16"]:
    """A picture in grey and few pixels, of mean 0 and standard deviation 1; flat ones are all 1."""
    values = np.asarray(picture, np.float32)
    grey = Image.fromarray(values.mean(2) if values.ndim == 3 else values)
    small = np.asarray(grey.resize((16, 16), Image.Resampling.BOX), np.float64)
    spread = small.std()
    return (small - small.mean()) / spread if spread > 1e-6 else np.ones_like(small)
