"""Worker processes that end with their parent."""

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from kd_lrp_plugin.utils.registry import list_registering_modules

INTERRUPTS, PAUSE = 4, 5  # how often a process is asked to stop, and how many seconds apart


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
    modules = [name for name in list_registering_modules() if name != "__main__"]
    initial = (threads, modules, begin, arguments)
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
    torch.set_num_threads(threads)
    end_with_parent()
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:  # of what was typed or run, and has no file here
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
    if begin:
        begin(*arguments)
