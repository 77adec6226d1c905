"""The folder of one run: every file intact or absent, whenever the process ends.

=====================  =========================================================================
file                   what it holds
=====================  =========================================================================
``config.yaml``        the config as it runs, overrides applied
``environment.json``   seed and processes; per session the command, the folder it was given in as
                       seen from the run, versions, commits, device, and how "workers" were chosen
                       where the config leaves that open; at the end, under "outputs", a hash of
                       each file of :data:`~kd_lrp_plugin.runs.record.OUTPUTS`
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
from typing import Any

from kd_lrp_plugin.runs import trust
from kd_lrp_plugin.runs.checkpoints import CHECKPOINTS
from kd_lrp_plugin.runs.record import OUTPUTS, RENAME, RunRecord
from kd_lrp_plugin.utils import files
from kd_lrp_plugin.utils.validation import message

logger = logging.getLogger(__name__)
LOCK = ".lock"
CACHES = "teacher_cache"  # the answers of a teacher, where its checkpoint lies or a run does


class RunFolder(RunRecord):
    """A run folder to write; made by :meth:`claimed`."""

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
            try:
                yield
            except BaseException:
                if new and not self.checkpoints.list_files():
                    self._clear(made)
                raise

    def _begin(self, config: str, about: Mapping[str, Any]) -> bool:
        """True for a new run, False for the same one; raises for any other."""
        names = self._check_contents()
        self.checkpoints.identity = {key: value for key, value in about.items() if key != "files"}
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

    def _check_contents(self) -> set[str]:
        """The names of the files; FileExistsError where there are some, but no run."""
        names = {file.name for file in self.path.iterdir() if file.suffix != files.DRAFT}
        if names - {LOCK, CACHES} and not self._is_run():
            got = f"{self.path}, which holds {sorted(names)[:3]}"
            fix = "Choose another --out or --seed, or delete it."
            raise FileExistsError(message("run folder", "a new one or a run", got, fix))
        return names

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

    def _check_same_run(self, config: str, about: Mapping[str, Any]) -> str:
        """The text of the config as it is noted; FileExistsError unless it is this very run."""
        differs = self.changed(about)
        # A teacher's content is compared, wherever it lies now.
        moved = "files" in self.read_environment()
        noted = files.read_text(self / "config.yaml", RENAME)
        for line in difflib.unified_diff(noted.splitlines(), config.splitlines(), n=0, lineterm=""):
            if line[:1] in "+-" and line[:3] not in ("+++", "---"):
                text = re.sub(r"&id\d+ ?", "", line[1:]).strip()  # anchors are the writer's
                if not (moved and text.startswith("src_ckpt:")):
                    differs.append(f"{'now' if line[0] == '+' else 'was'} {text!r}")
        if differs:
            got = f"{self.path}, which holds another run: {'; '.join(differs[:6])}"
            fix = "Choose another --out or --seed, or delete it."
            raise FileExistsError(message("run folder", "a new one or this run", got, fix))
        return noted

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

    # --- files ---------------------------------------------------------------------------------

    def write(self, name: str, text: str) -> None:
        """A text file, all of it or nothing."""
        files.write_text(self / name, text)

    def put(self, name: str, make: Callable[[Path], object]) -> None:
        """A file that ``make`` writes at the path it is given; see :func:`files.put`."""
        files.put(self / name, make)

    def add_session(self, session: Mapping[str, Any]) -> None:
        """Note under which circumstances the run begins or resumes, and that it is of this user."""
        about = self.read_environment()
        # From the run on, so that both may move together.
        started_in = os.path.relpath(Path.cwd(), self.path.resolve())
        begun = {"command": files.get_command(), "started_in": started_in}
        about["sessions"].append({**begun, **session})
        files.write_json(self / "environment.json", about)
        config = files.read_text(self / "config.yaml", RENAME)
        trust.remember(config, self.module_folder)

    def note_cache(self, about: Mapping[str, Any]) -> None:
        """Note the cache of a teacher that the session that runs has opened."""
        noted = self.read_environment()
        noted["sessions"][-1].setdefault("teacher_caches", []).append(dict(about))
        files.write_json(self / "environment.json", noted)

    def note_files(self, found: Mapping[str, str]) -> None:
        """Note what tells further files that the run begins with from others.

        Args:
            found: by key path in the config, such as those of weights that timm has fetched.

        Raises:
            FileExistsError: if they are not those that the run began with.
        """
        if differs := self.changed({"files": dict(found)}):
            got = f"{self.path}, which began with others: {'; '.join(differs)}"
            fix = "Put them back into timm's cache, or choose another --out."
            raise FileExistsError(message("run folder", "the weights it began with", got, fix))
        about = self.read_environment()
        if found:
            about["files"] = {**about.get("files", {}), **found}
            files.write_json(self / "environment.json", about)

    def read_logger(self, name: str) -> dict[str, str]:
        """What this run is to a logger, as noted; empty before it has one there."""
        return self.read_environment().get("loggers", {}).get(name, {})

    def note_logger(self, name: str, found: Mapping[str, str]) -> None:
        """Note what this run is to a logger, so that it goes on there when it resumes."""
        about = self.read_environment()
        about["loggers"] = {**about.get("loggers", {}), name: dict(found)}
        files.write_json(self / "environment.json", about)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Note what the files of :data:`OUTPUTS` are, then write the summary."""
        about = self.read_environment()
        about["outputs"] = {
            name: files.hash_file(self / name) for name in OUTPUTS if (self / name).is_file()
        }
        files.write_json(self / "environment.json", about)
        files.write_json(self / "summary.json", summary)
