"""What torchdistill would pass over, or stop at in the midst of a run, is told before it."""

from typing import ClassVar

import pytest
import torch
from small_runs import BASELINE, CONFIGS, CPU, KD, LRP, NO_TEACHER, SMALL
from torch import nn
from torchdistill.core.interfaces.registry import register_pre_forward_proc_func
from torchdistill.losses.registry import register_mid_level_loss

from kd_lrp_plugin.config.build import assemble
from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.training.check.dry_run import check
from kd_lrp_plugin.training.experiment import Experiment
from kd_lrp_plugin.training.trainer import build_checked
from kd_lrp_plugin.utils.progress import NullProgress

TWO_STAGES = CONFIGS / "phantom/lrp_cosine/test_resnet_from_resnet10t-stages.yaml"
TINY = [*SMALL, "image_size=32"]
STUDENT = "{key: timm_model, kwargs: {name: test_resnet, num_classes: 4}}"
BATCH = "forward_proc: forward_batch_only"
ONE_CYCLE = "{key: OneCycleLR, kwargs: {max_lr: 0.01, total_steps: %d}, scheduling_step: %d}"
MIXED = "!import_call {key: kd_lrp_plugin.torchdistill.mixup, init: {kwargs: {num_classes: 4}}}"
FADING = (
    "+train.pre_epoch_process=!import_call {key: kd_lrp_plugin.torchdistill.weight_schedule, "
    "init: {kwargs: {terms: {semantic: {until: 0.5}}}}}"
)
SECOND = (
    f"train.stage2={{num_epochs: 1, %s teacher: {{{BATCH}, requires_grad: false}}, "
    f"student: {{{BATCH}}}, criterion: {{key: DisWOTPlusLoss, kwargs: {{alpha: 1, beta: 0, "
    "gamma: 0, delta: 0}}}"
)
TERM = "train.criterion={key: WeightedSumLoss, kwargs: {sub_terms: {own: %s}}}"


def report(config, *overrides: str):
    if config is TWO_STAGES:
        small = [s for s in TINY if "num_epochs" not in s]
        teacher = f"models.teacher_model={STUDENT}"
        return check(resolve_config(config, [*small, teacher, *overrides]), CPU)
    teacher = [] if config is BASELINE else NO_TEACHER
    return check(resolve_config(config, [*TINY, *teacher, *overrides]), CPU)


@register_mid_level_loss
class WithWeights(nn.Module):
    """A loss that would have to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(4, 4)

    def forward(self, student_io_dict, teacher_io_dict, targets):
        return self.scale(student_io_dict["."]["output"]).square().mean()


REFUSED = {
    "a model beside a teacher": (
        BASELINE,
        [f"+models.teacher_model={STUDENT}", f"+train.teacher={{{BATCH}, requires_grad: false}}"],
        "models: expected a student_model beside a teacher_model, got ['model', 'teacher_model']",
    ),
    "a student without a teacher": (
        KD,
        [f"models={{student_model: {STUDENT}}}"],
        "models: expected a model without a teacher_model, got ['student_model']",
    ),
    "a loss with weights that nothing trains": (
        BASELINE,
        [TERM % "{criterion: {key: WithWeights, kwargs: {}}, weight: 1.0}"],
        "train.criterion: expected losses without weights to train, got own.scale.weight",
    ),
    "a schedule that ends within the last epoch": (
        BASELINE,
        ["train.num_epochs=3", f"train.scheduler={ONE_CYCLE % (5, 1)}"],
        "train.scheduler: total_steps: expected 6 or more, the steps of all epochs, got 5",
    ),
    "images without the supplement": (
        BASELINE,
        ["+train.train_data_loader.requires_supp=false"],
        "train.train_data_loader.requires_supp: expected True, got False",
    ),
    "an optimizer of modules": (
        BASELINE,
        ["+train.optimizer.filters_params=false"],
        "train.optimizer.filters_params: expected True, got False",
    ),
    "mixed images in validation": (
        BASELINE,
        ["datasets.phantom/val.init.kwargs.size=8", f"+train.val_data_loader.collate_fn={MIXED}"],
        "train.val_data_loader.collate_fn: expected none that mixes images",
    ),
    "a sampler that is not of a data set": (
        BASELINE,
        ["train.train_data_loader.sampler={class_or_func: !import_get {key: torch.utils.data."
         "WeightedRandomSampler}, kwargs: {num_samples: 16}}"],
        "train.train_data_loader.sampler.class_or_func: expected one whose first argument is the "
        "data set, got WeightedRandomSampler of weights",
    ),
    "a total whose weights change": (
        LRP,
        ["+train.monitor=val_loss", FADING],
        "train.monitor: expected one measure of all epochs, got val_loss",
    ),
    "a stage that would train the layers of the one before": (
        TWO_STAGES,
        [SECOND % ""],
        "train.stage2.optimizer: expected one that has all that is trained, got that of an earlier "
        "stage without",
    ),
    "a schedule that ends in a later stage": (
        TWO_STAGES,
        ["+train.stage1.scheduler={key: OneCycleLR, kwargs: {max_lr: 0.01, total_steps: 2}}",
         "train.stage1.student.frozen_modules=[]",
         SECOND % ""],
        "train.stage2.scheduler: total_steps: expected 3 or more, the steps of all epochs, got 2",
    ),
    "epochs that are judged by different images": (
        TWO_STAGES,
        [SECOND % ("val_data_loader: {dataset_id: phantom/test, kwargs: {batch_size: 8}, sampler: "
         "{class_or_func: !import_get {key: torch.utils.data.SequentialSampler}}}, "
         "optimizer: {key: SGD, kwargs: {lr: 0.1}},")],
        "train.stage2.val_data_loader.dataset_id: expected the validation set of all stages, "
        "'phantom/val', got 'phantom/test'",
    ),
    "a stage whose images are empty": (
        TWO_STAGES,
        [SECOND % "train_data_loader: null, optimizer: {key: SGD, kwargs: {lr: 0.1}},"],
        "train.stage2.train_data_loader: loader: expected a loader, got None",
    ),
    "a stage whose validation is empty": (
        TWO_STAGES,
        [SECOND % "val_data_loader: null, optimizer: {key: SGD, kwargs: {lr: 0.1}},"],
        "train.stage2.val_data_loader: loader: expected a loader, got None",
    ),
    "a model of which nothing is trained": (
        BASELINE,
        [f"train.model={{{BATCH}, requires_grad: false}}"],
        "train.model: expected something to train, got a frozen model",
    ),
    "a stage whose optimizer is empty": (
        TWO_STAGES,
        ["train.stage2.optimizer=null", "train.stage2.scheduler=null"],
        "train.stage2.optimizer: expected an optimizer, got None",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_by_name(what):
    config, overrides, words = REFUSED[what]
    (problem,) = report(config, *overrides).problems
    assert words in problem


class Turned(Phantom):
    """Its classes are in another order."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.classes = self.classes[::-1]


