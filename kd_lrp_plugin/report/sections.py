"""What the commands leave in folders, as records that a page shows."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kd_lrp_plugin.attribution.summary import records
from kd_lrp_plugin.plots.figures import selection_figure
from kd_lrp_plugin.plots.tables import (
    audit_rows,
    describe_export,
    describe_primary,
    export_rows,
    fixed_measures,
    fixed_rows,
    group_rows,
    primary_rows,
    study_rows,
)
from kd_lrp_plugin.report.images import vector
from kd_lrp_plugin.runs.provenance import find_split_tables
from kd_lrp_plugin.runs.record import RunRecord
from kd_lrp_plugin.selection.ranking import summarise_ranking
from kd_lrp_plugin.utils import files
from kd_lrp_plugin.utils.validation import message

RANKED = 20  # rows of a ranking
_REPAIR = "Rename it, and give the command that made it again."


def quote_command(start: str, *words: object) -> str:
    """A line for a shell: words that are quoted where they must be behind those that are not."""
    return " ".join([start, *(shlex.quote(str(word)) for word in words)])


def get_command(record: Mapping[str, Any] | None) -> str | None:
    """The command that a record says it was made by; None where it says none.

    Example:
        >>> get_command({"command": ["kd-lrp", "distill", "my config.yaml"]})
        "kd-lrp distill 'my config.yaml'"
    """
    words = (record or {}).get("command")
    return shlex.join(map(str, words)) if isinstance(words, list) and words else None


def shorten_path(path: str | Path) -> str:
    """A path relative to where the command is given, if it lies below."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def read_json(file: Path) -> Any:
    """What a file holds; None if there is none."""
    if not file.is_file():
        return None
    return files.read_json(file, _REPAIR)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Intact JSON of another shape than ours is a damaged file, too, and named."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        got = f"other content ({type(error).__name__}: {error})"
        raise files.damaged(file, "what kd-lrp has written", got, _REPAIR) from error


def _read_mapping(file: Path) -> dict[str, Any] | None:
    content = read_json(file)
    if not isinstance(content, dict | None):
        raise files.damaged(file, "a mapping of keys", repr(content)[:60], _REPAIR)
    return content


def file_at(path: Path) -> Path | None:
    """The path, if there is a file."""
    return path if path.is_file() else None


def read_data_check(folder: Path) -> dict[str, Any]:
    """What ``kd-lrp check-data`` has found.

    Raises:
        FileNotFoundError: if the folder holds nothing of it.
    """
    summary = read_json(folder / "summary.json")
    if not isinstance(summary, dict) or not isinstance(summary.get("leaks"), dict):
        fix = "Give the folder that kd-lrp check-data has written."
        got = f"none at {folder}"
        raise FileNotFoundError(message("report --data-check", "a leak check", got, fix))
    with _naming(folder / "summary.json"):
        return _describe_data_check(folder, summary)


def _describe_data_check(folder: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        {
            "split": split,
            "images": found["images"],
            "compared with": ", ".join(found["against"]),
            "with a duplicate there": found["duplicate"],
            "share": f"{100 * found['duplicate'] / max(1, found['images']):.1f} %",
            "the same pixels": found["exact"],
            "near duplicates": found["near"],
        }
        for split, found in summary["leaks"].items()
    ]
    return {
        "folder": shorten_path(folder),
        "root": summary["options"]["root"],
        "summary": summary["summary"],
        "leaks": any(found["duplicate"] for found in summary["leaks"].values()),
        "rows": rows,
        "pairs": [{"pairs": where, **kinds} for where, kinds in summary["pairs"].items()],
        "picture": file_at(folder / "pairs.png"),
        "command": get_command(summary),
    }


def list_split_tables(runs: Sequence[Mapping[str, Any]]) -> dict[str, set[Path]]:
    """The split tables that the data sets of each run's config name."""
    return {run["name"]: find_split_tables(RunRecord(run["folder"]), run["config"]) for run in runs}


