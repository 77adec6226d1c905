"""Train every student of a space under one protocol: what a selection should have known.

Each student is one run of the driver with the same config, which must have a student_model; its
architecture is put in. Runs that are finished are used again, and runs that another process is at
are left to it: start the command several times, on as many processors. When all are finished,
writes OUT/ground_truth.csv: a row for each student and seed.

    python examples/train_space.py kd.yaml --space thesis --seeds 0 1 --out truth \\
        --set image_size=64 --set train.num_epochs=10
"""

import argparse
import csv
import json
import sys
from dataclasses import asdict
from pathlib import Path

import yaml

from kd_lrp_plugin.cli import Show
from kd_lrp_plugin.efficiency import count_macs, count_parameters
from kd_lrp_plugin.spaces import SPACES
from kd_lrp_plugin.training import distill


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
    parser.add_argument("--out", type=Path, default=Path("ground_truth"))
    args = parser.parse_args()
    rows, missing = [], 0
    for seed in args.seeds:
        for student in list(SPACES[args.space])[: args.first]:
            folder = args.out / "runs" / str(student) / str(seed)
            choices = {**asdict(student), "num_classes": args.classes}
            model = yaml.safe_dump(
                {"key": "timm_mobilenetv2", "kwargs": choices}, default_flow_style=True
            )
            overrides = [*args.overrides, f"models.student_model={model.strip()}"]
            print(f"{student}, seed {seed}", flush=True)
            try:
                with Show() as show:
                    summary = distill(args.config, overrides, folder, seed, show=show)
            except BlockingIOError:
                missing += 1
                continue
            size = summary["image_shape"][-1]
            built = student.build(args.classes, size)
            rows.append(
                {
                    "student": str(student),
                    "seed": seed,
                    "choices": json.dumps(asdict(student)),
                    "test_accuracy": summary["test_accuracy"],
                    "test_loss": summary["test_loss"],
                    "val_accuracy": summary["val_accuracy"],
                    "parameters": count_parameters(built),
                    "macs": count_macs(built, size),
                    "seconds": summary["seconds"],
                }
            )
    if missing:
        sys.exit(f"{missing} runs are still with other processes: start this again to collect all")
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "ground_truth.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {args.out}/ground_truth.csv")


if __name__ == "__main__":
    main()
