"""The core alone trains: without the extras, in a plain loop and under torchdistill's script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd_lrp_plugin.utils.extras import EXTRAS

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"

# Hides what the extras install. What the core's own dependencies need stays theirs: PyTorch imports
# jinja2, and Captum matplotlib.
SHARED = ("jinja2", "matplotlib")
SITECUSTOMIZE = f"""
import builtins, sys
from importlib.machinery import PathFinder
hidden = {sorted(sum(EXTRAS.values(), ()))!r}
original = builtins.__import__

class Hide:
    find_distributions = PathFinder.find_distributions
    invalidate_caches = PathFinder.invalidate_caches

    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        absent = top in hidden and top not in {SHARED!r}
        return None if absent else PathFinder.find_spec(name, path, target)

def hide(name, globals=None, locals=None, fromlist=(), level=0):
    ours = ((globals or {{}}).get("__name__") or "").startswith(("kd_lrp_plugin", "__main__"))
    if ours and not level and name.partition(".")[0] in hidden:
        raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
    return original(name, globals, locals, fromlist, level)

sys.meta_path[:] = [Hide if finder is PathFinder else finder for finder in sys.meta_path]
builtins.__import__ = hide
"""

# What torchdistill's image_classification.py does with a config, without its options for CUDA.
SCRIPT = """
import sys, torch
from torchdistill.common import yaml_util
from torchdistill.common.main_util import import_dependencies, load_ckpt
from torchdistill.core.distillation import get_distillation_box
from torchdistill.models.registry import get_model
config = yaml_util.load_yaml_file(sys.argv[sys.argv.index("--config") + 1])
import_dependencies(config["dependencies"])
models = config["models"]
teacher, student = (
    get_model(models[role]["key"], None, **models[role]["kwargs"])
    for role in ("teacher_model", "student_model")
)
load_ckpt(models["teacher_model"]["src_ckpt"], model=teacher)
before = [p.clone() for p in student.parameters()]
box = get_distillation_box(
    teacher, student, config["datasets"], config["train"], torch.device("cpu"), None, False, 1
)
box.pre_epoch_process(epoch=0)
for batch, targets, *rest in box.train_data_loader:
    loss = box.forward_process(batch, targets, {})
    box.post_forward_process(loss=loss)
box.post_epoch_process()
assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters()))
print("trained", float(loss))
"""


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """Runs a Python process in which the extras cannot be imported."""
    folder = tmp_path_factory.mktemp("core")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    path = os.pathsep.join([str(folder), str(ROOT)])

    def run(*words: object, cwd: Path = folder) -> subprocess.CompletedProcess:
        command = [sys.executable, *map(str, words)]
        env = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)

    return run


def test_the_extras_are_hidden(core):
    names = sorted(sum(EXTRAS.values(), ()))
    code = "\n".join(f"try:\n    import {n}\nexcept ImportError as e:\n    print(e)" for n in names)
    assert core("-c", code).stdout.splitlines() == [f"No module named {n!r}" for n in names]


@pytest.mark.slow
def test_the_plain_loop_runs(core):
    ran = core(EXAMPLES / "plain_loop.py", "--epochs", 1)
    assert ran.returncode == 0, ran.stderr
    assert "epoch 1  ce" in ran.stdout


@pytest.mark.slow
def test_torchdistills_script_runs_with_our_lines(core, tmp_path):
    import torch

    from kd_lrp_plugin.models.factory import build_model

    teacher = tmp_path / "out/runs/phantom/ce/resnet10t-script/0/best.pt"
    teacher.parent.mkdir(parents=True)
    torch.save({"model": build_model("resnet10t", 5).state_dict()}, teacher)
    (tmp_path / "script.py").write_text(SCRIPT)
    words = ["--script", tmp_path / "script.py", "--out", tmp_path / "out", "--short"]
    ran = core(EXAMPLES / "torchdistill_script.py", *words)
    assert ran.returncode == 0, ran.stderr
    assert "trained" in ran.stdout


def test_everything_that_yaml_names_is_there(core):
    code = """
import kd_lrp_plugin, kd_lrp_plugin.torchdistill as ours
for name in kd_lrp_plugin.__all__:
    getattr(kd_lrp_plugin, name)
images = ours.phantom(split="train", size=16, image_size=32)
print(ours.class_weights(dataset=images))
import kd_lrp_plugin.selection.select, kd_lrp_plugin.attribution, kd_lrp_plugin.metrics.efficiency
"""
    ran = core("-c", code)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("module", ["kd_lrp_plugin", "kd_lrp_plugin.cli"])
@pytest.mark.parametrize("words", [["--help"], ["distill", "my.yaml"]])
def test_a_command_says_in_one_line_what_to_install(core, module, words):
    ran = core("-m", module, *words)
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    assert line.endswith("pip install 'kd-lrp-plugin[cli]'")


FUNCTIONS = {
    "from kd_lrp_plugin.plots.figures import confusion_figure": "cli",
    "from kd_lrp_plugin.plots.maps import map_figure": "cli",
    "from kd_lrp_plugin.report import page": "cli",
    "from kd_lrp_plugin.training import trainer": "cli",
    "from kd_lrp_plugin.evaluation import evaluate": "cli",
    "from kd_lrp_plugin.studies import runner": "cli",
    "from kd_lrp_plugin.data.leakage import check": "cli",
    "from kd_lrp_plugin.metrics.classification import classification_metrics": "cli",
    "from kd_lrp_plugin.selection.search import search": "search",
    "from kd_lrp_plugin.utils.cluster import open_cluster": "cluster",
    "from kd_lrp_plugin.evaluation.export.onnx_graph import check_installed; check_installed()": (
        "export"
    ),
    "from kd_lrp_plugin.evaluation.export.onnx_graph import open_session; open_session(None)": (
        "export"
    ),
    "from kd_lrp_plugin.attribution.perturbation import lime; import torch; "
    "lime(torch.nn.Identity(), torch.rand(1, 3, 8, 8), torch.tensor([0]))": "cli",
}


def test_a_function_says_what_to_install(core):
    code = "".join(
        f"try:\n    {line}\n    print('no error')\nexcept ModuleNotFoundError as e:\n    print(e)\n"
        for line in FUNCTIONS
    )
    ran = core("-c", code)
    assert ran.returncode == 0, ran.stderr
    for line, extra in zip(ran.stdout.splitlines(), FUNCTIONS.values(), strict=True):
        assert line.endswith(f"pip install 'kd-lrp-plugin[{extra}]'"), ran.stdout


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_the_extras_are_those_of_pyproject():
    """By module here, by distribution there."""
    modules = {"scikit-learn": "sklearn", "scikit-image": "skimage", "mlflow-skinny": "mlflow"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        found = {line.partition(">")[0].partition("[")[0] for line in requirements}
        return {modules.get(name, name) for name in found}

    for extra, listed in EXTRAS.items():
        assert names(project["optional-dependencies"][extra]) == set(listed)
        assert not names(project["dependencies"]) & set(listed)
    assert project["optional-dependencies"]["all"] == ["kd-lrp-plugin[cli,search,export,cluster]"]
    assert "kd-lrp-plugin[all,mlflow]" in project["optional-dependencies"]["test"]
