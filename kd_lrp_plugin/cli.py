"""The command line ``kd-lrp``: arguments, files, printing."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.data import DataLoader

from kd_lrp_plugin import training

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Explanation-guided knowledge distillation on torchdistill configs.",
)
console = Console()
errors = Console(stderr=True)


@app.callback()
def main(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the log.")] = False):
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING)
    logging.getLogger().setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.INFO if verbose else logging.WARNING)


@app.command()
def distill(
    config: Annotated[Path, typer.Argument(help="A torchdistill YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a value of the config; repeatable. Keys are joined by dots, "
            "`+` in front adds one.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder; default runs/DATASET/METHOD/CONFIG/SEED."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every random number generator.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:0; default: a GPU if there is one.")
    ] = None,
) -> None:
    """Train the student of a config, with its teacher if it has one, and test it.

    A config without a teacher trains that model alone: this is how teachers and baselines are
    made. Examples:

        kd-lrp distill torchdistill_configs/phantom/ce/mobilenetv2_100.yaml

        kd-lrp distill my.yaml --set num_epochs=2 --set train.optimizer.kwargs.lr=0.001 --seed 1
    """
    with Show() as show, _errors_in_words():
        folder = out or training.default_run_folder(config, seed)
        summary = training.distill(config, overrides or [], folder, seed, device, show)
    console.print(
        f"test accuracy {summary['test_accuracy']:.4f} with the weights of epoch "
        f"{summary['best_epoch']} (validation {summary['val_accuracy']:.4f}); written to {folder}"
    )


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="A run folder that kd-lrp distill has written.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
) -> None:
    """Classify image files with the student of a run. Not for clinical use."""
    with _errors_in_words():
        records = training.predict(run, images)
    table = Table("file", "class", "probability")
    for record in records:
        table.add_row(record["file"], record["class"], f"{record['probability']:.3f}")
    console.print(table)


@contextmanager
def _errors_in_words() -> Iterator[None]:
    """An expected error becomes its message and exit code 1; any other keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print("[red]Stopped.[/] What was made is in the folder that ends in .partial.")
        raise typer.Exit(130) from None
    except (ValueError, OSError, TypeError, FloatingPointError) as error:
        errors.print("[red]Error:[/]", end=" ")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        logging.getLogger(__name__).info("traceback", exc_info=error)
        raise typer.Exit(1) from error


class Show(training.Silence):
    """Progress bars and a line per epoch."""

    def __enter__(self) -> "Show":
        self._progress = Progress(
            TextColumn("{task.description:>16}"),
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

    def track(self, batches: DataLoader, what: str) -> Iterable:
        task = self._progress.add_task(what, total=len(batches))
        for batch in batches:
            yield batch
            self._progress.advance(task)
        self._progress.remove_task(task)

    def epoch(self, metrics: Mapping[str, float]) -> None:
        terms = [
            f"{name.removeprefix('train_')} {value:.3g}"
            for name, value in metrics.items()
            if name.startswith("train_") and name not in ("train_loss", "train_accuracy")
        ]
        console.print(
            f"epoch {metrics['epoch']:>3}  loss {metrics['train_loss']:.4f}  "
            f"accuracy {metrics['train_accuracy']:.3f}  val {metrics['val_accuracy']:.3f}  "
            f"[dim]{', '.join(terms)}  {metrics['images_per_second']:g} images/s[/]",
            highlight=False,
        )


if __name__ == "__main__":
    app()