def find_data_check(tables: Mapping[str, set[Path]]) -> Path | None:
    """The folder of the leak check that has made the split table of runs, if it is still there."""
    for table in sorted(set().union(*tables.values())):
        summary = read_json(table.with_name("summary.json"))
        if isinstance(summary, dict) and isinstance(summary.get("leaks"), dict):
            return table.parent
    return None


def list_teacher_commands(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The commands of runs whose checkpoint is the teacher of a run, if they are still there."""
    commands: list[str] = []
    for run in runs:
        entry = (run["config"].get("models") or {}).get("teacher_model")
        named = entry.get("src_ckpt") if isinstance(entry, dict) else None
        if named:
            folder = RunRecord(run["folder"]).find_place(str(named)).parent
            sessions = (_read_mapping(folder / "environment.json") or {}).get("sessions") or [{}]
            commands += filter(None, [get_command(sessions[-1])])
    return list(dict.fromkeys(commands))


def list_left_out(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each model that is explained, the methods that it has no maps of, and why."""
    lines: dict[str, list[str]] = {}
    for run in runs:
        content = run["explanations"] or {}
        there = {(row["model"], row["method"]) for row in content.get("rows", [])}
        for role, reasons in (content.get("without") or {}).items():
            for method, why in reasons.items():
                if (role, method) not in there:
                    lines.setdefault(f"{method}: {why}", []).append(f"{role} of {run['name']}")
    return [f"Without {why} ({', '.join(models)})." for why, models in lines.items()]


def list_map_sheets(
    runs: Sequence[Mapping[str, Any]], maps: str | Path | None
) -> list[dict[str, Any]]:
    """Pictures of maps: of all runs side by side, in the folder ``maps``, then of each run.

    Raises:
        FileNotFoundError: if there is none in ``maps``.
    """
    sheets = []
    if maps:
        if not (Path(maps) / "maps.png").is_file():
            fix = "Give the folder that kd-lrp explain RUN... --out has written."
            got = f"none at {maps}"
            raise FileNotFoundError(message("report --maps", "maps of several runs", got, fix))
        file = Path(maps) / "maps.png"
        sheets.append({"name": "the models side by side", "file": file, "side_by_side": True})
    for run in runs:
        file = Path(run["folder"], "explanations.png")
        is_stale = not run["explanations"] and file.with_suffix(".json").is_file()
        if file.is_file() and not is_stale:
            sheets.append({"name": run["name"], "file": file, "side_by_side": False})
    return sheets


def list_explain_commands(
    runs: Sequence[Mapping[str, Any]],
    studies: Sequence[Mapping[str, Any]],
    maps: str | Path | None,
) -> list[str]:
    """The commands that made the figures of runs and studies, and the maps side by side."""
    records_of_runs = [run["explanations"] for run in runs]
    records_of_studies = [
        _read_mapping(Path(row["folder"], "explanations.json"))
        for study in studies
        for row in study["runs"]
    ]
    of_maps = _read_mapping(Path(maps, "maps.json")) if maps else None
    found = map(get_command, [*records_of_runs, *records_of_studies, of_maps])
    return list(dict.fromkeys(line for line in found if line))


def list_explanations(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The figures of ``explanations.json`` of all runs as one table; rows that say the same, as of
    a shared teacher, once.
    """
    rows: dict[tuple, dict[str, Any]] = {}
    for run in runs:
        alone = "teacher_model" not in (run["config"].get("models") or {})
        for row in (run["explanations"] or {}).get("rows", []):
            key = (*(row[name] for name in ("weights", "method", "layer", "samples")),)
            key += (repr(row["metrics"]),)  # of other images they differ
            model = "alone" if alone else row["model"]
            rows.setdefault(key, {"run": run["name"], **row, "model": model})
    return records(list(rows.values()))


def list_audits(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What ``kd-lrp audit`` has found of runs, on their test set and on other images."""
    audits = []
    files = [
        (run, file) for run in runs for file in sorted(Path(run["folder"]).glob("audit*.json"))
    ]
    for run, file in files:
        found = _read_mapping(file) or {}
        if not RunRecord(run["folder"]).is_current(found):
            continue
        images = file.stem.removeprefix("audit").removeprefix("-")
        with _naming(file):
            audits.append(
                {
                    "name": f"{run['name']} on {images}" if images else run["name"],
                    "images": found["images"],
                    "rows": audit_rows(found),
                    "removed": {role: of for role, of in found["object_removed"].items() if of},
                    "picture": file_at(file.with_suffix(".png")),
                    "command": get_command(found),
                }
            )
    return audits


def list_exports(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What ``kd-lrp export`` has written into run folders."""
    exports = []
    for run in runs:
        for file in sorted(Path(run["folder"]).glob("*/export.json")):
            found = _read_mapping(file) or {}
            if not RunRecord(run["folder"]).is_current(found):
                continue
            with _naming(file):
                exports.append(
                    {
                        "name": f"{run['name']} as {found['format']}",
                        "folder": shorten_path(file.parent),
                        "rows": export_rows(found),
                        "words": describe_export(found),
                        "output": found["output"],
                        "command": get_command(found),
                    }
                )
    return exports


def list_groups(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The accuracy by group of all runs whose test set has groups."""
    return [
        {"run": run["name"], **row}
        for run in runs
        if run["evaluation"]
        for row in group_rows(run["evaluation"])
    ]


def read_study(path: Path, name: str) -> dict[str, Any]:
    """The content of ``study.json``, and its tables by measure."""
    content = read_json(path / "study.json")
    with _naming(path / "study.json"):
        fixed = fixed_measures(content)
        tables = {m: study_rows(content, m) for m in content["measures"] if m not in fixed}
        return {
            **content,
            "name": name,
            "folder": shorten_path(path),
            "tables": {m: [row for row in rows if row["n"]] for m, rows in tables.items()},
            "fixed_rows": fixed_rows(content),
            "registered": describe_primary(content) if content.get("primary") else None,
            "primary_rows": primary_rows(content) if content.get("primary") else [],
            "most": max((record["n"] for record in content["table"]), default=0),
            "picture": file_at(path / "study.png"),
            "command": get_command(content),
        }


def read_selection(
    runs: Sequence[Mapping[str, Any]], given: str | Path | None
) -> dict[str, Any] | None:
    """A ranking of untrained students: the given one, or the first that a run's config names.

    Raises:
        ValueError: if ``given`` is no record of a choice.
    """
    found = [Path(given)] if given else []
    for run in runs if not given else ():
        entry = (run["config"].get("models") or {}).get("student_model") or {}
        record = (entry.get("kwargs") or {}).get("record")
        if entry.get("key") == "diswot_student" and record:
            found.append(RunRecord(run["folder"]).find_place(str(record)))
    for file in found:
        record = read_json(file)
        if isinstance(record, dict) and record.get("ranking"):
            with _naming(file):
                return _describe_selection(file, record)
    if given:
        fix = "Give the JSON file that kd-lrp select says it has recorded the choice in."
        raise ValueError(message("report --selection", "the record of a choice", given, fix))
    return None


def _describe_selection(file: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    spec, ranking = record["question"], record["ranking"]
    hidden = ("problem", "entry", "latency", "counters_differ_by")
    return {
        "file": shorten_path(file),
        "chosen": record["candidate"],
        "score": spec["score"],
        "seeds": spec["seeds"],
        "columns": [key for key in ranking[0] if key not in hidden],
        "ranking": ranking[:RANKED],
        "more": len(ranking) - RANKED if len(ranking) > RANKED else 0,
        "words": summarise_ranking(ranking),
        "figure": vector(selection_figure(ranking, f"{spec['score']}: lower is better")),
        "command": get_command(record),
    }
