"""The trainer: configs and overrides, run folders, checks before work, the command line."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small_runs import BASELINE, CONFIGS, CPU, KD, LRP, SMALL
from typer.testing import CliRunner

from kd_lrp_plugin.cli.main import app
from kd_lrp_plugin.config.build import assemble, build_filled_model
from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.models import factory
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.training import trainer
from kd_lrp_plugin.training.check.dry_run import check
from kd_lrp_plugin.training.experiment import Experiment
from kd_lrp_plugin.utils.progress import NullProgress

PHANTOM = sorted((CONFIGS / "phantom").rglob("[!_]*.yaml"))
MRI = sorted((CONFIGS / "brain_mri").rglob("[!_]*.yaml"))
MHIST = sorted((CONFIGS / "mhist").rglob("[!_]*.yaml"))
TAKD = (CONFIGS / "phantom/takd").glob("*.yaml")  # one needs the other: studies/test_assistants


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def teacher(workplace) -> Path:
    """A teacher's checkpoint where the phantom's configs look for it."""
    torch.manual_seed(0)
    file = Path("runs/phantom/ce/resnet10t/0/best.pt")
    file.parent.mkdir(parents=True)
    classes = ["glioma", "meningioma", "notumor", "pituitary"]
    state = factory.build_model("resnet10t", 4).state_dict()
    torch.save({"model": state, "classes": classes}, file)
    return file


def build_run(config: Path) -> trainer.Trainer:
    """A run as :func:`training.distill` would begin it."""
    experiment = Experiment(assemble(resolve_config(config, SMALL)), CPU)
    folder = RunFolder("out")
    folder.path.mkdir()
    return trainer.Trainer(experiment, folder, 0)


MARKED = sorted((CONFIGS / "brain_mri_marked").rglob("[!_]*.yaml"))


@pytest.mark.parametrize("config", MARKED, ids=lambda file: file.parent.name)
def test_the_configs_of_marked_mri_fit_a_folder_of_its_layout(config, tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(256, size=(40, 32, 32), dtype=np.uint8)
    for label in ("glioma", "meningioma", "notumor", "pituitary"):
        for split in ("Training", "Testing"):
            where = tmp_path / "brain_mri" / split / label
            where.mkdir(parents=True)
            for k, values in enumerate(pixels):
                Image.fromarray(values).save(where / f"{k}.png")
    monkeypatch.setenv("KD_LRP_DATA", str(tmp_path))
    untrained = ["models.teacher_model.src_ckpt=null", "models.student_model.kwargs.weights=null"]
    small = ["image_size=64", "num_workers=0", "batch_size=4", *untrained]
    report = check(resolve_config(config, small), CPU)
    assert (report.problems, report.warnings) == ([], [])


class TestConfig:
    def text(self, *overrides: str) -> dict:
        return resolve_config(LRP, overrides).root

    def value(self, node: yaml.Node, path: str) -> str:
        for key in path.split("."):
            children = (
                {k.value: v for k, v in node.value}
                if isinstance(node, yaml.MappingNode)
                else dict(zip(map(str, range(99)), node.value, strict=False))
            )
            node = children[key]
        return node.value

    def test_an_override_reaches_every_alias(self):
        node = self.text("num_workers=7")
        for loader in ("train_data_loader", "val_data_loader"):
            assert self.value(node, f"train.{loader}.kwargs.num_workers") == "7"
        node = self.text("train.teacher.forward_proc.init.kwargs.method=lrp_zplus")
        where = "train.student.forward_proc.init.kwargs.method"
        assert self.value(node, where) == "lrp_zplus"

    def test_an_override_reaches_a_list_item_and_adds_a_key(self):
        node = self.text(
            "train.teacher.forward_proc.init.kwargs.layers.1=layer1", "+train.teacher.note=x"
        )
        assert self.value(node, "train.student.forward_proc.init.kwargs.layers.1") == "layer1"
        assert self.value(node, "train.teacher.note") == "x"

    def test_choosing_another_set_leaves_the_sets_alone(self):
        node = self.text("test.test_data_loader.dataset_id=phantom/val")
        assert self.value(node, "test.test_data_loader.dataset_id") == "phantom/val"
        assert self.value(node, "train.val_data_loader.dataset_id") == "phantom/val"
        (datasets,) = (v for k, v in node.value if k.value == "datasets")
        assert [k.value for k, _ in datasets.value] == [
            "phantom/train",
            "phantom/val",
            "phantom/test",
        ]

    def test_a_power_of_ten_is_a_number(self):
        text = resolve_config(LRP, ["train.optimizer.kwargs.lr=1e-3"]).text
        node = yaml.compose(text, yaml.FullLoader)
        for key in ("train", "optimizer", "kwargs", "lr"):
            (node,) = (v for k, v in node.value if k.value == key)
        assert yaml.SafeLoader("").construct_yaml_float(node) == 0.001

    def test_tags_survive(self):
        assert resolve_config(LRP).text.count("!import_call") == 4

    @pytest.mark.parametrize(
        ("override", "words"),
        [
            ("train.nun_epochs=3", "Did you mean 'num_epochs'"),
            ("train.num_epochs", "key=value"),
            ("train.num_epochs.x=1", "keys on the way"),
            ("train.num_epochs=[1", "YAML"),
        ],
    )
    def test_a_wrong_override_is_explained(self, override, words):
        with pytest.raises(ValueError, match=words):
            resolve_config(LRP, [override])

    def test_a_missing_or_broken_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            resolve_config("nowhere.yaml")
        broken = tmp_path / "broken.yaml"
        broken.write_text("a: [1")
        with pytest.raises(ValueError, match=r"broken\.yaml"):
            resolve_config(broken)


@pytest.mark.parametrize("config", PHANTOM + MRI + MHIST, ids=lambda p: "-".join(p.parts[-3:]))
def test_a_config_opens_with_question_row_and_its_own_command(config):
    lines = config.read_text(encoding="utf-8").splitlines()
    shown = config.relative_to(CONFIGS.parent)
    assert lines[0].startswith("# Question: ")
    assert lines[1].startswith("# Row: ")
    assert lines[2] == f"# Run: kd-lrp distill {shown}"


@pytest.mark.parametrize(
    "config", sorted({*PHANTOM} - {*TAKD}), ids=lambda p: "-".join(p.parts[-2:])
)
def test_a_phantom_config_trains(config, teacher):
    overrides = list(SMALL)
    if "script" in config.stem:
        overrides.append("models.teacher_model.src_ckpt=null")
    if "stages" in config.stem:
        overrides.remove("train.num_epochs=1")
    if config.parent.name == "diswot":
        overrides.append("models.student_model.kwargs.batch_size=8")
    summary = trainer.distill(RunSpec(config, overrides, "out"))
    written = {file.name.split(".tfevents")[0] for file in Path("out").iterdir()}
    assert written >= {"config.yaml", "metrics.jsonl", "best.pt", "summary.json", "curves.png"}
    assert not list(Path("out").glob("*draft*"))
    lines = Path("out/metrics.jsonl").read_text().splitlines()
    metrics = json.loads(lines[-1])
    assert summary["val_accuracy"] == max(json.loads(line)["val_accuracy"] for line in lines)
    assert all(isinstance(value, int | float) for value in metrics.values())
    if "lrp" in str(config) and "script" not in config.stem:
        terms = ["ce", "kl", "semantic"]
        if config.parent.name != "lrp_relative_l2":
            terms.append("relation")
        for part in ("train", "val"):
            for term in terms:
                assert f"{part}_{term}" in metrics


@pytest.mark.parametrize(
    "config",
    [
        # By k-means of all images; test_found_subclasses has it on few.
        pytest.param(path, marks=pytest.mark.slow) if path.stem.endswith("-kmeans") else path
        for path in MRI
    ],
    ids=lambda p: "-".join(p.parts[-2:]),
)
def test_a_brain_mri_config_takes_a_step(config, data_folder, workplace):
    assert (data_folder / "brain_mri").is_dir()
    small = ["image_size=64", "num_workers=0", "batch_size=4"]
    kwargs = {"head": "flatten_mlp", "image_size": 64, "timm_kwargs": {"pad_type": "same"}}
    for classes in (4, 12):
        teacher = factory.build_model("mobilenetv2_100", classes, **kwargs)
        torch.save(teacher.state_dict(), f"{classes}.pt")
    found = config.stem.endswith("-kmeans")
    if found:
        key = "datasets.found/train.init.kwargs.table.init.kwargs.model.src_ckpt"
        small.append(f"{key}=4.pt")
    if config.parent.name not in ("ce", "subclass_labels"):
        small.append(f"models.teacher_model.src_ckpt={12 if found else 4}.pt")
    torch.manual_seed(0)
    report = check(resolve_config(config, small), CPU)
    assert report.problems == []
    assert report.warnings == []


@pytest.fixture
def data_folder() -> Path:
    import os

    if not os.environ.get("KD_LRP_DATA"):
        pytest.skip("needs brain_mri/ and weights/ in the folder that KD_LRP_DATA names")
    return Path(os.environ["KD_LRP_DATA"])


class TestRun:
    def test_the_same_seed_gives_the_same_student_and_another_seed_another(self, teacher):
        weights = []
        for out, seed in (("a", 1), ("b", 1), ("c", 2)):
            trainer.distill(RunSpec(LRP, SMALL, out, seed))
            found = torch.load(Path(out, "best.pt"), weights_only=True)["model"]
            weights.append(torch.cat([w.flatten().double() for w in found.values()]))
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])

    def test_a_missing_teacher_names_the_command_that_makes_it(self, workplace):
        with pytest.raises(ValueError, match=r"kd-lrp distill .*ce/resnet10t\.yaml"):
            trainer.distill(RunSpec(LRP, SMALL, "out"))
        assert list(workplace.iterdir()) == []

    def test_a_run_that_dies_in_its_first_epoch_leaves_nothing(self, workplace):
        class Dies(NullProgress):
            def track(self, items, what, total):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), Dies():
            trainer.distill(RunSpec(BASELINE, SMALL, "out"))
        assert list(workplace.iterdir()) == []

    def test_the_frozen_teacher_is_in_evaluation_mode_with_stock_procedures(self, teacher):
        modes = []

        class Watches(NullProgress):
            def track(self, items, what, total):
                for item in items:
                    yield item
                    modes.append(run.experiment.box.teacher_model.training)

        run = build_run(KD)
        with Watches():
            run._train_epoch()
        assert modes
        assert not any(modes)

    def test_a_loss_that_is_not_finite_stops_before_the_step_and_is_named(self, workplace):
        run = build_run(BASELINE)
        head = run.experiment.student.get_classifier()
        with torch.no_grad():
            head.bias.fill_(torch.nan)
        before = run.experiment.student.conv1[0].weight.detach().clone()
        with pytest.raises(FloatingPointError, match=r"\['ce'\] not finite"):
            run._train_epoch()
        assert torch.equal(run.experiment.student.conv1[0].weight, before)

    def test_a_head_with_too_few_outputs_is_refused(self, workplace):
        with pytest.raises(ValueError, match=r"kwargs\.num_classes to 4"):
            trainer.distill(RunSpec(BASELINE, [*SMALL, "models.model.kwargs.num_classes=3"], "out"))

    def test_a_checkpoint_of_other_classes_is_refused(self, teacher):
        record = torch.load(teacher, weights_only=True)
        torch.save(record | {"classes": ["a", "b", "c", "d"]}, teacher)
        with pytest.raises(ValueError, match="trained on these classes"):
            trainer.distill(RunSpec(KD, SMALL, "out"))

    def test_a_teacher_from_torchdistills_scripts_is_read(self, teacher):
        record = torch.load(teacher, weights_only=True)
        state = record["model"]
        torch.save({"model": state, "args": argparse.Namespace(lr=1)}, teacher)
        entry = {"key": "timm_model", "kwargs": {"name": "resnet10t", "num_classes": 4}}
        built = build_filled_model(entry | {"src_ckpt": str(teacher)}, "models.teacher_model")
        found = built.module.state_dict()
        assert built.classes == ()
        assert all(torch.equal(found[key], value) for key, value in state.items())

    def test_class_folders_that_disagree_are_refused(self, workplace):
        from PIL import Image

        for split, classes in {"Training": "ab", "Testing": "ac"}.items():
            for name in classes:
                Path("set", split, name).mkdir(parents=True)
                for index in range(20):
                    Image.new("L", (8, 8)).save(Path("set", split, name, f"{index}.png"))
        overrides = ["datasets.brain_mri/train.init.kwargs.root=set", "num_workers=0"]
        for split in ("train", "val", "test"):
            overrides.append(f"datasets.brain_mri/{split}.init.kwargs.classes=null")
        overrides.append("models.model.kwargs.weights=null")
        config = CONFIGS / "brain_mri/ce/mobilenetv2_035.yaml"
        with pytest.raises(ValueError, match="sets with the same classes"):
            trainer.distill(RunSpec(config, overrides, "out"))

    @pytest.mark.parametrize(
        ("override", "words"),
        [
            ("train.criterion.key=WeightedSum", "Did you mean 'WeightedSumLoss'"),
            ("models.model.kwargs.name=resnet10", "resnet10t"),
            ("+models.model.kwargs.weights=nowhere.safetensors", "nowhere"),
            ("test=null", "section 'test'"),
            ("test.test_data_loader.dataset_id=phantom/tset", "Did you mean 'phantom/test'"),
            ("batch_size=999", "batch_size"),
        ],
    )
    def test_a_wrong_value_is_explained_before_any_work(self, override, words, workplace):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            trainer.distill(RunSpec(BASELINE, [*SMALL, override], "out"))
        assert list(workplace.iterdir()) == []


class TestCommandLine:
    def test_help_teaches(self):
        for command, words in {
            "distill": "with its teacher",
            "predict": "Not for clinical",
        }.items():
            result = CliRunner().invoke(app, [command, "--help"])
            assert result.exit_code == 0
            assert words in result.output
            assert command in CliRunner().invoke(app, ["--help"]).output

    def test_distills_and_predicts(self, workplace):
        flags = [word for override in SMALL for word in ("--set", override)]
        result = CliRunner().invoke(app, ["distill", str(BASELINE), *flags, "--seed", "5"])
        assert result.exit_code == 0, result.output
        assert "test accuracy" in result.output
        run = Path("runs/phantom/ce/test_resnet/5")
        assert json.loads((run / "summary.json").read_text())["seed"] == 5

    def test_an_error_is_one_message_without_a_traceback(self, workplace):
        result = CliRunner().invoke(app, ["distill", "nowhere.yaml"])
        assert result.exit_code == 1
        assert "nowhere.yaml" in result.output
        assert "Traceback" not in result.output
