"""A scalar of a wrong type, or a number that is none, is a problem at its key."""

import random

import pytest
from small_runs import BASELINE, CPU, KD, NO_TEACHER, SMALL

from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.training.check.dry_run import check

TINY = [*SMALL, "image_size=32"]
LOADER = "train.train_data_loader.kwargs"
STOPPING = "+train.early_stopping={patience: %s, min_delta: %s}"
# Keys that take a number, and the values of each that it cannot have.
NO_NUMBER = ["true", "false", ".inf", "-.inf", ".nan", "yes", "'3'", "many", "1e-3x"]
NUMBERS = {
    "train.num_epochs": "train.num_epochs=%s",
    "train.optimizer.kwargs.lr": "train.optimizer.kwargs.lr=%s",
    "train.optimizer.grad_accum_step": "+train.optimizer.grad_accum_step=%s",
    "train.optimizer.max_grad_norm": "+train.optimizer.max_grad_norm=%s",
    "train.optimizer.kwargs.weight_decay": "+train.optimizer.kwargs.weight_decay=%s",
    "train.early_stopping": STOPPING % ("%s", 0.1),
    "train.early_stopping ": STOPPING % (2, "%s"),
    "train.scheduler": "train.scheduler={key: StepLR, kwargs: {step_size: %s}}",
    "train.scheduler ": "train.scheduler={key: StepLR, kwargs: {step_size: 1, gamma: %s}}",
    f"{LOADER}": f"{LOADER}={{batch_size: %s}}",
    f"{LOADER} ": f"{LOADER}={{batch_size: 8, num_workers: %s}}",
    "models.model": "models.model.kwargs.num_classes=%s",
}


@pytest.mark.parametrize("key", NUMBERS)
def test_what_is_no_number_is_refused_where_one_belongs(key):
    rng = random.Random(key)
    for value in [*rng.sample(NO_NUMBER, 2), "true", ".nan"]:
        override = NUMBERS[key] % value
        problems = check(resolve_config(BASELINE, [*TINY, override]), CPU).problems
        assert problems, (key, value)
        assert any(key.strip() in problem for problem in problems), problems
        assert not any("Error:" in problem for problem in problems), problems


@pytest.mark.parametrize(
    "override",
    [
        f"{LOADER}={{batch_size: 8, num_workers: 500}}",
        f"{LOADER}={{batch_size: 8, num_workers: -1}}",
        f"{LOADER}={{batch_size: 8, shuffle: 3}}",
        "train.optimizer={key: SGD, kwargs: {lr: 0.1, momentum: 0.9, nesterov: 1}}",
        "train.optimizer={key: SGD, kwargs: {lr: 0.1, nesterov: 'yes'}}",
    ],
)
def test_a_value_beyond_reason_is_refused(override):
    problems = check(resolve_config(BASELINE, [*TINY, override]), CPU).problems
    assert any(override.partition("=")[0] in problem for problem in problems), problems


@pytest.mark.parametrize("value", [".inf", ".nan", "true", "'1'"])
def test_the_weight_of_a_term_is_a_number(value):
    override = f"train.criterion.kwargs.sub_terms.kd.weight={value}"
    problems = check(resolve_config(KD, [*TINY, *NO_TEACHER, override]), CPU).problems
    assert any("sub_terms.kd" in problem for problem in problems)


def test_an_added_key_that_nothing_reads_is_said():
    (problem,) = check(resolve_config(BASELINE, [*TINY, "+num_epochs=1"]), CPU).problems
    assert "Did you mean 'train.num_epochs'?" in problem
    report = check(resolve_config(BASELINE, [*TINY, "+colour=blue"]), CPU)
    assert report.problems == []
    assert report.warnings == ["--set +colour=blue  colour: nothing reads it"]
