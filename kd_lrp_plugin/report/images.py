"""Figures and picture files as data URIs, which a page can hold."""

import base64
import io
import math
from pathlib import Path
from typing import Any

from PIL import Image

from kd_lrp_plugin.utils.extras import imports_of_an_extra

with imports_of_an_extra():
    from matplotlib import rc_context
    from matplotlib.figure import Figure

SIDES = (1600, 16000)  # largest width and height that a screen has use for, in pixels


def vector(figure: Figure) -> dict[str, Any]:
    """A figure as SVG: the same bytes for the same figure. Its text stays text, which is short.

    Returns:
        ``source``, a data URI, and ``width`` and ``height`` in pixels.

    Example:
        >>> vector(Figure(figsize=(2, 1)))["width"]
        192
    """
    text = io.StringIO()
    with rc_context({"svg.hashsalt": "kd-lrp", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return _embedded("svg+xml", text.getvalue().encode(), (width, height))


def picture(file: str | Path, most: int) -> dict[str, Any]:
    """A picture as WebP, made smaller until it takes ``most`` bytes or is 100 pixels wide.

    Returns:
        As :func:`vector`.
    """
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    image.thumbnail(SIDES)
    while True:
        content = io.BytesIO()
        image.save(content, "WEBP", quality=88)
        size = len(content.getvalue())
        if size <= most or min(image.size) < 100:
            return _embedded("webp", content.getvalue(), image.size)
        shrink = min(0.9, 0.95 * math.sqrt(most / size))
        image.thumbnail((max(1, int(shrink * image.width)), max(1, int(shrink * image.height))))


def _embedded(kind: str, content: bytes, size: tuple[int, int]) -> dict[str, Any]:
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"source": source, "width": size[0], "height": size[1]}
