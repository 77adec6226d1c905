"""The MHIST configs on its synthetic look-alike, which alone is called so: all check and train."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from small_runs import CONFIGS, CPU, Stopped, StopsAt, outcome, same
from torch import nn

from kd_lrp_plugin.config.build import assemble
from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.config.safety import unsafe_tags
from kd_lrp_plugin.metrics.efficiency import count_macs, count_parameters
from kd_lrp_plugin.models.factory import build_model
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.runs.loading import load_run
from kd_lrp_plugin.training import trainer
from kd_lrp_plugin.training.check.dry_run import check
from kd_lrp_plugin.training.experiment import Experiment
from kd_lrp_plugin.utils.progress import NullProgress

MHIST = sorted((CONFIGS / "mhist").rglob("[!_]*.yaml"))
TAUGHT = [file for file in MHIST if "_from_" in file.stem]
ALONE = CONFIGS / "mhist/ce/mobilenetv2_100.yaml"
SMALL = ["image_size=32", "batch_size=8", "num_workers=0"]
SHORT = [*SMALL, "train.stage1.num_epochs=2", "train.stage2.num_epochs=2"]
NARROW = "models.{}.kwargs.name=mobilenetv2_035"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    script = CONFIGS.parent / "examples" / "make_mhist_lookalike.py"
    spec = importlib.util.spec_from_file_location("make_mhist_lookalike", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("data") / "mhist"
    module.make_lookalike(folder, 0.015, 32)
    return folder


def untrained(file: Path) -> list[str]:
    """No file of weights, and no checkpoint of the teacher's."""
    roles = ("teacher_model.src_ckpt", "student_model.kwargs.weights")
    return [
        f"models.{key}=null" for key in (roles if file in TAUGHT else ("model.kwargs.weights",))
    ]


@pytest.mark.parametrize("file", MHIST, ids=lambda file: f"{file.parent.name}/{file.stem}")
class TestEveryConfig:
    def test_is_that_of_its_name_and_of_the_protocol(self, file):
        values = resolve_config(file).values
        student, _, teacher = file.stem.partition("_from_")
        models = values["models"]
        trained = models.get("model", models.get("student_model"))["kwargs"]
        assert trained["name"] == student
        assert trained["weights"] == f"$KD_LRP_DATA/weights/{student}_imagenet.safetensors"
        assert models.get("teacher_model", {"kwargs": {"name": ""}})["kwargs"]["name"] == teacher
        outputs = 4 if file.parent.name == "skd" else 2
        assert {entry["kwargs"]["num_classes"] for entry in models.values()} == {outputs}
        stages = [values["train"][name] for name in ("stage1", "stage2")]
        rate = 1e-4 if not teacher and student == "resnetv2_50" else 1e-3
        assert [stage["num_epochs"] for stage in stages] == [10, 25]
        assert [stage["optimizer"]["key"] for stage in stages] == ["Adam", "Adam"]
        rates = [stage["optimizer"]["kwargs"]["lr"] for stage in stages]
        assert rates == pytest.approx([rate, rate / 10])
        assert values["train"]["monitor"] == "val_auc"

    def test_freezes_all_but_the_classifier_and_then_nothing(self, file):
        values = resolve_config(file).values
        role = "student" if file in TAUGHT else "model"
        first, second = (values["train"][name][role] for name in ("stage1", "stage2"))
        model = build_model(file.stem.partition("_from_")[0], 2)
        frozen = tuple(first["frozen_modules"])
        left = {name for name, _ in model.named_parameters() if not name.startswith(frozen)}
        assert left == {
            f"{model.pretrained_cfg['classifier']}.{name}" for name in ("weight", "bias")
        }
        assert second["frozen_modules"] == []

    def test_runs_no_code_of_its_own_and_passes_the_check(self, file, root, monkeypatch):
        monkeypatch.setenv("KD_LRP_DATA", str(root.parent))  # its root is empty
        config = resolve_config(file, [*SMALL, *untrained(file)])
        assert not unsafe_tags(config)
        assert check(config, CPU).problems == []

    def test_does_not_call_the_real_images_synthetic(self, file):
        text = file.read_text().lower()
        assert "synthetic" not in text
        assert "lookalike" not in text


