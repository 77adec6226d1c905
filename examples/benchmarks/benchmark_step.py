"""What a distillation step with relevance maps costs, as a multiple of a plain KD step.

    python examples/benchmarks/benchmark_step.py
    python examples/benchmarks/benchmark_step.py --model vit_tiny_patch16_224 --image-size 224
    python examples/benchmarks/benchmark_step.py --device cuda --autocast bfloat16 --batch-size 64

Plain KD step: teacher's forward without gradients, student's forward, cross entropy + KL, backward,
Adam. Every other case adds one loss to it, at the last of the layers or at all of them. Teacher
(frozen, eval mode) and student (train mode) are of one architecture, images and labels are noise,
all in the channels-last memory format, in which the driver trains; the last rows repeat two cases
in PyTorch's own. A transformer has a row more, AttnLRP, and none of the implementations that take
its tokens for maps. With --autocast the forward passes and the loss run under torch.autocast, as
in a training; the relevance pass is float32 by itself.

Time: every round runs all cases once, in an order of its own; the first round is not counted. Each
time is divided by that of the same round's plain step; the table shows the median of these ratios.
On the CPU with one thread it is the process's CPU time, which other programs disturb less; else
wall time, on a GPU with the device synchronised before the clock is read.

Memory: peak above what teacher, student and batch take. On the CPU each case runs two steps in a
process of its own, forked after these are built, and the growth of its largest resident set is
taken (Linux and macOS). On a GPU it is torch.cuda.max_memory_allocated over a step, less what was
allocated before it.

"By hand" and Captum compute activation x gradient without this package: by autograd.grad on hooked
activations, and by LayerGradientXActivation with the forward pass of its own that it makes.
zennit's LRP-z+ is here for its time only: the gradient of its maps for the weights is wrong.
"""

import argparse
import csv
import gc
import importlib.util
import multiprocessing
import random
import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median

import timm
import torch
from captum.attr import LayerGradientXActivation
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional

from kd_lrp_plugin.losses import LOSSES, kl_divergence, semantic_cosine
from kd_lrp_plugin.plots.tables import table
from kd_lrp_plugin.relevance.recording import record
from kd_lrp_plugin.relevance.target_layers import choose_layers

# --- the cases: (setting, layers) -> logits of student and teacher, and the added loss -----------

Outcome = tuple[Tensor, Tensor, Tensor | float]


class Setting:
    """The two models, a batch and the student's optimizer."""

    def __init__(self, args: argparse.Namespace, memory_format: torch.memory_format) -> None:
        torch.manual_seed(0)
        device = torch.device(args.device)
        self.teacher = build(args).eval().requires_grad_(False)
        self.student = build(args)
        self.teacher.to(device, memory_format=memory_format)
        self.student.to(device, memory_format=memory_format)
        size = (args.batch_size, 3, args.image_size, args.image_size)
        self.images = torch.randn(size).to(device, memory_format=memory_format)
        self.labels = torch.randint(4, (args.batch_size,)).to(device)
        self.optimizer = torch.optim.Adam(self.student.parameters(), lr=1e-4)
        self.autocast = args.autocast and getattr(torch, args.autocast)


def build(args: argparse.Namespace) -> nn.Module:
    cfg = timm.get_pretrained_cfg(args.model)
    is_fixed = cfg is not None and cfg.fixed_input_size
    size = {"img_size": args.image_size} if is_fixed else {}
    return timm.create_model(args.model, num_classes=4, **size)


def is_transformer(model: nn.Module) -> bool:
    return any(hasattr(module, "fused_attn") for module in model.modules())


def plain(setting: Setting, layers: list[str]) -> Outcome:
    with torch.no_grad():
        of_teacher = setting.teacher(setting.images)
    return setting.student(setting.images), of_teacher, 0.0


def ours(loss: str, method: str, setting: Setting, layers: list[str]) -> Outcome:
    with record(setting.teacher, layers, method) as teacher:
        of_teacher = setting.teacher(setting.images)
    with record(setting.student, layers, method) as student:
        of_student = setting.student(setting.images)
    if loss.startswith("relation"):
        theirs, own = teacher.activations, student.activations
    else:
        signed = loss.startswith("correlation")
        theirs = teacher.maps(of_teacher, setting.labels, signed=signed)
        own = student.maps(of_student, setting.labels, create_graph=True, signed=signed)
    added = sum(LOSSES[loss](s, t) for s, t in zip(own, theirs, strict=True))
    return of_student, of_teacher, added


def by_hand(setting: Setting, layers: list[str]) -> Outcome:
    logits, maps = [], []
    for model in (setting.student, setting.teacher):
        with tapped(model, layers) as taps:
            logits.append(model(setting.images))
        scores = logits[-1].gather(1, setting.labels[:, None]).sum()
        graph = model is setting.student
        gradients = torch.autograd.grad(scores, list(taps.values()), create_graph=graph)
        pairs = zip(taps.values(), gradients, strict=True)
        maps.append([(a * gradient).sum(1).relu() for a, gradient in pairs])
    return *logits, semantic(*maps)


