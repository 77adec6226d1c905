"""What the next epoch needs is in the checkpoint: teachers that have changed, weights of terms."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import CPU, KD, SMALL, same
from torchdistill.core.interfaces.registry import (
    register_post_forward_proc_func,
    register_pre_epoch_proc_func,
)
from torchdistill.losses.registry import register_mid_level_loss

from kd_lrp_plugin.config.build import assemble
from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.training.experiment import Experiment
from kd_lrp_plugin.training.state import restore_state, take_state
from kd_lrp_plugin.training.trainer import Trainer

TINY = [s for s in SMALL if s.split("=")[0] in ("image_size",) or s.startswith("datasets")] + [
    "image_size=32",
    "models.teacher_model={key: timm_model, kwargs: {name: test_resnet, num_classes: 4}}",
]
SUM = "criterion: {key: DisWOTPlusLoss, kwargs: {alpha: 0.5, beta: 0.5, gamma: 0, delta: 0}}"
LOADERS = """
    train_data_loader: {dataset_id: phantom/train, sampler:
      {class_or_func: !import_get {key: torch.utils.data.RandomSampler}, kwargs: {}},
      kwargs: {batch_size: 8, num_workers: 0}},
    val_data_loader: {dataset_id: phantom/val, sampler:
      {class_or_func: !import_get {key: torch.utils.data.SequentialSampler}, kwargs: {}},
      kwargs: {batch_size: 8, num_workers: 0}}, """
SGD = "optimizer: {key: SGD, kwargs: {lr: 0.05}}"
BATCH = "forward_proc: forward_batch_only"


def stages(*contents: str) -> str:
    """An override of ``train``: a stage of one epoch for each of the contents."""
    parts = [f"stage{i}: {{num_epochs: 1, {c}}}" for i, c in enumerate(contents, start=1)]
    return f"train={{{', '.join([parts[0].replace('1, ', '1, ' + LOADERS, 1), *parts[1:]])}}}"


def build(*overrides: str) -> Experiment:
    changes = [" ".join(change.split()) for change in (*TINY, *overrides)]
    torch.manual_seed(0)
    return Experiment(assemble(resolve_config(KD, changes)), CPU)


def train(experiment: Experiment, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    Trainer(experiment, RunFolder(folder), 0)._train_epoch()


def resumed(experiment: Experiment, *overrides: str) -> Experiment:
    """Another process's experiment, brought to where this one is."""
    torch.save(take_state(experiment), file := io.BytesIO())
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    other = build(*overrides)
    restore_state(other, state)
    return other


def teachers(experiment: Experiment) -> list[dict[str, Any]]:
    models = (experiment.original_teacher, experiment.teacher)
    return [dict(model.state_dict()) for model in models if model is not None]


@register_post_forward_proc_func
def step_and_follow(box, loss, metrics=None, **_):
    """A teacher that is the mean of its students."""
    loss.backward()
    box.optimizer.step()
    box.optimizer.zero_grad()
    pairs = zip(box.teacher_model.parameters(), box.student_model.parameters(), strict=True)
    for own, theirs in pairs:
        own.data.mul_(0.9).add_(theirs.data, alpha=0.1)


FROZEN = f"teacher: {{requires_grad: false, {BATCH}}}"
LEARNS = f"student: {{{BATCH}}}, {SGD}, {SUM}"
LAYERS = "conv1, bn1, act1, maxpool, layer1"
FEATURES = f"""
    teacher: {{requires_grad: false, {BATCH}, sequential: [{LAYERS}, +fit],
      adaptations: {{fit: {{key: Conv2d, kwargs: {{in_channels: 32, out_channels: 32,
      kernel_size: 1}}}}}}}},
    student: {{{BATCH}, sequential: [{LAYERS}]}}, {SGD},
    criterion: {{key: WeightedSumLoss, kwargs: {{sub_terms: {{hint: {{weight: 1.0,
      criterion: {{key: MSELoss, kwargs: {{}}}},
      criterion_wrapper: {{key: SimpleLossWrapper, kwargs: {{
        input: {{is_from_teacher: false, module_path: ., io: output}},
        target: {{is_from_teacher: true, module_path: ., io: output}}}}}}}}}}}}}}"""
CHANGED = {
    "trained in the stage before": stages(f"teacher: {{{BATCH}}}, {LEARNS}", f"{FROZEN}, {LEARNS}"),
    "with a part of its own in the second stage": stages(f"{FROZEN}, {LEARNS}", FEATURES),
    "that follows its student": stages(
        f"{FROZEN}, {LEARNS}, post_forward_process: step_and_follow", f"{FROZEN}, {LEARNS}"
    ),
}


