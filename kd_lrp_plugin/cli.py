"""The command line ``kd-lrp``: arguments and printing."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from kd_lrp_plugin import checking, evidence, hook, ranking, report, results, training
from kd_lrp_plugin.checks import message
from kd_lrp_plugin.config import Config, resolve_config, unsafe_tags
from kd_lrp_plugin.console import (
    ConfigFile,
    Device,
    Overrides,
    Safe,
    Show,
    console,
    errors,
    errors_in_words,
)
from kd_lrp_plugin.experiment import construct
from kd_lrp_plugin.processes import joined
from kd_lrp_plugin.runs import RunFolder

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Explanation-guided knowledge distillation on torchdistill configs.",
)


@app.callback()
def main(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the log.")] = False):
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING)
    logging.getLogger().setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.INFO if verbose else logging.WARNING)


@app.command()
def distill(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder; default runs/DATASET/METHOD/CONFIG/SEED."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every random number generator.")] = 0,
    device: Device = None,
    safe: Safe = False,
) -> None:
    """Train the student of a config, with its teacher if it has one, and test it.

    A config without a teacher trains that model alone: this is how teachers and baselines are
    made. A run that was stopped or killed goes on when the same command is given again. Examples:

        kd-lrp distill torchdistill_configs/phantom/ce/resnet10t.yaml

        kd-lrp distill my.yaml --set num_epochs=2 --set train.optimizer.kwargs.lr=0.001 --seed 1

        torchrun --nproc_per_node=2 -m kd_lrp_plugin.cli distill my.yaml
    """
    folder = out or training.default_run_folder(config, seed)
    last = f"Finished epochs are kept in {folder}; the same command goes on after the last of them."
    with Show() as show, errors_in_words(last):
        summary = training.distill(config, overrides or [], folder, seed, device, show, safe)
    console.print(
        f"test accuracy {summary['test_accuracy']:.4f} with the weights of epoch "
        f"{summary['best_epoch']} (validation {summary['val_accuracy']:.4f}); written to {folder}",
        soft_wrap=True,
    )


@app.command()
def check(
    config: ConfigFile,
    overrides: Overrides = None,
    device: Device = None,
    safe: Safe = False,
) -> None:
    """Build everything that a config names, take one step, and say what is wrong.

    Reports every problem with its place in the file; nothing is written. `distill` does the same
    before it trains; where a student chooses itself, `check` tries the first one within the
    budget, `distill` the one that is chosen. Example:

        kd-lrp check my.yaml --set batch_size=64
    """
    with Show() as show, errors_in_words():
        read = resolve_config(config, overrides or [])
        problems, remarks = unsafe_tags(read) if safe else [], []
        if not problems:
            with joined(device) as here, hook.looking_only():
                findings = checking.check(read, here, show)
            problems, remarks = findings.problems, findings.remarks
    for remark in remarks:
        console.print(f"remark: {remark}", markup=False, highlight=False, soft_wrap=True)
    for problem in problems:
        errors.print(problem, markup=False, highlight=False, soft_wrap=True)
    if problems:
        errors.print(f"[red]{len(problems)} problem{'s' * (len(problems) > 1)}[/]")
        raise typer.Exit(1)
    console.print("models, data, losses and a step of each stage: no problem found")


@app.command()
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Folders that kd-lrp distill has finished.")],
    resamples: Annotated[
        int, typer.Option(help="Of the bootstrap interval of the accuracy.", min=100)
    ] = 2000,
    safe: Safe = False,
) -> None:
    """Everything about finished runs: accuracy, per class, calibration, agreement, cost.

    Writes evaluation.json, confusion.png and reliability.png into each folder, and prints a row
    for each student and teacher. Latency is of this machine, now. Example:

        kd-lrp evaluate runs/phantom/kd/*/0
    """
    rows, details = [], []
    with Show() as show, errors_in_words():
        for run in runs:
            RunFolder(run).summary()  # all are finished, or none is evaluated
        for run in show.track(runs, "evaluating", len(runs)):
            found = results.evaluate(run, resamples, safe)
            roles = [role for role in ("student", "teacher") if role in found]
            rows += [_row(str(run), role, found[role]) for role in roles]
            details.append(found)
    print(report.table(rows))
    for run, found in zip(runs, details, strict=True):
        print(f"\n{run}: student by class\n")
        print(report.table(found["student"]["per_class"]))
        if both := found.get("student_and_teacher"):
            print(f"\nstudent and teacher agree on {both['agreement']:.3f} of the images")
        print(f"written: {run}/evaluation.json, confusion.png, reliability.png")


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


@app.command()
def select(
    config: ConfigFile,
    overrides: Overrides = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="QUANTITY=VALUE",
            help="Such as params=2.5M, macs=300M or latency=20ms; repeatable. "
            "Instead of the config's, for a look: the choice on record stays.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes to share the work.", min=1)] = 1,
) -> None:
    """Rank the untrained students of a config whose student_model.key is diswot_student.

    Prints a table, and writes it beside the record of the choice, with a figure. What is scored
    stays scored: the command goes on after a kill. With `search: N` in the config, it searches a
    space instead of ranking all of it. With --budget, record, table and figure are those of a
    look, RECORD.look.json, .md and .png. `distill` then trains the choice. Example:

        kd-lrp select torchdistill_configs/phantom/diswot/chosen_from_resnet10t.yaml --jobs 2
    """
    with Show() as show, errors_in_words():
        question = _question_of(resolve_config(config, overrides or []))
        file = question.file
        if budget is not None:
            question, file = replace(question, budget=budget), file.with_suffix(".look.json")
        elif file.exists():
            hook.recorded(question)  # that of another question is refused
        records = hook.select(question, jobs, show, latency=True)
        if budget is not None or not file.exists():
            hook.keep(question, records, file)
        text = "\n".join([report.table(_in_units(records)), *_failures(records)])
        text += f"\n\n{ranking.verdict(records)}\n"
        file.with_suffix(".md").write_text(text, encoding="utf-8")
        figure = report.selection_figure(records, f"{question.score}: lower is better")
        figure.savefig(file.with_suffix(".png"))
    print(f"{text}\nbest by {question.score}: {records[0]['candidate']}")
    if budget is None:
        chosen = json.loads(file.read_text(encoding="utf-8"))["candidate"]
        print(f"recorded in {file}: {chosen}; delete it to choose anew")
    else:
        print(f"a look, in {file}: the choice of the config's own budget is left as it is")
    print(f"written: {file.with_suffix('.md')}, {file.with_suffix('.png')}")


def _question_of(config: Config) -> hook.Question:
    content = construct(config.only("dependencies", "datasets", "models"))
    entry = (content.get("models") or {}).get("student_model") or {}
    if entry.get("key") != "diswot_student":
        where = f"{config.path}: models.student_model.key"
        fix = "See torchdistill_configs/phantom/diswot."
        raise ValueError(message(where, "'diswot_student'", repr(entry.get("key")), fix))
    return hook.ask(**(entry.get("kwargs") or {}))


def _in_units(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    hidden = ("latency", "problem", "front", "entry")
    for record in records[: hook.LISTED]:
        row = {k: v for k, v in record.items() if k not in hidden}
        for count in ("parameters", "macs"):
            row[count] = None if record[count] is None else int(record[count])
        if "latency" in record:
            row["ms"] = None if record["latency"] is None else 1e3 * record["latency"]
        row["front"] = "*" if record["front"] else ""
        rows.append(row)
    return rows


def _failures(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why some have no score, as a list below the table."""
    failed = [record for record in records if record["score"] is None]
    lines = [f"- {r['candidate']}: {' '.join(str(r['problem']).split())}" for r in failed]
    return ["", "Left out, for want of a score:", "", *lines] if lines else []


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="A run folder that kd-lrp distill has written.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    safe: Safe = False,
) -> None:
    """Classify image files with the student of a run. Not for clinical use."""
    with errors_in_words():
        records = results.predict(run, images, safe)
    table = Table("file", "class", "probability")
    for record in records:
        table.add_row(record["file"], record["class"], f"{record['probability']:.3f}")
    console.print(table)


app.command()(evidence.study)
app.command()(evidence.check_data)
app.command()(evidence.explain)
app.command("report")(evidence.report_page)


if __name__ == "__main__":
    app()
