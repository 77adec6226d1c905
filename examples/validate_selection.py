"""Does a score select? Rank networks whose accuracy after distillation is known, and compare.

Two kinds of ground truth are read: DisWOT's 64 CIFAR networks (columns arch, kd_acc, params, macs),
and what examples/train_space.py writes (columns student, seed, choices, test_accuracy). Every score
is computed for several initialisations, on noise and, where there are class folders, on images.
OUT/selection_quality.csv gets Spearman's and Kendall's correlation with the accuracy, concordance
among pairs of equal size, and the regret under six parameter budgets, each with its spread over the
seeds; OUT/selection_quality.png shows the first two against parameters alone.

    python examples/validate_selection.py --ground-truth truth.csv --out quality
    python examples/validate_selection.py --ground-truth truth.csv --images data/mri --out quality
"""

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from kd_lrp_plugin import report
from kd_lrp_plugin.console import Show
from kd_lrp_plugin.data import FolderImages
from kd_lrp_plugin.efficiency import count_parameters
from kd_lrp_plugin.quality import ranking_quality
from kd_lrp_plugin.scores import SCORES
from kd_lrp_plugin.selection import Batch, Candidate, Teacher, measure
from kd_lrp_plugin.spaces import mobilenetv2
from kd_lrp_plugin.students import build_model, load_weights

FIGURES = ("spearman", "kendall", "iso_concordance", "regret")


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Identity()
        if stride > 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(outputs))
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(residual + self.downsample(x))


