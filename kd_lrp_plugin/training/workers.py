"""How many workers load the images, where the config does not say."""

import os
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from kd_lrp_plugin.training.experiment import Experiment
from kd_lrp_plugin.utils.preserved import preserved_generators
from kd_lrp_plugin.utils.progress import current_progress

BRIEF = 120.0  # seconds of loading in a whole run, below which no worker is worth its start
BATCHES = 16  # that are timed with each number of workers
LONG = 10.0  # seconds after which no further batch of them is
GAIN = 0.02  # of an epoch, below which more workers are no better


def choose_workers(experiment: Experiment) -> dict[str, Any] | None:
    """Set the number of workers of the loaders whose config has none, by measurement.

    An epoch's time is estimated with 0, 1, 2, 4 ... workers, up to the processors that there are:
    its start, and the time of up to sixteen training batches, each of which the models answer in
    evaluation mode, the student three times, as long as a step of training about takes it. All of
    them are loaded once before, so that what is kept in memory is. The smallest number is taken
    that is within 2 % of the best. Where loading takes less than two minutes in the whole run,
    there are no workers, and nothing is measured but two batches. Results do not depend on it.
    A number with which loading fails, as in a /dev/shm that is too small, is not taken, nor is any
    above it. A cached teacher takes no time.

    Returns:
        What was measured and chosen, as JSON; None where the config says how many train.
    """
    if not experiment.loading.is_free:
        return None
    context, loader = experiment.context, experiment.box.train_data_loader
    found: dict[str, Any] = {"chosen": 0}
    try:
        with preserved_generators():
            started = time.monotonic()
            batches = list(islice(loader, 2))
            seconds = (time.monotonic() - started) / len(batches)
            whole = seconds * len(loader) * experiment.box.num_epochs
            found["seconds_to_load_all_epochs"] = round(whole, 1)
            if context.run_on_rank_zero(lambda: whole) >= BRIEF:
                for _ in islice(loader, BATCHES):
                    pass
                epochs = _time_epochs(experiment)
                found["seconds_of_an_epoch"] = {str(n): round(s, 2) for n, s in epochs.items()}
                found["chosen"] = chosen = context.run_on_rank_zero(lambda: pick_count(epochs))
                shown = ", ".join(f"{s:.1f} s with {n}" for n, s in epochs.items())
                current_progress().note(f"num_workers: {chosen} (an epoch's batches take {shown})")
    finally:
        experiment.loading.set_workers(found["chosen"])
    return found


def list_counts() -> list[int]:
    """Numbers of workers to try: 0, and powers of two up to the processors, and these."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    return sorted({0, cores, *(2**n for n in range(cores.bit_length()))})


def pick_count(epochs: dict[int, float]) -> int:
    """The smallest number of workers with which an epoch takes hardly more than with the best.

    Example:
        >>> pick_count({0: 9.0, 1: 5.0, 2: 4.95})
        1
    """
    best = min(epochs.values())
    return min(count for count, seconds in epochs.items() if seconds <= (1 + GAIN) * best)


def _time_epochs(experiment: Experiment) -> dict[int, float]:
    """Seconds of an epoch by the number of workers, up to one with which loading fails."""
    epochs: dict[int, float] = {}
    for count in list_counts():
        seconds, failure = 0.0, ""
        try:
            seconds = _time_epoch(experiment, count)
        except (RuntimeError, OSError, ValueError) as error:
            if not count:
                raise
            failure = f"{type(error).__name__}: {error}"
            error.with_traceback(None)  # lets go of the workers, which end at once
        failures = [said for said in experiment.context.gather(failure) if said]
        if failures:
            current_progress().note(f"num_workers: below {count}, with which: {failures[0]}")
            break
        epochs[count] = seconds
    return epochs


def _time_epoch(experiment: Experiment, count: int) -> float:
    """Seconds of an epoch that loads with so many workers, estimated."""
    experiment.loading.set_workers(count)
    loader, models = experiment.box.train_data_loader, [experiment.original] * 3
    if experiment.original_teacher is not None and experiment.cache is None:
        models.append(experiment.original_teacher)
    ends, started = [], time.monotonic()
    with experiment.evaluating():
        for images, *_ in islice(loader, BATCHES):
            _answer(models, images.to(experiment.context.device))
            ends.append(time.monotonic() - started)
            if len(ends) > 2 and ends[-1] > LONG and experiment.context.world_size == 1:
                break
    rest = (ends[-1] - ends[0]) / max(1, len(ends) - 1)
    return ends[0] + rest * (len(loader) - 1)


def _answer(models: Sequence[Any], images: Tensor) -> None:
    for model in models:
        model(images.flatten(0, -4))  # a wrapper may give several images for one
    if images.device.type == "cuda":
        torch.cuda.synchronize()
