"""The model card of an exported student: what it was made of, what it is worth, what it is not."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.data.splits import split_path
from kd_lrp_plugin.evaluation.predictors import describe_calibration
from kd_lrp_plugin.plots import tables
from kd_lrp_plugin.plots.text import one_line
from kd_lrp_plugin.runs.provenance import find_split_tables
from kd_lrp_plugin.runs.record import RunRecord
from kd_lrp_plugin.utils import files
from kd_lrp_plugin.utils.validation import message

LIMITS = (
    "Not for clinical use: nothing here was tested on patients beyond the test set above.",
    "The accuracy is of one training run with one seed, on one test set. Images of another "
    "scanner, hospital or population may be classified worse, and nothing warns of it.",
    "Every image gets one of the classes, whatever it shows.",
    "Relevance maps show what the model reacts to. They do not prove that it is right.",
)


def read_leak_check(folder: Path | None, run: RunRecord) -> str:
    """What ``kd-lrp check-data`` has found, in its own words, and whether the run minds it.

    Args:
        folder: that the check has written; None without one.
        run: whose images they should be.

    Raises:
        FileNotFoundError: if the folder holds no leak check.
        ValueError: if it is damaged.
    """
    if folder is None:
        return "Not made: whether test images have duplicates in training is not known."
    file = folder / "summary.json"
    fix = "Give the folder that kd-lrp check-data has written."
    if not file.is_file():
        got = f"none at {folder}"
        raise FileNotFoundError(message("export --data-check", "a leak check", got, fix))
    found = files.read_json(file, fix, summary=str, leaks=dict, options=dict)
    images = one_line(_hide_folder(found["options"].get("root", "")))
    tables = find_split_tables(run, resolve_config(run / "config.yaml").values)
    used = "The run does not take its images from the table that this check has made."
    if tables == {(folder / "clean_split.csv").resolve()}:
        used = "The run takes its images from the table that this check has made, without them."
    return f"Of the images in {images}:\n\n{found['summary']}\n\n{used}"


def write_card(
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    about: Mapping[str, Any],
    leaks: str,
    how: str,
) -> str:
    """The card, as Markdown.

    Args:
        summary: of the run.
        config: its values.
        metrics: of :func:`~kd_lrp_plugin.metrics.classification.classification_metrics`, and
            perhaps "groups".
        about: preprocessing, classes, output, calibration.
        leaks: of :func:`read_leak_check`.
        how: Python that loads the model and prepares an image.
    """
    arguments = summary["timm"] or {}
    low, high = metrics["accuracy_interval"]
    rows = [
        {
            "metric": "accuracy",
            "value": metrics["accuracy"],
            "95 % interval": f"{low:.3f}-{high:.3f}",
        },
        {"metric": "balanced accuracy", "value": metrics["balanced_accuracy"]},
        {"metric": "macro F1", "value": metrics["macro_f1"]},
        {"metric": "macro AUC", "value": metrics["macro_auc"]},
        {"metric": "log loss (nats)", "value": metrics["log_loss"]},
        {"metric": "calibration error", "value": metrics["calibration_error"]},
    ]
    columns = ["class", "precision", "recall", "f1", "auc", "support"]
    parts = [
        "---\nlibrary_name: timm\npipeline_tag: image-classification\n"
        "tags: [image-classification, timm, knowledge-distillation]\n---",
        f"# {one_line(arguments.get('model_name', 'student'))}",
        f"A student with {summary['parameters']:,} parameters, trained for {summary['epochs']} "
        f"epochs with seed {summary['seed']} by kd_lrp_plugin, {_name_teacher(config)}. "
        f"Output: {about['output']}, in this order: {_list_words(about['classes'])}.",
        f"## Use\n\n```python\n{how}```",
        f"## Data\n\n{tables.table(list_data(config), ['data set', 'made by', 'with'])}",
        f"## Metrics\n\nOn the {metrics['n']:,} images of its test set.\n\n{tables.table(rows)}\n\n"
        f"{tables.table(metrics['per_class'], columns)}\n\n"
        f"{describe_calibration(about['calibration'])}",
        f"## Leak check\n\n{leaks}",
        "## Limits\n\n" + "\n".join(f"- {line}" for line in LIMITS),
    ]
    if groups := metrics.get("groups"):
        of_groups = tables.group_rows({"student": {"groups": groups}})
        parts.insert(6, f"### Each group of test images\n\n{tables.table(of_groups)}")
    return "\n\n".join(parts) + "\n"


def _list_words(names: Sequence[str]) -> str:
    return ", ".join(one_line(name) for name in names) or "by number"


def _name_teacher(config: Mapping[str, Any]) -> str:
    models = config.get("models") or {}
    teacher = models.get("teacher_model")
    if not isinstance(teacher, dict):
        return "without a teacher"
    name = (teacher.get("kwargs") or {}).get("name") or teacher.get("key")
    return f"taught by {one_line(name)}"


def list_data(config: Mapping[str, Any]) -> list[dict[str, str]]:
    """The data sets of a config, a row each; paths are shown by their last part alone."""
    rows = []
    for name, entry in (config.get("datasets") or {}).items():
        entry = entry if isinstance(entry, dict) else {}
        kwargs = (entry.get("init") or {}).get("kwargs") or {}
        words = ", ".join(
            f"{key}={_hide_folder(value)}"
            for key, value in kwargs.items()
            if value is not None and not isinstance(value, dict)
        )
        key = str(entry.get("key", "")).rpartition(".")[2]
        rows.append({"data set": str(name), "made by": key, "with": words})
    return rows


def _hide_folder(value: object) -> object:
    is_path = isinstance(value, str) and ("/" in value or "\\" in value)
    return split_path(str(value))[-1] if is_path else value
