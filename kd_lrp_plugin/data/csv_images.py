"""Images to train on, listed in a table: file, class, split, groups and subclasses."""

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from kd_lrp_plugin.data.images import ImageLoader, ascii_name, is_text
from kd_lrp_plugin.data.memory import make_memory
from kd_lrp_plugin.data.samples import (
    PARTS,
    find_folder,
    take_part,
    take_per_class,
    take_readable,
)
from kd_lrp_plugin.data.splits import (
    check_first,
    check_spelling,
    find_column,
    plain_path,
    read_table,
)
from kd_lrp_plugin.data.transforms import choose_transform
from kd_lrp_plugin.data.validation import check_flags, check_integer
from kd_lrp_plugin.utils.files import hash_contents, hash_file
from kd_lrp_plugin.utils.validation import check_known, message

logger = logging.getLogger(__name__)
_WHERE = "CsvImages"
_NUMBER = re.compile(r"([+-]?)(0|[1-9][0-9]*)(?:\.([0-9]*))?")


class Row(NamedTuple):
    """A line of the table; cells as :func:`plain_value` spells them, empty without such a column.

    Attributes:
        line: its number.
        file: as the table spells it.
        label: name of the class.
        group: natural group.
        patient: what a cut must not divide.
        subclass: the value that tells it.
        chosen: whether it belongs to the split.
    """

    line: int
    file: str
    label: str
    group: str
    patient: str
    subclass: str
    chosen: bool


