"""Selection: rows that resume, problems that stay with their candidate, quality."""

import itertools
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from kd_lrp_plugin.metrics import ranking_quality
from kd_lrp_plugin.models.mobilenetv2 import mobilenetv2
from kd_lrp_plugin.selection import ranking, scoring
from kd_lrp_plugin.selection.candidates import Candidate, ScoringSetup, Teacher
from kd_lrp_plugin.selection.scores.registry import SCORES, Score

SCORED = ["diswot", "diswot_reference", "parameters"]


def small(width: float = 0.35) -> partial:
    return partial(mobilenetv2, num_classes=4, width=width, depth=0.5)


@pytest.fixture
def batches():
    torch.manual_seed(0)
    return [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])) for _ in range(2)]


@pytest.fixture
def candidates():
    return [Candidate("narrow", small()), Candidate("wide", small(0.5))]


TEACHER = Teacher(small(0.75), trained=False)


def score_candidates(candidates, teacher, batches, scores, seeds=(0,), **kwargs) -> list[dict]:
    return scoring.score_candidates(
        candidates, ScoringSetup(teacher, batches, scores, seeds), **kwargs
    )


class TestMeasure:
    def test_gives_a_value_per_batch_and_seed(self, candidates, batches):
        rows = score_candidates(candidates, TEACHER, batches, SCORED, seeds=(0, 1))
        assert [(row["candidate"], row["seed"]) for row in rows] == [
            ("narrow", 0), ("narrow", 1), ("wide", 0), ("wide", 1),
        ]  # fmt: skip
        values = [row["scores"]["diswot"] for row in rows]
        assert all(len(of_batch) == 2 for of_batch in values)
        assert len({v for of_batch in values for v in of_batch}) == 8

    def test_does_not_depend_on_the_order_or_the_processes(self, candidates, batches):
        rows = score_candidates(candidates, TEACHER, batches, SCORED, seeds=(0, 1))
        assert (
            score_candidates(candidates[::-1], TEACHER, batches, SCORED, seeds=(1, 0))[::-1] == rows
        )
        assert score_candidates(candidates, TEACHER, batches, SCORED, seeds=(0, 1), jobs=2) == rows

    @pytest.mark.slow
    def test_is_shared_by_processes_that_begin_anew(self, candidates, batches, monkeypatch):
        """As where each has several threads, which a fork would not survive."""
        rows = score_candidates(candidates, TEACHER, batches, ["parameters", "nwot"])
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
        assert (
            score_candidates(candidates, TEACHER, batches, ["parameters", "nwot"], jobs=2) == rows
        )

    def test_does_not_depend_on_the_order_where_a_network_draws(self, batches):
        """Dropout of the teacher, which runs once, while some candidate is scored."""
        dropout = partial(mobilenetv2, num_classes=4, width=0.35, depth=0.5, dropout=0.5)
        candidates = [Candidate("fixed", small(0.5)), Candidate("drawing", dropout)]
        work = Teacher(dropout, trained=False), batches[:1], ["lrp_cosine", "gradcam_l2"]
        assert score_candidates(candidates[::-1], *work)[::-1] == score_candidates(
            candidates, *work
        )

    def test_draws_for_the_student_what_the_teacher_does_not(self, batches):
        """The same channels dropped in both would make them alike."""
        drawn = []

        def build():
            model = small()()
            model.register_forward_pre_hook(lambda *_: drawn.append(torch.rand(1).item()))
            return model

        same = Candidate("same", build), Teacher(build, trained=False)
        score_candidates(same[:1], same[1], batches[:1], ["relation_l2"])
        assert len(drawn) == len(set(drawn)) == 2

    def test_scores_nothing_twice(self, candidates, batches, tmp_path):
        record = tmp_path / "scores.jsonl"
        rows = score_candidates(candidates[:1], TEACHER, batches, SCORED, (0, 1), record=record)
        lines = record.read_text().splitlines()
        record.write_text("\n".join([*lines, '{"candidate": "wide", "se']))  # killed
        again = score_candidates(candidates, TEACHER, batches, SCORED, (0, 1), record=record)
        assert again[:2] == rows
        lines = record.read_text().splitlines()
        assert len(lines) == 5
        assert json.loads(lines[-1])["candidate"] == "wide"
        other = [(images + 1, targets) for images, targets in batches]
        assert (
            score_candidates(candidates[:1], TEACHER, other, SCORED, (0, 1), record=record) != rows
        )

    def test_keeps_scores_of_one_teacher_and_of_what_a_candidate_is(
        self, candidates, batches, tmp_path
    ):
        def scores(candidate: Candidate, teacher: Teacher, n: int) -> list:
            (row,) = score_candidates(
                [candidate], teacher, batches[:1], ["relation_l2"], record=tmp_path / "rows"
            )
            assert len((tmp_path / "rows").read_text().splitlines()) == n
            return row["scores"]["relation_l2"]

        narrow, wide = candidates
        renamed = replace(wide, name=narrow.name, entry={"key": "width 0.5"})
        found = [scores(narrow, TEACHER, 1), scores(renamed, TEACHER, 2)]
        found.append(scores(narrow, Teacher(small(0.6), trained=False), 3))
        assert len({*map(tuple, found)}) == 3
        # The same weights may still be another network.
        scores(narrow, replace(TEACHER, entry={"key": "with dropout"}), 4)
        assert scores(narrow, TEACHER, 4) == found[0]
        assert scores(renamed, TEACHER, 4) == found[1]

    def test_a_candidate_that_fails_is_named_and_the_others_go_on(self, candidates, batches):
        odd = Candidate("odd", partial(nn.Sequential, nn.Conv2d(3, 4, 1), nn.Flatten()))
        rows = score_candidates([odd, *candidates], TEACHER, batches, SCORED)
        assert rows[0]["scores"]["diswot"] == [None, None]
        assert "Name the layers" in rows[0]["problems"]["diswot"]
        found = ranking.summarise_scores(rows)
        assert found["odd"]["diswot"] is None
        assert found["narrow"]["diswot"][0] > 0

    def test_a_candidate_may_fail_in_any_way(self, candidates, batches):
        def refuse(_):
            assert not "a size of 48"

        odd = small()()
        odd.forward = refuse
        wrong = [Candidate("odd", lambda: odd), Candidate("none", partial({}.__getitem__, "key"))]
        rows = score_candidates([*wrong, candidates[0]], TEACHER, batches[:1], ["relation_l2"])
        assert rows[0]["problems"]["relation_l2"].startswith("AssertionError: ")
        assert rows[1]["problems"] == {"relation_l2": "KeyError: 'key'"}
        assert rows[2]["problems"] == {}

    def test_a_score_that_is_not_finite_is_a_problem_of_its_own(self, candidates, batches):
        SCORES.register(Score(lambda *_: float("nan"), "a test"), "broken")
        try:
            (row, _) = score_candidates(candidates, TEACHER, batches[:1], ["broken", "parameters"])
        finally:
            del SCORES._entries["broken"]
        assert row["scores"]["broken"] == [None]
        assert "broken: expected a finite score, got nan" in row["problems"]["broken"]
        assert row["scores"]["parameters"][0] < 0

    def test_a_student_of_the_teachers_kind_is_not_the_teacher(self, batches):
        same = Candidate("same", TEACHER.build)
        (row,) = score_candidates([same], TEACHER, batches[:1], ["diswot"])
        assert row["scores"]["diswot"][0] > 0.01

    def test_a_trained_teacher_keeps_its_weights_and_runs_in_evaluation_mode(self, batches):
        made = []

        def build():
            torch.manual_seed(5)
            made.append(small()())
            return made[-1]

        twice = [Candidate("a", small()), Candidate("b", small())]
        rows = score_candidates(
            twice, Teacher(build, trained=True), batches[:1], ["relation_l2"], (0, 1)
        )
        assert len(made) == 1
        assert rows[0]["scores"] == rows[2]["scores"]

    def test_builds_a_candidate_once_per_seed(self, batches):
        made = []

        def build():
            made.append(small()())
            return made[-1]

        draws = torch.random.get_rng_state()
        scores = ["diswot", "bn_log_variance"]
        score_candidates([Candidate("a", build)], TEACHER, batches, scores, (0, 1))
        assert len(made) == 4  # two seeds, initialised as built and from N(0, 1)
        assert torch.equal(torch.random.get_rng_state(), draws)

    def test_a_batch_too_small_is_said(self, candidates):
        batch = torch.randn(1, 3, 32, 32), torch.tensor([0])
        (row, _) = score_candidates(candidates, TEACHER, [batch], ["diswot"])
        assert "two images or more" in row["problems"]["diswot"]

    def test_refuses_what_cannot_be_measured(self, candidates, batches):
        with pytest.raises(ValueError, match="Did you mean 'diswot'"):
            score_candidates(candidates, TEACHER, batches, ["diswt"])
        with pytest.raises(ValueError, match="different names, got \\['narrow'\\]"):
            score_candidates([candidates[0]] * 2, TEACHER, batches, ["diswot"])
        with pytest.raises(ValueError, match="0 batches"):
            score_candidates(candidates, TEACHER, [], ["diswot"])


