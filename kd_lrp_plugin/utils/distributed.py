"""The processes that torchrun starts: one group, and the few things they say to each other.

Without torchrun everything here is trivial: one process, the first. PyTorch is imported where it
is used: the command line asks for its rank before it knows whether there is anything to compute.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from kd_lrp_plugin.utils.validation import message

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class RankZeroFailed(RuntimeError):
    """The first process has raised an error, and says which; the others raise this."""


@dataclass(frozen=True)
class DistributedContext:
    """This process among all that train one student.

    Attributes:
        device: where this process computes.
        rank: its number, from 0.
        world_size: how many there are.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1

    def gather(self, item: T) -> list[T]:
        """The items of all processes in the order of their ranks, on every process."""
        if self.world_size == 1:
            return [item]
        from torch import distributed

        items: list[Any] = [None] * self.world_size
        distributed.all_gather_object(items, item)
        return items

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Give every process the tensor of the first, in place."""
        if self.world_size > 1:
            from torch import distributed

            # Memory is sent, whatever the strides: channels_last would arrive in another order.
            buffer = tensor.contiguous()
            distributed.broadcast(buffer, 0)
            tensor.copy_(buffer)

    def all_reduce_mean(self, tensor: torch.Tensor) -> None:
        """Give every process the mean over all, in place."""
        if self.world_size > 1:
            from torch import distributed

            buffer = tensor.contiguous()  # as in broadcast
            distributed.all_reduce(buffer)
            tensor.copy_(buffer / self.world_size)  # gloo has no mean of its own

    def run_on_rank_zero(self, work: Callable[[], T]) -> T:
        """What ``work`` returns in the first process, on every process.

        Raises:
            Exception: what ``work`` raises; in the other processes :class:`RankZeroFailed`.
        """
        outcome: list[Any] = [None, None]
        failure: Exception | None = None
        if self.rank == 0:
            try:
                outcome[0] = work()
            except Exception as error:
                failure = error
                outcome[1] = f"{type(error).__name__}: {error}"
        if self.world_size > 1:
            from torch import distributed

            # A failure is sent as words: the others would wait for ever at the next exchange for a
            # process that has raised, and not every exception can be pickled.
            distributed.broadcast_object_list(outcome)
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            raise RankZeroFailed(outcome[1])
        return outcome[0]


def rank_and_world_size() -> tuple[int, int]:
    """Rank and number of the processes that torchrun has started; (0, 1) without it."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@contextmanager
def init_distributed(device: str | None = None) -> Iterator[DistributedContext]:
    """This process, joined with the others if torchrun has started it; leaves them on exit.

    Args:
        device: such as "cpu" or "cuda:0"; None takes a GPU if there is one. Under torchrun
            "cuda" and None give each process of a machine a GPU of its own; on CPUs the
            processes speak by gloo, on GPUs by nccl.

    Raises:
        ValueError: for a device that is not there, or more processes than GPUs.
    """
    import torch
    from torch import distributed

    try:
        kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        fix = "Such as --device cpu or --device cuda:0."
        raise ValueError(message("device", "one that PyTorch knows", repr(device), fix)) from None
    if kind.type == "cuda" and not torch.cuda.is_available():
        fix = "Use --device cpu."
        raise ValueError(message("device", "one that PyTorch finds", repr(device), fix))
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        yield DistributedContext(kind)
        return
    if kind.type == "cuda":
        local_rank, found = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local_rank >= found:
            fix = "Lower --nproc_per_node, or use --device cpu."
            raise ValueError(message("torchrun", f"at most {found} processes", local_rank + 1, fix))
        kind = torch.device("cuda", local_rank)
        torch.cuda.set_device(kind)
    distributed.init_process_group("nccl" if kind.type == "cuda" else "gloo")
    try:
        yield DistributedContext(kind, rank, world_size)
    finally:
        distributed.destroy_process_group()
