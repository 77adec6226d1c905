"""What long work tells about itself: here, nothing. The command line shows it."""

from collections.abc import Iterable, Mapping


class Silence:
    """Listens to long work and says nothing; a subclass shows what it hears."""

    def track(self, items: Iterable, what: str, total: int) -> Iterable:
        """Pass the items on; a subclass shows how far they are."""
        return items

    def note(self, text: str) -> None:
        """Told what the user should know, such as that a run goes on."""

    def epoch(self, metrics: Mapping[str, float]) -> None:
        """Told the metrics of a finished epoch."""
