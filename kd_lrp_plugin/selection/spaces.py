"""Spaces of students to choose from: MobileNetV2 of any width, depth, kernels, expansions, head."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from kd_lrp_plugin.models.mobilenetv2 import MobileNetV2
from kd_lrp_plugin.utils.registry import Registry
from kd_lrp_plugin.utils.validation import check_known, message


@dataclass(frozen=True)
class Space:
    """Every combination of some choices.

    Attributes:
        choices: by attribute of :class:`MobileNetV2`, the values that it may take; the others keep
            their defaults. "kernels" and "expansions" are chosen for each stage by itself.

    Example:
        >>> space = Space({"width": (0.35, 1.0), "head": ("linear", "mlp")})
        >>> len(space), [str(student) for student in space][0]
        (4, 'width0.35-depth1-linear')
    """

    choices: Mapping[str, Sequence[Any]]

    def __post_init__(self) -> None:
        known = [field.name for field in fields(MobileNetV2)]
        for name, values in self.choices.items():
            check_known("Space: choice", name, known)
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                fix = "For example [0.35, 1.0]."
                raise ValueError(message(f"Space: {name}", "a list of values", values, fix))
        next(iter(self))

    def axes(self) -> dict[str, Sequence[Any]]:
        """The independent choices by name, such as "width" or "kernels.3"."""
        found: dict[str, Sequence[Any]] = {}
        for name, values in self.choices.items():
            stages = {"kernels": 7, "expansions": 6}.get(name)
            names = [f"{name}.{stage}" for stage in range(stages)] if stages else [name]
            found |= {axis: list(values) for axis in names}
        return found

    def student(self, chosen: Mapping[str, Any]) -> MobileNetV2:
        """The student of one value per axis."""
        kwargs: dict[str, Any] = {}
        for name in self.choices:
            if name in chosen:
                kwargs[name] = chosen[name]
            else:
                stages = 7 if name == "kernels" else 6
                kwargs[name] = tuple(chosen[f"{name}.{stage}"] for stage in range(stages))
        return MobileNetV2(**kwargs)

    def __len__(self) -> int:
        return math.prod(len(values) for values in self.axes().values())

    def __iter__(self) -> Iterator[MobileNetV2]:
        axes = self.axes()
        for values in itertools.product(*axes.values()):
            yield self.student(dict(zip(axes, values, strict=True)))


SPACES: Registry[Space] = Registry("space")
THESIS = SPACES.register(
    Space({"width": (0.35, 0.5, 0.75, 1.0), "depth": (0.5, 1.0), "head": ("linear", "mlp")}),
    "thesis",
)
"""16 variants, by 4 widths, 2 depths and 2 heads; the thesis does not list its own. Its three
published counts are those of three of them."""
LARGE = SPACES.register(
    Space(
        {
            "width": (0.25, 0.35, 0.5, 0.6, 0.75, 0.9, 1.0),
            "depth": (0.5, 0.75, 1.0),
            "kernels": (3, 5),
            "expansions": (3, 6),
            "head": ("linear", "mlp"),
        }
    ),
    "large",
)
"""344,064 architectures, for search."""
