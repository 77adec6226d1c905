"""Tables of which image belongs to which group and split, and cuts that respect them."""

import codecs
import csv
import io
import logging
import os
from collections.abc import Iterable, Mapping
from math import floor
from pathlib import Path
from typing import Any

from kd_lrp_plugin.data.layout import find_alike
from kd_lrp_plugin.utils.validation import check_known, message

logger = logging.getLogger(__name__)
_COLUMNS = ("file", "split", "class", "group", "kept")
_NONE = ("nan", "<na>", "na", "n/a", "none", "null", "nat")


def read_groups(manifest: Path, files: Iterable[str], column: str = "group") -> dict[str, str]:
    """The value of a manifest's ``column`` for each of ``files`` that it names.

    A row names an image by column ``file``: its path below the root of the data set, or its name
    there together with the columns ``split`` or ``class`` or both, or its name alone. Paths may be
    spelt with ``./``, ``//`` or backslashes.

    Args:
        manifest: a CSV, see :func:`read_table`; without one, or without the column, nothing is
            known.
        files: paths below the root.
        column: the one to read; empty values, and ``nan`` and the like, count as unknown.

    Raises:
        ValueError: if the table cannot be read, lacks column ``file``, or gives a file two values.
    """
    columns, rows = read_table(manifest) if manifest.is_file() else ([], [])
    if column not in columns:
        return {}
    where, fix = str(manifest), "Name each image by its path below the root, in column file."
    if "file" not in columns:
        raise ValueError(message(where, f"column file beside {column}", columns, fix))
    files = list(files)
    known = set(files)
    named: dict[tuple[str, ...], str] = {}
    for line, row in rows:
        if not row["file"]:
            raise ValueError(message(f"{where} line {line}", "a file", "an empty cell", fix))
        parts = split_path(row["file"]) if row["file"] not in known else Path(row["file"]).parts
        above = [row[name] for name in ("split", "class") if row.get(name)]
        key = parts if len(parts) > 1 else (*above, *parts)
        if not row[column]:
            continue
        if (before := named.setdefault(key, row[column])) != row[column]:
            got = f"{before!r} and {row[column]!r} for {'/'.join(key)}"
            fix = "Give each file with its path, or add columns split and class."
            raise ValueError(message(where, f"one {column} for a file", got, fix))
    groups = {}
    for name in dict.fromkeys(files):
        *folders, last = parts = Path(name).parts
        keys = [parts, (*folders[:2], last), *((folder, last) for folder in folders), (last,)]
        found = list(dict.fromkeys(named[tuple(key)] for key in keys if tuple(key) in named))
        if len(found) > 1:
            got = f"{' and '.join(map(repr, found))} for {name}"
            raise ValueError(message(where, f"one {column} for a file", got, "Name it once."))
        if found:
            groups[name] = found[0]
    return groups


def held_out(
    classes: Mapping[str, Iterable[str]], groups: Mapping[str, object], share: float
) -> set[str]:
    """About ``share``, in (0, 1), of each class' files, cut out as :class:`FolderImages` does.

    A file without a group is a group of its own. Of groups too long for the cut, one is held out
    where that brings what is held nearer to the share of the files so far.
    """
    decided: dict[object, bool] = {}
    held: set[str] = set()
    for names in classes.values():
        files = sorted(names)
        run = min(32, max(1, round(len(files) * min(share, 1 - share))))
        members: dict[object, list[str]] = {}  # by group, in the order of their first files
        for file in files:
            # The tuple keeps a group's name apart from a path.
            key = ("group", groups[file]) if file in groups else file
            members.setdefault(key, []).append(file)
        position = count = 0
        for group, together in members.items():
            turn = position // run
            position += len(together)
            out = floor((turn + 1) * share + 0.5) > floor(turn * share + 0.5)
            if len(together) > run:
                out = count + len(together) / 2 <= share * position
            if decided.setdefault(group, out):  # an earlier class may have decided
                held.update(together)
                count += len(together)
    return held


