"""Studies: the runs of a plan in processes of their own, and what they say together.

Every run is one of the driver's, in a process that ends when this one does, however that ends. A
run at which another process is already, such as another study, is left to it and waited for. What
is finished is never run again; :mod:`kd_lrp_plugin.studies.parser` says when two runs are the same.
"""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kd_lrp_plugin.config.build import build_model_entry, construct
from kd_lrp_plugin.config.document import Document, resolve_config
from kd_lrp_plugin.config.safety import unsafe_tags
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.runs.provenance import list_files
from kd_lrp_plugin.selection.select import dry_run
from kd_lrp_plugin.studies.executors import StudyExecutor
from kd_lrp_plugin.studies.parser import read_plan
from kd_lrp_plugin.studies.plan import Plan
from kd_lrp_plugin.studies.results import write_results
from kd_lrp_plugin.studies.status import check_output_folder, count_epochs_left, is_finished
from kd_lrp_plugin.training.check.dry_run import check
from kd_lrp_plugin.utils.distributed import init_distributed
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message


def run_study(
    file: str | Path,
    overrides: Sequence[str] = (),
    seeds: int | Sequence[int] | None = None,
    out: str | Path | None = None,
    root: str | Path = "runs",
    jobs: int = 1,
    device: str | None = None,
    safe: bool = False,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Train and evaluate every run of a study that is not finished, and compare.

    Args:
        file: see :mod:`kd_lrp_plugin.studies.parser`.
        overrides: further ones for every run.
        seeds: how many, or which; those of the file if None.
        out: folder for the results, :func:`default_output_folder` if None; they are written anew
            after every run.
        root: folder of the runs, which other studies may share.
        jobs: runs at the same time.
        device: see :func:`kd_lrp_plugin.utils.distributed.init_distributed`.
        safe: refuse tags beyond :data:`kd_lrp_plugin.config.safety.HARMLESS`.
        only: a part of it, see :func:`kd_lrp_plugin.studies.parser.read_plan`.

    Returns:
        The content of ``study.json``; see :func:`kd_lrp_plugin.studies.results.collect_results`.

    Raises:
        FileExistsError: if ``out`` holds the results of another study, or of seeds beyond these,
            or a run was made with other images or weights than lie there now.
        FileNotFoundError: if there is no such file, or none that a config names.
        ValueError: for a study or a config that cannot be run.
    """
    plan = read_plan(file, overrides, seeds, root, only)
    folder = Path(out) if out is not None else default_output_folder(file)
    check_output_folder(folder, plan)
    _refuse_other_files(plan)
    _refuse_problems(plan, device, safe)
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[Path, str] = {}

    def keep() -> None:
        try:
            check_output_folder(folder, plan)
            write_results(plan, folder, failed)
        except FileExistsError as error:  # another process has begun to write there since
            current_progress().note(f"results are not written: {error}")

    keep()
    rounds = {seed: place for place, seed in enumerate(plan.seeds)}
    # Seed by seed, so that a study which is still at work compares like with like.
    in_turn = sorted(plan.trainings(), key=lambda run: rounds.get(run.seed, 0))
    todo = [run for run in in_turn if not is_finished(run)]
    if not todo:
        current_progress().note(f"all {len(plan.trainings())} runs are finished already")
    work = StudyExecutor(todo, jobs, device, safe, failed, keep)
    for _ in current_progress().track(work.off(), "epochs", sum(map(count_epochs_left, todo))):
        pass
    check_output_folder(folder, plan)
    return write_results(plan, folder, failed)


def default_output_folder(file: str | Path) -> Path:
    """``runs/studies/<study>``."""
    return Path("runs", "studies", Path(file).stem)


def _refuse_other_files(plan: Plan) -> None:
    """Raise FileExistsError where a run that has begun saw other images or weights."""
    for run in plan.trainings():
        if not run.folder.exists():
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
    prepare = {run.folder for run in plan.prepared if not RunFolder(run.folder).finished}
    new = [run for run in plan.prepared if run.folder in prepare]
    seen = {run.folder.parent for run in new}  # one seed of each is enough
    seen |= {run.folder.parent for run in plan.trainings() if (run.folder / "last.pt").exists()}
    for run in plan.trainings():
        if run.folder.parent not in seen:
            seen.add(run.folder.parent)
            new.append(run)
    problems: list[str] = []
    with (
        tempfile.TemporaryDirectory() as place,
        init_distributed(device) as context,
        _quiet(),
        dry_run(),
    ):
        untrained = {folder: Path(place, folder.parent.name, folder.name) for folder in prepare}
        for run in current_progress().track(new, "checking", len(new)):
            changes, missing = run.overrides, [need for need in run.needs if need in prepare]
            for need in missing:
                changes = tuple(c.replace(str(need), str(untrained[need])) for c in changes)
            config = resolve_config(run.config, changes)
            found = unsafe_tags(config) if safe else []
            if not found and all(untrained[need].exists() for need in missing):
                found = check(config, context).problems
                if run.folder in prepare and not found:
                    _save_untrained(config, untrained[run.folder])
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


def _save_untrained(config: Document, folder: Path) -> None:
    models = construct(config.only("dependencies", "datasets", "models"))["models"]
    model = build_model_entry(models.get("student_model") or models["model"])
    folder.mkdir(parents=True)
    torch.save({"model": model.state_dict()}, folder / "best.pt")
