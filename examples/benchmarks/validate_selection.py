"""Does a score select? Rank networks whose accuracy after distillation is known, and compare.

Two kinds of ground truth are read: DisWOT's 64 CIFAR networks (columns arch, kd_acc, params, macs),
and what examples/benchmarks/train_space.py writes (columns student, seed, choices, test_accuracy).
Every score is computed for several initialisations, on noise and, where there are class folders,
on images; for a teacher with random weights and, if there is one, for a trained one.

OUT/selection_quality.csv gets Spearman's and Kendall's correlation with the accuracy, concordance
among pairs of equal size (and the number of these), and the regret under six parameter budgets,
each with its spread over the seeds. Where networks were trained with several seeds, each seed is
left out in turn, and the mean accuracy of the others is what is to be ranked; a row says how well
the accuracies of the one left out do it, which know more than any score.
OUT/selection_quality.png shows correlation and concordance against parameters alone.
OUT/differences.csv has each score's difference to parameters, with 95 % intervals from a paired
bootstrap over the networks. What is scored is kept in OUT, so a stopped call goes on.

    python examples/benchmarks/validate_selection.py --ground-truth truth.csv --out quality
    python examples/benchmarks/validate_selection.py --ground-truth truth.csv --images data/mri \\
        --train-teacher 10 --out quality
"""

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_lrp_plugin.cli.console import RichProgress
from kd_lrp_plugin.data.folder import FolderImages
from kd_lrp_plugin.metrics.efficiency import count_parameters
from kd_lrp_plugin.metrics.ranking_quality import compare_quality, ranking_quality
from kd_lrp_plugin.models.factory import build_model
from kd_lrp_plugin.models.mobilenetv2 import mobilenetv2
from kd_lrp_plugin.models.weights import load_weights
from kd_lrp_plugin.plots import tables
from kd_lrp_plugin.selection.candidates import Batch, Candidate, ScoringSetup, Teacher
from kd_lrp_plugin.selection.scores.registry import SCORES
from kd_lrp_plugin.selection.scoring import score_candidates

FIGURES = ("spearman", "kendall", "iso_concordance", "pairs", "regret")


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


@dataclass
class Judge:
    """Networks, how accurate they became, and the scores that were computed of them.

    Attributes:
        accuracies: (networks, seeds) of the training.
        early: by number of epochs, accuracy on validation images by then, of the same shape.
        parameters: of each network.
        scores: by (score, images, teacher): (networks, seeds) of the initialisation; nan where a
            score failed; no teacher for scores that see none.
    """

    accuracies: np.ndarray
    early: dict[int, np.ndarray]
    parameters: list[int]
    scores: dict[tuple[str, str, str], np.ndarray]

    @property
    def truth(self) -> np.ndarray:
        return self.accuracies.mean(1)

    @property
    def targets(self) -> np.ndarray:
        """What scores are asked to rank, (networks, targets): means without one seed in turn."""
        seeds = self.accuracies.shape[1]
        if seeds == 1:
            return self.accuracies
        without = [np.delete(self.accuracies, seed, axis=1).mean(1) for seed in range(seeds)]
        return np.stack(without, 1)


def main() -> None:
    args = arguments(__doc__).parse_args()
    judge = score_networks(args)
    write(args.out, judge, args.resamples)