@pytest.mark.parametrize("teacher", CHANGED)
def test_a_resumed_run_has_the_teacher_that_it_had(teacher, tmp_path):
    experiment = build(CHANGED[teacher])
    train(experiment, tmp_path)
    assert experiment.stage == 2
    other = resumed(experiment, CHANGED[teacher])
    assert same(teachers(other), teachers(experiment))


def test_a_teacher_that_stays_as_it_is_is_in_no_checkpoint(tmp_path):
    experiment = build(stages(f"{FROZEN}, {LEARNS}", f"{FROZEN}, {LEARNS}"))
    train(experiment, tmp_path)
    assert list(take_state(experiment)["models"]) == ["original"]


@register_mid_level_loss
class Noisy(torch.nn.Module):
    """A loss that drops what it compares, with a frozen part that never does."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.frozen = torch.nn.Dropout(0.5), torch.nn.Dropout(0.5).eval()

    def forward(self, student_io_dict, teacher_io_dict, targets):
        return self.frozen(self.drop(student_io_dict["."]["output"])).square().mean()


def test_a_loss_is_evaluated_in_evaluation_mode_and_trained_as_it_was():
    criterion = (
        "criterion: {key: WeightedSumLoss, kwargs: {sub_terms: {own: {weight: 1.0, "
        "criterion: {key: Noisy, kwargs: {}}}}}}"
    )
    experiment = build(stages(f"{FROZEN}, student: {{{BATCH}}}, {SGD}, {criterion}"))
    images, targets = torch.rand(8, 3, 32, 32), torch.zeros(8, dtype=torch.long)
    with experiment.evaluating():
        values = [float(experiment.loss(images, targets)) for _ in range(3)]
        expected = float(experiment.student(images).square().mean())
    assert values == pytest.approx([expected] * 3)
    loss = experiment.losses()["own"]
    assert [loss.training, loss.drop.training, loss.frozen.training] == [True, True, False]


@register_pre_epoch_proc_func
def halve_kl(box, epoch=None, **_):
    term, weight = box.criterion.term_dict["kl"]
    box.criterion.term_dict["kl"] = term, np.float64(weight / 2)
    box.student_model.train()


@register_pre_epoch_proc_func
def thaw(box, epoch=None, **_):
    if epoch == 1:
        box.student_model.requires_grad_(True)
        box.student_model.conv1.requires_grad_(False)
    box.student_model.train()


def test_a_resumed_run_trains_what_it_trained(tmp_path):
    parts = "module_wise_configs: [{module: layer4}, {module: fc}]}"
    train_section = stages(
        f"{FROZEN}, student: {{{BATCH}, frozen_modules: [layer4]}}, pre_epoch_process: thaw, "
        f"{SGD[:-1]}, {parts}, {SUM}"
    ).replace("num_epochs: 1", "num_epochs: 3")

    def trained(experiment: Experiment) -> set[str]:
        named = experiment.student.named_parameters()
        return {name.split(".")[0] for name, p in named if p.requires_grad}

    experiment = build(train_section)
    assert "layer4" not in trained(experiment)
    for _ in range(2):
        train(experiment, tmp_path)
    other = resumed(experiment, train_section)
    other.begin_epoch()
    assert (
        trained(other) == trained(experiment) == {"bn1", "fc", *(f"layer{i}" for i in range(1, 5))}
    )


SCHEDULE = (
    "!import_call {key: kd_lrp_plugin.torchdistill.weight_schedule, "
    "init: {kwargs: {terms: {kl: {until: 3}}}}}"
)


@pytest.mark.parametrize("process", ["halve_kl", SCHEDULE])
def test_a_resumed_run_weighs_its_terms_as_it_did(process, tmp_path):
    train_section = stages(f"{FROZEN}, {LEARNS}, pre_epoch_process: {process}").replace(
        "num_epochs: 1", "num_epochs: 3"
    )

    def weights(experiment: Experiment) -> dict[str, float]:
        return {name: weight for name, (_, weight) in experiment.box.criterion.term_dict.items()}

    experiment = build(train_section)
    for _ in range(2):
        train(experiment, tmp_path)
    other = resumed(experiment, train_section)
    assert weights(other) == weights(experiment)  # a test may come next
    experiment.begin_epoch()
    other.begin_epoch()
    assert weights(other) == weights(experiment)
    assert weights(other)["kl"] < 0.5 * 0.5