def captum(setting: Setting, layers: list[str]) -> Outcome:
    of_student, of_teacher, _ = plain(setting, layers)
    maps = []
    for model in (setting.student, setting.teacher):
        modules = [model.get_submodule(layer) for layer in layers]
        graph = {"create_graph": model is setting.student}
        relevance = LayerGradientXActivation(model, modules).attribute(
            # The teacher has no trainable parameters, so its graph must begin at the images.
            setting.images.clone().requires_grad_(model is setting.teacher),
            target=setting.labels,
            grad_kwargs=graph,
        )
        maps.append([r.sum(1).relu() for r in relevance])
    return of_student, of_teacher, semantic(*maps)


def zennit_zplus(setting: Setting, layers: list[str]) -> Outcome:
    from zennit.composites import LayerMapComposite
    from zennit.rules import Norm, Pass, ZPlus
    from zennit.types import Activation, AvgPool, BatchNorm, Convolution, Linear

    rules = [
        (Activation, Pass()),
        (AvgPool, Norm()),
        (BatchNorm, Pass()),  # zennit cannot merge timm's into the convolutions
        (Convolution, ZPlus()),
        (Linear, ZPlus()),
    ]
    logits, maps = [], []
    for model in (setting.student, setting.teacher):
        with ExitStack() as stack:
            taps = stack.enter_context(tapped(model, layers))
            stack.enter_context(LayerMapComposite(rules).context(model))
            logits.append(model(setting.images))
            scores = logits[-1].gather(1, setting.labels[:, None]).sum()
            graph = model is setting.student
            relevance = torch.autograd.grad(scores, list(taps.values()), create_graph=graph)
        maps.append([r.sum(1).relu() for r in relevance])
    return *logits, semantic(*maps)


