"""Two gloo processes under torchrun do what one does, and say once what is wrong."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import preloaded
import pytest
import torch
import two_processes
from safetensors.torch import load_file
from small_runs import CPU, KD, LRP, NO_TEACHER, SMALL
from two_processes import torchrun

from kd_lrp_plugin.config.build import assemble
from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.runs import loading
from kd_lrp_plugin.training.experiment import Experiment

run_two = partial(preloaded.run, processes=2)

# Layer norms see one image at a time; batch norms would see the batch of their process.
NO_BATCH_NORM = [
    *SMALL,
    *NO_TEACHER,
    "models.student_model.kwargs.name=test_convnext",
    "train.optimizer={key: SGD, kwargs: {lr: 1.0}}",
]


def step(processes: int, out: Path, config: Path, *overrides: str) -> dict[str, Any]:
    words = (str(config), str(out), *NO_BATCH_NORM, *overrides)
    if processes == 1:
        two_processes.main(*words)
    else:
        done = run_two(two_processes.__file__, *words)
        assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference, relative to the largest entry."""
    largest = max(float(value.abs().max()) for value in a.values())
    return max(float((a[name] - b[name]).abs().max()) for name in a) / largest


@pytest.mark.parametrize("accumulated", [1, 2])
def test_two_processes_take_the_step_of_one_with_twice_the_batch(accumulated, tmp_path):
    loss = (
        "train.criterion={key: DisWOTPlusLoss, kwargs: "
        "{alpha: 0.5, beta: 0.5, gamma: 0, delta: 0, temperature: 2}}"
    )
    overrides = [loss, f"+train.optimizer.grad_accum_step={accumulated}"]
    one = step(1, tmp_path / "one.pt", KD, *overrides[:1])
    two = step(2, tmp_path / "two.pt", KD, *overrides)
    assert difference(one["change"], two["change"]) < 1e-5
    assert two["means"]["train_ce"] == pytest.approx(one["means"]["train_ce"], rel=1e-6)
    assert two["means"]["train_kl"] == pytest.approx(one["means"]["train_kl"], rel=1e-4)


def test_maps_are_compared_per_image_and_relations_within_a_process(tmp_path):
    layers = "{layers: [stages.1], method: grad_cam}"
    recorder = "!import_call {key: kd_lrp_plugin.torchdistill.recorder, init: {kwargs: %s}}"
    overrides = [
        f"train.student={{forward_proc: {recorder % layers}}}",
        f"train.teacher.forward_proc={recorder % layers.replace('stages.1', 'layer2')}",
        "train.criterion={key: DisWOTPlusLoss, kwargs: {alpha: 0.4, beta: 0.2, gamma: 0.2, "
        "delta: 0.2, semantic: {key: GradCAMCosineLoss}, relation: {key: RelationCosineLoss}}}",
    ]
    one = step(1, tmp_path / "one.pt", LRP, *overrides)
    two = step(2, tmp_path / "two.pt", LRP, *overrides)
    for term in ("ce", "kl", "relation"):
        halves = [seen[term] for seen in two["terms"]]
        assert two["means"][f"train_{term}"] == pytest.approx(sum(halves) / 2, rel=1e-6)
    assert two["means"]["train_ce"] == pytest.approx(one["means"]["train_ce"], rel=1e-5)
    # What 16 images have in common is more than what 8 and 8 have.
    assert two["means"]["train_relation"] != pytest.approx(one["means"]["train_relation"], rel=1e-3)
    first, second = two["shares"]
    assert not set(first) & set(second)
    assert len(first) + len(second) == 16


class TestDistill:
    """The command as it is given; torchrun itself, which is slow to start, starts it once."""

    def test_trains_tests_and_goes_on_after_a_kill(self, tmp_path):
        words = ["-m", "kd_lrp_plugin.cli", "distill", LRP, "--device", "cpu"]
        # The step of the first epoch is completed in the second.
        accumulated = "+train.optimizer.grad_accum_step=2"
        for override in [*SMALL, *NO_TEACHER, "train.num_epochs=2", accumulated]:
            words += ["--set", override]
        done = run_two(*words, "--out", "uninterrupted", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("test accuracy") == 1
        full = tmp_path / "uninterrupted"
        about = json.loads((full / "environment.json").read_text())
        assert about["processes"] == 2
        # Nine validation and eight test images, each counted once.
        lines = (full / "predictions.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in lines[1:]] == [f"test 0 {i}" for i in range(8)]
        # What was validated is what is kept, batch statistics included.
        lines = [json.loads(line) for line in (full / "metrics.jsonl").open()]
        best = torch.load(full / "best.pt", weights_only=True)["epoch"]
        assert self.cross_entropy(full) == pytest.approx(lines[best - 1]["val_ce"], rel=2e-6)
        # As killed in the second epoch: its traces gone, the first one's checkpoint the last.
        parts = tmp_path / "parts"
        self.first_epoch_only(words, parts)
        done = run_two(*words, "--out", "parts", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "resumes after epoch 1" in done.stdout
        of_full, of_parts = (load_file(f / "student.safetensors") for f in (full, parts))
        assert all(torch.equal(of_full[name], of_parts[name]) for name in of_full)

    def cross_entropy(self, run: Path) -> float:
        """Of the weights that are kept, on the validation images."""
        model, _ = loading.load_run(run)
        experiment = Experiment(assemble(resolve_config(run / "config.yaml")), CPU)
        images, targets = zip(*(item[:2] for item in experiment.val_loader.dataset), strict=True)
        with torch.no_grad():
            logits = model(torch.stack(images))
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(targets)))

    def first_epoch_only(self, words: list, out: Path) -> None:
        script = (
            "import sys\n"
            "from kd_lrp_plugin import cli\n"
            "from kd_lrp_plugin.training.trainer import Trainer\n"
            "train_epoch = Trainer._train_epoch\n"
            "def once(self):\n"
            "    if self.epoch == 1:\n"
            "        self.context.run_on_rank_zero(lambda: None)  # it has saved the first epoch\n"
            "        raise ValueError('as if killed')\n"
            "    return train_epoch(self)\n"
            "Trainer._train_epoch = once\n"
            "cli.app()\n"
        )
        file = out.with_suffix(".py")
        file.write_text(script)
        done = run_two(file, *words[2:], "--out", out.name, cwd=out.parent)
        assert "as if killed" in done.stderr
        assert (out / "last.pt").is_file()
        assert not (out / "summary.json").exists()

    @pytest.mark.slow
    def test_a_wrong_config_is_told_once(self, tmp_path):
        words = ["-m", "kd_lrp_plugin.cli", "distill", LRP, "--device", "cpu", "--out", "run"]
        done = torchrun(*words, "--set", "train.num_epochs=zero", cwd=tmp_path)
        assert done.returncode != 0
        assert done.stderr.count("expected an integer of 1 or more") == 1
        assert "Traceback (most recent call last):\n  File" not in done.stdout
        assert not (tmp_path / "run").exists()

    def test_losses_that_several_processes_cannot_train_with_are_told_once(self, tmp_path):
        words = ["-m", "kd_lrp_plugin.cli", "distill", LRP, "--device", "cpu", "--out", "run"]
        relation = "train.criterion.kwargs={alpha: 0, beta: 0, gamma: 0, delta: 1}"
        for override in [*SMALL, *NO_TEACHER, "image_size=32", relation]:
            words += ["--set", override]
        done = run_two(*words, cwd=tmp_path)
        assert done.returncode != 0
        assert done.stderr.count("expected a gradient for all that is trained") == 1
        assert "Expected to have finished reduction" not in done.stderr
        assert not (tmp_path / "run").exists()
