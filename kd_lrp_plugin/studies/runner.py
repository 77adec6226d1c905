"""Studies: the runs of a plan in processes of their own, and what they say together.

Every run is one of the trainer's, in a process that ends when this one does, however that ends, on
this machine or, by :mod:`kd_lrp_plugin.utils.cluster`, on others that share the run folder. A
run that another process is running, such as another study, is left to it and waited for. What
is finished is never run again; :mod:`kd_lrp_plugin.studies.parser` says when two runs are the same.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kd_lrp_plugin.config.build import Assembly, BuiltModel
from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.config.safety import unsafe_tags
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.runs.provenance import list_files
from kd_lrp_plugin.selection.select import dry_run
from kd_lrp_plugin.studies.executors import StudyExecutor, open_processes
from kd_lrp_plugin.studies.parser import read_plan
from kd_lrp_plugin.studies.plan import Plan, StudyOptions
from kd_lrp_plugin.studies.results import write_results
from kd_lrp_plugin.studies.status import (
    check_output_folder,
    count_epochs_left,
    get_threads,
    is_finished,
    is_trained,
)
from kd_lrp_plugin.training.check.dry_run import check
from kd_lrp_plugin.training.check.sections import identify_model
from kd_lrp_plugin.training.loggers import check_installed
from kd_lrp_plugin.utils.distributed import init_distributed
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message
from kd_lrp_plugin.utils.workers import ProcessPool


def run_study(file: str | Path, options: StudyOptions | None = None) -> dict[str, Any]:
    """Train and evaluate every run of a study that is not finished, and compare.

    Args:
        file: see :mod:`kd_lrp_plugin.studies.parser`.
        options: how; results are written again after every run.

    Returns:
        The content of ``study.json``; see :func:`kd_lrp_plugin.studies.results.collect_results`.

    Raises:
        ConnectionError: if no scheduler answers at the address of the options.
        FileExistsError: if the folder of the results holds those of another study, or of seeds
            beyond these, or a run was made with other images or weights than lie there now.
        FileNotFoundError: if there is no such file, or none that a config names.
        ValueError: for a study or a config that cannot be run, or a damaged file.
        ModuleNotFoundError: if the logger is not installed.
    """
    options = options or StudyOptions()
    check_installed(options.log)
    plan = read_plan(file, options.overrides, options.seeds, options.root, options.only)
    folder = options.get_folder(file)
    check_output_folder(folder, plan)
    _refuse_other_files(plan)
    with open_processes(options) as pool:
        # A machine of the cluster may have the GPU that this one lacks.
        _refuse_problems(plan, None if options.scheduler else options.device, options.safe)
        return _work(plan, folder, options, pool)


def _work(plan: Plan, folder: Path, options: StudyOptions, pool: ProcessPool) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[Path, str] = {}
    # With another --jobs, all runs have the threads that the study began with.
    threads = get_threads(folder) or pool.threads

    def save() -> None:
        try:
            check_output_folder(folder, plan)
            write_results(plan, folder, failed, threads)
        except FileExistsError as error:  # another process has begun to write there since
            current_progress().note(f"results are not written: {error}")

    save()
    rounds = {seed: index for index, seed in enumerate(plan.seeds)}
    # Seed by seed, so that a study which is still running compares like with like.
    in_turn = sorted(plan.trainings(), key=lambda run: rounds.get(run.seed, 0))
    todo = [run for run in in_turn if not is_finished(run)]
    if not todo:
        current_progress().note(f"all {len(plan.trainings())} runs are finished already")
    executor = StudyExecutor(todo, options, threads, failed, save, pool)
    epochs = sum(map(count_epochs_left, todo))
    for _ in current_progress().track(executor.work(), "epochs", epochs):
        pass
    check_output_folder(folder, plan)
    return write_results(plan, folder, failed, threads)


def _refuse_other_files(plan: Plan) -> None:
    """Raise FileExistsError where a run that has begun saw other images or weights."""
    for run in plan.trainings():
        if not run.folder.exists() or not all(map(is_trained, run.needs)):
            continue
        files = list_files(resolve_config(run.config, run.overrides))
        if changed := RunFolder(run.folder).changed({"files": files}):
            fix = "Put them back, choose another --runs, or delete the run."
            where, got = f"{run.label} ({run.folder})", "; ".join(changed)
            raise FileExistsError(message(where, "the files that the run began with", got, fix))


def _refuse_problems(plan: Plan, device: str | None, safe: bool) -> None:
    """Check every config that has not begun; for a model still to prepare an untrained one stands.

    So a teacher that does not fit is found before it is trained; no student is chosen by it.
    """
    prepare = {run.folder for run in plan.prepared if not is_trained(run.folder)}
    new = [run for run in plan.prepared if run.folder in prepare]
    seen = {run.folder.parent for run in new}  # one seed of each is enough
    seen |= {run.folder.parent for run in plan.trainings() if (run.folder / "last.pt").exists()}
    for run in plan.trainings():
        if run.folder.parent not in seen:
            seen.add(run.folder.parent)
            new.append(run)
    problems: list[str] = []
    built: dict[str, BuiltModel] = {}  # configurations share models: none is built twice
    with (
        tempfile.TemporaryDirectory() as scratch,
        init_distributed(device) as context,
        _quiet(),
        dry_run(),
    ):
        untrained = {folder: Path(scratch, folder.parent.name, folder.name) for folder in prepare}
        for run in current_progress().track(new, "checking", len(new)):
            changes, missing = run.overrides, [need for need in run.needs if need in prepare]
            for need in missing:
                changes = tuple(c.replace(str(need), str(untrained[need])) for c in changes)
            config = resolve_config(run.config, changes)
            found = unsafe_tags(config) if safe else []
            if not found and all(untrained[need].exists() for need in missing):
                report = check(config, context, built)
                found = report.problems
                if run.folder in prepare and report.assembly and not found:
                    role, model = _get_student(report.assembly)
                    file = untrained[run.folder] / "best.pt"
                    file.parent.mkdir(parents=True)
                    torch.save({"model": model.module.state_dict()}, file)
                    built[identify_model(config, role, file)] = model  # which others begin with
            problems += [f"{plan.file}: {run.cell}: {problem}" for problem in found]
    if problems:
        raise ValueError("\n".join(problems))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that every run will have in its log."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _get_student(assembly: Assembly) -> tuple[str, BuiltModel]:
    role = "student_model" if "student_model" in assembly.models else "model"
    return role, assembly.models[role]