@contextmanager
def tapped(model: nn.Module, layers: list[str]):
    taps: dict[str, Tensor] = {}

    def keep(layer: str, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        taps[layer] = output if output.requires_grad else output.detach().requires_grad_()
        return taps[layer]

    handles = [
        model.get_submodule(layer).register_forward_hook(partial(keep, layer)) for layer in layers
    ]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def semantic(own: list[Tensor], theirs: list[Tensor]) -> Tensor:
    pairs = zip(own, theirs, strict=True)
    return torch.stack([semantic_cosine(s, t.detach()) for s, t in pairs]).sum()


PLAIN = "plain KD"
OURS = "gradient_activation, semantic_cosine"
CASES: dict[str, Callable[[Setting, list[str]], Outcome]] = {
    "grad_cam, correlation_l2": partial(ours, "correlation_l2", "grad_cam"),
    "features, relation_cosine": partial(ours, "relation_cosine", "gradient_activation"),
    "gradient_activation, semantic_l2": partial(ours, "semantic_l2", "gradient_activation"),
    OURS: partial(ours, "semantic_cosine", "gradient_activation"),
    "lrp_epsilon, semantic_cosine": partial(ours, "semantic_cosine", "lrp_epsilon"),
    "lrp_zplus, semantic_cosine": partial(ours, "semantic_cosine", "lrp_zplus"),
    "lrp_gamma, semantic_cosine": partial(ours, "semantic_cosine", "lrp_gamma"),
    "lrp_composite, semantic_cosine": partial(ours, "semantic_cosine", "lrp_composite"),
    "by hand: activation x gradient": by_hand,
    "Captum, its own forward": captum,
}
if importlib.util.find_spec("zennit"):
    CASES["zennit, z+"] = zennit_zplus
ATTENTION = {"attn_lrp, semantic_cosine": partial(ours, "semantic_cosine", "attn_lrp")}


def choose_cases(setting: Setting, only: list[str]) -> dict[str, Callable[..., Outcome]]:
    """Those of the model's kind; with words, the ones in whose name is one of them."""
    ours_alone = {name: case for name, case in CASES.items() if getattr(case, "func", 0) is ours}
    cases = ours_alone | ATTENTION if is_transformer(setting.student) else CASES
    return {n: case for n, case in cases.items() if not only or any(word in n for word in only)}


# --- measuring -----------------------------------------------------------------------------------


def run_step(setting: Setting, case: Callable[..., Outcome], layers: list[str]) -> None:
    device, dtype = setting.images.device.type, setting.autocast
    with torch.autocast(device, dtype, enabled=True) if dtype else nullcontext():
        of_student, of_teacher, added = case(setting, layers)
        loss = functional.cross_entropy(of_student, setting.labels)
        loss = loss + kl_divergence(of_student, of_teacher) + added
    setting.optimizer.zero_grad()
    loss.backward()
    setting.optimizer.step()


def measure_times(runs: dict[tuple, Callable[[], None]], args: argparse.Namespace) -> dict:
    """Median ratio to the plain step of the same round, and the plain step's median seconds."""
    on_gpu = torch.device(args.device).type == "cuda"
    clock = time.perf_counter if on_gpu or args.threads > 1 else time.process_time
    order = random.Random(0)
    rounds: list[dict] = []
    for _ in track(range(args.rounds + 1), "rounds", console=Console(stderr=True)):
        seconds = {}
        for key in order.sample(list(runs), len(runs)):
            gc.collect()
            if on_gpu:
                torch.cuda.synchronize()
            started = clock()
            runs[key]()
            if on_gpu:
                torch.cuda.synchronize()
            seconds[key] = clock() - started
        rounds.append(seconds)
    (first, *_), counted = runs, rounds[1:]
    ratios = {key: median(seconds[key] / seconds[first] for seconds in counted) for key in runs}
    print(f"plain KD step: {median(s[first] for s in counted):.3f} s", file=sys.stderr)
    return ratios


def measure_memory(runs: dict[tuple, Callable[[], None]], args: argparse.Namespace) -> dict:
    """Peak of each case as a ratio to the plain step's."""
    peaks = {}
    steps = track(runs.items(), "memory", console=Console(stderr=True))
    if torch.device(args.device).type == "cuda":
        for key, run in steps:
            run()
            gc.collect()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            peaks[key] = torch.cuda.max_memory_allocated() - before
    else:
        fork = multiprocessing.get_context("fork")
        for key, run in steps:
            receiver, sender = fork.Pipe(duplex=False)
            process = fork.Process(target=grow, args=(sender, run, args.threads))
            process.start()
            sender.close()
            peaks[key] = receiver.recv()
            process.join()
    first = next(iter(runs))
    return {key: peak / peaks[first] for key, peak in peaks.items()}


def grow(sender, run: Callable[[], None], threads: int) -> None:
    """In a process of its own: send by how much two steps raise the largest resident set."""
    torch.set_num_threads(threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        run()
    sender.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def main() -> None:
    args = parse()
    # More threads only in the forked processes and after them: forking does not copy threads.
    torch.set_num_threads(1)
    setting = Setting(args, torch.channels_last)
    layers = args.layers or choose_layers(setting.student)
    taps = {1: layers[-1:], len(layers): layers}
    runs = {(PLAIN, 0): partial(run_step, setting, plain, [])}
    for name, case in choose_cases(setting, args.only).items():
        runs |= {(name, n): partial(run_step, setting, case, taps[n]) for n in taps}
    if not args.only:
        contiguous = Setting(args, torch.contiguous_format)
        for name, case in [(PLAIN, plain), (OURS, CASES[OURS])]:
            runs |= {
                (f"{name}, contiguous", n): partial(run_step, contiguous, case, taps[n])
                for n in taps
            }
    memory = measure_memory(runs, args)
    torch.set_num_threads(args.threads)
    times = measure_times(runs, args)

    records = []
    for name in dict.fromkeys(name for name, _ in runs):
        row: dict = {"step": name}
        for what, ratios in (("time", times), ("memory", memory)):
            for n in taps:
                row[f"{what}, {n} layer{'s' * (n > 1)}"] = ratios.get((name, n), 1.0)
        records.append(row)
    print(f"{describe(args)}; layers {', '.join(layers)}\n")
    show(records, args.out)


def show(records: list[dict], out: Path | None) -> None:
    """Print a table, and save it as CSV if there is a file for it."""
    print(table(records, digits=2))
    if out:
        with out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
        print(f"saved {out}")


def describe(args: argparse.Namespace) -> str:
    device = torch.device(args.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{args.threads} thread"
    settings = f"{args.model}, {args.image_size} px, batch {args.batch_size}"
    return f"{card}, PyTorch {torch.__version__}: {settings}, {args.autocast or 'float32'}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = partial(parser.add_argument, help="default: %(default)s")
    add("--rounds", type=int, default=15)
    add("--model", default="mobilenetv2_100")
    add("--layers", nargs="+", help="default: of mobilenetv2 blocks.2, .4 and .6, else as 'auto'")
    add("--only", nargs="+", default=[], help="words: the cases in whose name is one of them")
    add("--image-size", type=int, default=128)
    add("--batch-size", type=int, default=16)
    add("--threads", type=int, default=1)
    add("--device", default="cpu")
    add("--autocast", choices=["bfloat16", "float16"], help="default: none, all in float32")
    add("--out", type=Path, help="a CSV file for the table")
    add("--short", action="store_true", help="all is tiny, one round: a trial, not a measurement")
    args = parser.parse_args()
    if args.short:
        args.rounds, args.model, args.image_size, args.batch_size = 1, "mobilenetv2_035", 32, 2
    if args.layers is None and args.model.startswith("mobilenetv2"):
        args.layers = ["blocks.2", "blocks.4", "blocks.6"]
    return args


if __name__ == "__main__":
    main()
