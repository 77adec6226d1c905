"""What is ranked and what it costs: budgets, ranks, Pareto front, what a score adds to size."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import kendalltau, rankdata

from kd_lrp_plugin.metrics.counting import TOLERANCE, ImageSize
from kd_lrp_plugin.metrics.efficiency import (
    check_macs,
    count_macs,
    count_parameters,
    measure_latency,
)
from kd_lrp_plugin.selection.candidates import Candidate, build_seeded, describe_failure
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import check_known, message

COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9}
CHECK = "counters_differ_by"  # beside the costs, and no cost itself
BUDGETS = {  # by the name that users write: the cost, and its units
    "params": ("parameters", COUNTS),
    "macs": ("macs", COUNTS),
    "latency": ("latency", {"ms": 1e-3, "s": 1.0}),
}


def summarise_scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation of each score by candidate, over batches and seeds.

    Returns:
        By candidate: {"score": (mean, standard deviation)}, None for a score that failed once or
        more, and under "problems" why.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        entry = found.setdefault(row["candidate"], {"problems": {}})
        entry["problems"] |= row["problems"]
        for name, values in row["scores"].items():
            entry.setdefault(name, []).extend(values)
    for entry in found.values():
        for name, values in entry.items():
            if name != "problems":
                bad = any(value is None for value in values)
                entry[name] = None if bad else (float(np.mean(values)), float(np.std(values)))
    return found


def ranks(values: Sequence[float | None]) -> list[int | None]:
    """Ranks from 1, the lowest value first; equal ones share the better rank."""
    numbers = np.array(values, dtype=float)
    found = rankdata(numbers, method="min", nan_policy="omit")
    return [None if np.isnan(rank) else int(rank) for rank in found]


def pareto_front(costs: Sequence[Sequence[float]]) -> list[bool]:
    """Which points no other one beats: at most as much everywhere, and less somewhere.

    Example:
        >>> pareto_front([(1, 9), (2, 2), (3, 3)])
        [True, True, False]
    """
    points = np.asarray(costs, dtype=float)
    return [
        not any(((other <= point).all() and (other < point).any()) for other in points)
        for point in points
    ]


def parse_budget(texts: Sequence[str]) -> dict[str, float]:
    """Budgets such as ``params=2.5M``, ``macs=300M``, ``latency=20ms``, as numbers and seconds.

    Raises:
        ValueError: for an unknown quantity, or a value that is no positive number.

    Example:
        >>> parse_budget(["params=2.5M", "latency=20ms"])
        {'parameters': 2500000.0, 'latency': 0.02}
    """
    budget = {}
    for text in texts:
        name, _, value = (part.strip() for part in text.partition("="))
        check_known("budget", name, BUDGETS)
        cost, units = BUDGETS[name]
        number = value.rstrip("KMGms")
        try:
            amount = float(number) * units[value[len(number) :].strip()]
        except (ValueError, KeyError):
            expected = f"{name}=NUMBER with a unit of {[u or 'none' for u in units]}"
            fix = "For example params=2.5M, macs=300M or latency=20ms."
            raise ValueError(message("budget", expected, repr(text), fix)) from None
        if not 0 < amount < math.inf:
            raise ValueError(message("budget", "a number above 0", repr(text), "Raise it."))
        budget[cost] = amount
    return budget


def filter_by_budget(
    budget: Mapping[str, float], costs: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """The candidates that keep a budget.

    Args:
        budget: of :func:`parse_budget`.
        costs: parameters, macs and latency by candidate.

    Raises:
        ValueError: if none does; says what the nearest one needs.
    """
    kept = [n for n, cost in costs.items() if all(cost[k] <= most for k, most in budget.items())]
    if not kept:
        over = {n: max(cost[k] / most for k, most in budget.items()) for n, cost in costs.items()}
        near = min(over, key=over.__getitem__)
        fix = f"The nearest is {near}, which needs {_as_written(budget, costs[near])}."
        got = _as_written(budget, budget)
        raise ValueError(message("budget", "one that some candidate keeps", got, fix))
    return kept


def _as_written(budget: Iterable[str], amounts: Mapping[str, float]) -> str:
    """Amounts as :func:`parse_budget` reads them, rounded up, so that the text admits them."""
    texts = []
    for name, (cost, units) in BUDGETS.items():
        if cost in budget:
            text = str(math.ceil(amounts[cost]))
            if "ms" in units:
                text = f"{math.ceil(round(1e5 * amounts[cost], 6)) / 100:g}ms"
            texts.append(f"{name}={text}")
    return ", ".join(texts)


# --- a ranking ----------------------------------------------------------------------------------


def measure_costs(
    candidates: Sequence[Candidate],
    image_size: ImageSize,
    channels: int = 3,
    latency: bool = True,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What each candidate costs, by name.

    Args:
        candidates: to build and run.
        image_size: side of the square images in pixels, or their height and width.
        channels: of the images.
        latency: measure it too.

    Returns:
        Of those that work, parameters, macs, what thop makes of these ("counters_differ_by" of
        :func:`kd_lrp_plugin.metrics.efficiency.cost`) and, if asked for, latency (seconds per
        image at batch 1); and why the others cannot be built, or not run on images of this size.
    """
    costs, problems = {}, {}
    for candidate in current_progress().track(candidates, "counting", len(candidates)):
        try:
            model = build_seeded(candidate.build, 0)
            macs = count_macs(model, image_size, channels)
            cost: dict[str, Any] = {
                "parameters": float(count_parameters(model)),
                "macs": float(macs),
                CHECK: check_macs(model, macs, image_size, channels)[CHECK],
            }
            if latency:
                cost["latency"] = measure_latency(model, image_size, 1, channels)
        except Exception as error:  # a network of others may fail in any way
            problems[candidate.name] = describe_failure(error)
        else:
            costs[candidate.name] = cost
    return costs, problems


