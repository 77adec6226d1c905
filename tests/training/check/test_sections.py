"""What is wrong with a section by itself is named at its key, with the nearest name."""

import pytest
import torch
from small_runs import BASELINE, CPU, KD, NO_TEACHER, SMALL

from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.training.check.dry_run import check
from kd_lrp_plugin.utils.distributed import DistributedContext

TINY = [*SMALL, "image_size=32"]
TWO = DistributedContext(torch.device("cpu"), 0, 2)


def problems(config, *overrides: str, context: DistributedContext = CPU) -> list[str]:
    teacher = [] if config is BASELINE else NO_TEACHER
    return check(resolve_config(config, [*TINY, *teacher, *overrides]), context).problems


# The first word of each is the key at which it is named, the only problem that there is.
SCHEDULE = (
    "!import_call {key: kd_lrp_plugin.torchdistill.weight_schedule, "
    "init: {kwargs: {terms: {cee: {after: 1}}}}}"
)
IN_A_SECTION = {
    "+train.train_data_loader.kwargs.drop_lst=true": (
        "train.train_data_loader.kwargs: expected one of 17 names such as ['drop_last'], "
        "got 'drop_lst'. Did you mean 'drop_last'?"
    ),
    "train.train_data_loader.kwargs={batch_size: many}": (
        "train.train_data_loader.kwargs.batch_size: expected a number, got 'many'."
    ),
    "test.test_data_loader={dataset_id: phantom/test, sampler: null, kwargs: {}}": (
        "test.test_data_loader.sampler: expected a mapping, got None. For example {class_or_func:"
    ),
    "train.train_data_loader.kwargs={batch_size: 8, num_workers: -1}": (
        "train.train_data_loader.kwargs.num_workers: expected 0 to "
    ),
    "train.train_data_loader.sampler.class_or_func=RandomSampler": (
        "train.train_data_loader.sampler.class_or_func: expected a class or function, got 'Random"
    ),
    "train.train_data_loader.kwargs={batch_size: null}": (
        "train.train_data_loader.kwargs.batch_size: expected a number, got None. For example 32."
    ),
    "+train.train_data_loader.collate_fn=mixupp": (
        "train.train_data_loader.collate_fn: expected one of "
    ),
    "+train.train_data_loader.batch_sampler={key: BatchSample, kwargs: {}}": (
        "train.train_data_loader.batch_sampler.key: expected one of "
    ),
    "+train.pre_epoch_process=default_pre_epoch": ("train.pre_epoch_process: expected one of "),
    f"+train.pre_epoch_process={SCHEDULE}": (
        "train.pre_epoch_process: weight_schedule: term of the criterion: expected one of ['ce'], "
        "got 'cee'. Did you mean 'ce'?"
    ),
    "datasets.phantom/val=null": (
        "datasets.phantom/val: data set: expected images that can be counted, got None."
    ),
    "+train.compile={backnd: eager}": "train.compile: expected one of ['backend', ",
    "+train.compile=eager": "train.compile: expected True or options of torch.compile, got eager.",
    "+train.optimizer.max_grad_norm=big": (
        "train.optimizer.max_grad_norm: expected a number above 0, got 'big'."
    ),
    "train.optimizer.kwargs={lr: 3e-3}": (
        "train.optimizer.kwargs.lr: expected a number, got '3e-3'. "
        "YAML reads 1e-3 as text, 1.0e-3 as a number."
    ),
    "train.scheduler.kwargs={max_lr: 3e-3, total_steps: 1}": (
        "train.scheduler.kwargs.max_lr: expected a number, got '3e-3'."
    ),
    "+train.scheduler.scheduling_step=often": (
        "train.scheduler.scheduling_step: expected an integer, got 'often'."
    ),
    "train.criterion.kwargs.sub_terms.ce.weight=!join [1e, '-1']": (
        "train.criterion.kwargs.sub_terms.ce.weight: expected a number, got '1e-1'."
    ),
    "train.criterion.kwargs.sub_terms.ce=CE": (
        "train.criterion.kwargs.sub_terms.ce: term: expected a mapping, got 'CE'."
    ),
    "train.criterion=CE": "train.criterion: expected a loss, got CE. Give key and kwargs.",
    "train.model=yes": "train.model: role: expected what a stage does with a model, got True.",
    "train.optimizer=Adam": "train.optimizer: expected an optimizer, got Adam.",
    "train.train_data_loader.kwargs=null": (
        "train.train_data_loader.kwargs: expected a mapping, got None. Write {} for none."
    ),
    "models.model.kwargs=null": "models.model.kwargs: expected a mapping, got None.",
    "train={stage1: null}": "train.stage1: stage: expected a stage, got None.",
}


