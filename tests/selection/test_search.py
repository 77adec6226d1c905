"""The search: it keeps its budget, goes on where it was, and scores nothing twice."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from kd_lrp_plugin.metrics.efficiency import count_parameters
from kd_lrp_plugin.models.factory import build_model
from kd_lrp_plugin.models.mobilenetv2 import MobileNetV2
from kd_lrp_plugin.selection.candidates import Candidate, ScoringSetup, Teacher
from kd_lrp_plugin.selection.scoring import score_candidates
from kd_lrp_plugin.selection.search import SearchTask, search
from kd_lrp_plugin.selection.spaces import Space

SPACE = Space({"width": (0.25, 0.35, 0.5), "depth": (0.5, 1.0), "head": ("linear", "mlp")})
TEACHER = Teacher(partial(MobileNetV2(0.5, 0.5).build, 4), trained=False)


def batches() -> list:
    torch.manual_seed(0)
    return [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))]


def plain(student: MobileNetV2) -> Candidate:
    return Candidate(str(student), partial(student.build, 4))


@pytest.fixture
def look(tmp_path):
    made: list[str] = []
    meanwhile: list = []
    broken: list[str] = []

    def make_candidate(student: MobileNetV2) -> Candidate:
        def make():
            made.append(str(student))
            if str(student) in broken:
                raise AssertionError("no such network")
            while meanwhile:
                meanwhile.pop()()
            return student.build(4)

        return Candidate(str(student), make)

    def run(trials: int, teacher: Teacher = TEACHER, space: Space = SPACE, **kwargs):
        setup = ScoringSetup(teacher, run.batches, [kwargs.get("score", "diswot")])
        task = SearchTask(space, make_candidate, setup, trials, kwargs.get("budget", {}))
        return search(task, run.folder, kwargs.get("jobs", 1))

    run.made, run.folder, run.batches, run.meanwhile = made, tmp_path, batches(), meanwhile
    run.broken = broken
    return run


def lines(folder) -> list[str]:
    rows = [json.loads(line) for line in (folder / "scores.jsonl").open()]
    return [row["candidate"] for row in rows]


def test_nothing_is_scored_twice_even_after_a_stop(look):
    look(6)
    first = lines(look.folder)
    students, rows, costs, problems = look(30)
    after = lines(look.folder)
    assert after[: len(first)] == first
    assert len(after) == len(set(after)) <= len(SPACE)
    assert set(students) == {row["candidate"] for row in rows} == set(costs) == set(after)
    assert problems == {}


def test_a_search_that_is_done_returns_the_same_without_work(look):
    found = look(8)
    before = len(look.made)
    assert look(8) == found
    assert len(look.made) == before


def test_students_outside_of_the_budget_are_not_scored(look):
    sizes = {str(s): count_parameters(s.build(4)) for s in SPACE}
    students, *_ = look(25, budget={"parameters": (250_000.0, 400_000.0)})
    assert students
    assert all(250_000 <= sizes[name] <= 400_000 for name in [*students, *lines(look.folder)])


def test_a_budget_that_no_student_keeps_names_the_nearest(look):
    smallest = "width0.25-depth0.5-linear"
    with pytest.raises(ValueError, match=f"nearest is {smallest}, which has params="):
        look(40, budget={"parameters": (0.0, 1.0)})
    assert not (look.folder / "scores.jsonl").exists()


def test_students_that_fail_are_named_and_the_others_go_on(look):
    """One that the search is sure to see: one process draws the same students each time."""
    look.folder = look.folder / "before"
    broken = next(iter(look(8).students))
    look.folder = look.folder.parent / "after"
    look.broken.append(broken)
    students, rows, costs, problems = look(40)
    assert problems == {broken: "AssertionError: no such network"}
    assert set(students) == {broken, *costs}
    assert broken not in {row["candidate"] for row in rows}
    assert len(costs) > 5


def test_a_score_that_fails_is_in_the_rows(look):
    """The reference compares feature maps of one shape only; this teacher's is another."""
    question = {"score": "reference_semantic", "space": Space({"width": (0.25,)})}
    teacher = Teacher(partial(build_model, "test_resnet", 4), trained=False)
    _, rows, _, problems = look(2, teacher, **question)
    assert problems == {}
    assert [row["scores"] for row in rows] == [{"reference_semantic": [None]}]
    assert "expected" in rows[0]["problems"]["reference_semantic"]


