"""The MNIST configs on digits of noise: all pass the check and train, by the source's figures."""

from pathlib import Path

import pytest
import torch
from small_runs import CONFIGS, CPU, write_digits

from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.config.safety import unsafe_tags
from kd_lrp_plugin.models import mnist
from kd_lrp_plugin.runs.loading import load_run
from kd_lrp_plugin.studies.parser import read_plan
from kd_lrp_plugin.training import trainer
from kd_lrp_plugin.training.check.dry_run import check

MNIST = sorted((CONFIGS / "mnist").rglob("[!_]*.yaml"))
TAUGHT = [file for file in MNIST if "_from_" in file.stem]
FOUND = "datasets.found/train.init.kwargs.table.init.kwargs"
SMALL = ["batch_size=8", "num_workers=0", "train.num_epochs=1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "mnist")


def teach(file: Path, folder: Path) -> list[str]:
    """Where the config's models lie, with random weights, and fewer clusters for few images."""
    values, overrides = resolve_config(file).values, []
    if "kmeans" in file.stem:
        torch.save(mnist.mnist_cnn().state_dict(), folder / "plain.pt")
        overrides += [f"{FOUND}.model.src_ckpt={folder / 'plain.pt'}", f"{FOUND}.per_class=2"]
        overrides += [f"{key}.kwargs.num_classes=20" for key in list_models(values)]
        overrides += [f"datasets.found/{part}.init.kwargs.per_class=2" for part in ("val", "test")]
    if entry := values["models"].get("teacher_model"):
        outputs = 20 if "kmeans" in file.stem else entry["kwargs"]["num_classes"]
        torch.save(getattr(mnist, entry["key"])(outputs).state_dict(), folder / "teacher.pt")
        overrides.append(f"models.teacher_model.src_ckpt={folder / 'teacher.pt'}")
    return overrides


def list_models(values) -> list[str]:
    return [f"models.{name}" for name in values["models"]]


@pytest.mark.parametrize("file", MNIST, ids=lambda file: f"{file.parent.name}/{file.stem}")
class TestEveryConfig:
    def test_is_that_of_its_name_and_of_the_protocol(self, file):
        values = resolve_config(file).values
        student, _, teacher = file.stem.removesuffix("-kmeans").partition("_from_")
        models = values["models"]
        assert models.get("model", models.get("student_model"))["key"] == student
        assert models.get("teacher_model", {}).get("key", "") == teacher
        train = values["train"]
        assert (train["optimizer"], train["num_epochs"]) == (
            {"key": "Adam", "kwargs": {"lr": 0.001}},
            12,
        )
        assert train["train_data_loader"]["kwargs"]["batch_size"] == 256
        if file.parent.name in ("kd", "takd"):
            kd = train["criterion"]["kwargs"]["sub_terms"]["kd"]["criterion"]["kwargs"]
            assert (kd["temperature"], kd["alpha"]) == (4.0, 0.5)

    def test_runs_no_code_of_its_own_and_passes_the_check(self, file, root, tmp_path, monkeypatch):
        monkeypatch.setenv("KD_LRP_DATA", str(root.parent))  # its root is empty
        config = resolve_config(file, ["batch_size=8", "num_workers=0", *teach(file, tmp_path)])
        assert not unsafe_tags(config)
        assert not check(config, CPU).problems

    def test_trains_and_loads_again(self, file, root, tmp_path):
        overrides = [*SMALL, f"root={root}", *teach(file, tmp_path)]
        trainer.distill(RunSpec(file, overrides, tmp_path / "run", device="cpu"))
        model, summary = load_run(tmp_path / "run")
        assert summary["image_shape"] == [1, 28, 28]
        parity = file.parent.name in ("skd", "skd_lrp_cosine", "subclass_labels")
        outputs = 2 if parity and "kmeans" not in file.stem else 10  # classes of the subclasses
        assert model(torch.zeros(2, 1, 28, 28)).shape == (2, outputs)


@pytest.mark.parametrize("file", TAUGHT, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_each_names_the_config_of_its_teacher(file):
    entry = resolve_config(file).values["models"]["teacher_model"]
    made_by = Path(entry["_made_by"].removeprefix("kd-lrp distill torchdistill_configs/"))
    assert (CONFIGS / made_by).is_file()
    assert entry["src_ckpt"] == f"runs/{made_by.with_suffix('')}/0/best.pt"


def test_the_study_teaches_the_assistant_and_the_assistant_the_student():
    plan = read_plan(CONFIGS / "studies/takd.yaml")
    teacher, assistant = plan.prepared
    assert teacher.needs == ()
    assert assistant.needs == (teacher.folder,)
    needs = {run.name: run.needs for run in plan.runs}
    assert needs == {
        "alone": (),
        "direct": (teacher.folder,),
        "by the assistant": (assistant.folder,),
    }
    assert plan.seeds == (0, 1, 2, 3, 4)


def test_a_relevance_loss_on_the_student_without_maps_is_refused_before_training(root, tmp_path):
    file = CONFIGS / "mnist/lrp_cosine/mnist_assistant_small_from_mnist_cnn.yaml"
    overrides = [*SMALL, f"root={root}", *teach(file, tmp_path)]
    overrides += [
        "models.student_model.key=mnist_mlp",
        "train.student.forward_proc.init.kwargs.layers=auto",
    ]
    report = check(resolve_config(file, overrides), CPU)
    assert any("got DigitNetwork, which has none" in problem for problem in report.problems)
