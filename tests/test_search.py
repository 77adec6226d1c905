"""The search: it keeps its budget, goes on where it was, and scores nothing twice."""

import json
from functools import partial

import pytest
import torch

from kd_lrp_plugin.efficiency import count_parameters
from kd_lrp_plugin.search import search
from kd_lrp_plugin.selection import Candidate, Teacher, measure
from kd_lrp_plugin.spaces import MobileNetV2, Space

SPACE = Space({"width": (0.25, 0.35, 0.5), "depth": (0.5, 1.0), "head": ("linear", "mlp")})
TEACHER = Teacher(partial(MobileNetV2(0.5, 0.5).build, 4), trained=False)


@pytest.fixture
def look(tmp_path):
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))]
    made: list[str] = []
    meanwhile: list = []

    def build(student: MobileNetV2):
        def make():
            made.append(str(student))
            while meanwhile:
                meanwhile.pop()()
            return student.build(4)

        return make

    def run(trials: int, **kwargs):
        return search(SPACE, build, TEACHER, batches, "diswot", trials, tmp_path, **kwargs)

    run.made, run.folder, run.batches, run.meanwhile = made, tmp_path, batches, meanwhile
    return run


def lines(folder) -> list[str]:
    rows = [json.loads(line) for line in (folder / "scores.jsonl").open()]
    return [row["candidate"] for row in rows]


def test_nothing_is_scored_twice_even_after_a_stop(look):
    look(6)
    first = lines(look.folder)
    students, rows, costs = look(30)
    after = lines(look.folder)
    assert after[: len(first)] == first
    assert len(after) == len(set(after)) <= len(SPACE)
    assert set(students) == {row["candidate"] for row in rows} == set(costs) == set(after)


def test_a_search_that_is_done_returns_the_same_without_work(look):
    found = look(8)
    before = len(look.made)
    assert look(8) == found
    assert len(look.made) == before


def test_students_over_budget_are_not_scored(look):
    sizes = {str(s): count_parameters(s.build(4)) for s in SPACE}
    students, _, _ = look(25, budget={"parameters": 400_000.0})
    assert students
    assert all(sizes[name] <= 400_000 for name in lines(look.folder))
    with pytest.raises(ValueError, match="Allow more trials or a larger budget"):
        look(26, budget={"parameters": 1.0})


def test_a_search_scores_as_a_ranking_of_all_does(look):
    """Twelve students are few enough to see nearly all of them, and the best."""
    candidates = [Candidate(str(s), partial(s.build, 4)) for s in SPACE]
    every = measure(candidates, TEACHER, look.batches, ["diswot"])
    _, found, _ = look(60)
    by_name = {row["candidate"]: row["scores"]["diswot"] for row in every}
    assert len(found) >= 10
    assert all(by_name[row["candidate"]] == row["scores"]["diswot"] for row in found)
    assert min(row["scores"]["diswot"] for row in found) == min(by_name.values())


def test_processes_that_share_a_folder_share_its_trials(look):
    """Another one finishes five of eight while this one is at its first: it does three itself."""
    look.meanwhile.append(lambda: look(5))
    look(8)
    journal = (look.folder / "study.journal").read_text().splitlines()
    values = [line for line in journal if "values" in json.loads(line)]
    assert len(values) == 8
