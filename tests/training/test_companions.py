"""Companions in runs: training stays what it was, resumes bit for bit, and mistakes are named."""

import pytest
import torch
from small_runs import CONFIGS, CPU, NO_TEACHER, SMALL, Stopped, StopsAt, outcome, same

from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.training import trainer
from kd_lrp_plugin.training.check.dry_run import check
from kd_lrp_plugin.utils.progress import NullProgress

MARKED = CONFIGS / "phantom_marked"
KD = MARKED / "kd/test_resnet_from_resnet10t.yaml"
MAPS = MARKED / "lrp_relative_l2/test_resnet_from_resnet10t.yaml"
REASONS = MARKED / "right_reasons/test_resnet.yaml"
GROUPS = MARKED / "group_dro/test_resnet.yaml"
TWO_GROUPS = [*SMALL, "train.num_epochs=2", "agreement=0.5", "num_workers=2"]
WRAPPER = "dataset_wrapper={key: companions, kwargs: {%s: True}}"
OWN_RECORDER = (
    "train.student={forward_proc: !import_call {key: kd_lrp_plugin.torchdistill.recorder, "
    "init: {kwargs: {layers: [layer2, layer3], method: gradient_activation}}}}"
)
VIEW = "+train.teacher.forward_proc.init.kwargs.view=clean"
CLEAN = [f"+train.train_data_loader.{WRAPPER % 'clean'}", VIEW]


def distill(config, overrides, out, progress=None) -> dict:
    with progress or NullProgress():
        trainer.distill(RunSpec(config, overrides, out, 0, "cpu"))
    return outcome(out)


def problems(config, *overrides: str) -> list[str]:
    small = [*SMALL, "agreement=0.5"]
    if "from" in config.stem:
        small += NO_TEACHER
    return check(resolve_config(config, [*small, *overrides]), CPU).problems


@pytest.mark.parametrize("config", sorted(MARKED.rglob("[!_]*.yaml")), ids=lambda p: p.parent.name)
def test_every_config_of_marked_phantoms_has_no_problem(config):
    assert problems(config) == []


@pytest.mark.slow
def test_training_with_companions_is_bitwise_what_it_is_without(tmp_path):
    overrides = [*TWO_GROUPS, *NO_TEACHER]
    alone = distill(KD, overrides, tmp_path / "alone")
    all_three = f"{WRAPPER % 'clean: True, mask: True, group'}"
    added = [f"+train.train_data_loader.{all_three}", f"+train.val_data_loader.{all_three}"]
    beside = distill(KD, [*overrides, *added], tmp_path / "beside")
    assert same(beside["weights"], alone["weights"])
    assert same(beside["metrics"], alone["metrics"])


class TestCleanView:
    @pytest.mark.slow
    def test_it_is_an_override_of_the_config_with_maps(self, tmp_path):
        overrides = [*CLEAN, OWN_RECORDER]
        assert problems(MAPS, *overrides) == []
        overrides = [*TWO_GROUPS, *NO_TEACHER, *overrides]
        overrides += [f"+train.val_data_loader.{WRAPPER % 'clean'}"]
        run = distill(MAPS, overrides, tmp_path / "run")
        plain = distill(MAPS, [*TWO_GROUPS, *NO_TEACHER], tmp_path / "plain")
        assert not same(run["weights"], plain["weights"])
        assert {"train_semantic", "val_semantic"} <= set(run["metrics"][0])
        assert "test_accuracy" in run["summary"]
        assert "test_semantic" not in run["summary"]  # that loader has no wrapper

    def test_a_recorder_that_the_student_shares_is_refused(self):
        (problem,) = problems(MAPS, *CLEAN)
        assert "train.student.forward_proc: " in problem
        assert "expected a frozen teacher, got one that is trained" in problem

    def test_without_the_wrapper_it_is_refused(self):
        (problem,) = problems(MAPS, VIEW, OWN_RECORDER)
        assert "train.teacher.forward_proc: " in problem
        assert "{key: companions, kwargs: {clean: True}}" in problem


