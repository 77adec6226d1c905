"""What a step costs when the teacher was asked before, as a multiple of a KD step that asks it.

    python examples/benchmarks/benchmark_teacher_cache.py
    python examples/benchmarks/benchmark_teacher_cache.py --student mobilenetv2_035
    python examples/benchmarks/benchmark_teacher_cache.py --device cuda --batch-size 32

Plain KD step: forward pass of the live teacher, forward pass of the student, cross entropy + KL,
backward pass, Adam. With maps, signed relative L2 of activation x gradient is added, at the last of
the layers or at all of them. Teacher (frozen) and student are of one architecture unless
--student says otherwise. Each step is the trainer's, on one batch of phantoms; the reading of
images is left out, that of the cache is part of the step, and so is the moving of frozen maps.

Time: every round runs all cases once, in an order of its own; the first round is not counted. Each
time is divided by that of the same round's plain step; the table shows the median of these ratios.
On the CPU with one thread it is the process's CPU time, which other programs disturb less; else
wall time. The last column is the size of the cache for one view of 1,000 images.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
from benchmark_step import measure_times, show
from torch.utils.data import default_collate

from kd_lrp_plugin.config.build import assemble
from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.training.experiment import Experiment
from kd_lrp_plugin.utils.distributed import DistributedContext

CONFIGS = Path(__file__).resolve().parents[2] / "torchdistill_configs" / "phantom"
CACHES = {"live": "", "exact": "exact", "frozen": "frozen"}


class Case:
    """An experiment, and one batch of it."""

    def __init__(self, args: argparse.Namespace, layers: list[str], cache: str, beside: Path):
        overrides = [
            *(f"image_size={args.image_size}", f"batch_size={args.batch_size}", "num_workers=0"),
            f"datasets.phantom/train.init.kwargs.size={2 * args.batch_size}",
            f"models.teacher_model.kwargs={{name: {args.model}, num_classes: 4}}",
            f"models.student_model.kwargs={{name: {args.student or args.model}, num_classes: 4}}",
            "models.teacher_model.src_ckpt=null",
        ]
        if layers:
            method = "lrp_relative_l2"
            names = ", ".join(layers)
            overrides.append(f"train.teacher.forward_proc.init.kwargs.layers=[{names}]")
            overrides.append("train.pre_epoch_process=default_pre_epoch_process_with_teacher")
        else:
            method = "kd"
        if cache:
            overrides.append(f"+train.teacher.cache={cache}")
        config = CONFIGS / method / "test_resnet_from_resnet10t.yaml"
        torch.manual_seed(0)
        context = DistributedContext(torch.device(args.device))
        self.experiment = Experiment(assemble(resolve_config(config, overrides)), context)
        self.megabytes = 0.0
        if (found := self.experiment.cache) is not None:
            found.open(context, beside)
            self.megabytes = found.describe()["bytes"] / found.views.rows / 1000
        self.experiment.begin_epoch()
        images = self.experiment.box.train_data_loader.dataset
        batch = default_collate([images[index] for index in range(args.batch_size)])
        self.images, self.targets = (part.to(args.device) for part in batch[:2])
        self.companions = batch[2]

    def step(self) -> None:
        loss = self.experiment.training_loss(self.images, self.targets, self.companions)
        self.experiment.box.post_forward_process(loss=loss)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    layers = {0: [], 1: args.layers[-1:], len(args.layers): args.layers}
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            (name, n): Case(args, layers[n], cache, Path(folder))
            for name, cache in CACHES.items()
            for n in layers
        }
        runs = {key: case.step for key, case in cases.items()}
        times = measure_times(runs, args)
    records = []
    for name in CACHES:
        row: dict = {"teacher": name}
        for n in layers:
            what = f"KD + maps, {n} layer{'s' * (n > 1)}" if n else "KD"
            row[what] = times[name, n]
        row["MB per 1,000"] = cases[name, len(args.layers)].megabytes
        records.append(row)
    show(records, args.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = partial(parser.add_argument, help="default: %(default)s")
    add("--rounds", type=int, default=15)
    add("--model", default="mobilenetv2_100")
    add("--student", help="its model, with the same names of layers; default: that of the teacher")
    add("--layers", nargs="+", default=["blocks.2", "blocks.4", "blocks.6"])
    add("--image-size", type=int, default=128)
    add("--batch-size", type=int, default=16)
    add("--threads", type=int, default=1)
    add("--device", default="cpu")
    add("--out", type=Path, help="a CSV file for the table")
    add("--short", action="store_true", help="all is tiny, one round: a trial, not a measurement")
    args = parser.parse_args()
    if args.short:
        args.rounds, args.model, args.image_size, args.batch_size = 1, "mobilenetv2_035", 64, 2
    return args


if __name__ == "__main__":
    main()
