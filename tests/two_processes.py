"""One step by as many processes as torchrun starts: ``two_processes.py CONFIG OUT OVERRIDE...``

The batch of 16 images is shared out among the processes; OUT gets the change of the weights, the
values of the terms that each process saw, and the metrics that all of them agree on.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from kd_lrp_plugin.config.build import assemble
from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.training.experiment import Experiment
from kd_lrp_plugin.training.meter import Meter
from kd_lrp_plugin.utils.distributed import init_distributed


def torchrun(*words: Any, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """What the command ``torchrun --nproc_per_node=2 WORD...`` does, started as users start it.

    Three processes import everything again for it: ``preloaded.run(..., processes=2)`` has the same
    agent start forks.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, cwd=cwd, env=environment
    )


def main(config: str, out: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    with init_distributed("cpu") as context:
        torch.manual_seed(0)
        experiment = Experiment(assemble(resolve_config(config, overrides)), context)
        box = experiment.box
        data = box.train_data_loader.dataset
        images, targets = zip(*(data[index][:2] for index in range(16)), strict=True)
        before = {name: p.detach().clone() for name, p in experiment.student.named_parameters()}
        experiment.begin_epoch()
        share = 16 // context.world_size // box.grad_accum_step
        with Meter(box.criterion) as meter:
            for part in range(box.grad_accum_step):
                start = (part * context.world_size + context.rank) * share
                batch = torch.stack(images[start : start + share])
                labels = torch.tensor(targets[start : start + share])
                loss = experiment.training_loss(batch, labels, None)
                meter.update(loss, labels)
                box.post_forward_process(loss=loss)
            own = {name: float(value) for name, value in meter.latest.items()}
        shared = context.gather(own)
        means = meter.summary("train", context)
        seen = [index for batch in box.train_data_loader.batch_sampler for index in batch]
        shares = context.gather(seen)
        if context.rank == 0:
            student = dict(experiment.student.named_parameters())
            change = {name: student[name].detach() - value for name, value in before.items()}
            found = {"change": change, "terms": shared, "means": means, "shares": shares}
            torch.save(found, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
