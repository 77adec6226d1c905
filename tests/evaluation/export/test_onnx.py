"""A student as ONNX and in int8: the same logits, said in the file, and never unmeasured."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import KD, NO_TEACHER, SMALL, write_digits
from torch import nn
from torch.utils.data import ConcatDataset
from typer.testing import CliRunner

from kd_lrp_plugin.cli.main import app
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.evaluation.export import export as exporting
from kd_lrp_plugin.evaluation.export import student as comparing
from kd_lrp_plugin.evaluation.export.export import ExportOptions, export
from kd_lrp_plugin.evaluation.export.onnx_graph import open_session, read_metadata, to_onnx
from kd_lrp_plugin.evaluation.export.quantise import quantise
from kd_lrp_plugin.evaluation.predict import predict
from kd_lrp_plugin.runs import loading
from kd_lrp_plugin.training.trainer import distill

onnx = pytest.importorskip("onnx", reason="the extra export is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
pytest.importorskip("onnxscript", reason="the extra export is not installed")

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "kd"
    distill(RunSpec(KD, [*SMALL, *NO_TEACHER], folder, device="cpu"))
    return folder


@pytest.fixture(scope="module")
def exported(run) -> Path:
    """In its default place, with an int8 that need not be good."""
    export(run, ExportOptions(int8=True, agreement=0.01))
    return run / "export-onnx"


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.stack([image for image, _ in Phantom("test", size=8, image_size=48)])


def logits_of(file: Path, images: torch.Tensor) -> np.ndarray:
    """By onnxruntime alone."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images.numpy()})[0]


def left_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


class TestFloat:
    def test_its_logits_are_the_students_for_any_number_of_images(self, run, exported, images):
        model, _ = loading.load_run(run)
        with torch.no_grad():
            expected = model(images).numpy()
        for n in (1, 3, 8):
            found = logits_of(exported / "student.onnx", images[:n])
            np.testing.assert_allclose(found, expected[:n], atol=1e-4)  # float32, summed otherwise

    def test_its_metadata_say_how_to_use_it(self, run, exported):
        found = onnx.load(exported / "student.onnx")
        about = {entry.key: json.loads(entry.value) for entry in found.metadata_props}
        _, summary = loading.load_run(run)
        assert about["classes"] == summary["classes"]
        assert about["output"] == "logits of the classes"
        assert about["preprocessing"] == {
            **{"channels": 3, "grey": False, "bits": None, "size": [48, 48], "crop": None},
            **{"resize": [48, 48], "interpolation": "bilinear"},
            **{"mean": [0.5] * 3, "std": [0.5] * 3},
        }
        assert about["calibration"]["images"] == 8
        assert about == read_metadata(exported / "student.onnx")

    def test_it_tells_nothing_of_where_it_was_made(self, exported):
        for file in ("student.onnx", "student-int8.onnx"):
            content = (exported / file).read_bytes()
            for part in (str(ROOT), "site-packages", "kd_lrp_plugin/"):
                assert part.encode() not in content

    def test_a_graph_that_computes_something_else_is_not_written(self, run, tmp_path, monkeypatch):
        def tampered(*arguments):
            graph = to_onnx(*arguments)
            bias = next(
                t for t in graph.graph.initializer if t.name == graph.graph.node[-1].input[2]
            )
            values = onnx.numpy_helper.to_array(bias) + np.float32(0.002)
            bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
            return graph

        monkeypatch.setattr(exporting.onnx_graph, "to_onnx", tampered)
        with pytest.raises(ValueError, match=r"student\.onnx: expected logits within 0\.001"):
            export(run, ExportOptions(out=tmp_path / "out"))
        assert left_in(tmp_path) == set()

    def test_other_images_than_were_tested_are_refused(self, run, tmp_path, monkeypatch):
        copy = shutil.copytree(run, tmp_path / "run")
        text = (copy / "config.yaml").read_text()
        (copy / "config.yaml").write_text(text.replace("split: test", "split: test, seed: 7"))
        with pytest.raises(ValueError, match="expected the 8 test images"):
            export(copy, ExportOptions(out=tmp_path / "out"))
        others = [(1e4 * torch.randn(3, 48, 48), 0)] * 8
        monkeypatch.setattr(comparing, "load_tested_images", lambda *_: others)
        with pytest.raises(ValueError, match=r"expected the predictions in predictions\.csv"):
            export(run, ExportOptions(out=tmp_path / "out"))
        assert left_in(tmp_path) == {"run"}

    def test_nothing_is_overwritten(self, run, exported):
        before = {file: file.read_bytes() for file in exported.iterdir()}
        result = CliRunner().invoke(app, ["export", str(run)])
        assert result.exit_code == 1
        assert "expected a new folder" in result.output
        assert {file: file.read_bytes() for file in exported.iterdir()} == before


