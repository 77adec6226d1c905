"""A student that fell for a marker, one that did not, and the maps that show why.

Trains a ResNet teacher on the built-in brain-MRI phantom. Then two students, thirteen times
smaller, learn from it on images in which a white square tells the class by the corner that it is
in: one by plain KD, one with the teacher's relevance (signed relative L2). Both are tested with
the square in any corner, in a wrong one, and without it. Ends with a table on the terminal and in
OUT/table.md, maps in OUT/shortcut.png, and everything in OUT/report.html. Stopped and started
again it resumes, and uses the runs that are finished.

    python examples/demo.py --out demo
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from kd_lrp_plugin.attribution.localisation import area_share, relevance_mass_accuracy
from kd_lrp_plugin.attribution.methods import attribute
from kd_lrp_plugin.cli.console import RichProgress
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.data.shortcuts import Marked
from kd_lrp_plugin.evaluation.evaluate import evaluate
from kd_lrp_plugin.plots.maps import MapRow, map_figure
from kd_lrp_plugin.plots.tables import table
from kd_lrp_plugin.report import page
from kd_lrp_plugin.runs.loading import load_run
from kd_lrp_plugin.training.trainer import distill

CONFIGS = Path(__file__).resolve().parent.parent / "torchdistill_configs"
PAIR = "test_resnet_from_resnet10t.yaml"
STUDENTS = {
    "KD": f"phantom_marked/kd/{PAIR}",
    "KD + relevance": f"phantom_marked/lrp_relative_l2/{PAIR}",
}
LAYER = "layer2"  # an eighth of the image's size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder (default: demo)")
    parser.add_argument("--seed", type=int, default=0, help="of every random number generator")
    parser.add_argument("--short", action="store_true", help="tiny data, one epoch: a trial")
    args = parser.parse_args()
    started = time.monotonic()
    folders = train(args.out / "runs", args.seed, args.short)
    students = {name: folder for name, folder in folders.items() if name != "teacher"}
    with RichProgress():
        evaluations = {name: evaluate(folder) for name, folder in students.items()}
        page.write(list(folders.values()), args.out / "report.html")
    mass = picture(folders, args.out / "shortcut.png", 32 if args.short else 64)

    rows = []
    for name, found in evaluations.items():
        groups = found["student"]["groups"]["by_group"]
        accuracy = {f"marker {group}": of["accuracy"] for group, of in groups.items()}
        rows.append({"student": name, **accuracy, "relevance on the marker": mass[name]})
    text = table(rows)
    note = (
        "Accuracy with the marker in any corner, in a wrong one, and without it. "
        f"By chance, {mass['chance']:.3f} of the relevance lies on the marker; the teacher, which "
        f"has never seen one, has {mass['teacher']:.3f} there."
    )
    (args.out / "table.md").write_text(f"{text}\n\n{note}\n", encoding="utf-8")
    print(f"\n{text}\n{note}")
    print(f"\nwhere they look: {args.out}/shortcut.png; everything: {args.out}/report.html")
    print(f"the table: {args.out}/table.md")
    print(f"{time.monotonic() - started:.0f} s")


def train(out: Path, seed: int, short: bool) -> dict[str, Path]:
    """The teacher on clean images, the students on marked ones; what is finished is not rerun."""
    image_size, sizes = (32, (32, 16, 16)) if short else (64, (1200, 100, 300))
    changes = [f"image_size={image_size}", "num_workers=0"]
    for split, size in zip(("train", "val", "test"), sizes, strict=True):
        changes.append(f"datasets.phantom/{split}.init.kwargs.size={size}")
    folders = {"teacher": out / "teacher"}
    epochs = {"teacher": 1 if short else 10}
    specs = {"teacher": ("phantom/ce/resnet10t.yaml", changes)}
    of_teacher = f"models.teacher_model.src_ckpt={folders['teacher']}/best.pt"
    for name, config in STUDENTS.items():
        folders[name] = out / name.replace(" + ", "_").lower()
        epochs[name] = 1 if short else 6
        specs[name] = (config, [*changes, of_teacher])
    contrast = "train.criterion.kwargs.semantic.kwargs.target=contrast"
    specs["KD + relevance"][1].append(contrast)  # the label's relevance minus the others' mean
    for name, (config, overrides) in specs.items():
        print(f"\n{name}: {config}")
        steps = [f"train.num_epochs={epochs[name]}"]
        with RichProgress():
            distill(RunSpec(CONFIGS / config, [*overrides, *steps], folders[name], seed))
    return folders


def picture(folders: dict[str, Path], file: Path, image_size: int) -> dict[str, float]:
    """Maps of four images whose marker is in a wrong corner; the mean relevance on the marker.

    Returns:
        By model, and "chance": the marker's share of the image.
    """
    data = Marked(Phantom("test", size=64, image_size=image_size), variants="conflicting")
    images = torch.stack([data[i][0] for i in range(len(data))])
    targets = torch.tensor(data.targets)
    markers = torch.stack([torch.from_numpy(data.marker(i)) for i in range(len(data))])
    found: dict[str, float] = {"chance": float(area_share(markers).mean())}
    maps: dict[str, torch.Tensor] = {}
    logits: dict[str, torch.Tensor] = {}
    for name, folder in folders.items():
        model, _ = load_run(folder)
        with torch.no_grad():
            logits[name] = model(images)
        # Each explains what it says: where the wrong answer comes from is the question.
        maps[name] = attribute(model, images, logits[name].argmax(1), "gradient_activation", LAYER)
        found[name] = float(relevance_mass_accuracy(maps[name], markers).nanmean())
    chosen = [data.targets.index(label) for label in range(len(data.classes))]
    rows = [row(data, i, images, targets, maps, logits) for i in chosen]
    title = "The square tells the wrong class: what each network says, and why"
    map_figure(rows, title, "the marker").savefig(file)
    return found


def row(
    data: Marked,
    index: int,
    images: torch.Tensor,
    targets: torch.Tensor,
    maps: dict[str, torch.Tensor],
    logits: dict[str, torch.Tensor],
) -> MapRow:
    said: dict[str, Any] = {}
    for name, values in logits.items():
        share, best = values[index].softmax(0).max(0)
        said[name] = (data.classes[int(best)], float(share))
    return MapRow(
        data.classes[int(targets[index])],
        (images[index].permute(1, 2, 0).numpy() + 1) / 2,
        {name: of[index].numpy() for name, of in maps.items()},
        said,
        data.marker(index),
    )


if __name__ == "__main__":
    main()
