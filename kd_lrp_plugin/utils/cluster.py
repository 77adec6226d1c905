"""Work on the workers of a dask cluster, over a folder that all machines see at the same path.

Every piece of work goes with an order (:mod:`kd_lrp_plugin.utils.orders`), which a worker checks
before it works, so that one that comes later is refused as well.

dask unpickles what it is sent, which can run anything: a scheduler is for the machines of its user.
"""

import logging
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kd_lrp_plugin.utils.extras import imports_of_an_extra
from kd_lrp_plugin.utils.files import is_locked
from kd_lrp_plugin.utils.orders import (
    Answer,
    Order,
    answer_order,
    check_order,
    hold_token,
    list_versions,
)
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message
from kd_lrp_plugin.utils.workers import (
    ProcessJob,
    ProcessPool,
    begin_work,
    count_threads,
    list_modules_to_import,
    run_process,
)

with imports_of_an_extra():
    import distributed
    from distributed.protocol import pickle

CONNECT = 5  # seconds until an address that does not answer is given up
LOOK = 5  # seconds between two looks for workers
PATIENCE = 60  # seconds until a network file system shows what another machine has written


# --- the cluster ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """A scheduler whose workers have been checked.

    Attributes:
        client: connected with it.
        order: what work is to be sent with.
        threads: for each piece of work, so that those of one machine share its cores.
        slots: how much each worker does at a time, by its address.
    """

    client: "distributed.Client"
    order: Order
    threads: int
    slots: Mapping[str, int]

    @property
    def executor(self) -> Executor:
        """What it takes work by; none is done again because it has failed."""
        return self.client.get_executor(pure=False, retries=0)


@contextmanager
def open_cluster(address: str, folder: Path, device: str | None = None) -> Iterator[Cluster]:
    """Connect with a scheduler, and check all its workers.

    Args:
        address: such as ``tcp://host:8786``.
        folder: that all machines see at the same path, with the same locks; made if absent.
        device: on which the work is to be done; None for a GPU if all workers have one.

    Raises:
        ConnectionError: if no scheduler answers there, or one of another version of dask.
        ValueError: if there is no worker, or one that cannot do the work; names each.
    """
    with connect(address) as client, hold_token(folder) as token:
        cuda = None if device is None else device.startswith("cuda") or None
        order = Order(token, Path.cwd(), list_versions(), cuda)
        answers, slots = _ask_workers(client, order), dict(client.nthreads())
        if device is None:
            order = replace(order, cuda=_agree_on_gpu(answers))
        cores = {answer.host: answer.cores for answer in answers.values()}
        busy = Counter[str]()
        for worker, answer in answers.items():
            busy[answer.host] += slots.get(worker, 1)
        threads = min(count_threads(busy[host], cores[host]) for host in busy)
        with _tell_of_no_workers(client):
            yield Cluster(client, order, threads, slots)


@contextmanager
def connect(address: str) -> Iterator["distributed.Client"]:
    """A client of a scheduler.

    Raises:
        ConnectionError: if none answers there within seconds, or one of another version of dask.
    """
    where = f"--scheduler {address}"
    fix = "Start one with `dask scheduler`, which prints its address, such as tcp://host:8786."
    if not address.strip():
        raise ConnectionError(message("--scheduler", "an address", repr(address), fix))
    try:
        client = _start_client(address)
    except Exception as error:  # of sockets, names, protocols, TLS, or of another version's words
        got = f"none ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        raise ConnectionError(message(where, "a scheduler that answers", got, fix)) from error
    with _quiet(), client:
        _check_dask(client, where)
        yield client


def _start_client(address: str) -> "distributed.Client":
    """A client; in a thread, for it waits without end where something else listens."""
    found: list[Any] = []

    def start() -> None:
        try:
            found.append(distributed.Client(address, timeout=CONNECT, set_as_default=False))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=start, daemon=True)
    with _quiet():
        thread.start()
        thread.join(2 * CONNECT)
    if not found:
        raise TimeoutError("what listens there is no scheduler")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _check_dask(client: "distributed.Client", where: str) -> None:
    """Raise ConnectionError where the scheduler or a worker has other versions of what speaks."""
    found: Any = client.get_versions()
    ours = _of_dask(found["client"])
    others = {"the scheduler": found["scheduler"]}
    others |= {f"worker {address}": about for address, about in found["workers"].items()}
    differ = [
        f"{name} with {_of_dask(about)}"
        for name, about in others.items()
        if _of_dask(about) != ours
    ]
    if differ:
        fix = "Install the same versions on each machine."
        raise ConnectionError(message(where, ours, "; ".join(differ), fix))


def _of_dask(about: Any) -> str:
    """The versions that decide whether one end understands the other, as text."""
    if not isinstance(about, Mapping):
        return f"nothing known ({about})"
    packages, python = about.get("packages", {}), about.get("host", {}).get("python", "")
    return f"Python {'.'.join(python.split('.')[:2])}, distributed {packages.get('distributed')}"


def _ask_workers(client: "distributed.Client", order: Order) -> dict[str, Answer]:
    """The answer of each worker; ValueError with all that cannot work."""
    answers = client.run(answer_order, order, on_error="return")
    if not answers:
        fix = "Start some with `dask worker ADDRESS` in the environment of this command."
        raise ValueError(message("--scheduler", "a worker or more", "none", fix))
    problems = []
    for worker, answer in answers.items():
        if isinstance(answer, Answer):
            if not answer.file.exists():
                fix = f"Mount {answer.file.parent} at the same path on each machine."
                expected = f"what it writes into {answer.file.parent} to be seen here"
                problems.append(message(f"worker {worker}", expected, "nothing", fix))
            answer.file.unlink(missing_ok=True)
        elif isinstance(answer, ValueError):
            problems.append(f"{worker}: {answer}")
        else:
            fix = "Install it in the environment of the workers."
            got = f"{type(answer).__name__}: {answer}"
            expected = "this version of kd_lrp_plugin"
            problems.append(message(f"worker {worker}", expected, got, fix))
    if problems:
        raise ValueError("\n".join(problems))
    return answers


def _agree_on_gpu(answers: Mapping[str, Answer]) -> bool:
    found = {answer.cuda for answer in answers.values()}
    if len(found) > 1:
        without = [worker for worker, answer in answers.items() if not answer.cuda]
        fix = "Use workers of one kind, or --device cpu."
        raise ValueError(
            message("--scheduler", "a GPU for each worker or for none", f"none at {without}", fix)
        )
    return found.pop()


@contextmanager
def _tell_of_no_workers(client: "distributed.Client") -> Iterator[None]:
    """Note when the last worker has gone, and when one has come."""
    progress, ended = current_progress(), threading.Event()

    def look() -> None:
        before = True
        while not ended.wait(LOOK):
            try:
                now = bool(client.nthreads())
            except Exception:  # the scheduler is gone too, which the work itself will tell
                return
            if now != before:
                word = "a worker is there again" if now else "no worker is left; waiting for one"
                progress.note(f"--scheduler: {word}")
            before = now

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what dask logs and warns of: an error or a note says it."""
    logger = logging.getLogger("distributed")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


