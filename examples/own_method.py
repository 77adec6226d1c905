"""A rule, a method, losses, a score, an attribution and a data set of one's own, from YAML.

    python examples/own_method.py

They are in examples/extension/own.py, and named by examples/extension/own.yaml. This chooses a
student by the score, trains it with the losses, and explains it by the attribution and the method,
as these commands do, once PYTHONPATH has that folder:

    kd-lrp select examples/extension/own.yaml
    kd-lrp distill examples/extension/own.yaml --out runs/extension/0
    kd-lrp explain runs/extension/0 --model student --method gradient_norm
"""

import argparse
import os
import sys
from pathlib import Path

METHODS = ("--method", "gradient_norm", "--method", "grad_cam")
FOLDER = Path(__file__).resolve().parent / "extension"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/extension/0"), help="run folder")
    args = parser.parse_args()
    sys.path.insert(0, str(FOLDER))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FOLDER), os.getenv("PYTHONPATH")]))

    from kd_lrp_plugin.cli.main import app

    config = str(FOLDER / "own.yaml")
    for command in (
        ["select", config],
        ["distill", config, "--out", str(args.out)],
        [*f"explain {args.out} --model student --layer layer3 --n 2".split(), *METHODS],
    ):
        print("$ kd-lrp", *command, flush=True)
        app(command, standalone_mode=False)
    print(f"written: {args.out}/student.safetensors, {args.out}/explanations.json")


if __name__ == "__main__":
    main()
