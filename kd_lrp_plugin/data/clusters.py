"""Subclasses that k-means finds among the features of images, and the table that keeps them."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.cluster.vq import ClusterError, kmeans2, vq

from kd_lrp_plugin.data.splits import check_first, find_column, read_table
from kd_lrp_plugin.utils.files import to_csv, write_text
from kd_lrp_plugin.utils.validation import message

Table = Mapping[str, tuple[str, str]]
"""By the name of an image, its class and its subclass."""


class FoundSubclasses(dict[str, tuple[str, str]]):
    """A table of subclasses whose names say nothing without what they were found by.

    Attributes:
        source: tells it from those of other models, numbers, seeds or images.
    """

    source = ""


WHERE = "kmeans_subclasses"
COLUMNS = ("image", "class", "subclass")
_STARTS, _ROUNDS = 10, 50


def find_clusters(
    features: Float[np.ndarray, "n d"],
    targets: Sequence[int],
    classes: Sequence[str],
    per_class: int,
    seed: int = 0,
) -> list[int]:
    """The cluster of each image among those of its class, by k-means; the largest is the first.

    Of ten starts, drawn by k-means++, the one with the least spread counts.

    Args:
        features: of the images.
        targets: class index of each.
        classes: names of the classes.
        per_class: clusters of each class.
        seed: of the starts; classes draw apart from each other.

    Returns:
        Numbers from 0, ordered by size; of clusters of one size, the one of the earliest image
        comes first.

    Raises:
        ValueError: for features that are not finite, a class with fewer images than clusters, or
            one whose images do not fall into so many.

    Example:
        >>> features = np.array([[0.0], [9.0], [0.1], [0.2], [5.0], [1.0]])
        >>> find_clusters(features, [0, 0, 0, 0, 1, 1], ["cat", "dog"], per_class=2)
        [0, 1, 0, 0, 0, 1]

    Reference:
        Lloyd, IEEE Transactions on Information Theory 1982; Arthur and Vassilvitskii, SODA 2007.
        Computed by SciPy.
    """
    check_enough(targets, classes, per_class)
    if not np.isfinite(features).all():
        got, fix = "others", "The model's weights are broken: train it again."
        raise ValueError(message(WHERE, "features of finite numbers", got, fix))
    found = np.zeros(len(targets), int)
    for label, name in enumerate(classes):
        members = np.flatnonzero(np.asarray(targets) == label)
        rng = np.random.default_rng([seed, label])
        numbers = _divide(features[members].astype(np.float64), per_class, rng)
        if numbers is None:
            got = "an empty one in every trial"
            fix = "Lower per_class: too few of its images differ in their features."
            raise ValueError(message(WHERE, f"{per_class} clusters of {name!r}", got, fix))
        found[members] = numbers
    return found.tolist()


def check_enough(targets: Sequence[int], classes: Sequence[str], per_class: int) -> None:
    """Raise ValueError for a class with fewer images than clusters."""
    for label, name in enumerate(classes):
        if (count := list(targets).count(label)) < per_class:
            got, fix = f"{count} of {name!r}", "Lower per_class, or give more images."
            expected = f"{per_class} images or more of each class"
            raise ValueError(message(WHERE, expected, got, fix))


def _divide(
    points: Float[np.ndarray, "n d"], clusters: int, rng: np.random.Generator
) -> np.ndarray | None:
    """The number of each point's cluster; None if one comes out empty in every trial."""
    if len(np.unique(points, axis=0)) < clusters:
        return None
    trials = []
    for _ in range(_STARTS):
        try:
            centres, _ = kmeans2(
                points, clusters, iter=_ROUNDS, minit="++", missing="raise", seed=rng
            )
        except ClusterError:
            continue
        numbers, distances = vq(points, centres)
        if len(np.unique(numbers)) == clusters:
            trials.append((float(np.square(distances).sum()), numbers))
    if not trials:
        return None
    _, numbers = min(trials, key=lambda trial: trial[0])
    _, first, counts = np.unique(numbers, return_index=True, return_counts=True)
    place = np.empty(clusters, int)
    place[np.lexsort((first, -counts))] = np.arange(clusters)
    return place[numbers]


