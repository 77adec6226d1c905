"""What several test modules share: one thread, fixed seeds, a check for traces left in a model."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import nn

# Commands and examples that tests start would else have as many threads as there are processors,
# each, and wait for each other's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Which runs were made here is noted in the user's own state, where tests leave nothing.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="kd_lrp_state")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors gain nothing from threads, and parallel test workers lose by them."""
    torch.set_num_threads(1)


def fingerprint(model: nn.Module) -> list[tuple]:
    """Everything of a model that a recording may touch, apart from its tensors."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    flags = ("training", "inplace", "fused_attn", "requires_grad", "momentum")
    facts: list[tuple] = [
        (
            name,
            type(module),
            id(type(module).forward),
            sorted(vars(module)),
            [list(getattr(module, hook)) for hook in hooks],
            [getattr(module, flag, None) for flag in flags],
        )
        for name, module in model.named_modules()
    ]
    facts += [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
    return facts


@pytest.fixture
def untouched() -> Callable[[nn.Module], AbstractContextManager[None]]:
    """``with untouched(model):`` fails unless the model is bit for bit as before afterwards."""

    @contextmanager
    def watch(model: nn.Module) -> Iterator[None]:
        facts = fingerprint(model)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        objects = {name: id(p) for name, p in model.named_parameters()}
        try:
            yield
        finally:
            assert fingerprint(model) == facts
            assert {name: id(p) for name, p in model.named_parameters()} == objects
            after = model.state_dict()
            assert list(after) == list(state)
            changed = [name for name in state if not torch.equal(state[name], after[name])]
            assert changed == []

    return watch
