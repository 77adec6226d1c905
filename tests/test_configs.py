"""Every shipped config: its header, its checkpoints, and a tiny run or step of it."""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from kd_lrp_plugin import training
from kd_lrp_plugin.cli import app
from kd_lrp_plugin.config import resolve_config
from kd_lrp_plugin.students import build_model

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(path.relative_to(ROOT) for path in ROOT.glob("torchdistill_configs/**/*.yaml"))
PHANTOM = [path for path in CONFIGS if path.parts[1] == "phantom"]
BRAIN_MRI = [path for path in CONFIGS if path.parts[1] == "brain_mri"]
TINY = ["image_size=32", "batch_size=4", "num_workers=0", "train.num_epochs=1"]
SIZES = [f"datasets.phantom/{split}.init.kwargs.size=8" for split in ("train", "val", "test")]


class Reader(yaml.FullLoader):
    """Reads a tag as a plain mapping, and calls nothing."""


Reader.add_multi_constructor(
    "!", lambda loader, _, node: loader.construct_mapping(node, deep=True)
)


def read(path: Path) -> dict:
    return yaml.load((ROOT / path).read_text(encoding="utf-8"), Loader=Reader)


def teacher_of(path: Path) -> dict | None:
    return read(path)["models"].get("teacher_model")


def name(path: Path) -> str:
    return "/".join(path.parts[1:])


STUDENTS = [path for path in CONFIGS if teacher_of(path)]


@pytest.mark.parametrize("path", CONFIGS, ids=name)
class TestEveryConfig:
    def test_opens_with_question_row_and_its_own_command(self, path):
        question, row, run, blank = (ROOT / path).read_text(encoding="utf-8").split("\n")[:4]
        assert re.fullmatch(r"# Question: .+\?", question)
        assert re.fullmatch(r"# (Paper row|Row): .+\.", row)
        assert run == f"# Run: kd-lrp distill {path.as_posix()}"
        assert blank == ""

    def test_has_what_torchdistill_and_the_driver_read(self, path):
        config = read(path)
        assert config["dependencies"] == ["kd_lrp_plugin.torchdistill"]
        assert {"datasets", "models", "train", "test"} <= set(config)
        loaders = [config["train"][f"{part}_data_loader"] for part in ("train", "val")]
        loaders.append(config["test"]["test_data_loader"])
        ids = [loader["dataset_id"] for loader in loaders]
        assert len(set(ids)) == 3
        assert set(ids) == set(config["datasets"])
        for model in config["models"].values():
            assert model["key"] == "timm_model"
            assert "src_ckpt" in model

    def test_names_its_folder_in_its_checkpoint(self, path):
        models = read(path)["models"]
        student = models.get("student_model") or models["model"]
        place = path.relative_to("torchdistill_configs").with_suffix(".pt")
        assert student["dst_ckpt"] == f"./resource/ckpt/{place.as_posix()}"


def made_by(path: Path) -> list[str]:
    """Arguments of ``kd-lrp`` that make the teacher of a config."""
    teacher = teacher_of(path)
    assert teacher is not None
    program, *arguments = shlex.split(teacher["_made_by"])
    assert program == "kd-lrp"
    return arguments


@pytest.mark.parametrize("path", STUDENTS, ids=name)
def test_the_teachers_command_names_a_config_with_the_same_model(path):
    command, config, *options = made_by(path)
    assert command == "distill"
    maker = read(Path(config))["models"]["model"]
    teacher = teacher_of(path)
    kwargs = {key: value for key, value in maker["kwargs"].items() if key != "weights"}
    for option in options:
        if option.startswith("models.model.kwargs."):
            key, _, value = option.removeprefix("models.model.kwargs.").partition("=")
            kwargs[key] = yaml.safe_load(value)
    assert kwargs == teacher["kwargs"]
    if "--out" not in options:
        folder = training.default_run_folder(ROOT / config, 0)
        assert (folder / "best.pt").as_posix() == teacher["src_ckpt"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A copy of the configs, with the teachers of the phantom made by the commands they name."""
    folder = tmp_path_factory.mktemp("configs")
    shutil.copytree(ROOT / "torchdistill_configs", folder / "torchdistill_configs")
    sets = [argument for override in TINY + SIZES for argument in ("--set", override)]
    commands = {shlex.join(made_by(path)) for path in PHANTOM if path in STUDENTS}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in sorted(commands):
            arguments = [*shlex.split(command), *sets, "--device", "cpu"]
            ran = CliRunner().invoke(app, arguments)
            assert ran.exit_code == 0, ran.output
    return folder


@pytest.mark.parametrize("path", PHANTOM, ids=name)
def test_a_phantom_config_trains_and_tests(path, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    summary = training.distill(path, TINY + SIZES, tmp_path / "run", device="cpu")
    assert summary["epochs"] == 1
    assert 0 <= summary["test_accuracy"] <= 1
    assert summary["classes"] == ["glioma", "meningioma", "notumor", "pituitary"]
    assert (tmp_path / "run" / "best.pt").is_file()


def missing_data() -> str:
    """Why the brain_mri configs cannot be run here; empty if they can."""
    if not os.environ.get("KD_LRP_DATA"):
        return "KD_LRP_DATA is not set"
    folder = Path(os.environ["KD_LRP_DATA"])
    needed = ["brain_mri/Training", "brain_mri/Testing", "weights"]
    absent = [name for name in needed if not (folder / name).is_dir()]
    return f"KD_LRP_DATA has no {' and no '.join(absent)}" if absent else ""


@pytest.mark.skipif(bool(missing_data()), reason=missing_data() or "the data are there")
@pytest.mark.parametrize("path", BRAIN_MRI, ids=name)
def test_a_brain_mri_config_takes_a_step(path, tmp_path):
    overrides = list(TINY)
    teacher = teacher_of(path)
    if teacher is not None:
        kwargs = teacher["kwargs"] | {"image_size": 32}
        torch.save(build_model(**kwargs).state_dict(), tmp_path / "teacher.pt")
        overrides.append(f"models.teacher_model.src_ckpt={tmp_path / 'teacher.pt'}")
    config = training._load_config(resolve_config(ROOT / path, overrides))
    run = training._Run(config, torch.device("cpu"))
    assert run.classes == ["glioma", "meningioma", "notumor", "pituitary"]
    before = {key: value.clone() for key, value in run.student.named_parameters()}
    run.box.pre_epoch_process(epoch=1)
    images, targets, supplement = next(iter(run.box.train_data_loader))
    assert images.shape == (4, 3, 32, 32)
    loss = run.box.forward_process(images, targets, supplement)
    run.box.post_forward_process(loss=loss)
    assert torch.isfinite(loss)
    same = [key for key, value in run.student.named_parameters() if torch.equal(value, before[key])]
    assert same == []
