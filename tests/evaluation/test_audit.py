"""What regions are worth to a model: against models that look at one region alone, by design."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import CONFIGS, SMALL
from torch import nn
from typer.testing import CliRunner

from kd_lrp_plugin.cli.main import app
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.data.shortcuts import Marked
from kd_lrp_plugin.evaluation import audit, audit_inputs
from kd_lrp_plugin.evaluation.audit import (
    AuditOptions,
    ask,
    find_markers,
    find_most_relevant,
    find_regions,
    measure_relevance,
    measure_replacements,
    replace_region,
)
from kd_lrp_plugin.evaluation.explain_inputs import ExplainOptions, LoadedRun
from kd_lrp_plugin.evaluation.predict import predict
from kd_lrp_plugin.models.factory import build_model
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.runs.predictions import read_predictions
from kd_lrp_plugin.training.trainer import distill

MARKED = CONFIGS / "phantom_marked/kd/test_resnet_from_resnet10t.yaml"


class LooksAt(nn.Module):
    """Says class 1 where the mean of some pixels is above a half."""

    def __init__(self, pixels: torch.Tensor) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        brightness = images.mean(1)[:, self.pixels].mean(1)
        return torch.stack([0.5 - brightness, brightness - 0.5], 1)


@pytest.fixture
def scene() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images whose corner and whose middle tell the class; the middle's mask."""
    labels = torch.arange(16) % 2
    images = torch.zeros(16, 1, 32, 32)
    images[:, :, :4, :4] = labels[:, None, None, None].float()
    images[:, :, 12:20, 12:20] = 0.2 + 0.8 * labels[:, None, None, None].float()
    mask = torch.zeros(16, 32, 32, dtype=torch.bool)
    mask[:, 12:20, 12:20] = True
    return images, labels, mask


def test_regions_are_where_they_are_said_to_be(scene):
    images, _, mask = scene
    regions = find_regions(images[::2])  # of class 0: the middle alone is bright
    assert regions["border"][0].sum() == 32 * 32 - 24 * 24
    assert regions["corners"][0].sum() == 4 * 8 * 8
    assert torch.equal(~regions["background"], mask[::2])
    assert not find_regions(torch.zeros(1, 3, 16, 16))["background"].any()


@pytest.mark.parametrize("how", ["blur", "mean", "swap"])
def test_only_the_region_is_replaced(how):
    images = torch.rand(3, 2, 16, 16)
    region = torch.rand(3, 16, 16) > 0.5
    changed = replace_region(images, region, how)
    kept = ~region[:, None].expand_as(images)
    assert torch.equal(changed[kept], images[kept])
    assert not torch.equal(changed, images)


def test_a_model_that_looks_at_a_corner_changes_its_mind_and_one_that_does_not_does_not(scene):
    images, labels, mask = scene
    regions = find_regions(images)
    corner = torch.zeros(32, 32, dtype=torch.bool)
    corner[:4, :4] = True
    fell = measure_replacements(ask(LooksAt(corner), images, regions), labels, regions)
    sound = measure_replacements(ask(LooksAt(mask[0]), images, regions), labels, regions)
    assert fell["corners"]["swap"] == {"accuracy_before": 1, "accuracy": 0, "flips": 1}
    assert fell["corners"]["mean"]["accuracy"] == 0.5
    for of_region in (sound["corners"], sound["border"]):
        assert all(of["flips"] == 0 and of["accuracy"] == 1 for of in of_region.values())


def test_relevance_is_compared_with_chance(scene):
    images, _, _ = scene
    maps = torch.zeros(16, 32, 32)
    maps[:, 0, 0] = 1
    found = measure_relevance(maps, find_regions(images))
    assert found["corners"] == {"mean": 1.0, "chance": 0.25, "n": 16}
    even = measure_relevance(torch.ones(16, 32, 32), find_regions(images))
    assert even["border"]["mean"] == pytest.approx(even["border"]["chance"])


def test_a_marker_that_is_everywhere_is_no_region():
    for kind, found in {"diffuse": False, "frame": True}.items():
        marked = Marked(Phantom("test", size=4, image_size=32), kind, variants=["random", "none"])
        run = SimpleNamespace(test_set=marked, summary={"image_shape": [3, 32, 32]})
        assert [bool(m.any()) for m in find_markers(run, range(8))] == [found] * 4 + [False] * 4