def name_subclasses(classes: Iterable[str], per_class: int) -> list[str]:
    """Names of so many subclasses of each class that have none of their own.

    Example:
        >>> name_subclasses(["cat", "dog"], 2)
        ['cat 1', 'cat 2', 'dog 1', 'dog 2']
    """
    return [f"{name} {number}" for name in classes for number in range(1, per_class + 1)]


def write_table(file: Path, table: Table) -> None:
    """A CSV of columns image, class and subclass, all of it or nothing."""
    rows = [(name, *of_image) for name, of_image in table.items()]
    write_text(file, to_csv(COLUMNS, rows))


def read_subclass_table(csv: str | Path) -> dict[str, tuple[str, str]]:
    """The table in a CSV file; environment variables in its path are put in.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it cannot be read, lacks a column, or has an empty cell, an image twice or
            none.
    """
    file = Path(os.path.expandvars(csv)).expanduser()
    where = f"subclasses: table {file}"
    if not file.is_file():
        fix = "Give a CSV of columns image, class and subclass, or kmeans_subclasses."
        raise FileNotFoundError(message(where, "a file", "none", fix))
    columns, rows = read_table(file, words=COLUMNS)
    names = [find_column("subclasses", file, column, columns) for column in COLUMNS]
    table: dict[str, tuple[str, str]] = {}
    lines: dict[Any, int] = {}
    for line, row in rows:
        image, of_class, subclass = (row[name] for name in names)
        if not (image and of_class and subclass):
            at = f"{where} line {line}"
            raise ValueError(message(at, f"values of {COLUMNS}", "an empty cell", "Fill it in."))
        check_first(where, lines, image, line, image)
        table[image] = (of_class, subclass)
    if not table:
        raise ValueError(message(where, "a row for each image", "none", "Fill it in."))
    return table


def look_up(images: Any, given: str | Path | Table) -> tuple[list[str], list[int], list[int]]:
    """Subclasses of a data set by a table, which may have further images.

    Args:
        images: with ``names``, ``targets`` and ``classes``.
        given: the table, or its file.

    Returns:
        Names of all subclasses of the table, by class and in the order of their names, numbers as
        numbers; the class index of each; and the index of each image's.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or an image is not in it or of another class there; for a
            class that the data do not have, or a subclass of two classes.
    """
    table = given if isinstance(given, Mapping) else read_subclass_table(given)
    shown = "table" if isinstance(given, Mapping) else str(given)
    where = f"subclasses: {shown}"
    names = getattr(images, "names", None)
    if names is None:
        got = f"{type(images).__name__} without"
        fix = "Give it names, one for each image, or take a data set of kd_lrp_plugin."
        raise ValueError(message("subclasses: images", "data with names of the images", got, fix))
    if missing := [name for name in names if name not in table]:
        got = f"none of {len(missing)} of {len(names)}, such as {missing[0]!r}"
        fix = "Add them; of images whose subclass nobody knows, leave the table out."
        raise ValueError(message(where, "every image of the data", got, fix))
    for name, label in zip(names, images.targets, strict=True):
        if table[name][0] != (expected := images.classes[label]):
            got, fix = repr(table[name][0]), "Take the table of these images."
            raise ValueError(message(f"{where}: {name}", f"class {expected!r}", got, fix))
    owners: dict[str, str] = {}
    for of_class, subclass in table.values():
        if owners.setdefault(subclass, of_class) != of_class:
            got = f"{subclass!r} of {owners[subclass]!r} and {of_class!r}"
            fix = "Name them differently."
            raise ValueError(message(where, "subclasses of one class each", got, fix))
    if unknown := sorted(set(owners.values()) - set(images.classes)):
        fix = "Leave those rows out, or take the table of these data."
        raise ValueError(message(where, f"classes {list(images.classes)}", unknown, fix))
    order = {name: number for number, name in enumerate(images.classes)}
    subclasses = sorted(owners, key=lambda name: (order[owners[name]], _natural(name)))
    index = {name: number for number, name in enumerate(subclasses)}
    subclass_of = [order[owners[name]] for name in subclasses]
    return subclasses, subclass_of, [index[table[name][1]] for name in names]


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which "cat 2" comes before "cat 10"."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]
