"""A student without maps: methods that need no layer explain it, the others say why they do not."""

from pathlib import Path

import pytest
import torch
from small_runs import CONFIGS, write_digits

from kd_lrp_plugin.attribution import faithfulness, perturbation
from kd_lrp_plugin.attribution.methods import ATTRIBUTIONS, INPUT
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.evaluation.evaluate import evaluate
from kd_lrp_plugin.evaluation.explain import explain
from kd_lrp_plugin.evaluation.explain_inputs import ExplainOptions
from kd_lrp_plugin.metrics.counting import count_flops_keras
from kd_lrp_plugin.models.mnist import mnist_cnn, mnist_mlp
from kd_lrp_plugin.training import trainer
from kd_lrp_plugin.utils.progress import NullProgress

WITHOUT_LAYERS = {"lime", "rise"}
NO_MAPS = r"a model with maps \(n, c, h, w\), got DigitNetwork, which has none"


class Notes(NullProgress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """An MLP after one epoch with a convolutional teacher of random weights."""
    folder = tmp_path_factory.mktemp("digits")
    teacher, root = folder / "teacher.pt", write_digits(folder / "mnist")
    torch.save(mnist_cnn().state_dict(), teacher)
    small = ["batch_size=8", "num_workers=0", "train.num_epochs=1", f"root={root}"]
    overrides = [*small, f"models.teacher_model.src_ckpt={teacher}"]
    config = CONFIGS / "mnist/kd/mnist_mlp_from_mnist_cnn.yaml"
    trainer.distill(RunSpec(config, overrides, folder / "run", device="cpu"))
    return folder / "run"


@pytest.fixture(autouse=True)
def less_work(monkeypatch):
    monkeypatch.setattr(perturbation, "LIME_SAMPLES", 20)
    monkeypatch.setattr(perturbation, "RISE_MASKS", 20)
    monkeypatch.setattr(faithfulness, "STEPS", 2)


def test_it_is_explained_by_the_methods_that_need_no_layer_beside_its_teacher(run, tmp_path):
    with Notes() as progress:
        rows = explain([run], ExplainOptions(samples=2, n=1, out=tmp_path / "out"))
    of_student = {row["method"]: row["layer"] for row in rows if row["model"] == "student"}
    assert of_student == dict.fromkeys(WITHOUT_LAYERS, INPUT)
    of_teacher = {row["method"]: row["layer"] for row in rows if row["model"] == "teacher"}
    assert of_teacher.keys() == ATTRIBUTIONS.keys()
    assert {of_teacher[name] for name in ATTRIBUTIONS if ATTRIBUTIONS[name].layered} == {"relu2"}
    assert all("insertion" in row["metrics"] for row in rows)
    for method in WITHOUT_LAYERS:
        (row,) = [r for r in rows if (r["model"], r["method"]) == ("student", method)]
        assert "attribution_similarity" in row["metrics"]
    (note,) = [text for text in progress.texts if "student" in text and "grad_cam" in text]
    assert "which has none" in note
    assert (tmp_path / "out/maps.png").is_file()  # of the methods that both can be explained by
    assert (run / "explanations.png").is_file()


@pytest.mark.parametrize("method", ["grad_cam", "score_cam", "lrp_zplus"])
def test_a_method_that_is_asked_for_and_needs_a_layer_is_refused(run, method):
    with pytest.raises(ValueError, match=NO_MAPS):
        explain([run], ExplainOptions(methods=[method], roles=["student"]))


def test_a_layer_that_has_no_map_is_refused(run):
    with pytest.raises(ValueError, match=r"'linear1': expected an output \(n, c, h, w\)"):
        explain([run], ExplainOptions(["grad_cam"], ["linear1"], roles=["student"]))


@pytest.mark.slow
def test_its_evaluation_holds_both_counts_of_flops(run):
    cost = evaluate(run, 100)["student"]["cost"]
    assert cost["flops"] == 2 * (2 * 784 * 784 + 784 * 10)
    assert cost["flops_keras"] == count_flops_keras(mnist_mlp(), 28, 1)
    assert cost["flops_keras"] == cost["flops"] + 2 * 784 + 10
