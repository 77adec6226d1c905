"""Where the time of an epoch goes, measured over some steps of it."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchdistill.common import main_util
from torchvision import transforms
from torchvision.transforms import v2

from kd_lrp_plugin.training.experiment import Experiment
from kd_lrp_plugin.training.workers import choose_workers
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message

STEPS, WARM = 20, 3
MOST_BYTES = 2**30  # of the batches that are kept to be taken again
PARTS = ("wait for data", "copy to device", "forward", "maps and losses", "backward", "step")
LOADING = ("decode", "transform", "collate")


class Stopwatch:
    """Seconds since the last lap, by name; of a GPU, once it has done what it was given."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.seconds: dict[str, float] = defaultdict(float)
        self.restart()

    def restart(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        before = self._last
        self.restart()
        self.seconds[name] += self._last - before


def profile_epoch(experiment: Experiment, seed: int = 0) -> dict[str, Any]:
    """Train some steps of an epoch, and say where their time goes; the models change by it.

    The same batches are loaded three times: twice in this process, of which the second is timed,
    so that what can be kept in memory is there; then as in training, and trained with. Then they
    are trained with again from memory, which shows what an epoch would take that never waited.

    Returns:
        ``steps`` that were timed; ``images`` in them; ``seconds`` of a step by :data:`PARTS`, and
        of loading its images in one process by :data:`LOADING`; ``workers``; ``from_memory``,
        seconds of a step whose batch is in memory already; and ``workers_measured``, see
        :func:`kd_lrp_plugin.training.workers.choose_workers`.

    Raises:
        ValueError: with several processes, with a cached teacher, or for fewer than two batches in
            an epoch.
    """
    loader = experiment.box.train_data_loader
    if experiment.cache is not None:
        where = experiment.cache.spec.where
        fix = f"Add --set {where}=null; examples/benchmarks/benchmark_teacher_cache.py times both."
        expected = "a teacher that is asked in each step"
        raise ValueError(message("--profile", expected, f"one with {where}", fix))
    if experiment.context.world_size > 1:
        got, fix = f"{experiment.context.world_size}", "Leave torchrun out."
        raise ValueError(message("--profile", "one process", got, fix))
    if len(loader) < 2:
        got, fix = f"{len(loader)} in an epoch", "Lower batch_size."
        raise ValueError(message("--profile", "two batches or more", got, fix))
    measured = choose_workers(experiment)
    warm = min(WARM, len(loader) - 1)
    count = min(len(loader), warm + STEPS)

    def begin() -> None:
        main_util.set_seed(seed)
        experiment.loading.set_seed(seed)

    experiment.begin_epoch()
    for _ in range(2):
        begin()
        loading = _time_loading(loader, count, warm)
    begin()
    kept: list[Any] = []
    sizes: list[int] = []
    batches = _keep(loader, kept, sizes, count)
    seconds = _time_steps(experiment, batches, warm)
    steps = count - warm
    again = _time_steps(experiment, iter(kept), 0)
    return {
        "steps": steps,
        "warm_up": warm,
        "images": sum(sizes[warm:]),
        "seconds": {
            **{name: seconds[name] / steps for name in PARTS},
            **{name: loading[name] / steps for name in LOADING},
        },
        "workers": loader.num_workers,
        "from_memory": sum(again[name] for name in PARTS[1:]) / len(kept),
        "workers_measured": measured,
    }


def _keep(loader: DataLoader, kept: list[Any], sizes: list[int], count: int) -> Iterator[Any]:
    """Batches of a loader; after the warm-up, as many as have room are kept, one at least.

    How many images each of them has is added to ``sizes``.
    """
    room, warm = MOST_BYTES, min(WARM, len(loader) - 1)
    for number, batch in enumerate(islice(loader, count)):
        sizes.append(len(batch[0]))
        room -= batch[0].nbytes
        if number >= warm and (room > 0 or not kept):
            kept.append(batch)
        yield batch


def _time_steps(experiment: Experiment, batches: Iterator[Any], warm: int) -> dict[str, float]:
    """Seconds of steps by their parts; the first ones are not counted."""
    box, device = experiment.box, experiment.context.device
    watch = Stopwatch(device)
    hooks: list[Callable[[], Any]] = [
        lambda: box.criterion.register_forward_pre_hook(lambda *_: watch.lap("forward")),
        lambda: box.criterion.register_forward_hook(lambda *_: watch.lap("maps and losses")),
        lambda: box.optimizer.register_step_pre_hook(lambda *_: watch.lap("backward")),
        lambda: box.optimizer.register_step_post_hook(lambda *_: watch.lap("step")),
    ]
    with ExitStack() as stack:
        for register in hooks:
            stack.callback(register().remove)
        watch.restart()
        tracked = current_progress().track(batches, "timing steps", warm + STEPS)
        for number, (images, targets, supplement) in enumerate(tracked):
            watch.lap("wait for data")
            images, targets = images.to(device), targets.to(device)
            watch.lap("copy to device")
            loss = experiment.training_loss(images, targets, supplement)
            watch.lap("maps and losses")
            box.post_forward_process(loss=loss)
            watch.lap("step" if box.stage_grad_count % box.grad_accum_step == 0 else "backward")
            if number + 1 == warm:
                watch.seconds.clear()
    return watch.seconds


def _time_loading(loader: DataLoader, count: int, warm: int) -> dict[str, float]:
    """Seconds of loading batches in this process; the first ones are not counted."""
    seconds: dict[str, float] = defaultdict(float)
    workers, factor, collate = loader.num_workers, loader.prefetch_factor, loader.collate_fn
    loader.num_workers, loader.prefetch_factor = 0, None

    def timed_collate(items: Any) -> Any:
        started = time.perf_counter()
        batch = collate(items)
        seconds["collate"] += time.perf_counter() - started
        return batch

    loader.collate_fn = timed_collate
    try:
        with _timed_transforms(seconds):
            started = time.perf_counter()
            for number, _ in enumerate(islice(loader, count)):
                if number + 1 == warm:
                    seconds.clear()
                    started = time.perf_counter()
            whole = time.perf_counter() - started
    finally:
        loader.num_workers, loader.prefetch_factor = workers, factor
        loader.collate_fn = collate
    seconds["decode"] = max(0.0, whole - seconds["transform"] - seconds["collate"])
    return seconds


@contextmanager
def _timed_transforms(seconds: dict[str, float]) -> Iterator[None]:
    """Count the seconds of torchvision's ``Compose``, of either version, of the outermost ones."""
    depth = [0]

    def time_calls(call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(self: Any, *images: Any) -> Any:
            started = time.perf_counter()
            depth[0] += 1
            try:
                return call(self, *images)
            finally:
                depth[0] -= 1
                if not depth[0]:
                    seconds["transform"] += time.perf_counter() - started

        return timed

    calls = {transforms.Compose: "__call__", v2.Compose: "forward"}
    with ExitStack() as stack:
        for kind, name in calls.items():
            call = getattr(kind, name)
            stack.callback(setattr, kind, name, call)
            setattr(kind, name, time_calls(call))
        yield


def list_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table of an epoch's anatomy.

    Args:
        found: by :func:`profile_epoch`.
    """
    seconds = found["seconds"]
    whole = sum(seconds[name] for name in PARTS)
    rows = [
        {"part": name, "ms a step": 1000 * seconds[name], "share": f"{seconds[name] / whole:.1%}"}
        for name in PARTS
    ]
    rows.append({"part": "all of a step", "ms a step": 1000 * whole, "share": "100.0%"})
    where = f"in {found['workers']} workers" if found["workers"] else "waited for"
    rows += [
        {"part": f"{name}, {where}", "ms a step": 1000 * seconds[name], "share": ""}
        for name in LOADING
    ]
    return rows


def describe_profile(found: dict[str, Any]) -> str:
    """What the table does not say, in words."""
    whole = sum(found["seconds"][name] for name in PARTS)
    ratio = whole / found["from_memory"]
    return (
        f"{found['steps']} steps ({found['images']:,} images) after {found['warm_up']} that are "
        f"not counted; num_workers {found['workers']}. The training waited for data "
        f"{found['seconds']['wait for data'] / whole:.1%} of the time; an epoch takes "
        f"{ratio:.2f} times what it would with the same batches from memory. decode, transform and "
        "collate are of one process."
    )
