"""A student that chooses itself: once, recorded, and refused for another question."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import CONFIGS, NO_TEACHER, SMALL
from typer.testing import CliRunner

from kd_lrp_plugin import hook, results, training
from kd_lrp_plugin.cli import app
from kd_lrp_plugin.config import resolve_config
from kd_lrp_plugin.data import Phantom
from kd_lrp_plugin.experiment import construct
from kd_lrp_plugin.progress import Silence

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


class TestChoice:
    def test_is_made_once(self, monkeypatch):
        model = hook.diswot_student(**asked())
        content = json.loads(Path("choice.json").read_text())
        assert content["candidate"] == content["ranking"][0]["candidate"]
        assert content["ranking"][0]["score"] < content["ranking"][1]["score"]
        monkeypatch.setattr(hook, "select", None)
        again = hook.diswot_student(**asked())
        assert list(again.state_dict()) == list(model.state_dict())

    def test_draws_the_same_weights_as_a_choice_that_was_made_before(self):
        """So a run that selects and one that reads the record begin alike."""
        weights = []
        for _ in range(2):
            torch.manual_seed(3)
            model = hook.diswot_student(**asked())
            weights.append([*(p.sum().item() for p in model.parameters()), torch.rand(1).item()])
        assert weights[0] == weights[1]

    def test_tells_who_listens_how_far_it_is(self):
        class Listener(Silence):
            def __init__(self):
                self.told = []

            def track(self, items, what, total):
                self.told.append((what, total))
                return items

        with Listener() as listener:
            hook.diswot_student(**asked())
        assert ("scoring", 2) in listener.told
        hook.diswot_student(**asked(record="other.json"))
        assert len(listener.told) == 2

    def test_needs_no_data_once_it_is_made(self):
        hook.diswot_student(**asked())
        assert hook.diswot_student(**asked(data=None)) is not None

    @pytest.mark.parametrize(
        "changes",
        [{"candidates": ["test_resnet"]}, {"score": "relation_l2"}, {"budget": ["params=1M"]}],
    )
    def test_of_another_question_is_refused(self, changes):
        hook.diswot_student(**asked())
        with pytest.raises(ValueError, match=r"Delete the record to select again"):
            hook.diswot_student(**asked(**changes))

    def test_keeps_the_budget(self):
        hook.diswot_student(**asked(budget=["params=200K"]))
        assert json.loads(Path("choice.json").read_text())["candidate"] == "test_efficientnet"
        with pytest.raises(ValueError, match="nearest is test_efficientnet"):
            hook.diswot_student(**asked(budget=["params=1K"], record="other.json"))

    def test_leaves_out_what_cannot_be_compared_only_when_asked(self):
        question = asked(score="reference_semantic", candidates=["resnet10t", "test_resnet"])
        with pytest.raises(ValueError, match=r"(?s)test_resnet: .*exclude_failures"):
            hook.diswot_student(**question)
        assert not Path("choice.json").exists()
        hook.diswot_student(**question, exclude_failures=True)
        assert json.loads(Path("choice.json").read_text())["candidate"] == "resnet10t"

    def test_is_among_spaces_choices_and_entries(self):
        for candidates, n in (
            ("thesis", 16),
            ({"width": [0.35, 0.5]}, 2),
            ([{"key": "timm_model", "kwargs": {"name": "test_resnet", "num_classes": 4}}], 1),
        ):
            assert len(hook.entries_of(hook.ask(**asked(candidates=candidates)))) == n

    def test_scores_nothing_twice(self):
        """Not even where the data set draws its images anew each time."""
        question = hook.ask(**asked(data=Phantom(size=8, image_size=32, augment=True)))
        hook.select(question)
        torch.manual_seed(7)
        lines = Path("choice.scores.jsonl").read_text()
        hook.select(question)
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
        ],
    )
    def test_refuses_wrong_questions(self, changes, words):
        with pytest.raises(ValueError, match=words):
            hook.diswot_student(**asked(**changes))


class TestRun:
    def test_trains_its_choice_and_is_loaded_without_data(self, monkeypatch):
        summary = training.distill(DISWOT, QUICK, "run", device="cpu")
        chosen = json.loads(RECORD.read_text())
        assert summary["student"] == chosen["entry"]
        RECORD.unlink()
        monkeypatch.setattr(Phantom, "__init__", None)
        model, _ = results.load_run("run")
        assert sum(p.numel() for p in model.parameters()) == summary["parameters"]
        found = results.evaluate("run", 100)
        assert found["teacher"]["cost"]["parameters"] == 4_924_540

    def test_is_what_torchdistills_own_loader_builds(self):
        """The unmodified script reads the YAML and asks the registry for the student."""
        from torchdistill.models.registry import get_model

        content = construct(resolve_config(DISWOT, QUICK))
        entry = content["models"]["student_model"]
        model = get_model(entry["key"], entry.get("repo_or_dir"), **entry["kwargs"])
        assert model(torch.randn(2, 3, 48, 48)).shape == (2, 4)
        assert RECORD.is_file()


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

    def test_looks_at_another_budget_without_recording(self):
        budget = ["--budget", "params=200K"]
        result = CliRunner().invoke(app, ["select", str(DISWOT), *self.flags(), *budget])
        assert result.exit_code == 0, result.output
        assert "best by diswot: test_efficientnet" in result.output
        assert [file.name for file in RECORD.parent.iterdir()] == [f"{RECORD.stem}.scores.jsonl"]

    def test_says_what_a_config_without_a_selection_lacks(self):
        kd = CONFIGS / "phantom/kd/test_resnet_from_resnet10t.yaml"
        result = CliRunner().invoke(app, ["select", str(kd)])
        assert result.exit_code == 1
        assert "expected 'diswot_student', got 'timm_model'" in result.output


def test_a_question_is_the_same_read_from_yaml_again():
    content = construct(resolve_config(DISWOT, QUICK))
    question = hook.ask(**content["models"]["student_model"]["kwargs"])
    assert yaml.safe_load(yaml.safe_dump(question.words())) == question.words()
