"""What the driver costs over a bare torchdistill loop: a ratio of images per second.

The bare loop takes torchdistill's box and does no more than its own example script must: move the
batch, ``forward_process``, look whether the loss is finite, ``post_forward_process``. The driver
also reads every loss term and the accuracy, and refuses a loss that is not finite before the step.
Both train the same box on the same cached images, in turns, in an order that changes each round;
the first round is not counted. The table shows medians over the rounds, and what an epoch's end
(checkpoints, metrics) takes besides.

    python examples/benchmarks/benchmark_driver.py
    python examples/benchmarks/benchmark_driver.py my.yaml --set batch_size=64 --rounds 9

Time is the process's CPU time on one thread, which other programs disturb less; with --device cuda
it is wall time.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import track

from kd_lrp_plugin.config.build import assemble
from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.plots.tables import table
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.training.experiment import Experiment
from kd_lrp_plugin.training.trainer import Trainer
from kd_lrp_plugin.utils.distributed import DistributedContext

CONFIGS = Path(__file__).resolve().parents[2] / "torchdistill_configs" / "phantom"
METHODS = ("kd", "lrp_cosine")
SMALL = ["datasets.phantom/train.init.kwargs.size=320", "num_workers=0"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", type=Path, nargs="*", help="default: KD and LRP on the phantom")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    configs, overrides = args.configs, args.overrides
    if not configs:
        configs = [CONFIGS / method / "test_resnet_from_resnet10t.yaml" for method in METHODS]
        overrides = [*SMALL, "models.teacher_model.src_ckpt=null", *overrides]
    if args.device == "cpu":
        torch.set_num_threads(1)
    context = DistributedContext(torch.device(args.device))
    rows = []
    for config in configs:
        experiment = Experiment(assemble(resolve_config(config, overrides)), context)
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"config": config.parent.name} | measure(experiment, folder, args.rounds))
    print(table(rows))


def measure(experiment: Experiment, folder: str, rounds: int) -> dict[str, float]:
    run = Trainer(experiment, RunFolder(folder), 0)
    loops = {"bare": lambda: bare(experiment), "driver": lambda: run._train_batches(1)}
    times: dict[str, list[float]] = {name: [] for name in loops}
    for turn in track(range(rounds + 1), "rounds", console=Console(stderr=True), transient=True):
        for name in sorted(loops, reverse=turn % 2 == 0):
            torch.manual_seed(turn)
            experiment.begin_epoch()
            started = now(experiment.context.device)
            loops[name]()
            if turn > 0:
                times[name].append(now(experiment.context.device) - started)
    run._keep_best({run.monitor: 0.0})
    started = time.perf_counter()
    run._save(improved=True)
    saving = time.perf_counter() - started
    batches = experiment.box.train_data_loader
    images = len(batches) * batches.batch_size
    ratios = [b / d for b, d in zip(times["bare"], times["driver"], strict=True)]
    return {
        "bare, images/s": images / median(times["bare"]),
        "driver, images/s": images / median(times["driver"]),
        "driver / bare": median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "end of epoch, s": saving,
    }


def bare(experiment: Experiment) -> None:
    box, device = experiment.box, experiment.context.device
    for images, targets, supplement in box.train_data_loader:
        loss = box.forward_process(images.to(device), targets.to(device), supplement)
        if not torch.isfinite(loss):
            raise FloatingPointError("loss")
        box.post_forward_process(loss=loss)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    main()
