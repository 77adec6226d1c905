"""Scores that are kept in a file and used again."""

import json
import logging
import math
from pathlib import Path
from typing import Any

from kd_lrp_plugin.selection.candidates import (
    Candidate,
    ScoringSetup,
    build_seeded,
    describe_entry,
)
from kd_lrp_plugin.utils.files import hash_contents

logger = logging.getLogger(__name__)


class ScoreCache:
    """Rows that are kept in a file of JSON lines, added to as they come.

    A line that is no row, as a kill or a full disk leaves it, is left out with a warning: what it
    held is computed again, and all other rows are used.

    Args:
        file: of the lines; None keeps them in memory only.
        setup: teacher and batches, which all values depend on beside candidate, seed and score:
            lines that were made with others are left alone. A row must have its scores.

    Attributes:
        setting: of teacher and batches, a fingerprint.
    """

    def __init__(self, file: Path | None, setup: ScoringSetup) -> None:
        self._file, self._scores = file, set(setup.scores)
        self.setting = _hash_setting(setup) if file else ""
        self._rows: dict[tuple[str | int, ...], dict[str, Any]] = {}
        self._read = 0
        if file and file.exists() and file.stat().st_size and file.read_bytes()[-1:] != b"\n":
            with file.open("ab") as lines:
                lines.write(b"\n")  # a kill has left half a line; the next has one of its own
        self.refresh()

    def refresh(self) -> None:
        """Read what other processes have added."""
        if self._file is None or not self._file.exists():
            return
        damaged = 0
        with self._file.open("rb") as lines:
            lines.seek(self._read)
            while (line := lines.readline()).endswith(b"\n"):  # else somebody is writing it
                self._read = lines.tell()
                found = _parse(line)
                if found is None:
                    damaged += bool(line.strip())
                    continue
                setting, key, row = found
                if setting == self.setting and self._scores <= set(row["scores"]):
                    self._rows[key] = row
        if damaged:
            logger.warning(
                "%s: %d lines are damaged; what they held is scored again, the others are used",
                *(self._file, damaged),
            )

    def row(self, candidate: Candidate, seed: int) -> dict[str, Any] | None:
        return self._rows.get((*candidate.identity, seed))

    def add(self, candidate: Candidate, row: dict[str, Any]) -> None:
        of = candidate.identity
        self._rows[(*of, row["seed"])] = row
        if self._file is not None:
            # One write of a whole line, so that other processes' lines stay apart from it.
            line = json.dumps({"setting": self.setting, "of": of, **row}) + "\n"
            with self._file.open("ab") as lines:
                lines.write(line.encode())


def _parse(line: bytes) -> tuple[str, tuple[str | int, ...], dict[str, Any]] | None:
    """Setting, key and row of a line; None for one that is damaged."""
    try:
        row = json.loads(line)
        setting, of, seed = row.pop("setting"), row.pop("of"), row["seed"]
        texts = [setting, *of, row["candidate"], *row["problems"].values()]
        fits = len(of) == 3 and isinstance(seed, int)
        fits &= all(isinstance(text, str) for text in texts)
        for values in row["scores"].values():
            fits &= all(value is None or math.isfinite(value) for value in values)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return (setting, (*of, seed), row) if fits else None


def _hash_setting(setup: ScoringSetup) -> str:
    """A random teacher, too, is identified by its weights: those of one seed."""
    teacher = setup.teacher
    facts = (teacher.trained, teacher.layers, describe_entry(teacher.entry))
    tensors = [tensor for batch in setup.batches for tensor in batch]
    tensors += build_seeded(teacher.build, 0).state_dict().values()
    return hash_contents(facts, *(tensor.detach().cpu().numpy().tobytes() for tensor in tensors))
