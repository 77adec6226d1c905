"""Worker processes that end with their parent, here or where a dask worker is."""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kd_lrp_plugin.utils.files import is_locked
from kd_lrp_plugin.utils.registry import list_registering_modules
from kd_lrp_plugin.utils.validation import message

INTERRUPTS, PAUSE = 4, 5  # how often a process is asked to stop, and how many seconds apart
BUSY = 75  # exit code where another process holds the lock (EX_TEMPFAIL)
UNWANTED = 130  # exit code of a process whose sender is gone, as after Ctrl-C
LOOKS = 5  # that must not see a sender before it counts as gone


# --- pools of equal processes ---------------------------------------------------------------------


def check_jobs(jobs: int | None, scheduler: str | None) -> None:
    """Raise ValueError for jobs beside a scheduler, whose workers say how many they take."""
    if jobs is not None and scheduler is not None:
        fix = "Leave it out, and start more workers or fewer, with --nworkers and --nthreads."
        raise ValueError(message("--jobs", "none beside --scheduler", jobs, fix))


@dataclass(frozen=True)
class Workforce:
    """Who shares a work of many pieces.

    Attributes:
        jobs: processes of this machine; one if None.
        scheduler: of dask workers, which do it instead; see
            :func:`kd_lrp_plugin.utils.cluster.cluster_workers`.

    Raises:
        ValueError: for jobs beside a scheduler.
    """

    jobs: int | None = None
    scheduler: str | None = None

    def __post_init__(self) -> None:
        check_jobs(self.jobs, self.scheduler)

    @property
    def is_alone(self) -> bool:
        """Whether this process does all of it."""
        return self.scheduler is None and self.jobs in (None, 1)

    def check(self, folder: Path) -> None:
        """Raise, within seconds, what :meth:`open` would for a scheduler."""
        if self.scheduler is not None:
            with self.open(folder):
                pass

    def open(
        self, folder: Path, begin: Callable[..., object] | None = None, *arguments: Any
    ) -> AbstractContextManager[Executor]:
        """A pool that calls ``begin`` with its arguments first in each of its processes.

        Args:
            folder: that all machines see.
            begin: see :func:`workers`.
            *arguments: of ``begin``.

        Raises:
            ModuleNotFoundError: for a scheduler without the extra ``cluster``.
        """
        if self.scheduler is None:
            return workers(self.jobs or 1, begin, *arguments)
        # It takes half a second to import.
        from kd_lrp_plugin.utils.cluster import cluster_workers

        return cluster_workers(self.scheduler, folder, begin, *arguments)


