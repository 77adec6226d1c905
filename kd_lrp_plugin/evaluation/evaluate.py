"""The full evaluation of a finished run."""

from pathlib import Path
from typing import Any

from kd_lrp_plugin.metrics.agreement import compare_predictions
from kd_lrp_plugin.metrics.classification import classification_metrics
from kd_lrp_plugin.metrics.efficiency import cost
from kd_lrp_plugin.metrics.groups import group_metrics
from kd_lrp_plugin.metrics.subclasses import effective_subclasses
from kd_lrp_plugin.plots.figures import confusion_figure, reliability_figure
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.runs.loading import build_untrained, read_model_entries
from kd_lrp_plugin.runs.predictions import name_outputs, read_predictions
from kd_lrp_plugin.runs.record import EVALUATION
from kd_lrp_plugin.utils.files import get_command, write_json

Costs = dict[tuple[object, ...], dict[str, Any]]


def evaluate(
    folder: str | Path, resamples: int = 2000, safe: bool = False, costs: Costs | None = None
) -> dict[str, Any]:
    """Everything that can be said of a run from its predictions on the test set and its models.

    Writes ``evaluation.json``, ``confusion.png`` and ``reliability.png`` into the run folder.

    Args:
        folder: a finished run.
        resamples: of the bootstrap interval of the accuracy.
        safe: see :func:`load_run`.
        costs: of architectures that were measured before, which are not measured again, so that
            times of one network do not differ by chance; added to.

    Returns:
        By "student", and "teacher" where the run has one: the metrics of
        :func:`~kd_lrp_plugin.metrics.classification.classification_metrics`, under "cost" those of
        :func:`~kd_lrp_plugin.metrics.efficiency.cost` and, where the test set has groups, under
        "groups" those of :func:`~kd_lrp_plugin.metrics.groups.group_metrics`; of a model of
        subclasses "effective_subclasses", the mean over the classes of
        :func:`~kd_lrp_plugin.metrics.subclasses.effective_subclasses`, and "subclasses_used", each
        class' own. Under
        "student_and_teacher" those of
        :func:`~kd_lrp_plugin.metrics.agreement.compare_predictions`. The file has the command
        and a hash of the predictions, too.

    Raises:
        FileNotFoundError: if the folder holds no finished run.
        ValueError: if a file of it is damaged, or its predictions are not finite.
    """
    run = RunFolder(folder)
    summary = run.summary()
    predictions = read_predictions(run)
    labels, probabilities = predictions.labels, predictions.probabilities
    run.check_output("best.pt")
    found: dict[str, Any] = {}
    entries = read_model_entries(run, summary, safe)
    for role, values in probabilities.items():
        outputs = name_outputs(summary["classes"], values.shape[1])
        found[role] = classification_metrics(
            values, labels, outputs, resamples, images=predictions.images
        )
        channels, height, width = summary["image_shape"]
        size = (height, width)
        model = build_untrained(role, entries)
        shapes = tuple((name, tuple(t.shape)) for name, t in model.state_dict().items())
        key = (entries[role]["key"], repr(model), shapes, size, channels)
        measured = {} if costs is None else costs
        if key not in measured:
            measured[key] = cost(model, size, channels)
        found[role]["cost"] = dict(measured[key])
        if predictions.groups:
            teacher = probabilities.get("teacher") if role == "student" else None
            groups = predictions.groups
            found[role]["groups"] = group_metrics(values, labels, groups, teacher=teacher)
    for role, values in predictions.subclass_probabilities.items():
        used = effective_subclasses(values, labels, summary["subclass_of"])
        found[role]["subclasses_used"] = dict(zip(summary["classes"], used, strict=True))
        known = [number for number in used if number is not None]
        found[role]["effective_subclasses"] = sum(known) / len(known)
    if "teacher" in probabilities:
        found["student_and_teacher"] = compare_predictions(
            probabilities["student"], probabilities["teacher"], labels, predictions.images
        )
    names = [row["class"] for row in found["student"]["per_class"]]
    matrices = {role: found[role]["confusion_matrix"] for role in probabilities}
    curves = {
        role: (values.max(1), values.argmax(1) == labels) for role, values in probabilities.items()
    }
    confusion, reliability = confusion_figure(matrices, names), reliability_figure(curves)
    run.put("confusion.png", lambda file: confusion.savefig(file, format="png"))
    run.put("reliability.png", lambda file: reliability.savefig(file, format="png"))
    content = {**found, "command": get_command(), **run.of}
    write_json(run / EVALUATION, content)  # last: with it, all is there
    return found
