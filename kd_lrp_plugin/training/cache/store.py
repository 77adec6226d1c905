"""A folder of arrays that is filled once, whatever kills come, and then read by many processes.

=================  =============================================================================
file               what it holds
=================  =============================================================================
``about.json``     what was asked of whom, and which arrays there are; written first
``part_NN.npy``    an array, with a row for each view of each image
``filled.json``    how many rows are on the disk; a filling that was killed goes on behind them
``done.json``      a hash of each array; written last: with it the cache is complete
=================  =============================================================================
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kd_lrp_plugin.utils import files
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message

_EVERY = 2.0  # seconds between two notes of how far the filling is


@dataclass(frozen=True)
class Part:
    """An array.

    Attributes:
        name: what is in it.
        shape: of a row.
        dtype: NumPy's name.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


class CacheStore:
    """A cache on the disk.

    Args:
        folder: of this cache alone; made if it is not there.
        identity: what tells it from others, as JSON.
        parts: its arrays.
        rows: of each of them.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], parts: list[Part], rows: int
    ) -> None:
        self.folder, self.rows = folder, rows
        self._parts = {part.name: part for part in parts}
        self._about = {"identity": dict(identity), "rows": rows}
        self._about["parts"] = [{**asdict(part), "shape": list(part.shape)} for part in parts]

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(
            self.rows * int(np.prod(part.shape)) * np.dtype(part.dtype).itemsize
            for part in self._parts.values()
        )

    @property
    def complete(self) -> bool:
        return (self.folder / "done.json").is_file()

    def fill(self, make: Callable[[int], Iterator[Mapping[str, np.ndarray]]]) -> bool:
        """Fill it unless it is complete; of several processes one does, and the others wait.

        Args:
            make: the batches of rows from a row on, each an array for each part.

        Returns:
            Whether there was anything to do.

        Raises:
            OSError: if there is no room, or the folder cannot be written.
            ValueError: if what another process has left there is damaged.
        """
        if self.complete:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        told = False
        while True:
            try:
                with files.locked(self.folder / ".lock"):
                    return self._fill(make)
            except files.Busy:
                if not told:
                    note = f"{self.folder}: waits for another process, which fills it"
                    current_progress().note(note)
                told = True
                time.sleep(0.2)

    def _fill(self, make: Callable[[int], Iterator[Mapping[str, np.ndarray]]]) -> bool:
        if self.complete:
            return False
        start = self._begin()
        arrays = {name: np.load(self._file(name), mmap_mode="r+") for name in self._parts}
        noted = time.monotonic()
        for batch in make(start):
            for name, values in batch.items():
                arrays[name][start : start + len(values)] = values
            start += len(next(iter(batch.values())))
            if time.monotonic() - noted > _EVERY:
                self._note(arrays, start)
                noted = time.monotonic()
        self._note(arrays, start)
        if start != self.rows:
            got = f"{start} of {self.rows} rows"
            raise ValueError(message(str(self.folder), "an answer for each image", got, ""))
        hashes = {name: files.hash_file(self._file(name)) for name in self._parts}
        files.write_json(self.folder / "done.json", hashes)
        return True

    def _begin(self) -> int:
        """Make the arrays, or find those of a filling that was killed; the first row to fill."""
        about = self.folder / "about.json"
        if about.is_file() and all(self._file(name).is_file() for name in self._parts):
            self._check_about()
            filled = self.folder / "filled.json"
            if filled.is_file():
                return int(files.read_json(filled, self._repair, rows=int)["rows"])
        else:
            (self.folder / "filled.json").unlink(missing_ok=True)  # of arrays that are gone
            for name, part in self._parts.items():
                files.put(self._file(name), partial(self._reserve, part))
            files.write_json(about, self._about)
        return 0

    def _reserve(self, part: Part, file: Path) -> None:
        """An array on the disk; on a full one this fails, where writing to it would kill us."""
        with file.open("wb") as handle:
            array = {"descr": np.lib.format.dtype_to_descr(np.dtype(part.dtype))}
            header = {**array, "fortran_order": False, "shape": (self.rows, *part.shape)}
            np.lib.format.write_array_header_1_0(handle, header)
            size = self.rows * int(np.prod(part.shape)) * np.dtype(part.dtype).itemsize
            handle.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle.fileno(), handle.tell(), size)
            else:
                handle.truncate(handle.tell() + size)

    def _note(self, arrays: Mapping[str, np.memmap], rows: int) -> None:
        for array in arrays.values():
            array.flush()
        files.write_json(self.folder / "filled.json", {"rows": rows})

    def open(self) -> dict[str, np.ndarray]:
        """The arrays, to be read.

        Raises:
            ValueError: if the cache is not complete, another, or damaged.
        """
        if not self.complete:
            raise ValueError(message(str(self.folder), "a complete cache", "none", self._repair))
        self._check_about()
        hashes = files.read_json(self.folder / "done.json", self._repair)
        for name in self._parts:
            file = self._file(name)
            if not file.is_file() or files.hash_file(file) != hashes.get(name):
                got = "other bytes" if file.is_file() else "none"
                raise files.damaged(file, "the array that was written", got, self._repair)
        return {name: np.load(self._file(name), mmap_mode="r") for name in self._parts}

    @property
    def _repair(self) -> str:
        return f"Delete {self.folder}; the cache is made again."

    def _check_about(self) -> None:
        file = self.folder / "about.json"
        if not file.is_file():
            raise files.damaged(file, "what the cache holds", "no such file", self._repair)
        if files.read_json(file, self._repair) != self._about:
            got = "those of another teacher, or other images"
            raise files.damaged(file, "the answers that are asked for", got, self._repair)

    def _file(self, name: str) -> Path:
        return self.folder / f"part_{list(self._parts).index(name):02d}.npy"
