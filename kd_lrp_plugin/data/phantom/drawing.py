"""The drawing of the brain-MRI phantom: anatomy, tumours and scanner, from one random stream.

A drawing, not anatomy: good for trying, testing and demonstrating, no ground for any clinical
claim.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import cos, pi, sin
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy.ndimage import gaussian_filter

CLASSES = ("glioma", "meningioma", "notumor", "pituitary")

# Head coordinates: x to the right, y down, the image's half-width is 1 before the pose is applied.
# The brain's outline is a radius over the angle: an ellipse with one notch, where the skull base
# with the sella (the pituitary's seat) reaches in.


class Ellipse(NamedTuple):
    """An ellipse of one tissue; ``mirror`` draws it on both sides of x = 0."""

    tissue: str
    x: float
    y: float
    width: float
    height: float
    turn: float = 0.0
    mirror: bool = False


class View(NamedTuple):
    axes: tuple[float, float]  # half-width and half-height of the brain
    sella: float  # direction of the notch, radians from +x towards +y
    notch: tuple[float, float]  # depth (part of the radius) and width (radians)
    centre: tuple[float, float]
    outside: tuple[Ellipse, ...]  # drawn before the skull
    inside: tuple[Ellipse, ...]  # drawn after it


_VIEWS = {
    "axial": View(
        axes=(0.74, 0.86),
        sella=-pi / 2,
        notch=(0.76, 0.40),
        centre=(0.0, 0.06),
        outside=(
            Ellipse("muscle", 0.0, -0.62, 0.62, 0.42),
            Ellipse("muscle", 0.0, -0.98, 0.13, 0.20),
            Ellipse("air", 0.0, -0.62, 0.12, 0.24),
            Ellipse("muscle", 0.0, -0.62, 0.02, 0.24),
            Ellipse("fat", 0.36, -0.72, 0.22, 0.24, mirror=True),
            Ellipse("fluid", 0.37, -0.80, 0.15, 0.15, mirror=True),
            Ellipse("muscle", 0.26, -0.55, 0.03, 0.14, -0.5, mirror=True),
        ),
        inside=(
            Ellipse("bone", 0.50, 0.16, 0.27, 0.045, -0.45, mirror=True),
            Ellipse("fluid", 0.0, -0.06, 0.20, 0.10),
            Ellipse("white", 0.0, 0.10, 0.17, 0.15),
            Ellipse("fluid", 0.0, 0.26, 0.06, 0.05),
            Ellipse("grey", 0.27, 0.46, 0.25, 0.22, 0.3, mirror=True),
            Ellipse("white", 0.0, 0.46, 0.09, 0.20),
        ),
    ),
    "coronal": View(
        axes=(0.76, 0.74),
        sella=pi / 2,
        notch=(0.48, 0.34),
        centre=(0.0, -0.14),
        outside=(
            Ellipse("muscle", 0.0, 0.80, 0.62, 0.60),
            Ellipse("fat", 0.52, 0.95, 0.14, 0.45, 0.2, mirror=True),
            Ellipse("air", 0.0, 0.62, 0.15, 0.13),
            Ellipse("bone", 0.33, 0.82, 0.07, 0.22, 0.2, mirror=True),
            Ellipse("air", 0.0, 1.02, 0.10, 0.16),
        ),
        inside=(
            Ellipse("fluid", 0.0, -0.50, 0.012, 0.24),
            Ellipse("white", 0.0, -0.20, 0.22, 0.05),
            Ellipse("fluid", 0.12, -0.12, 0.13, 0.050, -0.45, mirror=True),
            Ellipse("grey", 0.14, 0.06, 0.11, 0.10, mirror=True),
            Ellipse("grey", 0.32, 0.02, 0.06, 0.13, -0.2, mirror=True),
            Ellipse("fluid", 0.0, 0.08, 0.022, 0.11),
            Ellipse("fluid", 0.60, 0.10, 0.13, 0.018, 0.35, mirror=True),
            Ellipse("fluid", 0.0, 0.30, 0.16, 0.05),
        ),
    ),
    "sagittal": View(
        axes=(0.84, 0.66),
        sella=pi / 2 + 0.50,
        notch=(0.38, 0.34),
        centre=(0.03, -0.18),
        outside=(
            Ellipse("muscle", -0.50, 0.62, 0.44, 0.62),
            Ellipse("fat", -0.90, 0.42, 0.10, 0.22, 0.35),
            Ellipse("fat", -0.72, 0.98, 0.20, 0.10),
            Ellipse("air", -0.52, 0.44, 0.22, 0.10, 0.2),
            Ellipse("bone", -0.50, 0.66, 0.30, 0.035),
            Ellipse("air", -0.36, 0.74, 0.22, 0.03),
            Ellipse("air", -0.10, 0.86, 0.05, 0.34),
            Ellipse("muscle", 0.34, 0.95, 0.34, 0.55),
            Ellipse("bone", 0.06, 0.92, 0.07, 0.34),
        ),
        inside=(
            Ellipse("fluid", 0.16, 0.30, 0.26, 0.24),
            Ellipse("white", -0.02, -0.03, 0.40, 0.21, 0.06),
            Ellipse("fluid", -0.01, 0.03, 0.34, 0.15, 0.06),
            Ellipse("grey", 0.05, 0.09, 0.24, 0.13),
            Ellipse("grey", 0.47, 0.36, 0.24, 0.17, -0.4),
            Ellipse("white", 0.42, 0.36, 0.10, 0.03, -0.3),
            Ellipse("white", 0.13, 0.34, 0.10, 0.22, -0.25),
            Ellipse("white", 0.19, 0.66, 0.07, 0.30, -0.1),
        ),
    ),
}
_SKULL = (1.03, 1.13, 1.21)  # outer borders of fluid, bone and scalp, as part of the brain's radius
# Brightness of the tissues in the two kinds of contrast that every image mixes.
_T1 = {
    "air": 0.02, "bone": 0.06, "fat": 0.85, "muscle": 0.34, "fluid": 0.10, "grey": 0.36,
    "white": 0.47, "vessel": 0.80,
}  # fmt: skip
_T2 = {
    "air": 0.02, "bone": 0.07, "fat": 0.62, "muscle": 0.20, "fluid": 0.80, "grey": 0.50,
    "white": 0.36, "vessel": 0.12,
}  # fmt: skip


class Scene(NamedTuple):
    """One phantom image with what is known about it.

    Attributes:
        image: grey values.
        tumour: the tumour's pixels; none in class notumor. Oedema is not part of it.
        brain: the pixels inside the skull's inner border.
        sella: x and y, in pixels, of the pituitary's seat.
        view: axial (at the level of the skull base), coronal or sagittal (in the midline).
    """

    image: UInt8[np.ndarray, "h w"]
    tumour: Bool[np.ndarray, "h w"]
    brain: Bool[np.ndarray, "h w"]
    sella: tuple[float, float]
    view: str


class SliceRenderer:
    """One slice in the making: a canvas in head coordinates, and its random stream.

    What depends on the image size is drawn last, so that the geometry does not depend on it.
    """

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.size, self.rng = size, rng
        self.name = list(_VIEWS)[rng.integers(len(_VIEWS))]
        self.view = _VIEWS[self.name]
        t1 = rng.uniform(0.8, 1.0) if rng.random() < 0.8 else rng.uniform(0.0, 0.3)
        self.tone = {
            tissue: max(0.0, t1 * _T1[tissue] + (1 - t1) * _T2[tissue] + 0.03 * rng.normal())
            for tissue in _T1
        }
        turn, scale, aspect = (
            rng.uniform(-0.15, 0.15),
            rng.uniform(0.85, 1.0),
            rng.uniform(0.95, 1.05),
        )
        wide, high = self.sign() * scale * aspect, scale / aspect
        self.to_image = (
            (wide * cos(turn), -high * sin(turn)),
            (wide * sin(turn), high * cos(turn)),
        )
        self.centre = [middle + rng.uniform(-0.04, 0.04) for middle in self.view.centre]
        self.waves = rng.normal(0, 0.012, (4, 2)).tolist()
        steps = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
        column, row = steps[None] - self.centre[0], steps[:, None] - self.centre[1]
        self.x = column * (cos(turn) / wide) + row * (sin(turn) / wide)
        self.y = row * (cos(turn) / high) - column * (sin(turn) / high)
        self.pixel = 2 / size / scale
        self.angle = np.arctan2(self.y, self.x)
        self.radius = np.sqrt(self.x**2 + self.y**2)
        self.border = self.outline(self.angle)
        self.depth = self.border - self.radius  # from the skull's inner border, along the radius
        self.canvas = np.full((size, size), self.tone["air"], np.float32)

    def outline(self, angle: Any) -> Any:
        """Distance of the brain's border from the origin in the direction ``angle``."""
        (a, b), (notch, width) = self.view.axes, self.view.notch
        ellipse = a * b / np.sqrt((b * np.cos(angle)) ** 2 + (a * np.sin(angle)) ** 2)
        waves = sum(
            p * np.cos(k * angle) + q * np.sin(k * angle) for k, (p, q) in enumerate(self.waves, 2)
        )
        return ellipse * (1 + waves) * (1 - notch * _lobe(angle, self.view.sella, width))

    def at(self, angle: float, depth: float) -> tuple[float, float]:
        """The point ``depth`` inside the skull's inner border, in the direction ``angle``."""
        radius = float(self.outline(angle)) - depth
        return radius * cos(angle), radius * sin(angle)

    def somewhere(self, nearest: float) -> tuple[float, float]:
        """A random point of the brain, off the notch, ``nearest`` or more from the skull."""
        angle = self.view.sella + self.rng.uniform(2.2 * self.view.notch[1], pi) * self.sign()
        radius = float(self.outline(angle))
        return self.at(angle, radius - (radius - nearest) * self.rng.uniform(0.2, 1) ** 0.5)

    def pixels(self, x: float, y: float) -> tuple[float, float]:
        """Column and row of a point."""
        (a, b), (c, d) = self.to_image
        column, row = a * x + b * y + self.centre[0], c * x + d * y + self.centre[1]
        return ((column + 1) * self.size - 1) / 2, ((row + 1) * self.size - 1) / 2

    def sign(self) -> float:
        return -1.0 if self.rng.random() < 0.5 else 1.0

    def noise(self, cells: int) -> Float[np.ndarray, "h w"]:
        """Smooth noise of unit variance with ``cells`` cells along the image's side."""
        basis = _splines(self.size, cells)
        grid = self.rng.normal(size=(cells + 3, cells + 3)).astype(np.float32)
        return basis @ grid @ basis.T

    def blend(self, amount: Float[np.ndarray, "h w"], value: Any) -> None:
        self.canvas += amount * (value - self.canvas)

    def within(self, value: Any, limit: Any, soft: float | None = None) -> Any:
        """1 where ``value`` < ``limit``, 0 beyond, with an edge ``soft`` wide (one pixel)."""
        return np.clip((limit - value) / (soft or self.pixel) + 0.5, 0, 1)

    def distance(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        turn: float = 0.0,
        window: tuple[slice, ...] = (),
    ) -> Float[np.ndarray, "h w"]:
        """Distance from a point in units of an ellipse's half-axes: below 1 inside."""
        dx, dy = self.x[window] - x, self.y[window] - y
        along = dx * (cos(turn) / width) + dy * (sin(turn) / width)
        across = dy * (cos(turn) / height) - dx * (sin(turn) / height)
        return np.sqrt(along * along + across * across)

    def spot(
        self, x: float, y: float, width: float, height: float, turn: float, value: float
    ) -> None:
        reach = max(width, height) / self.pixel * 1.1 + 2  # in pixels; only this window is drawn
        window = tuple(
            slice(max(0, int(middle - reach)), max(0, int(middle + reach) + 1))
            for middle in reversed(self.pixels(x, y))
        )
        distance = self.distance(x, y, width, height, turn, window)
        amount = self.within(distance, 1, 1.5 * self.pixel / min(width, height))
        self.canvas[window] += amount * (value - self.canvas[window])

    def parts(self, parts: Sequence[Ellipse]) -> None:
        for part in parts:
            dx, dy = self.rng.normal(0, 0.012, 2).tolist()
            grow = self.rng.uniform(0.85, 1.2)
            for side in (1, -1) if part.mirror else (1,):
                centre = (side * (part.x + dx), part.y + dy)
                extent = (part.width * grow, part.height * grow)
                self.spot(*centre, *extent, side * part.turn, self.tone[part.tissue])

    def anatomy(self) -> None:
        """Everything of the head that belongs there."""
        tone, (fluid, bone, scalp) = self.tone, _SKULL
        self.parts(self.view.outside)
        self.blend(self.within(self.radius, scalp * self.border), tone["fat"])
        self.canvas *= 1 + 0.2 * self.noise(20)
        self.blend(self.within(self.radius, bone * self.border), tone["bone"])
        marrow = np.exp(-(((self.radius - 1.08 * self.border) / 0.012) ** 2))
        self.blend(self.rng.uniform(0, 0.7) * marrow, tone["fat"])
        self.blend(self.within(self.radius, fluid * self.border), tone["fluid"])
        # Cortex: a grey ribbon along the border and the furrows, which follow a noise's zeros.
        furrow = np.abs(self.noise(int(self.rng.integers(13, 20))))
        outer = self.within(self.depth, 0.26, 0.2)
        grey = np.maximum(
            outer * self.within(furrow, 0.5, 0.3), self.within(self.depth, 0.05, 0.03)
        )
        tissue = tone["white"] + grey * (tone["grey"] - tone["white"]) + 0.015 * self.noise(30)
        tissue += 0.85 * outer * self.within(furrow, 0.15, 0.2) * (tone["fluid"] - tissue)
        self.blend(self.within(self.radius, self.border), tissue)
        self.parts(self.view.inside)

    def look_alikes(self) -> None:
        """What is no tumour but resembles one, drawn independently of the class."""
        rng, tone = self.rng, self.tone
        for _ in range(rng.integers(0, 5)):  # vessels
            width, height = rng.uniform(0.01, 0.03, 2)
            self.spot(*self.somewhere(0.0), width, height, rng.uniform(0, pi), tone["vessel"])
        if rng.random() < 0.6:  # sinus, opposite of the skull base
            width, height = rng.uniform(0.03, 0.07, 2)
            self.spot(*self.at(self.view.sella + pi, 0.0), width, height, 0.0, tone["vessel"])
        if rng.random() < 0.3:  # calcification or cavernoma: even and smooth, but inside the tissue
            width = rng.uniform(0.03, 0.08)
            value = tone["white"] + self.sign() * rng.uniform(0.1, 0.4)
            self.spot(*self.somewhere(0.12), width, width * rng.uniform(0.7, 1), 0.0, value)
        if rng.random() < 0.2:  # cyst: at the skull's border, but as dark or bright as fluid
            width = rng.uniform(0.06, 0.16)
            height = width * rng.uniform(0.4, 0.9)
            self.spot(*self.somewhere(0.0), width, height, rng.uniform(0, pi), tone["fluid"])
        if rng.random() < 0.2:  # thick dura
            stretch = _lobe(self.angle, rng.uniform(-pi, pi), rng.uniform(0.2, 0.5))
            self.blend(
                np.exp(-((self.depth / 0.03) ** 2)) * stretch, tone["white"] + rng.uniform(0.1, 0.4)
            )
        if rng.random() < 0.25:  # old lesion of the white matter
            self.swelling(*self.somewhere(0.15), rng.uniform(0.1, 0.25))
        width = rng.uniform(0.025, 0.045)  # the normal gland
        self.spot(*self.at(self.view.sella, 0.0), width, width, 0.0, tone["white"] + 0.2)

    def swelling(self, x: float, y: float, radius: float) -> None:
        reach = self.distance(x, y, radius, radius) + 0.35 * self.noise(9)
        amount = self.within(reach, 1, 0.4) * self.within(-self.depth, -0.03, 0.03)
        self.blend(self.rng.uniform(0.2, 0.45) * amount, self.tone["fluid"])

    def glioma(self, contrast: float) -> Bool[np.ndarray, "h w"]:
        rng, radius = self.rng, self.rng.uniform(0.15, 0.32)
        x, y = self.somewhere(0.12)
        self.swelling(x, y, radius * rng.uniform(1.2, 1.9))
        reach = self.distance(x, y, radius, radius * rng.uniform(0.75, 1), rng.uniform(0, pi))
        reach += 0.35 * np.clip(self.noise(12), -1.3, 1.3)
        ring = np.exp(-(((reach - 0.8) / rng.uniform(0.12, 0.25)) ** 2))
        core = self.within(reach, 0.65, 0.2)
        patchy = 0.3 * self.sign() + 0.7 * self.noise(18)
        ringed = rng.uniform(0.4, 1.0)
        change = ringed * (1.5 * ring - 0.6 * core) + (1 - ringed) * patchy
        # Beside the notch the skull is nearer than along the radius.
        depth = self.depth - 0.1 * _lobe(self.angle, self.view.sella, 2 * self.view.notch[1])
        away = self.within(-depth, -0.06, 0.02)
        amount = self.within(reach, 1, 1.5 * self.pixel / radius) * away
        self.blend(amount, self.tone["white"] + contrast * change)
        return (reach < 1) & (depth > 0.06)

    def meningioma(self, contrast: float) -> Bool[np.ndarray, "h w"]:
        rng, radius = self.rng, self.rng.uniform(0.15, 0.30)
        angle = self.view.sella + rng.uniform(2.2 * self.view.notch[1], pi) * self.sign()
        x, y = self.at(angle, radius * rng.uniform(0.1, 0.75))
        reach = self.distance(x, y, radius, radius * rng.uniform(1, 1.35), angle)
        reach += 0.05 * self.noise(6)
        tail = np.exp(-((self.depth / 0.025) ** 2)) * _lobe(self.angle, angle, 2.2 * radius)
        value = self.tone["white"] + contrast
        self.blend(rng.uniform(0, 0.9) * tail, value)
        inside = self.within(-self.depth, 0.0)
        self.blend(self.within(reach, 1, 1.5 * self.pixel / radius) * inside, value)
        return (reach < 1) & (self.depth > 0)

    def pituitary(self, contrast: float) -> Bool[np.ndarray, "h w"]:
        rng, radius = self.rng, self.rng.uniform(0.10, 0.19)
        start = rng.uniform(-0.03, 0.05)
        low = self.distance(*self.at(self.view.sella, start), radius, radius)
        high = self.distance(
            *self.at(self.view.sella, start + radius * rng.uniform(0.3, 1)), radius, radius
        )
        reach = np.minimum(low, high / rng.uniform(0.6, 0.9)) + 0.04 * self.noise(6)
        value = self.tone["white"] + contrast
        self.blend(self.within(reach, 1, 1.5 * self.pixel / radius), value)
        return reach < 1

    def scan(self) -> UInt8[np.ndarray, "h w"]:
        """The scanner's share: bias field, brightness, blur, noise, eight bits."""
        rng = self.rng
        bias = np.exp(0.18 * self.noise(2)) * rng.uniform(0.75, 1.2)
        blur, level, gamma = rng.uniform(0.2, 0.7), rng.uniform(0.01, 0.04), rng.uniform(0.85, 1.2)
        image = gaussian_filter(np.clip(self.canvas, 0, None) * bias, blur * self.size / 96)
        noise = rng.normal(0, level, (2, self.size, self.size)).astype(np.float32)
        image = np.sqrt((image + noise[0]) ** 2 + noise[1] ** 2)  # magnitude of a complex signal
        return (255 * np.clip(image, 0, 1) ** gamma).astype(np.uint8)


