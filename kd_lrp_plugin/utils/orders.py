"""What a worker of a cluster must share with who sends it work; known without dask.

Who sends work holds the lock of a *token*, a file in the folder of the work, for as long as it
wants it. A worker that cannot read the token, or finds it free, is refused: it sees another folder,
or one whose locks are not those of the other machines, and then two of them could run the same
thing. When the sender ends, however that is, the system frees the lock, and the workers end what it
has sent.
"""

import hashlib
import importlib.metadata
import os
import platform
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from kd_lrp_plugin.utils.files import is_locked, locked
from kd_lrp_plugin.utils.validation import message
from kd_lrp_plugin.utils.workers import count_cores

TOKEN = ".kd_lrp_token-"  # how the names of tokens begin
SAME = ("torch", "torchvision", "timm", "captum", "torchdistill")


@dataclass(frozen=True)
class Order:
    """What work is sent with.

    Attributes:
        token: a file that holds its own name, locked by the sender.
        directory: in which the sender works; relative paths begin there.
        versions: of what computes.
        cuda: whether there must be a GPU, or must not; None for either.
    """

    token: Path
    directory: Path
    versions: Mapping[str, str]
    cuda: bool | None = None

    def is_wanted(self) -> bool:
        """Whether the sender waits for the work still."""
        return is_locked(self.token)


@dataclass(frozen=True)
class Answer:
    """What a worker that may work tells.

    Attributes:
        host: name of its machine.
        cores: of the machine that it may use.
        cuda: whether it finds a GPU.
        file: that it has written beside the token.
    """

    host: str
    cores: int
    cuda: bool
    file: Path


def check_order(order: Order) -> None:
    """Raise ValueError where this process cannot do what was sent with an order.

    Raises:
        ValueError: names this worker, what differs, and the repair.
    """
    where = f"worker {socket.gethostname()}, process {os.getpid()}"
    here, there = list_versions(), dict(order.versions)
    differ = [name for name in {**there, **here} if here.get(name) != there.get(name)]
    if differ:
        expected, got = (
            ", ".join(f"{name} {found.get(name)}" for name in differ) for found in (there, here)
        )
        fix = "Start the workers from an environment like that of the command."
        raise ValueError(message(where, expected, got, fix))
    if not order.directory.is_dir():
        fix = "Mount the working directory of the command at the same path on each machine."
        raise ValueError(message(where, f"the folder {order.directory}", "none", fix))
    fix = f"Mount {order.token.parent} at the same path on each machine, or choose another folder."
    try:
        content = order.token.read_text(encoding="utf-8")
    except OSError as error:
        got = f"{type(error).__name__}: {error}"
        raise ValueError(message(where, f"to read {order.token}", got, fix)) from error
    if content != order.token.name:
        raise ValueError(message(where, f"{order.token.name!r} in it", repr(content[:60]), fix))
    try:
        wanted = order.is_wanted()
    except OSError as error:
        got = f"{type(error).__name__}: {error}"
        raise ValueError(message(where, f"to lock {order.token}", got, fix)) from error
    if not wanted:
        fix = (
            "If the command that sent the work has ended, this is as it should be. Else mount the "
            "folder with locks that all machines share, such as NFS without nolock or local_lock."
        )
        got = "one that is free here"
        raise ValueError(message(where, f"the lock of {order.token} to be held", got, fix))
    if order.cuda is not None and order.cuda != torch.cuda.is_available():
        words = {True: "a GPU", False: "no GPU"}
        fix = "Use workers of one kind, or --device cpu."
        raise ValueError(message(where, words[order.cuda], words[not order.cuda], fix))


def answer_order(order: Order) -> Answer:
    """Check an order, and leave a file that its sender must see.

    Raises:
        ValueError: see :func:`check_order`; also where nothing can be written.
    """
    check_order(order)
    file = order.token.with_name(f"{order.token.name}.{uuid.uuid4().hex}")
    try:
        file.write_text(file.name, encoding="utf-8")
    except OSError as error:
        where = f"worker {socket.gethostname()}, process {os.getpid()}"
        fix = "Let the user of the workers write there."
        got = f"{type(error).__name__}: {error}"
        raise ValueError(message(where, f"to write into {file.parent}", got, fix)) from error
    return Answer(socket.gethostname(), count_cores(), torch.cuda.is_available(), file)


def hash_source(package: Path) -> str:
    """A digest of the names and contents of a package's modules."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:8]


SOURCE = hash_source(Path(__file__).parents[1])
"""Of the package as this process has loaded it, whatever becomes of its files."""


def list_versions() -> dict[str, str]:
    """What must be the same on each machine, for its numbers to be."""
    found = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "kd_lrp_plugin": f"with source {SOURCE}",
    }
    return found | {name: importlib.metadata.version(name) for name in SAME}


@contextmanager
def hold_token(folder: Path) -> Iterator[Path]:
    """A token in a folder, held until exit; those of senders that were killed are deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{TOKEN}*"):
        # An answer has the name of its token and a suffix, and no lock of its own.
        if not is_locked(old.with_name(f"{TOKEN}{old.name.removeprefix(TOKEN).split('.')[0]}")):
            old.unlink(missing_ok=True)
    token = folder.resolve() / f"{TOKEN}{uuid.uuid4().hex}"
    with locked(token):
        token.write_text(token.name, encoding="utf-8")
        try:
            yield token
        finally:
            token.unlink(missing_ok=True)
