"""Explanations of finished runs: their metrics, what is kept, what is refused, the pictures."""

import csv
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_runs import BASELINE, KD, SMALL, Stopped, StopsAt
from torchvision import transforms
from typer.testing import CliRunner

from kd_lrp_plugin.attribution import faithfulness, perturbation, randomisation
from kd_lrp_plugin.attribution.localisation import attribution_similarity, relevance_mass_accuracy
from kd_lrp_plugin.attribution.methods import ATTRIBUTIONS, Attribution
from kd_lrp_plugin.attribution.summary import by_layer, records
from kd_lrp_plugin.cli.main import app
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.evaluation import explain as explaining
from kd_lrp_plugin.evaluation import explain_inputs, explain_pictures, explain_trials
from kd_lrp_plugin.plots.maps import MapRow, map_figure
from kd_lrp_plugin.relevance.recording import relevance_maps
from kd_lrp_plugin.runs import loading
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.runs.predictions import Predictions
from kd_lrp_plugin.training import trainer
from kd_lrp_plugin.utils.files import name_folders
from kd_lrp_plugin.utils.progress import NullProgress

QUICK = ("grad_cam", "lrp_gamma")


def explain(folders, methods=(), layers=(), **options):
    """With one picture, since metrics take seconds."""
    chosen = explain_inputs.ExplainOptions(methods, layers, **{"n": 1, **options})
    return explaining.explain(folders, chosen)


TEACHER = [
    "models.teacher_model.kwargs.name=test_resnet",
    "models.teacher_model.src_ckpt=teacher/best.pt",
]


