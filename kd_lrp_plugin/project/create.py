"""A project: from a folder of images to configs, a study and a README, whole or not at all."""

import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kd_lrp_plugin.config.build import Assembly
from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.data.leakage.check import check_images
from kd_lrp_plugin.project import timing
from kd_lrp_plugin.project.choices import (
    Choices,
    Models,
    choose,
    from_project,
    name_from_project,
)
from kd_lrp_plugin.project.listing import WHERE, check_counts, list_folder
from kd_lrp_plugin.project.templates import render_configs, render_readme, render_study
from kd_lrp_plugin.selection import select
from kd_lrp_plugin.studies.parser import read_plan
from kd_lrp_plugin.training.check.dry_run import check
from kd_lrp_plugin.utils.distributed import DistributedContext, init_distributed
from kd_lrp_plugin.utils.files import DRAFT, get_command, sync, write_text
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message

NO_TEACHER = "models.teacher_model.src_ckpt=null"  # it has still to be trained


@dataclass(frozen=True)
class Data:
    """Where images and labels are.

    Attributes:
        folder: of the images.
        table: that lists them, if folders do not.
        columns: of the table, by file, label, split and patient.
        bits: of 16-bit images, or None.
        classes: names of the class folders, where they are not the uppermost ones.
    """

    folder: Path
    table: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    bits: int | None = None
    classes: Sequence[str] = ()


def create_project(data: Data, out: Path, models: Models) -> tuple[Choices, dict[str, Any]]:
    """Look at the images, check them for leaks, and write a project that runs as it is.

    Every config is built and takes a step before the folder appears; until then all is in a hidden
    folder beside it, which is gone if anything fails.

    Args:
        data: where the images are.
        out: a new or empty folder, no link, outside of that of the images and not the current one.
        models: teacher, student, and what the student learns from.

    Returns:
        What was chosen, and the summary of the leak check.

    Raises:
        FileExistsError: if ``out`` holds something, or is a link.
        FileNotFoundError: if images, a table, weights or a model's folder are not there.
        ValueError: for images that make no data set, a model or table that is not known, or a
            config that does not run, with all its problems.
        OSError: if something cannot be written.
    """
    folder = data.folder.expanduser()
    _check_out(out, folder)
    listing = list_folder(folder, data.table, data.columns, data.classes)
    check_counts(listing)
    with _staged(out) as stage:
        about = {"layout": listing.layout, "columns": dict(listing.columns)}
        summary = check_images(folder, stage / "checked", listing.image_list, about, bits=data.bits)
        manifest = stage / "checked" / "clean_split.csv"
        choices = choose(listing, summary, manifest, models, data.bits)
        seen = replace(
            models,
            teacher=name_from_project(models.names["teacher"], out),
            student=name_from_project(models.names["student"], out),
            weights={role: from_project(file, out) for role, file in models.weights.items()},
        )
        texts = render_configs(choices, seen, from_project(str(folder.resolve()), out))
        for name, text in texts.items():
            write_text(stage / name, text)
        with init_distributed() as context:
            with _working_in(stage):  # as its commands will
                times = _check_configs(choices, seen, context)
            machine = timing.describe_machine(context.device)
        words = get_command()
        made = {
            "command": shlex.join(words) if words else "",
            "machine": machine,
            "summary": describe_leaks(summary),
        }
        write_text(stage / "README.md", render_readme(choices, seen, listing, made, times))
    return choices, summary


def describe_leaks(summary: Mapping[str, Any]) -> str:
    """What the leak check says, with the option of this command in place of its own."""
    return str(summary["summary"]).replace("give --group-by", "give --column patient=NAME")


def _check_out(out: Path, folder: Path) -> None:
    where = f"{WHERE}: out"
    is_empty = out.is_dir() and not out.is_symlink() and not any(out.iterdir())
    if os.path.lexists(out) and not is_empty:
        fix = "Choose another --out; nothing was changed."
        raise FileExistsError(message(where, "a new folder", f"{out}, which is there", fix))
    if not out.name or out.resolve() == Path.cwd():  # another folder takes the place of this one
        fix = "Give the command in the folder above, with the name of this one for --out."
        raise ValueError(message(where, "a new folder", f"the one you are in, {out}", fix))
    if out.resolve().is_relative_to(folder.resolve()):
        fix = "Choose another --out."
        raise ValueError(message(where, f"a folder outside {folder}", out, fix))


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out``, which becomes it at the end, or nothing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = out.with_name(f".{out.name}{DRAFT}")
    try:
        stage.mkdir()
    except FileExistsError:
        got = f"{stage}, of another kd-lrp init"
        fix = "Wait for it; if it was killed, delete that folder."
        raise FileExistsError(message(f"{WHERE}: out", "no draft", got, fix)) from None
    try:
        yield stage
        sync(stage)
        stage.rename(out)  # takes the place of an empty folder, and of nothing else
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    sync(out.parent)


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _check_configs(
    choices: Choices, models: Models, context: DistributedContext
) -> dict[str, float]:
    """Build every config, take its steps, and time one; seconds of each command."""
    weights = models.weights.get("student")
    student = [
        f"models.model.kwargs.name={models.names['student']}",
        f"models.model.kwargs.weights={'null' if weights is None else weights}",
    ]
    runs: dict[str, tuple[str, list[str]]] = {
        "teacher": ("teacher.yaml", []),
        "CE": ("teacher.yaml", student),
    }
    for file in ("kd.yaml", "student.yaml"):
        if Path(file).is_file():
            runs[file.removesuffix(".yaml")] = (file, [NO_TEACHER])
    seconds: dict[str, float] = {}
    for name, (file, changes) in current_progress().track(runs.items(), "trying", len(runs)):
        pace = timing.measure_pace(_check_config(file, changes, context), context)
        seconds[name] = timing.estimate_run(
            pace, choices.images, choices.batch_size, choices.epochs, choices.workers
        )
    with select.dry_run():
        selection = _check_config("select.yaml", [NO_TEACHER], context)
    write_text(Path("study.yaml"), render_study(models, [NO_TEACHER]))
    read_plan("study.yaml")
    write_text(Path("study.yaml"), render_study(models))
    return {
        "teacher": seconds.pop("teacher"),
        "select": timing.measure_selection(selection),
        "student": seconds["student"],
        "evaluate": timing.EVALUATING,
        "explain": timing.EXPLAINING,
        "study": timing.SEEDS * sum(seconds.values()),
        "report": timing.REPORTING,
    }


def _check_config(file: str, changes: list[str], context: DistributedContext) -> Assembly:
    report = check(resolve_config(file, changes), context)
    if report.problems or report.assembly is None:
        raise ValueError("\n".join(report.problems))
    for warning in report.warnings:
        current_progress().note(f"warning: {warning}")
    return report.assembly
