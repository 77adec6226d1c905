"""Which image files were read to the end before, and have not changed since.

The list lies with the user, in ``$XDG_STATE_HOME`` or ``~/.local/state``, since folders of images
may be read-only and shared. A file counts as unchanged if its path, size and time of modification
are as they were, and so are the bits that it is read with, Pillow, and what this package refuses.
Where the list cannot be read or written, every file is read again.
"""

import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path

import PIL

logger = logging.getLogger(__name__)
VERSION = 1  # of what read_image refuses
_BATCH = 500  # files of a query


def get_file() -> Path:
    """Where the list is."""
    state = os.environ.get("XDG_STATE_HOME") or Path("~", ".local", "state").expanduser()
    return Path(state, "kd_lrp_plugin", "readable_images.sqlite")


def stamp(file: str, bits: int | None) -> str:
    """What changes when a file does, or how it is read; empty for one that cannot be found."""
    try:
        about = os.stat(file)
    except OSError:
        return ""
    return f"{VERSION} {PIL.__version__} {bits} {about.st_size} {about.st_mtime_ns}"


def find_verified(stamps: Mapping[str, str]) -> set[str]:
    """The files, of these with their stamps, that :func:`remember_verified` was given.

    Example:
        >>> find_verified({"nowhere.png": stamp("nowhere.png", None)})
        set()
    """
    found: set[str] = set()
    paths = {os.path.abspath(file): file for file, said in stamps.items() if said}

    def look_up(base: sqlite3.Connection) -> None:
        left = iter(paths)
        while batch := list(islice(left, _BATCH)):
            marks = ", ".join("?" * len(batch))
            rows = base.execute(f"SELECT * FROM readable WHERE file IN ({marks})", batch)
            found.update(paths[path] for path, said in rows if stamps[paths[path]] == said)

    _use(look_up)
    return found


def remember_verified(stamps: Iterable[tuple[str, str]]) -> None:
    """Note that files, each with its stamp from before it was read, can be read to the end."""
    rows = [(os.path.abspath(file), said) for file, said in stamps if said]

    def write(base: sqlite3.Connection) -> None:
        base.executemany("INSERT OR REPLACE INTO readable VALUES (?, ?)", rows)
        base.commit()

    if rows:
        _use(write)


def _use(work: Callable[[sqlite3.Connection], None]) -> None:
    """Hand out the list; where that fails, the log says why."""
    try:
        file = get_file()
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with closing(sqlite3.connect(file, timeout=10)) as base:
            base.execute("CREATE TABLE IF NOT EXISTS readable (file TEXT PRIMARY KEY, stamp TEXT)")
            work(base)
    except (sqlite3.Error, OSError, RuntimeError, UnicodeError) as error:
        logger.info("which images can be read is not remembered: %s", error)
