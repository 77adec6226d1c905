"""The folder of one run: every file whole or absent, whenever the process ends.

=====================  =========================================================================
file                   what it holds
=====================  =========================================================================
``config.yaml``        the config as it runs, overrides applied
``environment.json``   seed and processes; per session overrides, versions, commits, device
``metrics.jsonl``      one line per epoch
``last.pt``            all that the next epoch needs, the best weights included;
                       ``previous.pt`` the epoch before
``best.pt``            weights of the best epoch; ``student.safetensors`` the same at the end
``predictions.csv``    of the test set
``summary.json``       written last: its presence says that the run is finished
=====================  =========================================================================
"""

import difflib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from kd_lrp_plugin.runs.checkpoints import read_checkpoint
from kd_lrp_plugin.utils import files
from kd_lrp_plugin.utils.validation import message

logger = logging.getLogger(__name__)
CHECKPOINTS = ("last.pt", "previous.pt")
LOCK = ".lock"


class Busy(BlockingIOError):
    """Another process is at work in a run folder."""


class RunFolder:
    """One run's folder.

    Args:
        path: the folder; made by :meth:`claimed`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._proved = False

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
            fix = "Give the folder of a finished run; kd-lrp distill, given again, finishes one."
            raise FileNotFoundError(message("run", "a finished run", f"none at {self.path}", fix))
        return json.loads((self / "summary.json").read_text(encoding="utf-8"))

    @contextmanager
    def claimed(self, config: str, about: Mapping[str, Any]) -> Iterator[None]:
        """Hold the folder for one run: a new one, or one that this very command has begun.

        Args:
            config: text of the config.
            about: the rest of what makes a run, such as its seed, as JSON.

        Raises:
            FileExistsError: if the folder holds something else, or another run's checkpoint.
            Busy: if another process is at work in it.
        """
        made = not self.path.exists()
        if os.path.lexists(self.path) and not self.path.is_dir():
            got, fix = f"{self.path}, which is something else", "Choose another --out."
            raise FileExistsError(message("run folder", "a folder", got, fix))
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self / LOCK, blocking=False):
                new = self._is_new_or_same_run(config, about)
                for draft in self.path.glob(f"*{files.DRAFT}"):  # of a process that was killed
                    draft.unlink()
                try:
                    yield
                except BaseException:
                    if new and not any((self / name).exists() for name in CHECKPOINTS):
                        self._clear(made)
                    raise
        except Timeout:
            fix = "Wait for it, or choose another --out or --seed."
            got = f"{self.path}, where another process is at work"
            raise Busy(message("run folder", "a free one", got, fix)) from None

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

    def _is_new_or_same_run(self, config: str, about: Mapping[str, Any]) -> bool:
        """True for a new run, False for the same one; raises for any other."""
        fix = "Choose another --out or --seed, or delete it."
        found = {entry.name for entry in self.path.iterdir() if entry.suffix != files.DRAFT} - {
            LOCK
        }
        if found and not self._is_run():
            got = f"{self.path}, which holds {sorted(found)[:3]}"
            raise FileExistsError(message("run folder", "a new one or a run", got, fix))
        if not found & {"summary.json", *CHECKPOINTS}:  # new, or killed in its first epoch
            self.clear_events()
            self.write("environment.json", json.dumps({**about, "sessions": []}, indent=2))
            self.write("config.yaml", config)
            return True
        differs = self.changed(about)
        moved = "files" in self._about()  # then a teacher's content is compared, wherever it lies
        noted = (self / "config.yaml").read_text(encoding="utf-8")
        for line in difflib.unified_diff(noted.splitlines(), config.splitlines(), n=0, lineterm=""):
            if line[:1] in "+-" and line[:3] not in ("+++", "---"):
                words = re.sub(r"&id\d+ ?", "", line[1:]).strip()  # anchors are the writer's
                if not (moved and words.startswith("src_ckpt:")):
                    differs.append(f"{'now' if line[0] == '+' else 'was'} {words!r}")
        if differs:
            got = f"{self.path}, which holds another run: {'; '.join(differs[:6])}"
            raise FileExistsError(message("run folder", "a new one or this run", got, fix))
        if noted != config:
            self.write("config.yaml", config)  # with the paths of now
        return False

    def changed(self, about: Mapping[str, Any]) -> list[str]:
        """What of ``about`` is not as it was when the run began, in words.

        Nothing for a run that has not begun. What is not known, then or now, counts as the same.
        """
        before = self._about()
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

    def _about(self) -> dict[str, Any]:
        file = self / "environment.json"
        return json.loads(file.read_text(encoding="utf-8")) if self._is_run() else {}

    def _is_run(self) -> bool:
        file = self / "environment.json"
        try:
            return "sessions" in json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False

    def add_session(self, session: Mapping[str, Any]) -> None:
        """Note under which circumstances the run goes on."""
        about = self._about()
        about["sessions"].append(dict(session))
        self.write("environment.json", json.dumps(about, indent=2))

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
        files.write_draft(draft, lambda file: torch.save(dict(state), file))
        if not self._proved:  # what cannot be read back must not be found out when it is needed
            read_checkpoint(draft)
            self._proved = True
        if last.exists():
            last.replace(previous)
        draft.replace(last)
        files.sync(self.path)

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint that is whole; None if there is none yet.

        A damaged one is set aside under a name that ends in ``.damaged``, once the one before it
        has been read.

        Raises:
            ValueError: if there are checkpoints and all of them are damaged.
        """
        found = [self / name for name in CHECKPOINTS if (self / name).exists()]
        damaged: dict[Path, ValueError] = {}
        for file in found:
            try:
                state = read_checkpoint(file)
            except ValueError as error:
                damaged[file] = error
                continue
            for other, why in damaged.items():
                logger.warning("%s; the checkpoint before it is used", why)
                other.replace(other.with_name(other.name + ".damaged"))
            return state
        if found:
            fix = "Delete the folder to start again."
            got = "; ".join(map(str, damaged.values()))
            raise ValueError(message(str(self.path), "a whole checkpoint", got, fix))
        return None
