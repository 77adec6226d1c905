"""Scores that are kept in a file and used again."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_lrp_plugin.selection.candidates import Batch, Candidate, Teacher, seeded
from kd_lrp_plugin.utils.files import hash_contents


class ScoreCache:
    """Rows that are kept in a file of JSON lines, added to as they come.

    Args:
        file: of the lines; None keeps them in memory only.
        teacher: with the batches, what all values depend on beside candidate, seed and score;
            lines that were made with others are left alone.
        batches: see :func:`score_candidates`.
        scores: that a row must have.

    Attributes:
        setting: of teacher and batches, a fingerprint.
    """

    def __init__(
        self, file: Path | None, teacher: Teacher, batches: Sequence[Batch], scores: Sequence[str]
    ) -> None:
        self._file, self._scores = file, set(scores)
        self.setting = _fingerprint(teacher, batches) if file else ""
        self._rows: dict[tuple[str | int, ...], dict[str, Any]] = {}
        self._read = 0
        if file and file.exists() and file.stat().st_size and file.read_bytes()[-1:] != b"\n":
            with file.open("a", encoding="utf-8") as lines:
                lines.write("\n")  # a kill has left half a line; the next has one of its own
        self.refresh()

    def refresh(self) -> None:
        """Read what other processes have added."""
        if self._file is None or not self._file.exists():
            return
        with self._file.open(encoding="utf-8") as lines:
            lines.seek(self._read)
            while (line := lines.readline()).endswith("\n"):
                self._read = lines.tell()
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if row.pop("setting") == self.setting and self._scores <= set(row["scores"]):
                    self._rows[(*row.pop("of"), row["seed"])] = row

    def row(self, candidate: Candidate, seed: int) -> dict[str, Any] | None:
        return self._rows.get((*_identity(candidate), seed))

    def add(self, candidate: Candidate, row: dict[str, Any]) -> None:
        of = _identity(candidate)
        self._rows[(*of, row["seed"])] = row
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"setting": self.setting, "of": of, **row}) + "\n")


def _identity(candidate: Candidate) -> tuple[str, str, str]:
    return candidate.name, repr(candidate.layers), candidate.about


def _fingerprint(teacher: Teacher, batches: Sequence[Batch]) -> str:
    """Also a random teacher is told by its weights: those of one seed."""
    told = (teacher.trained, teacher.layers, teacher.about)
    tensors = [tensor for batch in batches for tensor in batch]
    tensors += seeded(teacher.build, 0).state_dict().values()
    return hash_contents(told, *(tensor.detach().cpu().numpy().tobytes() for tensor in tensors))
