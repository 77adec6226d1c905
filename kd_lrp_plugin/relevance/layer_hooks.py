"""Hooks and attributes that are set on a model's layers, all of them undone at the end."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from kd_lrp_plugin.relevance.graph import refuse_checkpointing
from kd_lrp_plugin.utils.validation import message

Serve = Callable[[Any, Any], Tensor | None]


class ForwardHook:
    """One forward hook on all modules of the process, there while somebody listens to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: tuple[Callable[..., Any], ...] = ()
        self._handle: Any = None

    def add(self, listener: Callable[[nn.Module, tuple, dict, Any], Any]) -> None:
        """Let ``listener(module, args, kwargs, output)`` give another output, or None."""
        with self._lock:
            if not self._listeners:
                self._handle = torch_module.register_module_forward_hook(
                    self._call, with_kwargs=True
                )
            self._listeners += (listener,)

    def remove(self, listener: Callable[..., Any]) -> None:
        with self._lock:
            self._listeners = tuple(found for found in self._listeners if found != listener)
            if not self._listeners and self._handle is not None:
                self._handle.remove()
                # The handle leaves this behind, for which torch.compile then warns of hooks.
                torch_module._global_forward_hooks_with_kwargs.pop(self._handle.id, None)
                self._handle = None

    def _call(self, module: nn.Module, args: tuple, *rest: Any) -> Any:
        # Without keywords where another thread has just taken the hook away.
        kwargs, output = rest if len(rest) == 2 else ({}, *rest)
        result = None
        for listener in self._listeners:
            found = listener(module, args, kwargs, output)
            if found is not None:
                result = output = found
        return result


BEHIND_ALL = ForwardHook()


class LayerHooks:
    """What stands behind and in front of layers, while a forward pass is recorded.

    A hook on every layer, put there and taken away for each step, costs more than what it calls:
    one for all modules of the process looks the layer up. Only what must see an input that may be
    passed by keyword is a hook on the layer.

    Args:
        method: for messages.

    Attributes:
        is_recording: whether the forward pass has reached a target layer, and goes on.
    """

    def __init__(self, method: str) -> None:
        self.is_recording = False
        self._method = method
        self._undo: list[Callable[[], object]] = []
        self._behind: dict[nn.Module, list[tuple[str, Serve]]] = {}

    def listen(self) -> None:
        """Serve from now on, until :meth:`undo`."""
        # In front of the hooks of the user, which may change the output: what they do is then
        # part of the graph, as it would be between this layer and the next.
        BEHIND_ALL.add(self._serve_behind)
        self.add(lambda: BEHIND_ALL.remove(self._serve_behind))

    def add(self, undo: Callable[[], object]) -> None:
        self._undo.append(undo)

    def undo(self) -> None:
        self._behind.clear()
        while self._undo:
            self._undo.pop()()

    def set(self, module: nn.Module, name: str, value: object) -> None:
        own = vars(module)
        if name in own:
            self.add(partial(setattr, module, name, own[name]))
        else:  # of the class
            self.add(partial(delattr, module, name))
        setattr(module, name, value)

    def put_behind(self, name: str, module: nn.Module, serve: Serve) -> None:
        """Let ``serve(input, output)`` replace the output of ``module`` behind a target layer."""
        self._behind.setdefault(module, []).append((name, serve))

    def put_before(self, module: nn.Module, serve: Callable[[Tensor], Tensor]) -> None:
        """Let ``serve(input)`` replace the only input of ``module`` behind a target layer."""

        def hook(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if not self._is_serving():
                return None
            if args:
                return (serve(args[0]), *args[1:]), kwargs
            first = next(iter(kwargs))
            return args, {**kwargs, first: serve(kwargs[first])}

        self.add(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _serve_behind(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        result = None
        for name, serve in self._behind.get(module, ()):
            if not self._is_serving():
                return None
            refuse_checkpointing(f"layer {name!r}")
            served = serve(get_input(args, kwargs), output)
            if served is not None:
                result = output = served
        return result

    def refuse(self, name: str, module: nn.Module, expected: str) -> None:
        def serve(*_: object) -> None:
            fix = "Choose another method, or layers behind this one."
            got = type(module).__name__
            if "forward" in vars(module):
                got += " with a forward of the instance's own"
            raise ValueError(message(f"{self._method} at {name!r}", expected, got, fix))

        self.put_behind(name, module, serve)

    def _is_serving(self) -> bool:
        # What runs without gradients, as within a reentrant checkpoint, has no graph to serve.
        return self.is_recording and torch.is_grad_enabled()


class FusedNormInput:
    """The input of timm's norm that holds its activation, for one call.

    The value before the activation passes through the norm's ``drop`` and is served there; what
    the norm has read is seen in front of the norm only.
    """

    def __init__(self, name: str, serve: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._name = name
        self._serve = serve
        self._source: Tensor | None = None

    def keep(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        self._source = get_input(args, kwargs)

    def forget(self) -> None:
        self._source = None

    def serve_drop(self, _: object, output: Tensor) -> Tensor | None:
        return None if self._source is None else self._serve(self._source, output)

    def check(self, source: object, _: object) -> None:
        """Raise ``ValueError`` if a hook has changed the input after it was kept."""
        kept, self._source = self._source, None
        if kept is not None and kept is not source:
            fix = "Register hooks before the recording begins."
            got = "another hook behind it that changes the input"
            expected = "the hook of the recording to be the last"
            raise ValueError(message(f"layer {self._name!r}", expected, got, fix))


def get_input(args: tuple, kwargs: dict) -> Any:
    """The one input of a layer, which may be called by keyword."""
    return args[0] if args else next(iter(kwargs.values()), None)
