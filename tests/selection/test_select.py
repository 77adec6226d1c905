"""A student that chooses itself: once, recorded, and refused for another question."""

import json
import os
import subprocess
import sys
from pathlib import Path

import preloaded
import pytest
import torch
import yaml
from small_runs import CONFIGS, NO_TEACHER, SMALL
from typer.testing import CliRunner

from kd_lrp_plugin.cli.main import app
from kd_lrp_plugin.config.build import construct
from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.evaluation import evaluate
from kd_lrp_plugin.metrics.efficiency import count_macs
from kd_lrp_plugin.models.factory import build_model
from kd_lrp_plugin.runs import loading
from kd_lrp_plugin.selection import select
from kd_lrp_plugin.selection.select import Selection
from kd_lrp_plugin.selection.spec import SelectionSpec
from kd_lrp_plugin.torchdistill import models
from kd_lrp_plugin.training import trainer
from kd_lrp_plugin.utils.progress import NullProgress

DISWOT = CONFIGS / "phantom/diswot/chosen_from_resnet10t.yaml"
FEW = "models.student_model.kwargs.candidates=[test_resnet, test_efficientnet]"
QUICK = [
    *(*SMALL, *NO_TEACHER, FEW),
    *("models.student_model.kwargs.batch_size=4", "models.student_model.kwargs.seeds=[0]"),
]
RECORD = Path("runs/phantom/diswot/chosen_from_resnet10t.json")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def asked(**changes) -> dict:
    teacher = {"key": "timm_model", "kwargs": {"name": "resnet10t", "num_classes": 4}}
    usual = {
        "num_classes": 4,
        "record": "choice.json",
        "data": Phantom(size=8, image_size=32),
        "teacher": teacher,
        "candidates": ["test_resnet", "test_efficientnet"],
        "batch_size": 4,
    }
    return usual | changes


def rank(kwargs: dict) -> list[dict]:
    return Selection(SelectionSpec.from_kwargs(**kwargs), models.make_builder).rank()