def test_the_most_relevant_pixels_are_chosen_among_those_that_are_allowed():
    draw = torch.Generator().manual_seed(0)
    maps = torch.rand(3, 8, 8, generator=draw) - 0.3
    where = torch.rand(3, 8, 8, generator=draw) > 0.5
    chosen = find_most_relevant(maps, where, share=10 / 64)
    for one, allowed, picked in zip(maps, where, chosen, strict=True):
        pixels = [(float(one[i, j]), i, j) for i in range(8) for j in range(8) if allowed[i, j]]
        expected = {(i, j) for value, i, j in sorted(pixels)[-10:] if value > 0}
        assert {(i, j) for i, j in picked.nonzero().tolist()} == expected
    assert not find_most_relevant(-torch.ones(1, 4, 4), torch.ones(1, 4, 4) > 0).any()


def test_the_command_audits_a_run_and_fails_where_it_is_told_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": build_model("resnet10t", 4).state_dict()}, "teacher.pt")
    changes = (*SMALL, "models.teacher_model.src_ckpt=teacher.pt")
    sets = [word for change in changes for word in ("--set", change)]
    run = CliRunner().invoke(app, ["distill", str(MARKED), *sets, "--out", "run"])
    assert run.exit_code == 0, run.output
    shown = CliRunner().invoke(app, ["audit", "run", "--samples", "8"])
    assert shown.exit_code == 0, shown.output
    found = json.loads((tmp_path / "run/audit.json").read_text())
    assert set(found["relevance"]) == {"student", "teacher"}
    outside = "most relevant outside"
    named = {"border", "corners", "background", "marker", outside}
    assert named == set(found["replaced"]["student"])
    assert named | {"outside the mask"} == set(found["relevance"]["student"])
    shares = [of["chance"] for role in found["relevance"].values() for of in [role[outside]]]
    assert all(0 < share <= 1 / 16 for share in shares)
    assert (tmp_path / "run/audit.png").stat().st_size > 5000
    study = {"runs": [{"configuration": "KD", "point": {}, "seed": 0, "state": "finished"}]}
    study["runs"][0]["folder"] = "run"
    (tmp_path / "study").mkdir()
    (tmp_path / "study/study.json").write_text(json.dumps(study))
    (tmp_path / "run/audit.json").unlink()
    shown = CliRunner().invoke(app, ["audit", "study", "--samples", "8"])
    assert shown.exit_code == 0, shown.output
    again = json.loads((tmp_path / "run/audit.json").read_text())
    assert again["replaced"] == found["replaced"]
    monkeypatch.setattr(audit, "audit", lambda *_: found | {"most_flips": 0.25})
    for limit, status in {"0": 1, "0.24": 1, "0.25": 0, "1": 0}.items():
        strict = CliRunner().invoke(app, ["audit", "run", "--fail-over", limit])
        assert strict.exit_code == status, strict.output
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    missing = CliRunner().invoke(app, ["audit", "nowhere"])
    assert missing.exit_code == 1
    assert "a finished run" in missing.output


