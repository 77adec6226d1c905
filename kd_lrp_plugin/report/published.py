"""Figures that others have published of brain MRI, beside those of a page's runs."""

from collections.abc import Mapping, Sequence
from typing import Any

THESIS = "the thesis on DisWOT with LRP (2025)"
LEAKING = "published, with near-duplicates across the split"
UNKNOWN = "not stated"
OWN = "that of its folders; kd-lrp check-data says whether it leaks"
# The thesis' own tables disagree about its student: 2,257,984 parameters in 3.3 and 3.5.
PUBLISHED: list[dict[str, Any]] = [
    {
        "model": "Tiny CNN, logit + feature KD",
        "accuracy": 0.961,
        "parameters": None,
        "source": f"{THESIS}, table 3.8, as it cites others",
        "split": UNKNOWN,
    },
    {
        "model": "MobileNet, KD + pruning",
        "accuracy": 0.953,
        "parameters": 3_200_000,
        "source": f"{THESIS}, table 3.8, as it cites others",
        "split": UNKNOWN,
    },
    {
        "model": "MobileNetV2, LRP + cosine",
        "accuracy": 0.9535,
        "parameters": 2_250_000,
        "source": f"{THESIS}, table 3.8",
        "split": LEAKING,
    },
]
LIGHTWEIGHTING: list[dict[str, Any]] = [
    {
        "model": name,
        "accuracy": accuracy,
        "MACs": macs,
        "MB": megabytes,
        "source": f"{THESIS}, table 3.6",
        "split": LEAKING,
    }
    for name, accuracy, macs, megabytes in (
        ("teacher", 0.9802, 322_421_548, 73),
        ("student", 0.9535, 306_724_268, 10),
    )
]


def list_published(
    runs: Sequence[Mapping[str, Any]],
    models: Sequence[Mapping[str, Any]],
    tables: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Published figures, each with the split it was measured on, beside the models of a page.

    Args:
        runs: of the page.
        models: of the page, by the names of their runs.
        tables: by run, the split tables that its config names.

    Returns:
        ``students`` and ``lightweighting``, rows of two tables; None where no run is tested on
        brain MRI.
    """
    names = [run["name"] for run in runs if _is_tested_on_brain_mri(run["config"])]
    own = [model for model in models if model["name"] in names]
    if not own:
        return None
    students, lightweighting = [*PUBLISHED], [*LIGHTWEIGHTING]
    for model in own:
        split = "a split table's" if tables.get(model["name"]) else OWN
        about = {"source": "this page, one run", "split": split}
        row = {"model": model["name"], "accuracy": model["accuracy"]}
        students.append({**row, "parameters": model["parameters"], **about})
        cost = {"MACs": model["macs"], "MB": model["cost"].get("megabytes")}
        lightweighting.append({**row, **cost, **about})
    return {"students": students, "lightweighting": lightweighting}


def _is_tested_on_brain_mri(config: Mapping[str, Any]) -> bool:
    """Whether the config's test set is ``folder_images`` by the name of brain_mri."""
    for title, entry in (config.get("datasets") or {}).items():
        init = (entry.get("init") or {}) if isinstance(entry, dict) else {}
        kwargs = init.get("kwargs") or {}
        if str(title) == "brain_mri/test" and kwargs.get("name", "brain_mri") == "brain_mri":
            return True
    return False
