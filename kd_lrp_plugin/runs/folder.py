"""The folder of one run: every file intact or absent, whenever the process ends.

=====================  =========================================================================
file                   what it holds
=====================  =========================================================================
``config.yaml``        the config as it runs, overrides applied
``environment.json``   seed and processes; per session the command, versions, commits, device; at
                       the end, under "outputs", a hash of each file of :data:`OUTPUTS`
``metrics.jsonl``      one line per epoch
``last.pt``            all that the next epoch needs, the best weights included;
                       ``previous.pt`` the epoch before
``best.pt``            weights of the best epoch; ``student.safetensors`` the same at the end
``predictions.csv``    of the test set
``summary.json``       written last: with it, and what it promises intact, the run is finished
=====================  =========================================================================
"""

import difflib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from kd_lrp_plugin.runs import trust
from kd_lrp_plugin.runs.checkpoints import read_checkpoint
from kd_lrp_plugin.utils import files
from kd_lrp_plugin.utils.validation import message

logger = logging.getLogger(__name__)
CHECKPOINTS = ("last.pt", "previous.pt")
LOCK = ".lock"
OUTPUTS = ("best.pt", "student.safetensors", "predictions.csv", "metrics.jsonl")
AGAIN = "kd-lrp distill, with the same config, --seed and --out,"
_REPAIRS = f"{AGAIN} repairs it from the checkpoint."
_ANEW = f"Rename it, and give {AGAIN.replace(',', '', 1)} once more: checkpoints stay as they are."


