"""Teacher assistants: chains of any length, each model trained once, and one that is chosen."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import BASELINE, CONFIGS, KD, SMALL

from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.metrics.efficiency import count_parameters
from kd_lrp_plugin.models.factory import build_model
from kd_lrp_plugin.runs.loading import load_models
from kd_lrp_plugin.studies import runner
from kd_lrp_plugin.studies.parser import read_plan
from kd_lrp_plugin.studies.plan import StudyOptions
from kd_lrp_plugin.training.trainer import distill

TEACHER = CONFIGS / "phantom/ce/resnet10t.yaml"
CHOSEN = CONFIGS / "phantom/takd/chosen_from_resnet10t.yaml"
FROM_CHOSEN = CONFIGS / "phantom/takd/test_resnet_from_chosen.yaml"


def taught(by: str, model: str = "test_resnet", teacher: str = "test_resnet") -> dict:
    """An entry of a study: a model that is taught by what ``by`` stands for."""
    changes = [
        f"models.teacher_model.src_ckpt={{{by}}}",
        f"models.teacher_model.kwargs.name={teacher}",
        f"models.student_model.kwargs.name={model}",
    ]
    return {"config": str(KD), "set": changes}


CHAIN = {
    "question": "Does a chain help?",
    "seeds": 2,
    "set": SMALL,
    "prepare": {
        "teacher": {"config": str(TEACHER)},
        "first": taught("teacher", "test_efficientnet", "resnet10t"),
        "second": taught("first", "test_efficientnet", "test_efficientnet"),
        "third": taught("second", "test_resnet", "test_efficientnet"),
    },
    "configurations": {"by the third": taught("third"), "alone": {"config": str(BASELINE)}},
    "measures": ["test_accuracy"],
}


def write(folder: Path, **changes) -> Path:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({**CHAIN, **changes}, sort_keys=False))
    return file


class TestChain:
    def test_of_three_is_planned_in_order_and_each_once(self, tmp_path):
        plan = read_plan(write(tmp_path))
        assert [run.name for run in plan.prepared] == ["teacher", "first", "second", "third"]
        folders = [run.folder for run in plan.prepared]
        needs = [run.needs for run in plan.prepared]
        assert needs == [(), *((folder,) for folder in folders[:3])]
        assert [run.needs for run in plan.runs if run.name == "by the third"] == [
            (folders[3],),
            (folders[3],),
        ]
        assert len(plan.trainings()) == 4 + 4

    def test_with_a_link_for_each_seed_has_one_of_each(self, tmp_path):
        prepare = {name: {**entry, "seed": "each"} for name, entry in CHAIN["prepare"].items()}
        plan = read_plan(write(tmp_path, prepare=prepare))
        by = {(run.name, run.seed): run for run in (*plan.prepared, *plan.runs)}
        for seed in (0, 1):
            for name, before in (("third", "second"), ("second", "first"), ("first", "teacher")):
                assert by[name, seed].needs == (by[before, seed].folder,)
            assert by["by the third", seed].needs == (by["third", seed].folder,)
        assert len(plan.prepared) == 8

    def test_names_what_comes_before_where_a_link_is_taught_by_a_later_one(self, tmp_path):
        links = CHAIN["prepare"]
        prepare = {name: links[name] for name in ("teacher", "second", "first")}
        with pytest.raises(ValueError, match=r"prepare 'second': set: in braces: .*got 'first'"):
            read_plan(write(tmp_path, prepare=prepare))

    def test_with_one_link_for_all_seeds_behind_one_for_each_is_refused(self, tmp_path):
        prepare = dict(CHAIN["prepare"])
        prepare["teacher"] = {**prepare["teacher"], "seed": "each"}
        words = (
            r"prepare 'first': seed: expected each, as of \['teacher'\], got 0\. Its model of one"
        )
        with pytest.raises(ValueError, match=words):
            read_plan(write(tmp_path, prepare=prepare))

    @pytest.mark.slow
    def test_of_three_passes_the_check_and_is_trained_each_by_the_one_before(
        self, tmp_path, monkeypatch
    ):
        """Two links of one kind: the check must not take one for both."""
        trained = []

        class InThisProcess:
            def __init__(self, todo, *_) -> None:
                self.todo = todo

            def work(self):
                for run in self.todo:
                    distill(run.spec(StudyOptions(device="cpu")))
                    trained.append(run.name)
                    yield

        monkeypatch.setattr(runner, "StudyExecutor", InThisProcess)
        file, root, only = write(tmp_path), tmp_path / "runs", ["configuration=by the third"]
        options = StudyOptions(seeds=1, only=only, root=root, out=tmp_path / "out", device="cpu")
        runner.run_study(file, options)
        assert trained == ["teacher", "first", "second", "third", "by the third"]
        chain = read_plan(file, seeds=1, root=root, only=only).trainings()
        for before, run in itertools.pairwise(chain):
            best = torch.load(before.folder / "best.pt", weights_only=True)["model"]
            of_teacher = load_models(run.folder, ("teacher",))["teacher"].state_dict()
            assert all(torch.equal(best[key], of_teacher[key]) for key in best)


def test_the_study_of_a_chosen_assistant_chooses_it_once_for_all_seeds():
    plan = read_plan(CONFIGS / "studies/takd_chosen.yaml")
    teacher, assistant = plan.prepared
    assert assistant.needs == (teacher.folder,)
    needs = {run.name: run.needs for run in plan.runs}
    assert needs == {
        "alone": (),
        "direct": (teacher.folder,),
        "by the assistant": (teacher.folder, assistant.folder),
    }
    records = {
        change for run in (assistant, *plan.runs) for change in run.overrides if "record" in change
    }
    assert {change.partition("=")[2] for change in records} == {
        "runs/studies/takd_chosen/assistant.json"
    }


FEW = [*SMALL, "datasets.phantom/train.init.kwargs.size=40"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Teacher and assistant where the configs look for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("chosen"))
        teacher = Path("runs/phantom/ce/resnet10t/0/best.pt")
        teacher.parent.mkdir(parents=True)
        torch.manual_seed(0)
        torch.save(build_model("resnet10t", 4).state_dict(), teacher)
        seeds = "models.student_model.kwargs.seeds=[0]"
        distill(RunSpec(CHOSEN, [*FEW, seeds], device="cpu"))
        return Path().resolve()


class TestChosenAssistant:
    def test_has_a_size_between_those_of_teacher_and_student(self, folder):
        sizes = {
            name: count_parameters(build_model(name, 4)) for name in ("test_resnet", "resnet10t")
        }
        summary = json.loads(
            (folder / "runs/phantom/takd/chosen_from_resnet10t/0/summary.json").read_text()
        )
        assert sizes["test_resnet"] < summary["parameters"] < sizes["resnet10t"]
        record = json.loads((folder / "runs/phantom/takd/chosen_from_resnet10t.json").read_text())
        names = [row["candidate"] for row in record["ranking"]]
        assert len(names) == 3
        assert not {"test_resnet", "resnet10t"} & set(names)

    def test_teaches_the_student(self, folder, monkeypatch):
        monkeypatch.chdir(folder)
        seeds = "models.teacher_model.kwargs.seeds=[0]"
        distill(RunSpec(FROM_CHOSEN, [*FEW, seeds], device="cpu"))
        run = Path("runs/phantom/takd/test_resnet_from_chosen/0")
        models = load_models(run)
        best = Path("runs/phantom/takd/chosen_from_resnet10t/0/best.pt")
        assistant = torch.load(best, weights_only=True)
        loaded = models["teacher"].state_dict()
        assert all(torch.equal(assistant["model"][key], loaded[key]) for key in loaded)
        assert count_parameters(models["student"]) < count_parameters(models["teacher"])

    def test_of_another_question_is_refused_before_training(self, folder, monkeypatch):
        monkeypatch.chdir(folder)
        with pytest.raises(ValueError, match=r"another seeds in .*Delete the record"):
            distill(RunSpec(FROM_CHOSEN, FEW, "other", device="cpu"))

    def test_is_refused_where_no_candidate_lies_between(self, folder, monkeypatch):
        monkeypatch.chdir(folder)
        changes = ["budget=[params=3M..4M]", "record=none.json"]
        changes = [f"models.student_model.kwargs.{change}" for change in changes]
        with pytest.raises(
            ValueError, match=r"got params=3000000\.\.4000000\. The nearest is .*channels"
        ):
            distill(RunSpec(CHOSEN, [*FEW, *changes], "none", device="cpu"))
