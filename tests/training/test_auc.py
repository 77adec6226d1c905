"""The area under the ROC curve as what chooses the best epoch."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from small_runs import BASELINE, CONFIGS, CPU, SMALL
from torch import nn

from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.metrics.classification import classification_metrics, macro_auc
from kd_lrp_plugin.training import trainer
from kd_lrp_plugin.training.check.dry_run import check
from kd_lrp_plugin.training.meter import Meter

AUC = "+train.monitor=val_auc"
ONE_CLASS = (
    f"datasets.phantom/{{}}=!import_call {{{{key: {__name__}.NoTumour, "
    "init: {{kwargs: {{size: 8}}}}}}"
)


def area(scores: np.ndarray, positive: np.ndarray) -> float:
    """The share of pairs of a positive and a negative in the right order, a tie for half."""
    pairs = list(product(scores[positive], scores[~positive]))
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


def reference(probabilities: np.ndarray, labels: np.ndarray) -> float:
    there = [k for k in range(probabilities.shape[1]) if 0 < (labels == k).sum() < len(labels)]
    return float(np.mean([area(probabilities[:, k], labels == k) for k in there]))


class NoTumour(torch.utils.data.Dataset):
    """Images of one class."""

    def __init__(self, size: int) -> None:
        self.classes = ["glioma", "meningioma", "notumor", "pituitary"]
        self.targets = [2] * size

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        return torch.zeros(3, 48, 48), self.targets[index]


def find_problems(*overrides: str) -> str:
    return "\n".join(check(resolve_config(BASELINE, [*SMALL, *overrides]), CPU).problems)


@pytest.mark.parametrize("outputs", [2, 3, 5])
def test_macro_auc_agrees_with_counted_pairs(outputs):
    rng = np.random.default_rng(outputs)
    logits = rng.normal(size=(40, outputs)).round(1)  # with ties
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = rng.integers(min(outputs, 3), size=40)  # of five outputs, two have no image
    assert macro_auc(probabilities, labels) == pytest.approx(reference(probabilities, labels))
    names = [str(k) for k in range(outputs)]
    record = classification_metrics(probabilities, labels, names)
    assert record["macro_auc"] == macro_auc(probabilities, labels)


def test_macro_auc_of_one_class_is_not_defined():
    assert macro_auc(torch.tensor([[0.2, 0.8], [0.6, 0.4]]), torch.tensor([1, 1])) is None


class TestMeter:
    def count(self, batches, **options) -> Meter:
        meter = Meter(nn.Identity(), auc=True, **options)
        for logits, labels in batches:
            meter.count(logits, labels)
        return meter

    def test_measures_the_whole_pass_and_not_the_mean_of_its_batches(self):
        generator = torch.Generator().manual_seed(0)
        batches = [(torch.randn(n, 2, generator=generator), torch.arange(n) % 2) for n in (7, 6, 4)]
        found = self.count(batches).summary("val", CPU)["val_auc"]
        logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        whole = reference(logits.softmax(1).numpy(), labels.numpy())
        assert found == pytest.approx(whole)
        each = [reference(x.softmax(1).numpy(), y.numpy()) for x, y in batches]
        assert abs(np.mean(each) - whole) > 0.01

    def test_of_subclasses_is_that_of_their_classes(self):
        logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
        labels = torch.arange(9) % 4
        found = self.count([(logits, labels)], subclass_of=[0, 0, 1, 1]).summary("val", CPU)
        of_class = logits.softmax(1).reshape(9, 2, 2).sum(2).numpy()
        expected = reference(of_class, np.array([0, 0, 1, 1])[labels.numpy()])
        assert found["val_auc"] == pytest.approx(expected)

    def test_refuses_images_of_one_class(self):
        meter = self.count([(torch.randn(3, 2), torch.ones(3, dtype=torch.long))])
        with pytest.raises(ValueError, match="val_auc: expected images of two classes, got 3 imag"):
            meter.summary("val", CPU)


def test_the_epoch_of_the_highest_area_is_kept(tmp_path):
    overrides = [*SMALL, "train.num_epochs=5", "datasets.phantom/val.init.kwargs.size=20", AUC]
    summary = trainer.distill(RunSpec(BASELINE, overrides, tmp_path / "run", device="cpu"))
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    best = max(records, key=lambda record: (record["val_auc"], -record["val_loss"]))
    assert summary["best_epoch"] == best["epoch"]
    assert summary["val_auc"] == best["val_auc"]
    assert best["val_auc"] > min(record["val_auc"] for record in records)
    lines = (tmp_path / "run/predictions.csv").read_text().splitlines()
    header, *rows = [line.split(",") for line in lines]
    classes = [name.removeprefix("student: ") for name in header if name.startswith("student: ")]
    labels = np.array([classes.index(row[header.index("label")]) for row in rows])
    first = header.index(f"student: {classes[0]}")
    columns = np.array([row[first : first + 4] for row in rows], dtype=float)
    assert summary["test_auc"] == pytest.approx(reference(columns, labels), abs=1e-6)


def test_it_is_measured_only_where_it_is_monitored(tmp_path):
    summary = trainer.distill(RunSpec(BASELINE, SMALL, tmp_path / "run", device="cpu"))
    assert not [name for name in summary if "auc" in name]


class TestCheck:
    def test_takes_it_with_a_scheduler_that_sees_it(self):
        plateau = "train.scheduler={{key: ReduceLROnPlateau, kwargs: {{mode: {}}}}}"
        assert find_problems(AUC, plateau.format("max")) == ""
        assert "mode 'max' for val_auc" in find_problems(AUC, plateau.format("min"))

    def test_names_the_monitors_that_there_are(self):
        found = find_problems("+train.monitor=auc")
        known = ["last", "val_accuracy", "val_auc", "val_ce", "val_loss"]
        assert f"monitor: expected one of {known}, got 'auc'. Did you mean 'val_auc'?" in found

    def test_names_the_monitors_that_stages_can_have(self):
        stages = CONFIGS / "phantom/lrp_cosine/test_resnet_from_resnet10t-stages.yaml"
        small = [change for change in SMALL if change != "train.num_epochs=1"]
        changes = [*small, "models.teacher_model.src_ckpt=null"]
        assert check(resolve_config(stages, [*changes, AUC]), CPU).problems == []
        for monitor in ("auc", "val_loss"):
            config = resolve_config(stages, [*changes, f"+train.monitor={monitor}"])
            (problem,) = check(config, CPU).problems
            known = "['val_accuracy', 'val_subclass_accuracy', 'val_auc']"
            assert f"monitor: expected one of {known} with stages, got '{monitor}'." in problem

    @pytest.mark.parametrize("split", ["val", "test"])
    def test_refuses_images_of_one_class_before_training(self, split):
        changes = [ONE_CLASS.format(split), AUC]
        others = [change for change in SMALL if f"phantom/{split}." not in change]
        problems = check(resolve_config(BASELINE, [*others, *changes]), CPU).problems
        assert f"images of two classes, got 8 {split} images, all of one" in "\n".join(problems)
        assert check(resolve_config(BASELINE, [*others, *changes[:1]]), CPU).problems == []

    @pytest.mark.parametrize("name", ["auc", "accuracy", "loss", "subclass_accuracy"])
    def test_refuses_a_term_that_is_named_as_a_metric(self, name):
        kd = "{criterion: {key: CrossEntropyLoss, kwargs: {}}, weight: 1.0}"
        found = find_problems(f"train.criterion.kwargs.sub_terms={{{name}: {kd}}}")
        assert f"term: expected a name of its own, got '{name}'. Rename it" in found
