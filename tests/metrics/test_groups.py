"""Accuracy by group against plain counts."""

import numpy as np
import pytest

from kd_lrp_plugin.metrics.groups import group_metrics


def test_each_group_is_counted_by_itself():
    draw = np.random.default_rng(0)
    values, labels = draw.dirichlet([1, 1, 1], 200), draw.integers(3, size=200)
    groups = [str(g) for g in draw.choice(["a", "b", "c"], 200)]
    found = group_metrics(values, labels, groups)
    for name, of in found["by_group"].items():
        rows = [i for i in range(200) if groups[i] == name]
        right = sum(int(values[i].argmax() == labels[i]) for i in rows)
        assert of["n"] == len(rows)
        assert of["accuracy"] == pytest.approx(right / len(rows))
        low, high = of["accuracy_interval"]
        assert 0 <= low < of["accuracy"] < high <= 1
    worst = min(of["accuracy"] for of in found["by_group"].values())
    assert found["by_group"][found["worst_group"]]["accuracy"] == worst
    assert found["worst_group_accuracy"] == worst


def test_wilsons_interval():
    found = group_metrics(np.array([[0.9, 0.1]] * 10), np.array([0] * 8 + [1] * 2), ["a"] * 10)
    low, high = found["by_group"]["a"]["accuracy_interval"]  # by hand: p = 0.8, n = 10, z = 1.96
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


@pytest.mark.parametrize(("labels", "groups"), [([0], ["a", "b"]), ([0, 1], ["a"]), ([], [])])
def test_sizes_that_do_not_fit_are_refused(labels, groups):
    values = np.full((len(labels), 2), 0.5)
    with pytest.raises(ValueError, match="as many labels and groups as rows"):
        group_metrics(values, np.array(labels), groups)


def test_the_gap_to_the_teacher_is_the_difference_of_counts():
    draw = np.random.default_rng(1)
    values, teacher = draw.dirichlet([1, 1], 60), draw.dirichlet([1, 1], 60)
    labels, groups = draw.integers(2, size=60), ["a"] * 25 + ["b"] * 35
    found = group_metrics(values, labels, groups, teacher=teacher)["by_group"]
    for name, rows in {"a": range(25), "b": range(25, 60)}.items():
        hits = sum(int(values[i].argmax() == labels[i]) for i in rows)
        of_teacher = sum(int(teacher[i].argmax() == labels[i]) for i in rows)
        expected = (hits - of_teacher) / len(rows)
        assert found[name]["minus_teacher"] == pytest.approx(expected, abs=1e-12)
    assert "minus_teacher" not in group_metrics(values, labels, groups)["by_group"]["a"]
