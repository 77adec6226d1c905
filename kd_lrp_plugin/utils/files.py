"""Files that are intact or absent whenever the process ends, and are read intact or named."""

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from kd_lrp_plugin.utils.validation import message

DRAFT = ".kd_lrp_draft"  # ending of a file that is being written, and of nobody else's


# --- writing ------------------------------------------------------------------------------------


def put(file: Path, make: Callable[[Path], object]) -> None:
    """A file that ``make`` writes at the path it is given: all of it or nothing.

    Raises:
        OSError: if it cannot be written, such as on a full disk; the old one stays.
    """
    draft = file.with_name(file.name + DRAFT)
    try:
        draft.touch(exist_ok=False)
    except (
        FileExistsError
    ):  # another process writes the same file, as two studies do, or was killed
        draft = file.with_name(f"{file.name}.{os.getpid()}{DRAFT}")
    except OSError:  # said in words below
        pass
    write_draft(draft, make)
    draft.replace(file)
    sync(file.parent)


def write_text(file: Path, text: str) -> None:
    """A text file, all of it or nothing; see :func:`put`."""
    put(file, lambda draft: draft.write_text(text, encoding="utf-8"))


def write_json(file: Path, content: Any) -> None:
    """A file of JSON, all of it or nothing; see :func:`put`."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False))


def write_json_once(file: Path, content: Any) -> None:
    """A file of JSON, unless there is one already: of several processes, the first writes it."""
    draft = file.with_name(f"{file.name}.once.{os.getpid()}{DRAFT}")
    write_json(draft, content)
    try:
        os.link(draft, file)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not file.exists():
            draft.replace(file)
    draft.unlink(missing_ok=True)


def write_draft(draft: Path, make: Callable[[Path], object]) -> None:
    """A file on the disk that still has to be renamed; deleted if it cannot be written."""
    try:
        make(draft)
        sync(draft)
    except (OSError, RuntimeError) as error:  # PyTorch's writer turns one into the other
        draft.unlink(missing_ok=True)
        fix = (
            "Make room if the disk is full, and rerun the same command: it resumes after the "
            "last epoch."
        )
        got = f"{type(error).__name__}: {error}"
        raise OSError(message(str(draft), "to write a file", got, fix)) from error
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that a later rename cannot overtake it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_csv(columns: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    r"""The text of a CSV file.

    Example:
        >>> to_csv(["file", "n"], [["a,b", 1]])
        'file,n\n"a,b",1\n'
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


# --- reading ------------------------------------------------------------------------------------


def read_text(file: Path, repair: str) -> str:
    """A text file of ours.

    Args:
        file: in UTF-8.
        repair: how to get it back without losing work, for the error.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged; names the file and the repair.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise damaged(file, "text in UTF-8", error, repair) from error


def read_json(file: Path, repair: str, /, **kinds: type | tuple[type, ...]) -> Any:
    """A JSON file of ours, intact.

    Args:
        file: in UTF-8.
        repair: how to get it back without losing work, for the error.
        **kinds: keys that it must have, with the types of their values; without any, it may
            hold anything.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged; names the file and the repair.
    """
    text = read_text(file, repair)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(file, "intact JSON", error, repair) from error
    check_keys(file, content, repair, **kinds)
    return content


def check_keys(file: Path, content: Any, repair: str, /, **kinds: type | tuple[type, ...]) -> None:
    """Raise ValueError unless a part of a file is a mapping that has these keys; see above."""
    if kinds and not isinstance(content, dict):
        raise damaged(file, "a mapping of keys", repr(content)[:60], repair)
    for key, kind in kinds.items():
        if key not in content:
            raise damaged(file, f"a key {key!r}", "none", repair)
        if not isinstance(content[key], kind):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise damaged(file, f"{key!r} of type {names}", repr(content[key])[:60], repair)


def read_csv(file: Path, repair: str) -> list[list[str]]:
    """The rows of a CSV file of ours, each as long as the first.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged; names the file and the repair.
    """
    text = read_text(file, repair)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise damaged(file, "an intact CSV table", error, repair) from error
    if not rows or not text.endswith("\n"):
        raise damaged(file, "an intact CSV table", "one that is cut short", repair)
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            got = f"{len(row)} in row {number}"
            raise damaged(file, f"{len(rows[0])} values in each row", got, repair)
    return rows


def damaged(file: Path, expected: str, got: object, repair: str) -> ValueError:
    """The error for a file of ours that is not as it was written."""
    return ValueError(message(str(file), expected, got, repair))


# --- what tells contents apart ------------------------------------------------------------------


def hash_contents(*contents: Any) -> str:
    """What tells bytes and values of JSON from others: 16 digits of SHA-256."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content if isinstance(content, bytes) else json.dumps(content).encode())
    return digest.hexdigest()[:16]


