"""What the commands leave in folders, as records that a page shows."""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_lrp_plugin.attribution.methods import INPUT
from kd_lrp_plugin.attribution.summary import records
from kd_lrp_plugin.plots.figures import selection_figure
from kd_lrp_plugin.report.images import vector
from kd_lrp_plugin.selection.ranking import summarise_ranking
from kd_lrp_plugin.utils import files
from kd_lrp_plugin.utils.validation import message

RANKED = 20  # rows of a ranking


def command(start: str, *words: object) -> str:
    """A line for a shell."""
    return " ".join([start, *(shlex.quote(str(word)) for word in words)])


def short(path: str | Path) -> str:
    """A path relative to where the command is given, if it lies below."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def read_json(file: Path) -> Any:
    """What a file holds; None if there is none."""
    if not file.is_file():
        return None
    return files.read_json(file, "Rename it, and give the command that made it again.")


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
    options = summary["options"]
    names = ("group_by", "manifest", "test_share", "bits")
    flags = {f"--{name.replace('_', '-')}": name for name in names}
    words = [w for o, key in flags.items() if (v := options.get(key)) for w in (o, v)]
    return {
        "folder": short(folder),
        "root": options["root"],
        "summary": summary["summary"],
        "leaks": any(found["duplicate"] for found in summary["leaks"].values()),
        "rows": rows,
        "pairs": [{"pairs": place, **kinds} for place, kinds in summary["pairs"].items()],
        "picture": file_at(folder / "pairs.png"),
        "command": command("kd-lrp check-data", options["root"], *words, "--out", short(folder)),
    }


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
        sheets.append({"name": "the models side by side", "file": file, "first": True})
    of_runs = [(run["name"], Path(run["folder"], "explanations.png")) for run in runs]
    for name, file in of_runs:
        if file.is_file():
            sheets.append({"name": name, "file": file, "first": False})
    return sheets


def list_explain_commands(
    runs: Sequence[Mapping[str, Any]],
    studies: Sequence[Mapping[str, Any]],
    maps: str | Path | None,
) -> list[str]:
    """The commands that made the figures of runs and studies, and the maps side by side."""
    folders = dict.fromkeys(run["folder"] for run in runs if run["explanations"])
    folders |= dict.fromkeys(
        short(row["folder"])
        for study in studies
        for row in study["runs"]
        if Path(row["folder"], "explanations.json").is_file()
    )
    groups: dict[str, list[str]] = {}
    for folder in folders:
        found = (read_json(Path(folder) / "explanations.json") or {}).get("rows", [])
        groups.setdefault(_options(found), []).append(folder)
    commands = [command("kd-lrp explain", *group) + words for words, group in groups.items()]
    made = read_json(Path(maps, "maps.json")) if maps else None
    return [*commands, *([made["command"]] if made else [])]


def _options(rows: Sequence[Mapping[str, Any]]) -> str:
    """What ``kd-lrp explain`` was asked for when it made these rows."""
    counts = {row["samples"] for row in rows}
    found = {
        "--method": dict.fromkeys(row["method"] for row in rows),
        "--layer": dict.fromkeys(row["layer"] for row in rows if row["layer"] != INPUT),
        "--samples": counts if len(counts) == 1 and None not in counts else (),
    }
    return command("", *(word for o, values in found.items() for v in values for word in (o, v)))


def explained(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The figures of ``explanations.json`` of all runs as one table; a shared teacher once."""
    rows: dict[tuple, dict[str, Any]] = {}
    for run in runs:
        alone = "teacher_model" not in (run["config"].get("models") or {})
        for row in (run["explanations"] or {}).get("rows", []):
            key = (row["weights"], row["method"], row["layer"], row["samples"])
            model = "alone" if alone else row["model"]
            rows.setdefault(key, {"run": run["name"], **row, "model": model})
    return records(list(rows.values()))


def read_study(path: Path, name: str) -> dict[str, Any]:
    """The content of ``study.json``, and its tables by measure."""
    content = read_json(path / "study.json")
    words = [word for change in content["overrides"] for word in ("--set", change)]
    words += [word for choice in content["only"] for word in ("--only", choice)]
    seeds = ",".join(map(str, content["seeds"])) + "," * (len(content["seeds"]) == 1)
    if content["root"] != "runs":
        words = ["--runs", short(content["root"]), *words]
    return {
        **content,
        "name": name,
        "folder": short(path),
        "tables": {measure: _study_rows(content, measure) for measure in content["measures"]},
        "most": max((record["n"] for record in content["table"]), default=0),
        "picture": file_at(path / "study.png"),
        "command": command(
            "kd-lrp study", content["file"], "--seeds", seeds, *words, "--out", short(path)
        ),
    }


def _study_rows(content: Mapping[str, Any], measure: str) -> list[dict[str, Any]]:
    """A measure's rows, each beside its paired difference."""

    def place(record: Mapping[str, Any]) -> str:
        return json.dumps([record["configuration"], record["point"]])

    of_measure = [r for r in content["comparisons"] if r["measure"] == measure]
    compared = {place(record): record for record in of_measure}
    rows = []
    for record in content["table"]:
        if record["measure"] == measure and record["n"]:
            row = {"configuration": record["configuration"]}
            row |= {axis: str(record["point"].get(axis, "-")) for axis in content["axes"]}
            row |= {"n": record["n"], "mean": record["mean"], "std": record["std"]}
            row["95 % interval"] = _span(record)
            if reference := content["compare_to"]:
                other = compared.get(place(record), {})
                row[f"minus {reference}"] = other.get("mean")
                row["95 % interval of it"] = _span(other)
                row |= {
                    "pairs": other.get("n"),
                    "p": other.get("p"),
                    "p (Holm)": other.get("p_holm"),
                }
            rows.append(row)
    return rows


def _span(record: Mapping[str, Any]) -> str:
    low, high = record.get("low"), record.get("high")
    return "-" if low is None or high is None else f"{low:.4f} to {high:.4f}"


def read_selection(
    runs: Sequence[Mapping[str, Any]], given: str | Path | None
) -> dict[str, Any] | None:
    """A ranking of untrained students: the given one, or the first that a run's config names.

    Raises:
        ValueError: if ``given`` is no record of a choice.
    """
    files, config, words = [Path(given)] if given else [], None, []
    for run in runs:
        entry = (run["config"].get("models") or {}).get("student_model") or {}
        if entry.get("key") == "diswot_student":
            config = run["config_file"] or config
            words = [word for o in run["session"].get("overrides", ()) for word in ("--set", o)]
            if not given:
                files.append(Path(os.path.expandvars(entry["kwargs"]["record"])).expanduser())
    for file in files:
        record = read_json(file)
        if isinstance(record, dict) and record.get("ranking"):
            question, ranking = record["question"], record["ranking"]
            hidden = ("problem", "entry", "latency", "counters_differ_by")
            return {
                "file": short(file),
                "chosen": record["candidate"],
                "score": question["score"],
                "seeds": question["seeds"],
                "columns": [key for key in ranking[0] if key not in hidden],
                "ranking": ranking[:RANKED],
                "more": len(ranking) - RANKED if len(ranking) > RANKED else 0,
                "words": summarise_ranking(ranking),
                "figure": vector(
                    selection_figure(ranking, f"{question['score']}: lower is better")
                ),
                "command": command("kd-lrp select", config, *words) if config else None,
            }
    if given:
        fix = "Give the JSON file that kd-lrp select says it has recorded the choice in."
        raise ValueError(message("report --selection", "the record of a choice", given, fix))
    return None