class TestChoice:
    def test_is_made_once(self, monkeypatch):
        model = models.diswot_student(**asked())
        content = json.loads(Path("choice.json").read_text())
        assert content["candidate"] == content["ranking"][0]["candidate"]
        assert content["ranking"][0]["score"] < content["ranking"][1]["score"]
        monkeypatch.setattr(models, "Selection", None)
        again = models.diswot_student(**asked())
        assert list(again.state_dict()) == list(model.state_dict())

    def test_draws_the_same_weights_as_a_choice_that_was_made_before(self):
        """So a run that selects and one that reads the record begin alike."""
        weights = []
        for _ in range(2):
            torch.manual_seed(3)
            model = models.diswot_student(**asked())
            weights.append([*(p.sum().item() for p in model.parameters()), torch.rand(1).item()])
        assert weights[0] == weights[1]

    def test_tells_who_listens_how_far_it_is(self):
        class Listener(NullProgress):
            def __init__(self):
                self.told = []

            def track(self, items, what, total):
                self.told.append((what, total))
                return items

        with Listener() as listener:
            models.diswot_student(**asked())
        assert ("scoring", 2) in listener.told
        models.diswot_student(**asked(record="other.json"))
        assert len(listener.told) == 2

    def test_needs_no_data_once_it_is_made(self):
        models.diswot_student(**asked())
        assert models.diswot_student(**asked(data=None)) is not None

    @pytest.mark.parametrize(
        "changes",
        [
            {"candidates": ["test_resnet"]},
            {"candidates": {"width": [0.5]}},
            {"score": "relation_l2"},
            {"budget": ["params=1M"]},
            {"num_classes": 7},
            {"data": Phantom(size=8, image_size=48)},
            {"data": Phantom(size=9, image_size=32)},
        ],
    )
    def test_of_another_question_is_refused(self, changes):
        space = {"candidates": {"width": [0.35]}, "score": "parameters"}
        models.diswot_student(**asked(**space))
        with pytest.raises(ValueError, match=r"Delete the record to select again"):
            models.diswot_student(**asked(**space | changes))

    def test_counts_images_as_wide_as_they_are(self):
        """A budget between the costs of 32x64 and of 64x64 pixels admits the former."""
        images = [(torch.randn(3, 32, 64), index % 4) for index in range(4)]
        macs = {
            size: count_macs(build_model("test_resnet", 4), size) for size in ((32, 64), (64, 64))
        }
        budget = [f"macs={sum(macs.values()) // 2}"]
        few = {"candidates": ["test_resnet"], "score": "macs"}
        models.diswot_student(**asked(data=images, budget=budget, **few))
        (record,) = json.loads(Path("choice.json").read_text())["ranking"]
        assert record["macs"] == macs[32, 64] == -record["score"]

    def test_keeps_the_budget(self):
        models.diswot_student(**asked(budget=["params=200K"]))
        assert json.loads(Path("choice.json").read_text())["candidate"] == "test_efficientnet"
        with pytest.raises(ValueError, match="nearest is test_efficientnet"):
            models.diswot_student(**asked(budget=["params=1K"], record="other.json"))

    def test_leaves_out_what_cannot_be_compared_only_when_asked(self):
        question = asked(score="reference_semantic", candidates=["resnet10t", "test_resnet"])
        with pytest.raises(ValueError, match=r"(?s)test_resnet: .*exclude_failures"):
            models.diswot_student(**question)
        assert not Path("choice.json").exists()
        models.diswot_student(**question, exclude_failures=True)
        assert json.loads(Path("choice.json").read_text())["candidate"] == "resnet10t"

    def test_leaves_out_what_cannot_be_built_or_run_only_when_asked(self):
        """One has no such name, the other takes images of 160 pixels only."""
        broken = ["test_resnett", "test_vit_relpos"]
        question = asked(candidates=[*broken, "test_resnet"], score="parameters")
        with pytest.raises(ValueError, match=r"(?s)test_resnett: .*test_vit_relpos: .*160"):
            models.diswot_student(**question)
        models.diswot_student(**question, exclude_failures=True)
        content = json.loads(Path("choice.json").read_text())
        assert content["candidate"] == "test_resnet"
        assert [r["candidate"] for r in content["ranking"] if r["problem"]] == broken
        none = asked(candidates=broken, exclude_failures=True, record="other.json")
        with pytest.raises(ValueError, match="2 without"):
            models.diswot_student(**none)

    @pytest.mark.parametrize(
        "changes",
        [
            {"teacher": {"key": "timm_model", "kwargs": {"name": "test_resnet", "num_classes": 4}}},
            {"num_classes": 7},
        ],
    )
    @pytest.mark.parametrize("search", [0, 2])
    def test_does_not_rest_on_scores_of_another_question(self, changes, search):
        space = {"candidates": {"width": [0.25]}, "search": search}
        before = rank(asked(**space))
        after, fresh = (
            rank(asked(**space | changes, record=record))
            for record in ("choice.json", "fresh.json")
        )
        assert after == fresh
        assert after[0]["score"] != before[0]["score"]

    def test_is_among_spaces_choices_and_entries(self):
        for candidates, n in (
            ("thesis", 16),
            ({"width": [0.35, 0.5]}, 2),
            ([{"key": "timm_model", "kwargs": {"name": "test_resnet", "num_classes": 4}}], 1),
        ):
            assert len(SelectionSpec.from_kwargs(**asked(candidates=candidates)).entries()) == n

    def test_scores_nothing_twice(self):
        """Not even where the data set draws its images anew each time."""
        question = asked(data=Phantom(size=8, image_size=32, augment=True))
        rank(question)
        torch.manual_seed(7)
        lines = Path("choice.scores.jsonl").read_text()
        rank(question)
        assert Path("choice.scores.jsonl").read_text() == lines

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"batch_size": 99}, "expected 99 images, got 8 images"),
            ({"candidates": "thesi"}, "Did you mean 'thesis'"),
            ({"candidates": ["test_resnet"] * 2}, "different candidates"),
            ({"score": "diswt"}, "Did you mean 'diswot'"),
            ({"budget": ["param=1M"]}, "Did you mean 'params'"),
            ({"bugdet": ["params=1M"]}, "Did you mean 'budget'"),
            ({"budget": "params=1M"}, r"budget: expected a list, got 'params=1M'\. Such as"),
            ({"seeds": 3}, r"seeds: expected a list of one integer or more, got 3\. Such as"),
            ({"seeds": []}, "seeds: expected a list of one integer or more"),
            ({"layers": "layer3"}, "layers: expected a list of names, or none, got 'layer3'"),
            ({"data": "phantom/train"}, "data: expected a data set .* got 'phantom/train'. Alias"),
            ({"data": None}, "only a choice that is recorded needs none"),
            ({"data": [("image", 0)] * 8}, "images of one shape, as tensors, got str"),
            ({"teacher": {"kwargs": {}}}, "teacher: expected an entry of models"),
            ({"candidates": []}, "candidates: expected a space, its choices, or a list"),
            ({"candidates": [{"name": "test_resnet"}]}, "names of timm and entries of models"),
            ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
            ({"num_classes": "four"}, "num_classes: expected an integer >= 1, got 'four'"),
            ({"search": 9}, "search: expected a space of candidates, got a list"),
        ],
    )
    def test_refuses_wrong_questions(self, changes, words):
        with pytest.raises(ValueError, match=words):
            models.diswot_student(**asked(**changes))

    def test_says_what_a_question_lacks(self):
        with pytest.raises(ValueError, match="expected also record, teacher, got"):
            models.diswot_student(num_classes=4, data=None)

    def test_takes_entries_without_kwargs(self, monkeypatch):
        monkeypatch.setitem(models.MODEL_DICT, "small", lambda: build_model("test_resnet", 4))
        entry = {"key": "small"}
        models.diswot_student(**asked(teacher=entry, candidates=[entry]))
        assert json.loads(Path("choice.json").read_text())["entry"] == {
            "key": "small",
            "kwargs": {},
        }


