"""The number of subclasses that are used, against loops."""

import math

import numpy as np
import pytest

from kd_lrp_plugin.metrics.subclasses import effective_subclasses

OF = [0, 0, 0, 1, 1]


def by_loops(probabilities, labels, label: int) -> float:
    members = [k for k, owner in enumerate(OF) if owner == label]
    shares = dict.fromkeys(members, 0.0)
    rows = [row for row, own in zip(probabilities, labels, strict=True) if own == label]
    for row in rows:
        total = sum(row[k] for k in members)
        for k in members:
            shares[k] += row[k] / total / len(rows)
    return math.exp(-sum(share * math.log(share) for share in shares.values()))


def test_it_is_the_exponential_of_the_entropy_of_the_mean_shares():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(5), 20)
    labels = rng.integers(0, 2, 20)
    found = effective_subclasses(probabilities, labels, OF)
    assert found == pytest.approx([by_loops(probabilities, labels, label) for label in (0, 1)])


def test_from_one_that_has_all_to_equal_shares():
    one = np.array([[0.9, 0, 0, 0, 0.1]] * 4)
    turns = np.eye(5)[[0, 1, 2, 0, 1, 2]]
    labels = np.zeros(6, int)
    assert effective_subclasses(one, labels[:4], OF) == [pytest.approx(1), None]
    assert effective_subclasses(turns, labels, OF) == [pytest.approx(3), None]


def test_a_class_whose_probability_is_rounded_away_counts_as_undecided():
    none = np.array([[0.0, 0.0, 0.0, 1.0, 0.0]])
    assert effective_subclasses(none, np.array([0]), OF)[0] == pytest.approx(3)


def test_probabilities_of_classes_are_refused():
    with pytest.raises(ValueError, match=r"expected probabilities \(n, 5\), got \(2, 2\)"):
        effective_subclasses(np.ones((2, 2)) / 2, np.array([0, 1]), OF)
