"""The report page: one file that loads nothing, says what is missing, and reads well anywhere."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from small_runs import BASELINE, KD, NO_TEACHER, SMALL
from typer.testing import CliRunner

from kd_lrp_plugin.cli.main import app
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.evaluation import evaluate
from kd_lrp_plugin.report import content, page, published, sections
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.studies.comparison import compare, summarise
from kd_lrp_plugin.training import trainer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VOID = {"meta", "link", "img", "br"}
INJECTION = "<script>alert(1)</script>"


class Reader(HTMLParser):
    """Tags, ids, headings, texts; fails where tags do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.headings: list[int] = []
        self.links: list[tuple[str, str]] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        assert len(found) == len(attributes), f"{tag} has an attribute twice"
        self.tags.add(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.headings += [int(tag[1])] if re.fullmatch(r"h\d", tag) else []
        self.links += [(k, v) for k, v in found.items() if k in ("src", "href", "srcset", "action")]
        self.images += [found] if tag == "img" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """A student beside a teacher of random weights, and the same student alone."""
    root = tmp_path_factory.mktemp("runs")
    trainer.distill(RunSpec(KD, [*SMALL, *NO_TEACHER], root / "kd/0", device="cpu"))
    trainer.distill(RunSpec(BASELINE, SMALL, root / "ce/0", device="cpu"))
    for name in ("kd/0", "ce/0"):
        evaluate.evaluate(root / name, 200)
    return [root / "kd/0", root / "ce/0"]


@pytest.fixture
def kd(runs, tmp_path) -> Path:
    """A copy of the first run, to add to."""
    return Path(shutil.copytree(runs[0], tmp_path / "own/kd/0"))


@pytest.fixture(scope="module")
def study(runs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("studies") / "core"
    folder.mkdir()
    rows = [
        {
            "configuration": name,
            "point": {},
            "seed": seed,
            "state": "finished",
            "folder": str(runs[0]) if (name, seed) == ("KD", 0) else "gone",
            "measures": {"test_accuracy": base + seed / 100, "parameters": 1_234_567},
        }
        for name, base in (("CE", 0.7), (f"KD {INJECTION}", 0.75), ("KD", 0.8))
        for seed in range(3)
    ]
    rows[4]["measures"]["test_accuracy"] += 0.005  # differences that differ
    content = {
        **{"file": "core.yaml", "question": "does it help?", "final": True, "failed": {}},
        **{"state": "All 9 runs are finished.", "overrides": ["a=1"], "seeds": [0, 1, 2]},
        **{
            "root": "runs",
            "only": [],
            "axes": {},
            "compare_to": "CE",
            "measures": ["test_accuracy", "parameters"],
        },
        **{"prepared": [], "runs": rows},
        "table": summarise(rows, ["test_accuracy", "parameters"]),
        "comparisons": compare(rows, ["test_accuracy", "parameters"], "CE"),
    }
    (folder / "study.json").write_text(json.dumps(content))
    Image.new("RGB", (300, 200), "white").save(folder / "study.png")
    return folder


@pytest.fixture(scope="module")
def check(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checks") / "check"
    folder.mkdir()
    summary = {
        "options": {
            "root": "/data/mri",
            **{"group_by": "patient", "manifest": "who.csv", "test_share": 0.3},
        },
        "command": ["kd-lrp", "check-data", "/data/mri", "--test-share", 0.3],
        "summary": "LEAK: 3 of 533 test images have a duplicate in Training.\nA second line.",
        "leaks": {
            "Testing": {
                "images": 533,
                "against": ["Training"],
                "duplicate": 3,
                "exact": 1,
                "near": 2,
            }
        },
        "pairs": {"within": {"exact": 4, "hash": 5}, "across": {"exact": 1, "hash": 2}},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "pairs.csv").write_text("file_a,file_b\n")
    return folder


@pytest.fixture(scope="module")
def choice(tmp_path_factory) -> Path:
    ranked = [
        {
            **{"candidate": name, "score": place, "std": 0.1, "parameters": 10.0**place},
            **{"macs": 5.0, "rank by score": place, "front": place == 1, "problem": None},
        }
        for place, name in enumerate(("small", "middle", INJECTION), start=1)
    ]
    question = {"score": "diswot", "seeds": [0, 1]}
    file = tmp_path_factory.mktemp("choices") / "choice.json"
    file.write_text(json.dumps({"candidate": "small", "question": question, "ranking": ranked}))
    return file


def written(folders, out, **options) -> Reader:
    page.write(folders, out, **options)
    return Reader(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(runs, study, check, choice, tmp_path_factory) -> Path:
    """A page with a part of everything."""
    out = tmp_path_factory.mktemp("pages") / "page.html"
    Image.new("RGB", (900, 600), "navy").save(check / "maps.png")
    size = page.write([*runs, study], out, check, choice, check)
    assert size == out.stat().st_size < 5_000_000
    return out


class TestWhatIsSaid:
    def test_teacher_and_student_stand_side_by_side_with_their_reduction(self, runs, whole):
        found = Reader(whole.read_text(encoding="utf-8"))
        evaluation = json.loads((runs[0] / "evaluation.json").read_text())
        for role in ("student", "teacher"):
            assert f"{100 * evaluation[role]['accuracy']:.1f} %" in found.text
            assert f"{evaluation[role]['cost']['macs']:,}" in found.text
        assert "13.2 times fewer (-92.4 %)" in found.text  # 4,924,540 and 373,076
        low, high = evaluation["student"]["accuracy_interval"]
        assert f"{100 * low:.1f}–{100 * high:.1f} %" in found.text  # noqa: RUF001
        assert "single run" in found.text
        assert "not for clinical use" in found.text

    def test_the_recorded_command_repeats_a_run_and_without_one_none_is_made_up(self, kd, tmp_path):
        about = json.loads((kd / "environment.json").read_text())
        words = ["kd-lrp", "distill", "my config.yaml", "--set", "image_size=48"]
        about["sessions"][0]["command"] = words
        (kd / "environment.json").write_text(json.dumps(about))
        found = written([kd], tmp_path / "page.html")
        assert "kd-lrp distill 'my config.yaml' --set image_size=48" in found.text
        assert "what do the teacher's softened predictions add?" in found.text
        session = about["sessions"][0]
        assert session["versions"]["torch"] in found.text
        assert str(session["commit"] or "not under git") in found.text
        del session["command"]
        (kd / "environment.json").write_text(json.dumps(about))
        found = written([kd], tmp_path / "page.html")
        assert "Train and test" not in found.text

    def test_what_made_a_teacher_comes_before_what_it_teaches(self, runs, kd, tmp_path):
        teacher = Path(shutil.copytree(runs[1], tmp_path / "teacher"))
        about = json.loads((teacher / "environment.json").read_text())
        about["sessions"][-1]["command"] = ["kd-lrp", "distill", "teacher.yaml"]
        (teacher / "environment.json").write_text(json.dumps(about))
        about = json.loads((kd / "environment.json").read_text())
        about["sessions"][-1]["command"] = ["kd-lrp", "distill", "student.yaml"]
        (kd / "environment.json").write_text(json.dumps(about))
        evaluation = json.loads((kd / "evaluation.json").read_text())
        evaluation["command"] = ["kd-lrp", "evaluate", "a", "b", "--resamples", "200"]
        (kd / "evaluation.json").write_text(json.dumps(evaluation))
        text = (kd / "config.yaml").read_text()
        named = text.replace("src_ckpt: null", f"src_ckpt: {teacher}/best.pt")
        assert named != text
        (kd / "config.yaml").write_text(named)
        found = content.gather([kd], None, None, None)
        assert [(step["name"], step["commands"]) for step in found["steps"]] == [
            ("Train teachers, and students without one", ["kd-lrp distill teacher.yaml"]),
            ("Train and test students", ["kd-lrp distill student.yaml"]),
            ("Evaluate", ["kd-lrp evaluate a b --resamples 200"]),
        ]

    def test_the_leak_check_behind_a_split_table_is_found(self, kd, check, tmp_path):
        folder = Path(shutil.copytree(check, tmp_path / "check"))
        settings = content._read_run(kd, "kd")
        for entry in settings["config"]["datasets"].values():
            entry["init"] = {"kwargs": {"manifest": str(folder / "clean_split.csv")}}
        tables = sections.list_split_tables([settings])
        assert tables == {"kd": {(folder / "clean_split.csv").resolve()}}
        assert sections.find_data_check(tables) == folder.resolve()
        assert sections.find_data_check({"kd": {tmp_path / "elsewhere/split.csv"}}) is None

    def test_published_students_stand_beside_runs_on_brain_mri_each_with_its_split(
        self, runs, kd, tmp_path
    ):
        text = (kd / "config.yaml").read_text().replace("phantom/test", "brain_mri/test")
        (kd / "config.yaml").write_text(text)
        found = written([kd], tmp_path / "page.html")
        assert "Beside published students" in found.text
        for figure in ("0.9610", "0.9530", "0.9535", "0.9802", "322,421,548", "306,724,268"):
            assert figure in found.text
        accuracy = json.loads((kd / "summary.json").read_text())["test_accuracy"]
        (own,) = [
            row
            for row in content.gather([kd], None, None, None)["published"]["students"]
            if row["model"] == "kd"
        ]
        assert own["accuracy"] == pytest.approx(accuracy)
        assert own["split"] == published.OWN
        assert all(row["split"] and row["source"] for row in published.PUBLISHED)
        assert content.gather([runs[0]], None, None, None)["published"] is None

    def test_methods_without_maps_are_named_with_the_reason(self):
        reasons = {"student": {"lime": "takes long", "rise": "takes long"}}
        row = {"model": "student", "method": "rise"}
        runs = [{"name": "kd", "explanations": {"rows": [row], "without": reasons}}]
        found = sections.list_left_out([*runs, {"name": "ce", "explanations": None}])
        assert found == ["Without lime: takes long (student of kd)."]

    def test_every_loss_term_has_its_curve(self, runs, whole):
        found = Reader(whole.read_text(encoding="utf-8"))
        alts = " ".join(image["alt"] or "" for image in found.images)
        lines = (runs[0] / "metrics.jsonl").read_text().splitlines()
        terms = {k.partition("_")[2] for k in json.loads(lines[0]) if k.startswith("train_")}
        assert {"loss", "kd", "accuracy"} <= terms
        for term in terms:  # the only term is the loss itself
            assert (f"{term} of kd over the epochs: training ends at" in alts) == (term != "kd")

    def test_what_is_missing_is_said_with_its_command(self, runs, kd, tmp_path):
        found = written([kd], tmp_path / "page.html")
        assert "kd-lrp explain" in found.text
        assert "phantom draws the images" in found.text  # nothing on disk that could leak
        text = (kd / "config.yaml").read_text()
        (kd / "config.yaml").write_text(
            text.replace("kd_lrp_plugin.torchdistill.phantom", "my.phantom")
        )
        found = written([kd], tmp_path / "page.html")
        assert "No leak check was made" in found.text
        assert "kd-lrp check-data" in found.text

    def test_a_run_that_is_not_evaluated_is_shown_with_the_command(self, kd, tmp_path):
        (kd / "evaluation.json").unlink()
        found = written([kd], tmp_path / "page.html")
        assert "Not evaluated:" in found.text
        assert f"kd-lrp evaluate {kd}" in found.text
        assert not (kd / "evaluation.json").exists()
        summary = json.loads((kd / "summary.json").read_text())
        assert f"{100 * summary['test_accuracy']:.1f} %" in found.text

    def test_nothing_that_a_run_folder_names_is_run(self, kd, tmp_path):
        """Neither its tags and dependencies nor its models; a device that it names is not read."""
        (kd / "evaluation.json").unlink()
        text = (kd / "config.yaml").read_text()
        made = f"made: !import_call {{key: os.mkdir, init: {{args: [{tmp_path}/ran]}}}}\n"
        (tmp_path / "hostile_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        text = text.replace("kd_lrp_plugin.torchdistill]", "hostile_module]")
        (kd / "config.yaml").write_text(f"{made}{text}")
        about = json.loads((kd / "environment.json").read_text())
        about["sessions"][-1]["config"] = "/dev/zero"
        (kd / "environment.json").write_text(json.dumps(about))
        code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from kd_lrp_plugin.config import build
def never(*_, **__):
    raise AssertionError("constructed")
build.construct = build.build_model_entry = never
from kd_lrp_plugin.report import page
page.write([{str(kd)!r}], {str(tmp_path / "page.html")!r})
assert "hostile_module" not in sys.modules
"""
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
        assert (tmp_path / "page.html").is_file()
        assert not (tmp_path / "ran").exists()

    def test_leak_check_ranking_and_study_are_taken_in(self, study, whole):
        found = Reader(whole.read_text(encoding="utf-8"))
        assert "LEAK: 3 of 533" in found.text
        assert "A second line." in found.text
        assert "recorded selection: small ." in found.text
        assert "does it help?" in found.text
        comparison = json.loads((study / "study.json").read_text())["comparisons"][0]
        assert f"{comparison['p']:.4f}" in found.text
        assert f"{comparison['low']:+.4f} to {comparison['high']:+.4f}" in found.text
        assert "The same at every seed" in found.text
        assert "1,234,567" in found.text
        assert "parameters, n seeds each" not in found.text

    def test_records_of_other_predictions_are_not_shown(self, kd, tmp_path):
        of = RunFolder(kd).of
        figures = {name: {"mean": 0.5, "n": 7, "chance": 0.4} for name in ("insertion", "deletion")}
        row = {"model": "student", "method": "grad_cam", "layer": "layer2", "samples": 7}
        row |= {"weights": "abc", "metrics": figures}
        evaluation = json.loads((kd / "evaluation.json").read_text())
        assert evaluation["predictions"] == of["predictions"]
        regions = {"relevance": {"student": {}}, "replaced": {"student": {}}, "object_removed": {}}
        export = {"format": "timm", "images": 1, "output": "logits", "models": []}
        stale = {
            "evaluation.json": evaluation,
            "explanations.json": {"rows": [row]},
            "audit.json": {**regions, "images": 1},
            "export-timm/export.json": export,
        }
        (kd / "export-timm").mkdir()
        Image.new("RGB", (90, 60), "navy").save(kd / "explanations.png")
        for predictions, shown in ((of["predictions"], True), ("of others", False)):
            for name, record in stale.items():
                (kd / name).write_text(json.dumps({**record, "predictions": predictions}))
            found = content.gather([kd], None, None, None)
            assert (found["unevaluated"] == [], found["unexplained"] == []) == (shown, shown)
            parts = ("explained", "audits", "exports", "sheets")
            assert [bool(found[part]) for part in parts] == 4 * [shown]
        assert RunFolder(kd).evaluated is False  # a study evaluates it again

    def test_a_teacher_is_a_run_only_if_it_has_its_weights(self, runs, kd, tmp_path):
        """Two perfect models have the same confusion matrix."""
        alone = Path(shutil.copytree(runs[1], tmp_path / "own/alone/0"))
        evaluation = json.loads((kd / "evaluation.json").read_text())
        evaluation = {"student": evaluation["teacher"]}
        (alone / "evaluation.json").write_text(json.dumps(evaluation))
        file = RunFolder(alone).read_environment()["outputs"]["best.pt"]
        about = json.loads((kd / "environment.json").read_text())
        about["files"]["models.teacher_model.src_ckpt"] = file
        (kd / "environment.json").write_text(json.dumps(about))
        found = content.gather([kd, alone], None, None, None)
        assert [model["name"] for model in found["models"]] == ["alone", "kd"]
        found["runs"][0]["teacher_files"] = ["another"]
        models = content._list_models(found["runs"])
        assert [model["name"] for model in models] == ["teacher", "kd", "alone"]

    def test_maps_are_shown_with_their_figures(self, kd, tmp_path):
        Image.new("RGB", (900, 600), "navy").save(kd / "explanations.png")
        figures = {"relevance_mass_accuracy": {"mean": 0.123, "n": 7, "chance": 0.05}}
        figures |= {
            name: {"mean": 0.5, "n": 7, "chance": 0.4} for name in ("insertion", "deletion")
        }
        row = {"model": "student", "method": "grad_cam", "layer": "layer2", "samples": 7}
        row |= {"weights": "abc", "metrics": figures}
        (kd / "explanations.json").write_text(json.dumps({"rows": [row]}))
        found = written([kd], tmp_path / "page.html")
        assert "0.123" in found.text
        assert "inside, chance level" in found.text
        assert sum("relevance maps" in image["alt"] for image in found.images) == 1
        assert "No metrics of maps were computed" not in found.text

    def test_groups_and_audits_are_shown(self, kd, tmp_path):
        evaluation = json.loads((kd / "evaluation.json").read_text())
        group = {"n": 40, "accuracy": 0.625, "accuracy_interval": [0.4, 0.8]}
        by_group = {"random": {**group, "minus_teacher": -0.375}}
        evaluation["student"]["groups"] = {"by_group": by_group}
        (kd / "evaluation.json").write_text(json.dumps(evaluation))
        replaced = {"accuracy_before": 0.9, "accuracy": 0.4321, "flips": 0.5432}
        audit = {
            "images": 77,
            "relevance": {"student": {"corners": {"mean": 0.6789, "chance": 0.25, "n": 77}}},
            "replaced": {"student": {"corners": {"blur": replaced}}},
            "object_removed": {"student": {"accuracy_before": 0.9, "accuracy": 0.85}},
            "most_flips": 0.5432,
        }
        (kd / "audit-elsewhere.json").write_text(json.dumps(audit))
        Image.new("RGB", (90, 60), "navy").save(kd / "audit-elsewhere.png")
        found = written([kd], tmp_path / "page.html")
        for figure in ("-0.375", "0.400-0.800", "0.679", "0.543", "85.0 %", "elsewhere, 77 images"):
            assert figure in found.text
        assert sum("replaced" in image["alt"] for image in found.images) == 1
        (kd / "audit-elsewhere.json").write_text("{}")
        with pytest.raises(ValueError, match=r"audit-elsewhere\.json"):
            written([kd], tmp_path / "page.html")

    def test_exports_are_shown_with_their_command(self, kd, tmp_path):
        row = {"model": "onnxruntime", "file": "student.onnx", "accuracy": 0.7654}
        row |= {"agreement": 0.9876, "largest_difference": 3.21e-5}
        small = {**row, "model": "onnxruntime int8", "megabytes": 0.432, "latency_ms": 0.321}
        of_int8 = {"float_layers": 8, "layers": 53, "calibration_images": 128}
        of_int8 |= {"agreement_bound": 0.98, "validation_agreement": 0.985}
        export = {
            "format": "onnx",
            "command": ["kd-lrp", "export", "my run"],
            "images": 533,
            "output": "logits of the classes",
            "models": [{**row, "megabytes": 1.6, "latency_ms": 0.66}, small],
            "int8": {**of_int8, "validation_images": 296},
        }
        (kd / "export-onnx").mkdir()
        (kd / "export-onnx/export.json").write_text(json.dumps(export))
        found = written([kd], tmp_path / "page.html")
        for figure in ("0.765", "0.988", "3.2e-05", "0.432", "0.321", "8 of 53 layers", "0.985"):
            assert figure in found.text
        assert "kd-lrp export 'my run'" in found.text
        assert ("href", "#exports") in found.links
        (kd / "export-onnx/export.json").write_text('{"format": "onnx"}')
        with pytest.raises(ValueError, match=r"export\.json"):
            written([kd], tmp_path / "page.html")

    def test_a_primary_comparison_is_shown_with_what_was_registered(self, study, tmp_path):
        content = json.loads((study / "study.json").read_text())
        difference = {
            "reference": "CE",
            "n": 3,
            "mean": 0.1234,
            "std": 0.1,
            "low": 0.1,
            "high": 0.2,
        }
        primary = {"measure": "test_accuracy", "configuration": "KD", "minus": ["CE"]}
        primary |= {"where": {}, "seeds": [0, 1, 2], "complete": True}
        primary["differences"] = [difference | {"p": 0.01, "p_holm": 0.02}]
        copy = tmp_path / "core"
        copy.mkdir()
        (copy / "study.json").write_text(json.dumps(content | {"primary": primary}))
        found = written([copy], tmp_path / "page.html")
        assert "Registered in the study's file: test_accuracy; seeds 0, 1, 2." in found.text
        assert "+0.1234" in found.text

    def test_a_study_alone_shows_a_run_of_each_configuration(self, study, tmp_path):
        found = written([study], tmp_path / "page.html")
        assert "KD, seed 0" in found.text
        assert "Confusion matrices" in found.text
        assert "0.8100" in found.text

    def test_the_commands_are_those_that_were_recorded_each_once(self, study, check, tmp_path):
        """Of the study, of every run with metrics of maps, of the maps, of the leak check."""
        content_of_study = json.loads((study / "study.json").read_text())
        folder = tmp_path / "once"
        shutil.copytree(study, folder)
        for seed in (3, 4):
            run = tmp_path / f"runs/{seed}"
            run.mkdir(parents=True)
            words = ["kd-lrp", "explain", "runs/3", "runs/4", "--samples", 7]
            (run / "explanations.json").write_text(json.dumps({"rows": [], "command": words}))
        runs = [
            {**content_of_study["runs"][0], "folder": str(tmp_path / f"runs/{n}")} for n in (3, 4)
        ]
        words = ["kd-lrp", "study", "my study.yaml", "--seeds", "3,"]
        once = {**content_of_study, "runs": runs, "command": words}
        (folder / "study.json").write_text(json.dumps(once))
        (tmp_path / "maps").mkdir()
        Image.new("RGB", (30, 20)).save(tmp_path / "maps/maps.png")
        words = ["kd-lrp", "explain", "a", "b", "--out", "maps"]
        (tmp_path / "maps/maps.json").write_text(json.dumps({"command": words}))
        found = content.gather([folder], data_check=check, selection=None, maps=tmp_path / "maps")
        steps = {step["name"]: step["commands"] for step in found["steps"]}
        assert steps["Study"] == ["kd-lrp study 'my study.yaml' --seeds 3,"]
        assert steps["Explain"] == [
            "kd-lrp explain runs/3 runs/4 --samples 7",
            "kd-lrp explain a b --out maps",
        ]
        assert steps["Look for leaks"] == ["kd-lrp check-data /data/mri --test-share 0.3"]
        assert "Train and test" not in steps

    def test_of_a_large_grid_every_configuration_is_shown_before_its_second_place(self, tmp_path):
        rows = [
            {
                "configuration": name,
                "point": {"n": n},
                "seed": 0,
                "folder": str(tmp_path / name / str(n)),
            }
            for name in ("CE", "KD", "LRP")
            for n in range(4)
        ]
        teacher = {
            "configuration": "teacher",
            "point": {},
            "seed": 0,
            "folder": str(tmp_path / "t"),
        }
        for row in (*rows, teacher):
            Path(row["folder"]).mkdir(parents=True)
            for file in content.RUN_FILES:
                Path(row["folder"], file).touch()
        prepared = [teacher]
        study = {"name": "a", "prepared": prepared, "runs": rows}
        other = {"name": "b", "prepared": [], "runs": rows[:1]}
        found = [name for _, name in content._list_first_seeds([study, other])]
        assert found[:5] == [
            *("a: teacher, seed 0", "a: CE, n 0, seed 0", "a: KD, n 0, seed 0"),
            *("a: LRP, n 0, seed 0", "a: CE, n 1, seed 0"),
        ]
        assert len(found) == 13

    def test_runs_of_different_test_images_are_not_compared(self, runs, kd, tmp_path):
        rows = (kd / "predictions.csv").read_text().splitlines()
        about = json.loads((kd / "environment.json").read_text())
        del about["outputs"]  # as a run of an older version: its files are not known by their bytes
        (kd / "environment.json").write_text(json.dumps(about))
        (kd / "predictions.csv").write_text("\n".join(rows[:-1]) + "\n")
        found = written([kd, runs[1]], tmp_path / "page.html")
        assert "cannot be compared" in found.text

    @pytest.mark.parametrize(
        ("before", "after", "words"),
        [
            (200, 100, "2 times fewer (-50.0 %)"),
            (100, 300, "3.00 times as many (+200.0 %)"),
            (7, 7, "the same"),
            (None, 7, None),
        ],
    )
    def test_a_reduction_is_a_factor_and_a_share(self, before, after, words):
        assert content.reduction(before, after) == words


class TestTheFile:
    def test_is_valid_and_accessible_and_loads_nothing(self, whole):
        text = whole.read_text(encoding="utf-8")
        found = Reader(text)
        assert len(found.ids) == len(set(found.ids))
        for name, target in found.links:
            inside = target.startswith("data:") if name == "src" else target[1:] in found.ids
            assert inside or target == "data:,", target
        assert not re.search(r"https?://", text)
        assert not re.search(r"url\(|@import", text)
        assert found.tags.isdisjoint({"script", "iframe", "object", "form"})
        assert '<html lang="en">' in text
        assert found.headings[0] == 1
        assert found.headings.count(1) == 1
        assert all(b <= a + 1 for a, b in zip(found.headings, found.headings[1:], strict=False))
        assert all(image.get("alt") for image in found.images)

    def test_names_cannot_become_markup(self, kd, study, choice, tmp_path):
        text = (kd / "config.yaml").read_text()
        (kd / "config.yaml").write_text(f"{text}note: '{INJECTION}'\n")
        about = json.loads((kd / "environment.json").read_text())
        about["sessions"][0]["overrides"].append(f"a={INJECTION}")
        (kd / "environment.json").write_text(json.dumps(about))
        own = kd.rename(kd.parent / "<b>run&amp;")
        found = written([own, study], tmp_path / "page.html", selection=choice)
        assert INJECTION not in (tmp_path / "page.html").read_text()
        assert found.tags.isdisjoint({"script"})
        assert found.text.count(INJECTION) >= 4
        assert "<b>run&amp;" in found.text

    def test_large_pictures_are_made_smaller_until_the_page_fits(self, kd, tmp_path, monkeypatch):
        noise = Image.effect_noise((900, 900), 90).convert("RGB")
        noise.save(kd / "explanations.png")
        size = page.write([kd], tmp_path / "page.html")
        monkeypatch.setattr(page, "LIMIT", size - 100_000)
        assert page.write([kd], tmp_path / "page.html") < size - 100_000
        monkeypatch.setattr(page, "LIMIT", 10_000)
        with pytest.raises(ValueError, match="a page below 10,000 bytes"):
            page.write([kd], tmp_path / "other.html")
        assert not (tmp_path / "other.html").exists()

    def test_replaces_a_page_of_ours_and_nothing_else(self, runs, tmp_path):
        out = tmp_path / "new/page.html"
        page.write(runs[1:], out)
        page.write(runs[1:], out)
        assert [file.name for file in out.parent.iterdir()] == ["page.html"]
        other = tmp_path / "mine.html"
        other.write_text("<!DOCTYPE html><p>mine</p>")
        with pytest.raises(FileExistsError, match=r"mine\.html, which is something else"):
            page.write(runs, other)
        assert other.read_text() == "<!DOCTYPE html><p>mine</p>"
        with pytest.raises(FileExistsError, match="a new file or a page"):
            page.write(runs, tmp_path)


class TestRefusals:
    def test_folders_that_are_neither_run_nor_study_are_named(self, runs, check, kd, tmp_path):
        for folder, words in (
            (tmp_path, "a finished run or a study"),
            (tmp_path / "nowhere", "nothing at"),
            (check, "--data-check"),
        ):
            with pytest.raises(FileNotFoundError, match=words):
                page.write([*runs, folder], tmp_path / "page.html")
        (kd / "summary.json").unlink()
        with pytest.raises(FileNotFoundError, match="which is not finished"):
            page.write([kd], tmp_path / "page.html")
        assert not (tmp_path / "page.html").exists()

    def test_wrong_options_are_named(self, kd, tmp_path):
        for options, words in (
            ({"data_check": kd}, "a leak check"),
            ({"maps": tmp_path}, "maps of several runs"),
            ({"selection": kd / "summary.json"}, "record of a choice"),
        ):
            with pytest.raises((FileNotFoundError, ValueError), match=words):
                page.write([kd], tmp_path / "page.html", **options)

    def test_a_damaged_file_is_named(self, kd, tmp_path):
        (kd / "evaluation.json").write_text("{")
        with pytest.raises(ValueError, match=r"evaluation\.json: expected intact JSON"):
            page.write([kd], tmp_path / "page.html")

    def test_the_command_says_where_the_page_is_and_names_errors(self, runs, tmp_path):
        out = tmp_path / "page.html"
        result = CliRunner().invoke(app, ["report", str(runs[1]), "--out", str(out)])
        assert result.exit_code == 0, result.output
        assert "written" in result.output
        assert f"kd-lrp report {runs[1]}" in Reader(out.read_text(encoding="utf-8")).text
        result = CliRunner().invoke(app, ["report", str(tmp_path), "--out", str(out)])
        assert result.exit_code == 1
        assert "a finished run or a study" in result.output


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
def test_a_browser_has_nothing_to_complain_of_on_a_phone(whole, tmp_path):
    """Framed in 360 pixels, the page is as wide as its frame, and the console stays empty."""
    shutil.copy(whole, tmp_path / "page.html")
    frame = """<iframe src="page.html" style="width:360px;height:640px;border:0"></iframe><script>
    onload = () => {
      const inner = document.querySelector("iframe").contentDocument;
      const images = [...inner.images].filter(image => !image.naturalWidth).length;
      const { scrollWidth, clientWidth } = inner.documentElement;
      document.title = `too wide by ${scrollWidth - clientWidth}, broken ${images}`;
    }</script>"""
    (tmp_path / "frame.html").write_text(frame)
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
        *("--disable-sync", "--allow-file-access-from-files", "--enable-logging=stderr"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"),
    ]
    address = (tmp_path / "frame.html").as_uri()
    ran = subprocess.run([*command, address], capture_output=True, text=True, timeout=120)
    assert "<title>too wide by 0, broken 0</title>" in ran.stdout
    assert "CONSOLE" not in ran.stderr


@pytest.mark.parametrize("text", ["null", "{}", "[]", '{"measures": 3}', '{"measures": []}', "3"])
def test_a_study_of_another_shape_is_named(text, tmp_path):
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(ValueError, match=r"study\.json: expected what kd-lrp has written"):
        page.write([tmp_path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