def read_kept(manifest: str | None, root: Path, split: str) -> list[dict[str, str]]:
    """The rows of a clean split that are kept, of all its splits; none without a manifest.

    Args:
        manifest: CSV with columns file, split, class, group and kept; environment variables in its
            path are put in. ``kept`` is 1 or 0, as pandas writes it also True or 1.0.
        root: folder of the images.
        split: one that must be among those of the rows.

    Returns:
        The rows, ``file`` in the plain spelling; of columns that the CSV lacks, nothing.

    Raises:
        FileNotFoundError: if the manifest, or an image that it keeps, is not there.
        ValueError: if a column or the split is missing, a cell is not understood, or a file is
            listed twice, under whatever name.
    """
    if not manifest:
        return []
    file = Path(os.path.expandvars(manifest)).expanduser()
    where = f"FolderImages manifest {file}"
    if not file.is_file():
        fix = "kd-lrp check-data ROOT --out DIR writes DIR/clean_split.csv."
        raise FileNotFoundError(message(where, "a file", "none", fix))
    columns, rows = read_table(file)
    needed = {"file", "split", "class", "group", "kept"}
    if missing := sorted(needed - set(columns)):
        raise ValueError(message(where, f"columns {sorted(needed)}", f"none of {missing}", ""))
    lines: dict[str, int] = {}
    kept: dict[int, dict[str, str]] = {}
    for line, row in rows:
        at = f"{where} line {line}"
        for column in ("file", "split", "class") if _truth(at, row["kept"]) else ("file",):
            if not row[column]:
                raise ValueError(message(at, f"a {column}", "an empty cell", "Fill it in."))
        row["file"] = plain_path(root, row["file"], at)
        check_first(where, lines, row["file"], line, row["file"])
        if _truth(at, row["kept"]):
            kept[line] = row
    if not kept:
        raise ValueError(message(where, "rows that are kept", "none", "Write 1 in column kept."))
    check_known(f"{where}: split", split, {row["split"]: None for row in kept.values()})
    absent = [row["file"] for row in kept.values() if not (root / row["file"]).is_file()]
    if absent:
        got = f"{len(absent)} that are not there, such as {absent[0]!r}"
        raise FileNotFoundError(message(where, f"images below {root}", got, "Check root."))
    known: dict[tuple[int, int], int] = {}
    for line, row in kept.items():
        about = (root / row["file"]).stat()  # links, and names that differ in case, may be one file
        check_first(where, known, (about.st_dev, about.st_ino), line, row["file"])
    check_spelling(where, "classes", {row["class"] for row in kept.values()})
    _tell_divided_groups(where, kept.values())
    return list(kept.values())


def _tell_divided_groups(where: str, rows: Iterable[Mapping[str, str]]) -> None:
    """A group in two splits, such as a patient in training and test, is a leak."""
    splits: dict[str, set[str]] = {}
    for row in rows:
        if row["group"]:
            splits.setdefault(row["group"], set()).add(row["split"])
    if divided := sorted(group for group, names in splits.items() if len(names) > 1):
        some = f"{len(divided)} groups are in more than one split, such as {divided[0]!r} in "
        logger.warning("%s: %s%s", where, some, " and ".join(sorted(splits[divided[0]])))


def check_first(where: str, lines: dict[Any, int], key: object, line: int, file: str) -> None:
    """Remember the line of a file; refuse a second one."""
    if key in lines:
        got, fix = f"{file!r} in lines {lines[key]} and {line}", "Leave one of them out."
        raise ValueError(message(where, "each file once", got, fix))
    lines[key] = line


def _truth(where: str, cell: str) -> bool:
    known = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
    if cell.lower() not in known:
        fix = "Write 1 or 0."
        raise ValueError(message(f"{where}: kept", "1 or 0", repr(cell), fix))
    return known[cell.lower()]


def check_spelling(where: str, what: str, names: Iterable[str]) -> None:
    """Raise ``ValueError`` for names that are alike up to case and blanks."""
    if alike := find_alike(list(names)):
        fix = "Spell it in one way."
        raise ValueError(message(where, f"{what} that differ in more than case", alike[0], fix))


