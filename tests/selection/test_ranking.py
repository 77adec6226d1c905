"""Budgets, costs and places; what a ranking says beside the parameter count."""

import math
import re
from functools import partial

import pytest
from torch import nn

from kd_lrp_plugin.models.mobilenetv2 import mobilenetv2
from kd_lrp_plugin.selection import ranking
from kd_lrp_plugin.selection.candidates import Candidate


class TestBudget:
    def test_is_read_with_its_units(self):
        texts = ["params=2.5M", "macs=300M", "latency=20ms"]
        expected = {"parameters": (0, 2.5e6), "macs": (0, 3e8), "latency": (0, 0.02)}
        assert ranking.parse_budget(texts) == expected
        assert ranking.parse_budget(["params=410208"]) == {"parameters": (0, 410208)}

    def test_may_have_a_least_amount(self):
        texts = ["params=0.4M..4.9M", "macs = 10M .. ", "latency=..20ms"]
        expected = {"parameters": (4e5, 4.9e6), "macs": (1e7, math.inf), "latency": (0, 0.02)}
        assert ranking.parse_budget(texts) == expected
        costs = {str(n): {"parameters": n} for n in (399_999, 400_000, 4_900_000, 4_900_001)}
        kept = ranking.filter_by_budget({"parameters": expected["parameters"]}, costs)
        assert kept == ["400000", "4900000"]
        with pytest.raises(
            ValueError,
            match=r"got params=1000000\.\.2000000\. .* 399999, which has params=399999\.",
        ):
            ranking.filter_by_budget(
                {"parameters": (1e6, 2e6)}, {"399999": {"parameters": 399_999}}
            )
        with pytest.raises(ValueError, match=r"got macs=8\.\.\. .* which has macs=7\."):
            ranking.filter_by_budget({"macs": (8.0, math.inf)}, {"a": {"macs": 7.0}})

    @pytest.mark.parametrize(
        ("texts", "words"),
        [
            (["params=2M..1M"], "a least amount below the most, got 'params=2M..1M'. Exchange"),
            (["params=1M..", "params=2M"], "params once, got .* Write both ends as one: params="),
        ],
    )
    def test_that_nobody_could_keep_is_refused(self, texts, words):
        with pytest.raises(ValueError, match=words):
            ranking.parse_budget(texts)

    @pytest.mark.parametrize(
        "text",
        ["params", "params=", "params=x", "params=-1M", "macs=0", "params=..", "params=0..1M"],
    )
    def test_that_is_no_number_is_refused(self, text):
        with pytest.raises(ValueError, match=r"budget: expected .*, got '"):
            ranking.parse_budget([text])

    @pytest.mark.parametrize(
        "text", ["latency=20", "latency=2M", "params=3ms", "macs=1KK", "latency=1..2ms"]
    )
    def test_in_a_unit_of_something_else_is_refused(self, text):
        with pytest.raises(ValueError, match="with a unit of"):
            ranking.parse_budget([text])

    def test_of_something_else_is_refused(self):
        with pytest.raises(ValueError, match="Did you mean 'params'"):
            ranking.parse_budget(["param=2M"])

    def test_that_nobody_keeps_names_the_nearest_as_one_that_it_keeps(self):
        costs = {
            "a": {"parameters": 3e6, "latency": 0.004},
            "b": {"parameters": 2_257_984.0, "latency": 0.0086712},
        }
        assert ranking.filter_by_budget({"parameters": (0, 2.5e6)}, costs) == ["b"]
        with pytest.raises(ValueError, match=r"got params=1000000\. .* has params=2257984\."):
            ranking.filter_by_budget({"parameters": (0, 1e6)}, costs)
        asked = ranking.parse_budget(["params=2M", "latency=8ms"])
        with pytest.raises(ValueError, match=r"has params=2257984, latency=8\.68ms\.") as error:
            ranking.filter_by_budget(asked, costs)
        assert "got params=2000000, latency=8ms." in str(error.value)
        again = ranking.parse_budget(["params=2257984", "latency=8.68ms"])
        assert ranking.filter_by_budget(again, costs) == ["b"]


class TestCosts:
    def test_of_candidates_that_fail_are_reasons(self):
        wrong = {
            "for another size": partial(nn.Linear, 7, 4),
            "misspelt": partial(mobilenetv2, num_classes=4, wdith=1),
            "absent": partial(dict.__getitem__, {}, "a key"),
        }
        fine = Candidate("fine", partial(nn.Conv2d, 3, 2, 1))
        candidates = [*(Candidate(name, build) for name, build in wrong.items()), fine]
        costs, problems = ranking.measure_costs(candidates, 8, latency=False)
        assert costs == {"fine": {"parameters": 8, "macs": 3 * 2 * 64, "counters_differ_by": 0}}
        assert list(problems) == list(wrong)
        assert problems["for another size"].startswith("RuntimeError: ")
        assert problems["absent"] == "KeyError: 'a key'"
        assert "Did you mean 'width'" in problems["misspelt"]

    def test_have_a_latency_when_asked(self):
        fine = Candidate("fine", partial(nn.Conv2d, 3, 2, 1))
        costs, _ = ranking.measure_costs([fine], 8, latency=True)
        assert 0 < costs["fine"]["latency"] < 1


class TestRanking:
    def test_a_front_is_what_nobody_beats(self):
        points = [(1, 5), (2, 4), (2, 5), (3, 1), (3, 1)]
        assert ranking.pareto_front(points) == [True, True, False, True, True]
        assert ranking.ranks([0.3, None, 0.1, 0.3]) == [2, None, 1, 2]

    @pytest.mark.parametrize(
        ("sizes", "words"),
        [
            ([1, 2, 3, 4], "adds nothing to the parameter count here: it puts the smallest first"),
            ([4, 3, 2, 1], "adds nothing to the parameter count here: it puts the largest first"),
            ([2, 4, 1, 3], r"no mere parameter count here \(Kendall 0.00"),
            ([5, 5, 5, 5], "All are of one size: the parameter count cannot rank them"),
        ],
    )
    def test_says_what_the_score_adds(self, sizes, words):
        records = [
            {"score": score, "std": 0.0, "parameters": size}
            for score, size in zip([0.1, 0.2, 0.3, 0.4], sizes, strict=True)
        ]
        found = ranking.summarise_ranking(records)
        assert re.search(words, found)
        assert "nan" not in found
