"""Kill a run again and again, give the same command each time, and compare with a run in peace.

Trains the config once without interruption, and once killed by SIGKILL, workers and all: at random
moments, and every other time while a checkpoint is being written. Says whether weights, metrics
and predictions are the same in the end, bit for bit; if they are not, the exit code is 1.

    python examples/benchmarks/kill_and_resume.py --kills 10
    python examples/benchmarks/kill_and_resume.py my.yaml --kills 3 \\
        --set train.num_epochs=5 --out proof
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from kd_lrp_plugin.plots import tables
from kd_lrp_plugin.utils.files import DRAFT

CONFIGS = Path(__file__).resolve().parents[2] / "torchdistill_configs" / "phantom"
LRP = CONFIGS / "lrp_cosine/test_resnet_from_resnet10t.yaml"
SMALL = [
    "models.teacher_model.src_ckpt=null",  # its random weights are as good here
    "image_size=48",
    "batch_size=8",
    "num_workers=2",
    "train.num_epochs=12",
    "datasets.phantom/train.init.kwargs.size=64",
    "datasets.phantom/val.init.kwargs.size=16",
    "datasets.phantom/test.init.kwargs.size=16",
]
TIMES = ("seconds", "images_per_second", "memory_mb")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, nargs="?", help="default: LRP on the phantom, small")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the run and of the moments")
    parser.add_argument("--out", type=Path, default=Path("kill_and_resume"), help="folder")
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f"{args.out}: expected a new folder, got one that is there. Choose another --out.")
    args.out.mkdir(parents=True)

    overrides = args.overrides if args.config else SMALL + args.overrides
    command = [sys.executable, "-m", "kd_lrp_plugin.cli", "distill", str(args.config or LRP)]
    command += [word for override in overrides for word in ("--set", override)]
    command += ["--seed", str(args.seed), "--device", "cpu", "--out"]

    whole, killed = args.out / "whole", args.out / "killed"
    subprocess.run([*command, str(whole)], check=True)
    epoch = max(record["seconds"] for record in records(whole))
    moments = random.Random(args.seed)
    rows = []
    while len(rows) < args.kills:
        row = kill(
            [*command, str(killed)], killed, len(rows) % 2 == 0, moments.uniform(0, 2.5 * epoch)
        )
        if row is None:
            break
        rows.append({"kill": len(rows) + 1, **row})
        print(rows[-1], flush=True)
    subprocess.run([*command, str(killed)], check=True)

    print(f"\n{tables.table(rows, digits=2)}" if rows else "finished before the first kill")
    same = {
        "weights": (whole / "student.safetensors").read_bytes()
        == (killed / "student.safetensors").read_bytes(),
        "metrics": untimed(whole) == untimed(killed),
        "predictions": (whole / "predictions.csv").read_text()
        == (killed / "predictions.csv").read_text(),
    }
    print(f"\nafter {len(rows)} kills the same, bit for bit: {same}")
    sys.exit(not all(same.values()))


def kill(command: list[str], folder: Path, in_checkpoint: bool, after: float) -> dict | None:
    """Start, and kill in a checkpoint, or ``after`` so many seconds of training."""
    sessions = len(about(folder))
    with (folder.parent / "log.txt").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    while process.poll() is None and len(about(folder)) == sessions:
        time.sleep(0.01)
    began = time.time()
    while process.poll() is None:
        drafts = [file.name for file in folder.glob(f"*.pt{DRAFT}")]
        if drafts if in_checkpoint else time.time() - began > after:
            break
        time.sleep(0.0005)
    seconds = time.time() - began
    if process.poll() is not None:
        return None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return {
        "aimed at": "a checkpoint" if in_checkpoint else "any moment",
        "seconds of training": seconds,
        "epochs finished": len(records(folder)),
        "half-written": ", ".join(sorted(file.stem for file in folder.glob(f"*{DRAFT}"))),
    }


def about(folder: Path) -> list[dict]:
    try:
        return json.loads((folder / "environment.json").read_text())["sessions"]
    except (OSError, ValueError):
        return []


def records(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.open()] if file.exists() else []


def untimed(folder: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records(folder)]


if __name__ == "__main__":
    main()