def test_other_classes_in_a_later_stage_are_refused():
    loader = (
        "{dataset_id: turned, sampler: {class_or_func: !import_get "
        "{key: torch.utils.data.SequentialSampler}, kwargs: {}}, kwargs: {batch_size: 8}}"
    )
    overrides = [*SMALL[:3], *SMALL[4:], "image_size=32", f"train.stage2.val_data_loader={loader}"]
    assembly = assemble(resolve_config(TWO_STAGES, [*overrides, *NO_TEACHER]))
    assembly.content["datasets"]["turned"] = Turned(split="val", size=8, image_size=32)
    with pytest.raises(ValueError, match=r"sets with the same classes, got .*'stage2 val'"):
        Experiment(assembly, CPU)


def test_a_schedule_that_takes_all_steps_is_none():
    changes = ["train.num_epochs=3", "+train.optimizer.grad_accum_step=2"]
    assert report(BASELINE, *changes, f"train.scheduler={ONE_CYCLE % (3, 1)}").problems == []
    (problem,) = report(BASELINE, *changes, f"train.scheduler={ONE_CYCLE % (2, 1)}").problems
    assert "expected 3 or more" in problem


TOLD = {
    "a teacher that is trained along": (
        KD, f"train.teacher={{{BATCH}}}", "train.teacher.requires_grad: trained with the student",
    ),
    "a teacher that is not there": (
        BASELINE, f"+train.teacher={{{BATCH}}}", "train.teacher: nothing reads it",
    ),
    "parts that the optimizer does not have": (
        KD,
        "+train.optimizer.module_wise_configs=[{module: fc}, {module: layer4}]",
        "train.optimizer: not all that could be trained",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TOLD)
def test_what_may_be_meant_is_told(what):
    config, override, words = TOLD[what]
    found = report(config, override)
    assert found.problems == []
    assert any(words in warning for warning in found.warnings)


def test_spikes_are_told_of_what_is_trained_alone():
    method = "train.{}.forward_proc.init.kwargs.method={}".format
    steady = method("student", "lrp_composite")
    taught = report(LRP, method("teacher", "lrp_epsilon"), steady)
    trained = report(LRP, method("teacher", "lrp_epsilon"))  # the student has its entry
    assert taught.problems == trained.problems == taught.warnings == []
    assert ["has spikes" in warning for warning in trained.warnings] == [True]
    assert "train.student.forward_proc" in trained.warnings[0]


def test_a_run_tells_it_as_well(tmp_path):
    class Notes(NullProgress):
        texts: ClassVar[list[str]] = []

        def note(self, text: str) -> None:
            self.texts.append(text)

    overrides = [*TINY, *NO_TEACHER, f"train.teacher={{{BATCH}}}"]
    with Notes() as progress:
        build_checked(RunSpec(KD, overrides, tmp_path), resolve_config(KD, overrides), CPU)
    assert "train.teacher.requires_grad: trained with the student" in progress.texts[0]


SEEN: list[torch.Size] = []


@register_pre_forward_proc_func
def look_at_images(box, *args, sample_batch, targets, supp_dict, **kwargs):
    SEEN.append(sample_batch.shape)


def test_a_process_before_the_forward_pass_is_called():
    SEEN.clear()
    assert report(BASELINE, "+train.pre_forward_process=look_at_images").problems == []
    assert torch.Size([8, 3, 32, 32]) in SEEN
