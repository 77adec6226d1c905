"""Grey images in one channel, from training to every command that uses the run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import BASELINE, CPU, LRP, SMALL

from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.evaluation import evaluate, predict
from kd_lrp_plugin.evaluation.audit import AuditOptions, audit
from kd_lrp_plugin.evaluation.explain import explain
from kd_lrp_plugin.evaluation.explain_inputs import ExplainOptions
from kd_lrp_plugin.models.factory import build_model
from kd_lrp_plugin.plots.maps import MapRow, map_figure
from kd_lrp_plugin.runs import loading
from kd_lrp_plugin.selection.select import Selection
from kd_lrp_plugin.selection.spec import SelectionSpec
from kd_lrp_plugin.torchdistill import models
from kd_lrp_plugin.training import trainer
from kd_lrp_plugin.training.check.dry_run import check

GREY_DATA = [f"+datasets.phantom/{s}.init.kwargs.channels=1" for s in ("train", "val", "test")]
GREY_MODELS = [
    f"+models.{role}_model.kwargs.timm_kwargs={{in_chans: 1}}" for role in ("teacher", "student")
]
ONE = {"key": "timm_model", "kwargs": {"name": "test_resnet", "timm_kwargs": {"in_chans": 1}}}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A student after one epoch with relevance maps of a teacher with random weights."""
    folder = tmp_path_factory.mktemp("grey") / "run"
    teacher = folder.parent / "teacher.pt"
    torch.save(build_model("resnet10t", 4, timm_kwargs={"in_chans": 1}).state_dict(), teacher)
    weights = f"models.teacher_model.src_ckpt={teacher}"
    overrides = [*SMALL, weights, *GREY_DATA, *GREY_MODELS]
    trainer.distill(RunSpec(LRP, overrides, folder, device="cpu"))
    return folder


def test_the_summary_says_so_and_the_weights_are_of_one_channel(run):
    model, summary = loading.load_run(run)
    assert summary["image_shape"] == [1, 48, 48]
    assert summary["preprocessing"]["channels"] == 1
    first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    assert first.in_channels == 1


@pytest.mark.slow
def test_evaluation_costs_it_with_one_channel(run):
    cost = evaluate.evaluate(run, 100)["student"]["cost"]
    model, _ = loading.load_run(run)
    first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    outputs = {}
    first.register_forward_hook(lambda _, __, output: outputs.update(shape=output.shape))
    with torch.no_grad():
        model(torch.zeros(1, 1, 48, 48))
    of_first = outputs["shape"].numel() * first.weight[0].numel()
    assert cost["parameters"] == sum(p.numel() for p in model.parameters())
    assert first.weight[0].numel() == first.kernel_size[0] * first.kernel_size[1]
    assert of_first < cost["macs"]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_prediction_reads_any_file_as_training_did(run, tmp_path, mode):
    data = Phantom("test", size=1, image_size=48, channels=1)
    data.image(0).convert(mode).save(tmp_path / "one.png")
    (record,) = predict.predict(run, [tmp_path / "one.png"])
    model, _ = loading.load_run(run)
    with torch.no_grad():
        expected = model(data[0][0][None])[0].softmax(0)
    np.testing.assert_allclose(list(record["all"].values()), expected, atol=1e-6)


@pytest.mark.slow
def test_methods_that_change_the_image_explain_it(run, tmp_path):
    methods = ["lime", "score_cam", "lrp_zplus"]
    explain([run], ExplainOptions(methods=methods, samples=1, n=1, out=tmp_path / "out"))
    written = (run / "explanations.json").read_text()
    assert all(f'"{method}"' in written for method in methods)
    assert (run / "explanations.png").is_file()
    Phantom("test", size=1, image_size=48).image(0).save(tmp_path / "one.png")
    explain([run], ExplainOptions(images=[tmp_path / "one.png"], methods=["lime"]))