def plain_path(root: Path, text: str, where: str) -> str:
    """The one spelling of a path that a table gives.

    Args:
        root: folder that it counts from.
        text: backslashes separate, unless a file has them in its name.
        where: the line, for messages.

    Raises:
        ValueError: if it leads out of the folder.
    """
    parts = split_path(text, backslashes=not (root / text).is_file())
    if parts[:1] == ("/",) or ".." in parts:
        fix = "Give paths below the root of the data set."
        raise ValueError(message(where, f"a path below {root}", repr(text), fix))
    return "/".join(parts)


def split_path(text: str, backslashes: bool = True) -> tuple[str, ...]:
    """The parts of a path as tables spell it; an absolute one begins with ``/``.

    Example:
        >>> split_path("./cat//1.png"), split_path("cat\\\\1.png")
        (('cat', '1.png'), ('cat', '1.png'))
    """
    if backslashes:
        text = text.replace("\\", "/")
    parts = tuple(part for part in text.split("/") if part not in ("", "."))
    return ("/", *parts) if text.startswith("/") else parts


def find_column(where: str, table: Path, column: str, columns: Iterable[str]) -> str:
    """How :func:`read_table` spells a column that a config names.

    Raises:
        ValueError: if the table does not have it; lists those that it has.
    """
    known = list(columns)
    spelt = column.strip() if isinstance(column, str) else column
    if spelt not in known and str(spelt).lower() in _COLUMNS:
        spelt = spelt.lower()
    if spelt not in known:
        raise ValueError(message(f"{where}: {table}", f"a column {column!r}", known, "Name one."))
    return spelt


def read_table(
    file: Path, words: Iterable[str] = ("split", "class")
) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """A CSV: its columns, and its rows with the number of their last line.

    Values are separated by commas or, as the first line tells, by semicolons or tabs. Blanks around
    values are dropped, and values that stand for none (``nan``, ``NaN``, ``NA``, ``None``, ...)
    are empty. Names of columns are taken in lower case where only so they are among those that
    the package knows.

    Args:
        file: the table.
        words: columns in which only ``nan`` stands for none, for a class may be called none.

    Raises:
        ValueError: if it is not in UTF-8 (with a byte order mark, UTF-16), or its rows do not have
            the length of the first line, or two columns have one name.
    """
    where, fix = f"table {file}", "Save it as CSV in UTF-8."
    content = file.read_bytes()
    codec = "utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    try:
        text = content.decode(codec)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        got = f"byte {content[error.start : error.start + 1]!r} in line {line}"
        raise ValueError(message(where, "text in UTF-8", got, fix)) from None
    if "\0" in text:
        raise ValueError(message(where, "text in UTF-8", "zero bytes", fix))
    first = next(iter(text.splitlines()), "")
    separator = "," if "," in first else max(",;\t", key=first.count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        cells = [(lines.line_num, [cell.strip() for cell in row]) for row in lines if row]
    except csv.Error as error:
        raise ValueError(
            message(where, "a CSV", f"{error} in line {lines.line_num}", fix)
        ) from None
    if not cells:
        return [], []
    columns = [name.lower() if name.lower() in _COLUMNS else name for name in cells[0][1]]
    if repeated := sorted({name for name in columns if columns.count(name) > 1 and name}):
        raise ValueError(message(where, "columns of different names", f"{repeated} twice", ""))
    rows = []
    for line, values in cells[1:]:
        if len(values) != len(columns):
            if not any(values):
                continue
            got, fix = f"{len(values)} in line {line}", "Put values with commas in quotes."
            raise ValueError(message(where, f"{len(columns)} values in each line", got, fix))
        row = dict(zip(columns, values, strict=True))
        for name, value in row.items():
            if value.lower() in (_NONE[:1] if name in words else _NONE):
                row[name] = ""
        rows.append((line, row))
    return columns, rows
