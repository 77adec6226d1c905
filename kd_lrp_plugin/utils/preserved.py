"""What is used, and left as it was found: a model, the random number generators."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def preserved(model: nn.Module) -> Iterator[nn.Module]:
    """The model; modes, buffers and ``requires_grad`` flags are put back, whatever runs inside.

    A buffer that was written to gets new memory with its old values, so that a graph made inside
    can still be derived; any other stays as it is, since a graph made before may wait for it.

    Example:
        >>> model = nn.BatchNorm2d(2)
        >>> with preserved(model):
        ...     _ = model.train().requires_grad_(False)(torch.rand(4, 2, 3, 3))
        >>> model.running_mean.tolist(), model.weight.requires_grad
        ([0.0, 0.0], True)
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                buffer.data = value
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


@contextmanager
def preserved_generators() -> Iterator[None]:
    """The global random number generators of Python, NumPy and PyTorch are afterwards as before.

    Example:
        >>> before = torch.get_rng_state()
        >>> with preserved_generators():
        ...     _ = torch.rand(3), random.random()
        >>> torch.equal(torch.get_rng_state(), before)
        True
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


class Generators(NamedTuple):
    """The global random number generators of PyTorch (on CPUs), NumPy and Python at some moment."""

    of_torch: Tensor
    of_numpy: Any
    of_python: Any

    @classmethod
    def take(cls) -> "Generators":
        return cls(torch.get_rng_state(), np.random.get_state(), random.getstate())  # noqa: NPY002

    @staticmethod
    def seed(*key: int) -> None:
        """Bring them to a state that the key alone decides."""
        state = np.random.SeedSequence(key).generate_state(3)
        torch.default_generator.manual_seed(int(state[0]))  # torch.manual_seed would reach GPUs too
        np.random.seed(int(state[1]))  # noqa: NPY002
        random.seed(int(state[2]))

    def restore(self) -> None:
        torch.set_rng_state(self.of_torch)
        np.random.set_state(self.of_numpy)  # noqa: NPY002
        random.setstate(self.of_python)

    def is_same(self, other: "Generators") -> bool:
        return (
            torch.equal(self.of_torch, other.of_torch)
            and np.array_equal(self.of_numpy[1], other.of_numpy[1])
            and self.of_numpy[2:] == other.of_numpy[2:]
            and self.of_python == other.of_python
        )