def rank_candidates(
    rows: Sequence[Mapping[str, Any]], costs: Mapping[str, Mapping[str, Any]], score: str
) -> list[dict[str, Any]]:
    """What :func:`score_candidates` and :func:`measure_costs` have found, a record per candidate,
    best first.

    Returns:
        Records with the candidate's name, the score's mean and standard deviation ("std"), each
        cost, the rank by score and by each cost, and whether the candidate is on the Pareto front
        of low score and few parameters and macs ("front"). A candidate without the score comes
        last, with the problem.
    """
    summary = summarise_scores(rows)
    names = list(summary)
    means = [summary[name][score][0] if summary[name][score] else None for name in names]
    kinds = [kind for kind in costs[names[0]] if kind != CHECK]
    by_cost = {kind: ranks([costs[name][kind] for name in names]) for kind in kinds}
    by_score = ranks(means)
    known = {i: value for i, value in enumerate(means) if value is not None}
    points = [
        (value, costs[names[i]]["parameters"], costs[names[i]]["macs"])
        for i, value in known.items()
    ]
    front = dict(zip(known, pareto_front(points), strict=True))
    records = []
    for i, name in enumerate(names):
        record: dict[str, Any] = {"candidate": name, "score": means[i], "std": None}
        if summary[name][score]:
            record["std"] = summary[name][score][1]
        record |= costs[name]
        record["rank by score"] = by_score[i]
        record |= {f"rank by {kind}": order[i] for kind, order in by_cost.items()}
        record["front"] = front.get(i, False)
        record["problem"] = summary[name]["problems"].get(score)
        records.append(record)
    return sorted(records, key=lambda record: (record["score"] is None, record["score"] or 0.0))


def summarise_counters(records: Sequence[Mapping[str, Any]]) -> str | None:
    """For how many candidates both counters of MACs are over 1 % apart; None if for none."""
    apart = [r[CHECK] for r in records if r.get(CHECK) is not None and r[CHECK] > TOLERANCE]
    if not apart:
        return None
    return (
        f"MACs are of what is computed; thop, which counts modules, is up to {max(apart):.0%} "
        f"apart, for {len(apart)} of {len(records)} by more than 1%."
    ).replace("%", " %")


def summarise_ranking(records: Sequence[Mapping[str, Any]]) -> str:
    """In plain words, what the score says that the parameter count does not."""
    scored = [record for record in records if record["score"] is not None]
    if len(scored) < 3:
        return "Too few candidates have a score to say what it adds to the parameter count."
    scores = [record["score"] for record in scored]
    sizes = [record["parameters"] for record in scored]
    if len(set(scores)) == 1:
        return "The score is the same for all: it says nothing."
    deviation = float(np.median([record["std"] for record in scored]))
    steps = np.diff(sorted(scores))
    words = []
    tau = kendalltau(scores, sizes).statistic  # nan for equal sizes
    if len(set(sizes)) == 1:
        words.append("All are of one size: the parameter count cannot rank them.")
    elif abs(tau) >= 0.9:
        order = "smallest" if tau > 0 else "largest"
        words.append(
            f"The score adds nothing to the parameter count here: it puts the {order} first "
            f"(Kendall {tau:.2f} with the parameters)."
        )
    else:
        words.append(
            f"The score is no mere parameter count here (Kendall {tau:.2f} with the parameters)."
        )
    if deviation > float(np.median(steps)):
        words.append(
            f"Neighbours in the ranking do not differ: the standard deviation over initialisations "
            f"and batches is {deviation:.3g}, a step of the ranking {float(np.median(steps)):.3g}."
        )
    words.append("Whether it finds accurate students, only trained ones can tell.")
    return " ".join(words)
