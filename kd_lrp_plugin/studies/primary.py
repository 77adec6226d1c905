"""The primary comparison of a study: what it is judged by, written down before it runs.

.. code-block:: yaml

    primary:
      measure: groups.by_group.random.accuracy
      configuration: signed relative L2
      minus: [KD, attention transfer]
      where: {marker: patch}      # the point of the grid; without a grid it is left out

It is judged once, when every seed of the study is finished; seeds that are added after a look at
the others would make a difference out of chance, so that they are refused. A study with overrides
from the command line is not the one that was registered, and has no primary comparison.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kd_lrp_plugin.metrics.statistics import holm, paired_difference
from kd_lrp_plugin.studies.comparison import Row, get_values
from kd_lrp_plugin.utils.validation import check_known, message

KEYS = ("measure", "configuration", "minus", "where")
_NEW = "Write a study of its own for them, with a question and seeds that were not used before."


@dataclass(frozen=True)
class Primary:
    """The comparison that a study was registered for.

    Attributes:
        measure: one of the study's.
        configuration: whose values are compared.
        minus: configurations that they are compared with, seed by seed.
        where: the point of the grid.
        seeds: all that it takes, those of the study's file.
    """

    measure: str
    configuration: str
    minus: tuple[str, ...]
    where: Mapping[str, Any]
    seeds: tuple[int, ...]

    def record(self) -> dict[str, Any]:
        """As ``study.json`` holds it."""
        return {**asdict(self), "minus": list(self.minus), "seeds": list(self.seeds)}


def read_primary(
    file: Path,
    content: Mapping[str, Any],
    measures: Sequence[str],
    axes: Mapping[str, Mapping[Any, Any]],
    seeds: tuple[int, ...],
) -> Primary | None:
    """What a study's file says of its primary comparison; None where it says nothing.

    Args:
        file: of the study, for messages.
        content: of the file.
        measures: of the study.
        axes: of its grid, with their values.
        seeds: of the file.

    Raises:
        ValueError: for a part that is missing or not in the study.
    """
    given = content.get("primary")
    if given is None:
        return None
    where = f"{file}: primary"
    if not isinstance(given, Mapping) or not all(given.get(key) for key in KEYS[:3]):
        expected, fix = f"a mapping with {', '.join(KEYS[:3])}", "Name what is compared."
        raise ValueError(message(where, expected, repr(given)[:80], fix))
    for key in given:
        check_known(f"{where}: key", key, KEYS)
    known = [str(name) for name in content["configurations"]]
    minus = given["minus"] if isinstance(given["minus"], list) else [given["minus"]]
    check_known(f"{where}: measure", given["measure"], measures)
    check_known(f"{where}: configuration", given["configuration"], known)
    for name in minus:
        others = [other for other in known if other != given["configuration"]]
        check_known(f"{where}: minus", name, others)
    given_point = given.get("where") or {}
    for name in (given["configuration"], *minus):
        crossed = content["configurations"][name].get("axes", list(axes))
        if name == given["configuration"] and set(given_point) != set(crossed):
            fix = "Name one value of each axis that the configuration is crossed with."
            expected = f"a value of each of {crossed}"
            raise ValueError(message(f"{where}: where", expected, sorted(given_point), fix))
        if further := [axis for axis in crossed if axis not in given_point]:
            fix = "Compare with a configuration that has no axes beyond those of where."
            got = f"{name!r}, which has {further} too"
            raise ValueError(message(f"{where}: minus", f"axes among {[*given_point]}", got, fix))
    point = {axis: _find_value(where, axis, axes[axis], v) for axis, v in given_point.items()}
    return Primary(given["measure"], given["configuration"], tuple(minus), point, seeds)


def _find_value(where: str, axis: str, known: Iterable[Any], given: Any) -> Any:
    """The value of an axis that is meant: 0.1 and "0.1" are one, and a list is its text."""

    def spell(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    equal = [value for value in known if value == given]
    spelt = {spell(value): value for value in known}
    if not equal:
        check_known(f"{where}: where: {axis}", spell(given), spelt)
    return equal[0] if equal else spelt[spell(given)]


def refuse_further_seeds(file: Path, primary: Primary | None, seeds: Sequence[int]) -> None:
    """Raise ValueError for seeds beyond those that a primary comparison was registered with."""
    if primary and (further := [seed for seed in seeds if seed not in primary.seeds]):
        expected = f"the seeds of its primary comparison, {list(primary.seeds)}"
        raise ValueError(message(f"{file}: seeds", expected, f"further ones, {further}", _NEW))


def judge_primary(primary: Primary | None, rows: Sequence[Row]) -> dict[str, Any] | None:
    """The primary comparison as far as the runs have come.

    Args:
        primary: of the study.
        rows: of its runs, see :mod:`kd_lrp_plugin.studies.comparison`.

    Returns:
        What :class:`Primary` holds; ``differences``, for each of ``minus`` what
        :func:`~kd_lrp_plugin.metrics.statistics.paired_difference` returns, ``reference``, and
        ``p_holm``, corrected for these alone; ``complete``, whether every seed is in. None
        without a primary comparison.
    """
    if primary is None:
        return None

    def values(name: str) -> dict[int, float]:
        at = [
            row
            for row in rows
            if row["configuration"] == name
            and all(primary.where.get(axis) == value for axis, value in row["point"].items())
        ]
        return get_values(at, primary.measure)

    ours = values(primary.configuration)
    found = [{"reference": name, **paired_difference(ours, values(name))} for name in primary.minus]
    corrected = holm([record["p"] for record in found])
    differences = [record | {"p_holm": p} for record, p in zip(found, corrected, strict=True)]
    complete = all(record["n"] == len(primary.seeds) for record in found)
    return {**primary.record(), "differences": differences, "complete": complete}