@pytest.mark.parametrize("file", TAUGHT, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_each_names_the_config_of_its_teacher(file):
    entry = resolve_config(file).values["models"]["teacher_model"]
    made_by = Path(entry["_made_by"].removeprefix("kd-lrp distill torchdistill_configs/"))
    assert (CONFIGS / made_by).is_file()
    assert entry["src_ckpt"] == f"runs/{made_by.with_suffix('')}/0/best.pt"
    assert (
        resolve_config(CONFIGS / made_by).values["models"].popitem()[1]["kwargs"]["name"]
        == (entry["kwargs"]["name"])
    )


def test_weights_that_are_not_there_are_named_before_training(root, monkeypatch):
    monkeypatch.setenv("KD_LRP_DATA", str(root.parent))
    problems = check(resolve_config(ALONE, SMALL), CPU).problems
    assert any(
        "a weights file" in p and "weights/mobilenetv2_100_imagenet.safetensors" in p
        for p in problems
    )


class TestTwoStages:
    """With the teacher's KD, at a third of the width, so that a run takes seconds."""

    FILE = CONFIGS / "mhist/kd/mobilenetv2_100_from_resnetv2_50.yaml"

    def overrides(self, root: Path) -> list[str]:
        teacher = "models.teacher_model.kwargs.name=test_resnet"
        narrow = NARROW.format("student_model")
        return [*SHORT, f"root={root}", *untrained(self.FILE), teacher, narrow]

    def test_the_frozen_backbone_stays_bitwise_with_its_statistics(self, root, tmp_path):
        experiment = Experiment(assemble(resolve_config(self.FILE, self.overrides(root))), CPU)
        folder = RunFolder(tmp_path / "run")
        folder.path.mkdir()
        run = trainer.Trainer(experiment, folder, 0)
        state = experiment.student.state_dict()
        before = {name: value.clone() for name, value in state.items()}
        assert any(name.endswith("running_mean") for name in before)
        for stage in (1, 1):
            assert experiment.stage == stage
            run._train_epoch()
        after = experiment.student.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"classifier.weight", "classifier.bias"}
        assert experiment.stage == 2
        run._train_epoch()
        after = experiment.student.state_dict()
        assert not [name for name in before if torch.equal(before[name], after[name])]

    @pytest.mark.slow
    def test_killed_in_both_stages_it_ends_bitwise_as_one_that_was_not(self, root, tmp_path):
        spec = (self.FILE, self.overrides(root))

        def distill(out: Path, progress: NullProgress) -> dict:
            with progress:
                return trainer.distill(RunSpec(*spec, out, 0, "cpu"))

        summary = distill(tmp_path / "whole", NullProgress())
        for moment in ("epoch 2 val", "epoch 3", "epoch 4", "test"):
            with pytest.raises(Stopped):
                distill(tmp_path / "parts", StopsAt(moment))
        distill(tmp_path / "parts", NullProgress())
        assert same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))
        records = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").open()]
        assert [record["stage"] for record in records] == [1, 1, 2, 2]
        assert [record["lr"] for record in records] == [1e-3, 1e-3, 1e-4, 1e-4]
        assert summary["val_auc"] == max(record["val_auc"] for record in records)


def test_subclasses_are_reported_as_the_two_classes_and_the_images_as_synthetic(root, tmp_path):
    file = CONFIGS / "mhist/skd/mobilenetv2_100_from_resnetv2_50.yaml"
    teacher = "models.teacher_model.kwargs.name=test_resnet"
    overrides = [*SHORT, f"root={root}", *untrained(file), teacher, NARROW.format("student_model")]
    summary = trainer.distill(RunSpec(file, overrides, tmp_path / "run", device="cpu"))
    assert summary["classes"] == ["HP", "SSA"]
    assert summary["subclasses"] == ["clear_hp", "hp", "ssa", "clear_ssa"]
    assert 0 <= summary["test_auc"] <= 1
    model, _ = load_run(tmp_path / "run")
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 2)
    with (tmp_path / "run/predictions.csv").open(newline="") as rows:
        images = [row["image"] for row in csv.DictReader(rows)]
    assert images
    assert all(Path(name).name.startswith("SYNTHETIC_") for name in images)


SOURCE = {"resnetv2_50": 25_613_800, "mobilenetv2_100": 3_538_984, "densenet121": 8_062_504}


@pytest.mark.parametrize("name", SOURCE)
def test_sizes_are_the_sources_but_for_the_biases_of_resnet(name):
    """It counts running statistics, and puts its heads on the softmax of 1,000 classes."""
    body = build_model(name, 1000)
    counted = count_parameters(body) + sum(
        buffer.numel() for key, buffer in body.named_buffers() if "running" in key
    )
    biases = 19_008 if name == "resnetv2_50" else 0
    assert counted == SOURCE[name] - biases
    for classes, published in {
        "resnetv2_50": {2: 25_615_802, 5: 25_618_805},
        "mobilenetv2_100": {2: 3_540_986, 5: 3_543_989},
        "densenet121": {5: 8_067_509},
    }[name].items():
        head = count_parameters(nn.Linear(1000, classes))
        assert counted + head == published - biases
    plain = {"resnetv2_50": 23_504_450, "mobilenetv2_100": 2_226_434}
    if name in plain:
        assert count_parameters(build_model(name, 2)) == plain[name]


def test_the_strides_of_resnetv2_are_timms():
    """At the first block of a stage, not the last: 4.09 GMACs of 1,000 classes at 224 px."""
    assert count_macs(build_model("resnetv2_50", 1000), 224) == pytest.approx(4.09e9, rel=2e-3)