class TestDryRun:
    def test_builds_a_student_within_budget_and_writes_nothing(self):
        question = asked(budget=["params=200K"], record="runs/choice.json")
        with select.dry_run():
            model = models.diswot_student(**question)
            search = {"candidates": "large", "search": 9, "budget": []}
            assert models.diswot_student(**question | search)(torch.zeros(2, 3, 32, 32)).shape == (
                2,
                4,
            )
        assert sum(p.numel() for p in model.parameters()) < 200_000
        assert list(Path.cwd().iterdir()) == []

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"budget": ["params=1K"]}, "nearest is test_efficientnet"),
            ({"candidates": ["test_resnett"]}, "test_resnett: "),
            ({"teacher": {"key": "timm_modell"}}, "Did you mean 'timm_model'"),
        ],
    )
    def test_says_what_a_choice_would_stumble_over(self, changes, words):
        with select.dry_run(), pytest.raises(ValueError, match=words):
            models.diswot_student(**asked(**changes))

    def test_builds_what_is_recorded(self):
        models.diswot_student(**asked(candidates=["test_efficientnet", "test_resnet"]))
        chosen = json.loads(Path("choice.json").read_text())["entry"]
        with select.dry_run():
            assert models.diswot_student(**asked()).chosen == chosen


class TestRun:
    def test_trains_its_choice_and_is_loaded_without_data(self, monkeypatch):
        summary = trainer.distill(RunSpec(DISWOT, QUICK, "run", device="cpu"))
        chosen = json.loads(RECORD.read_text())
        assert summary["student"] == chosen["entry"]
        RECORD.unlink()
        monkeypatch.setattr(Phantom, "__init__", None)
        model, _ = loading.load_run("run")
        assert sum(p.numel() for p in model.parameters()) == summary["parameters"]
        found = evaluate.evaluate("run", 100)
        assert found["teacher"]["cost"]["parameters"] == 4_924_540

    @pytest.mark.slow
    def test_is_chosen_by_the_first_of_two_processes_and_trained_by_both(self, tmp_path):
        words = ["-m", "kd_lrp_plugin.cli", "distill", DISWOT, "--device", "cpu", "--out", "run"]
        sets = (w for o in QUICK for w in ("--set", o))
        done = preloaded.run(*words, *sets, cwd=tmp_path, processes=2)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("diswot chose") == 1
        scored = RECORD.with_suffix(".scores.jsonl").read_text().splitlines()
        assert sorted(json.loads(line)["candidate"] for line in scored) == sorted(
            ["test_resnet", "test_efficientnet"]
        )
        chosen, summary = (
            json.loads(file.read_text()) for file in (RECORD, tmp_path / "run/summary.json")
        )
        assert summary["student"] == chosen["entry"]
        assert json.loads((tmp_path / "run/environment.json").read_text())["processes"] == 2

    def test_is_what_torchdistills_own_loader_builds(self):
        """The unmodified script reads the YAML and asks the registry for the student."""
        from torchdistill.models.registry import get_model

        content = construct(resolve_config(DISWOT, QUICK))
        entry = content["models"]["student_model"]
        model = get_model(entry["key"], entry.get("repo_or_dir"), **entry["kwargs"])
        assert model(torch.randn(2, 3, 48, 48)).shape == (2, 4)
        assert RECORD.is_file()


