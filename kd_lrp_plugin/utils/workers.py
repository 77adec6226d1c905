"""Worker processes that end with their parent."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def workers(
    jobs: int, begin: Callable[..., object] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """Processes that share the threads of this one, and end when it does, even by a kill.

    Args:
        jobs: how many.
        begin: is called first in each of them, with ``arguments``; all can be pickled.
        *arguments: of ``begin``.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    # A fork starts at once, but may hang in a parallel region; with one thread there is none.
    forks = threads == 1 and sys.platform == "linux" and not torch.cuda.is_initialized()
    context: Any = multiprocessing.get_context("fork" if forks else "spawn")
    with ProcessPoolExecutor(jobs, context, _begin, (threads, begin, arguments)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(threads: int, begin: Callable[..., object] | None, arguments: Sequence[Any]) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    if begin:
        begin(*arguments)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)  # the main thread waits for work that nobody sends any more