def forget_outputs(run: Path) -> None:
    """As a run of an older version: its files are not known by their bytes."""
    about = json.loads((run / "environment.json").read_text())
    del about["outputs"]
    (run / "environment.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a teacher, a student of it, and a model without a teacher."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "teacher").mkdir()
    torch.manual_seed(0)
    teacher = timm.create_model("test_resnet", num_classes=4)
    torch.save({"model": teacher.state_dict()}, folder / "teacher/best.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        trainer.distill(RunSpec(KD, [*SMALL, *TEACHER], "runs/kd/0", device="cpu"))
        trainer.distill(RunSpec(BASELINE, SMALL, "runs/ce/0", device="cpu"))
    return folder


@pytest.fixture
def project(made, tmp_path, monkeypatch) -> Path:
    """A copy of it, where the commands were given."""
    shutil.copytree(made, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture(autouse=True)
def less_work(monkeypatch):
    monkeypatch.setattr(perturbation, "LIME_SAMPLES", 20)
    monkeypatch.setattr(perturbation, "RISE_MASKS", 20)
    monkeypatch.setattr(faithfulness, "STEPS", 2)


@pytest.fixture
def without_pictures(monkeypatch):
    """They take longer than the metrics."""
    monkeypatch.setattr(explaining.Explainer, "draw_run", lambda *_: None)
    monkeypatch.setattr(explaining, "_save", lambda *_: None)


class ImagesOfFiles(NamedTuple):
    """A data set of two, for whom only names and classes matter."""

    samples: list[tuple[str, int]]
    targets: list[int]


def masked() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The images of the runs' test set that have a mask, with their classes and masks."""
    data = Phantom("test", size=8, image_size=48)
    indices = [index for index in range(8) if data.mask(index).any()]
    images = torch.stack([data[index][0] for index in indices])
    labels = torch.tensor([data.targets[index] for index in indices])
    return images, labels, torch.from_numpy(np.stack([data.mask(index) for index in indices]))


def find(rows: list[dict], **wanted: object) -> dict:
    (row,) = [row for row in rows if wanted.items() <= row.items()]
    return row


@pytest.mark.usefixtures("without_pictures")
class TestFigures:
    def test_are_those_of_all_images_with_a_mask(self, project):
        rows = explain(["runs/kd/0"], QUICK)
        models = loading.load_models("runs/kd/0")
        images, labels, masks = masked()
        maps = {
            role: relevance_maps(model, images, labels, ["layer3"], "grad_cam")[0]
            for role, model in models.items()
        }
        for role in models:
            metrics = find(rows, model=role, method="grad_cam", layer="layer3")["metrics"]
            expected = relevance_mass_accuracy(maps[role], masks)
            assert metrics["relevance_mass_accuracy"]["mean"] == pytest.approx(
                float(expected.nansum()) / 6
            )
            assert metrics["relevance_mass_accuracy"]["undefined"] == int(expected.isnan().sum())
            assert metrics["relevance_mass_accuracy"]["n"] == 6
            shares = [float(m.float().mean()) for m in masks]
            assert metrics["relevance_mass_accuracy"]["chance"] == pytest.approx(np.mean(shares))
            assert {"insertion", "deletion", "randomised"} <= metrics.keys()
        expected = float(attribution_similarity(maps["student"], maps["teacher"]).nansum()) / 6
        metrics = find(rows, model="student", method="grad_cam")["metrics"]
        assert metrics["attribution_similarity"]["mean"] == pytest.approx(expected)
        assert (
            "attribution_similarity"
            not in find(rows, model="teacher", method="grad_cam")["metrics"]
        )
        assert len(rows) == 4

    def test_are_of_as_many_images_as_asked_for_by_any_method(self, project):
        rows = explain(["runs/ce/0"], samples=3)
        assert {row["method"] for row in rows} == set(ATTRIBUTIONS)
        assert {row["images"] for row in rows} == {3}
        assert {row["layer"] for row in rows} == {"layer3", "input"}
        for row in rows:
            for name in ("relevance_mass_accuracy", "insertion", "deletion"):
                assert row["metrics"][name]["n"] == 3

    def test_of_several_layers_become_a_table_of_methods_and_layers(self, project):
        rows = explain(["runs/kd/0"], QUICK, ["layer2", "layer3"], roles=["teacher"], samples=2)
        table = by_layer(rows, "relevance_mass_accuracy")
        assert [line["method"] for line in table] == list(QUICK)
        for line in table:
            for layer in ("layer2", "layer3"):
                metrics = find(rows, method=line["method"], layer=layer)["metrics"]
                assert line[layer] == metrics["relevance_mass_accuracy"]["mean"]
        assert {"inside, chance level", "insertion chance level"} <= records(rows)[0].keys()

    def test_a_small_mask_is_brought_to_the_size_of_the_models_images(self):
        mask = np.zeros((80, 120), bool)
        mask[20:60, 30:90] = True
        run = SimpleNamespace(
            test_set=SimpleNamespace(mask=lambda _: mask),
            summary={"preprocessing": {"image_size": 40}, "image_shape": [3, 40, 40]},
        )
        found = explain_inputs._find_mask(run, 0)
        assert found.shape == (40, 40)
        assert found[10:30, 10:30].all()
        assert int(found.sum()) == 400
        run.summary["preprocessing"] = None  # perhaps a crop: where the mask is, is not known
        assert explain_inputs._find_mask(run, 0) is None

    def test_a_set_of_two_classes_with_few_masks_works(self, tmp_path):
        generator = np.random.default_rng(0)
        for split in ("Training", "Testing"):
            for name in ("benign", "malignant"):
                for kind in (split, f"masks/{split}"):
                    (tmp_path / "set" / kind / name).mkdir(parents=True)
                for number in range(10):
                    noise = generator.integers(0, 255, (60, 48), np.uint8)
                    Image.fromarray(noise).save(tmp_path / "set" / split / name / f"{number}.png")
        mask = np.zeros((60, 48), np.uint8)
        mask[10:30, 10:30] = 255
        for number in range(3):
            file = tmp_path / f"set/masks/Testing/malignant/{number}.png"
            Image.fromarray(mask).save(file)
        overrides = [s for s in SMALL if not s.startswith("datasets")]
        for name, split in {"train": "Training", "val": "Training", "test": "Testing"}.items():
            overrides.append(
                f"datasets.phantom/{name}=!import_call {{key: "
                "kd_lrp_plugin.torchdistill.folder_images, init: {kwargs: "
                f"{{root: {tmp_path}/set, image_size: 48, split: {split}}}}}}}"
            )
        overrides.append("models.model.kwargs.num_classes=2")
        trainer.distill(RunSpec(BASELINE, overrides, tmp_path / "run", device="cpu"))
        shutil.rmtree(tmp_path / "set/Training")  # the test set alone is needed
        rows = explain([tmp_path / "run"], QUICK)
        assert {row["images"] for row in rows} == {3}
        chance = find(rows, method="grad_cam")["metrics"]["relevance_mass_accuracy"]["chance"]
        assert chance == pytest.approx(400 / (60 * 48), abs=0.02)


@pytest.mark.usefixtures("without_pictures")
class TestWhatIsKept:
    def test_a_command_that_was_stopped_resumes(self, project, monkeypatch):
        with pytest.raises(Stopped), StopsAt("explaining"):
            explain(["runs/kd/0"], QUICK, samples=2)
        before = json.loads((project / "runs/kd/0/explanations.json").read_text())["rows"]
        assert len(before) == 2
        computed = []
        monkeypatch.setattr(
            explaining.Explainer,
            "_make_row",
            lambda *args, real=explaining.Explainer._make_row: computed.append(args) or real(*args),
        )
        rows = explain(["runs/kd/0"], QUICK, samples=2)
        assert len(rows) == 4
        assert len(computed) == 2
        kept = json.loads((project / "runs/kd/0/explanations.json").read_text())["rows"]
        assert kept[:2] == before
        assert [{"run": "runs/kd/0", **row} for row in kept] == rows

    def test_the_similarity_is_added_once_the_teacher_is_there(self, project):
        alone = explain(["runs/kd/0"], QUICK[:1], roles=["student"], samples=2)
        both = explain(["runs/kd/0"], QUICK[:1], samples=2)
        row = find(both, model="student")
        compared = row["metrics"].pop("attribution_similarity")
        assert compared["n"] == 2
        assert row == alone[0]

    def test_the_similarity_with_another_teacher_is_made_again(self, project):
        explain(["runs/kd/0"], QUICK[:1], samples=2)
        file = project / "runs/kd/0/explanations.json"
        content = json.loads(file.read_text())
        known = find(content["rows"], model="student")["metrics"]["attribution_similarity"]
        expected = dict(known)
        for change in ({"teacher": "another"}, {"teacher_layer": "layer1"}):
            known |= {**expected, **change, "mean": 2.0}
            file.write_text(json.dumps(content))
            again = find(explain(["runs/kd/0"], QUICK[:1], samples=2), model="student")
            assert again["metrics"]["attribution_similarity"] == expected

    def test_figures_of_other_definitions_are_made_anew(self, project):
        explain(["runs/ce/0"], QUICK[:1], samples=2)
        file = project / "runs/ce/0/explanations.json"
        content = json.loads(file.read_text())
        content["about"]["relevance_mass_accuracy"] = "something else"
        content["rows"][0]["metrics"]["relevance_mass_accuracy"]["mean"] = 2.0
        file.write_text(json.dumps(content))
        (row,) = explain(["runs/ce/0"], QUICK[:1], samples=2)
        assert row["metrics"]["relevance_mass_accuracy"]["mean"] <= 1

    def test_figures_of_other_weights_are_made_anew(self, project):
        explain(["runs/ce/0"], QUICK[:1], samples=2)
        file = project / "runs/ce/0/explanations.json"
        content = json.loads(file.read_text())
        content["rows"][0]["weights"] = "others"
        content["rows"][0]["metrics"] = {}
        file.write_text(json.dumps(content))
        (row,) = explain(["runs/ce/0"], QUICK[:1], samples=2)
        assert "relevance_mass_accuracy" in row["metrics"]
        assert len(json.loads(file.read_text())["rows"]) == 1

    def test_figures_of_weights_that_are_gone_do_not_stay_beside_new_ones(self, project):
        explain(["runs/kd/0"], QUICK, samples=2)
        file = project / "runs/kd/0/explanations.json"
        content = json.loads(file.read_text())
        assert content["predictions"] == RunFolder("runs/kd/0").of["predictions"]
        find(content["rows"], model="student", method=QUICK[1])["weights"] = "others"
        file.write_text(json.dumps(content))
        explain(["runs/kd/0"], QUICK[:1], roles=["student"], samples=2)
        left = [(row["model"], row["method"]) for row in json.loads(file.read_text())["rows"]]
        assert sorted(left) == [
            ("student", QUICK[0]),
            *(("teacher", method) for method in QUICK),
        ]
        file.write_text(json.dumps({**content, "predictions": "of others"}))
        explain(["runs/kd/0"], QUICK[:1], roles=["student"], samples=2)
        again = json.loads(file.read_text())
        assert [(row["model"], row["method"]) for row in again["rows"]] == [("student", QUICK[0])]
        assert again["predictions"] == content["predictions"]

    def test_runs_that_share_a_teacher_share_its_figures(self, project, monkeypatch):
        shutil.copytree("runs/kd/0", "runs/kd/1")
        asked = []
        monkeypatch.setattr(
            explaining,
            "randomisation",
            lambda model, *args, real=randomisation.randomisation, **options: (
                asked.append(model) or real(model, *args, **options)
            ),
        )
        rows = explain(["runs/kd/0", "runs/kd/1"], QUICK[:1], roles=["teacher"], samples=2)
        assert len(asked) == 1
        assert rows[0] == {**rows[1], "run": "0"}

    def test_rows_of_a_shared_teacher_are_taken_from_the_other_runs_file(
        self, project, monkeypatch
    ):
        known = explain(["runs/kd/0"], QUICK[:1], samples=2)
        shutil.copytree("runs/kd/0", "runs/kd/1")
        Path("runs/kd/1/explanations.json").unlink()
        made = []
        monkeypatch.setattr(
            explaining.Explainer,
            "_make_row",
            lambda *args, real=explaining.Explainer._make_row: made.append(args) or real(*args),
        )
        rows = explain(["runs/kd/0", "runs/kd/1"], QUICK[:1], samples=2)
        assert made == []
        assert [row["metrics"] for row in rows] == 2 * [row["metrics"] for row in known]
        content = json.loads(Path("runs/kd/1/explanations.json").read_text())
        assert [{"run": "1", **row} for row in content["rows"]] == rows[2:]

    def test_a_shared_teacher_has_figures_of_its_own_on_images_of_the_same_names(
        self, project, monkeypatch
    ):
        shutil.copytree("runs/kd/0", "runs/kd/1")
        real = explain_inputs.load_tested_images

        def load(run, *args):
            images = real(run, *args)
            if run.path.name == "0":
                return images
            return [(image.flip(0, 1), label) for image, label in images]

        monkeypatch.setattr(explain_inputs, "load_tested_images", load)
        monkeypatch.setattr(explain_inputs, "_check_predictions", lambda *_: None)
        monkeypatch.setattr(explain_pictures, "_display_test_image", lambda *_: None)
        options = {"roles": ["teacher"], "samples": 2}
        alone = explain(["runs/kd/1"], QUICK[:1], **options)
        Path("runs/kd/1/explanations.json").unlink()
        first, second = explain(["runs/kd/0", "runs/kd/1"], QUICK[:1], **options)
        for name in ("insertion", "deletion", "randomised"):
            assert second["metrics"][name] == pytest.approx(alone[0]["metrics"][name])
            assert second["metrics"][name] != first["metrics"][name]

    def test_a_shared_teacher_is_tried_once(self, project, monkeypatch):
        shutil.copytree("runs/kd/0", "runs/kd/1")
        tried = []
        monkeypatch.setattr(
            explain_inputs,
            "try_methods",
            lambda model, *args, real=explain_trials.try_methods: (
                tried.append(model) or real(model, *args)
            ),
        )
        explain(["runs/kd/0", "runs/kd/1"], QUICK[:1], roles=["teacher"], samples=2)
        assert len(tried) == 1


@pytest.mark.usefixtures("without_pictures")
class TestQuick:
    def test_leaves_out_what_takes_long_and_the_file_says_why(self, project):
        slow = {name for name in ATTRIBUTIONS if ATTRIBUTIONS[name].slow}
        rows = explain(["runs/ce/0"], samples=2, quick=True)
        assert {row["method"] for row in rows} == set(ATTRIBUTIONS) - slow
        content = json.loads(Path("runs/ce/0/explanations.json").read_text())
        assert content["without"] == {"student": dict.fromkeys(slow, explain_trials.SLOW)}

    def test_does_not_leave_out_what_is_named_or_alone_works(self, project, monkeypatch):
        rows = explain(["runs/ce/0"], ["lime"], samples=2, quick=True)
        assert [row["method"] for row in rows] == ["lime"]
        only = {name: ATTRIBUTIONS[name] for name in ("rise",)}
        monkeypatch.setattr(explain_trials, "ATTRIBUTIONS", only)
        rows = explain(["runs/ce/0"], samples=2, quick=True)
        assert [row["method"] for row in rows] == ["rise"]

    def test_the_time_is_said_before_and_only_of_rows_that_are_new(self, project):
        heard = []
        progress = NullProgress()
        progress.note = heard.append
        shutil.copytree("runs/kd/0", "runs/kd/1")
        with progress:
            explain(["runs/kd/0", "runs/kd/1"], QUICK, samples=2)
            explain(["runs/kd/0", "runs/kd/1"], QUICK, samples=2)
        assert len(heard) == 1
        assert re.match(r"metrics: 4 rows to make, about \d+ s", heard[0])  # the copy has no more

    def test_an_estimate_counts_maps_and_questions(self):
        trial = explain_trials.Trial([], {}, {"grad_cam": 0.1, "lime": 2.0, "": 0.01})
        questions = 2 * (faithfulness.STEPS + 1) * 0.01
        total = trial.estimate("grad_cam", 100, 10)
        assert total == pytest.approx((100 + 4 * 5) * 0.1 + 10 * questions)
        assert trial.estimate("lime", 100, 10) == pytest.approx((10 + 2 * 2) * 2 + 10 * questions)


class TestSeveralRuns:
    def test_stand_side_by_side(self, project):
        rows = explain(["runs/kd/0", "runs/ce/0"], QUICK[:1], samples=2, out="compared")
        assert {row["run"] for row in rows} == {"kd", "ce"}
        with open("compared/explanations.csv", newline="") as file:
            lines = list(csv.DictReader(file))
        assert len(lines) == sum(len(row["metrics"]) for row in rows)
        for row in rows:
            key = {name: row[name] for name in ("run", "model", "method", "layer")}
            line = find(lines, **key, metric="insertion")
            mean = row["metrics"]["insertion"]["mean"]
            assert line["mean"] == ("" if mean is None else str(mean))
        for file in ("compared/maps.png", "runs/kd/0/explanations.png"):
            assert Path(file).read_bytes().startswith(b"\x89PNG")

    def test_have_one_column_per_model_and_one_for_a_shared_teacher(self, project):
        shutil.copytree("runs/kd/0", "runs/kd/1")
        folders = ["runs/kd/0", "runs/kd/1", "runs/ce/0"]
        opened = [
            explain_inputs.open_run(folder, name, explain_inputs.ExplainOptions(QUICK))
            for folder, name in zip(folders, name_folders([*map(Path, folders)]), strict=True)
        ]
        shown = explain_pictures.choose_images(opened[0], 2)
        explainer = explaining.Explainer()
        figure = explainer.draw_all(opened, [shown(run) for run in opened])
        titles = [ax.get_title() for ax in figure.get_axes()]
        assert titles[:5] == ["image", "teacher", "kd\n0", "kd\n1", "ce\n0"]
        assert len(figure.get_axes()) == 5 * 2 * len(QUICK) + 1  # and the colour bar

    def test_of_a_study_are_its_finished_runs(self, tmp_path):
        states = [("CE", "finished"), ("KD", "epoch 3 of 8"), ("KD", "finished")]
        rows = [
            {"configuration": name, "point": {"n": 5}, "seed": seed, "state": state}
            | {"folder": f"runs/{seed}"}
            for seed, (name, state) in enumerate(states)
        ]
        (tmp_path / "study.json").write_text(json.dumps({"runs": rows}))
        found = explain_inputs.list_runs([tmp_path, Path("runs/one")])
        assert found == [
            (Path("runs/0"), "CE, n 5, seed 0"),
            (Path("runs/2"), "KD, n 5, seed 2"),
            (Path("runs/one"), "runs/one"),
        ]
        assert explain_inputs.list_runs([tmp_path], [2]) == [(Path("runs/2"), "KD, n 5")]
        assert explain_inputs.list_runs([tmp_path], [2, 0]) == found[:2]
        with pytest.raises(ValueError, match=r"seeds of its runs, got \[1\]. .*\[0, 2\]"):
            explain_inputs.list_runs([tmp_path], [1, 2])
        with pytest.raises(ValueError, match="explain: seeds: expected a study"):
            explain_inputs.list_runs([Path("runs/2")], [2])
        with pytest.raises(ValueError, match="each run once"):
            explain_inputs.list_runs([tmp_path, Path("runs/2")])
        (tmp_path / "study.json").write_text(json.dumps({"runs": rows[1:2]}))
        with pytest.raises(ValueError, match="a study with a finished run"):
            explain_inputs.list_runs([tmp_path])

    def test_that_lie_within_each_other_have_names(self):
        found = name_folders([Path("runs/x"), Path("runs/x/0"), Path("runs/x/1")])
        assert found == [".", "0", "1"]

    def test_of_other_weights_are_refused_whatever_image_shows_it(self, project):
        """The first images are of one class, which most models know."""
        forget_outputs(project / "runs/ce/0")
        file = project / "runs/ce/0/predictions.csv"
        *lines, last = file.read_text().splitlines()
        values = last.split(",")
        largest = max(range(2, 6), key=lambda i: float(values[i]))
        values[2:] = ["0" if i == largest else str(1 / 3) for i in range(2, 6)]
        file.write_text("\n".join([*lines, ",".join(values)]) + "\n")
        with pytest.raises(ValueError, match=r"the predictions in predictions\.csv"):
            explain(["runs/ce/0"], QUICK[:1])

    def test_of_other_test_images_are_refused(self, project):
        config = project / "runs/ce/0/config.yaml"
        predictions = project / "runs/ce/0/predictions.csv"
        text = config.read_text().replace("size: 8,", "size: 4,")
        assert text != config.read_text()
        config.write_text(text)
        forget_outputs(project / "runs/ce/0")
        predictions.write_text("".join(predictions.read_text().splitlines(True)[:5]))
        with pytest.raises(ValueError, match=r"same test images, got \{'kd': 8, 'ce': 4\}"):
            explain(["runs/kd/0", "runs/ce/0"], QUICK, samples=2)
        assert not (project / "runs/kd/0/explanations.json").exists()


@pytest.mark.usefixtures("without_pictures")
class TestTheTeacher:
    def test_is_found_from_elsewhere(self, project, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        models = loading.load_models(project / "runs/kd/0")
        saved = torch.load(project / "teacher/best.pt", weights_only=True)["model"]
        assert torch.equal(models["teacher"].fc.weight, saved["fc.weight"])
        assert not any(model.training for model in models.values())

    def test_whose_file_is_gone_is_named_and_can_be_left_out(self, project):
        shutil.rmtree("teacher")
        with pytest.raises(FileNotFoundError, match=r"teacher/best\.pt.*--model student"):
            explain(["runs/kd/0"], QUICK)
        rows = explain(["runs/kd/0"], QUICK, roles=["student"], samples=2)
        assert {row["model"] for row in rows} == {"student"}

    def test_that_never_had_a_file_is_said_to_be_lost(self, project):
        config = project / "runs/kd/0/config.yaml"
        config.write_text(config.read_text().replace("src_ckpt: teacher/best.pt", "src_ckpt:"))
        with pytest.raises(
            ValueError, match=r"a src_ckpt in the config, got none.*--model student"
        ):
            explain(["runs/kd/0"], QUICK)

    def test_with_other_weights_than_in_the_run_is_refused(self, project):
        torch.manual_seed(1)
        other = timm.create_model("test_resnet", num_classes=4)
        torch.save(other.state_dict(), "teacher/best.pt")
        words = "the weights that it was trained with, got others, at .*teacher/best.pt"
        with pytest.raises(ValueError, match=rf"^teacher of runs/kd/0: expected {words}"):
            explain(["runs/kd/0"], QUICK)

    def test_of_another_project_with_the_same_names_is_not_taken(
        self, project, tmp_path, monkeypatch
    ):
        """Two projects of ``kd-lrp init`` call their teachers alike; this one has moved."""
        torch.manual_seed(1)
        other = timm.create_model("test_resnet", num_classes=4)
        (tmp_path / "other/teacher").mkdir(parents=True)
        torch.save(other.state_dict(), tmp_path / "other/teacher/best.pt")
        monkeypatch.chdir(tmp_path / "other")
        (project / "runs/kd").rename(project / "renamed")
        saved = torch.load(project / "teacher/best.pt", weights_only=True)["model"]
        for run in (project / "renamed/0", "../project/renamed/0"):
            models = loading.load_models(run)
            assert torch.equal(models["teacher"].fc.weight, saved["fc.weight"])

    def test_of_a_run_without_one_cannot_be_asked_for(self, project):
        with pytest.raises(ValueError, match="a run with a teacher"):
            explain(["runs/ce/0"], QUICK, roles=["teacher"])


@pytest.mark.usefixtures("without_pictures")
class TestWhatIsRefused:
    def test_data_that_have_changed(self, project):
        config = project / "runs/ce/0/config.yaml"
        config.write_text(config.read_text().replace("size: 8,", "size: 7,"))
        with pytest.raises(ValueError, match="expected the 8 test images, got 7 images"):
            explain(["runs/ce/0"], QUICK)

    def test_images_of_other_names_than_were_tested(self, tmp_path, monkeypatch):
        """An image went, another of its class came: labels alone do not show it."""
        predictions = Predictions(["cat/1.png", "dog/2.png"], np.array([0, 1]), {}, ["cat", "dog"])
        run = SimpleNamespace(path=tmp_path, summary=dict)

        def load(*names):
            samples = [(f"/moved/{name}.png", index) for index, name in enumerate(names)]
            images = ImagesOfFiles(samples, [0, 1])
            monkeypatch.setattr(explain_inputs, "load_test_set", lambda *_: images)
            return explain_inputs.load_tested_images(run, predictions)

        assert len(load("cat/1", "dog/2")) == 2
        for names in (("cat/1", "dog/3"), ("cat/1", "dog/02"), ("cat/1", "hot_dog/2")):
            words = f"the test image dog/2.png, got /moved/{names[1]}.png"
            with pytest.raises(ValueError, match=re.escape(words)):
                load(*names)
        unnamed = replace(predictions, images=["0", "1"])
        assert explain_inputs.load_tested_images(run, unnamed)

    def test_unknown_names_with_the_nearest(self, project):
        with pytest.raises(ValueError, match="Did you mean 'grad_cam'"):
            explain(["runs/ce/0"], ["gradcam"])
        with pytest.raises(ValueError, match="layer: expected one of"):
            explain(["runs/ce/0"], layers=["layer9"])
        with pytest.raises(ValueError, match="'fc'"):  # has no maps
            explain(["runs/ce/0"], QUICK, layers=["fc"])
        with pytest.raises(ValueError, match="model: expected one of"):
            explain(["runs/ce/0"], roles=["students"])

    def test_a_method_that_cannot_handle_a_model_unless_it_was_not_asked_for(
        self, project, monkeypatch
    ):
        def never(*_: object) -> torch.Tensor:
            raise ValueError("never: expected another model, got this one.")

        monkeypatch.setitem(ATTRIBUTIONS._entries, "never", Attribution(never))
        both = {name: ATTRIBUTIONS[name] for name in ("grad_cam", "never")}
        monkeypatch.setattr(explain_trials, "ATTRIBUTIONS", both)
        heard = []
        progress = NullProgress()
        progress.note = heard.append
        with progress:
            rows = explain(["runs/ce/0"], samples=2)
        assert [row["method"] for row in rows] == ["grad_cam"]
        assert "without never: never: expected another model" in heard[0]
        with pytest.raises(ValueError, match="expected another model"):
            explain(["runs/ce/0"], ["never"])

    def test_one_run_twice(self, project):
        with pytest.raises(ValueError, match="each run once"):
            explain(["runs/ce/0", "runs/../runs/ce/0"], QUICK)


class TestPictures:
    def test_of_files_come_without_figures(self, project):
        Phantom("test", size=1, image_size=300).image(0).save("one.png")
        assert explain(["runs/kd/0"], QUICK, images=["one.png"], out="maps") == []
        made = {path.name for path in (project / "runs/kd/0").glob("explanations*")}
        assert made == {"explanations-images.png"}
        assert {path.name for path in Path("maps").iterdir()} == {"maps.png", "maps.json"}
        with pytest.raises(FileNotFoundError, match=r"none at two\.png"):
            explain(["runs/kd/0"], QUICK, images=["two.png"])

    def test_of_files_are_read_and_cut_as_the_run_has_it(self, tmp_path, monkeypatch):
        pixels = np.full((20, 40), 4000, np.uint16)
        Image.fromarray(pixels).save(tmp_path / "scan.png")
        cut = transforms.Compose([transforms.CenterCrop(16), transforms.ToTensor()])
        monkeypatch.setattr(explain_pictures, "load_preparation", lambda *_: (12, cut))
        run = SimpleNamespace(
            name="run", summary={"preprocessing": None}, folder=SimpleNamespace(path=tmp_path)
        )
        (shown,) = explain_pictures.read_images([run], [tmp_path / "scan.png"])(run)
        assert shown.image.unique().tolist() == pytest.approx([round(4000 / 4095 * 255) / 255])
        assert shown.picture.shape == (16, 16, 3)  # what the maps are of

    def test_of_a_set_that_shows_no_images_are_what_the_model_sees(self):
        run = SimpleNamespace(
            test_set=[(torch.eye(4)[None], 0)],
            summary={"preprocessing": {"image_size": 4}},
            labels=np.array([0]),
            class_name=str,
        )
        shown = explain_pictures._display_test_image(run, 0)
        assert shown.picture[..., 0].tolist() == torch.eye(4).tolist()

    def test_side_by_side_are_of_one_image_cut_in_one_way(self):
        def show(image):
            return [explain_pictures.DisplayImage("", np.asarray(image), torch.zeros(1))]

        small, large = (Phantom("test", 1, size).image(0) for size in (32, 64))
        marked = np.asarray(large).copy()
        marked[:8, :8] = 255
        runs = [SimpleNamespace(name=name) for name in ("one", "other")]
        for alike in (large, small, np.asarray(large) / 512):
            explain_pictures.check_pictured_alike(runs, [show(large), show(alike)])
        for another in (
            marked,
            large.crop((8, 8, 56, 56)),
            Phantom("test", 1, 64, seed=1).image(0),
        ):
            with pytest.raises(ValueError, match="got another in 'other' than in 'one'"):
                explain_pictures.check_pictured_alike(runs, [show(large), show(another)])

    def test_show_every_class_and_what_is_wrong(self, monkeypatch):
        monkeypatch.setattr(explain_pictures, "_display_test_image", lambda _, index: index)
        labels = np.repeat([0, 1, 2], 20)
        wrong = np.arange(60) % 5 == 0
        predicted = np.where(wrong, (labels + 1) % 3, labels)
        run = SimpleNamespace(labels=labels, probabilities={"student": np.eye(3)[predicted]})
        for n in (3, 6, 9):
            indices = explain_pictures.choose_images(run, n)(run)
            assert len(set(indices)) == n
            assert np.bincount(labels[indices]).tolist() == [n // 3] * 3
            assert n // 3 <= wrong[indices].sum() <= n // 2 + 1

    def test_a_caption_can_stand_under_the_image_and_not_know_the_class(self):
        image, maps = np.zeros((8, 8)), {"m": np.eye(2)}
        for known, expected in ((True, "cat 0.90 ✗"), (False, "cat 0.90")):
            row = MapRow("dog", image, maps, {"image": ("cat", 0.9)}, known=known)
            axes = map_figure([row]).get_axes()
            assert axes[0].get_xlabel() == expected
            assert axes[1].get_xlabel() == ""


class TestTheCommand:
    def test_prints_tables_and_writes_files(self, project, monkeypatch):
        words = ["explain", "runs/kd/0", "--method", "grad_cam", "--samples", "2", "--n", "1"]
        words += ["--model", "teacher", "--layer", "layer2", "--layer", "layer3", "--out", "out"]
        monkeypatch.setattr(sys, "argv", ["/usr/bin/kd-lrp", *words])
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        assert "| method   | inside | chance |" in result.output
        assert "teacher of runs/kd/0, layer layer2" in result.output
        assert max(map(len, result.output.split("inside:")[0].splitlines())) <= 100
        assert "| layer2 | layer3 |" in result.output
        made = {path.name for path in Path("out").iterdir()}
        assert made == {"maps.png", "maps.json", "explanations.csv"}
        for file in ("out/maps.json", "runs/kd/0/explanations.json"):
            assert json.loads(Path(file).read_text())["command"] == ["kd-lrp", *words]
        told, _, tables = result.output.partition("\n")
        assert told.startswith("metrics: 2 rows to make")
        assert CliRunner().invoke(app, words).output == tables

    def test_says_what_is_wrong_in_a_line(self, project):
        result = CliRunner().invoke(app, ["explain", "runs", "--method", "grad_cam"])
        assert result.exit_code == 1
        assert "a finished run, got none at runs" in result.output


@pytest.mark.parametrize("name", ["maps.png", "explanations.csv"])
def test_what_is_not_of_explain_is_not_overwritten(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match="expected none of these files"):
        explaining.explain([tmp_path], explain_inputs.ExplainOptions(out=tmp_path))
    with pytest.raises(FileExistsError, match="expected a folder"):
        explaining.explain([tmp_path], explain_inputs.ExplainOptions(out=tmp_path / name))
    assert (tmp_path / name).read_text() == "mine"
