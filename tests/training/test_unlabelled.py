"""Unlabelled images: what they count in, what they do not, and where they are refused."""

from types import SimpleNamespace

import pytest
import torch
from recorded_batch import LAYERS, batch, io, models
from small_runs import CONFIGS, CPU, NO_TEACHER, SMALL, Stopped, StopsAt, outcome, same
from torch import nn
from torch.utils.data import Subset

from kd_lrp_plugin import torchdistill as plugin
from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.data.unlabelled import WithUnlabelled
from kd_lrp_plugin.losses import kl_divergence
from kd_lrp_plugin.training import trainer
from kd_lrp_plugin.training.check.dry_run import check
from kd_lrp_plugin.training.meter import Meter
from kd_lrp_plugin.utils.progress import NullProgress

CONFIG = CONFIGS / "phantom_marked/lrp_relative_l2/test_resnet_from_resnet10t_unlabelled.yaml"
FEW = [
    *SMALL,
    *NO_TEACHER,
    "datasets.unlabelled.init.kwargs.size=16",
    "train.train_data_loader.sampler.kwargs.num_samples=16",
]


def phantom(size: int = 4, **kwargs) -> Phantom:
    return Phantom("train", size=size, image_size=48, **kwargs)


class TestDataSet:
    def test_unlabelled_images_come_after_the_others(self):
        first, second = phantom(), phantom(size=3, seed=1)
        data = WithUnlabelled(first, second)
        assert len(data) == 7
        assert [data[i][1] for i in range(7)] == data.targets
        assert data.targets == [*first.targets, -100, -100, -100]
        assert torch.equal(data[1][0], first[1][0])
        assert torch.equal(data[5][0], second[1][0])
        assert data.classes == list(first.classes)

    def test_class_weights_are_those_of_the_labelled(self):
        first = phantom(5)
        weights = plugin.class_weights(WithUnlabelled(first, phantom(9)))
        assert weights == plugin.class_weights(first)

    def test_making_it_draws_no_random_numbers(self):
        before = torch.get_rng_state()
        WithUnlabelled(phantom(augment=True), phantom(augment=True))
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize(
        ("images", "unlabelled", "match"),
        [
            (Subset(phantom(), [0]), phantom(), "data with targets, got Subset"),
            (phantom(), "phantom/train", "unlabelled: expected a data set, got 'phantom/train'"),
            (phantom(), Subset(phantom(), []), "an image or more"),
            (phantom(), Phantom("train", size=2, image_size=64), r"\(3, 64, 64\)"),
            (phantom(), phantom(channels=1), "Give both the same image_size and channels"),
        ],
        ids=["a part", "a name", "none", "other size", "other channels"],
    )
    def test_others_are_refused(self, images, unlabelled, match):
        with pytest.raises(ValueError, match=match):
            WithUnlabelled(images, unlabelled)


class TestLosses:
    def outputs(self):
        teacher, student = models()
        images, targets = batch()
        procedure = plugin.recorder(LAYERS)
        pair = {
            "student": io(student, procedure, images),
            "teacher": io(teacher, procedure, images),
        }
        targets = targets.clone()
        targets[::2] = -100
        return pair, targets

    @pytest.mark.parametrize("target", ["label", "contrast"])
    def test_maps_take_the_teachers_prediction_for_a_label(self, target):
        pair, targets = self.outputs()
        predicted = pair["teacher"]["."]["output"].argmax(1)
        filled = [p if t == -100 else t for t, p in zip(targets.tolist(), predicted, strict=True)]
        loss = plugin.RecordedLoss("LRPRelativeL2Loss", target=target, signed=True)
        expected = loss(pair["student"], pair["teacher"], torch.tensor(filled))
        torch.testing.assert_close(loss(pair["student"], pair["teacher"], targets), expected)

    def test_cross_entropy_is_of_the_labelled_and_kl_of_all(self):
        pair, targets = self.outputs()
        loss = plugin.DisWOTPlusLoss(
            0.5, 0.5, 0, 0, class_weights=[1.0, 2.0, 3.0, 4.0], label_smoothing=0.1
        )
        loss(pair, {}, targets)
        student = pair["student"]["."]["output"]
        known = targets >= 0
        assert 0 < int(known.sum()) < len(targets)
        expected = nn.functional.cross_entropy(
            student[known], targets[known], torch.tensor([1.0, 2, 3, 4]), label_smoothing=0.1
        )
        torch.testing.assert_close(loss.terms["ce"], expected.detach())
        divergence = kl_divergence(student, pair["teacher"]["."]["output"])
        torch.testing.assert_close(loss.terms["kl"], divergence.detach())

    def test_a_batch_without_labels_has_no_cross_entropy(self):
        pair, targets = self.outputs()
        loss = plugin.DisWOTPlusLoss(0.5, 0.5, 0, 0)
        value = loss(pair, {}, torch.full_like(targets, -100))
        assert loss.terms["ce"] == 0
        torch.testing.assert_close(value.detach(), 0.5 * loss.terms["kl"])

    def test_another_label_out_of_range_is_still_refused(self):
        pair, targets = self.outputs()
        for wrong in (-1, 4):
            targets[1] = wrong
            with pytest.raises(ValueError, match=r"labels in \[0, 4\)"):
                plugin.DisWOTPlusLoss(1, 0, 0, 0)(pair, {}, targets)

    def test_accuracy_is_of_the_labelled_in_training_and_refused_in_evaluation(self):
        logits, targets = torch.eye(4), torch.tensor([0, -100, 1, -100])
        meter = Meter(nn.Identity())
        meter.count(logits, targets)
        alone = SimpleNamespace(gather=lambda value: [value])
        assert meter.summary("train", alone) == {"train_accuracy": 0.5}
        with torch.no_grad(), pytest.raises(ValueError, match=r"labels in \[0, 4\)"):
            meter.count(logits, targets)


class TestRuns:
    @pytest.mark.slow
    def test_a_killed_run_ends_as_if_it_had_not_been(self, tmp_path):
        overrides = [*FEW, "train.num_epochs=2"]
        with NullProgress():
            trainer.distill(RunSpec(CONFIG, overrides, tmp_path / "whole", 0, "cpu"))
        with pytest.raises(Stopped), StopsAt("epoch 2"):
            trainer.distill(RunSpec(CONFIG, overrides, tmp_path / "killed", 0, "cpu"))
        with NullProgress():
            trainer.distill(RunSpec(CONFIG, overrides, tmp_path / "killed", 0, "cpu"))
        whole, killed = outcome(tmp_path / "whole"), outcome(tmp_path / "killed")
        assert same(whole["weights"], killed["weights"])
        assert same(whole["metrics"], killed["metrics"])

    @pytest.mark.parametrize("part", ["val", "test"])
    def test_evaluation_must_have_labels(self, part):
        override = f"{'train.val' if part == 'val' else 'test.test'}_data_loader.dataset_id"
        overrides = [*FEW, f"{override}=with_unlabelled/train"]
        problems = check(resolve_config(CONFIG, overrides), CPU).problems
        assert f"datasets: {part}: expected labelled images" in problems[0]