def test_it_is_audited(run):
    assert audit(run, AuditOptions(samples=4))
    assert (run / "audit.json").is_file()


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (GREY_DATA, "expected images of 3 channels, got 1. Set channels: 3 of the data sets, or"),
        (
            ["+models.model.kwargs.timm_kwargs={in_chans: 1}"],
            "expected images of 1 channels, got 3. Set channels: 1 of the data sets, or "
            "timm_kwargs: {in_chans: 3} of models.model.kwargs.",
        ),
    ],
)
def test_other_channels_than_those_of_the_model_are_refused_before_training(overrides, hint):
    report = check(resolve_config(BASELINE, [*SMALL, *overrides]), CPU)
    assert len(report.problems) == 1
    assert hint in str(report.problems[0])


def test_students_to_choose_from_take_the_channels_of_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = {**ONE, "kwargs": {**ONE["kwargs"], "num_classes": 4}}
    asked = {
        "num_classes": 4,
        "record": "choice.json",
        "data": Phantom(size=8, image_size=32, channels=1),
        "teacher": teacher,
        "batch_size": 4,
    }
    for number, candidates in enumerate([["test_resnet", teacher], {"width": [0.25, 0.35]}]):
        kwargs = {**asked, "candidates": candidates, "record": f"choice{number}.json"}
        records = Selection(SelectionSpec.from_kwargs(**kwargs), models.make_builder).rank()
        assert [record["problem"] for record in records] == [None, None]
        student = models.diswot_student(**kwargs)
        assert student(torch.zeros(2, 1, 32, 32)).shape == (2, 4)
        again = models.diswot_student(**{**kwargs, "data": None})  # from the record alone
        assert again(torch.zeros(2, 1, 32, 32)).shape == (2, 4)


def test_a_picture_of_one_channel_is_shown_grey():
    image = np.linspace(0, 1, 64).reshape(8, 8)
    figures = [
        map_figure([MapRow("a", picture, {"student": np.eye(2)})])
        for picture in (image, image[..., None])
    ]
    shown = [np.asarray(f.get_axes()[0].get_images()[0].get_array()) for f in figures]
    assert np.array_equal(*shown)
    assert shown[0].shape == (8, 8, 3)


def test_a_transform_of_ones_own_is_built_again_for_prediction(tmp_path):
    steps = ", ".join(
        f"!import_call {{key: torchvision.transforms.{name}, init: {{kwargs: {{{kwargs}}}}}}}"
        for name, kwargs in {
            "Grayscale": "",
            "Resize": "size: 40",
            "ToTensor": "",
            "Normalize": "mean: [0.3], std: [0.2]",
        }.items()
    )
    kwargs = f"{{transforms: [{steps}]}}"
    made = f"!import_call {{key: torchvision.transforms.Compose, init: {{kwargs: {kwargs}}}}}"
    overrides = [
        *SMALL,
        *(f"+datasets.phantom/{s}.init.kwargs.transform={made}" for s in ("train", "val", "test")),
        "datasets.phantom/train.init.kwargs.augment=False",
        "+models.model.kwargs.timm_kwargs={in_chans: 1}",
    ]
    trainer.distill(RunSpec(BASELINE, overrides, tmp_path / "run", device="cpu"))
    data = Phantom("test", size=1, image_size=48)
    data.image(0).save(tmp_path / "one.png")
    (record,) = predict.predict(tmp_path / "run", [tmp_path / "one.png"])
    model, summary = loading.load_run(tmp_path / "run")
    assert summary["preprocessing"] is None
    grey = data.image(0).convert("L").resize((40, 40), Image.Resampling.BILINEAR)
    tensor = (torch.from_numpy(np.asarray(grey) / np.float32(255)) - 0.3) / 0.2
    with torch.no_grad():
        expected = model(tensor[None, None])[0].softmax(0)
    np.testing.assert_allclose(list(record["all"].values()), expected, atol=1e-5)
