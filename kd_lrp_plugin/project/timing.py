"""How long the commands of a project will take, from one step and one batch of each config."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, default_collate

from kd_lrp_plugin.config.build import Assembly
from kd_lrp_plugin.selection.candidates import Candidate
from kd_lrp_plugin.selection.scoring import Scorer
from kd_lrp_plugin.selection.select import Selection
from kd_lrp_plugin.selection.spec import SelectionSpec
from kd_lrp_plugin.torchdistill.models import make_builder
from kd_lrp_plugin.training.experiment import Experiment
from kd_lrp_plugin.utils.distributed import DistributedContext

STARTING = 8.0  # seconds until a command has imported all that it needs
EVALUATING, EXPLAINING, REPORTING = 30.0, 120.0, 10.0
SEEDS = 3


@dataclass(frozen=True)
class Pace:
    """Seconds of the parts of a run.

    Attributes:
        step: one of training, the images being there.
        batch: one of evaluation.
        reading: of one batch of images.
    """

    step: float
    batch: float
    reading: float


def measure_pace(assembly: Assembly, context: DistributedContext) -> Pace:
    """Time the second of two steps, and a batch of validation; the assembly is used up."""
    experiment = Experiment(assembly, context)
    experiment.begin_epoch()
    loader = experiment.box.train_data_loader
    started = time.perf_counter()
    images, targets, *_ = _read_batch(loader)
    reading = time.perf_counter() - started
    images, targets = images.to(context.device), targets.to(context.device)
    for _ in range(2):
        started = time.perf_counter()
        loss = experiment.training_loss(images, targets, {})
        experiment.box.post_forward_process(loss=loss)
        loss.item()  # waits for a GPU
        step = time.perf_counter() - started
    with experiment.evaluating():
        started = time.perf_counter()
        experiment.loss(images, targets, {}).item()
    return Pace(step, time.perf_counter() - started, reading)


def _read_batch(loader: DataLoader) -> list:
    items = [loader.dataset[index] for index in next(iter(loader.batch_sampler))]  # type: ignore
    return (loader.collate_fn or default_collate)(items)


def estimate_run(
    pace: Pace, images: dict[str, int], batch_size: int, epochs: int, workers: int
) -> float:
    """Seconds of a training, from reading all images to the test.

    Example:
        >>> pace = Pace(step=1.0, batch=0.5, reading=0.25)
        >>> images = {"train": 8, "val": 4, "test": 4}
        >>> estimate_run(pace, images, batch_size=4, epochs=10, workers=0) - STARTING
        34.25
    """
    reading = pace.reading / max(1, workers)
    steps, batches = (math.ceil(images[kind] / batch_size) for kind in ("train", "val"))
    tests = math.ceil(images["test"] / batch_size)
    epoch = steps * (pace.step + reading) + batches * (pace.batch + reading)
    once = (steps + batches + tests) * pace.reading + tests * (pace.batch + reading)
    return STARTING + epochs * epoch + once


def measure_selection(assembly: Assembly) -> float:
    """Seconds of a selection, from one score of its first candidate."""
    kwargs = assembly.content["models"]["student_model"]["kwargs"]
    spec = SelectionSpec.from_kwargs(**kwargs)
    name, entry = next(iter(spec.entries().items()))
    scorer = Scorer(Selection(spec, make_builder).setup)
    candidate = Candidate(name, make_builder(entry), None, entry)
    started = time.perf_counter()
    scorer(candidate, 0)
    seconds = time.perf_counter() - started
    return STARTING + seconds * len(spec.entries()) * len(spec.seeds)


def describe_machine(device: torch.device) -> str:
    """The device, and the threads of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads: Sequence[str] = ("a thread", f"{torch.get_num_threads()} threads")
    return f"CPU, {threads[torch.get_num_threads() > 1]}"
