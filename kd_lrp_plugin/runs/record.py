"""What a run folder says of its run: environment, metrics, summary, and whether all is intact."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from kd_lrp_plugin.runs.checkpoints import Checkpoints
from kd_lrp_plugin.utils import files
from kd_lrp_plugin.utils.validation import message

logger = logging.getLogger(__name__)
EVALUATION = "evaluation.json"
OUTPUTS = ("best.pt", "student.safetensors", "predictions.csv", "metrics.jsonl")
RERUN = "kd-lrp distill, with the same config, --seed and --out,"
_REPAIR = f"{RERUN} repairs it from the checkpoint."
RENAME = f"Rename it, and rerun {RERUN.rstrip(',')}: checkpoints stay as they are."


class RunRecord:
    """A run folder to read.

    Args:
        path: the folder, which need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = Checkpoints(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def finished(self) -> bool:
        return (self / "summary.json").is_file()

    def summary(self) -> dict[str, Any]:
        """What the run has come to.

        Raises:
            FileNotFoundError: if it is not finished, or there is none.
        """
        if not self.finished:
            fix = "Give the folder of a finished run; the same kd-lrp distill command finishes one."
            raise FileNotFoundError(message("run", "a finished run", f"none at {self.path}", fix))
        return files.read_json(
            self / "summary.json",
            _REPAIR,
            test_accuracy=(int, float),
            epochs=int,
            parameters=int,
            seconds=(int, float),
            classes=list,
            preprocessing=(dict, NoneType),
            image_shape=list,
        )

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of the epochs.

        Raises:
            FileNotFoundError: if there are none.
            ValueError: if the file is damaged.
        """
        file = self.check_output("metrics.jsonl") if self.finished else self / "metrics.jsonl"
        records: list[dict[str, Any]] = []
        for number, line in enumerate(files.read_text(file, _REPAIR).splitlines(), 1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise files.damaged(file, f"JSON in line {number}", error, _REPAIR) from error
            files.check_keys(file, records[-1], _REPAIR, epoch=int)
        if not records or [record["epoch"] for record in records] != [*range(1, len(records) + 1)]:
            raise files.damaged(file, "a line for each epoch", "others", _REPAIR)
        return records

    # --- what commands have found of it -------------------------------------------------------

    @property
    def of(self) -> dict[str, str]:
        """What a record of the run notes, to be told from one of other weights or images."""
        file = self / "predictions.csv"
        return {"predictions": files.hash_file(file)} if file.is_file() else {}

    def is_current(self, record: Mapping[str, Any]) -> bool:
        """Whether a record has :attr:`of` the run as it is now; one of older versions counts."""
        noted = {key: record[key] for key in ("predictions",) if key in record}
        return noted in ({}, self.of)

    @property
    def evaluated(self) -> bool:
        """Whether there is a current ``evaluation.json``; a damaged one is for its reader."""
        try:
            content = json.loads((self / EVALUATION).read_text(encoding="utf-8"))
        except OSError:
            return False
        except ValueError:
            return True
        return not isinstance(content, dict) or self.is_current(content)

    def read_evaluation(self) -> dict[str, Any] | None:
        """What ``kd-lrp evaluate`` has found; None where it is not :attr:`evaluated`.

        Raises:
            ValueError: if the file is damaged.
        """
        fix = "Delete it, and give kd-lrp evaluate again."
        return files.read_json(self / EVALUATION, fix, student=dict) if self.evaluated else None

    # --- circumstances ------------------------------------------------------------------------

    def read_environment(self) -> dict[str, Any]:
        """The content of environment.json; empty where there is none."""
        file = self / "environment.json"
        if not file.is_file():
            return {}
        about = files.read_json(file, RENAME, sessions=list)
        if not all(isinstance(session, dict) for session in about["sessions"]):
            raise files.damaged(file, "a mapping for each session", "others", RENAME)
        for key in about.keys() & {"files", "outputs", "loggers"}:
            files.check_keys(file, about, RENAME, **{key: dict})
        return about

    def list_sessions(self) -> list[dict[str, Any]]:
        """Under which circumstances the run was worked on, in order."""
        return self.read_environment().get("sessions", [])

    def list_caches(self) -> list[dict[str, Any]]:
        """The caches of teachers that the run was trained with, each once."""
        found: dict[str, dict[str, Any]] = {}
        for session in self.list_sessions():
            for about in session.get("teacher_caches", []):
                found.setdefault(about["folder"], {k: v for k, v in about.items() if k != "made"})
        return list(found.values())

    @property
    def threads(self) -> int | None:
        """How many threads the run began with: their number changes its weights."""
        sessions = self.list_sessions()
        return sessions[0].get("threads") if sessions else None

    @property
    def module_folder(self) -> str | None:
        """Where the run's config lay when it ran last: modules of its own may lie beside it."""
        sessions = self.list_sessions()
        folder = sessions[-1].get("module_folder") if sessions else None
        return folder if isinstance(folder, str) else None

    def list_places(self, named: str) -> list[Path]:
        """Where a file or folder that the run's config names may lie, the likeliest first.

        A relative path is seen from the folder in which the run was started, which may have moved
        together with it; else from those above the run's, and from the current folder.
        """
        path = Path(os.path.expandvars(named)).expanduser()
        started = self.started_in
        bases = [*([started] if started else []), *self.path.resolve().parents, Path()]
        return list(dict.fromkeys(base / path for base in bases))

    def find_place(self, named: str) -> Path:
        """The likeliest of :meth:`list_places` where there is something; else the likeliest."""
        places = self.list_places(named)
        return next((path for path in places if path.exists()), places[0])

    @property
    def started_in(self) -> Path | None:
        """The folder in which the run was started or resumed last; None where it is not known."""
        sessions = self.list_sessions()
        noted = sessions[-1].get("started_in") if sessions else None
        return (self.path.resolve() / noted).resolve() if isinstance(noted, str) else None

    def changed(self, about: Mapping[str, Any]) -> list[str]:
        """What of ``about`` is not as it was when the run began: a text for each.

        Nothing for a run that has not begun. What is not known, then or now, counts as the same.
        """
        before = self.read_environment()
        found = []
        for key, value in about.items():
            if isinstance(value, dict) and isinstance(before.get(key), dict):
                pairs = {k: (before[key].get(k, v), v) for k, v in value.items()}
            else:
                pairs = {key: (before.get(key, value), value)}
            known = {k: values for k, values in pairs.items() if None not in values}
            found += [
                f"{k} {then!r}, now {now!r}" for k, (then, now) in known.items() if then != now
            ]
        return found

    # --- damage -------------------------------------------------------------------------------

    def check_output(self, name: str) -> Path:
        """A file of :data:`OUTPUTS` of a finished run, whose bytes are those that it ended with.

        Raises:
            ValueError: if it is damaged or missing.
        """
        if why := self._find_damage(name, self._recorded_outputs()):
            raise files.damaged(self / name, "the file that the run has written", why, _REPAIR)
        return self / name

    def find_damage(self) -> dict[str, str]:
        """What of a finished run is not as it was written: by file, why."""
        found = {}
        try:
            self.summary()
        except ValueError as error:
            found["summary.json"] = str(error)
        recorded = self._recorded_outputs()
        for name in OUTPUTS:
            if why := self._find_damage(name, recorded):
                found[name] = why
        return found

    def _recorded_outputs(self) -> dict[str, str]:
        return self.read_environment().get("outputs", {})

    def _find_damage(self, name: str, recorded: Mapping[str, str]) -> str | None:
        if not (self / name).is_file():
            return "none"
        if name in recorded and files.hash_file(self / name) != recorded[name]:
            return "other bytes"
        return None

    def is_intact(self) -> bool:
        """Whether the run is finished and all that it promises is there.

        A finished run whose files are damaged is one that has still to be tested: its damaged
        files are named, and made again from its checkpoint.

        Raises:
            ValueError: if there is no checkpoint to make them from.
        """
        if not self.finished:
            return False
        damage = self.find_damage()
        for name, why in damage.items():
            logger.warning("%s: %s; it is made again from the checkpoint", self / name, why)
        if damage and not self.checkpoints.list_files():
            got = f"{self.path}, where {', '.join(damage)} are damaged and no checkpoint is left"
            fix = "Put them back from a copy; or train again in another --out."
            raise ValueError(message("run folder", "a finished run", got, fix))
        return not damage
