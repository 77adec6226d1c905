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

    Beside each group of metrics its chance level, the number of images, and of how many of them
    the map has no relevance.
    """
    several = len({row["run"] for row in rows}) > 1
    table = []
    for row in rows:
        metrics = row["metrics"]
        line = {"run": row["run"]} if several else {}
        line |= {key: row[key] for key in ("model", "method", "layer")}
        for names in (INSIDE, ("attribution_similarity",), FAITHFUL, ("randomised",)):
            for name in names:
                line[name] = metrics.get(name, {}).get("mean")
                if name in FAITHFUL:
                    line[f"{name} chance level"] = metrics[name]["chance"]
            first = metrics.get(names[0], {})
            if names == INSIDE:
                line["inside, chance level"] = first.get("chance")
            line[f"n ({names[0]})"] = first.get("n")
            line[f"no relevance ({names[0]})"] = first.get("undefined")
        table.append(line)
    columns = dict.fromkeys(column for line in table for column in line)
    used = [column for column in columns if any(line[column] is not None for line in table)]
    return [{column: line[column] for column in used} for line in table]


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