@pytest.mark.slow
def test_a_run_on_cropped_images_predicts_and_is_audited_on_cropped_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": build_model("resnet10t", 4).state_dict()}, "teacher.pt")
    crop = "!import_call {key: torchvision.transforms.CenterCrop, init: {kwargs: {size: 40}}}"
    changes = [*SMALL, "models.teacher_model.src_ckpt=teacher.pt"] + [
        f"+datasets.phantom_marked/{part}.init.kwargs.transform={crop}"
        for part in ("train", "val", "test")
    ]
    distill(RunSpec(MARKED, tuple(changes), "run"))
    test = Phantom("test", size=8, image_size=48)
    for index in range(8):
        test.image(index).save(f"{index}.png")
    predicted = predict("run", [f"{index}.png" for index in range(8)])
    known = read_predictions(RunFolder("run"))
    unmarked = known.probabilities["student"][[group == "none" for group in known.groups]]
    found = [list(row["all"].values()) for row in predicted]
    np.testing.assert_allclose(found, unmarked, atol=1e-5)
    regions = audit.audit("run", AuditOptions(samples=8))["relevance"]["student"]
    assert "outside the mask" not in regions  # where the mask is after the crop is not known
    assert regions["marker"]["chance"] == pytest.approx(4 / 40**2)  # what is left of it


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A run of the phantom, and images of its classes in a folder, in another order of classes."""
    monkeypatch.chdir(tmp_path)
    config = CONFIGS / "phantom/ce/test_resnet.yaml"
    sets = [word for change in SMALL for word in ("--set", change)]
    run = CliRunner().invoke(app, ["distill", str(config), *sets, "--out", "run"])
    assert run.exit_code == 0, run.output
    test = Phantom("test", size=8, image_size=64)
    for index in range(8):
        folder = tmp_path / "elsewhere" / test.classes[test.targets[index]]
        folder.mkdir(parents=True, exist_ok=True)
        test.image(index).save(folder / f"{index}.png")
    return tmp_path


def test_other_images_are_audited_with_the_classes_of_the_run(finished):
    shown = CliRunner().invoke(app, ["audit", "run", "--data", "elsewhere"])
    assert shown.exit_code == 0, shown.output
    assert not (finished / "run/audit.json").exists()
    found = json.loads((finished / "run/audit-elsewhere.json").read_text())
    assert found["images"] == 8
    assert (finished / "run/audit-elsewhere.png").is_file()
    predicted = predict("run", sorted((finished / "elsewhere").rglob("*.png")))
    right = sum(row["class"] == row["file"].split("/")[-2] for row in predicted) / 8
    before = {of["accuracy_before"] for of in found["replaced"]["student"]["border"].values()}
    assert before == {right}


def test_other_images_are_read_with_the_bits_of_the_run(tmp_path, monkeypatch):
    """Whatever its transform is: a run with one of its own has no preprocessing in its summary."""
    for label in ("cat", "dog"):
        (tmp_path / "others" / label).mkdir(parents=True)
        pixels = np.full((8, 8), 4000, np.uint16)
        Image.fromarray(pixels).save(tmp_path / "others" / label / "1.png")
    summary = {"preprocessing": None, "classes": ["cat", "dog"]}
    run = LoadedRun(
        *(RunFolder(tmp_path), "", summary, {}, {}, None, "", np.array([], int), {}, {})
    )
    monkeypatch.setattr(audit_inputs, "open_run", lambda *_: run)
    monkeypatch.setattr(audit_inputs, "load_preparation", lambda *_: (12, np.asarray))
    shown = audit_inputs.open_audited(tmp_path, ExplainOptions(), tmp_path / "others")
    assert np.unique(shown.test_set[0][0]).tolist() == [round(4000 / 4095 * 255)]


def test_images_of_other_classes_are_refused(finished):
    (finished / "elsewhere/glioma").rename(finished / "elsewhere/cat")
    shown = CliRunner().invoke(app, ["audit", "run", "--data", "elsewhere"])
    assert shown.exit_code == 1
    assert "classes" in shown.output
    absent = CliRunner().invoke(app, ["audit", "run", "--data", "nowhere"])
    assert absent.exit_code == 1
    assert "nowhere" in absent.output


def test_the_audit_of_another_folder_of_the_same_name_is_not_overwritten(finished):
    audit.audit("run", AuditOptions(data="elsewhere", samples=2))
    file = finished / "run/audit-elsewhere.json"
    before = file.read_bytes()
    (finished / "second").mkdir()
    (finished / "elsewhere").rename(finished / "second/elsewhere")
    with pytest.raises(FileExistsError, match=r"second/elsewhere, got that of .*/elsewhere\. Ren"):
        audit.audit("run", AuditOptions(data="second/elsewhere", samples=2))
    assert file.read_bytes() == before
    (finished / "second/elsewhere").rename(finished / "elsewhere")
    audit.audit("run", AuditOptions(data="elsewhere", samples=4))
    assert json.loads(file.read_text())["images"] == 4
    with pytest.raises(ValueError, match="two images or more, got 1"):  # it would swap with itself
        audit.audit("run", AuditOptions(samples=1))


@pytest.mark.slow
def test_an_exported_model_is_audited_as_the_run_it_came_from(finished):
    done = CliRunner().invoke(app, ["export", "run", "--format", "timm", "--out", "model"])
    assert done.exit_code == 0, done.output
    for name in ("run", "model"):
        shown = CliRunner().invoke(app, ["audit", name, "--data", "elsewhere"])
        assert shown.exit_code == 0, shown.output
    of_run, of_model = (
        json.loads((finished / name / "audit-elsewhere.json").read_text())
        for name in ("run", "model")
    )
    assert (finished / "model/audit-elsewhere.png").is_file()
    for part in ("relevance", "replaced"):
        assert of_model[part] == of_run[part]
    bare = CliRunner().invoke(app, ["audit", "model"])
    assert bare.exit_code == 1
    assert "Give --data FOLDER." in bare.output
