"""Selection on the workers of a cluster: the same scores, and none of them twice."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from dask_cluster import dask_workers, make_plain_candidate

from kd_lrp_plugin.models.mobilenetv2 import MobileNetV2
from kd_lrp_plugin.selection import scoring, search
from kd_lrp_plugin.selection.candidates import Candidate, ScoringSetup, Teacher
from kd_lrp_plugin.selection.search import SearchTask
from kd_lrp_plugin.selection.spaces import Space

SPACE = Space({"width": (0.25, 0.35, 0.5), "depth": (0.5, 1.0), "head": ("linear", "mlp")})


def make_setup(*scores: str, seeds: tuple[int, ...] = (0,)) -> ScoringSetup:
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))]
    teacher = Teacher(partial(MobileNetV2(0.5, 0.5).build, 4), trained=False)
    return ScoringSetup(teacher, batches, scores, seeds)


def test_a_budget_of_latency_is_refused_where_machines_differ(tmp_path):
    setup = make_setup("diswot")
    task = SearchTask(SPACE, make_plain_candidate, setup, 4, {"latency": (0, 0.1)})
    with pytest.raises(ValueError, match=r"budget: expected .* the same on each machine"):
        search.search(task, tmp_path / "here", scheduler="tcp://127.0.0.1:1")
    assert not (tmp_path / "here").exists()


def test_a_worker_process_scores_for_the_last_that_asked():
    """One of a cluster lives on when a selection ends."""
    for begun in ("first", "second"):
        scoring._begin_scoring(begun)
        assert [begun] == scoring._SCORER
    setup = make_setup("diswot")
    for trials in (3, 4):
        task = SearchTask(SPACE, make_plain_candidate, setup, trials)
        search._begin_search(search.SearchWorker(task, Path()))
        assert [worker.task.trials for worker in search._WORKER] == [trials]


@pytest.mark.slow
class TestDask:
    @pytest.fixture(scope="class")
    @classmethod
    def address(cls, tmp_path_factory):
        with dask_workers(tmp_path_factory.mktemp("dask")) as workers:
            for _ in range(2):
                workers.start("--nthreads", "1")
            yield workers.address

    def test_scores_are_those_of_this_machine(self, address, tmp_path):
        students = [MobileNetV2(width, 0.5) for width in (0.25, 0.35, 0.5)]
        candidates = [Candidate(str(student), partial(student.build, 4)) for student in students]
        setup = make_setup("diswot", "parameters", seeds=(0, 1))
        file = tmp_path / "scores.jsonl"
        rows = scoring.score_candidates(candidates, setup, file, scheduler=address)
        assert rows == scoring.score_candidates(candidates, setup)
        assert len(file.read_text().splitlines()) == 6

    def test_a_search_looks_at_no_student_twice(self, address, tmp_path):
        task = SearchTask(SPACE, make_plain_candidate, make_setup("diswot"), 8)
        found = search.search(task, tmp_path, scheduler=address)
        scored = [json.loads(line)["candidate"] for line in (tmp_path / "scores.jsonl").open()]
        assert len(scored) == len(set(scored)) == len(found.rows)
        journal = map(json.loads, (tmp_path / "study.journal").open())
        done = [line for line in journal if "values" in line]
        assert len(done) == 8
        assert search.search(task, tmp_path).rows == found.rows
