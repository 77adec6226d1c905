"""What a few seeds say: means with intervals, and differences between what shares its seeds.

Pure functions of numbers; None stands for what is not defined, such as the spread of one value.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from kd_lrp_plugin.utils.validation import message


def describe(values: Sequence[float], confidence: float = 0.95) -> dict[str, Any]:
    """Mean, standard deviation and interval of the mean, by Student's t.

    Args:
        values: one per seed.
        confidence: of the interval, in (0, 1).

    Returns:
        ``n``, ``mean`` (None without values), ``std`` (with n - 1 below the line), ``low`` and
        ``high``; these three are None for fewer than two values.

    Raises:
        ValueError: for values that are not finite, or another confidence.

    Example:
        >>> found = describe([0.8, 0.9, 1.0])
        >>> found["n"], round(found["mean"], 3), round(found["low"], 3), round(found["high"], 3)
        (3, 0.9, 0.652, 1.148)

    Reference:
        Student, Biometrika 1908.
    """
    if not 0 < confidence < 1:
        raise ValueError(message("describe", "a confidence in (0, 1)", confidence, "Use 0.95."))
    if not all(math.isfinite(value) for value in values):
        fix = "Leave out what is not defined."
        raise ValueError(message("describe", "finite values", list(values), fix))
    n = len(values)
    if n < 2:
        mean = float(values[0]) if n else None
        return {"n": n, "mean": mean, "std": None, "low": None, "high": None}
    mean, std = float(np.mean(values)), float(np.std(values, ddof=1))
    reach = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * std / math.sqrt(n)
    return {"n": n, "mean": mean, "std": std, "low": mean - reach, "high": mean + reach}


def paired_difference(
    values: Mapping[int, float],
    reference: Mapping[int, float],
    confidence: float = 0.95,
) -> dict[str, Any]:
    """How far values lie above their reference, over the seeds that both have.

    Args:
        values: by seed.
        reference: by seed.
        confidence: of the interval.

    Returns:
        The figures of :func:`describe` for the differences, and ``p`` of the two-sided paired
        t-test. It is None for fewer than two pairs, and where all differences are the same number
        other than zero, which leaves the test nothing to judge by; 1 where all are zero.

    Example:
        >>> found = paired_difference({0: 0.9, 1: 0.8, 2: 0.7}, {0: 0.8, 1: 0.75, 7: 0.1})
        >>> found["n"], round(found["mean"], 3), round(found["p"], 3)
        (2, 0.075, 0.205)

    Reference:
        Student, Biometrika 1908, by ``scipy.stats.ttest_rel``.
    """
    pairs = [(values[seed], reference[seed]) for seed in values if seed in reference]
    found = describe([one - other for one, other in pairs], confidence)
    scale = max((abs(value) for pair in pairs for value in pair), default=0.0)
    if found["n"] < 2:
        p = None
    elif found["std"] <= 1e-12 * scale:  # nothing but rounding
        p = 1.0 if abs(found["mean"]) <= 1e-12 * scale else None
    else:
        p = float(stats.ttest_rel(*zip(*pairs, strict=True)).pvalue)
    return {**found, "p": p}


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Probabilities corrected for how many comparisons were made, in the order given.

    Args:
        p_values: one per comparison; None where there is none, which is not counted.

    Example:
        >>> holm([0.01, None, 0.04, 0.03])
        [0.03, None, 0.06, 0.06]

    Reference:
        Holm, Scandinavian Journal of Statistics 1979.
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, index) in enumerate(known):
        least = max(least, min(1.0, p * (len(known) - rank)))
        corrected[index] = least
    return corrected


def detectable(n: int, confidence: float = 0.95) -> float | None:
    """How many standard deviations a mean difference must reach before its interval excludes zero.

    None for fewer than two pairs.

    Example:
        >>> [round(detectable(n), 2) for n in (2, 3, 5, 10)]
        [8.98, 2.48, 1.24, 0.72]
    """
    if n < 2:
        return None
    return float(stats.t.ppf((1 + confidence) / 2, n - 1)) / math.sqrt(n)
