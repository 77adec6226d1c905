"""A dictionary of named entries whose missing keys explain themselves."""

import sys
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Generic, TypeVar

T = TypeVar("T")
_REGISTERING: dict[str, None] = {}  # modules that have registered something, in their order


class Registry(Mapping[str, T], Generic[T]):
    """Named entries: read like a dict, filled by :meth:`register`.

    Args:
        kind: what the entries are ("loss", "method"), for messages.

    Example:
        >>> SHAPES = Registry("shape")
        >>> @SHAPES.register
        ... def circle(): ...
        >>> SHAPES["cirlce"]
        Traceback (most recent call last):
        ...
        KeyError: "shape: expected one of ['circle'], got 'cirlce'. Did you mean 'circle'?"
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, entry: T, name: str | None = None) -> T:
        """Add ``entry`` under ``name`` (its ``__name__`` if none is given); return it.

        Raises:
            ValueError: if the name is taken.
        """
        key = name if name is not None else getattr(entry, "__name__")  # noqa: B009
        if key in self._entries:
            raise ValueError(
                f"{self.kind}: expected a new name, got {key!r}, which is registered already. "
                "Choose another name."
            )
        self._entries[key] = entry
        _REGISTERING[sys._getframe(1).f_globals.get("__name__", "__main__")] = None
        return entry

    def __getitem__(self, key: str) -> T:
        if key not in self._entries:
            raise KeyError(unknown_name(self.kind, key, self._entries))
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def list_registering_modules() -> list[str]:
    """The modules whose import has registered something: what another process must import too."""
    return list(_REGISTERING)


def unknown_name(where: str, got: object, known: Mapping[str, object] | list[str]) -> str:
    """The message for a name that is none of the ``known`` ones, with the nearest ones.

    Example:
        >>> unknown_name("rule", "epsilom", ["epsilon", "gamma"])
        "rule: expected one of ['epsilon', 'gamma'], got 'epsilom'. Did you mean 'epsilon'?"
    """
    names = sorted(known)
    near = get_close_matches(str(got), names, n=3, cutoff=0.5)
    shown = names if len(names) <= 12 else f"{len(names)} names such as {near or names[:6]}"
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"{where}: expected one of {shown}, got {got!r}.{hint}"