@pytest.mark.slow
def test_a_search_scores_as_a_ranking_of_all_does(look):
    """Twelve students are few enough to see nearly all of them, and the best."""
    setup = ScoringSetup(TEACHER, look.batches, ["diswot"])
    every = score_candidates([plain(s) for s in SPACE], setup)
    found = look(60).rows
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


def test_two_jobs_share_the_trials_and_meet_at_no_student(look):
    """One student: both are at it at once, and one of them waits for the other's score."""
    one = Space({"width": (0.5,), "head": ("mlp",)})
    students, rows, _, _ = look(6, space=one, jobs=2)
    assert list(students) == ["width0.5-depth1-mlp"] == lines(look.folder)
    assert rows == look(6, space=one).rows
    assert look.made == []  # here: the others have built them
    journal = (look.folder / "study.journal").read_text().splitlines()
    done = [line for line in map(json.loads, journal) if "values" in line]
    assert len(done) == 6
    assert len({line["worker_id"] for line in done}) == 2


@pytest.mark.parametrize("changed", ["teacher", "images", "students"])
def test_scores_of_another_question_are_not_taken_for_those_of_this_one(changed, tmp_path):
    def ask(folder: str, *changes: str):
        classes = 7 if "students" in changes else 4
        teacher = Teacher(
            partial(MobileNetV2(1.0 if "teacher" in changes else 0.5).build, 4), False
        )
        images, targets = batches()[0]
        given = [(images + ("images" in changes), targets)]

        def make_candidate(student: MobileNetV2) -> Candidate:
            return Candidate(
                str(student), partial(student.build, classes), entry={"key": f"{classes}"}
            )

        space = Space({"width": (0.25,), "depth": (0.5,)})
        setup = ScoringSetup(teacher, given, ["diswot"])
        return search(SearchTask(space, make_candidate, setup, 1), tmp_path / folder)

    before, after, fresh = ask("a"), ask("a", changed), ask("b", changed)
    assert after == fresh
    assert after.rows != before.rows
    assert (after.costs != before.costs) == (changed == "students")


def test_half_a_line_at_the_end_of_the_journal_is_cut_off(look):
    before = look(4)
    with (look.folder / "study.journal").open("a") as journal:
        journal.write('{"op_code": 4, "worker_id": "a-')  # as a power cut leaves it
    assert look(4) == before
    assert len(look(6).rows) >= len(before.rows)
    assert look(6) == look(6)


@pytest.mark.slow
def test_a_killed_search_goes_on_and_scores_nothing_twice(tmp_path):
    code = "import sys, test_search; test_search.much(sys.argv[1], 500)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    started = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    scores = tmp_path / "scores.jsonl"
    try:
        for _ in range(600):
            if scores.exists() and len(lines(tmp_path)) >= 3:
                break
            assert started.poll() is None
            time.sleep(0.1)
    finally:
        started.send_signal(signal.SIGKILL)
        started.wait()
    before = lines(tmp_path)
    assert 3 <= len(before) < 500
    found = much(tmp_path, len(before) + 3)
    after = lines(tmp_path)
    assert after[: len(before)] == before
    assert len(after) == len(set(after)) > len(before)
    assert {row["candidate"] for row in found.rows} >= set(before[:-1])


def much(folder: str | Path, trials: int):
    """A search among thousands, in this process or in one to be killed."""
    torch.set_num_threads(1)
    kernels = Space({"width": (0.25, 0.35, 0.5), "kernels": (3, 5), "expansions": (3, 6)})
    setup = ScoringSetup(TEACHER, batches(), ["diswot"])
    return search(SearchTask(kernels, plain, setup, trials), Path(folder))
