"""Every example runs as a script of its own: offline, in under a minute, and leaves what it says."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

# Arguments of each example's short mode, and the files that it leaves in its folder.
SHORT: dict[str, tuple[list[str], list[str]]] = {
    "benchmark_step.py": (["--short", "--out", "step.csv"], ["step.csv"]),
    "demo.py": (["--short", "--out", "demo"], ["demo/table.md", "demo/maps.png"]),
    "plain_loop.py": (["--epochs", "2"], []),
    "relevance_maps.py": (["--steps", "2", "--out", "maps.png"], ["maps.png"]),
    "torchdistill_script.py": ([], []),
}

# A script without a network: whatever connects, fails. In the end it tells what it has imported.
OFFLINE = """
import runpy, socket, sys
def refuse(*_):
    raise OSError("examples are offline")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("torchdistill" in sys.modules)
"""


def run_example(name: str, folder: Path, *arguments: str) -> str:
    """What the example prints, and "True" or "False" in a last line: torchdistill is imported."""
    env = {key: value for key, value in os.environ.items() if key != "KD_LRP_DATA"}
    ran = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(EXAMPLES / name), *arguments],
        cwd=folder,
        env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def processor_seconds() -> float:
    """Of finished child processes: unlike the clock, it does not depend on who else is busy."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_runs_offline_in_under_a_minute_and_leaves_its_files(name, tmp_path):
    assert name in SHORT, f"give {name} a short mode in SHORT"
    arguments, files = SHORT[name]
    before = processor_seconds()
    printed = run_example(name, tmp_path, *arguments)
    assert processor_seconds() - before < 60
    for file in files:
        assert (tmp_path / file).stat().st_size > 100
        assert file in printed


def test_plain_loop_needs_no_torchdistill_and_its_terms_fall(tmp_path):
    *epochs, torchdistill = run_example("plain_loop.py", tmp_path, "--epochs", "4").splitlines()
    assert torchdistill == "False"
    first, *_, last = ([float(word) for word in line.split()[3::2]] for line in epochs)
    assert len(first) == 4
    assert all(after < before for before, after in zip(first, last, strict=True))


def test_the_benchmarks_table_has_every_case_and_the_plain_step_as_unit(tmp_path):
    table = run_example("benchmark_step.py", tmp_path, "--short").splitlines()[2:-1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert rows[0] == ["plain KD", "1.00", "1.00", "1.00", "1.00"]
    assert len(rows) >= 11
    for _, *ratios in rows[1:]:
        assert len(ratios) == 4
        assert all(float(ratio) > 0.2 for ratio in ratios)


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
