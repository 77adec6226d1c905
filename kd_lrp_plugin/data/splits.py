"""Tables of which image belongs to which group and split, and cuts that respect them."""

import csv
import os
from collections.abc import Iterable, Mapping
from math import floor
from pathlib import Path

from kd_lrp_plugin.utils.validation import check_known, message


def read_groups(manifest: Path, files: Iterable[str], column: str = "group") -> dict[str, str]:
    """The value of a manifest's ``column`` for each of ``files`` that it names.

    A row names an image by column ``file``: its path below the root of the data set, or its name
    there together with the columns ``split`` or ``class`` or both, or its name alone.

    Args:
        manifest: a CSV; without one, or without both columns, nothing is known.
        files: paths below the root.
        column: the one to read; empty values count as unknown.

    Raises:
        ValueError: if two rows give what they name alike different values.
    """
    rows = _read_rows(manifest) if manifest.is_file() else []
    columns = set(rows[0] if rows else ())
    if not {"file", column} <= columns:
        return {}
    named: dict[tuple[str, ...], str] = {}
    for row in rows:
        parts = Path(row["file"]).parts
        where = [row[place] for place in ("split", "class") if place in columns]
        key = parts if len(parts) > 1 else (*where, *parts)
        if (known := named.setdefault(key, row[column])) != row[column]:
            got = f"{known!r} and {row[column]!r} for {'/'.join(key)}"
            fix = "Give each file with its path, or add columns split and class."
            raise ValueError(message(str(manifest), f"one {column} for a file", got, fix))
    groups = {}
    for name in files:
        *folders, last = parts = Path(name).parts
        keys = [parts, (*folders[:2], last), *((folder, last) for folder in folders), (last,)]
        groups[name] = next((named[key] for key in keys if key in named), "")
    return {name: group for name, group in groups.items() if group}


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
        place = count = 0
        for group, together in members.items():
            turn = place // run
            place += len(together)
            out = floor((turn + 1) * share + 0.5) > floor(turn * share + 0.5)
            if len(together) > run:
                out = count + len(together) / 2 <= share * place
            if decided.setdefault(group, out):  # an earlier class may have decided
                held.update(together)
                count += len(together)
    return held


def read_kept(manifest: str | None, root: Path, split: str) -> list[dict[str, str]]:
    """The rows of a clean split that are kept, of all its splits; none without a manifest.

    Args:
        manifest: CSV with columns file, split, class, group and kept; environment variables in its
            path are put in.
        root: folder of the images.
        split: one that must be among those of the rows.

    Raises:
        FileNotFoundError: if the manifest, or an image that it keeps, is not there.
        ValueError: if a column or the split is missing.
    """
    if not manifest:
        return []
    file = Path(os.path.expandvars(manifest)).expanduser()
    where = f"FolderImages manifest {file}"
    if not file.is_file():
        fix = "kd-lrp check-data ROOT --out DIR writes DIR/clean_split.csv."
        raise FileNotFoundError(message(where, "a file", "none", fix))
    rows = _read_rows(file)
    columns = {"file", "split", "class", "group", "kept"}
    if missing := sorted(columns - set(rows[0] if rows else ())):
        raise ValueError(message(where, f"columns {sorted(columns)}", f"none of {missing}", ""))
    kept = [row for row in rows if row["kept"] == "1"]
    check_known(f"{where}: split", split, {row["split"]: None for row in kept})
    if absent := [row["file"] for row in kept if not (root / row["file"]).is_file()]:
        got = f"{len(absent)} that are not there, such as {absent[0]!r}"
        raise FileNotFoundError(message(where, f"images below {root}", got, "Check root."))
    return kept


def _read_rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8-sig") as lines:
        return list(csv.DictReader(lines, restval=""))
