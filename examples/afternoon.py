"""From a folder of images to a page, by the commands that `kd-lrp init` writes; no line is edited.

Makes OUT/project by `kd-lrp init`, gives the seven commands of its README one after the other, as
they stand there, and prints what each took, the accuracy of teacher and student, and where the
page is. MNIST's IDX files are drawn as PNGs in class folders first. Started again it resumes.

    python examples/afternoon.py images --out afternoon
    python examples/afternoon.py slides --out slides_afternoon --init "--classes aca --classes n"
    python examples/afternoon.py mnist --out mnist_afternoon --size 2000
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from kd_lrp_plugin.data.layout import is_image
from kd_lrp_plugin.data.mnist import Mnist
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.plots.tables import table
from kd_lrp_plugin.utils.files import hash_file

MODELS = "--teacher test_resnet --student test_efficientnet"  # of the short mode


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="images in class folders, or MNIST's files")
    parser.add_argument("--out", type=Path, default=Path("afternoon"), help="default: %(default)s")
    parser.add_argument("--init", default="", help="further options of kd-lrp init, in quotes")
    parser.add_argument("--size", type=int, default=2000, help="digits (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="drawn images, one epoch: a trial")
    args = parser.parse_args()
    images, project = args.folder, args.out / "project"
    if args.short and not images.exists():
        draw(Phantom("train", size=48, image_size=48), images)
    elif any(args.folder.glob("*idx3-ubyte*")):
        images = args.out / args.folder.name
        draw(Mnist(str(args.folder), size=args.size), images)

    rows = []
    if not project.exists():
        words = ["init", str(images), "--out", str(project)]
        words += shlex.split(f"{MODELS} {args.init}" if args.short else args.init)
        rows.append(give(words, Path()))
    before = {file: hash_file(file) for file in project.glob("*.yaml")}
    trial = ["--set", "train.num_epochs=1"]
    for words in read_commands(project / "README.md"):
        if args.short and words[0] in ("distill", "study"):
            words = [*words, *trial, *(["--seeds", "1"] if words[0] == "study" else [])]
        rows.append(give(words, project))
    edited = sum(hash_file(file) != digest for file, digest in before.items())

    print(f"\n{table(rows)}\n")
    count = sum(is_image(file.name) for file in images.rglob("*"))
    classes = json.loads((project / "runs/teacher/summary.json").read_text())["classes"]
    print(f"{images}: {count:,} images of {len(classes)} classes")
    for name in ("teacher", "student"):
        summary = json.loads((project / f"runs/{name}/summary.json").read_text())
        found = (
            f"test accuracy {summary['test_accuracy']:.4f}, {summary['parameters']:,} parameters"
        )
        print(f"{name}: {found}")
    print(f"files edited: {edited}; seconds: {sum(row['seconds'] for row in rows)}")
    print(f"the page: {project}/page.html")


def draw(data: Mnist | Phantom, folder: Path) -> None:
    """PNGs in class folders, all of them or none."""
    if folder.exists():
        return
    draft = folder.with_name(f"{folder.name}.draft")
    for index, target in enumerate(data.targets):
        file = draft / data.classes[target] / f"{index:05}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        data.image(index).convert("L").save(file)
    draft.rename(folder)


def read_commands(readme: Path) -> list[list[str]]:
    """The words behind kd-lrp of each command of a project's README."""
    (block,) = re.findall(r"^```sh\n(.*?)^```", readme.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [shlex.split(line)[1:] for line in block.splitlines()]


def give(words: list[str], folder: Path) -> dict[str, str | int]:
    """Run a command of kd-lrp; ends with its code if it fails."""
    shown = shlex.join(["kd-lrp", *words])
    print(f"\n$ {shown}", flush=True)
    started = time.monotonic()
    code = subprocess.run(
        [sys.executable, "-m", "kd_lrp_plugin.cli", *words], cwd=folder
    ).returncode
    if code:
        sys.exit(code)
    return {"command": shown, "seconds": round(time.monotonic() - started)}


if __name__ == "__main__":
    main()
