"""Intervals cover, tests agree with SciPy's and with the intervals, corrections with their rule."""

import math
from types import MappingProxyType

import numpy as np
import pytest
from scipy import stats

from kd_lrp_plugin.metrics.statistics import describe, detectable, holm, paired_difference


class TestDescribe:
    def test_two_values_have_the_interval_of_the_closed_form(self):
        found = describe([0.8, 0.9])  # one degree of freedom: t is Cauchy's, tan(0.475 pi)
        reach = math.tan(0.475 * math.pi) * 0.05
        assert found["std"] == pytest.approx(0.1 / math.sqrt(2))
        assert (found["low"], found["high"]) == pytest.approx((0.85 - reach, 0.85 + reach))

    @pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
    def test_the_interval_is_scipys(self, confidence):
        values = np.random.default_rng(0).normal(0.8, 0.02, 5)
        found = describe(values.tolist(), confidence)
        expected = stats.t.interval(confidence, 4, values.mean(), stats.sem(values))
        assert (found["low"], found["high"]) == pytest.approx(expected, rel=1e-12)

    def test_the_interval_covers_the_mean_as_often_as_it_says(self):
        draws = np.random.default_rng(1).normal(3.0, 2.0, (4000, 3)).tolist()
        covers = [found["low"] < 3 < found["high"] for found in map(describe, draws)]
        assert np.mean(covers) == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors

    def test_fewer_than_two_values_have_no_spread_and_no_interval(self):
        nothing = {"std": None, "low": None, "high": None}
        assert describe([0.5]) == {"n": 1, "mean": 0.5, **nothing}
        assert describe([]) == {"n": 0, "mean": None, **nothing}

    def test_values_that_are_not_finite_are_refused(self):
        with pytest.raises(ValueError, match="describe: expected finite values"):
            describe([0.5, math.nan])

    def test_a_confidence_of_one_is_refused(self):
        with pytest.raises(ValueError, match=r"expected a confidence in \(0, 1\), got 1"):
            describe([0.5, 0.6], 1)


class TestPairedDifference:
    VALUES = MappingProxyType({0: 0.81, 1: 0.84, 2: 0.86, 3: 0.90})
    REFERENCE = MappingProxyType({3: 0.85, 2: 0.85, 1: 0.80, 0: 0.79})

    def test_values_are_paired_by_seed_not_by_place(self):
        found = paired_difference(self.VALUES, self.REFERENCE)
        differences = [0.02, 0.04, 0.01, 0.05]
        assert found["mean"] == pytest.approx(np.mean(differences))
        assert found["p"] == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)

    def test_seeds_that_only_one_side_has_are_left_out(self):
        more = {**self.VALUES, 7: 0.1}
        assert paired_difference(more, self.REFERENCE) == paired_difference(
            self.VALUES, {**self.REFERENCE, 8: 0.9}
        )

    def test_turning_the_comparison_round_turns_only_the_sign(self):
        one = paired_difference(self.VALUES, self.REFERENCE)
        other = paired_difference(self.REFERENCE, self.VALUES)
        assert other["mean"] == pytest.approx(-one["mean"])
        assert other["p"] == pytest.approx(one["p"])

    def test_p_is_below_a_twentieth_just_where_the_interval_leaves_out_zero(self):
        rng = np.random.default_rng(2)
        agree = []
        for _ in range(200):
            one, other = rng.normal(0, 1, (2, 4))
            found = paired_difference(dict(enumerate(one + 1)), dict(enumerate(other)))
            agree.append((found["p"] < 0.05) == (found["low"] > 0 or found["high"] < 0))
        assert all(agree)

    def test_one_pair_has_no_test(self):
        found = paired_difference({0: 0.9, 1: 0.8}, {1: 0.7, 2: 0.6})
        assert (found["n"], found["low"], found["p"]) == (1, None, None)
        assert found["mean"] == pytest.approx(0.1)

    def test_equal_differences_leave_the_test_nothing_to_judge_by(self):
        reference = {0: 0.7, 1: 0.6, 2: 0.2}
        shifted = {seed: value + 0.1 for seed, value in reference.items()}
        assert paired_difference(shifted, reference)["p"] is None
        assert paired_difference(reference, reference)["p"] == 1


class TestHolm:
    def test_it_is_the_rule_of_the_paper_on_every_order(self):
        p = [0.011, 0.2, 0.004, 0.03]
        smallest_first = [4 * 0.004, 3 * 0.011, 2 * 0.03, 0.2]
        expected = dict(zip(sorted(p), smallest_first, strict=True))
        assert holm(p) == pytest.approx([expected[value] for value in p])

    def test_it_never_falls_below_that_of_a_smaller_one_nor_exceeds_one(self):
        assert holm([0.03, 0.02, 0.9, 0.8]) == pytest.approx([0.09, 0.08, 1, 1])

    def test_what_has_no_test_is_not_counted(self):
        assert holm([None, 0.02, None]) == [None, 0.02, None]
        assert holm([]) == []


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_detectable_difference_is_where_p_is_a_twentieth(n):
    spread = np.linspace(-1, 1, n)
    values = spread / spread.std(ddof=1) + detectable(n)
    found = paired_difference(dict(enumerate(values)), dict.fromkeys(range(n), 0.0))
    assert found["p"] == pytest.approx(0.05)
    assert detectable(1) is None
