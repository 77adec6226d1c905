"""Files that are whole or absent, whenever the process ends."""

import os
from collections.abc import Callable
from pathlib import Path

from kd_lrp_plugin.utils.validation import message

DRAFT = ".kd_lrp_draft"  # ending of a file that is being written, and of nobody else's


def write_text(file: Path, text: str) -> None:
    """A text file, all of it or nothing; see :func:`put`."""
    put(file, lambda draft: draft.write_text(text, encoding="utf-8"))


def put(file: Path, make: Callable[[Path], object]) -> None:
    """A file that ``make`` writes at the path it is given: all of it or nothing.

    Raises:
        OSError: if it cannot be written, such as on a full disk; the old one stays.
    """
    draft = file.with_name(file.name + DRAFT)
    write_draft(draft, make)
    draft.replace(file)
    sync(file.parent)


def write_draft(draft: Path, make: Callable[[Path], object]) -> None:
    """A file on the disk that still has to be renamed; deleted if it cannot be written."""
    try:
        make(draft)
        sync(draft)
    except (OSError, RuntimeError) as error:  # PyTorch's writer turns one into the other
        draft.unlink(missing_ok=True)
        fix = (
            "Make room if the disk is full, and give the same command again: it goes on from "
            "the last epoch."
        )
        got = f"{type(error).__name__}: {error}"
        raise OSError(message(str(draft), "to write a file", got, fix)) from error


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that a later rename cannot overtake it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
