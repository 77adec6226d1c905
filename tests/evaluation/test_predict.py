"""Predictions of files, folders and tables, to a table and to maps, by whatever holds the model."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import BASELINE, SMALL
from typer.testing import CliRunner

from kd_lrp_plugin.cli.main import app
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.evaluation.export.export import ExportOptions, export
from kd_lrp_plugin.evaluation.predict import MapWriter, check_new, list_images, predict
from kd_lrp_plugin.evaluation.predictors import open_predictor
from kd_lrp_plugin.runs import loading
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.runs.predictions import read_predictions
from kd_lrp_plugin.training.trainer import distill
from kd_lrp_plugin.utils.progress import NullProgress


def made(*steps: str) -> str:
    """A Compose of torchvision's in YAML, of steps such as "Resize: size=40"."""
    calls = ", ".join(
        f"!import_call {{key: torchvision.transforms.{name}, init: {{kwargs: {{{kwargs}}}}}}}"
        for name, _, kwargs in (step.partition("=") for step in steps)
    )
    kwargs = f"{{transforms: [{calls}]}}"
    return f"!import_call {{key: torchvision.transforms.Compose, init: {{kwargs: {kwargs}}}}}"


CROPPED = made(
    "Resize=size: 60",
    "CenterCrop=size: [48, 48]",
    "ToTensor=",
    "Normalize=mean: [0.4, 0.5, 0.6], std: [0.2, 0.3, 0.4]",
)


def trained(folder: Path, transform: str | None = None) -> Path:
    changes = [*SMALL]
    if transform:
        sets = ("val", "test")
        changes += [f"+datasets.phantom/{s}.init.kwargs.transform={transform}" for s in sets]
    distill(RunSpec(BASELINE, changes, folder, device="cpu"))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "ce")


@pytest.fixture(scope="module")
def cropped(tmp_path_factory) -> Path:
    """A run whose images are cut, with a mean and deviation of its own for each channel."""
    return trained(tmp_path_factory.mktemp("cropped") / "run", CROPPED)


@pytest.fixture
def scans(tmp_path) -> Path:
    """Four images, two of them deeper, and what is none."""
    for number, file in enumerate(("a.png", "b.jpg", "deep/c.png", "deep/er/a.png")):
        (tmp_path / "scans" / file).parent.mkdir(parents=True, exist_ok=True)
        Phantom("test", size=4, image_size=64).image(number).save(tmp_path / "scans" / file)
    (tmp_path / "scans/notes.txt").write_text("no image")
    (tmp_path / "scans/.hidden.png").write_text("no image")
    return tmp_path / "scans"


class Heard(NullProgress):
    def __init__(self) -> None:
        self.tracked: list[tuple[str, int]] = []
        self.notes: list[str] = []

    def track(self, items, what, total):
        self.tracked.append((what, total))
        return items

    def note(self, text):
        self.notes.append(text)


