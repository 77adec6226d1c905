"""Where the numbers of a run are shown beside its own records: TensorBoard, MLflow, or W&B.

Each takes its address from where its users keep it: ``MLFLOW_TRACKING_URI`` and
``MLFLOW_EXPERIMENT_NAME``, ``WANDB_PROJECT`` and ``WANDB_MODE``. A run that resumes goes on in the
run that it has there, and sends what that lacks.
"""

import importlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.utils.extras import imports_of_an_extra
from kd_lrp_plugin.utils.validation import message

PROJECT = "kd_lrp_plugin"  # of W&B, where WANDB_PROJECT names none
Show = Callable[[Mapping[str, float]], None]
"""Takes the metrics of an epoch, its number among them as "epoch"."""


def check_installed(name: str) -> None:
    """Raise ModuleNotFoundError, with what to install, where a logger is not."""
    with imports_of_an_extra():
        importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)


def open_logger(
    spec: RunSpec, folder: RunFolder, records: Sequence[Mapping[str, float]]
) -> AbstractContextManager[Show]:
    """The logger of ``spec.log``, which has been sent ``records`` and takes the next epochs.

    Args:
        spec: of the run.
        folder: of the run; notes which run it is to its logger.
        records: of the epochs that are finished.

    Raises:
        ModuleNotFoundError: if the logger is not installed; says what to install.
        OSError: while it is open, if the logger fails; no epoch is lost by it.
    """
    check_installed(spec.log)
    return _LOGGERS[spec.log](spec, folder, records)


@contextmanager
def _tensorboard(
    spec: RunSpec, folder: RunFolder, records: Sequence[Mapping[str, float]]
) -> Iterator[Show]:
    from torch.utils.tensorboard import SummaryWriter

    folder.clear_events()
    with SummaryWriter(str(folder.path)) as board:

        def show(metrics: Mapping[str, float]) -> None:
            for name, value in metrics.items():
                board.add_scalar(name, value, int(metrics["epoch"]))
            board.flush()

        for metrics in records:
            show(metrics)
        yield show


@contextmanager
def _mlflow(
    spec: RunSpec, folder: RunFolder, records: Sequence[Mapping[str, float]]
) -> Iterator[Show]:
    import mlflow

    about = folder.read_logger("mlflow")
    name = None if about else str(folder.path)
    with (
        _failing_as(mlflow.exceptions.MlflowException, "mlflow", about),
        mlflow.start_run(about.get("id"), run_name=name, nested=True) as run,
    ):
        own, client = run.info.run_id, mlflow.MlflowClient()
        folder.note_logger("mlflow", {"id": own, "at": mlflow.get_tracking_uri()})
        if not about:
            mlflow.log_params(_describe(spec))
        sent = {  # MLflow keeps both of two values of a step
            (metric, value.step)
            for metric in (run.data.metrics if about else ())
            for value in client.get_metric_history(own, metric)
        }

        def show(metrics: Mapping[str, float]) -> None:
            epoch, now = int(metrics["epoch"]), int(time.time() * 1000)
            new = [(name, value) for name, value in metrics.items() if (name, epoch) not in sent]
            sent.update((name, epoch) for name, _ in new)
            client.log_batch(own, [mlflow.entities.Metric(*pair, now, epoch) for pair in new])

        for metrics in records:
            show(metrics)
        yield show


@contextmanager
def _wandb(
    spec: RunSpec, folder: RunFolder, records: Sequence[Mapping[str, float]]
) -> Iterator[Show]:
    import wandb

    about = folder.read_logger("wandb")
    with (
        _failing_as(wandb.Error, "wandb", about),
        wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=about.get("id"),
            resume="allow" if about else None,
            name=str(folder.path),
            config=_describe(spec),
            reinit="create_new",
        ) as run,
    ):
        folder.note_logger("wandb", {"id": run.id, "at": run.project})
        run.define_metric("*", step_metric="epoch")  # its own steps only go up

        def show(metrics: Mapping[str, float]) -> None:
            run.log(dict(metrics))

        for metrics in records[run.starting_step :]:
            show(metrics)
        yield show


_LOGGERS = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}


def _describe(spec: RunSpec) -> dict[str, Any]:
    """What a run is, as loggers list it: config, seed, and each override by its key."""
    changes = {}
    for override in spec.overrides:
        key, _, value = override.lstrip("+").partition("=")
        changes[re.sub(r"[^\w\-. :/]", "_", key)] = value  # MLflow takes no other characters
    return {"config": str(spec.config), "seed": spec.seed, **changes}


@contextmanager
def _failing_as(kind: type[Exception], name: str, about: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except kind as error:
        words = next(iter(str(error).splitlines()), type(error).__name__)
        begun = f" that has run {about['id']}, begun at {about['at']}" if about else ""
        fix = (
            "No epoch is lost: the same command resumes and sends what is missing; with another "
            "--log it sends all of it there."
        )
        raise OSError(message(name, f"a logger{begun}", words, fix)) from error
