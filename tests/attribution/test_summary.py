"""Figures of maps over images: what counts where a map has no relevance."""

import pytest
import torch

from kd_lrp_plugin.attribution.summary import brief, explain_columns, records, summary

VALUES = torch.tensor([0.2, torch.nan, 0.4])
CHANCE = torch.tensor([0.1, 0.7, 0.3])


class TestSummary:
    def test_a_map_without_relevance_counts_as_told(self):
        found = summary(VALUES, CHANCE, otherwise=0)
        assert found["mean"] == pytest.approx(0.2)
        assert found["chance"] == pytest.approx(1.1 / 3)
        assert (found["n"], found["undefined"]) == (3, 1)

    def test_or_is_left_out_here_and_of_the_chance_level(self):
        found = summary(VALUES, CHANCE)
        assert found["mean"] == pytest.approx(0.3)
        assert found["chance"] == pytest.approx(0.2)
        assert (found["n"], found["undefined"]) == (3, 1)

    def test_the_rest_of_a_few_says_nothing(self):
        found = summary(torch.tensor([0.2, torch.nan, torch.nan]), CHANCE)
        assert found["mean"] is found["std"] is found["chance"] is None
        assert found["undefined"] == 2


def test_every_group_of_figures_has_its_own_count():
    figures = {
        "relevance_mass_accuracy": summary(VALUES, CHANCE, otherwise=0),
        "rank_accuracy": summary(VALUES, CHANCE, otherwise=0),
        "pointing_game": summary(VALUES, CHANCE, otherwise=0),
        "insertion": summary(VALUES[:1], CHANCE[:1]),
        "deletion": summary(VALUES[:1], CHANCE[:1]),
        "randomised": summary(VALUES[:2]),
    }
    place = {"run": "0", "model": "student", "method": "grad_cam", "layer": "a"}
    (line,) = records([{**place, "metrics": figures}])
    counts = {key: value for key, value in line.items() if key.startswith(("n (", "no "))}
    assert counts == {
        "n (relevance_mass_accuracy)": 3,
        "no relevance (relevance_mass_accuracy)": 1,
        "n (insertion)": 1,
        "no relevance (insertion)": 0,
        "n (randomised)": 2,
        "no relevance (randomised)": 1,
    }
    assert "attribution_similarity" not in line


def test_a_terminal_has_the_columns_that_some_row_has_and_their_words():
    def row(run: str, **means: float) -> dict:
        metrics = {name: {"mean": value, "chance": 0.1} for name, value in means.items()}
        about = {"run": run, "model": "student", "weights": run, "layer": "x", "method": "rise"}
        return about | {"metrics": metrics}

    found = brief([row("a", insertion=0.5), row("b", insertion=0.4, attribution_similarity=0.7)])
    assert found == {
        "student of a, layer x": [{"method": "rise", "alike": None, "insert": 0.5}],
        "student of b, layer x": [{"method": "rise", "alike": 0.7, "insert": 0.4}],
    }
    words = explain_columns(found).splitlines()
    assert [line.partition(":")[0] for line in words] == ["alike", "insert"]
    (inside,) = brief([row("a", relevance_mass_accuracy=0.3)]).values()
    assert inside == [{"method": "rise", "inside": 0.3, "chance": 0.1}]