@pytest.mark.parametrize("override", IN_A_SECTION)
def test_a_wrong_section_is_told_at_its_key(override):
    (problem,) = problems(BASELINE, override)
    assert problem.partition("  ")[2].startswith(IN_A_SECTION[override])


def test_a_section_of_a_wrong_type_hides_no_other_problem():
    wrong = ["train.criterion=CE", "train.teacher=yes", "train.num_epochs=0"]
    found = problems(KD, *wrong, context=TWO)
    assert all(any(p.startswith(f"--set {override}  ") for p in found) for override in wrong)
    assert not any("dependencies" in p or "Error" in p for p in found)


def test_a_list_as_data_set_has_no_draws_for_a_collate_function():
    pairs = "datasets.phantom/train=[[0, 0], [1, 1]]"
    mix = "{key: kd_lrp_plugin.torchdistill.mixup, init: {kwargs: {num_classes: 4}}}"
    collate = f"+train.train_data_loader.collate_fn=!import_call {mix}"
    assert (
        "train.train_data_loader.collate_fn: expected a data set that"
        in problems(BASELINE, pairs, collate)[0]
    )
    assert "collate_fn" not in " ".join(problems(BASELINE, pairs))
    assert problems(BASELINE, collate) == []


def test_a_data_set_that_is_none_is_told_once():
    wrong = ["datasets.phantom/val=null", "test.test_data_loader.dataset_id=phantom/val"]
    assert len(problems(BASELINE, *wrong)) == 1


PATHS = {
    "+train.student.frozen_modules=[layer11, conv11]": (
        "frozen_modules: expected one of 70 names such as ['layer1', 'layer1.0', 'layer4'], "
        "got 'layer11'. Did you mean 'layer1' or 'layer1.0' or 'layer4'?"
    ),
    "+train.student.frozen_modules=layer1": "frozen_modules: expected a list of module paths",
    "+train.student.frozen_modules=['instance(BatchNorm3d)']": "Did you mean 'BatchNorm2d'?",
    "+train.student.forward_hook={output: [layer1, layer22]}": "forward_hook.output: expected one",
    "+train.student.forward_hook={outputs: [layer1]}": "Did you mean 'output' or 'input'?",
    "+train.student.forward_hook={output: ['.']}": "parts of the model, got '.'. Leave it out",
    "+train.student.sequential=[conv1, bnn1]": "sequential: expected one of 70 names",
    "+train.student.sequential=[conv1, '+adapter']": "adaptations: expected one of []",
    "+train.optimizer.module_wise_configs=[{module: fcc}]": "configs.0.module: expected one of 70",
    "+train.optimizer.module_wise_configs=[{module: fc, kwargs: {lrr: 1}}]": "mean 'lr'?",
    "+train.optimizer.module_wise_kwargs=[{module: fc}]": "module_wise_configs with these models",
}


def test_a_scheduler_is_tried_with_the_groups_of_the_optimizer():
    parts = "[{module: layer4, kwargs: {lr: 0.01}}, {module: fc, kwargs: {lr: 0.02}}]"
    optimizer = f"train.optimizer={{key: SGD, kwargs: {{lr: 0.1}}, module_wise_configs: {parts}}}"
    rates = "train.scheduler={key: OneCycleLR, kwargs: {max_lr: %s, total_steps: 1}}"
    assert problems(KD, optimizer, rates % [0.1, 0.2]) == []
    (problem,) = problems(KD, optimizer, rates % [0.1])
    assert "train.scheduler" in problem


class TestPaths:
    @pytest.mark.parametrize("override", PATHS)
    def test_one_that_leads_nowhere_is_told(self, override):
        (problem,) = problems(KD, override)
        assert PATHS[override] in problem

    @pytest.mark.parametrize(
        "override",
        [
            "+train.student.frozen_modules=[layer1, fc.weight, conv1.-1, 'instance(BatchNorm2d)']",
            "+train.student.forward_hook={input: [layer1], output: ['+layer2.0.conv1']}",
            "+train.optimizer.module_wise_configs=[{module: fc, kwargs: {lr: 0.1}}]",
        ],
    )
    def test_one_that_torchdistill_can_follow_is_not(self, override):
        assert problems(KD, override) == []
