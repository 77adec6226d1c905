"""What is ranked and what it costs: budgets, ranks, Pareto front, what a score adds to size."""

import math
from collections.abc import Mapping, Sequence
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

Budget = dict[str, tuple[float, float]]  # by cost, the least and the most
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


def parse_budget(texts: Sequence[str]) -> Budget:
    """Budgets such as ``params=2.5M``, ``macs=300M``, ``latency=20ms``, as numbers and seconds.

    ``params=1M..2.5M`` has a least amount too, and ``params=1M..`` no other; both ends belong to
    it. So a student can be asked for whose size lies between those of two others.

    Returns:
        By cost, the least amount (0 where none is given) and the most (infinity).

    Raises:
        ValueError: for an unknown quantity or one given twice, a value that is no positive number,
            or a least amount above the most.

    Example:
        >>> parse_budget(["params=1M..2.5M", "latency=20ms"])
        {'parameters': (1000000.0, 2500000.0), 'latency': (0.0, 0.02)}
    """
    budget: Budget = {}
    for text in texts:
        name, _, value = (part.strip() for part in text.partition("="))
        check_known("budget", name, BUDGETS)
        cost, _ = BUDGETS[name]
        first, dots, last = (part.strip() for part in value.partition(".."))
        least, most = 0.0, math.inf
        if dots and (first or not last):
            least = _parse_amount(text, name, first)
        if last or not dots:
            most = _parse_amount(text, name, last if dots else first)
        if least > most:
            expected = "a least amount below the most"
            raise ValueError(message("budget", expected, repr(text), "Exchange them."))
        if cost in budget:
            fix = f"Write both ends as one: {name}=LEAST..MOST."
            raise ValueError(message("budget", f"{name} once", repr(list(texts)), fix))
        budget[cost] = least, most
    return budget


def _parse_amount(text: str, name: str, value: str) -> float:
    """A number above 0 with its unit; ``text`` is for messages."""
    _, units = BUDGETS[name]
    number = value.rstrip("KMGms")
    try:
        amount = float(number) * units[value[len(number) :].strip()]
    except (ValueError, KeyError):
        expected = f"{name}=NUMBER with a unit of {[u or 'none' for u in units]}"
        fix = "For example params=2.5M, params=1M..2.5M, macs=300M or latency=20ms."
        raise ValueError(message("budget", expected, repr(text), fix)) from None
    if not 0 < amount < math.inf:
        raise ValueError(message("budget", "a number above 0", repr(text), "Raise it."))
    return amount


def excess(budget: Budget, cost: Mapping[str, float]) -> float:
    """How far a candidate lies outside of a budget, as a share of it; 0 or less inside."""
    shares = [cost[k] / most - 1 for k, (_, most) in budget.items()]
    shares += [1 - cost[k] / least for k, (least, _) in budget.items() if least]
    return max(shares, default=0.0)


def filter_by_budget(budget: Budget, costs: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The candidates that keep a budget.

    Args:
        budget: of :func:`parse_budget`.
        costs: parameters, macs and latency by candidate.

    Raises:
        ValueError: if none does; says what the nearest one has.
    """
    kept = [name for name, cost in costs.items() if excess(budget, cost) <= 0]
    if not kept:
        near = min(costs, key=lambda name: excess(budget, costs[name]))
        has = _as_written({cost: (0.0, costs[near][cost]) for cost in budget})
        fix = f"The nearest is {near}, which has {has}."
        got = _as_written(budget)
        raise ValueError(message("budget", "one that some candidate keeps", got, fix))
    return kept


def _as_written(budget: Budget) -> str:
    """As :func:`parse_budget` reads it, rounded up, so that the text admits what has the most."""
    texts = []
    for name, (cost, units) in BUDGETS.items():
        if cost in budget:
            least, most = (_write_amount(end, "ms" in units) for end in budget[cost])
            texts.append(f"{name}={least}..{most}" if budget[cost][0] else f"{name}={most}")
    return ", ".join(texts)


def _write_amount(amount: float, in_ms: bool) -> str:
    if amount == math.inf:
        return ""
    return f"{math.ceil(round(1e5 * amount, 6)) / 100:g}ms" if in_ms else str(math.ceil(amount))


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
