"""A student for timm and as PyTorch's archive: the same bits, a card that tells nothing of home."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from small_runs import KD, NO_TEACHER, SMALL
from timm.data import create_transform, resolve_model_data_config
from typer.testing import CliRunner

from kd_lrp_plugin.cli.main import app
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.data.transforms import make_transforms
from kd_lrp_plugin.evaluation.export import student as comparing
from kd_lrp_plugin.evaluation.export import timm_folder
from kd_lrp_plugin.evaluation.export.export import ExportOptions, export
from kd_lrp_plugin.evaluation.predict import predict
from kd_lrp_plugin.runs import loading
from kd_lrp_plugin.runs.record import RunRecord
from kd_lrp_plugin.training.trainer import distill

HEADS = (
    "+train.student.auxiliary_model_wrapper={key: ModelWithHeads, kwargs: {heads: {probe: "
    "{path: layer2, key: linear_probe, kwargs: {in_features: 48, num_classes: 4}}}}}"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A student that learnt with a head on its inside."""
    folder = tmp_path_factory.mktemp("runs") / "kd"
    distill(RunSpec(KD, [*SMALL, *NO_TEACHER, HEADS], folder, device="cpu"))
    return folder


@pytest.fixture(scope="module")
def check(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    found = {"summary": "LEAK: 3 of 8 test images have a duplicate.", "leaks": {}}
    found["options"] = {"root": "/somewhere/scans"}
    (folder / "summary.json").write_text(json.dumps(found))
    return folder


@pytest.fixture(scope="module")
def folder(run, check) -> Path:
    export(run, ExportOptions("timm", data_check=check))
    return run / "export-timm"


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.stack([image for image, _ in Phantom("test", size=8, image_size=48)])


class TestTimm:
    def test_timm_loads_it_alone_bit_for_bit(self, run, folder, images):
        alone = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        model, summary = loading.load_run(run)
        assert alone.state_dict().keys() == model.state_dict().keys()  # and so without the head
        with torch.no_grad():
            assert torch.equal(alone(images), model(images))
        assert alone.pretrained_cfg["label_names"] == summary["classes"]
        prepare = create_transform(**resolve_model_data_config(alone))
        picture = Phantom("test", size=1, image_size=90).image(0)
        assert torch.equal(prepare(picture), loading.load_transform(run)(picture))

    def test_its_card_has_data_metrics_leaks_and_limits_and_no_path(self, run, folder):
        card = (folder / "README.md").read_text()
        summary = json.loads((run / "summary.json").read_text())
        assert card.startswith("---\nlibrary_name: timm\n")
        for words in (
            "| phantom/train ",
            f"| accuracy          | {summary['test_accuracy']:.3f} |",
            "LEAK: 3 of 8 test images",
            "Not for clinical use",
            "calibration error",
            "glioma, meningioma, notumor, pituitary",
        ):
            assert words in card
        for file in folder.iterdir():
            assert str(run.parent).encode() not in file.read_bytes() or file.name == "export.json"

    def test_the_example_of_its_card_runs(self, run, folder, tmp_path, monkeypatch):
        Phantom("test", size=1, image_size=90).image(0).save(tmp_path / "image.png")
        code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        monkeypatch.chdir(tmp_path)
        found: dict = {}
        exec(code.replace("FOLDER", str(folder)), found)
        (record,) = predict(run, ["image.png"])
        shown = found["logits"].softmax(1)[0].tolist()
        assert shown == pytest.approx(list(record["all"].values()), abs=1e-6)

    def test_its_card_has_no_example_of_timm_for_images_of_12_bits(self, folder):
        model, about = timm_folder.load_folder(folder)
        assert timm_folder.prepares_alike(model, about["preprocessing"])
        about["preprocessing"]["bits"] = 12
        assert "create_transform" not in timm_folder.write_example(model, about)

    def test_a_leak_check_that_was_not_made_is_said_and_one_that_is_not_there_refused(
        self, run, folder, tmp_path
    ):
        from kd_lrp_plugin.evaluation.export.card import read_leak_check

        assert "not known" in read_leak_check(None, RunRecord(run))
        with pytest.raises(FileNotFoundError, match="--data-check"):
            export(run, ExportOptions("timm", out=tmp_path / "out", data_check=tmp_path))
        assert not (tmp_path / "out").exists()

    def test_whose_images_a_leak_check_is_of_and_whether_the_run_minds_it_is_said(
        self, check, tmp_path
    ):
        from kd_lrp_plugin.evaluation.export.card import read_leak_check

        config = tmp_path / "config.yaml"
        for table, minds in ((check / "clean_split.csv", True), ("other/clean_split.csv", False)):
            config.write_text(
                f"datasets: {{one: {{init: {{kwargs: {{manifest: {table}}}}}}}, two: {{}}}}"
            )
            words = read_leak_check(check, RunRecord(tmp_path))
            assert words.startswith("Of the images in scans:\n\nLEAK: 3 of 8")
            assert ("The run takes" in words, "The run does not take" in words) == (
                minds,
                not minds,
            )

    def test_other_weights_than_the_files_are_refused(self, run, tmp_path, monkeypatch):
        from kd_lrp_plugin.evaluation.export import timm_folder

        load = timm_folder.load_folder

        def changed(folder):
            model, about = load(folder)
            with torch.no_grad():
                next(model.parameters()).add_(1e-6)
            return model, about

        monkeypatch.setattr(timm_folder, "load_folder", changed)
        with pytest.raises(ValueError, match="the same weights again"):
            export(run, ExportOptions("timm", out=tmp_path / "out"))
        assert list(tmp_path.iterdir()) == []

    def test_a_head_of_our_own_is_refused_by_name(self, run, tmp_path):
        copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("export-*"))
        summary = json.loads((copy / "summary.json").read_text())
        (copy / "summary.json").write_text(json.dumps(summary | {"timm": None}))
        result = CliRunner().invoke(app, ["export", str(copy), "--format", "timm"])
        assert result.exit_code == 1
        assert "a model of timm's" in result.output
        assert not list(copy.glob("*export*"))

    def test_a_damaged_folder_is_named(self, folder, tmp_path):
        copy = shutil.copytree(folder, tmp_path / "copy")
        (copy / "model.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match="copy: expected a model that timm builds"):
            predict(copy, ["image.png"])
        (copy / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
            predict(copy, ["image.png"])
        (copy / "config.json").write_text("{}")
        with pytest.raises(ValueError, match=r"config\.json: expected a key 'kd_lrp'"):
            predict(copy, ["image.png"])


def test_test_images_that_are_prepared_otherwise_than_is_said_are_refused(
    run, tmp_path, monkeypatch
):
    others = Phantom("test", size=8, image_size=48, transform=make_transforms(48, mean=0.4))
    monkeypatch.setattr(comparing, "load_tested_images", lambda *_: others)
    words = (
        r"test: expected that of validation, \{'mean': \[0\.5, 0\.5, 0\.5\]\}, got \{'mean': \[0\.4"
    )
    with pytest.raises(ValueError, match=words):
        export(run, ExportOptions("timm", out=tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_pytorchs_archive_has_the_same_logits_and_says_how_to_use_it(run, images, tmp_path):
    record = export(run, ExportOptions("pt2", out=tmp_path / "pt2"))
    told = {"kd_lrp.json": ""}
    program = torch.export.load(tmp_path / "pt2/student.pt2", extra_files=told)
    model, summary = loading.load_run(run)
    for n in (1, 3, 8):
        with torch.no_grad():
            found, expected = program.module()(images[:n]), model(images[:n])
        assert torch.allclose(found, expected, atol=1e-5)
    assert json.loads(told["kd_lrp.json"])["classes"] == summary["classes"]
    assert [row["model"] for row in record["models"]] == ["eager", "pt2"]
    with pytest.raises(ValueError, match="can run code when it is opened"):
        predict(tmp_path / "pt2", ["image.png"])


@pytest.mark.parametrize(
    ("asked", "words"),
    [({"format": "tflite"}, "tflite"), ({"agreement": 0.0}, "agreement"), ({"agreement": 2}, "2")],
)
def test_options_are_checked_before_anything_is_loaded(asked, words):
    with pytest.raises(ValueError, match=words):
        ExportOptions(**asked)
