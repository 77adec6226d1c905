"""What long work tells about itself: here, nothing. The command line shows it."""

from collections.abc import Iterable, Mapping
from contextvars import ContextVar, Token


class Silence:
    """Listens to long work and says nothing; a subclass shows what it hears.

    Within ``with``, it is also what :func:`listening` returns.
    """

    _before: "Token[Silence]"

    def __enter__(self) -> "Silence":
        self._before = _LISTENING.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _LISTENING.reset(self._before)

    def track(self, items: Iterable, what: str, total: int) -> Iterable:
        """Pass the items on; a subclass shows how far they are."""
        return items

    def note(self, text: str) -> None:
        """Told what the user should know, such as that a run goes on."""

    def epoch(self, metrics: Mapping[str, float]) -> None:
        """Told the metrics of a finished epoch."""


_LISTENING: ContextVar[Silence] = ContextVar("listening", default=Silence())  # noqa: B039


def listening() -> Silence:
    """Who listens now: for what torchdistill calls, to which nothing can be handed.

    Example:
        >>> with Silence() as show:
        ...     listening() is show
        True
    """
    return _LISTENING.get()