@contextmanager
def workers(
    jobs: int, begin: Callable[..., object] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """Processes that share the threads of this one, and end when it does, even by a kill.

    What modules of a user have registered here, such as scores, is registered in them as well.

    Args:
        jobs: how many.
        begin: is called first in each of them, with ``arguments``; all can be pickled.
        *arguments: of ``begin``.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    # A fork starts at once, but may hang in a parallel region; with one thread there is none.
    forks = threads == 1 and sys.platform == "linux" and not torch.cuda.is_initialized()
    context: Any = multiprocessing.get_context("fork" if forks else "spawn")
    # A spawned process knows what its imports register; __main__ it imports by itself.
    initial = (threads, list_modules_to_import(), begin, arguments)
    with ProcessPoolExecutor(jobs, context, _begin, initial) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def end_with_parent(interrupt: bool = False) -> None:
    """End this process when the one that started it is gone, however that has ended.

    A child of multiprocessing watches its parent. Any other process watches its standard input,
    which its parent must hold open as a pipe: the system closes it when the parent ends.

    Args:
        interrupt: raise KeyboardInterrupt in the main thread, which must call this, so that work
            can be put away; after that, or without, the process exits at once.
    """
    if interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup and & switch it off
    threading.Thread(target=_watch_parent, args=(interrupt,), daemon=True).start()


def _watch_parent(interrupt: bool) -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
    else:
        while os.read(0, 1):  # not sys.stdin, whose lock a forked child would inherit
            pass
    for _ in range(INTERRUPTS if interrupt else 0):
        # A real signal, which ends a sleep or a wait too. One is lost where it meets a destructor.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(PAUSE)
    os._exit(130)  # the main thread may wait for work that nobody sends any more


def _begin(
    threads: int,
    modules: Sequence[str],
    begin: Callable[..., object] | None,
    arguments: Sequence[Any],
) -> None:
    end_with_parent()
    begin_work(threads, modules, begin, arguments)


def begin_work(
    threads: int,
    modules: Sequence[str],
    begin: Callable[..., object] | None,
    arguments: Sequence[Any],
) -> None:
    """Make this process ready for work that another one sends.

    Args:
        threads: of PyTorch.
        modules: that the other one has imported to fill registries.
        begin: is called with ``arguments``.
        arguments: of ``begin``.
    """
    torch.set_num_threads(threads)
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:  # of what was typed or run, and has no file here
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
    if begin:
        begin(*arguments)


def list_modules_to_import() -> list[str]:
    """Modules that have filled registries here, and that another process can import."""
    return [name for name in list_registering_modules() if name != "__main__"]


def count_cores() -> int:
    """Processors that this process may use."""
    can_tell = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if can_tell else os.cpu_count() or 1


def count_threads(jobs: int, cores: int | None = None) -> int:
    """Threads for each of so many processes, unless ``OMP_NUM_THREADS`` says how many."""
    if (given := os.environ.get("OMP_NUM_THREADS", "")).isdigit() and int(given) > 0:
        return int(given)
    return max(1, (cores or count_cores()) // jobs)


# --- processes of one command each ----------------------------------------------------------------


@dataclass(frozen=True)
class ProcessJob:
    """A process to start, wherever its folders are seen.

    Attributes:
        words: for Python, that of the machine where it runs.
        directory: to work in.
        log: file for its output; overwritten.
        lock: it holds this while it works; not started where another process does.
        environment: variables that it has beside those of the machine.
    """

    words: tuple[str, ...]
    directory: Path
    log: Path
    lock: Path
    environment: Mapping[str, str]


def run_process(job: ProcessJob, wanted: Callable[[], bool], pause: float = 0.2) -> int:
    """Run a process to its end, or to that of who wants it.

    Args:
        job: what to run; its standard input is closed when it shall end.
        wanted: whether somebody waits for it still.
        pause: seconds between two looks.

    Returns:
        Its exit code; :data:`BUSY` without a start if another process holds the lock.
    """
    if not wanted():
        return UNWANTED
    if is_locked(job.lock):
        return BUSY
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *job.words],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=job.directory,
            env={**os.environ, **job.environment},
            start_new_session=True,  # Ctrl-C is for the process that waits, which ends this one
        )
    try:
        unseen = 0  # looks in a row at which nobody waited; a network file system may err once
        while (code := process.poll()) is None and unseen < LOOKS:
            unseen = 0 if wanted() else unseen + 1
            time.sleep(pause)
        return UNWANTED if code is None else code
    finally:
        process.stdin.close()  # type: ignore[union-attr]
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class ProcessPool:
    """Runs processes by the workers of an executor.

    Attributes:
        executor: of threads here, or of dask workers.
        run: what a worker does with a job; gives the exit code.
        threads: for each process.
        slots: how many processes at most are submitted; None for all, where the executor queues.
        lost: what a future raises whose worker was lost again and again.
        patience: seconds until what a process has written is seen here.
        sent: jobs and their futures.
    """

    executor: Executor
    run: Callable[[ProcessJob], int]
    threads: int
    slots: int | None = None
    lost: tuple[type[Exception], ...] = ()
    patience: float = 0
    sent: "list[tuple[ProcessJob, Future[int]]]" = field(default_factory=list)

    def submit(self, job: ProcessJob) -> "Future[int]":
        """The exit code of a job, as soon as it is known."""
        future = self.executor.submit(self.run, job)
        self.sent.append((job, future))
        return future


@contextmanager
def local_processes(jobs: int = 1) -> Iterator[ProcessPool]:
    """So many processes of this machine at a time; on exit, those that are left are ended."""
    stopped = threading.Event()
    run = partial(run_process, wanted=lambda: not stopped.is_set())
    with ThreadPoolExecutor(jobs) as executor:
        try:
            yield ProcessPool(executor, run, count_threads(jobs), slots=jobs)
        finally:
            stopped.set()