class Bessel(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(images).mean((2, 3))


class Counted(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([images[i].mean((1, 2)) for i in range(len(images))])


@pytest.mark.parametrize(("model", "words"), [(Bessel, "bessel_j0"), (Counted, "a fixed batch")])
def test_what_onnx_cannot_hold_is_named(model, words):
    with pytest.raises(ValueError, match=rf"export --format onnx: .*{words}"):
        to_onnx(model().eval(), (3, 8, 8))


def test_a_file_that_is_no_export_is_named(tmp_path):
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(ValueError, match=r"text\.onnx: expected a graph"):
        predict(tmp_path / "text.onnx", [tmp_path / "text.onnx"])
    onnx.save(to_onnx(nn.Flatten().eval(), (3, 4, 4)), tmp_path / "other.onnx")
    with pytest.raises(ValueError, match=r"other\.onnx: expected metadata"):
        predict(tmp_path / "other.onnx", [tmp_path / "text.onnx"])


class TestInt8:
    def test_its_figures_are_those_of_the_file(self, exported, images):
        record = json.loads((exported / "export.json").read_text())
        labels = Phantom("test", size=8, image_size=48).targets
        rows = {row["model"]: row for row in record["models"]}
        assert list(rows) == ["eager", "onnxruntime", "onnxruntime int8"]
        whole, small = (
            logits_of(exported / name, images) for name in ("student.onnx", "student-int8.onnx")
        )
        row = rows["onnxruntime int8"]
        assert row["accuracy"] == (small.argmax(1) == labels).mean()
        assert row["agreement"] == (small.argmax(1) == whole.argmax(1)).mean()
        assert row["largest_difference"] == pytest.approx(abs(small - whole).max(), rel=0.02)
        assert row["megabytes"] == (exported / "student-int8.onnx").stat().st_size / 1e6
        assert row["megabytes"] < 0.5 * rows["onnxruntime"]["megabytes"]
        assert all(row["latency_ms"] > 0 for row in rows.values())
        assert record["int8"]["calibration_images"] == 16
        assert record["int8"]["validation_images"] == 9

    def test_its_weights_are_int8_by_channel(self, exported):
        graph = onnx.load(exported / "student-int8.onnx").graph
        sizes = {tensor.name: tensor for tensor in graph.initializer}
        of_weights = [
            sizes[node.input[1]]
            for node in graph.node
            if node.op_type == "DequantizeLinear"
            and node.input[0] in sizes
            and sizes[node.input[0]].data_type == onnx.TensorProto.INT8
        ]
        assert len(of_weights) > 3
        assert all(len(scale.dims) == 1 and scale.dims[0] > 1 for scale in of_weights)

    def test_a_bound_that_is_not_reached_writes_nothing(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(exporting, "quantise", lambda *a: quantise(*a[:3], 1.01))
        with pytest.raises(ValueError, match=r"export --int8: expected an agreement of .* at best"):
            export(run, ExportOptions(int8=True, out=tmp_path / "out"))
        assert left_in(tmp_path) == set()

    def test_test_images_choose_nothing(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(exporting, "load_data_set", lambda *a: load(a[0], "test", a[2]))
        load = loading.load_data_set
        with pytest.raises(ValueError, match="to judge by, got 8 that are all test images"):
            export(run, ExportOptions("onnx", True, tmp_path / "out", 0.01))

    @pytest.mark.slow
    def test_test_images_among_those_of_validation_are_left_out(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(
            exporting,
            "load_data_set",
            lambda *a: ConcatDataset([load(a[0], "test", a[2]), load(*a)]),
        )
        load = loading.load_data_set
        record = export(run, ExportOptions("onnx", True, tmp_path / "out", 0.01))
        assert record["int8"]["validation_images"] == 9

    def test_without_a_measurement_nothing_is_written(self, run, tmp_path, monkeypatch):
        calls = []

        def measure_once(score, dataset):
            calls.append(score)
            if len(calls) > 1:
                raise OSError("the images are gone")
            return measure(score, dataset)

        measure = exporting._score_graph
        monkeypatch.setattr(exporting, "_score_graph", measure_once)
        with pytest.raises(OSError, match="gone"):
            export(run, ExportOptions(int8=True, agreement=0.01, out=tmp_path / "out"))
        assert len(calls) == 2
        assert left_in(tmp_path) == set()

    def test_as_few_layers_stay_in_float_as_the_bound_allows(self):
        """A channel a thousand times the other's drowns it, where both share a scale."""
        model = nn.Sequential(
            nn.Conv2d(1, 2, 1),
            nn.Conv2d(2, 2, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2, 2),
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            model[0].weight[0], model[0].weight[1] = 1000, 1
            model[1].weight[0, 1], model[1].weight[1, 1] = 1, 1  # the small one alone
            model[4].weight.copy_(torch.eye(2))
            model[4].bias.copy_(torch.tensor([0.0, 0.5]))
            model[4].weight[1, 1] = 0  # class 0 where the mean is above a half
        images = [np.full((1, 4, 4), value, np.float32) for value in np.linspace(0, 1, 41)]
        graph = to_onnx(model, (1, 4, 4))
        assert quantise(graph, images, images, 0.4).float_layers == 0
        found = quantise(graph, images, images, 0.95)
        assert (found.float_layers, found.layers) == (2, 3)
        assert found.agreement >= 0.95
        assert onnx.checker.check_model(found.graph) is None
        session = open_session(found.graph)
        again = session.run(None, {"images": np.stack(images)})[0].argmax(1)
        with torch.no_grad():
            expected = model(torch.from_numpy(np.stack(images))).argmax(1).numpy()
        assert (again == expected).mean() == found.agreement

    def test_other_formats_have_none(self):
        with pytest.raises(ValueError, match="--int8: expected --format onnx, got timm"):
            ExportOptions("timm", int8=True)


@pytest.mark.slow
def test_the_classes_of_subclasses_are_folded_in_the_graph(tmp_path):
    root = write_digits(tmp_path / "digits")
    config = f"""
dependencies: [kd_lrp_plugin.torchdistill]
datasets:
  train: &train !import_call
    key: kd_lrp_plugin.torchdistill.mnist
    init: {{kwargs: {{root: {root}, part: train, classes: parity, image_size: 32}}}}
  test: &test !import_call
    key: kd_lrp_plugin.torchdistill.mnist
    init: {{kwargs: {{root: {root}, split: test, classes: parity, image_size: 32}}}}
  of/train: &images !import_call
    {{key: kd_lrp_plugin.torchdistill.subclasses, init: {{kwargs: {{images: *train}}}}}}
  of/test: !import_call
    {{key: kd_lrp_plugin.torchdistill.subclasses, init: {{kwargs: {{images: *test}}}}}}
models:
  model:
    key: timm_model
    kwargs: {{name: test_resnet, num_classes: 10, timm_kwargs: {{in_chans: 1}}}}
train:
  num_epochs: 1
  train_data_loader:
    dataset_id: of/train
    sampler: {{class_or_func: !import_get {{key: torch.utils.data.RandomSampler}}}}
    kwargs: &loading {{batch_size: 8, num_workers: 0}}
  val_data_loader:
    dataset_id: of/test
    sampler: &in_order {{class_or_func: !import_get {{key: torch.utils.data.SequentialSampler}}}}
    kwargs: *loading
  model: {{forward_proc: forward_batch_only}}
  optimizer: {{key: Adam, kwargs: {{lr: 0.001}}}}
  criterion:
    key: WeightedSumLoss
    kwargs:
      sub_terms:
        ce:
          criterion: {{key: SubclassCrossEntropyLoss, kwargs: {{dataset: *images}}}}
          weight: 1.0
test:
  test_data_loader: {{dataset_id: of/test, sampler: *in_order, kwargs: *loading}}
"""
    (tmp_path / "config.yaml").write_text(config)
    distill(RunSpec(tmp_path / "config.yaml", [], tmp_path / "run", device="cpu"))
    export(tmp_path / "run", ExportOptions(out=tmp_path / "onnx"))
    export(tmp_path / "run", ExportOptions("timm", out=tmp_path / "timm"))
    about = read_metadata(tmp_path / "onnx/student.onnx")
    assert about["classes"] == ["even", "odd"]
    assert "log-sum-exp" in about["output"]
    images = torch.randn(4, 1, 32, 32)
    bare = loading.load_as_trained(tmp_path / "run", ("student",))["student"]
    with torch.no_grad():
        of_digits = bare(images).double().softmax(1).numpy()
    found = torch.from_numpy(logits_of(tmp_path / "onnx/student.onnx", images)).softmax(1)
    np.testing.assert_allclose(found[:, 1], of_digits[:, 1::2].sum(1), atol=1e-5)
    picture = Phantom("test", size=1, image_size=32).image(0)
    picture.save(tmp_path / "one.png")
    of_run, *others = (
        predict(tmp_path / name, [tmp_path / "one.png"])[0]["all"]
        for name in ("run", "onnx", "timm")
    )
    for other in others:
        assert other == pytest.approx(of_run, abs=1e-5)
