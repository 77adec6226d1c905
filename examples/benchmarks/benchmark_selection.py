"""What a selection costs: the 16 students of the thesis against its teacher, untrained.

Three rows: our "diswot" score, our form of the formula of DisWOT's published code, and that formula
afresh for each candidate, as the published code has it: a forward and a backward pass of student
and teacher, all channel Gram matrices. Seconds per candidate are wall time; ours have the teacher
in them, once. Memory is the resident set after the first and after the last candidate.

    python examples/benchmarks/benchmark_selection.py
    python examples/benchmarks/benchmark_selection.py --jobs 2 --image-size 128
"""

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from kd_lrp_plugin.models.factory import thesis_teacher
from kd_lrp_plugin.plots.tables import table
from kd_lrp_plugin.selection.candidates import Batch, Candidate, ScoringSetup, Teacher, build_seeded
from kd_lrp_plugin.selection.scores.registry import normal_init
from kd_lrp_plugin.selection.scoring import score_candidates
from kd_lrp_plugin.selection.spaces import THESIS
from kd_lrp_plugin.utils.progress import NullProgress


class Memory(NullProgress):
    """The resident set after each candidate, in 10^6 bytes."""

    def track(self, items, what, total):
        self.seen = []
        for item in items:
            self.seen.append(resident())
            yield item


def resident() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=16, help="the last so many of the space")
    parser.add_argument("--afresh", type=int, default=4, help="candidates of the formula afresh")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args()
    torch.manual_seed(0)
    shape = (args.batch_size, 3, args.image_size, args.image_size)
    batch = torch.randn(shape), torch.randint(4, (args.batch_size,))
    students = list(THESIS)[-args.candidates :]
    candidates = [Candidate(str(s), partial(s.build, 4, args.image_size)) for s in students]
    build_teacher = partial(thesis_teacher, 4, args.image_size)
    teacher = Teacher(build_teacher, trained=False)
    rows = []
    for score in ("diswot", "diswot_reference"):
        memory, started = Memory(), time.perf_counter()
        with memory:
            setup = ScoringSetup(teacher, [batch], [score])
            score_candidates(candidates, setup, jobs=args.jobs)
        seconds = time.perf_counter() - started
        rows.append(row(score, seconds, len(candidates), memory.seen))
    step = max(1, len(candidates) // args.afresh)
    some, started, seen = candidates[step - 1 :: step], time.perf_counter(), []
    for candidate in some:
        afresh(candidate.build, build_teacher, batch)
        seen.append(resident())
    rows.append(row("reference afresh", time.perf_counter() - started, len(some), seen))
    for entry in rows:
        entry["times as fast"] = rows[-1]["s per candidate"] / entry["s per candidate"]
    print(table(rows, digits=2))


def row(name: str, seconds: float, n: int, memory: list[float]) -> dict:
    return {
        "score": name,
        "candidates": n,
        "seconds": seconds,
        "s per candidate": seconds / n,
        "MB after the first": memory[0],
        "MB after the last": memory[-1],
    }


def afresh(student: Callable[[], nn.Module], teacher: Callable[[], nn.Module], batch: Batch):
    """The published formula, all of it computed for one candidate."""
    images, targets = batch
    gradients, relations = [], []
    for build in (student, teacher):
        model = normal_init(build_seeded(build, 0)).train()
        kept = []
        handle = model.get_submodule("bn2").register_forward_hook(
            lambda module, inputs, output, kept=kept: kept.append(output)
        )
        functional.cross_entropy(model(images), targets).backward()
        handle.remove()
        layers = [m for m in model.get_classifier().modules() if isinstance(m, nn.Linear)]
        gradients.append(layers[-1].weight.grad)
        flat = kept[0].detach().flatten(1)
        relations.append(functional.normalize(flat @ flat.T))
    grams = [functional.normalize(g[:, :, None] * g[:, None, :], dim=2) for g in gradients]
    if grams[0].shape == grams[1].shape:
        (grams[0] - grams[1]).square().mean()
    (relations[0] - relations[1]).square().mean()


if __name__ == "__main__":
    main()