def draw(kind: str, size: int, rng: np.random.Generator) -> Scene:
    """A slice of ``size`` pixels square with a tumour of class ``kind``, one of ``CLASSES``."""
    head = SliceRenderer(size, rng)
    head.anatomy()
    head.look_alikes()
    tumours = {"glioma": head.glioma, "meningioma": head.meningioma, "pituitary": head.pituitary}
    contrast = rng.uniform(0.3, 0.65)
    tumour = tumours[kind](contrast) if kind in tumours else np.zeros((size, size), bool)
    sella = head.pixels(*head.at(head.view.sella, 0.0))
    return Scene(head.scan(), tumour, head.depth > 0, sella, head.name)


def _lobe(angle: Any, centre: float, width: float) -> Any:
    """A bell curve over the circle, 1 at ``centre``."""
    return np.exp((np.cos(angle - centre) - 1) * (2 / width**2))


@lru_cache(maxsize=64)
def _splines(size: int, cells: int) -> Float[np.ndarray, "size knots"]:
    """Cubic B-splines at the pixel centres, one column per knot, rows of unit length."""
    position = (np.arange(size) + 0.5) / size * cells
    away = np.abs(position[:, None] + 1 - np.arange(cells + 3))
    basis = np.where(away < 1, 2 / 3 - away**2 + away**3 / 2, np.clip(2 - away, 0, None) ** 3 / 6)
    return (basis / np.linalg.norm(basis, axis=1, keepdims=True)).astype(np.float32)