class TestRightReasons:
    def test_its_term_is_counted_in_training_validation_and_test(self, tmp_path):
        run = distill(REASONS, TWO_GROUPS, tmp_path / "run")
        for found, prefix in ((run["metrics"][0], "train"), (run["metrics"][0], "val")):
            assert 0 < found[f"{prefix}_semantic"] < 1
            assert f"{prefix}_semantic_zero_maps" in found
        assert 0 < run["summary"]["test_semantic"] < 1

    def test_it_is_a_term_of_a_weighted_sum_too(self):
        criterion = (
            "train.criterion={key: WeightedSumLoss, kwargs: {sub_terms: {reasons: {weight: 1.0, "
            "criterion: {key: RightReasonsLoss, kwargs: {}}}}}}"
        )
        assert problems(REASONS, criterion) == []

    def test_images_without_masks_are_refused(self):
        (problem,) = problems(
            REASONS, "train.train_data_loader.dataset_wrapper.kwargs={clean: True}"
        )
        assert "{key: companions, kwargs: {mask: True}}" in problem


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    """Two epochs by group DRO in one go."""
    found = distill(GROUPS, TWO_GROUPS, tmp_path_factory.mktemp("whole") / "run")
    log_weights = found["last"]["losses"]["ce"]["log_weights"]
    assert not torch.allclose(log_weights, log_weights.mean())
    return found


class TestGroupDRO:
    @pytest.mark.parametrize("moment", ["epoch 2", "epoch 2 val", "test"])
    def test_a_run_resumes_with_its_weights_bit_for_bit(self, moment, tmp_path, uninterrupted):
        with pytest.raises(Stopped):
            distill(GROUPS, TWO_GROUPS, tmp_path / "parts", StopsAt(moment))
        assert same(distill(GROUPS, TWO_GROUPS, tmp_path / "parts"), uninterrupted)

    def test_validation_without_the_wrapper_counts_the_accuracy_only(self, uninterrupted):
        (first, _) = uninterrupted["metrics"]
        assert "val_accuracy" in first
        assert not {"val_loss", "val_ce"} & set(first)

    def test_markers_that_all_agree_are_refused(self):
        (problem,) = problems(GROUPS, "agreement=1.0")
        assert "train.criterion.kwargs.sub_terms.ce.criterion" in problem
        assert "two groups or more, got ['agrees']" in problem

    @pytest.mark.parametrize("monitor", ["val_loss", "val_ce"])
    def test_its_value_which_its_weights_change_is_no_monitor(self, monitor):
        groups = f"+train.val_data_loader.{WRAPPER % 'group'}"
        images = "train.val_data_loader.dataset_id=phantom_marked/train"
        (problem,) = problems(GROUPS, groups, images, f"train.monitor={monitor}")
        assert "train.monitor: expected one" in problem

    def test_other_groups_in_validation_are_refused(self):
        (problem,) = problems(GROUPS, f"+train.val_data_loader.{WRAPPER % 'group'}")
        assert "train.val_data_loader: " in problem
        assert "got 'random'" in problem


@pytest.mark.parametrize(
    ("wrapper", "words"),
    [
        ("{key: companion, kwargs: {mask: True}}", "dataset_wrapper.key: expected one of"),
        ("companions", "dataset_wrapper: expected a mapping, got 'companions'"),
        ("{key: companions, kwargs: {masc: True}}", "Did you mean 'mask'"),
        ("{key: companions, kwargs: {}}", "expected clean, mask or group"),
    ],
)
def test_a_wrapper_that_is_none_is_a_problem(wrapper, words):
    (problem,) = problems(KD, f"+train.train_data_loader.dataset_wrapper={wrapper}")
    assert "train.train_data_loader" in problem
    assert words in problem
