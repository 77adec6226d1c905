"""Does a score select? How well it orders networks whose accuracy is known."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import kendalltau, spearmanr

NEAR = 0.1  # by this share of the smaller, networks "of equal size" may differ in parameters


def ranking_quality(
    scores: Sequence[float],
    accuracies: Sequence[float],
    parameters: Sequence[float],
    budgets: int = 6,
) -> dict[str, float]:
    """How well scores (lower is better) order networks by accuracy.

    Args:
        scores: one per network.
        accuracies: of the trained networks.
        parameters: their sizes.
        budgets: number of parameter budgets for the regret, evenly spaced among the sizes in rank.

    Returns:
        "spearman" and "kendall" of the negated scores with the accuracies; "iso_concordance", the
        share of pairs of equal size (:data:`NEAR`) and different accuracy in right order, ties in
        score counting one half (nan without such pairs); "pairs", how many there are; "regret",
        the mean over the budgets of the best accuracy within it less that of the best score.
    """
    order, truth, size = (np.asarray(v, dtype=float) for v in (scores, accuracies, parameters))
    constant = np.ptp(order) == 0
    first, second = np.triu_indices(len(truth), 1)
    near = np.abs(size[first] - size[second]) <= NEAR * np.minimum(size[first], size[second])
    near &= truth[first] != truth[second]
    gaps = np.sign(order[second] - order[first]) * np.sign(truth[first] - truth[second])
    concordant = (gaps[near] + 1) / 2
    limits = np.quantile(size, np.linspace(0, 1, budgets + 1)[1:])
    regrets = []
    for limit in limits:
        inside = size <= limit
        best = truth[inside][order[inside] == order[inside].min()].mean()
        regrets.append(truth[inside].max() - best)
    return {
        "spearman": 0.0 if constant else float(spearmanr(-order, truth).statistic),
        "kendall": 0.0 if constant else float(kendalltau(-order, truth).statistic),
        "iso_concordance": float(concordant.mean()) if near.any() else math.nan,
        "pairs": int(near.sum()),
        "regret": float(np.mean(regrets)),
    }


def compare_quality(
    one: Sequence[float],
    other: Sequence[float],
    accuracies: Sequence[float],
    parameters: Sequence[float],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float, float]]:
    """Difference of :func:`ranking_quality` of two scores, with a paired bootstrap interval.

    Returns:
        By figure: difference, and the 2.5th and 97.5th percentile over resamples of the networks.
    """
    arrays = [np.asarray(v, dtype=float) for v in (one, other, accuracies, parameters)]

    def differences(indices: np.ndarray) -> dict[str, float]:
        a, b, truth, size = (array[indices] for array in arrays)
        first, second = ranking_quality(a, truth, size), ranking_quality(b, truth, size)
        return {name: first[name] - second[name] for name in first}

    found = differences(np.arange(len(arrays[0])))
    n, draw = len(arrays[0]), np.random.default_rng(seed)
    drawn = [differences(draw.integers(0, n, n)) for _ in range(resamples)]
    return {
        name: (value, *np.nanpercentile([d[name] for d in drawn], [2.5, 97.5]).tolist())
        for name, value in found.items()
    }
