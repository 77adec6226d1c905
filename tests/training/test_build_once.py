"""What a run needs is built once, and its check leaves no trace in what it hands on."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from small_runs import BASELINE, CPU, KD, NO_TEACHER, SMALL, same
from torch import nn
from torchdistill.common import main_util

from kd_lrp_plugin.config import build
from kd_lrp_plugin.config.build import Assembly, BuiltModel, assemble
from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.models import factory
from kd_lrp_plugin.studies import runner
from kd_lrp_plugin.studies.plan import StudyOptions
from kd_lrp_plugin.training import trainer
from kd_lrp_plugin.training.check.dry_run import check


@pytest.fixture
def built(monkeypatch) -> Counter:
    """Counts what is built, by name."""
    found: Counter = Counter()
    create, make = factory.timm.create_model, Phantom.__init__

    def count_model(name, *args, **kwargs):
        found[name] += 1
        return create(name, *args, **kwargs)

    def count_images(self, *args, **kwargs):
        found[kwargs.get("split", "train")] += 1
        make(self, *args, **kwargs)

    monkeypatch.setattr(factory.timm, "create_model", count_model)
    monkeypatch.setattr(Phantom, "__init__", count_images)
    return found


def test_a_run_constructs_its_config_and_builds_models_and_data_once(built, tmp_path, monkeypatch):
    constructed, construct = [], build._construct

    def watch(config, failed):
        constructed.extend(key for key in config.values)
        return construct(config, failed)

    monkeypatch.setattr(build, "_construct", watch)
    trainer.distill(RunSpec(KD, [*SMALL, *NO_TEACHER], tmp_path / "run", device="cpu"))
    assert max(Counter(constructed).values()) == 1
    assert {"dependencies", "datasets", "models", "train", "test"} <= {*constructed}
    assert built == {"resnet10t": 1, "test_resnet": 1, "train": 1, "val": 1, "test": 1}


def test_the_planning_of_a_study_builds_no_model_twice(built, tmp_path, monkeypatch):
    """Two configurations share their teacher, which is prepared, and their student."""

    class PlannedError(Exception):
        """Raised where training would begin."""

    def stop(*_):
        raise PlannedError

    monkeypatch.setattr(runner, "StudyExecutor", stop)
    taught = ["models.teacher_model.src_ckpt={teacher}"]
    study = {
        "question": "which?",
        "seeds": 2,
        "set": SMALL,
        "prepare": {"teacher": {"config": str(BASELINE.parent / "resnet10t.yaml")}},
        "configurations": {
            "KD": {"config": str(KD), "set": taught},
            "hot": {"config": str(KD), "set": [*taught, "batch_size=4"]},
        },
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    options = StudyOptions(out=tmp_path / "out", root=tmp_path / "runs", device="cpu")
    with pytest.raises(PlannedError):
        runner.run_study(tmp_path / "study.yaml", options)
    assert {name: built[name] for name in ("resnet10t", "test_resnet")} == {
        "resnet10t": 1,  # prepared, and what the students' teacher is filled from
        "test_resnet": 1,
    }


def generators() -> list:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()]  # noqa: NPY002


def test_the_check_hands_on_what_would_be_there_without_it(monkeypatch):
    # Random crops draw from the generators, batch norms count, and torchdistill edits the config.
    config = resolve_config(KD, [*SMALL, *NO_TEACHER])
    main_util.set_seed(3)
    alone, before = assemble(config), generators()
    main_util.set_seed(3)
    report = check(config, CPU)
    assert report.problems == []
    assert same(generators(), before)
    for role, model in alone.models.items():
        handed = report.assembly.models[role].module
        assert same(dict(handed.state_dict()), dict(model.module.state_dict()))
        assert handed.training
        assert all(p.requires_grad and p.grad is None for p in handed.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in handed.modules())
    for section in ("train", "test", "models"):
        assert report.assembly.content[section] == alone.content[section]


class Counting(torch.utils.data.Dataset):
    def __init__(self, file=None):
        self.file, self.read = file, 0

    def __getitem__(self, index):
        self.read += 1
        return index


def test_a_copy_shares_only_what_cannot_be_copied(tmp_path):
    with (tmp_path / "images").open("w") as file:
        images, fixed = Counting(), Counting(file)
        model = nn.Linear(2, 2)
        content = {"datasets": {"a": images, "b": fixed}, "models": {"model": {"data": images}}}
        found = Assembly(content, {"model": BuiltModel(model)}).copy()
    assert found.content["datasets"]["a"] is found.content["models"]["model"]["data"]
    found.content["datasets"]["a"][0]
    found.content["datasets"].pop("b")
    assert (images.read, list(content["datasets"])) == (0, ["a", "b"])
    assert found.models["model"].module is not model


def test_a_model_that_cannot_be_copied_is_built_again_for_the_check():
    """A weight that a hook has computed is no leaf, which PyTorch refuses to copy."""
    config = resolve_config(BASELINE, SMALL)
    assembly = assemble(config)
    model = assembly.models["model"].module
    nn.utils.weight_norm(model.fc)
    found = assembly.copy().models["model"].module
    assert found is not model
    assert found.fc.weight is not model.fc.weight
