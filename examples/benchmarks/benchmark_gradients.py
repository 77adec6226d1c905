"""How large is the gradient of a loss of maps for the student's weights, by method?

    python examples/benchmarks/benchmark_gradients.py
    python examples/benchmarks/benchmark_gradients.py --model mobilenetv2_035 --steps 200

The cosine distance of a student's maps to random ones of the same shape, mean of its layers, over
the cross entropy: the norm of the gradient of the one over that of the other, of the same batch of
phantoms, with random weights and after some steps of training on labels alone (Adam, rate 1e-3).
A method whose ratio is 100 swamps the labels at a weight of 0.1. Median of the batches, and the
largest.
"""

import argparse
from statistics import median

import timm
import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.losses import semantic_cosine
from kd_lrp_plugin.models.ofa import ofa_595
from kd_lrp_plugin.plots.tables import table
from kd_lrp_plugin.relevance.methods import METHODS
from kd_lrp_plugin.relevance.recording import record

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--model", default="ofa_595", help="or a name of timm's; default: %(default)s")
parser.add_argument("--layers", nargs="+", help="default: one per reduction but the last")
parser.add_argument("--image-size", type=int, default=96, help="default: %(default)s")
parser.add_argument("--batch-size", type=int, default=16, help="default: %(default)s")
parser.add_argument("--batches", type=int, default=8, help="default: %(default)s")
parser.add_argument("--steps", type=int, default=100, help="of training; default: %(default)s")
args = parser.parse_args()

torch.manual_seed(0)
size = args.batch_size * max(args.steps, args.batches, 1)
images = Phantom(size=min(size, 800), image_size=args.image_size, cache=True)
loader = DataLoader(images, args.batch_size, shuffle=True, drop_last=True)
student = ofa_595(4) if args.model == "ofa_595" else timm.create_model(args.model, num_classes=4)
optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)


def batches(count: int):
    while True:
        for batch in loader:
            if count == 0:
                return
            yield batch
            count -= 1


def norm(loss: Tensor) -> float:
    """Of the gradient for the student's weights."""
    weights = list(student.parameters())
    found = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
    return torch.stack([g.square().sum() for g in found if g is not None]).sum().sqrt().item()


def measure(method: str) -> list[float]:
    """The ratio of the two gradients in each batch; the model stays as it is."""
    buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
    ratios = []
    for pictures, labels in batches(args.batches):
        with record(student, args.layers or "auto", method) as recording:
            logits = student(pictures)
        maps = recording.maps(logits, labels, create_graph=True)
        distances = [semantic_cosine(m, torch.randn_like(m).relu()) for m in maps]
        of_labels = norm(functional.cross_entropy(logits, labels))
        ratios.append(norm(torch.stack(distances).mean()) / of_labels)
    for name, buffer in student.named_buffers():
        buffer.copy_(buffers[name])
    return ratios


rows: dict[str, dict[str, str | float]] = {method: {"method": method} for method in METHODS}
for column, steps in {"random weights": 0, f"after {args.steps} steps": args.steps}.items():
    for pictures, labels in track(batches(steps), "training", total=steps):
        optimizer.zero_grad()
        functional.cross_entropy(student(pictures), labels).backward()
        optimizer.step()
    for method in track(rows, column):
        torch.manual_seed(1)
        ratios = measure(method)
        rows[method][column] = median(ratios)
        rows[method][f"{column}: largest"] = max(ratios)
print(table(list(rows.values()), digits=2))
