"""How far the runs of a plan are, and whose results a folder holds."""

from pathlib import Path
from typing import Any

from kd_lrp_plugin.evaluation.explain_inputs import REPAIR_STUDY, read_study
from kd_lrp_plugin.runs.folder import LOCK, RunFolder
from kd_lrp_plugin.studies.plan import Plan, StudyRun
from kd_lrp_plugin.studies.primary import KEYS
from kd_lrp_plugin.utils.files import check_keys, is_locked
from kd_lrp_plugin.utils.validation import message


def count_epochs_done(run: StudyRun) -> int:
    """Finished epochs of a run."""
    try:
        return (run.folder / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def is_finished(run: StudyRun) -> bool:
    """Whether a run is trained, tested and evaluated, and all that it has written is intact."""
    return is_trained(run.folder) and RunFolder(run.folder).evaluated


def is_trained(folder: Path) -> bool:
    """Whether a run is trained and tested, and all that it has written is intact."""
    return RunFolder(folder).finished and not RunFolder(folder).find_damage()


def get_log(run: StudyRun) -> Path:
    """The output of the last process of a run; beside its folder."""
    return run.folder.with_name(f"{run.folder.name}.log")


def list_status(plan: Plan) -> list[dict[str, Any]]:
    """A row for each run: what is done already, and what would be."""
    return [
        {"run": run.label, "state": describe_status(run), "folder": str(run.folder)}
        for run in plan.prepared + plan.runs
    ]


def describe_status(run: StudyRun) -> str:
    """How far a run is, as text."""
    if is_finished(run):
        return "finished"
    done = count_epochs_done(run)
    progress = f"epoch {done} of {run.epochs}" if done else "not begun"
    return f"{progress}, running" if is_running(run.folder) else progress


def is_running(folder: Path) -> bool:
    """Whether another process holds a run folder."""
    return is_locked(folder / LOCK)


def count_epochs_left(run: StudyRun) -> int:
    """Epochs that are still to train."""
    return 0 if is_finished(run) else max(0, run.epochs - count_epochs_done(run))


def get_threads(folder: Path) -> int | None:
    """How many threads the runs of the results in a folder have; None where there are none."""
    file = folder / "study.json"
    return read_study(file).get("threads") if file.exists() else None


def check_output_folder(folder: Path, plan: Plan) -> None:
    """Raise FileExistsError where results would overwrite those of another study, or of more seeds.

    Those of fewer seeds, or of an older version of the file, can be made again from the runs.
    """
    file = folder / "study.json"
    if not file.exists():
        return
    before = read_study(file)
    kinds = {"file": str, "question": str, "overrides": list, "only": list, "seeds": list}
    check_keys(file, before, REPAIR_STUDY, **kinds)
    differs = []
    if Path(before["file"]).name != plan.file.name or before["question"] != plan.question:
        differs.append(f"the study {before['file']} ({before['question']})")
    if before["overrides"] != list(plan.overrides):
        differs.append(f"--set {before['overrides']}")
    if plan.only and before["only"] != list(plan.only):
        differs.append(f"--only {before['only']}" if before["only"] else "all of the study")
    if more := sorted(set(before["seeds"]) - set(plan.seeds)):
        differs.append(f"further seeds {more}")
    registered = before.get("primary") or {}
    now = plan.primary.record() if plan.primary else {}
    if registered and now != {key: registered.get(key) for key in now or registered}:
        differs.append(f"another primary comparison, {_describe_primary(registered)}")
    if differs:
        fix = "Choose another --out, or the options of then."
        got = f"{folder}, which holds {' and '.join(differs)}"
        raise FileExistsError(message("study", "a folder for these results", got, fix))


def _describe_primary(registered: dict[str, Any]) -> str:
    return ", ".join(f"{key} {registered.get(key)}" for key in (*KEYS, "seeds"))
