"""``kd-lrp evaluate``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kd_lrp_plugin.cli.console import RichProgress, Safe, Trust, errors_in_words, say
from kd_lrp_plugin.plots import tables


def evaluate(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN|STUDY...", help="Finished runs, or all of a study.")
    ],
    resamples: Annotated[
        int, typer.Option(help="Of the bootstrap interval of the accuracy.", min=100)
    ] = 2000,
    safe: Safe = False,
    trust: Trust = False,
) -> None:
    """Everything about finished runs: accuracy, per class, calibration, agreement, cost.

    Writes evaluation.json, confusion.png and reliability.png into each folder, and prints a row
    for each student and teacher. Latency is of this machine, now; of an architecture that runs
    share it is measured once, so that a study's may be taken while nothing else runs. Runs the
    code that the config.yaml of each run names; a run that was not made here needs --trust, or
    --safe, which refuses such code. Examples:

        kd-lrp evaluate runs/phantom/kd/*/0

        kd-lrp evaluate runs/studies/core
    """
    rows, details = [], []
    costs: dict = {}  # of an architecture that runs share, measured once
    with RichProgress() as progress, errors_in_words():
        from kd_lrp_plugin.evaluation.evaluate import evaluate
        from kd_lrp_plugin.evaluation.explain_inputs import list_runs
        from kd_lrp_plugin.runs.folder import RunFolder
        from kd_lrp_plugin.runs.trust import check_trusted

        runs = [run for run, _ in list_runs(runs)]
        for run in runs:
            RunFolder(run).summary()  # all are finished, or none is evaluated
        check_trusted(runs, trust, safe)
        for run in progress.track(runs, "evaluating", len(runs)):
            found = evaluate(run, resamples, safe, costs)
            roles = [role for role in ("student", "teacher") if role in found]
            rows += [_row(str(run), role, found[role]) for role in roles]
            details.append(found)
    say(tables.table(rows))
    for run, found in zip(runs, details, strict=True):
        say(f"\n{run}: student by class\n")
        say(tables.table(found["student"]["per_class"]))
        if groups := tables.group_rows(found):
            say(f"\n{run}: by group\n")
            say(tables.table(groups))
        if both := found.get("student_and_teacher"):
            say(f"\nprediction agreement of student and teacher: {both['agreement']:.3f}")
        from kd_lrp_plugin.metrics.counting import explain_counters

        for role in ("student", "teacher"):
            if line := explain_counters(role, found.get(role, {}).get("cost")):
                say(line)
        say(f"written: {run}/evaluation.json, confusion.png, reliability.png")


def _row(run: str, role: str, found: Mapping[str, Any]) -> dict[str, Any]:
    low, high = found["accuracy_interval"]
    cost = found["cost"] or {}
    return {
        "run": run,
        "model": role,
        "accuracy": found["accuracy"],
        "95 % interval": f"{low:.3f}-{high:.3f}",
        "balanced": found["balanced_accuracy"],
        "macro F1": found["macro_f1"],
        "AUC": found["macro_auc"],
        "ECE": found["calibration_error"],
        "parameters": cost.get("parameters"),
        "MACs": cost.get("macs"),
        "MB": cost.get("megabytes"),
        "ms": cost.get("latency_ms_batch_1"),
        "images/s": cost.get("images_per_second_batch_32"),
    }
