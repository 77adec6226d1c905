"""What the finished runs of a plan say together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_lrp_plugin.evaluation.audit import FILE as AUDIT
from kd_lrp_plugin.evaluation.explain_records import FILE as EXPLANATIONS
from kd_lrp_plugin.evaluation.explain_records import read_explanations
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.studies.comparison import compare, summarise, value_at
from kd_lrp_plugin.studies.figure import study_figure
from kd_lrp_plugin.studies.markdown import study_markdown
from kd_lrp_plugin.studies.plan import COLUMNS, Plan, StudyRun
from kd_lrp_plugin.studies.primary import judge_primary
from kd_lrp_plugin.studies.status import describe_status, is_finished
from kd_lrp_plugin.utils.files import get_command, put, read_json, to_csv, write_json, write_text


def collect_results(plan: Plan, failed: Mapping[Path, str] | None = None) -> dict[str, Any]:
    """What the finished runs of a plan say.

    Returns:
        ``file``, ``root``, ``question``, ``overrides``, ``only``, ``seeds``, ``axes``,
        ``compare_to`` and ``measures`` of the plan; ``runs``, a row for each, with its state and
        measures, and ``prepared``, the same; ``table`` and ``prepared_table`` of
        :func:`comparison.summarise` for both, and
        ``comparisons`` of :func:`comparison.compare`; ``primary`` of
        :func:`primary.judge_primary`; ``final``, whether all is finished, and
        ``state``, the same as text; ``failed``, the reasons by label.
    """
    failed = failed or {}
    rows, prepared = (
        [_row(run, plan.measures) for run in runs] for runs in (plan.runs, plan.prepared)
    )
    done = sum(row["state"] == "finished" for row in rows)
    final = done == len(rows)
    state = f"All {len(rows)} runs are finished."
    if not final:
        state = f"Not final: {done} of {len(rows)} runs are finished."
    return {
        "file": plan.file.as_posix(),
        "root": plan.root.as_posix(),
        "question": plan.question,
        "final": final,
        "state": state,
        "failed": {r.label: failed[r.folder] for r in plan.trainings() if r.folder in failed},
        "overrides": list(plan.overrides),
        "only": list(plan.only),
        "seeds": list(plan.seeds),
        "axes": {axis: list(values) for axis, values in plan.axes.items()},
        "compare_to": plan.compare_to,
        "measures": list(plan.measures),
        "primary": judge_primary(plan.primary, rows),
        "prepared": prepared,
        "runs": rows,
        "table": summarise(rows, plan.measures),
        "prepared_table": summarise(prepared, plan.measures),
        "comparisons": compare(rows, plan.measures, plan.compare_to),
    }


def _row(run: StudyRun, measures: Sequence[str]) -> dict[str, Any]:
    sources: list[Any] = []
    if is_finished(run):
        folder, fix = RunFolder(run.folder), "Delete it, and rerun kd-lrp study: it is made again."
        evaluation = read_json(folder / "evaluation.json", fix, student=dict)
        maps = read_explanations(run.folder) if (folder / EXPLANATIONS).exists() else {}
        maps = maps if folder.is_current(maps) else {}
        others: dict[str, Any] = {"last": folder.read_metrics()[-1]}
        if (folder / AUDIT).exists():
            audit = read_json(folder / AUDIT, "Give kd-lrp audit again.", relevance=dict)
            others |= {"audit": audit} if folder.is_current(audit) else {}
        sources = [folder.summary(), evaluation["student"], evaluation, average_maps(maps), others]
    values = {}
    for measure in measures:
        candidates = (value_at(source, measure) for source in sources)
        values[measure] = next((found for found in candidates if found is not None), None)
    return {
        "configuration": run.name,
        "point": dict(run.point),
        "seed": run.seed,
        "state": describe_status(run),
        "folder": str(run.folder),
        "measures": values,
    }


def average_maps(explanations: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of maps by model, method, layer and name; those of more images count."""
    found: dict[str, Any] = {}
    images: dict[tuple, int] = {}
    for row in explanations.get("rows", []):
        model, method, layer = row["model"], row["method"], str(row["layer"])
        metrics = found.setdefault(model, {}).setdefault(method, {}).setdefault(layer, {})
        for name, of in row["metrics"].items():
            key = (model, method, layer, name)
            if of["n"] >= images.get(key, 0):
                images[key], metrics[name] = of["n"], of["mean"]
    return found


def write_results(
    plan: Plan, folder: Path, failed: Mapping[Path, str], threads: int
) -> dict[str, Any]:
    """Write study.json, study.csv, table.md and study.png, and return the content of the first.

    Beside what :func:`collect_results` returns it holds the command and the threads of its runs.
    """
    content = {"command": get_command(), "threads": threads, **collect_results(plan, failed)}
    axes = list(plan.axes)
    columns = [COLUMNS[0], *axes, *COLUMNS[1:], *plan.measures]
    flat = [{**row, **row["point"], **row["measures"]} for row in content["runs"]]
    figure = study_figure(content)
    write_text(folder / "study.csv", to_csv(columns, ([f.get(c) for c in columns] for f in flat)))
    write_text(folder / "table.md", study_markdown(content))
    put(folder / "study.png", lambda draft: figure.savefig(draft, format="png"))
    write_json(folder / "study.json", content)
    return content
