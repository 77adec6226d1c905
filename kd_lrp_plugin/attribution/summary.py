"""Metrics of maps: what they are, summed up over images, and as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from kd_lrp_plugin.utils.files import to_csv

INSIDE = ("relevance_mass_accuracy", "rank_accuracy", "pointing_game")
FAITHFUL = ("insertion", "deletion")
METRICS = {
    "relevance_mass_accuracy": "share of the relevance inside the mask; 0 without relevance",
    "rank_accuracy": "share of the most relevant pixels inside the mask; 0 without relevance",
    "pointing_game": "whether the most relevant pixel lies inside the mask; no without relevance",
    "attribution_similarity": "cosine of student's and teacher's map; 0 where one is zero",
    "insertion": "area under the probability while pixels come into the blurred image (high: good)",
    "deletion": "area under the probability while pixels take the mean colour (low: good)",
    "randomised": "rank correlation with the map of the same network with random weights, for the "
    "class that it then predicts",
}


def summary(
    values: Float[Tensor, " n"],
    chance: Float[Tensor, " n"] | None = None,
    otherwise: float | None = None,
) -> dict[str, Any]:
    """A metric over images.

    Args:
        values: one of each image; nan for a map without relevance.
        chance: what maps that know nothing get, of each image.
        otherwise: what counts instead of nan; without it, such images are left out, here and of
            the chance level.

    Returns:
        ``mean`` and ``std``, None where less than half of the images have a value; ``n`` images,
        of which ``undefined`` had nan; ``chance``, the mean of it, if it is given.

    Example:
        >>> import torch
        >>> summary(torch.tensor([0.5, torch.nan]), torch.tensor([0.25, 0.5]), otherwise=0)
        {'mean': 0.25, 'std': 0.3535533905932738, 'n': 2, 'undefined': 1, 'chance': 0.375}
    """
    missing = values.isnan()
    known = (values[~missing] if otherwise is None else values.nan_to_num(otherwise)).double()
    enough = 0 < len(values) <= 2 * len(known)
    found: dict[str, Any] = {
        "mean": float(known.mean()) if enough else None,
        "std": float(known.std()) if enough and len(known) > 1 else None,
        "n": len(values),
        "undefined": int(missing.sum()),
    }
    if chance is not None:
        level = chance[~missing] if otherwise is None else chance
        found["chance"] = float(level.double().mean()) if enough else None
    return found


def records(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of :func:`kd_lrp_plugin.evaluation.explain.explain` as a table, a column per metric.

    First the metrics, each group beside its chance level; then, for each group, the number of
    images, and of how many of them the map has no relevance.
    """
    several = len({row["run"] for row in rows}) > 1
    table = []
    for row in rows:
        metrics = row["metrics"]
        line = {"run": row["run"]} if several else {}
        line |= {key: row[key] for key in ("model", "method", "layer")}
        counts: dict[str, Any] = {}
        for names in (INSIDE, ("attribution_similarity",), FAITHFUL, ("randomised",)):
            for name in names:
                line[name] = metrics.get(name, {}).get("mean")
                if name == INSIDE[0]:
                    line["inside, chance level"] = metrics.get(name, {}).get("chance")
                if name in FAITHFUL:
                    line[f"{name} chance level"] = metrics[name]["chance"]
            first = metrics.get(names[0], {})
            counts[f"n ({names[0]})"] = first.get("n")
            counts[f"no relevance ({names[0]})"] = first.get("undefined")
        table.append(line | counts)
    columns = dict.fromkeys(column for line in table for column in line)
    used = [column for column in columns if any(line[column] is not None for line in table)]
    return [{column: line[column] for column in used} for line in table]


_SHORT = {
    "relevance_mass_accuracy": "inside",
    "rank_accuracy": "rank",
    "pointing_game": "point",
    "attribution_similarity": "alike",
    "insertion": "insert",
    "deletion": "delete",
    "randomised": "random",
}
_WORDS = {short: METRICS[name] for name, short in _SHORT.items()}
_WORDS["chance"] = "of inside, what maps get that know nothing of the image"


def brief(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The means of :func:`records` as tables for a terminal of 100 columns.

    Returns:
        A table for each run, model and layer under its heading, a line per method, with the
        columns that any of them has; :func:`explain_columns` says what they are. A teacher that
        runs share has one, under all their names.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    runs: dict[tuple, list[str]] = {}
    first: dict[tuple, Mapping[str, Any]] = {}
    for row in rows:
        own = row["run"] if row["model"] == "student" else None
        metrics = repr(row["metrics"])  # which differ where the images do
        key = (own, row["model"], row["weights"], row["layer"], row["method"], metrics)
        first.setdefault(key, row)
        runs.setdefault(key, []).append(str(row["run"]))
    for key, row in first.items():
        names = runs[key] if len(runs[key]) < 4 else [f"{len(runs[key])} runs"]
        heading = f"{row['model']} of {', '.join(names)}, layer {row['layer']}"
        groups.setdefault(heading, []).append(row)
    found = {heading: [_shorten(row) for row in group] for heading, group in groups.items()}
    lines = [line for part in found.values() for line in part]
    used = {name for line in lines for name, value in line.items() if value is not None}
    return {
        heading: [{name: line[name] for name in line if name in used} for line in part]
        for heading, part in found.items()
    }


def explain_columns(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What the columns of :func:`brief` are, a line for each."""
    shown = {name for part in tables.values() for line in part for name in line}
    return "\n".join(f"{name}: {words}" for name, words in _WORDS.items() if name in shown)


def _shorten(row: Mapping[str, Any]) -> dict[str, Any]:
    line: dict[str, Any] = {"method": row["method"]}
    for name, short in _SHORT.items():
        metric = row["metrics"].get(name, {})
        line[short] = metric.get("mean")
        if name == INSIDE[0]:
            line["chance"] = metric.get("chance")
    return line


def by_layer(rows: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    """A metric as a table: a line per run, model and method, a column per layer."""
    lines: dict[tuple, dict[str, Any]] = {}
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    titles = ("run", "model", "method")[len({row["run"] for row in rows}) == 1 :]
    for row in rows:
        key = tuple(row[title] for title in titles)
        empty = dict(zip(titles, key, strict=True)) | dict.fromkeys(layers)
        lines.setdefault(key, empty)[row["layer"]] = row["metrics"].get(metric, {}).get("mean")
    return list(lines.values())


def flat(rows: Sequence[Mapping[str, Any]]) -> str:
    """A CSV with a line per run, model, method, layer and metric."""
    columns = ("run", "model", "method", "layer", "samples")
    of_metric = ("mean", "std", "n", "undefined", "chance")
    lines = (
        [*(row[column] for column in columns), name, *map(metric.get, of_metric)]
        for row in rows
        for name, metric in row["metrics"].items()
    )
    return to_csv([*columns, "metric", *of_metric], lines)
