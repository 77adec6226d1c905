"""What is used, and left as it was found: a model, the random number generators."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


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
