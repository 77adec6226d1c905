"""What a report page says: records from the folders of runs and studies, side by side."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_lrp_plugin.attribution.summary import METRICS
from kd_lrp_plugin.config.document import parse_document
from kd_lrp_plugin.evaluation.explain_records import read_explanations
from kd_lrp_plugin.plots.figures import (
    curves_figure,
    list_quantities,
    reliability_figure,
    roc_figure,
)
from kd_lrp_plugin.report.images import vector
from kd_lrp_plugin.report.published import list_published
from kd_lrp_plugin.report.sections import (
    find_data_check,
    get_command,
    list_audits,
    list_explain_commands,
    list_explanations,
    list_exports,
    list_groups,
    list_left_out,
    list_map_sheets,
    list_split_tables,
    list_teacher_commands,
    quote_command,
    read_data_check,
    read_selection,
    read_study,
    shorten_path,
)
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.runs.predictions import read_predictions
from kd_lrp_plugin.utils.files import hash_contents, name_folders, read_csv
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message

RUN_FILES = ("config.yaml", "environment.json", "summary.json", "predictions.csv")
PHANTOM = "kd_lrp_plugin.torchdistill.phantom"
DETAILED = 8  # configurations of a study that are shown in detail


def gather(
    paths: Sequence[Path],
    data_check: str | Path | None,
    selection: str | Path | None,
    maps: str | Path | None,
) -> dict[str, Any]:
    """Everything that a page shows, from plain files; see :func:`page.write`."""
    of_runs, of_studies = (
        [path for path in paths if classify_folder(path) == kind] for kind in ("run", "study")
    )
    studies = list(map(read_study, of_studies, _name_folders(of_studies)))
    of_cells = [] if of_runs else _list_first_seeds(studies)
    named = [*zip(of_runs, _name_folders(of_runs), strict=True), *of_cells[:DETAILED]]
    tracked = current_progress().track(named, "reading", len(named))
    runs = [_read_run(path, name) for path, name in tracked]
    tables = list_split_tables(runs)
    found = data_check or find_data_check(tables)
    leaks = read_data_check(Path(found)) if found else None
    if leaks:
        made = Path(found or "", "clean_split.csv").resolve()
        leaks["cleaned"] = bool(runs) and all(tables.get(run["name"]) == {made} for run in runs)
    sheets = list_map_sheets(runs, maps)
    audits, exports = list_audits(runs), list_exports(runs)
    models, data = _list_models(runs), _list_data(runs)
    shapes = dict.fromkeys(tuple(run["summary"]["image_shape"][1:]) for run in runs)
    chosen = read_selection(runs, selection)
    sets = sorted({model["set"] for model in models} - {None})
    names = {row["name"].partition("/")[0] for row in data} | {study["name"] for study in studies}
    return {
        "title": "Distillation report: " + ", ".join(sorted(names)),
        "runs": runs,
        "studies": studies,
        "detailed": bool(of_cells),
        "undetailed": max(0, len(of_cells) - DETAILED),
        "models": models,
        "compared": [model for model in models if model["both"]],
        "several_sets": sets,
        "sizes": [" x ".join(map(str, shape[::-1])) for shape in shapes],
        "data": data,
        "drawn": bool(data) and all(row["key"] == PHANTOM for row in data),
        "leaks": leaks,
        "selection": chosen,
        "sheets": sheets,
        "groups": list_groups(runs),
        "audits": audits,
        "exports": exports,
        "explained": list_explanations(runs),
        "without": list_left_out(runs),
        "published": list_published(runs, models, tables),
        "metrics_of_maps": METRICS,
        "unevaluated": [run["folder"] for run in runs if run["evaluation"] is None],
        "unexplained": [run["name"] for run in runs if not run["explanations"]],
        "explain": quote_command("kd-lrp explain", *(run["folder"] for run in runs)),
        "steps": _list_steps(
            runs,
            studies,
            leaks,
            chosen,
            [
                *list_explain_commands(runs, studies, maps),
                *(of["command"] for of in audits if of["command"]),
            ],
            [of["command"] for of in exports],
        ),
    }


# --- folders ------------------------------------------------------------------------------------


def classify_folder(folder: Path) -> str:
    """What a folder holds: "run" or "study".

    Raises:
        FileNotFoundError: if it is neither, or a run that is not finished.
    """
    if (folder / "study.json").is_file():
        return "study"
    if all((folder / name).is_file() for name in RUN_FILES):
        return "run"
    got, fix = str(folder), "Give folders that kd-lrp distill or kd-lrp study has written."
    if not folder.is_dir():
        got = f"nothing at {folder}"
    elif (folder / "config.yaml").is_file():
        got, fix = (
            f"{folder}, which is not finished",
            "The same kd-lrp distill command finishes it.",
        )
    elif (folder / "pairs.csv").is_file():
        fix = "Give what kd-lrp check-data has written as --data-check."
    raise FileNotFoundError(message("report", "a finished run or a study", got, fix))


def _name_folders(folders: Sequence[Path]) -> list[str]:
    """Names for the page; of one alone the last name, for a page need not show where it lay."""
    if len(folders) != 1:
        return name_folders(folders)
    path = folders[0].resolve()
    return [path.parent.name if path.name.isdigit() else path.name]  # without the seed


def _list_first_seeds(studies: Sequence[Mapping[str, Any]]) -> list[tuple[Path, str]]:
    """A finished run of each cell of studies, for what their tables do not show.

    What is prepared comes first, then each configuration at its first point of the grid, then at
    its second, and so on; a run that several studies share counts once.
    """
    found: dict[Path, tuple[int, str]] = {}
    for study in studies:
        cells_of: dict[str, dict[str, None]] = {}  # by configuration
        rows = [(True, row) for row in study["prepared"]] + [(False, row) for row in study["runs"]]
        for prepared, row in rows:
            point = [f"{axis} {value}" for axis, value in row["point"].items()]
            words = ", ".join([row["configuration"], *point])
            cells = cells_of.setdefault("" if prepared else row["configuration"], {})
            folder = Path(row["folder"])
            if words in cells or not all((folder / name).is_file() for name in RUN_FILES):
                continue
            cells[words] = None
            name = f"{words}, seed {row['seed']}"
            if len(studies) > 1:
                name = f"{study['name']}: {name}"
            found.setdefault(folder.resolve(), (-1 if prepared else len(cells), name))
    in_order = sorted(found.items(), key=lambda item: item[1][0])
    return [(folder, name) for folder, (_, name) in in_order]


# --- runs ---------------------------------------------------------------------------------------


def _read_run(path: Path, name: str) -> dict[str, Any]:
    folder = RunFolder(path)
    summary, about = folder.summary(), folder.read_environment()
    text = (path / "config.yaml").read_text(encoding="utf-8")
    sessions = about.get("sessions") or [{}]
    session = sessions[-1]
    evaluation = folder.read_evaluation()
    folder.check_output("predictions.csv")
    began = about.get("files", {}).items()
    return {
        "name": name,
        "folder": shorten_path(path),
        "outputs": list(about.get("outputs", {}).values()),
        "teacher_files": [
            digest for key, digest in began if key.startswith("models.teacher_model.")
        ],
        "summary": summary,
        "evaluation": evaluation,
        "predicted": _draw_predictions(folder) if evaluation else None,
        "session": session,
        "sessions": len(sessions),
        "processes": about.get("processes", 1),
        "question": _read_question(session.get("config")),
        "config": parse_document(path / "config.yaml", text).values,
        "text": text,
        "curves": _draw_curves(folder.read_metrics()),
        "test_set": _hash_test_set(path / "predictions.csv"),
        "config_file": shorten_path(session["config"]) if session.get("config") else None,
        "explanations": _read_maps(folder),
        "command": get_command(session),
    }


def _draw_predictions(folder: RunFolder) -> dict[str, Any]:
    """Reliability and, where the test set has images of two classes, ROC of a run's models."""
    of = read_predictions(folder)
    curves = {k: (p.max(1), p.argmax(1) == of.labels) for k, p in of.probabilities.items()}
    several = len(set(of.labels.tolist())) > 1
    roc = vector(roc_figure(of.probabilities, of.labels, of.outputs)) if several else None
    return {"n": len(of.labels), "reliability": vector(reliability_figure(curves)), "roc": roc}


