"""The records of explanations in a run folder: ``explanations.json``."""

from pathlib import Path
from types import NoneType
from typing import Any

from kd_lrp_plugin.attribution.summary import METRICS
from kd_lrp_plugin.evaluation.explain_inputs import LoadedRun
from kd_lrp_plugin.utils.files import check_keys, read_json
from kd_lrp_plugin.utils.validation import message

FILE = "explanations.json"
OF_SUBCLASSES = "explanations-subclasses.json"  # the same of subclasses
ROW: dict[str, type | tuple[type, ...]] = {  # what is read of one, with the types of its values
    "model": str,
    "method": str,
    "layer": str,
    "samples": (int, NoneType),
    "weights": str,
    "metrics": dict,
}


def read_explanations(folder: Path, name: str = FILE) -> dict[str, Any]:
    """The content of a run's ``explanations.json``, intact.

    Args:
        folder: of the run.
        name: of the file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged.
    """
    file = folder / name
    fix = "Rename it, and run kd-lrp explain again: it computes the metrics again."
    content = read_json(file, fix, rows=list)
    for row in content["rows"]:
        check_keys(file, row, fix, **ROW)
        for metric in row["metrics"].values():
            check_keys(file, metric, fix, mean=(float, int, NoneType), n=int)
    return content


def read_rows(run: LoadedRun) -> dict[str, Any]:
    """What is known of the run already; not what other definitions of the metrics gave."""
    file = get_file(run)
    explained = f"the true {'subclass' if run.of_subclasses else 'class'}"
    empty = {"test_set": run.test_hash, "explained": explained, "about": METRICS}
    content = read_explanations(run.folder.path, file.name) if file.is_file() else empty
    if content.get("about") != METRICS:
        content = empty
    if content.get("test_set") != run.test_hash:
        fix = "Rename it to explain the run again."
        raise ValueError(message(str(file), "metrics of this run", "those of another", fix))
    return {"rows": [], **content}


def get_file(run: LoadedRun) -> Path:
    return run.folder / (OF_SUBCLASSES if run.of_subclasses else FILE)
