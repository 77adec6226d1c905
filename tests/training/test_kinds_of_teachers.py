"""The configs of chest X-rays and tissue on small images in the layouts of both sets."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import CONFIGS, CPU

from kd_lrp_plugin.attribution.methods import attribute
from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.config.safety import unsafe_tags
from kd_lrp_plugin.evaluation.audit import AuditOptions, audit
from kd_lrp_plugin.evaluation.explain import explain
from kd_lrp_plugin.evaluation.explain_inputs import ExplainOptions
from kd_lrp_plugin.relevance.recording import record
from kd_lrp_plugin.runs.loading import load_run
from kd_lrp_plugin.training import trainer
from kd_lrp_plugin.training.check.dry_run import check

SETS = {"covid_qu_ex": 3, "lc25000": 5}
FILES = [file for name in SETS for file in sorted((CONFIGS / name).rglob("[!_]*.yaml"))]
NAMES = {
    "vgg19": "vgg19",
    "visformer_small": "visformer_small",
    "swin_s3_tiny": "swin_s3_tiny_224",
}
CELLS = ["colon_aca", "colon_n", "lung_aca", "lung_n", "lung_scc"]
SMALL = ["image_size=64", "batch_size=4", "num_workers=0", "train.num_epochs=1"]


def save(file: Path, label: int, number: int) -> None:
    """A square that is brighter the higher the class, on noise."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 60, (48, 48), np.uint8)
    pixels[8:24, 8:24] += np.uint8(40 * label)
    Image.fromarray(pixels).save(file)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Both sets as they come, the cells with a clean split."""
    root = tmp_path_factory.mktemp("data")
    xrays = root / "covid_qu_ex/Lung Segmentation Data"
    for split, count in {"Train": 4, "Val": 2, "Test": 2}.items():
        for label, name in enumerate(("COVID-19", "Non-COVID", "Normal")):
            for number in range(count):
                file = xrays / split / name / "images" / f"{name}_{number}.png"
                save(file, label, number)
                mask = file.parents[1] / "lung masks" / file.name
                mask.parent.mkdir(exist_ok=True)
                Image.fromarray(np.pad(np.full((16, 16), 255, np.uint8), (8, 24))).save(mask)
    rows = []
    for label, name in enumerate(CELLS):
        organ = name.partition("_")[0]
        for number in range(10):
            file = f"{organ}_image_sets/{name}/{name}{number}.jpeg"
            save(root / "lc25000/lung_colon_image_set" / file, label, number)
            rows.append([file, "Testing" if number > 7 else "Training", name, number, 1])
    table = root / "checked/lc25000/clean_split.csv"
    table.parent.mkdir(parents=True)
    with table.open("w", newline="") as out:
        csv.writer(out).writerows([["file", "split", "class", "group", "kept"], *rows])
    return root


@pytest.fixture(autouse=True)
def workplace(data, monkeypatch):
    monkeypatch.setenv("KD_LRP_DATA", str(data))
    monkeypatch.chdir(data)


def shrink(file: Path) -> list[str]:
    """Overrides for a small size; a teacher keeps its random weights, VGG19 a small head."""
    student, _, teacher = file.stem.partition("_from_")
    overrides = [*SMALL, *(["models.teacher_model.src_ckpt=null"] if teacher else [])]
    role = "teacher_model" if teacher else "model"
    if (teacher or student) == "swin_s3_tiny":
        overrides.append("window_size=[2, 2, 4, 2]")
    if (teacher or student) == "vgg19":
        overrides.append(f"+models.{role}.kwargs.timm_kwargs={{mlp_ratio: 0.002}}")
    return overrides


@pytest.mark.parametrize("file", FILES, ids=lambda f: "/".join(f.with_suffix("").parts[-3:]))
class TestEveryConfig:
    def test_is_that_of_its_name(self, file):
        values = resolve_config(file).values
        student, _, teacher = file.stem.partition("_from_")
        models, method = values["models"], file.parent.name
        if not teacher and student != "ofa_595":
            teacher, entry = student, models["model"]
        else:
            entry = models.get("teacher_model")
            assert models.get("model", models.get("student_model"))["key"] == "ofa_595"
        classes = SETS[file.parts[-3]]
        for model in models.values():
            assert model["kwargs"]["num_classes"] == classes
        if teacher:
            assert entry["kwargs"]["name"] == NAMES[teacher]
        if "_from_" in file.stem:
            made_by = Path(entry["_made_by"].removeprefix("kd-lrp distill torchdistill_configs/"))
            assert (CONFIGS / made_by).is_file()
            assert entry["src_ckpt"] == f"runs/{made_by.with_suffix('')}/0/best.pt"
        if method == "kd":
            kd = values["train"]["criterion"]["kwargs"]["sub_terms"]["kd"]["criterion"]["kwargs"]
            assert (kd["temperature"], kd["alpha"]) == (4.0, 0.5)
        if method.endswith("lrp_cosine"):
            ours, theirs = (
                values["train"][role]["forward_proc"]["init"]["kwargs"]["method"]
                for role in ("student", "teacher")
            )
            assert ours == "gradient_activation"
            assert theirs == ("attn_lrp" if method == "attn_lrp_cosine" else ours)

    def test_runs_no_code_of_its_own(self, file):
        assert not unsafe_tags(resolve_config(file))


CHECKED = [file for file in FILES if file.parts[-3] == "covid_qu_ex"]


@pytest.mark.parametrize("file", CHECKED, ids=lambda f: "/".join(f.with_suffix("").parts[-3:]))
class TestBothSets:
    def test_have_configs_that_differ_in_their_data_alone(self, file):
        other = CONFIGS / "lc25000" / file.relative_to(CONFIGS / "covid_qu_ex")
        xrays, cells = (dict(resolve_config(each).values) for each in (file, other))
        as_xrays = json.dumps(cells).replace("lc25000/", "covid_qu_ex/")
        as_xrays = as_xrays.replace('"num_classes": 5', '"num_classes": 3')
        cells = json.loads(as_xrays)
        for values in (xrays, cells):
            for key in ("datasets", "root", "name", "manifest", "images", "masks"):
                values.pop(key, None)
        assert xrays == cells

    def test_pass_the_check_on_a_set_as_it_comes(self, file):
        assert not check(resolve_config(file, shrink(file)), CPU).problems


def test_the_tissue_is_read_by_its_clean_split():
    file = CONFIGS / "lc25000/ce/ofa_595.yaml"
    assert not check(resolve_config(file, shrink(file)), CPU).problems


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A student of Visformer-S by relevance, one epoch on the chest X-rays."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_LRP_DATA", str(data))
        patch.chdir(data)
        teacher = CONFIGS / "covid_qu_ex/ce/visformer_small.yaml"
        trainer.distill(RunSpec(teacher, shrink(teacher), folder.parent / "teacher", device="cpu"))
        file = CONFIGS / "covid_qu_ex/lrp_cosine/ofa_595_from_visformer_small.yaml"
        taught = f"models.teacher_model.src_ckpt={folder.parent / 'teacher' / 'best.pt'}"
        trainer.distill(RunSpec(file, [*shrink(file), taught], folder, device="cpu"))
    return folder


@pytest.mark.slow
class TestARun:
    def test_trains_and_loads_again(self, run):
        model, summary = load_run(run)
        assert summary["classes"] == ["COVID-19", "Non-COVID", "Normal"]
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 3)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        assert {"train_semantic", "train_relation", "train_kl"} <= lines[-1].keys()

    def test_has_score_cam_maps_where_the_picture_shows_them(self, run):
        model, _ = load_run(run)
        with record(model, "auto") as recording:
            layer = recording.layers[-1]
        maps = attribute(model, torch.rand(1, 3, 64, 64), torch.tensor([1]), "score_cam", layer)
        assert (layer, tuple(maps.shape)) == ("blocks.4", (1, 4, 4))

    def test_lung_masks_reach_explain_and_the_audit(self, run, data):
        options = ExplainOptions(["gradient_activation"], roles=["student"], n=1, samples=2)
        rows = explain([run], options)
        assert [(row["model"], row["layer"]) for row in rows] == [("student", "blocks.4")]
        for row in rows:
            mass = row["metrics"]["relevance_mass_accuracy"]
            assert mass["chance"] == pytest.approx(1 / 9, abs=0.01)
            assert mass["n"] == 2
        assert (run / "explanations.png").stat().st_size > 5000
        mask = data / "covid_qu_ex/Lung Segmentation Data/Test/Normal/lung masks/Normal_0.png"
        content = mask.read_bytes()
        mask.unlink()
        try:
            found = audit(run, AuditOptions(samples=6))
        finally:
            mask.write_bytes(content)
        assert found["images"] == 5
        for role in ("student", "teacher"):
            outside = found["relevance"][role]["outside the mask"]
            assert outside["chance"] == pytest.approx(8 / 9, abs=0.01)
            assert 0 < outside["mean"] < 1
            assert "outside the mask" not in found["replaced"][role]
