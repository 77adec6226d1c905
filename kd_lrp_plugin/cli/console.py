"""How the command line speaks: plain text, progress, errors in words, options commands share."""

import logging
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from kd_lrp_plugin.cli.completion import complete_override
from kd_lrp_plugin.plots.text import plain_text
from kd_lrp_plugin.utils.distributed import RankZeroFailed, rank_and_world_size
from kd_lrp_plugin.utils.extras import explain_missing
from kd_lrp_plugin.utils.progress import NullProgress
from kd_lrp_plugin.utils.registry import unknown_name
from kd_lrp_plugin.utils.validation import message

RANK, _ = rank_and_world_size()  # the first process speaks for all
console = Console(quiet=RANK > 0)
errors = Console(stderr=True)
ConfigFile = Annotated[Path, typer.Argument(help="A torchdistill YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a value of the config; repeatable. Keys are joined by dots, "
        "`+` in front adds one.",
        autocompletion=complete_override,
    ),
]
Device = Annotated[
    str | None, typer.Option(help="Such as cpu or cuda:0; default: a GPU if there is one.")
]
Log = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="Where the epochs are shown as well: tensorboard, mlflow or wandb."
    ),
]
Safe = Annotated[
    bool,
    typer.Option(
        "--safe", help="Refuse YAML tags and imports that could run code of the config's author."
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Of a dask scheduler, such as tcp://host:8786, whose workers do the work. They share "
        "the folders of this command, at the same paths, and its environment. dask unpickles what "
        "it is sent, which can run anything: only for your own machines, on a network of yours.",
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Run what the config of a run folder names although the run was not made here, by "
        "this user on this machine.",
    ),
]


def say(text: object, style: str = "", to: Console = console, end: str = "\n") -> None:
    """Print plain text. All that a command prints goes through here: nothing in it is markup.

    Args:
        text: may have several lines; control characters in it are shown, not obeyed.
        style: of rich, for all of it.
        to: :data:`console`, or :data:`errors`.
        end: what follows it.
    """
    words = plain_text(text, lines=True)
    encoding = to.encoding or "utf-8"
    words = words.encode(encoding, "backslashreplace").decode(encoding)
    to.print(Text(words, style), soft_wrap=True, end=end)


@contextmanager
def errors_in_words(stopped: str = "") -> Iterator[None]:
    """An expected error becomes its message and exit code 1; any other keeps its traceback.

    A stop, by Ctrl-C or SIGTERM, is no error, and exits with code 130.
    """

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        if RANK == 0:
            say("Stopped.", "red", errors, end=" ")
            say(stopped, to=errors)
        raise typer.Exit(130) from None
    except RankZeroFailed as error:
        raise typer.Exit(1) from error
    except AttributeError as error:
        if not isinstance(error.obj, ModuleType):
            raise
        module = getattr(error.obj, "__file__", None) or error.obj.__name__
        say("Error:", "red", errors, end=" ")
        say(unknown_name(f"name in {module}", error.name, dir(error.obj)), to=errors)
        raise typer.Exit(1) from error
    except (ValueError, OSError, TypeError, KeyError, FloatingPointError, ImportError) as error:
        process = f" in process {RANK}" if RANK else ""
        say(f"Error{process}:", "red", errors, end=" ")
        words = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        if isinstance(error, ImportError):
            missing = explain_missing(error)
            words = missing or words
            if (
                not missing
                and isinstance(error, ModuleNotFoundError)
                and str(error).startswith("No module named")
            ):
                fix = "Give the command with PYTHONPATH=FOLDER, where FOLDER holds it."
                words = message(f"module {error.name}", "one that can be imported", "none", fix)
        if isinstance(error, OSError) and error.strerror and error.filename is not None:
            got = error.strerror[0].lower() + error.strerror[1:]
            words = message(str(error.filename), "a path that can be used", got, "Check it.")
        say(words, to=errors)
        logging.getLogger(__name__).info("traceback", exc_info=error)
        raise typer.Exit(1) from error
    finally:
        signal.signal(signal.SIGTERM, before)


class RichProgress(NullProgress):
    """Progress bars and a line per epoch."""

    def __enter__(self) -> "RichProgress":
        super().__enter__()
        self._progress = Progress(
            TextColumn("{task.description:>16}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        super().__exit__()

    def track(self, items: Iterable, what: str, total: int) -> Iterable:
        task = self._progress.add_task(plain_text(what), total=total)
        try:
            for item in items:
                yield item
                self._progress.advance(task)
        finally:
            self._progress.remove_task(task)

    def note(self, text: str) -> None:
        say(text)

    def epoch(self, metrics: Mapping[str, float]) -> None:
        terms = [
            f"{name.removeprefix('train_')} {value:.3g}"
            for name, value in metrics.items()
            if name.startswith("train_") and name not in ("train_loss", "train_accuracy")
        ]
        accuracy = metrics.get("train_accuracy", float("nan"))
        say(
            f"epoch {metrics['epoch']:>3}  loss {metrics['train_loss']:.4f}  "
            f"accuracy {accuracy:.3f}  val {metrics['val_accuracy']:.3f}  ",
            end="",
        )
        say(f"{', '.join(terms)}  {metrics['images_per_second']:g} images/s", "dim")


def parse_seeds(text: str | None) -> int | list[int] | None:
    """Seeds as typed: how many, or which.

    Example:
        >>> parse_seeds("5"), parse_seeds("0,1,7"), parse_seeds("7,")
        (5, [0, 1, 7], [7])
    """
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        numbers = []
    if not numbers:
        fix = "Such as 5 for five of them, or 0,1,2."
        raise ValueError(message("--seeds", "numbers", repr(text), fix))
    return numbers[0] if text.strip() == str(numbers[0]) else numbers
