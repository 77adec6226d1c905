"""The one reader of image files, for training, prediction, explanation and checks alike.

What an image becomes, by Pillow's mode (all of it 8-bit RGB in the end):

==================================  ==============================================================
L, RGB, RGBX                        as they are, without any other change
1                                   black and white
P                                   the colours of its palette
LA, La, PA, RGBA, RGBa, and images  transparent parts become black, by their share; an image that
with a transparent colour           is wholly transparent is refused
CMYK, YCbCr, HSV, LAB               Pillow's conversion, without colour profiles
I;16, I;16L, I;16B, I;16N           [0, 65535] becomes [0, 255], rounded; with ``bits`` of 12,
                                    [0, 4095]. 12-bit TIFF files say so themselves. Without
                                    ``bits``, an image whose largest value is in [1, 4095] is
                                    refused: it might hold 12 bits, and be nearly black
I                                   from PNG and PPM files like I;16; else refused without ``bits``
F                                   refused: nothing says what is black and white
RGB, RGBA, CMYK of 16 bits          the upper 8 bits; nearly black ones are refused as for I;16
==================================  ==============================================================

EXIF orientation is applied. Refused are files with several frames or pages (but the first image
of an MPO, which is a photograph, is taken), images of more than ``Image.MAX_IMAGE_PIXELS``
(89,478,485) pixels, files that are cut off, damaged, empty, or no regular files, and names that are
not UTF-8.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, UnidentifiedImageError

from kd_lrp_plugin.utils.validation import message

ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = [_TURNS[number] for number in (5, 6, 7, 8)]
_INTEGERS = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_DOUBTFUL = 4096  # 16-bit images without any value as large may hold 12 bits


class DecodedImage(NamedTuple):
    """An image as all of the package sees it, and what its file says.

    Attributes:
        rgb: the image in mode RGB, upright.
        format: such as JPEG, by content.
        mode: Pillow's, as in the file.
        changes: what was done to it beyond Pillow's plain conversion, in words.
    """

    rgb: Image.Image
    format: str
    mode: str
    changes: tuple[str, ...]


@dataclass(frozen=True)
class ImageLoader:
    """:func:`read_image` as the loader of a data set; of equal ``bits`` they are equal."""

    bits: int | None = None

    def __call__(self, file: str | Path) -> Image.Image:
        return read_image(file, self.bits)


def read_image(file: str | Path, bits: int | None = None, where: str = "image") -> Image.Image:
    """An image file in mode RGB, upright; the module says what is done to each kind.

    Args:
        file: of any format that Pillow reads.
        bits: how many the values of 16-bit and integer images have; None for all of the mode.
        where: who asks, for messages.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or only by guessing what its values mean.
    """
    try:
        return decode_image(file, bits).rgb
    except FileNotFoundError:
        got = f"none at {ascii_name(file)}"
        raise FileNotFoundError(message(where, "an image", got, "Check the path.")) from None
    except ValueError as error:
        raise ValueError(message(f"{where} {ascii_name(file)}", "an image", error, "")) from error


def decode_image(file: str | Path, bits: int | None = None) -> DecodedImage:
    """As :func:`read_image`, with what the file says.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: why it cannot be read, without its name.
    """
    _check_file(file)
    try:
        with Image.open(file) as image:
            _check_size(image)
            mode, kind, raw = image.mode, str(image.format), _raw_mode(image)
            _check_frames(image)
            image.load()
            upright, turned = _turn_upright(image)
            rgb, changes = _convert(upright, image, raw, bits)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(_too_large()) from None
    except UnidentifiedImageError:
        raise ValueError("not an image") from None
    except ValueError:
        raise
    except Exception as error:  # Pillow raises many kinds
        reason = str(error).replace(f"'{file}'", "it")
        raise ValueError(f"{type(error).__name__}: {reason}") from error
    return DecodedImage(rgb, kind, mode, (*changes, *turned))


def read_mask(file: str | Path, image: str | Path) -> Bool[np.ndarray, "h w"]:
    """Which pixels of a mask are not black, upright like the image that it belongs to.

    Args:
        file: of the mask.
        image: file of the image. If that has an EXIF orientation and the mask has none, the sizes
            must tell whether the mask was drawn on the stored or on the upright image.

    Raises:
        FileNotFoundError: if one of them is not there.
        ValueError: if the mask cannot be read, or fits both ways.
    """
    where = f"mask {ascii_name(file)}"
    try:
        _check_file(file)
        with Image.open(file) as mask:
            _check_size(mask)
            _check_frames(mask)
            mask.load()
            upright, turned = _turn_upright(mask)
            if upright.mode in (*_INTEGERS, "F"):
                inside = np.asarray(upright) != 0
            else:
                pixels = np.asarray(upright.convert("RGBA"))
                inside = pixels[..., :3].any(2) & (pixels[..., 3] > 0)
        turn = None if turned else _turn_of_mask(inside, image)
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow raises many kinds
        fix = "Save it as PNG with one value for the background, black."
        raise ValueError(message(where, "a readable mask", error, fix)) from error
    if turn is None:
        return inside
    return np.asarray(Image.fromarray(inside.astype(np.uint8)).transpose(turn)) > 0


def ascii_name(file: object) -> str:
    """A path as text that can be written anywhere; bytes that are no UTF-8 are spelt out.

    Example:
        >>> ascii_name("a/ü.png"), ascii_name("b\\udcff.png")
        ('a/ü.png', "'b\\\\udcff.png'")
    """
    return str(file) if is_text(file) else ascii(str(file))


def is_text(name: object) -> bool:
    """Whether a name can be written as UTF-8: Python has stand-ins for bytes that cannot."""
    return not any("\ud800" <= sign <= "\udfff" for sign in str(name))


def _check_file(file: str | Path) -> None:
    """Only a regular file is opened: a FIFO would be waited for."""
    if not is_text(file):
        raise ValueError("a name that is not UTF-8; rename it")
    try:
        about = os.stat(file)
    except FileNotFoundError:
        raise
    except OSError as error:  # a link to itself, or a folder that may not be entered
        raise ValueError(error.strerror) from None
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("a folder" if stat.S_ISDIR(about.st_mode) else "no regular file")
    if not about.st_size:
        raise ValueError("an empty file")


def _check_size(image: Image.Image) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(_too_large(image.size))


def _too_large(size: tuple[int, int] | None = None) -> str:
    got = f"{size[0]:,} x {size[1]:,}" if size else "too many"
    limit = Image.MAX_IMAGE_PIXELS or 0
    return f"{got} pixels, where at most {limit:,} are read; make it smaller or cut it into parts"


def _check_frames(image: Image.Image) -> None:
    if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
        raise ValueError(f"{frames} frames or pages; save the one that is meant by itself")


def _raw_mode(image: Image.Image) -> str:
    """How the pixels lie in the file, such as RGB;16B."""
    for tile in image.tile if hasattr(image, "tile") else []:
        found = tile[3] if isinstance(tile[3], str) else (tile[3] or ("",))[0]
        return found if isinstance(found, str) else ""
    return ""


def _turn_upright(image: Image.Image) -> tuple[Image.Image, list[str]]:
    turn = _TURNS.get(_get_orientation(image))
    if turn is None:
        return image, []
    return image.transpose(turn), ["turned as its EXIF orientation says"]


def _get_orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged EXIF block says nothing, and leaves the pixels as they are
        return 1


def _turn_of_mask(inside: Bool[np.ndarray, "h w"], image: str | Path) -> Image.Transpose | None:
    """How a mask without an orientation is brought upright; None as it is."""
    _check_file(image)
    with Image.open(image) as opened:
        turn = _TURNS.get(_get_orientation(opened))
        tags = getattr(opened, "tag_v2", {})  # of TIFF, whose size Pillow turns by itself
        stored = (tags.get(256, opened.width), tags.get(257, opened.height))
    if turn is None:
        return None
    height, width = inside.shape
    upright = stored[::-1] if turn in _SIDEWAYS else stored
    if upright != stored and (width, height) == upright:
        return None
    if upright != stored and (width, height) == stored:
        return turn
    raise ValueError(
        f"{width} x {height} pixels beside {ascii_name(image)}, whose EXIF orientation leaves open "
        "how the mask lies on it; save the image upright, without orientation"
    )


def _convert(
    image: Image.Image, opened: Image.Image, raw: str, bits: int | None
) -> tuple[Image.Image, list[str]]:
    """An image in RGB, and what was done to it."""
    mode = image.mode
    if mode == "F":
        raise ValueError(
            "floating-point values (mode F), of which nothing says what is black and white; "
            "save it with 8 or 16 bits"
        )
    if mode in _INTEGERS:
        return _convert_integers(image, opened, raw, bits)
    palette = getattr(image.palette, "mode", "") if mode == "P" else ""
    if mode in _WITH_ALPHA or "transparency" in image.info or palette.endswith("A"):
        rgb, changes = _put_on_black(image, raw), ["transparent parts are read as black"]
    else:
        rgb, changes = image.convert("RGB"), []
    if ";16" in raw:
        changes.append("of 16 bits the upper 8 are read")
        if bits is None and 0 < int(np.asarray(rgb).max()) < 16:
            raise ValueError(
                "16-bit colours without a value of 4,096 or more, which might be 12 bits and are "
                "nearly black; scale them to the whole range"
            )
    return rgb, changes


def _convert_integers(
    image: Image.Image, opened: Image.Image, raw: str, bits: int | None
) -> tuple[Image.Image, list[str]]:
    values: Float[np.ndarray, "h w"] = np.asarray(image).astype(np.float64)
    used = 12 if raw == "I;12" else bits
    if used is None and image.mode == "I" and opened.format not in ("PNG", "PPM"):
        raise ValueError(
            f"32-bit integers (mode I) from {values.min():,.0f} to {values.max():,.0f}, of which "
            "nothing says what is white; set bits, or save it with 8 or 16 bits"
        )
    top = 2.0 ** (used or 16) - 1
    if getattr(opened, "tag_v2", {}).get(262) == 0:  # WhiteIsZero, which Pillow minds up to 8 bits
        values = top - values
    low, high = values.min(), values.max()
    if low < 0 or high > top:
        raise ValueError(f"values from {low:,.0f} to {high:,.0f} beyond [0, {top:,.0f}]; set bits")
    if used is None and 0 < high < _DOUBTFUL:
        raise ValueError(
            f"16-bit values up to {high:,.0f} alone, which might be 12 bits and are nearly black; "
            "set bits: 12 (or 10, 14, 16), or scale them to the whole range"
        )
    if (clear := image.info.get("transparency")) is not None:
        values = np.where(np.asarray(image) == clear, 0, values)
    grey: UInt8[np.ndarray, "h w"] = np.floor(values * 255 / top + 0.5).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB"), [f"[0, {top:,.0f}] is read as [0, 255]"]


def _put_on_black(image: Image.Image, raw: str) -> Image.Image:
    if image.mode in ("La", "RGBa"):  # their colours are multiplied by the opacity already
        bands = image.split()
        alpha, colours = bands[-1], bands[:-1]
        rgb = Image.merge("RGB", [*colours] * (3 // len(colours)))
        opacity = np.asarray(alpha)
    else:
        if image.mode in ("1", "L", "RGB") and (";" in raw or image.mode == "1"):
            raise ValueError(
                f"a transparent colour in {raw or image.mode} pixels, which Pillow does not find; "
                "save it without transparency"
            )
        pixels = np.asarray(image.convert("RGBA")).astype(np.uint16)
        opacity = pixels[..., 3]
        rgb = Image.fromarray(
            ((pixels[..., :3] * opacity[..., None] + 127) // 255).astype(np.uint8)
        )
    if not opacity.any():
        raise ValueError("an image that is wholly transparent; save it without transparency")
    return rgb
