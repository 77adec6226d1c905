"""What long work tells about itself: here, nothing. The command line shows it."""

from collections.abc import Iterable, Mapping
from contextvars import ContextVar, Token


class NullProgress:
    """Listens to long work and says nothing; a subclass shows what it hears.

    Within ``with``, it is also what :func:`current_progress` returns.
    """

    _before: "Token[NullProgress]"

    def __enter__(self) -> "NullProgress":
        self._before = _CURRENT.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _CURRENT.reset(self._before)

    def track(self, items: Iterable, what: str, total: int) -> Iterable:
        """Pass the items on; a subclass shows how far they are."""
        return items

    def note(self, text: str) -> None:
        """Take what the user should know, such as that a run resumes."""

    def epoch(self, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a finished epoch."""


_CURRENT: ContextVar[NullProgress] = ContextVar("current_progress", default=NullProgress())  # noqa: B039


def current_progress() -> NullProgress:
    """Who listens now: for what torchdistill calls, to which nothing can be handed.

    Example:
        >>> with NullProgress() as progress:
        ...     current_progress() is progress
        True
    """
    return _CURRENT.get()
