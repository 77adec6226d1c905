"""What a module of the user's own adds is known to every command that opens a run."""

import json
import shutil
from pathlib import Path

import preloaded
import pytest
from PIL import Image
from small_runs import BASELINE, SMALL

MODULE = """
from torch import nn
from torchdistill.models.registry import register_model

from kd_lrp_plugin.attribution.methods import ATTRIBUTIONS, Attribution
from kd_lrp_plugin.relevance.methods import METHODS, Method
from kd_lrp_plugin.relevance.rules import RULES


@RULES.register
def half(g, x, y, w, layer):
    return 0.5 * layer.transpose(g, w)


METHODS.register(Method(convolution=half, linear=half), "lrp_half")


def brightness(model, images, targets, layer):
    return images.mean(1)


ATTRIBUTIONS.register(Attribution(brightness, layered=False), "my_map")


@register_model
def tiny(classes):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, classes),
    )
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run whose module lies beside its config, and nowhere where Python looks by itself."""
    root = tmp_path_factory.mktemp("own")
    (root / "configs").mkdir()
    (root / "configs/my_additions.py").write_text(MODULE)
    text = f"_base_: {BASELINE}\ndependencies: [kd_lrp_plugin.torchdistill, my_additions]\n"
    (root / "configs/my.yaml").write_text(text)
    model = "models.model={key: tiny, kwargs: {classes: 4}}"
    sets = [word for change in (*SMALL, model) for word in ("--set", change)]
    done = kd_lrp(root, "distill", "configs/my.yaml", *sets, "--out", "run", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return root / "run"


def kd_lrp(folder: Path, *words: object):
    return preloaded.run("-m", "kd_lrp_plugin", *words, cwd=folder)


@pytest.mark.parametrize("method", ["my_map", "lrp_half"])
def test_a_method_of_ones_own_explains_a_run_from_anywhere(run, method, tmp_path):
    words = ("--method", method, "--layer", "0", "--n", "1", "--samples", "2")
    done = kd_lrp(tmp_path, "explain", run, *words)
    assert done.returncode == 0, done.stderr
    rows = json.loads((run / "explanations.json").read_text())["rows"]
    assert method in {row["method"] for row in rows}
    done = kd_lrp(tmp_path, "explain", run, "--method", "my_mop")
    assert done.returncode == 1
    assert "Did you mean 'my_map'" in done.stderr


def test_a_model_of_ones_own_is_opened_from_anywhere(run, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    for words in (["evaluate", run, "--resamples", 100], ["predict", run, "image.png"]):
        done = kd_lrp(tmp_path, *words)
        assert done.returncode == 0, done.stderr


def test_a_folder_from_elsewhere_cannot_bring_the_module_of_a_known_config(run, tmp_path):
    """The config is one that has run here; the module of the same name is somebody else's."""
    sent = Path(shutil.copytree(run, tmp_path / "sent"))
    shutil.copytree(run.parent / "configs", tmp_path / "configs")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n{MODULE}"
    for folder in (sent, tmp_path / "configs"):
        (folder / "my_additions.py").write_text(code)
    assert kd_lrp(run.parent, "evaluate", sent, "--resamples", 100).returncode == 0  # a moved run
    assert not (tmp_path / "ran").exists()
    about = json.loads((sent / "environment.json").read_text())
    about["sessions"][-1]["module_folder"] = str(tmp_path / "configs")
    (sent / "environment.json").write_text(json.dumps(about))
    done = kd_lrp(run.parent, "evaluate", sent, "--resamples", 100)
    assert done.returncode == 1
    assert "--trust" in done.stderr
    assert not (tmp_path / "ran").exists()
    assert kd_lrp(run.parent, "evaluate", sent, "--resamples", 100, "--trust").returncode == 0
    assert (tmp_path / "ran").exists()