def test_the_first_of_two_choices_stays(monkeypatch):
    """Another process may choose at the same time, and train what it has recorded."""
    spec = SelectionSpec.from_kwargs(**asked())
    records = rank(asked())
    choose = Selection.rank

    def slowly(*words, **more):
        select.save_choice(spec, records[::-1])
        return choose(*words, **more)

    monkeypatch.setattr(Selection, "rank", slowly)
    model = models.diswot_student(**asked())
    assert json.loads(Path("choice.json").read_text())["candidate"] == records[-1]["candidate"]
    assert model.__dict__["chosen"] == records[-1]["entry"]
    assert {file.name for file in Path().iterdir()} == {"choice.json", "choice.scores.jsonl"}


def test_a_choice_is_recorded_where_files_cannot_be_linked(monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    question = SelectionSpec.from_kwargs(**asked())
    records = [{"candidate": "test_resnet", "entry": {"key": "timm_model", "kwargs": {}}}]
    select.save_choice(question, records)
    assert select.load_choice(question) == records[0]["entry"]
    assert [file.name for file in Path().iterdir()] == ["choice.json"]


class TestCommand:
    def flags(self, *more: str) -> list[str]:
        return [word for override in [*QUICK, *more] for word in ("--set", override)]

    def test_ranks_says_what_it_means_and_records(self):
        result = CliRunner().invoke(app, ["select", str(DISWOT), *self.flags()])
        assert result.exit_code == 0, result.output
        assert "Too few candidates" in result.output
        best = json.loads(RECORD.read_text())["candidate"]
        assert f"best by diswot: {best}" in result.output
        assert RECORD.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert "rank by parameters" in RECORD.with_suffix(".md").read_text()

    def test_check_chooses_nothing_and_writes_nothing(self):
        result = CliRunner().invoke(app, ["check", str(DISWOT), *self.flags()])
        assert result.exit_code == 0, result.output
        assert not list(Path().iterdir())
        budget = "models.student_model.kwargs.budget=[params=1K]"
        result = CliRunner().invoke(app, ["check", str(DISWOT), *self.flags(budget)])
        assert result.exit_code == 1
        assert "The nearest is test_efficientnet" in result.output
        assert not list(Path().iterdir())

    @pytest.mark.slow
    def test_writes_a_preview_of_another_budget_beside_the_record(self):
        budget = ["--budget", "params=200K"]
        result = CliRunner().invoke(app, ["select", str(DISWOT), *self.flags(), *budget])
        assert result.exit_code == 0, result.output
        assert "best by diswot: test_efficientnet" in result.output
        preview = RECORD.with_suffix(".preview.json")
        content = json.loads(preview.read_text())
        assert content["candidate"] == "test_efficientnet"
        assert content["question"]["budget"] == ["params=200K"]
        assert {file.name for file in RECORD.parent.iterdir()} == {
            f"{RECORD.stem}{end}"
            for end in (".scores.jsonl", ".preview.json", ".preview.md", ".preview.png")
        }

    def test_refuses_a_record_of_another_question_before_it_writes(self):
        models.diswot_student(**self.question())
        names = {file: file.read_bytes() for file in RECORD.parent.iterdir()}
        other = self.flags("models.student_model.kwargs.score=parameters")
        result = CliRunner().invoke(app, ["select", str(DISWOT), *other])
        assert result.exit_code == 1
        assert "another score" in result.output
        assert {file: file.read_bytes() for file in RECORD.parent.iterdir()} == names

    def question(self) -> dict:
        return construct(resolve_config(DISWOT, QUICK))["models"]["student_model"]["kwargs"]

    def test_says_why_a_candidate_is_left_out(self):
        few = "models.student_model.kwargs.candidates=[test_resnet, test_resnett]"
        more = self.flags(few, "+models.student_model.kwargs.exclude_failures=True")
        result = CliRunner().invoke(app, ["select", str(DISWOT), *more])
        assert result.exit_code == 0, result.output
        text = RECORD.with_suffix(".md").read_text()
        for said in (result.output, text):
            assert "- test_resnett: " in said
            assert "Did you mean" in said

    @pytest.mark.slow
    def test_shares_a_search_among_jobs_and_measures_the_latency_of_what_it_lists(self):
        space = "models.student_model.kwargs.candidates={width: [0.25, 0.35], depth: [0.5]}"
        more = self.flags(space, "+models.student_model.kwargs.search=4")
        result = CliRunner().invoke(app, ["select", str(DISWOT), *more, "--jobs", "2"])
        assert result.exit_code == 0, result.output
        ranking = json.loads(RECORD.read_text())["ranking"]
        assert all(record["latency"] > 0 for record in ranking)
        journal = RECORD.with_suffix(".search") / "study.journal"
        ended = [line for line in map(json.loads, journal.open()) if "values" in line]
        assert len(ended) == 4

    @pytest.mark.slow
    def test_takes_scores_and_spaces_of_a_users_module_into_its_processes(self, tmp_path):
        """With several threads they are spawned, and have imported nothing of this process."""
        Path("mine.py").write_text(
            "from kd_lrp_plugin.selection.scores.registry import SCORES, Score\n"
            "from kd_lrp_plugin.selection.spaces import SPACES, Space\n"
            "SCORES.register(Score(lambda s, t: float(s.logits.std()), 'a test'), 'my_score')\n"
            "SPACES.register(Space({'width': [0.25, 0.35], 'depth': [0.5]}), 'my_space')\n"
        )
        kwargs = "models.student_model.kwargs"
        more = self.flags(
            "dependencies=[kd_lrp_plugin.torchdistill, mine]",
            *(f"{kwargs}.candidates=my_space", f"{kwargs}.score=my_score"),
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "4"}
        words = [sys.executable, "-m", "kd_lrp_plugin.cli", "select", str(DISWOT), *more]
        done = subprocess.run(
            [*words, "--jobs", "2"], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "best by my_score" in done.stdout
        refused = CliRunner().invoke(app, ["select", str(DISWOT), *more, "--safe"])
        assert refused.exit_code == 1
        assert "a dependency on 'mine'" in refused.output

    def test_says_what_a_config_without_a_selection_lacks(self):
        kd = CONFIGS / "phantom/kd/test_resnet_from_resnet10t.yaml"
        result = CliRunner().invoke(app, ["select", str(kd)])
        assert result.exit_code == 1
        assert "expected 'diswot_student', got 'timm_model'" in result.output


def test_a_question_is_the_same_read_from_yaml_again():
    content = construct(resolve_config(DISWOT, QUICK))
    spec = SelectionSpec.from_kwargs(**content["models"]["student_model"]["kwargs"])
    assert yaml.safe_load(yaml.safe_dump(spec.identity())) == spec.identity()
