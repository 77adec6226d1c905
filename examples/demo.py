"""A student that fell for a marker, one that did not, and the maps that show why.

Trains a ResNet teacher on the built-in brain-MRI phantom. DisWOT ranks a few untrained students,
ten times smaller or more, and chooses one. It is trained twice, on images in which a white square
tells the class by the corner that it is in: by plain KD, and with the teacher's relevance (signed
relative L2). Both are tested with the square in any corner, in a wrong one, and without it. Ends
with a table on the terminal and in OUT/table.md, maps in OUT/shortcut.png, and everything in
OUT/report.html. Stopped and started again it resumes, and uses what is finished.

    python examples/demo.py --out demo
"""

import argparse
import json
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
from kd_lrp_plugin.selection.ranking import summarise_ranking
from kd_lrp_plugin.selection.select import Selection, read_choice, save_choice
from kd_lrp_plugin.selection.spec import SelectionSpec
from kd_lrp_plugin.torchdistill.models import make_builder
from kd_lrp_plugin.training.trainer import distill

CONFIGS = Path(__file__).resolve().parent.parent / "torchdistill_configs"
PAIR = "test_resnet_from_resnet10t.yaml"
STUDENTS = {
    "KD": f"phantom_marked/kd/{PAIR}",
    "KD + relevance": f"phantom_marked/lrp_relative_l2/{PAIR}",
}
CHOICE = "choice.json"
LAYER = "layer2"  # an eighth of the image's size
TEACHER = {"key": "timm_model", "kwargs": {"name": "resnet10t", "num_classes": 4}}
# Small ResNets of these blocks and channels, in the four stages that the maps are taken from.
SHAPES = (
    ((1, 1, 1, 1), (32, 48, 48, 96)),
    ((1, 1, 1, 1), (24, 32, 48, 96)),
    ((1, 1, 1, 1), (32, 48, 64, 128)),
    ((1, 2, 1, 1), (32, 48, 48, 96)),
)
BUDGET = ["params=500K"]  # a tenth of the teacher's


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
    choice = args.out / "runs" / CHOICE
    students = {name: folder for name, folder in folders.items() if name != "teacher"}
    with RichProgress():
        evaluations = {name: evaluate(folder) for name, folder in students.items()}
        page.write(list(folders.values()), args.out / "report.html", selection=choice)
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
    print(f"\nboth students are {describe(read_choice(choice)['entry'])}, chosen in {choice}")
    print(f"\nwhere they look: {args.out}/shortcut.png; everything: {args.out}/report.html")
    print(f"the table: {args.out}/table.md")
    print(f"{time.monotonic() - started:.0f} s")


def train(out: Path, seed: int, short: bool) -> dict[str, Path]:
    """The teacher on clean images, the student on marked ones; what is finished is not rerun."""
    image_size, sizes = (32, (32, 16, 16)) if short else (64, (1200, 100, 300))
    changes = [f"image_size={image_size}", "num_workers=0"]
    for split, size in zip(("train", "val", "test"), sizes, strict=True):
        changes.append(f"datasets.phantom/{split}.init.kwargs.size={size}")
    folders = {"teacher": out / "teacher"}

    def run(name: str, config: str, overrides: list[str], epochs: int) -> None:
        print(f"\n{name}: {config}")
        steps = f"train.num_epochs={1 if short else epochs}"
        with RichProgress():
            distill(RunSpec(CONFIGS / config, [*changes, *overrides, steps], folders[name], seed))

    run("teacher", "phantom/ce/resnet10t.yaml", [], 10)
    weights = f"{folders['teacher']}/best.pt"
    images = Marked(Phantom("train", sizes[0], image_size=image_size))
    chosen = choose(out / CHOICE, {**TEACHER, "src_ckpt": weights}, images)
    taught = [
        f"models.teacher_model.src_ckpt={weights}",
        f"models.student_model.kwargs={json.dumps(chosen['kwargs'])}",
    ]
    # The label's relevance minus the others' mean.
    contrast = "train.criterion.kwargs.semantic.kwargs.target=contrast"
    for name, config in STUDENTS.items():
        folders[name] = out / name.replace(" + ", "_").lower()
        run(name, config, [*taught, contrast] if name == "KD + relevance" else taught, 6)
    return folders


def choose(file: Path, teacher: dict[str, Any], images: Marked) -> dict[str, Any]:
    """The student that DisWOT ranks first, as an entry of models; recorded in ``file``."""
    if not file.exists():
        spec = SelectionSpec(
            num_classes=4,
            record=file,
            data=images,
            teacher=teacher,
            candidates=[name_student(*shape) for shape in SHAPES],
            budget=BUDGET,
            batch_size=16,
            seeds=(0, 1, 2),
        )
        print("\nselection: untrained students, by DisWOT")
        with RichProgress():
            save_choice(spec, Selection(spec, make_builder).rank())
    choice = read_choice(file)
    rows = [
        {
            "student": describe(record["entry"]),
            "parameters": int(record["parameters"]),
            "score (lower is better)": record["score"],
        }
        for record in choice["ranking"]
    ]
    print(f"\n{table(rows)}\n{summarise_ranking(choice['ranking'])}")
    return choice["entry"]


def name_student(layers: tuple[int, ...], channels: tuple[int, ...]) -> dict[str, Any]:
    """An entry of models."""
    kwargs = {"name": "test_resnet", "num_classes": 4}
    shape = {"layers": list(layers), "channels": list(channels)}
    return {"key": "timm_model", "kwargs": {**kwargs, "timm_kwargs": shape}}


def describe(entry: dict[str, Any]) -> str:
    shape = entry["kwargs"]["timm_kwargs"]
    return f"blocks {shape['layers']}, channels {shape['channels']}"


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
