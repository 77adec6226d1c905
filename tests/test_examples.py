"""Every example runs as a script, offline, and leaves what it says."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import preloaded
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PHANTOM_KD = EXAMPLES.parent / "torchdistill_configs/phantom/kd/test_resnet_from_resnet10t.yaml"

# Files that an example finds in its folder; the accuracies are made up.
FILES = {
    name: {"truth.csv": "arch,kd_acc,params,macs\n111,0.6,1,1\n113,0.7,1,1\n131,0.65,1,1\n"}
    for name in ("benchmarks/validate_selection.py", "benchmarks/explore_scores.py")
}
FILES["torchdistill_script.py"] = {  # stands for torchdistill's: reads the config as that does
    "script.py": (
        "import sys\n"
        "from torchdistill.common import yaml_util\n"
        "config = yaml_util.load_yaml_file(sys.argv[sys.argv.index('--config') + 1])\n"
        "print(sorted(config['models']), flush=True)\n"
    )
}

# Arguments of each example's short mode, and the files that it leaves in its folder.
SHORT: dict[str, tuple[list[str], list[str]]] = {
    "afternoon.py": (
        ["images", "--short", "--out", "afternoon"],
        ["afternoon/project/page.html"],
    ),
    "benchmarks/benchmark_driver.py": (
        [
            *("--rounds", "1", "--set", "image_size=32"),
            *("--set", "datasets.phantom/train.init.kwargs.size=64"),
        ],
        [],
    ),
    "benchmarks/benchmark_gradients.py": (
        ["--model", "test_resnet", "--image-size", "32", "--batches", "1", "--steps", "2"],
        [],
    ),
    "benchmarks/benchmark_leaks.py": (["--short"], []),
    "benchmarks/benchmark_selection.py": (
        ["--image-size", "64", "--batch-size", "4", "--candidates", "2", "--afresh", "1"],
        [],
    ),
    "benchmarks/benchmark_step.py": (["--short", "--out", "step.csv"], ["step.csv"]),
    "benchmarks/benchmark_teacher_cache.py": (["--short", "--out", "cache.csv"], ["cache.csv"]),
    "demo.py": (
        ["--short", "--out", "demo"],
        ["demo/table.md", "demo/shortcut.png", "demo/report.html"],
    ),
    "benchmarks/kill_and_resume.py": (
        [
            *("--kills", "1", "--set", "train.num_epochs=2", "--set", "num_workers=1"),
            *("--set", "datasets.phantom/train.init.kwargs.size=24", "--out", "proof"),
        ],
        ["proof/whole", "proof/killed"],
    ),
    "make_mhist_lookalike.py": (
        ["synthetic", "--share", "0.004", "--image-size", "32"],
        ["synthetic/annotations.csv", "synthetic/SYNTHETIC.txt"],
    ),
    "own_method.py": (
        ["--out", "own"],
        ["own/student.safetensors", "own/explanations.json", "runs/extension/student.json"],
    ),
    "plain_loop.py": (["--epochs", "3"], []),
    "relevance_maps.py": (["--steps", "2", "--out", "maps.png"], ["maps.png"]),
    "torchdistill_script.py": (
        ["--script", "script.py", "--short", "--out", "script"],
        ["script/student.yaml"],
    ),
    "benchmarks/train_space.py": (
        [
            *(str(PHANTOM_KD), "--first", "1", "--seeds", "0", "--out", "truth"),
            *("--set", "models.teacher_model.src_ckpt=null", "--set", "train.num_epochs=1"),
            *("--set", "image_size=32", "--set", "num_workers=0"),
            *("--set", "datasets.phantom/train.init.kwargs.size=32"),
            *("--set", "datasets.phantom/val.init.kwargs.size=8"),
            *("--set", "datasets.phantom/test.init.kwargs.size=8"),
        ],
        ["truth/ground_truth.csv"],
    ),
    "benchmarks/validate_selection.py": (
        [
            *("--ground-truth", "truth.csv", "--out", "quality", "--batch-size", "8"),
            *("--seeds", "2", "--scores", "diswot", "parameters", "--resamples", "50"),
        ],
        [f"quality/{name}" for name in ("selection_quality.csv", "selection_quality.png")],
    ),
    "benchmarks/explore_scores.py": (
        [
            *("--ground-truth", "truth.csv", "--out", "explored", "--batch-size", "8"),
            *("--seeds", "1", "--scores", "early_lrp_cosine", "gradient_misalignment"),
            *("--resamples", "50"),
        ],
        ["explored/differences.csv", "explored/selection_quality.csv"],
    ),
}

# Start whole processes, each of which has to import everything, or take their time; the tests of
# training/test_resume.py, project/test_create.py and relevance/ do the same without.
SLOW = {
    "afternoon.py",
    "benchmarks/benchmark_driver.py",
    "benchmarks/benchmark_gradients.py",
    "benchmarks/benchmark_leaks.py",
    "benchmarks/benchmark_step.py",
    "benchmarks/kill_and_resume.py",
    "demo.py",
    "own_method.py",
    "plain_loop.py",
    "torchdistill_script.py",
}


def run_example(name: str, folder: Path, *arguments: str) -> str:
    """What the example prints, and "True" or "False" in a last line: torchdistill is imported."""
    ran = preloaded.run(EXAMPLES / name, *arguments, cwd=folder, offline=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


class Finished(NamedTuple):
    folder: Path
    printed: str


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Finished]:
    """Runs the short mode of an example, once for all tests."""

    @cache
    def run(name: str) -> Finished:
        folder = tmp_path_factory.mktemp(Path(name).stem)
        for file, text in FILES.get(name, {}).items():
            (folder / file).write_text(text)
        return Finished(folder, run_example(name, folder, *SHORT[name][0]))

    return run


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name in sorted(str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.py"))
        if not name.startswith("extension/")  # what own_method.py brings with it
    ],
)
def test_runs_offline_and_leaves_its_files(name, short):
    assert name in SHORT, f"give {name} a short mode in SHORT"
    folder, printed = short(name)
    for file in SHORT[name][1]:
        assert (folder / file).stat().st_size > 100
        assert file in printed


def test_the_table_of_examples_has_each_of_them():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \[(\S+\.py)\]\(\1\)", text, re.MULTILINE)) == sorted(SHORT)


def test_plain_loop_needs_no_torchdistill_and_its_terms_fall(short):
    *epochs, torchdistill = short("plain_loop.py").printed.splitlines()
    assert torchdistill == "False"
    first, *_, last = ([float(word) for word in line.split()[3::2]] for line in epochs)
    assert len(first) == 4
    assert all(after < before for before, after in zip(first, last, strict=True))


@pytest.mark.slow
def test_the_benchmarks_table_has_every_case_and_the_plain_step_as_unit(short):
    lines = short("benchmarks/benchmark_step.py").printed.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    assert rows[2] == ["plain KD", "1.00", "1.00", "1.00", "1.00"]
    assert len(rows) >= 13  # head, rule, plain, eight of ours, by hand, Captum; zennit if installed
    for _, *ratios in rows[3:]:
        assert len(ratios) == 4
        assert all(float(ratio) > 0.2 for ratio in ratios)


@pytest.mark.slow
def test_halving_trains_fewer_students_for_longer(tmp_path):
    arguments = SHORT["benchmarks/train_space.py"][0][5:]
    run_example(
        "benchmarks/train_space.py",
        tmp_path,
        *(str(PHANTOM_KD), "--first", "3", "--seeds", "0", "--halve", "2", "--epochs", "4"),
        *(*arguments, "--set", "train.scheduler=null"),
    )
    lines = (tmp_path / "truth/halving.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epochs", *"111", *"22", "4"]


def test_maps_of_ones_own_images_and_weights(tmp_path):
    import timm
    import torch
    from PIL import Image

    torch.save(timm.create_model("mobilenetv2_035", num_classes=2).state_dict(), tmp_path / "w.pth")
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    arguments = "--model mobilenetv2_035 --weights w.pth --classes cat dog --images red.png"
    layers = "--layers blocks.2 blocks.4 --out own.png"
    run_example("relevance_maps.py", tmp_path, *arguments.split(), *layers.split())
    assert (tmp_path / "own.png").read_bytes().startswith(b"\x89PNG")