class TestQuality:
    def test_is_what_counting_pairs_says(self):
        draw = np.random.default_rng(0)
        scores, truth, sizes = draw.normal(size=12), draw.normal(size=12), draw.uniform(1, 2, 12)
        found = ranking_quality.ranking_quality(scores, truth, sizes)
        pairs = list(itertools.combinations(range(12), 2))

        def right(i, j):
            return (scores[i] < scores[j]) == (truth[i] > truth[j])

        kendall = np.mean([1 if right(i, j) else -1 for i, j in pairs])
        near = [
            (i, j) for i, j in pairs if max(sizes[i], sizes[j]) / min(sizes[i], sizes[j]) <= 1.1
        ]
        assert 0 < len(near) < len(pairs)
        assert found["kendall"] == pytest.approx(kendall)
        assert found["iso_concordance"] == pytest.approx(np.mean([right(i, j) for i, j in near]))
        places = [np.argsort(np.argsort(v)) for v in (-scores, truth)]
        assert found["spearman"] == pytest.approx(np.corrcoef(*places)[0, 1])

    def test_regret_is_what_the_choice_falls_short_of(self):
        truth, sizes = [0.5, 0.9, 0.7], [1, 2, 3]
        # Up to each of six budgets the quantiles admit 1, 1, 2, 2, 2, 3 networks.
        found = ranking_quality.ranking_quality([3, 2, 1], truth, sizes)
        assert found["regret"] == pytest.approx((0 + 0 + 0 + 0 + 0 + 0.2) / 6)

    def test_a_constant_score_orders_nothing(self):
        found = ranking_quality.ranking_quality([1, 1, 1], [0.1, 0.2, 0.3], [100, 101, 102])
        assert (found["spearman"], found["kendall"], found["iso_concordance"]) == (0, 0, 0.5)

    def test_an_interval_of_differences_holds_the_difference(self):
        draw = np.random.default_rng(1)
        truth, sizes = draw.normal(size=40), draw.uniform(1, 2, 40)
        good, bad = -truth + 0.1 * draw.normal(size=40), draw.normal(size=40)
        value, low, high = ranking_quality.compare_quality(good, bad, truth, sizes, 200)["kendall"]
        assert 0 < low < value < high
        same = ranking_quality.compare_quality(good, good, truth, sizes, 50)["kendall"]
        assert same == (0, 0, 0)