def _read_maps(folder: RunFolder) -> dict[str, Any] | None:
    found = read_explanations(folder.path) if (folder / "explanations.json").is_file() else None
    return found if found and folder.is_current(found) else None


def _read_question(config: str | None) -> str | None:
    """What a config says of itself in its first lines, if the file is still where it was."""
    file = Path(config or "")
    try:
        if not file.is_file():  # a folder from elsewhere may name a device that never ends
            return None
        with file.open(encoding="utf-8") as lines:
            head = lines.read(2000)
    except (OSError, ValueError):
        return None
    found = re.search(r"^# Question: (.+)$", head, re.MULTILINE)
    return found.group(1) if found else None


def _draw_curves(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A figure per quantity, so that a phone shows them one below the other."""
    panels = []
    for name in list_quantities(records):
        kept = ("epoch", "stage", f"train_{name}", f"val_{name}")
        part = [{key: record.get(key) for key in kept} for record in records]
        last = {key: value for key, value in part[-1].items() if value is not None}
        ends = [
            f"{words} ends at {last[key]:.3g}"
            for words, key in (("training", f"train_{name}"), ("validation", f"val_{name}"))
            if key in last
        ]
        panels.append(
            {"name": name, "figure": vector(curves_figure(part)), "ends": ", ".join(ends)}
        )
    return panels


def _hash_test_set(predictions: Path) -> str:
    """A sign of the test images and their labels."""
    rows = read_csv(predictions, "The same kd-lrp distill command repairs it.")
    return hash_contents([row[:2] for row in rows])[:8]


# --- models side by side --------------------------------------------------------------------------


def _list_models(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per model, teachers first; a teacher that several runs share, once."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        found = run["evaluation"] or {}
        alone = "teacher_model" not in (run["config"].get("models") or {})
        row = _read_model(run["name"], "trained alone" if alone else "student", run, found)
        rows.append(row | {"both": found.get("student_and_teacher")})
    teachers: dict[tuple, dict[str, Any]] = {}
    for run, student in zip(runs, list(rows), strict=True):
        if "teacher" not in (run["evaluation"] or {}):
            continue
        row = _read_model("teacher", "teacher", run, run["evaluation"])
        others = (other for other in rows if other["role"] != "student" and _made(other, row))
        own = next(others, None)
        key = (own["name"],) if own else (row["same"], tuple(row["files"]))
        student["teacher"] = teacher = teachers.setdefault(key, own or row)
        teacher["role"] = "teacher"
    if len(teachers) > 1:
        for student in rows:
            if (teacher := student["teacher"]) and teacher["name"] == "teacher":
                teacher["name"] = f"teacher of {student['name']}"
    rows = [*teachers.values(), *(row for row in rows if row["role"] != "teacher")]
    only = next(iter(teachers.values())) if len(teachers) == 1 else None
    lows = [row["interval"][0] for row in rows if row["interval"]]
    highs = [row["interval"][1] for row in rows if row["interval"]]
    sets = list(dict.fromkeys(row["test_set"] for row in rows))
    for row in rows:
        other = row["teacher"]
        if other is None and only and row is not only and row["test_set"] == only["test_set"]:
            other = only  # a model that was trained alone, beside the one teacher of the page
        for name in ("parameters", "macs"):
            row[f"fewer_{name}"] = reduction(other[name], row[name]) if other else None
        row["scale"] = (max(0.0, min(lows) - 0.02), min(1.0, max(highs) + 0.02)) if lows else None
        row["set"] = chr(ord("A") + sets.index(row["test_set"]) % 26) if len(sets) > 1 else None
    return rows


def _made(alone: Mapping[str, Any], teacher: Mapping[str, Any]) -> bool:
    """Whether a teacher is the model of a run: it does the same and, where that is known, has its
    weights from a file of the run.
    """
    known = alone["files"] and teacher["files"]
    return alone["same"] == teacher["same"] and (
        not known or not {*alone["files"]}.isdisjoint(teacher["files"])
    )


def _read_model(
    name: str, role: str, run: Mapping[str, Any], found: Mapping[str, Any]
) -> dict[str, Any]:
    metrics = found.get("teacher" if role == "teacher" else "student") or {}
    summary, cost = run["summary"], metrics.get("cost") or {}
    accuracy = metrics.get("accuracy", summary["test_accuracy"])
    matrix = metrics.get("confusion_matrix")
    parameters = cost.get("parameters") or (None if role == "teacher" else summary["parameters"])
    return {
        "name": name,
        "role": role,
        "test_set": run["test_set"],
        "image_shape": summary["image_shape"],
        "metrics": metrics,
        "cost": cost,
        "n": metrics.get("n"),
        "accuracy": accuracy,
        "interval": metrics.get("accuracy_interval"),
        "parameters": parameters,
        "macs": cost.get("macs"),
        "matrix": matrix,
        "teacher": None,
        "both": None,
        "same": (run["test_set"], parameters, json.dumps(matrix)),
        "files": run["teacher_files" if role == "teacher" else "outputs"],
    }


def reduction(before: float | None, after: float | None) -> str | None:
    """How much less, as a factor and in per cent; None where either is not known.

    Example:
        >>> reduction(4_924_540, 373_076)
        '13.2 times fewer (-92.4 %)'
        >>> reduction(100, 250)
        '2.50 times as many (+150.0 %)'
    """
    if not before or not after:
        return None
    if before == after:
        return "the same"
    share = f"{100 * (after / before - 1):+.1f} %"
    if after < before:
        return f"{before / after:.3g} times fewer ({share})"
    return f"{after / before:.2f} times as many ({share})"


def _list_data(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The data sets that the configs name, each with the runs that have it so."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        for name, entry in (run["config"].get("datasets") or {}).items():
            entry = entry if isinstance(entry, dict) else {}
            kwargs = (entry.get("init") or {}).get("kwargs") or {}
            words = ", ".join(f"{k}={v}" for k, v in kwargs.items() if v is not None)
            row = {"name": name, "key": str(entry.get("key", "")), "words": words}
            found.setdefault(json.dumps(row), {**row, "runs": []})["runs"].append(run["name"])
    return list(found.values())


def _list_steps(
    runs: Sequence[Mapping[str, Any]],
    studies: Sequence[Mapping[str, Any]],
    leaks: Mapping[str, Any] | None,
    selection: Mapping[str, Any] | None,
    explain: Sequence[str],
    export: Sequence[str | None],
) -> list[dict[str, Any]]:
    """The commands that make all of this again, in an order that works."""
    alone: list[str | None] = []
    taught: list[str | None] = []
    for run in runs:
        models = run["config"].get("models") or {}
        (taught if "teacher_model" in models else alone).append(run["command"])
    evaluations = [
        get_command(run["evaluation"]) or quote_command("kd-lrp evaluate", run["folder"])
        for run in runs
        if run["evaluation"]
    ]
    steps = [
        ("Look for leaks", [leaks["command"]] if leaks else []),
        ("Train teachers, and students without one", [*list_teacher_commands(runs), *alone]),
        ("Rank untrained students", [selection["command"]] if selection else []),
        ("Train and test students", taught),
        ("Evaluate", evaluations),
        ("Study", [study["command"] for study in studies]),
        ("Explain", explain),
        ("Studies, with the figures of maps", [s["command"] for s in studies] if explain else []),
        ("Export", export),
    ]
    known = [(name, list(dict.fromkeys(filter(None, commands)))) for name, commands in steps]
    return [{"name": name, "commands": commands} for name, commands in known if commands]
