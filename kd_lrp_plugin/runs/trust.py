"""Which run folders were made here: by this user, on this machine, in this place.

The ``config.yaml`` of a run is a program: what opens a run's models or data runs the code that it
names. Of a run that was made here this code has run already; a folder from elsewhere may be
anybody's. The two are told apart by a list that lies with the user and not with the run, so that
nobody can ship a folder that is on it: a hash of each run folder's path and config. A folder that
was moved, or whose config was changed by hand, counts as one from elsewhere.
"""

import hashlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from kd_lrp_plugin.utils.validation import message

logger = logging.getLogger(__name__)


def get_list() -> Path:
    """Where the hashes are, one a line: in ``$XDG_STATE_HOME``, or ``~/.local/state``."""
    state = os.environ.get("XDG_STATE_HOME") or Path("~", ".local", "state").expanduser()
    return Path(state, "kd_lrp_plugin", "runs_made_here")


def remember(folder: str | Path, config: str) -> None:
    """Note that a run is made here. Where this cannot be written, ``--trust`` will be asked for.

    Args:
        folder: of the run.
        config: the text of its ``config.yaml``.
    """
    try:
        if is_made_here(folder, config):
            return
        file = get_list()
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with file.open("a", encoding="ascii") as lines:  # a short line is written all at once
            lines.write(f"{_hash(folder, config)}\n")
    except (OSError, RuntimeError) as error:  # a home that is read-only, or none
        logger.info("not noted that %s was made here: %s", folder, error)


def is_made_here(folder: str | Path, config: str) -> bool:
    """Whether :func:`remember` was called for this folder with this text."""
    try:
        known = get_list().read_text(encoding="ascii", errors="replace").split()
    except (OSError, RuntimeError):
        return False
    return _hash(folder, config) in known


def _hash(folder: str | Path, config: str) -> str:
    where = os.path.realpath(folder)
    return hashlib.sha256(f"{where}\0{config}".encode(errors="surrogateescape")).hexdigest()


def check_trusted(folders: Iterable[str | Path], trust: bool, safe: bool) -> None:
    """Refuse to open runs that were not made here, unless told to trust them.

    Args:
        folders: of runs; what is no run is left to the command to refuse.
        trust: the user vouches for the configs; it is remembered.
        safe: the configs will be refused where they name code, so nobody need vouch for them.

    Raises:
        PermissionError: with the folder.
    """
    if safe:
        return
    for folder in folders:
        try:
            config = Path(folder, "config.yaml").read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
        if trust:
            remember(folder, config)
        elif not is_made_here(folder, config):
            got = "one from elsewhere, or one that was moved or changed since"
            fix = (
                "Its config.yaml can run any code: read it, and give --trust if you vouch for it, "
                "or --safe, which refuses what could run code."
            )
            raise PermissionError(message(str(folder), "a run that was made here", got, fix))