# --- processes of one command each ----------------------------------------------------------------


@contextmanager
def cluster_processes(
    address: str, folder: Path, device: str | None = None
) -> Iterator[ProcessPool]:
    """Processes on the machines of a cluster, as many at a time as the workers have threads.

    A worker that is lost takes its process with it, and dask gives the job to another one. If the
    lost one is only out of reach, its process holds the lock of the job still: the other one
    returns :data:`kd_lrp_plugin.utils.workers.BUSY`. On exit, those that are left are ended.

    Args:
        address: see :func:`open_cluster`, as for the others.
        folder: in which the locks of the jobs lie.
        device: of the jobs.
    """
    with open_cluster(address, folder, device) as cluster:
        run = partial(_run_process, cluster.order)
        lost = (distributed.KilledWorker,)
        pool = ProcessPool(cluster.executor, run, cluster.threads, lost=lost, patience=PATIENCE)
        try:
            yield pool
        finally:
            cluster.order.token.unlink(missing_ok=True)
            end = time.monotonic() + 30
            left = [job for job, future in pool.sent if not future.done()]
            while any(is_locked(job.lock) for job in left) and time.monotonic() < end:
                time.sleep(0.2)


def _run_process(order: Order, job: ProcessJob) -> int:
    check_order(order)
    return run_process(job, order.is_wanted, pause=1)


# --- pieces of work in the workers themselves -----------------------------------------------------


@dataclass(frozen=True)
class Beginning:
    """What a worker does before its first piece of work; see :func:`cluster_workers`."""

    order: Order
    threads: int
    modules: Sequence[str]
    begin: Callable[..., object] | None
    arguments: Sequence[Any]

    def __call__(self) -> None:
        check_order(self.order)
        os.chdir(self.order.directory)
        begin_work(self.threads, self.modules, self.begin, self.arguments)


@contextmanager
def cluster_workers(
    address: str, folder: Path, begin: Callable[..., object] | None = None, *arguments: Any
) -> Iterator[Executor]:
    """The workers of a cluster, as :func:`kd_lrp_plugin.utils.workers.workers` gives processes.

    Args:
        address: see :func:`open_cluster`.
        folder: that all machines see.
        begin: is called in each worker before its first piece of work, with ``arguments``; what it
            keeps it replaces, for a worker may serve one sender after the other.
        *arguments: of ``begin``.

    Raises:
        ValueError: if a worker has several threads: one piece of work would draw from the random
            numbers of the other.
    """
    with open_cluster(address, folder, "cpu") as cluster:
        if several := {worker: n for worker, n in cluster.slots.items() if n > 1}:
            fix = "Start them with `dask worker ADDRESS --nthreads 1 --nworkers N`."
            raise ValueError(message("--scheduler", "workers of one thread each", several, fix))
        modules = list_modules_to_import()
        first = Beginning(cluster.order, cluster.threads, modules, begin, arguments)
        # Images in it are large: they are sent once to each worker.
        beginning = cluster.client.submit(bytes, pickle.dumps(first), pure=False)
        try:
            yield _Sharing(cluster.executor, cluster.order.token, beginning)
        except (distributed.KilledWorker, CancelledError) as error:
            fix = "See the logs of the workers; the same command goes on from what is kept."
            got = f"none that lasts ({error or 'the scheduler is gone'})"
            where = f"--scheduler {address}"
            raise ConnectionError(message(where, "a worker for each piece", got, fix)) from error


class _Sharing(Executor):
    """Sends each piece of work together with the beginning, as bytes.

    dask reads a task where it arrives: one that names a module which is not there ends the worker.
    """

    def __init__(self, executor: Executor, token: Path, beginning: "distributed.Future") -> None:
        self._executor, self._token = executor, token
        self._beginning: Any = beginning  # what it stands for, where it arrives

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        piece = pickle.dumps(partial(fn, *args, **kwargs))
        return self._executor.submit(_share, self._token, self._beginning, piece)


_ONE_AT_A_TIME = threading.Lock()
_BEGUN: list[Path] = []  # whose work this process does


def _share(token: Path, beginning: bytes, piece: bytes) -> Any:
    with _ONE_AT_A_TIME:
        if token not in _BEGUN:
            _BEGUN.clear()
            pickle.loads(beginning)()
            _BEGUN.append(token)
        return pickle.loads(piece)()
