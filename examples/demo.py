"""From nothing to a comparison: a teacher, two students, their accuracy and their maps.

Trains a ResNet teacher on the built-in brain-MRI phantom, distils a student thirteen times
smaller from it, once by plain KD and once with relevance maps (LRP + cosine), and compares them:
a table on the terminal and in OUT/table.md, a figure in OUT/maps.png. Stopped and started again
it goes on, and uses the runs that are finished.

    python examples/demo.py --out demo
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from kd_lrp_plugin import console, report
from kd_lrp_plugin.data import Phantom
from kd_lrp_plugin.efficiency import count_macs, count_parameters
from kd_lrp_plugin.evaluation import agreement, mass_inside
from kd_lrp_plugin.relevance import record
from kd_lrp_plugin.results import load_run
from kd_lrp_plugin.training import distill

CONFIGS = Path(__file__).resolve().parent.parent / "torchdistill_configs" / "phantom"
PAIR = "test_resnet_from_resnet10t.yaml"
RUNS = {
    "teacher": "ce/resnet10t.yaml",
    "KD": f"kd/{PAIR}",
    "LRP + cosine": f"lrp_cosine/{PAIR}",
}
LAYER = "layer2"  # an eighth of the image's size; at the last map, methods agree


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder (default: demo)")
    parser.add_argument("--seed", type=int, default=0, help="of every random number generator")
    parser.add_argument("--short", action="store_true", help="tiny data, one epoch: a trial")
    args = parser.parse_args()
    started = time.time()
    sizes, epochs, image_size = ((32, 16, 16), 1, 32) if args.short else ((1200, 200, 300), 6, 64)
    changes = [f"image_size={image_size}", f"train.num_epochs={epochs}", "num_workers=0"]
    for split, size in zip(("train", "val", "test"), sizes, strict=True):
        changes.append(f"datasets.phantom/{split}.init.kwargs.size={size}")

    models = {}
    for name, config in RUNS.items():
        folder = args.out / "runs" / name.replace(" + ", "_").lower()
        print(f"\n{name}: {config}")
        teacher = f"models.teacher_model.src_ckpt={args.out}/runs/teacher/best.pt"
        extra = [] if name == "teacher" else [teacher]
        with console.Show() as show:
            distill(CONFIGS / config, changes + extra, folder, args.seed, show=show)
        models[name] = load_run(folder)

    images = Phantom("test", size=sizes[2], image_size=image_size)
    batch = torch.stack([image for image, _ in images])
    labels = torch.tensor(images.targets)
    masks = torch.from_numpy(np.stack([images.mask(index) for index in range(len(images))]))
    maps, predictions = {}, {}
    for name, (model, _) in models.items():
        model.requires_grad_(False)
        with record(model, [LAYER]) as recording:
            logits = model(batch)
        maps[name] = recording.maps(logits, labels)[0].detach()
        predictions[name] = logits.detach().softmax(1)

    rows = [
        {
            "model": name,
            "accuracy": summary["test_accuracy"],
            "parameters": count_parameters(model),
            "MACs": int(count_macs(model, image_size)),
            "maps like the teacher's": float(agreement(maps[name], maps["teacher"]).nanmean()),
            "relevance in the tumour": float(mass_inside(maps[name], masks).nanmean()),
            "training s": summary["seconds"],
        }
        for name, (model, summary) in models.items()
    ]
    area = float(masks[masks.any(2).any(1)].float().mean())
    table = report.table(rows)
    note = f"Evenly spread relevance would lie in the tumour to {area:.3f}, its share of the image."
    (args.out / "table.md").write_text(f"{table}\n\n{note}\n", encoding="utf-8")
    print(f"\n{table}\n{note}")

    shown = [images.targets.index(label) for label in range(len(images.classes))]
    figure = report.map_figure(
        [
            report.MapRow(
                label=images.classes[labels[index]],
                image=np.asarray(images.image(index)),
                maps={name: of_model[index].numpy() for name, of_model in maps.items()},
                predictions={
                    name: (images.classes[int(p[index].argmax())], float(p[index].max()))
                    for name, p in predictions.items()
                },
                mask=masks[index].numpy(),
            )
            for index in shown
        ],
        title=f"Relevance of the true class at {LAYER}",
    )
    figure.savefig(args.out / "maps.png", dpi=150)
    print(f"\nwrote {args.out}/table.md and {args.out}/maps.png in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