def kd_lrp(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["predict", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


class TestInputs:
    def test_a_folder_is_all_its_images_at_any_depth(self, scans):
        with Heard() as heard:
            found = list_images([scans])
        names = ["a.png", "b.jpg", "deep/c.png", "deep/er/a.png"]
        assert [str(file.relative_to(scans)) for file in found] == names
        assert heard.notes == [
            f"{scans}: 4 images; 2 not read, hidden or without the ending of an image"
        ]

    def test_files_folders_and_tables_together_name_each_image_once(self, scans):
        (scans / "who.csv").write_text("patient;file\n1;deep/c.png\n2;b.jpg\n")
        found = list_images([scans / "b.jpg", scans / "who.csv", scans / "deep"])
        assert found == [scans / "b.jpg", scans / "deep/c.png", scans / "deep/er/a.png"]

    def test_a_table_may_name_its_column(self, scans):
        (scans / "who.tsv").write_text("Image Name\tage\na.png\t50\n")
        assert list_images([scans / "who.tsv"], "Image Name") == [scans / "a.png"]
        with pytest.raises(ValueError, match=r"who\.tsv: expected a column 'file', got \['Image"):
            list_images([scans / "who.tsv"])

    @pytest.mark.parametrize("text", ["file\n", "file,age\n,5\n"])
    def test_a_table_without_files_is_named(self, text, scans):
        (scans / "who.csv").write_text(text)
        with pytest.raises(ValueError, match=r"who\.csv: expected a file in each row"):
            list_images([scans / "who.csv"])

    def test_a_folder_without_images_and_what_is_not_there_are_named(self, tmp_path):
        with pytest.raises(ValueError, match="expected images, got none"):
            list_images([tmp_path])
        with pytest.raises(FileNotFoundError, match="nowhere"):
            list_images([tmp_path / "nowhere"])


class TestOutputs:
    def test_images_that_would_come_in_another_size_than_was_tested_are_refused(
        self, run, scans, tmp_path
    ):
        copy = shutil.copytree(run, tmp_path / "run")
        summary = json.loads((copy / "summary.json").read_text())
        summary["preprocessing"]["image_size"] = 32  # as a first stage may have it
        (copy / "summary.json").write_text(json.dumps(summary))
        with pytest.raises(ValueError, match=r"got \[3, 32, 32\], tested as \[3, 48, 48\]"):
            predict(copy, list_images([scans]))

    def test_the_table_has_every_probability_and_says_what_they_are_worth(self, run, scans):
        out = scans.parent / "made/p.csv"
        status, shown = kd_lrp(run, scans, "--out", out)
        assert status == 0, shown
        with out.open() as lines:
            rows = list(csv.DictReader(lines))
        model, summary = loading.load_run(run)
        prepare = loading.load_transform(run)
        assert len(rows) == 4
        for row in rows:
            with torch.no_grad():
                image = prepare(Image.open(row["file"]).convert("RGB"))
                expected = model(image[None])[0].softmax(0)
            found = [float(row[f"probability: {name}"]) for name in summary["classes"]]
            np.testing.assert_allclose(found, expected, atol=1e-5)
            assert row["class"] == summary["classes"][int(expected.argmax())]
            assert float(row["probability"]) == max(found)
            assert row["problem"] == ""
        about = json.loads(out.with_suffix(".json").read_text())["calibration"]
        tested = read_predictions(RunFolder(run))
        confidence = tested.probabilities["student"].max(1)
        right = tested.probabilities["student"].argmax(1) == tested.labels
        bins = np.minimum((confidence * 15).astype(int), 14)
        expected = sum(
            abs(confidence[bins == k].mean() - right[bins == k].mean()) * (bins == k).mean()
            for k in set(bins)
        )
        assert about["calibration_error"] == pytest.approx(expected, abs=1e-6)
        assert f"calibration error {expected:.3f}" in shown
        assert about["method"] == "softmax, temperature 1"

    def test_nothing_is_overwritten_and_nothing_begun(self, run, scans, tmp_path):
        for name in ("p.csv", "p.json"):
            (tmp_path / name).write_text("mine")
            status, shown = kd_lrp(run, scans, "--out", tmp_path / "p.csv")
            assert status == 1
            assert "expected a new file" in shown
            assert (tmp_path / name).read_text() == "mine"
            (tmp_path / name).unlink()
        assert kd_lrp(run, scans, "--out", tmp_path / "p.txt")[0] == 1
        status, shown = kd_lrp(run, scans, "--maps", scans)
        assert status == 1
        assert "expected a new folder" in shown

    def test_an_output_in_a_file_is_refused_before_anything_is_predicted(self, scans, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(NotADirectoryError, match=r"predict --out: expected a path in a folder"):
            check_new(tmp_path / "file/deep/p.csv")
        with pytest.raises(NotADirectoryError, match=r"predict --maps: expected a path in a"):
            MapWriter(tmp_path / "file/maps", None)
        (tmp_path / "dangling").symlink_to("nowhere")
        with pytest.raises(FileExistsError, match=r"predict --maps: expected a new folder"):
            MapWriter(tmp_path / "dangling", None)

    def test_an_image_whose_name_is_as_long_as_can_be_has_a_map(self, run, scans, tmp_path):
        (scans / "a.png").rename(scans / f"{'é' * 120}.png")
        status, shown = kd_lrp(run, scans, "--maps", tmp_path / "maps")
        assert status == 0, shown
        assert len(list((tmp_path / "maps").iterdir())) == 4

    def test_an_image_that_cannot_be_read_is_named_and_the_others_predicted(self, run, scans):
        (scans / "c.png").write_text("no image")
        status, shown = kd_lrp(run, scans, "--out", scans.parent / "p.csv")
        assert status == 1
        assert "c.png: expected an image, got not an image" in shown
        with (scans.parent / "p.csv").open() as lines:
            rows = list(csv.DictReader(lines))
        assert [bool(row["problem"]) for row in rows] == [False, False, True, False, False]
        assert not rows[2]["class"]

    def test_there_is_one_progress_bar(self, run, scans):
        files = list_images([scans])
        model = open_predictor(run)
        with Heard() as heard:
            predict(model, files)
        assert heard.tracked == [("predicting", 4)]

    @pytest.mark.parametrize("method", ["grad_cam", "lrp_zplus"])
    def test_maps_are_a_picture_for_each_image(self, method, run, scans, tmp_path):
        words = ("--maps", tmp_path / "maps", "--method", method, "--out", tmp_path / "p.csv")
        status, shown = kd_lrp(run, scans, *words)
        assert status == 0, shown
        with (tmp_path / "p.csv").open() as lines:
            named = [row["map"] for row in csv.DictReader(lines)]
        assert sorted(named) == sorted(file.name for file in (tmp_path / "maps").iterdir())
        assert len(set(named)) == 4
        assert all(Image.open(tmp_path / "maps" / name).size[0] > 300 for name in named)

    def test_an_unknown_method_is_refused_before_anything_is_written(self, run, scans, tmp_path):
        status, shown = kd_lrp(run, scans, "--maps", tmp_path / "maps", "--method", "grad_cat")
        assert status == 1
        assert "grad_cam" in shown
        assert not (tmp_path / "maps").exists()


@pytest.mark.slow
class TestWhateverHoldsTheModel:
    def test_all_say_the_same_with_any_preprocessing(self, run, cropped, scans, tmp_path):
        onnx = pytest.importorskip("onnxscript", reason="the extra export is not installed")
        assert onnx
        for number, folder in enumerate((run, cropped)):
            export(folder, ExportOptions(out=tmp_path / f"onnx{number}"))
            export(folder, ExportOptions("timm", out=tmp_path / f"timm{number}"))
            files = list_images([scans])
            expected = predict(folder, files)
            for name in (f"onnx{number}", f"onnx{number}/student.onnx", f"timm{number}"):
                found = predict(tmp_path / name, files)
                for one, other in zip(found, expected, strict=True):
                    assert one["all"] == pytest.approx(other["all"], abs=1e-5)
            status, shown = kd_lrp(tmp_path / f"onnx{number}", scans, "--maps", tmp_path / "maps")
            assert status == 1
            assert "has no gradients" in shown
        status, shown = kd_lrp(tmp_path / "timm1", scans, "--maps", tmp_path / "maps")
        assert status == 0, shown
        assert len(list((tmp_path / "maps").iterdir())) == 4

    def test_the_bits_that_a_config_states_hold_with_a_transform_of_its_own(
        self, cropped, tmp_path
    ):
        copy = shutil.copytree(cropped, tmp_path / "run")
        text = (copy / "config.yaml").read_text()
        assert loading.load_preparation(copy)[0] is None
        (copy / "config.yaml").write_text(text.replace("split: val", "split: val, bits: 12"))
        assert loading.load_preparation(copy)[0] == 12
        assert loading.load_policy(copy)["bits"] == 12

    def test_preprocessing_that_cannot_be_written_down_is_refused_by_name(self, cropped, tmp_path):
        copy = shutil.copytree(cropped, tmp_path / "run")
        text = (copy / "config.yaml").read_text()
        changed = text.replace("transforms.CenterCrop", "transforms.RandomCrop")
        assert changed != text
        (copy / "config.yaml").write_text(changed)
        with pytest.raises(ValueError, match="that can be written down, got RandomCrop"):
            export(copy, ExportOptions("pt2", out=tmp_path / "out"))
        assert not (tmp_path / "out").exists()