def hash_file(file: Path) -> str:
    """What tells a file's bytes from others, as :func:`hash_contents` does.

    Asked again for a file that has not changed, the answer is remembered.
    """
    about = file.stat()
    return _hash_file(file.resolve(), about.st_size, about.st_mtime_ns, about.st_ino)


@cache
def _hash_file(file: Path, *_: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while part := content.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()[:16]


def name_folders(folders: Sequence[Path]) -> list[str]:
    """What tells folders apart: their paths without what all of them share at either end.

    Of runs that differ without it, the seed is left out as well; a folder alone keeps its path.

    Example:
        >>> name_folders([Path("runs/kd/small/0"), Path("runs/ce/small/0")])
        ['kd', 'ce']
    """
    parts = [folder.resolve().parts for folder in folders]
    unseeded = [p[:-1] if p[-1].isdigit() else p for p in parts]
    if len(parts) == 1:
        return [str(folders[0])]
    if len(set(unseeded)) == len(set(parts)):
        parts = unseeded
    for _ in range(2):  # what all begin with, then what all end with
        while parts and all(parts) and len({p[0] for p in parts}) == 1:
            parts = [p[1:] for p in parts]
        parts = [p[::-1] for p in parts]
    return ["/".join(p) or "." for p in parts]


# --- what made a file ---------------------------------------------------------------------------


def get_command() -> list[str] | None:
    """The words of the command that this process runs, as typed; None outside of ``kd-lrp``."""
    program = Path(sys.argv[0])
    ours = program.name == "__main__.py" and program.parent.name in ("kd_lrp_plugin", "cli")
    if not ours and program.stem != "kd-lrp":
        return None
    world = os.environ.get("WORLD_SIZE", "1")
    start = ["torchrun", f"--nproc_per_node={world}", "-m", "kd_lrp_plugin.cli"]
    return [*(start if world != "1" else ["kd-lrp"]), *sys.argv[1:]]


# --- one process at a time ----------------------------------------------------------------------


class Busy(BlockingIOError):
    """Another process holds a lock."""


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock of a file, which is made if there is none and stays.

    The system releases the lock when the process ends, however it ends.

    Raises:
        Busy: if another process holds it.
        OSError: if the file cannot be made, or the file system has no locks.
    """
    handle = _open_locked(file)
    try:
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)  # also for what was forked meanwhile and still has it
        os.close(handle)


def _open_locked(file: Path) -> int:
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                got, fix = "one that another process holds", "Wait for it."
                raise Busy(message(str(file), "a free lock", got, fix)) from None
            raise _without_locks(file, error) from error
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)  # deleted by who held it before; a third process may lock a new one


def _without_locks(file: Path, error: OSError) -> OSError:
    # Without them, two processes would write into each other's files.
    fix = "Choose a folder on a local disk, or mount this one with locks."
    got = f"{errno.errorcode.get(error.errno or 0, '')} ({error.strerror})"
    return OSError(message(str(file), "a file system with flock", got, fix))


def is_locked(file: Path) -> bool:
    """Whether another process, of this machine or another, holds the lock of a file; makes none.

    Raises:
        OSError: if the file cannot be opened, or the file system has no locks.
    """
    try:
        handle = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # others may look at the same time
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return True
        raise _without_locks(file, error) from error
    finally:
        os.close(handle)
    return False
