"""Checkpoints: two of a run, written so that a kill leaves one, and read without running code."""

import logging
import pickle
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from kd_lrp_plugin.utils import files
from kd_lrp_plugin.utils.validation import message

logger = logging.getLogger(__name__)
CHECKPOINTS = ("last.pt", "previous.pt")


def read_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint, read without running code and checked against its checksums.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, or holds more than tensors, numbers, text and containers.
    """
    try:
        with zipfile.ZipFile(file) as archive:  # torch.load itself compares no checksums
            broken = archive.testzip()
        if broken is None:
            return torch.load(file, map_location="cpu", weights_only=True)
        got = f"one with a wrong checksum in {broken}"
    except FileNotFoundError:
        raise
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, EOFError) as error:
        got = f"{type(error).__name__}: {error}"
    except pickle.UnpicklingError as error:
        got = f"other objects: {str(error).splitlines()[0]}"
    raise ValueError(message(str(file), "an intact checkpoint of plain tensors", got, ""))


class Checkpoints:
    """The last two checkpoints of a run.

    Args:
        path: the run folder.

    Attributes:
        identity: what makes the run; saved in each checkpoint, and compared when one is loaded.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity: dict[str, Any] = {}
        self._proved = False

    def list_files(self) -> list[Path]:
        """Those that are there, the last one first."""
        return [self.path / name for name in CHECKPOINTS if (self.path / name).exists()]

    def save(self, state: Mapping[str, Any]) -> None:
        """Make ``state`` the last checkpoint, and the last one the previous.

        Raises:
            OSError: if it cannot be written; the old ones stay.
            ValueError: if it holds anything but tensors, numbers, text and containers of them.
        """
        last, previous = (self.path / name for name in CHECKPOINTS)
        draft = self.path / (last.name + files.DRAFT)
        content = {**state, "run": self.identity}
        files.write_draft(draft, lambda file: torch.save(content, file))
        if not self._proved:  # what cannot be read back must not be found out when it is needed
            read_checkpoint(draft)
            self._proved = True
        if last.exists():
            last.replace(previous)
        draft.replace(last)
        files.sync(self.path)

    def load(
        self, describe_fault: Callable[[dict[str, Any]], str | None] = lambda _: None
    ) -> dict[str, Any] | None:
        """The last checkpoint that is intact; None if there is none yet.

        Args:
            describe_fault: why the content of a checkpoint is of no use, or None. Where none is
                of use, all are quarantined, and the run begins again.

        A damaged one is quarantined under a name that ends in ``.damaged``, once the one before it
        has been read.

        Raises:
            FileExistsError: if it is the checkpoint of another run.
            ValueError: if there are checkpoints and all of them are damaged.
        """
        found = self.list_files()
        damaged: dict[Path, ValueError] = {}
        useless: list[Path] = []
        for file in found:
            try:
                state = read_checkpoint(file)
                if fault := describe_fault(state):
                    useless.append(file)
                    raise ValueError(message(str(file), "a checkpoint of use", fault, ""))
            except ValueError as error:
                damaged[file] = error
                continue
            for other, why in damaged.items():
                logger.warning("%s; the checkpoint before it is used", why)
                other.replace(other.with_name(other.name + ".damaged"))
            before = state.pop("run", {})
            if differs := [key for key in before if before[key] != self.identity.get(key)]:
                got = ", ".join(f"{key} {before[key]!r}" for key in differs)
                fix = "Choose another --out, or give the same command as then."
                raise FileExistsError(message(str(file), "a checkpoint of this run", got, fix))
            return state
        if found and useless == found:
            for file in found:
                logger.warning("%s; the run begins again", damaged[file])
                file.replace(file.with_name(file.name + ".damaged"))
            return None
        if found:
            fix = "Put one back from a copy, or choose another --out to start again."
            got = "; ".join(map(str, damaged.values()))
            raise ValueError(message(str(self.path), "an intact checkpoint", got, fix))
        return None
