"""The plugin under torchdistill's own, unmodified example script.

The script is not part of torchdistill's wheel; give the path of a copy from its repository
(examples/torchvision/image_classification.py):

    python examples/torchdistill_script.py --script PATH

Trains a teacher with kd-lrp first (extra cli), if there is none yet: without one the script would
train with random weights.
"""

import argparse
import subprocess
import sys
from pathlib import Path

CONFIGS = Path(__file__).resolve().parent.parent / "torchdistill_configs" / "phantom"
TEACHER = CONFIGS / "ce" / "resnet10t.yaml"
STUDENT = CONFIGS / "lrp_cosine" / "test_resnet_from_resnet10t-script.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--script", type=Path, help="torchdistill's image_classification.py")
    parser.add_argument("--out", type=Path, default=Path("runs/script"), help="working folder")
    parser.add_argument("--short", action="store_true", help="tiny data, one epoch: a trial")
    args = parser.parse_args()
    if args.script is None:
        print("skipped: no --script; it lies in torchdistill's repository, not in its wheel")
        return
    if not args.script.is_file():
        sys.exit(f"--script: expected a file, got none at {args.script}.")
    args.out.mkdir(parents=True, exist_ok=True)

    from kd_lrp_plugin.config.document import resolve_config

    changes = ["models.model.kwargs.num_classes=5"]
    small = []
    if args.short:
        small = ["image_size=32", "train.num_epochs=1", "num_workers=0"]
        for split in ("train", "val", "test"):
            small.append(f"datasets.phantom/{split}.init.kwargs.size=64")
    teacher = args.out / "runs/phantom/ce/resnet10t-script/0"
    if not teacher.exists():
        sets = [word for change in changes + small for word in ("--set", change)]
        kd_lrp = [sys.executable, "-m", "kd_lrp_plugin"]
        if code := subprocess.run(
            [*kd_lrp, "distill", TEACHER, "--out", teacher, *sets]
        ).returncode:
            sys.exit(code)
    config = args.out / "student.yaml"
    config.write_text(resolve_config(STUDENT, small).text, encoding="utf-8")
    command = [sys.executable, args.script.resolve(), "--config", config.name, "--device", "cpu"]
    print(f"wrote {config}", " ".join(map(str, command)), sep="\n", flush=True)
    subprocess.run([*command, "--seed", "0"], cwd=args.out, check=True)


if __name__ == "__main__":
    main()