def arguments(words: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=words, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ground-truth", type=Path, required=True, metavar="CSV")
    parser.add_argument("--images", type=Path, help="class folders under Training; besides noise")
    parser.add_argument("--teacher", type=Path, help="weights of a trained teacher of the kind")
    parser.add_argument(
        "--train-teacher", type=int, metavar="EPOCHS", help="make one, on the images"
    )
    parser.add_argument(
        "--layers", nargs="+", help="of maps and features (default: the last map before pooling)"
    )
    parser.add_argument("--scores", nargs="+", default=list(SCORES), choices=list(SCORES))
    parser.add_argument("--seeds", type=int, default=3, help="initialisations (default: 3)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, default=Path("selection_quality"))
    return parser


def score_networks(args: argparse.Namespace, all_kinds: bool = True) -> Judge:
    """Every score of every network; without ``all_kinds`` only on images, by a trained teacher."""
    args.out.mkdir(parents=True, exist_ok=True)
    with args.ground_truth.open(encoding="utf-8") as file:
        truth = list(csv.DictReader(file))
    read = read_cifar if "kd_acc" in truth[0] else read_space
    layers = tuple(args.layers) if args.layers else None
    judge = None
    for images in [*(["noise"] if all_kinds else []), *(["images"] if args.images else [])]:
        folder = args.images if images == "images" else None
        classes = len(list((folder / "Training").iterdir())) if folder else None
        candidates, accuracies, build_teacher, size, classes = read(truth, classes)
        candidates = [replace(candidate, layers=layers) for candidate in candidates]
        sizes = [count_parameters(candidate.build()) for candidate in candidates]
        judge = judge or Judge(accuracies, early(truth), sizes, trained_alone(truth))
        teachers = {"random": Teacher(build_teacher, trained=False, layers=layers)}
        weights = args.teacher
        if folder and args.train_teacher:
            weights = args.out / "teacher.pt"
            train_teacher(build_teacher, folder, size, args.train_teacher, weights)
        if folder and weights:
            trained = partial(with_weights, build_teacher, weights)
            teachers["trained"] = Teacher(trained, trained=True, layers=layers)
        batch = make_batch(folder, args.batch_size, size, classes)
        if "trained" in teachers and not all_kinds:
            del teachers["random"]
        for name, teacher in teachers.items():
            record = args.out / f"scores-{images}-{name}.jsonl"
            print(f"{len(candidates)} networks, {images}, {name} teacher", flush=True)
            with RichProgress():
                setup = ScoringSetup(teacher, [batch], args.scores, range(args.seeds))
                found = score_candidates(candidates, setup, record, args.jobs)
            for score in args.scores:
                values = [row["scores"][score][0] for row in found]  # there is one batch
                table = np.array(values, dtype=float).reshape(len(candidates), args.seeds)
                seen = name if SCORES[score].sees_teacher else ""
                judge.scores[score, images, seen] = table
    return judge


def write(out: Path, judge: Judge, resamples: int) -> None:
    rows, differences = [], []
    sizes = -np.array(judge.parameters, dtype=float)
    for (score, images, teacher), values in judge.scores.items():
        usable = np.isfinite(values).all(1)
        named = {"score": score, "images": images, "teacher": teacher}
        if usable.sum() < 3:
            rows.append(named | spread([dict.fromkeys(FIGURES, float("nan"))]))
            continue
        sides = judge.truth[usable], -sizes[usable]
        qualities = [
            ranking_quality(column, target, sides[1])
            for column in values[usable].T
            for target in judge.targets[usable].T
        ]
        rows.append(named | spread(qualities))
        mean = values[usable].mean(1)
        found = compare_quality(mean, sizes[usable], *sides, resamples)
        for figure in ("kendall", "iso_concordance"):
            value, low, high = found[figure]
            named |= {figure: value, f"{figure}_low": low, f"{figure}_high": high}
        differences.append(named)
    if judge.accuracies.shape[1] > 1:
        rows += ceilings(judge)
    for name, content in (("selection_quality", rows), ("differences", differences)):
        with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(content[0]))
            writer.writeheader()
            writer.writerows(content)
    print(tables.table([{k: v for k, v in row.items() if "_sd" not in k} for row in rows]))
    print("\ndifferences to parameters, of the mean over initialisations\n")
    print(tables.table(differences))
    draw(rows).savefig(out / "selection_quality.png", dpi=150)
    print(f"wrote {out}/selection_quality.csv, {out}/selection_quality.png, {out}/differences.csv")


# --- ground truth -------------------------------------------------------------------------------


def read_cifar(truth: list[dict], classes: int | None) -> tuple:
    """With the 100 outputs of the published networks, or as many as the images have classes."""
    classes = classes or 100
    candidates = [
        Candidate(row["arch"], partial(CifarResNet, tuple(map(int, row["arch"])), classes))
        for row in truth
    ]
    teacher = partial(CifarResNet, (9, 9, 9), classes)
    accuracies = np.array([[float(row["kd_acc"])] for row in truth])
    return candidates, accuracies, teacher, 32, classes


def read_space(truth: list[dict], classes: int | None) -> tuple:
    by_student: dict[str, list[float]] = {}
    builds: dict[str, Callable[[], nn.Module]] = {}
    for row in sorted(truth, key=lambda row: row["seed"]):
        by_student.setdefault(row["student"], []).append(float(row["test_accuracy"]))
        choices = json.loads(row["choices"])
        builds[row["student"]] = partial(mobilenetv2, num_classes=classes or 4, **choices)
    candidates = [Candidate(name, build) for name, build in builds.items()]
    size = int(truth[0]["image_size"])
    teacher = partial(
        *(build_model, "mobilenetv2_100", classes or 4, "flatten_mlp"),
        image_size=size,
        timm_kwargs={"pad_type": "same"},
    )
    return candidates, np.array(list(by_student.values())), teacher, size, classes or 4


def early(truth: list[dict]) -> dict[int, np.ndarray]:
    if "val_accuracies" not in truth[0]:
        return {}
    by_student: dict[str, list[list[float]]] = {}
    for row in sorted(truth, key=lambda row: row["seed"]):
        by_student.setdefault(row["student"], []).append(json.loads(row["val_accuracies"]))
    curves = np.array(list(by_student.values()))
    return {epochs: curves[..., epochs - 1] for epochs in (1, 2, 5)}


def trained_alone(truth: list[dict]) -> dict[tuple[str, str, str], np.ndarray]:
    """What no score can be asked to know: the accuracy without a teacher, where it is published."""
    if "plain_acc" not in truth[0]:
        return {}
    accuracies = np.array([[-float(row["plain_acc"])] for row in truth])
    return {("accuracy of the student trained alone", "", ""): accuracies}


def train_teacher(
    build: Callable[[], nn.Module], folder: Path, size: int, epochs: int, file: Path
) -> None:
    """By cross entropy, on the part of Training that validation leaves; kept in a file."""
    if file.exists():
        return
    torch.manual_seed(0)
    model = build()
    parts = {
        part: DataLoader(
            FolderImages(str(folder), part=part, image_size=size, augment=part == "train"),
            *(64, part == "train"),
            drop_last=part == "train",
        )
        for part in ("train", "validation")
    }
    optimizer = torch.optim.Adam(model.parameters())
    steps = epochs * len(parts["train"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.005, steps)
    with RichProgress() as progress:
        for _ in progress.track(range(epochs), "teacher", epochs):
            for images, targets in parts["train"]:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model.train()(images), targets).backward()
                optimizer.step()
                schedule.step()
    model.eval()
    with torch.no_grad():
        right = [(model(images).argmax(1) == targets) for images, targets in parts["validation"]]
    print(f"teacher trained: {torch.cat(right).float().mean():.3f} right on held-out images")
    torch.save(model.state_dict(), file)


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


def spread(qualities: list[dict[str, float]]) -> dict[str, float]:
    found = {}
    for figure in FIGURES:
        values = [quality[figure] for quality in qualities]
        found[figure], found[f"{figure}_sd"] = float(np.mean(values)), float(np.std(values))
    return found


def ceilings(judge: Judge) -> list[dict]:
    """How well training with one seed ranks what training with the others gives."""
    known = {"accuracy": judge.accuracies}
    known |= {f"validation after {n} epochs": values for n, values in judge.early.items()}
    rows = []
    for name, values in known.items():
        qualities = []
        for seed, target in enumerate(judge.targets.T):
            qualities.append(ranking_quality(-values[:, seed], target, judge.parameters))
        row = {"score": f"another seed's {name}", "images": "", "teacher": ""}
        rows.append(row | spread(qualities))
    return rows


def draw(rows: list[dict]) -> Figure:
    figure = Figure(figsize=(9, 0.28 * len(rows) + 1.2), layout="constrained")
    labels = [" ".join(filter(None, (r["score"], r["images"], r["teacher"]))) for r in rows]
    for axes, name in zip(figure.subplots(1, 2, sharey=True), FIGURES[1:3], strict=True):
        values = [row[name] for row in rows]
        axes.barh(labels, values, xerr=[row[f"{name}_sd"] for row in rows], color="#5b8db8")
        base = next((row[name] for row in rows if row["score"] == "parameters"), None)
        if base is not None:
            axes.axvline(base, color="#c01818", linewidth=1)
        title = f"{name.replace('iso_', 'equal-size ')} (red: parameters)"
        axes.set_title(title, fontsize=10)
        axes.tick_params(labelsize=7)
        axes.grid(axis="x", alpha=0.3)
        axes.margins(y=0.01)
    figure.get_axes()[0].invert_yaxis()
    return figure


if __name__ == "__main__":
    main()
