"""Finished runs: weights that timm loads alone, predictions, the full evaluation."""

import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_runs import BASELINE, KD, NO_TEACHER, SMALL
from typer.testing import CliRunner

from kd_lrp_plugin.cli.main import app
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.evaluation import evaluate, predict
from kd_lrp_plugin.metrics.classification import classification_metrics
from kd_lrp_plugin.runs import loading, predictions
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.training import trainer

DROPOUT = "+models.student_model.kwargs.dropout=0.25"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A student and a teacher with random weights, after one epoch."""
    folder = tmp_path_factory.mktemp("runs") / "kd"
    trainer.distill(RunSpec(KD, [*SMALL, *NO_TEACHER, DROPOUT], folder, device="cpu"))
    return folder


class TestWeights:
    def test_timm_loads_them_alone(self, run):
        model, summary = loading.load_run(run)
        alone = timm.create_model(
            **summary["timm"], checkpoint_path=str(run / "student.safetensors")
        ).eval()
        images = torch.randn(2, 3, 48, 48)
        with torch.no_grad():
            assert torch.equal(alone(images), model(images))
        assert alone.drop_rate == 0.25

    def test_a_head_of_our_own_is_said_not_to_be_for_timm(self, tmp_path):
        head = ["+models.model.kwargs.head=mlp"]
        summary = trainer.distill(
            RunSpec(BASELINE, [*SMALL, *head], tmp_path / "run", device="cpu")
        )
        assert summary["timm"] is None


def test_variants_of_an_image_count_as_one_image(tmp_path):
    marked = BASELINE.parents[2] / "phantom_marked/kd/test_resnet_from_resnet10t.yaml"
    trainer.distill(RunSpec(marked, [*SMALL, *NO_TEACHER], tmp_path / "run", device="cpu"))
    read = predictions.read_predictions(RunFolder(tmp_path / "run"))
    variants = list(dict.fromkeys(read.groups))
    assert len(variants) > 1
    images = [f"test 0 {index}" for index in range(8)]
    assert list(zip(read.groups, read.images, strict=True)) == [*product(variants, images)]
    found = evaluate.evaluate(tmp_path / "run")["student"]
    values, names = read.probabilities["student"], read.outputs
    expected = classification_metrics(values, read.labels, names, images=read.images)
    assert found["accuracy_interval"] == expected["accuracy_interval"]
    assert found["n"] == 8 * len(variants)


def test_a_choice_in_a_summary_runs_no_code(run, tmp_path):
    """A run folder of somebody else, with --safe."""
    folder = shutil.copytree(run, tmp_path / "run")
    (tmp_path / "hub").mkdir()
    code = f"def net(): open({str(tmp_path / 'broken in')!r}, 'w')"
    (tmp_path / "hub/hubconf.py").write_text(code)
    summary = json.loads((folder / "summary.json").read_text())
    hub = {"repo_or_dir": str(tmp_path / "hub"), "key": "net", "kwargs": {"source": "local"}}
    (folder / "summary.json").write_text(json.dumps(summary | {"student": hub}))
    with pytest.raises(ValueError, match=r"models\.student\.key: .* got 'net'"):
        loading.load_run(folder, safe=True)
    assert not (tmp_path / "broken in").exists()


class TestPredict:
    def test_a_file_gets_what_the_student_says(self, run, tmp_path):
        data = Phantom("test", size=2, image_size=48)
        data.image(0).save(tmp_path / "one.png")
        (record,) = predict.predict(run, [tmp_path / "one.png"])
        model, summary = loading.load_run(run)
        with torch.no_grad():
            expected = model(data[0][0][None])[0].softmax(0)
        assert list(record["all"]) == summary["classes"]
        assert torch.allclose(torch.tensor(list(record["all"].values())), expected, atol=1e-5)

    def test_a_file_that_is_no_image_and_a_folder_that_is_no_run_are_named(self, run, tmp_path):
        (tmp_path / "text.png").write_text("no image")
        with pytest.raises(ValueError, match=r"text\.png"):
            predict.predict(run, [tmp_path / "text.png"])
        with pytest.raises(FileNotFoundError, match="nowhere"):
            predict.predict("nowhere", [tmp_path / "text.png"])


class TestAHeadWiderThanTheClasses:
    def test_an_output_beyond_them_that_wins_has_a_name(self, tmp_path):
        wide = ["models.model.kwargs.num_classes=5"]
        trainer.distill(RunSpec(BASELINE, [*SMALL, *wide], tmp_path / "run", device="cpu"))
        Phantom("test", size=2, image_size=48).image(0).save(tmp_path / "one.png")
        model, summary = loading.load_run(tmp_path / "run")
        state = torch.load(tmp_path / "run/best.pt", weights_only=True)
        state["model"]["fc.bias"][4] = 50.0
        torch.save(state, tmp_path / "run/best.pt")
        about = json.loads((tmp_path / "run/environment.json").read_text())
        del about["outputs"]
        (tmp_path / "run/environment.json").write_text(json.dumps(about))
        (record,) = predict.predict(tmp_path / "run", [tmp_path / "one.png"])
        assert record["class"] == "output 4"
        assert record["probability"] == pytest.approx(1)
        assert list(record["all"]) == [*summary["classes"], "output 4"]
        assert model.fc.out_features == 5


class TestEvaluate:
    def test_its_figures_are_those_of_the_predictions(self, run):
        costs: dict = {}
        record = evaluate.evaluate(run, 200, costs=costs)
        summary = json.loads((run / "summary.json").read_text())
        assert record["student"]["accuracy"] == pytest.approx(summary["test_accuracy"])
        assert record["student"]["cost"]["parameters"] == summary["parameters"]
        assert record["teacher"]["cost"]["parameters"] == 4_924_540
        found = predictions.read_predictions(RunFolder(run))
        labels, values = found.labels, found.probabilities
        alike = (values["student"].argmax(1) == values["teacher"].argmax(1)).mean()
        assert record["student_and_teacher"]["agreement"] == pytest.approx(alike)
        written = json.loads((run / "evaluation.json").read_text())
        assert {**record, "command": None, **RunFolder(run).of} == written
        assert len(labels) == 8
        for known in costs.values():  # of an architecture that was measured before
            known["latency_ms_batch_1"] = 123.0
        again = evaluate.evaluate(run, 200, costs=costs)
        for role in ("student", "teacher"):
            assert again[role]["cost"]["latency_ms_batch_1"] == 123.0
        precisions = [of["precision"] for of in record["student"]["per_class"]]
        known_ones = [p for p in precisions if p is not None]
        assert record["student"]["macro_precision"] == pytest.approx(np.mean(known_ones))
        for name in ("confusion.png", "reliability.png"):
            assert (run / name).read_bytes().startswith(b"\x89PNG")

    def test_its_teacher_is_the_teacher_of_the_run(self, run):
        """The probabilities in predictions.csv, against both models by themselves."""
        found = predictions.read_predictions(RunFolder(run))
        labels, values = found.labels, found.probabilities
        data = Phantom("test", size=8, image_size=48)
        model, _ = loading.load_run(run)
        images = torch.stack([image for image, _ in data])
        with torch.no_grad():
            expected = model(images).softmax(1).numpy()
        np.testing.assert_allclose(values["student"], expected, atol=1e-6)
        assert labels.tolist() == data.targets
        assert not np.allclose(values["teacher"], values["student"], atol=1e-3)

    @pytest.mark.parametrize("classes", [2, 3])
    def test_sets_of_few_classes_work(self, classes, tmp_path):
        names = ["benign", "malignant", "other"][:classes]
        for split in ("Training", "Testing"):
            for name in names:
                folder_of_class = tmp_path / "set" / split / name
                folder_of_class.mkdir(parents=True)
                for number in range(10):
                    noise = np.random.default_rng(number).integers(0, 255, (48, 48), np.uint8)
                    Image.fromarray(noise).save(folder_of_class / f"{number}.png")
        overrides = [s for s in SMALL if not s.startswith("datasets")]
        kwargs = f"root: {tmp_path}/set, image_size: 48"
        for name, split in {"train": "Training", "val": "Training", "test": "Testing"}.items():
            overrides.append(
                f"datasets.phantom/{name}=!import_call {{key: "
                f"kd_lrp_plugin.torchdistill.folder_images, init: {{kwargs: {{{kwargs}, "
                f"split: {split}}}}}}}"
            )
        overrides.append(f"models.model.kwargs.num_classes={classes}")
        trainer.distill(RunSpec(BASELINE, overrides, tmp_path / "run", device="cpu"))
        found = evaluate.evaluate(tmp_path / "run", 200)["student"]
        assert [row["class"] for row in found["per_class"]] == names
        assert found["n"] == 10 * classes
        assert 0 <= found["macro_auc"] <= 1
        header, first, *_ = (tmp_path / "run/predictions.csv").read_text().splitlines()
        assert header == "image,label," + ",".join(f"student: {name}" for name in names)
        assert first.startswith("benign/0.png,benign,")

    def test_outputs_go_by_number_where_the_data_names_no_classes(self, tmp_path):
        overrides = [*SMALL, "models.model.kwargs.num_classes=3"]
        for split, size in {"train": 16, "val": 9, "test": 8}.items():
            kwargs = f"size: {size}, image_size: [3, 48, 48], num_classes: 3"
            overrides.append(
                f"datasets.phantom/{split}=!import_call {{key: torchvision.datasets.FakeData, "
                f"init: {{kwargs: {{{kwargs}, transform: !import_call {{key: "
                "torchvision.transforms.ToTensor, init: {}}}}}"
            )
        overrides = [s for s in overrides if "init.kwargs.size" not in s]
        trainer.distill(RunSpec(BASELINE, overrides, tmp_path / "run", device="cpu"))
        found = evaluate.evaluate(tmp_path / "run", 200)["student"]
        assert [row["class"] for row in found["per_class"]] == ["0", "1", "2"]
        # Its transform is the config's own, and built from there.
        pixels = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "one.png")
        (record,) = predict.predict(tmp_path / "run", [tmp_path / "one.png"])
        model, summary = loading.load_run(tmp_path / "run")
        assert summary["preprocessing"] is None
        with torch.no_grad():
            tensor = torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1)
            expected = model(tensor[None])[0].softmax(0)
        np.testing.assert_allclose(list(record["all"].values()), expected, atol=1e-6)

    def test_the_command_prints_a_row_per_model_of_a_studys_runs(self, run, tmp_path):
        row = {"configuration": "KD", "point": {}, "seed": 0, "state": "finished"}
        content = {"runs": [{**row, "folder": str(run)}]}
        (tmp_path / "study.json").write_text(json.dumps(content))
        result = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--resamples", "100"])
        assert result.exit_code == 0, result.output
        assert "95 % interval" in result.output
        assert "prediction agreement of student and teacher" in result.output
        assert result.output.count("| student |") == 1
        assert result.output.count("| teacher |") == 1

    def test_an_unfinished_run_is_named(self, tmp_path):
        result = CliRunner().invoke(app, ["evaluate", str(tmp_path)])
        assert result.exit_code == 1
        assert "a finished run, got none" in result.output
