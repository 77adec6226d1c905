"""Train every student of a space under one protocol: what a selection should have known.

Each student is one run of the driver with the same config, which must have a student_model; its
architecture is put in. Finished runs are used again, and those that another process is running are
left to it: start the command several times, on as many processors. When all are finished, writes
OUT/ground_truth.csv: a row for each student and seed.

    python examples/benchmarks/train_space.py kd.yaml --space thesis --seeds 0 1 --out truth \\
        --set image_size=64 --set train.num_epochs=10

With --halve 3, it chooses instead of measuring: all students are trained for a ninth of the epochs
(of --epochs), the better third for a third, and the better third of these for all; "better" is the
validation accuracy. OUT/halving.csv has a row for each training (Jamieson and Talwalkar, 2016).

    python examples/benchmarks/train_space.py kd.yaml --halve 3 --epochs 27 --seeds 0 --out chosen
"""

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from kd_lrp_plugin.cli.console import RichProgress
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.metrics.efficiency import count_macs, count_parameters
from kd_lrp_plugin.models.mobilenetv2 import MobileNetV2
from kd_lrp_plugin.selection.spaces import SPACES
from kd_lrp_plugin.training.trainer import distill


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--space", default="thesis", choices=list(SPACES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--first", type=int, help="train only so many of the space: a trial")
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--halve", type=int, metavar="N", help="choose by successive halving")
    parser.add_argument("--epochs", type=int, default=27, help="of the last round of --halve")
    parser.add_argument("--out", type=Path, default=Path("ground_truth"))
    args = parser.parse_args()
    students = list(SPACES[args.space])[: args.first]
    args.out.mkdir(parents=True, exist_ok=True)
    if args.halve:
        rows = halve(args, students)
        write(args.out / "halving.csv", rows)
        print(f"chosen: {rows[-1]['student']}")
    else:
        rows = train(args, students, args.out)
        write(args.out / "ground_truth.csv", rows)


def halve(args: argparse.Namespace, students: list[MobileNetV2]) -> list[dict]:
    """Rounds of more epochs for fewer students; the last row is of the best one."""
    found, epochs = [], max(1, args.epochs // args.halve**2)
    while True:
        folder = args.out / f"{epochs}_epochs"
        rows = train(args, students, folder, [f"train.num_epochs={epochs}"])
        accuracies = {
            student: sum(row["val_accuracy"] for row in rows if row["student"] == str(student))
            for student in students
        }
        students.sort(key=accuracies.__getitem__, reverse=True)
        rows.sort(key=lambda row: [str(s) for s in students].index(row["student"]), reverse=True)
        found += [{"epochs": epochs, **row} for row in rows]
        if epochs >= args.epochs or len(students) == 1:
            return found
        students = students[: -(-len(students) // args.halve)]
        epochs = min(args.epochs, epochs * args.halve)


def train(
    args: argparse.Namespace,
    students: list[MobileNetV2],
    folder: Path,
    overrides: Sequence[str] = (),
) -> list[dict]:
    rows, missing = [], 0
    for seed, student in itertools.product(args.seeds, students):
        choices = {**asdict(student), "num_classes": args.classes}
        entry = {"key": "timm_mobilenetv2", "kwargs": choices}
        model = yaml.safe_dump(entry, default_flow_style=True).strip()
        changes = [*args.overrides, f"models.student_model={model}", *overrides]
        print(f"{student}, seed {seed}", flush=True)
        try:
            with RichProgress():
                out = folder / "runs" / str(student) / str(seed)
                summary = distill(RunSpec(args.config, changes, out, seed))
        except BlockingIOError:
            missing += 1
            continue
        channels, height, width = summary["image_shape"]
        built = student.build(args.classes, height)
        macs = count_macs(built, (height, width), channels)
        row = {"student": str(student), "seed": seed, "choices": json.dumps(asdict(student))}
        row |= {key: summary[key] for key in ("test_accuracy", "test_loss", "val_accuracy")}
        row |= {"parameters": count_parameters(built), "macs": macs}
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        row["val_accuracies"] = json.dumps([json.loads(line)["val_accuracy"] for line in lines])
        row["image_size"] = height
        rows.append({**row, "seconds": summary["seconds"]})
    if missing:
        sys.exit(f"{missing} runs are still with other processes: start this again to collect all")
    return rows


def write(file: Path, rows: list[dict]) -> None:
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