class CifarResNet(nn.Module):
    """Three stages of basic blocks with 16, 32 and 64 channels (He et al., 2016, section 4.2)."""

    def __init__(self, blocks: Sequence[int], num_classes: int = 100) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU()
        stages, inputs = [], 16
        for depth, outputs, stride in zip(blocks, (16, 32, 64), (1, 2, 2), strict=True):
            layers = [Block(inputs, outputs, stride)]
            layers += [Block(outputs, outputs, 1) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*layers))
            inputs = outputs
        self.layer1, self.layer2, self.layer3 = stages
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.global_pool(x).flatten(1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ground-truth", type=Path, required=True, metavar="CSV")
    parser.add_argument("--images", type=Path, help="class folders; besides noise")
    parser.add_argument("--teacher", type=Path, help="weights of a trained teacher of the kind")
    parser.add_argument("--scores", nargs="+", default=list(SCORES), choices=list(SCORES))
    parser.add_argument("--seeds", type=int, default=3, help="initialisations (default: 3)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, default=Path("selection_quality"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with args.ground_truth.open(encoding="utf-8") as file:
        truth = list(csv.DictReader(file))
    read = read_cifar if "kd_acc" in truth[0] else read_space
    candidates, accuracies, build_teacher, size, classes = read(truth)
    teachers = {"random": Teacher(build_teacher, trained=False)}
    if args.teacher:
        trained = partial(with_weights, build_teacher, args.teacher)
        teachers["trained"] = Teacher(trained, trained=True)
    parameters = [count_parameters(candidate.build()) for candidate in candidates]
    rows = []
    for images in ["noise", *(["images"] if args.images else [])]:
        folder = args.images if images == "images" else None
        batch = make_batch(folder, args.batch_size, size, classes)
        for name, teacher in teachers.items():
            record = args.out / f"scores-{images}-{name}.jsonl"
            print(f"{len(candidates)} networks, {images}, {name} teacher", flush=True)
            with Show() as show:
                found = measure(
                    *(candidates, teacher, [batch], args.scores),
                    *(range(args.seeds), record, args.jobs, show),
                )
            for score in args.scores:
                qualities = quality_by_seed(found, score, accuracies, parameters, args.seeds)
                rows.append({"score": score, "images": images, "teacher": name} | spread(qualities))
    if isinstance(accuracies[0], dict):
        rows.append(ceiling(accuracies, parameters))
    with (args.out / "selection_quality.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(report.table([{k: v for k, v in row.items() if "_sd" not in k} for row in rows]))
    draw(rows).savefig(args.out / "selection_quality.png", dpi=150)
    print(f"wrote {args.out}/selection_quality.csv and {args.out}/selection_quality.png")


# --- ground truth -------------------------------------------------------------------------------


def read_cifar(truth: list[dict]) -> tuple:
    candidates = [
        Candidate(row["arch"], partial(CifarResNet, tuple(map(int, row["arch"])))) for row in truth
    ]
    teacher = partial(CifarResNet, (9, 9, 9))
    return candidates, [float(row["kd_acc"]) for row in truth], teacher, 32, 100


def read_space(truth: list[dict]) -> tuple:
    """Accuracies by seed; the mean over the seeds is the truth."""
    by_student: dict[str, dict[str, float]] = {}
    builds: dict[str, Callable[[], nn.Module]] = {}
    for row in truth:
        by_student.setdefault(row["student"], {})[row["seed"]] = float(row["test_accuracy"])
        choices = json.loads(row["choices"])
        builds[row["student"]] = partial(mobilenetv2, num_classes=4, **choices)
    candidates = [Candidate(name, build) for name, build in builds.items()]
    size = 64
    teacher = partial(build_model, "mobilenetv2_100", 4, "flatten_mlp", image_size=size)
    return candidates, list(by_student.values()), teacher, size, 4


def with_weights(build: Callable[[], nn.Module], file: Path) -> nn.Module:
    model = build()
    load_weights(model, file)
    return model


def make_batch(folder: Path | None, n: int, size: int, classes: int) -> Batch:
    draw = torch.Generator().manual_seed(0)
    if folder is None:
        images = torch.randn(n, 3, size, size, generator=draw)
        return images, torch.randint(classes, (n,), generator=draw)
    data = FolderImages(root=str(folder), split="Training", image_size=size)
    places = torch.randperm(len(data), generator=draw)[:n].tolist()
    images, targets = zip(*(data[place] for place in places), strict=True)
    return torch.stack(images), torch.tensor(targets)


# --- quality ------------------------------------------------------------------------------------


def quality_by_seed(
    found: list[dict], score: str, accuracies: list, parameters: list[int], seeds: int
) -> list[dict[str, float]]:
    """One figure per initialisation, and a last one of the mean over them."""
    truth = [mean(accuracy) for accuracy in accuracies]
    (values,) = zip(*(row["scores"][score] for row in found), strict=True)  # there is one batch
    values = np.array([np.nan if value is None else value for value in values])
    values = values.reshape(len(accuracies), seeds)
    usable = np.isfinite(values).all(1)
    if usable.sum() < 3:
        return [dict.fromkeys(FIGURES, float("nan"))]
    sides = [np.asarray(side)[usable] for side in (truth, parameters)]
    columns = [values[usable, seed] for seed in range(seeds)]
    return [ranking_quality(column, *sides) for column in columns]


def mean(accuracy: float | dict[str, float]) -> float:
    return float(np.mean(list(accuracy.values()))) if isinstance(accuracy, dict) else accuracy


def spread(qualities: list[dict[str, float]]) -> dict[str, float]:
    found = {}
    for figure in FIGURES:
        values = [quality[figure] for quality in qualities]
        found[figure], found[f"{figure}_sd"] = float(np.mean(values)), float(np.std(values))
    return found


def ceiling(accuracies: list[dict[str, float]], parameters: list[int]) -> dict:
    """How well the accuracies of one seed rank those of the others."""
    seeds = list(accuracies[0])
    qualities = []
    for seed in seeds:
        rest = [np.mean([a for s, a in of.items() if s != seed]) for of in accuracies]
        qualities.append(ranking_quality([-of[seed] for of in accuracies], rest, parameters))
    return {"score": "another seed's accuracy", "images": "", "teacher": ""} | spread(qualities)


def draw(rows: list[dict]) -> Figure:
    figure = Figure(figsize=(9, 0.28 * len(rows) + 1.2), layout="constrained")
    labels = [" ".join(filter(None, (r["score"], r["images"], r["teacher"]))) for r in rows]
    for axes, name in zip(figure.subplots(1, 2, sharey=True), FIGURES[1:3], strict=True):
        values = [row[name] for row in rows]
        axes.barh(labels, values, xerr=[row[f"{name}_sd"] for row in rows], color="#5b8db8")
        base = next((row[name] for row in rows if row["score"] == "parameters"), None)
        if base is not None:
            axes.axvline(base, color="#c01818", linewidth=1, label="parameters")
            axes.legend(fontsize=8)
        axes.set_title(name.replace("iso_", "equal-size "), fontsize=10)
        axes.tick_params(labelsize=7)
        axes.grid(axis="x", alpha=0.3)
    figure.get_axes()[0].invert_yaxis()
    return figure


if __name__ == "__main__":
    main()
