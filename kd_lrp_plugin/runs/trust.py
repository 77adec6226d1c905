"""Which runs were made here: by this user, on this machine.

The ``config.yaml`` of a run is a program: what opens a run's models or data runs the code that it
names. Of a run that was made here this code has run already; a folder from elsewhere may be
anybody's. What tells the two apart is a list that lies with the user and not with the run, so that
nobody can ship a folder that is on it: a hash of each config that has run here, and of the folder
that its own modules lay in. The run folder may move; a config that was changed by hand counts as
one from elsewhere.
"""

import hashlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from kd_lrp_plugin.runs.record import RunRecord
from kd_lrp_plugin.utils.validation import message

logger = logging.getLogger(__name__)


def get_list() -> Path:
    """Where the hashes are, one a line: in ``$XDG_STATE_HOME``, or ``~/.local/state``."""
    state = os.environ.get("XDG_STATE_HOME") or Path("~", ".local", "state").expanduser()
    return Path(state, "kd_lrp_plugin", "runs_made_here")


def remember(config: str, module_folder: str | None = None) -> None:
    """Note that a run is made here. Where this cannot be written, ``--trust`` will be asked for.

    Args:
        config: the text of its ``config.yaml``.
        module_folder: of :class:`~kd_lrp_plugin.runs.record.RunRecord`.
    """
    try:
        if is_made_here(config, module_folder):
            return
        file = get_list()
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with file.open("a", encoding="ascii") as lines:  # a short line is written all at once
            lines.write(f"{_hash(config, module_folder)}\n")
    except (OSError, RuntimeError) as error:  # a home that is read-only, or none
        logger.info("not noted that a run was made here: %s", error)


def is_made_here(config: str, module_folder: str | None = None) -> bool:
    """Whether :func:`remember` was called with these."""
    try:
        known = get_list().read_text(encoding="ascii", errors="replace").split()
    except (OSError, RuntimeError):
        return False
    return _hash(config, module_folder) in known


def _hash(config: str, module_folder: str | None) -> str:
    text = config if module_folder is None else f"{config}\0{module_folder}"
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def check_trusted(folders: Iterable[str | Path], trust: bool, safe: bool) -> None:
    """Refuse to open runs that were not made here, unless the user trusts them.

    Args:
        folders: of runs; what is no run is left to the command to refuse.
        trust: the user vouches for the configs; it is remembered.
        safe: the configs will be refused where they name code, so nobody need vouch for them.

    Raises:
        PermissionError: with the folder.
        ValueError: if an environment.json is damaged.
    """
    if safe:
        return
    for folder in folders:
        try:
            config = Path(folder, "config.yaml").read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
        module_folder = RunRecord(folder).module_folder
        if trust:
            remember(config, module_folder)
        elif not is_made_here(config, module_folder):
            got = "one from elsewhere, or whose config was changed since"
            fix = (
                "Its config.yaml can run any code: read it, and give --trust if you vouch for it, "
                "or --safe, which refuses what could run code."
            )
            raise PermissionError(message(str(folder), "a run that was made here", got, fix))