class RunFolder:
    """One run's folder.

    Args:
        path: the folder; made by :meth:`claimed`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._proved = False
        self._identity: dict[str, Any] = {}

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
            _REPAIRS,
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
        for number, line in enumerate(files.read_text(file, _REPAIRS).splitlines(), 1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise files.damaged(file, f"JSON in line {number}", error, _REPAIRS) from error
            files.check_keys(file, records[-1], _REPAIRS, epoch=int)
        if not records or [record["epoch"] for record in records] != [*range(1, len(records) + 1)]:
            raise files.damaged(file, "a line for each epoch", "others", _REPAIRS)
        return records

    def check_output(self, name: str) -> Path:
        """A file of :data:`OUTPUTS` of a finished run, whose bytes are those that it ended with.

        Raises:
            ValueError: if it is damaged or missing.
        """
        if why := self._find_damage(name, self._recorded_outputs()):
            raise files.damaged(self / name, "the file that the run has written", why, _REPAIRS)
        return self / name

    @property
    def threads(self) -> int | None:
        """How many threads the run began with: their number changes its weights."""
        sessions = self.read_environment().get("sessions", [])
        first = sessions[0] if sessions and isinstance(sessions[0], dict) else {}
        return first.get("threads")

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

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Note what the files of :data:`OUTPUTS` are, then write the summary."""
        about = self.read_environment()
        about["outputs"] = {
            name: files.hash_file(self / name) for name in OUTPUTS if (self / name).is_file()
        }
        files.write_json(self / "environment.json", about)
        files.write_json(self / "summary.json", summary)

    def is_intact(self) -> bool:
        """Whether the run is finished and all that it promises is there.

        A finished run whose files are damaged is one that has still to be tested: its damaged
        files are told, and made again from its checkpoint.

        Raises:
            ValueError: if there is no checkpoint to make them from.
        """
        if not self.finished:
            return False
        damage = self.find_damage()
        for name, why in damage.items():
            logger.warning("%s: %s; it is made again from the checkpoint", self / name, why)
        if damage and not any((self / name).exists() for name in CHECKPOINTS):
            got = f"{self.path}, where {', '.join(damage)} are damaged and no checkpoint is left"
            fix = "Put them back from a copy; or train again in another --out."
            raise ValueError(message("run folder", "a finished run", got, fix))
        return not damage

    @contextmanager
    def claimed(self, config: str, about: Mapping[str, Any]) -> Iterator[None]:
        """Hold the folder for one run: a new one, or one that this very command has begun.

        Args:
            config: text of the config.
            about: the rest of what makes a run, such as its seed, as JSON.

        Raises:
            FileExistsError: if the folder holds something else, or another run's checkpoint.
            BlockingIOError: if another process is running in it.
            OSError: if its file system has no locks.
            ValueError: if its environment.json is damaged.
        """
        made = not self.path.exists()
        if os.path.lexists(self.path) and not self.path.is_dir():
            got, fix = f"{self.path}, which is something else", "Choose another --out."
            raise FileExistsError(message("run folder", "a folder", got, fix))
        if self.finished and not os.access(self.path, os.W_OK):  # a disk that can only be read
            self._check_same_run(config, about)
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._check_contents()  # before a lock is left in a folder of other things
        with ExitStack() as stack:
            try:
                stack.enter_context(files.locked(self / LOCK))
            except files.Busy:
                fix = "Wait for it, or choose another --out or --seed."
                got = f"{self.path}, where another process is running"
                raise files.Busy(message("run folder", "a free one", got, fix)) from None
            new = self._begin(config, about)
            for draft in self.path.glob(f"*{files.DRAFT}"):  # of a process that was killed
                draft.unlink()
            trust.remember(config)
            try:
                yield
            except BaseException:
                if new and not any((self / name).exists() for name in CHECKPOINTS):
                    self._clear(made)
                raise

    def _clear(self, made: bool) -> None:
        """Leave no trace of a run that has made nothing of value."""
        names = ("environment.json", "config.yaml", "best.pt", "metrics.jsonl", LOCK)
        drafts = self.path.glob(f"*{files.DRAFT}")
        for file in (*(self / name for name in names), *drafts):
            file.unlink(missing_ok=True)
        self.clear_events()
        if made and not any(self.path.iterdir()):
            self.path.rmdir()

    def clear_events(self) -> None:
        """Delete TensorBoard's events, which the records of the epochs can make again."""
        for events in self.path.glob("events.out.tfevents.*"):
            events.unlink()

    def _check_contents(self) -> set[str]:
        """The names of the files; FileExistsError where there are some, but no run."""
        names = {file.name for file in self.path.iterdir() if file.suffix != files.DRAFT}
        if names - {LOCK} and not self._is_run():
            got = f"{self.path}, which holds {sorted(names)[:3]}"
            fix = "Choose another --out or --seed, or delete it."
            raise FileExistsError(message("run folder", "a new one or a run", got, fix))
        return names

    def _begin(self, config: str, about: Mapping[str, Any]) -> bool:
        """True for a new run, False for the same one; raises for any other."""
        names = self._check_contents()
        self._identity = {key: value for key, value in about.items() if key != "files"}
        if not names & {"summary.json", *CHECKPOINTS}:  # new, or killed in its first epoch
            self.clear_events()
            files.write_json(self / "environment.json", {**about, "sessions": []})
            self.write("config.yaml", config)
            return True
        noted = self._check_same_run(config, about)
        if not (self / "environment.json").exists():
            logger.warning("%s: its environment.json is gone; a new one is begun", self.path)
            files.write_json(self / "environment.json", {**about, "sessions": []})
        if noted != config:
            self.write("config.yaml", config)  # with the paths of now
        return False

    def _check_same_run(self, config: str, about: Mapping[str, Any]) -> str:
        """The text of the config as it is noted; FileExistsError unless it is this very run."""
        differs = self.changed(about)
        moved = (
            "files" in self.read_environment()
        )  # then a teacher's content is compared, wherever it lies
        noted = files.read_text(self / "config.yaml", _ANEW)
        for line in difflib.unified_diff(noted.splitlines(), config.splitlines(), n=0, lineterm=""):
            if line[:1] in "+-" and line[:3] not in ("+++", "---"):
                words = re.sub(r"&id\d+ ?", "", line[1:]).strip()  # anchors are the writer's
                if not (moved and words.startswith("src_ckpt:")):
                    differs.append(f"{'now' if line[0] == '+' else 'was'} {words!r}")
        if differs:
            got = f"{self.path}, which holds another run: {'; '.join(differs[:6])}"
            fix = "Choose another --out or --seed, or delete it."
            raise FileExistsError(message("run folder", "a new one or this run", got, fix))
        return noted

    def changed(self, about: Mapping[str, Any]) -> list[str]:
        """What of ``about`` is not as it was when the run began, in words.

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

    def read_environment(self) -> dict[str, Any]:
        """The content of environment.json; empty where there is none."""
        file = self / "environment.json"
        if not file.is_file():
            return {}
        about = files.read_json(file, _ANEW, sessions=list)
        if not all(isinstance(session, dict) for session in about["sessions"]):
            raise files.damaged(file, "a mapping for each session", "others", _ANEW)
        for key in about.keys() & {"files", "outputs"}:
            files.check_keys(file, about, _ANEW, **{key: dict})
        return about

    def _is_run(self) -> bool:
        """Whether the folder was begun by a run, be its environment.json damaged or gone."""
        file = self / "environment.json"
        if (self / "config.yaml").is_file():
            begun = ("summary.json", *CHECKPOINTS, "environment.json")
            return any((self / name).is_file() for name in begun)
        try:
            return "sessions" in json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False

    def add_session(self, session: Mapping[str, Any]) -> None:
        """Note under which circumstances the run resumes."""
        about = self.read_environment()
        about["sessions"].append({"command": files.get_command(), **session})
        files.write_json(self / "environment.json", about)

    # --- files --------------------------------------------------------------------------------

    def write(self, name: str, text: str) -> None:
        """A text file, all of it or nothing."""
        files.write_text(self / name, text)

    def put(self, name: str, make: Callable[[Path], object]) -> None:
        """A file that ``make`` writes at the path it is given; see :func:`files.put`."""
        files.put(self / name, make)

    # --- checkpoints --------------------------------------------------------------------------

    def save(self, state: Mapping[str, Any]) -> None:
        """Make ``state`` the last checkpoint, and the last one the previous.

        Raises:
            OSError: if it cannot be written; the old ones stay.
            ValueError: if it holds anything but tensors, numbers, text and containers of them.
        """
        last, previous = (self / name for name in CHECKPOINTS)
        draft = self / (last.name + files.DRAFT)
        content = {**state, "run": self._identity}
        files.write_draft(draft, lambda file: torch.save(content, file))
        if not self._proved:  # what cannot be read back must not be found out when it is needed
            read_checkpoint(draft)
            self._proved = True
        if last.exists():
            last.replace(previous)
        draft.replace(last)
        files.sync(self.path)

    def list_sessions(self) -> list[dict[str, Any]]:
        """Under which circumstances the run was worked on, in order."""
        return self.read_environment().get("sessions", [])

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
        found = [self / name for name in CHECKPOINTS if (self / name).exists()]
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
            if differs := [key for key in before if before[key] != self._identity.get(key)]:
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