class CsvImages(Dataset):
    """Images that a table lists, RGB or grey; classes are the sorted values of its class column.

    Items are ``(transformed image, class index)``. How images are read,
    :mod:`kd_lrp_plugin.data.images` says; how the table, :func:`read_table`. Values of the table
    and of the config are compared as text, but 4, 4.0 and "4", and True and TRUE, are one value.
    Classes that are all numbers are sorted as numbers.

    Args:
        csv: the table, below ``root`` or else anywhere; environment variables are put in.
        file: column of the image's path below ``folder``.
        label: column of the class.
        root: folder of the data set; empty for ``$KD_LRP_DATA/<name>``.
        name: sub-folder of ``$KD_LRP_DATA``.
        folder: of the images, below ``root``.
        split: by column, the value or values of the images that are taken, such as
            ``{Partition: train}``; of several columns all must hold. Empty for the whole table.
        classes: the classes that there must be, in any order; without them, all of the table.
        groups: column of the natural groups, such as the hospital or scanner, by which
            ``evaluate`` reports the accuracy. A cut may divide these.
        patient: column of what a cut must not divide.
        subclasses: ``{column: ..., groups: {name: [values]}}``: known subclasses, in this order,
            each of one class alone.
        part: all, or train or validation, which are disjoint and make up all; see
            :func:`kd_lrp_plugin.data.splits.held_out`.
        holdout: share of the split held out, in (0, 1).
        image_size: side in pixels, see :func:`make_transforms`.
        transform: applied to the PIL image; without it, :func:`make_transforms`.
        augment: see :func:`make_transforms`; refused together with ``transform``.
        channels: 3, or 1 for a model of grey images; refused together with ``transform``.
        skip_corrupt: leave out the files that cannot be read, which are named in the log.
        per_class: keep so many images of each class, drawn by ``seed`` alone.
        seed: of ``per_class``.
        bits: how many the values of 16-bit and integer images have; None for all of the mode.
        cache: memory, to keep the resized images in it from the first epoch on; see
            :class:`kd_lrp_plugin.data.memory.PixelMemory`.

    Attributes:
        classes, targets, samples, transform, loader, bits: as of
            :class:`~kd_lrp_plugin.data.folder.FolderImages`.
        folder: of the images.
        groups: the natural group of each image; only where the argument is given.
        subclasses, subclass_targets, subclass_of: names of the subclasses, the index of each
            image's, and the class index of each; only where the argument is given.

    Raises:
        FileNotFoundError: if the folder, the table, or an image of the split is not there.
        ValueError: for a column that the table lacks, an empty cell or a file listed twice; a
            split of no image, or a class without an image in it; a class too small to cut; or
            subclasses that span classes, overlap, have no image, or leave a value out.
    """

    def __init__(
        self,
        csv: str,
        file: str,
        label: str,
        root: str | None = None,
        name: str = "",
        folder: str = "",
        split: Mapping[str, Any] | None = None,
        classes: Sequence[object] | None = None,
        groups: str | None = None,
        patient: str | None = None,
        subclasses: Mapping[str, Any] | None = None,
        part: str = "all",
        holdout: float = 0.15,
        image_size: int = 224,
        transform: Callable[[Image.Image], Any] | None = None,
        augment: bool = False,
        channels: int = 3,
        skip_corrupt: bool = False,
        per_class: int | None = None,
        seed: int = 0,
        bits: int | None = None,
        cache: str | None = None,
    ) -> None:
        check_known(f"{_WHERE} part", part, PARTS)
        check_integer(_WHERE, "image_size", image_size)
        check_integer(_WHERE, "seed", seed, least=0)
        check_flags(_WHERE, augment=augment, skip_corrupt=skip_corrupt)
        if bits is not None:
            check_integer(_WHERE, "bits", bits, least=9)
        self.bits, self.loader = bits, ImageLoader(bits)
        self.transform = choose_transform(_WHERE, transform, image_size, augment, channels)
        base = find_folder(root, name, _WHERE)
        if not is_text(base):
            got = ascii_name(base)
            raise ValueError(message(f"{_WHERE} root", "a name in UTF-8", got, "Rename it."))
        self.folder, table = base / folder, find_table(base, csv)
        where = f"{_WHERE} {table}"
        values = _read_subclasses(subclasses)
        columns = {
            "file": file,
            "label": label,
            "group": groups,
            "patient": patient,
            "subclass": (subclasses or {}).get("column"),
        }
        rows = _read_rows(table, columns, _read_split(split))
        paths = _find_files(where, self.folder, rows)
        self.classes = _name_classes(where, rows, classes)
        self.samples = sorted(
            (paths[row.line], self.classes.index(row.label)) for row in rows if row.chosen
        )
        by_path = {paths[row.line]: row for row in rows if row.chosen}
        subclass_of = _find_classes_of(where, rows, self.classes, values)
        if patient is not None:
            _tell_divided(where, rows)
        if part != "all":
            together = {path: row.patient for path, row in by_path.items() if row.patient}
            self.samples = take_part(_WHERE, self.samples, self.classes, together, part, holdout)
        if skip_corrupt:
            self.samples = take_readable(self)
        if per_class is not None:
            self.samples = take_per_class(_WHERE, self.samples, len(self.classes), per_class, seed)
        self.targets = [target for _, target in self.samples]
        if groups is not None:
            self.groups = [by_path[path].group for path, _ in self.samples]
        if values:
            self.subclasses, self.subclass_of = list(values), subclass_of
            index_of = {v: i for i, of_name in enumerate(values.values()) for v in of_name}
            self.subclass_targets = [index_of[by_path[path].subclass] for path, _ in self.samples]
        files = [file for file, _ in self.samples]
        self._memory = make_memory(_WHERE, cache, files, self.transform)

    @property
    def names(self) -> list[str]:
        """Paths of the images below ``folder``."""
        return [Path(file).relative_to(self.folder).as_posix() for file, _ in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        file, target = self.samples[index]
        if self._memory is not None and self.transform is self._memory.transform:
            return self._memory.item(file, lambda: self.loader(file)), target
        image = self.loader(file)  # as it is where a wrapper has taken the transform over
        return image if self.transform is None else self.transform(image), target


def plain_value(where: str, value: object) -> str:
    """One spelling of a value, so that 4, 4.0 and "4" are one, and True and TRUE.

    Raises:
        ValueError: for what is no text, number or truth value, or is empty.

    Example:
        >>> [plain_value("split", value) for value in (4, "4.0", "-0.50", "007", True, "a ")]
        ['4', '4', '-0.5', '007', 'True', 'a']
    """
    text = str(value).strip()
    if not isinstance(value, str | int | float) or not text:
        fix = "Give text or a number."
        raise ValueError(message(f"{_WHERE} {where}", "a value", repr(value), fix))
    if text.lower() in ("true", "false"):
        return text.capitalize()
    found = _NUMBER.fullmatch(text)
    if not found:
        return text
    sign, whole, decimals = found[1], found[2], (found[3] or "").rstrip("0")
    number = f"{whole}.{decimals}" if decimals else whole
    return f"-{number}" if sign == "-" and number != "0" else number


def find_table(root: Path, csv: str) -> Path:
    """The table of :class:`CsvImages`.

    Raises:
        FileNotFoundError: if there is none below ``root``, and none at the path by itself.
    """
    named = Path(os.path.expandvars(str(csv))).expanduser()
    for table in (root / named, named):
        if csv and table.is_file():
            return table
    got, fix = f"neither {root / named} nor {named}", "Set csv and root in YAML."
    raise FileNotFoundError(message(f"{_WHERE} csv", "a table", got, fix))


def identify_csv_images(root: Path, csv: str, file: str, folder: str = "") -> str:
    """What tells the images of a table, by name and size, and the table from others.

    Args:
        root, csv, file, folder: as for :class:`CsvImages`.

    Returns:
        A digest, the same wherever the folder lies.

    Raises:
        OSError: if there is no table.
        ValueError: if it cannot be read, or lacks the column.
    """
    table = find_table(root, csv)
    columns, rows = read_table(table, words=(file,))
    column = find_column(_WHERE, table, file, columns)
    names = sorted({plain_path(root / folder, row[column], _WHERE) for _, row in rows})
    paths = [root / folder / name for name in names]
    sizes = [path.stat().st_size if path.is_file() else None for path in paths]
    return hash_contents([list(zip(names, sizes, strict=True)), hash_file(table)])


def _read_split(split: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """By column, the values that are taken."""
    if split is not None and not isinstance(split, Mapping):
        fix = "For example {Partition: train}."
        raise ValueError(message(f"{_WHERE} split", "columns and their values", repr(split), fix))
    found = {}
    for column, given in (split or {}).items():
        values = given if isinstance(given, list | tuple) else [given]
        if not values:
            fix = "Name one, or leave the column out."
            raise ValueError(message(f"{_WHERE} split: {column}", "a value or more", given, fix))
        found[column] = [plain_value(f"split: {column}", value) for value in values]
    return found


def _read_subclasses(given: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """By name of the subclass, the values that tell it."""
    where = f"{_WHERE} subclasses"
    fix = "For example {column: Annotators, groups: {agree: [4, 5], strongly_agree: [6, 7]}}."
    if given is None:
        return {}
    fits = isinstance(given, Mapping) and set(given) == {"column", "groups"}
    if not fits or not isinstance(given["groups"], Mapping) or not given["groups"]:
        raise ValueError(message(where, "a column, and groups of its values", repr(given), fix))
    found: dict[str, list[str]] = {}
    owners: dict[str, str] = {}
    for key, values in given["groups"].items():
        name = plain_value("subclasses", key)
        if not isinstance(values, list | tuple) or not values:
            raise ValueError(message(f"{where}: {name}", "a list of values", repr(values), fix))
        found[name] = [plain_value(f"subclasses: {name}", value) for value in values]
        for value in found[name]:
            if value in owners:
                got = f"{value!r} in {owners[value]!r} and {name!r}"
                raise ValueError(message(where, "each value once", got, "Leave it out of one."))
            owners[value] = name
    check_spelling(where, "subclasses", found)
    return found


def _read_rows(
    table: Path, columns: Mapping[str, str | None], split: Mapping[str, Sequence[str]]
) -> list[Row]:
    """All rows; those of the split have no empty cell."""
    where = f"{_WHERE} {table}"
    words = [str(name).strip() for name in (columns["label"], columns["file"], *split)]
    known, lines = read_table(table, [*words, *map(str.lower, words)])
    named = {
        role: find_column(_WHERE, table, column, known)
        for role, column in columns.items()
        if column is not None
    }
    wanted = {find_column(_WHERE, table, c, known): v for c, v in split.items()}
    for column, values in wanted.items():
        there = {plain_value(column, row[column]) for _, row in lines if row[column]}
        if absent := [value for value in values if value not in there]:
            fix = f"Its values are {sorted(there)}."
            expected = f"rows of {column} {absent[0]!r}"
            raise ValueError(message(f"{where}: split", expected, "none", fix))
    rows = []
    for line, row in lines:
        chosen = all(
            row[column] and plain_value(column, row[column]) in values
            for column, values in wanted.items()
        )
        for role, column in named.items():
            if not row[column] and (chosen or role == "file"):
                at = f"{where} line {line}"
                expected = f"a value of {column!r}"
                got = "an empty cell, as which nan, NA, none and the like count"
                raise ValueError(message(at, expected, got, "Fill it in."))
        cells = {
            role: plain_value(column, row[column]) if row[column] else ""
            for role, column in named.items()
            if role != "file"
        }
        empty = dict.fromkeys(("label", "group", "patient", "subclass"), "")
        rows.append(Row(line, row[named["file"]], chosen=chosen, **{**empty, **cells}))
    if not any(row.chosen for row in rows):
        got = f"none with {dict(wanted)}" if rows else "an empty table"
        raise ValueError(message(f"{where}: split", "an image or more", got, "Change split."))
    for role in ("label", "group", "patient"):  # else a cut would divide p1 and P1
        check_spelling(where, "values", {getattr(row, role) for row in rows})
    return rows


def _find_files(where: str, folder: Path, rows: Iterable[Row]) -> dict[int, str]:
    """By line, the path of its file; each once, and those of the split there."""
    paths: dict[int, str] = {}
    names: dict[Any, int] = {}
    known: dict[Any, int] = {}
    absent = []
    for row in rows:
        name = plain_path(folder, row.file, f"{where} line {row.line}")
        check_first(where, names, name, row.line, name)
        path = folder / name
        if path.is_file():
            about = path.stat()  # links, and names that differ in case, may be one file
            check_first(where, known, (about.st_dev, about.st_ino), row.line, name)
        elif row.chosen:
            absent.append(name)
        paths[row.line] = str(path)
    if absent:
        got, fix = f"{len(absent)} that are not there, such as {absent[0]!r}", "Check folder."
        raise FileNotFoundError(message(where, f"images below {folder}", got, fix))
    return paths


def _name_classes(where: str, rows: Sequence[Row], asked: Sequence[object] | None) -> list[str]:
    """The classes, each with an image in the split."""
    there = {row.label for row in rows if row.chosen}
    names = {row.label for row in rows if row.label}
    if asked is not None:
        names = {plain_value("classes", name) for name in asked}
        if unknown := sorted(there - names):
            fix = "Add them to classes, or leave classes out."
            raise ValueError(message(where, f"classes {sorted(names)}", f"also {unknown}", fix))
    if absent := sorted(names - there):
        fix = "Name the classes that count in classes, or change split."
        got = f"none of {absent} in the split"
        raise ValueError(message(where, "an image or more of each class", got, fix))
    numbers = all(_NUMBER.fullmatch(name) for name in names)
    return sorted(names, key=float) if numbers else sorted(names)


def _find_classes_of(
    where: str, rows: Sequence[Row], classes: Sequence[str], values: Mapping[str, Sequence[str]]
) -> list[int]:
    """The class index of each subclass."""
    known = {value for of_name in values.values() for value in of_name}
    for row in rows if values else ():
        if row.chosen and row.subclass not in known:
            at, fix = f"{where} line {row.line}", "Add it to one of their groups."
            raise ValueError(message(at, "a value of the subclasses", repr(row.subclass), fix))
    found = []
    for name, of_name in values.items():
        labels = {row.label for row in rows if row.subclass in of_name} & set(classes)
        if len(labels) != 1:
            got = f"images of {sorted(labels)}" if labels else "no image"
            fix = "Divide its values among subclasses of their own, or correct them."
            at = f"{where}: subclass {name!r}"
            raise ValueError(message(at, "images of one class", got, fix))
        found.append(classes.index(labels.pop()))
    return found


def _tell_divided(where: str, rows: Sequence[Row]) -> None:
    """A patient in the split and out of it, as in training and test, is a leak."""
    inside = {row.patient for row in rows if row.chosen}
    if divided := sorted(inside & {row.patient for row in rows if not row.chosen} - {""}):
        some = f"{len(divided)} patients have images in the split and out of it"
        logger.warning("%s: %s, such as %r", where, some, divided[0])
