"""A study as planned: one YAML file becomes the list of its runs, each with a folder of its own.

.. code-block:: yaml

    question: does relevance add anything to KD?
    seeds: 3                      # 0, 1 and 2; a list names them
    set: [image_size=96]          # overrides for every run
    prepare:                      # trained once; {teacher} below is its best.pt
      teacher: {config: ../brain_mri/ce/mobilenetv2_100_flatten.yaml, set: [train.num_epochs=20]}
    configurations:
      CE: {config: ../brain_mri/ce/mobilenetv2_035.yaml, axes: []}
      KD:
        config: ../brain_mri/kd/mobilenetv2_035_from_mobilenetv2_100_flatten.yaml
        set: ["models.teacher_model.src_ckpt={teacher}"]
    compare_to: CE                # the others are paired with it, seed by seed
    grid:                         # crossed with the configurations, or with those of its axes
      rate: {key: train.optimizer.kwargs.lr, values: [0.0001, 0.001]}
      schedule: {short: [train.num_epochs=10], long: [train.num_epochs=30]}
    measures: [val_accuracy, test_accuracy, macro_f1]

Overrides are those of ``--set``; ``{seed}`` in one is the seed of the run. A run is known by what
it is: a hash of its config as it runs is in the name of its folder. So studies share their runs.
"""

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.studies.plan import COLUMNS, MEASURES, Plan, StudyRun
from kd_lrp_plugin.utils.files import hash_contents
from kd_lrp_plugin.utils.validation import check_known, message

KEYS = ("question", "seeds", "set", "prepare", "configurations", "compare_to", "grid", "measures")
_SEE = "See torchdistill_configs/studies for examples."


def read_plan(
    file: str | Path,
    overrides: Sequence[str] = (),
    seeds: int | Sequence[int] | None = None,
    root: str | Path = "runs",
    only: Sequence[str] = (),
) -> Plan:
    """The runs of a study; every config is resolved, and the files that it names are looked for.

    Args:
        file: YAML, as above.
        overrides: further ones for every run, after all others.
        seeds: how many, from 0, or which; those of the file if None.
        root: folder of the runs.
        only: ``axis=value`` or ``configuration=name``, what to keep; all of an axis not named.

    Raises:
        FileNotFoundError: if there is no such file, or none that a config names.
        ValueError: for text that is not YAML, an unknown or missing key, or a wrong override.
    """
    file = Path(file)
    content = _read(file)
    with _errors_at(f"{file}: seeds"):
        chosen = _seeds(content.get("seeds", 3) if seeds is None else seeds)
    measures = _list(f"{file}: measures", content.get("measures", list(MEASURES)))
    axes = _axes(file, content.get("grid") or {})
    for axis in axes:
        if axis in (*COLUMNS, *measures):
            got, fix = repr(axis), "Rename it: results have a column of this name."
            raise ValueError(message(f"{file}: grid", "a name of its own for an axis", got, fix))
    common = _overrides_of(f"{file}: set", content.get("set"))
    made: dict[str, StudyRun] = {}
    for name, entry in _entries(file, content, "prepare", ("config", "set", "seed")).items():
        where = f"{file}: prepare {name!r}"
        own = _overrides_of(where, entry.get("set"))
        with _errors_at(where):
            (seed,) = _seeds([entry.get("seed", 0)])
            changes = (*common, *own, *overrides)
            made[name] = _run(file, entry, name, {}, seed, changes, made, Path(root))
    runs = []
    entries = _entries(file, content, "configurations", ("config", "set", "axes"))
    for name, entry in entries.items():
        where = f"{file}: configuration {name!r}"
        own = _overrides_of(where, entry.get("set"))
        crossed = _list(f"{where}: axes", entry.get("axes", list(axes)))
        for axis in crossed:
            check_known(f"{where}: axes", axis, axes)
        for values in itertools.product(*(axes[axis] for axis in crossed)):
            point = dict(zip(crossed, values, strict=True))
            placed = [o for axis, value in point.items() for o in axes[axis][value]]
            with _errors_at(where):
                changes = (*common, *own, *placed, *overrides)
                run = None
                for seed in chosen:
                    if run is None or any("{seed}" in change for change in changes):
                        run = _run(file, entry, name, point, seed, changes, made, Path(root))
                    runs.append(replace(run, seed=seed, folder=run.folder.parent / str(seed)))
    compare_to = content.get("compare_to")
    if compare_to is not None:
        check_known(f"{file}: compare_to", compare_to, entries)
    kept = _kept(only, {"configuration": list(entries), **axes})
    runs = [
        run
        for run in runs
        if run.name in kept["configuration"] and all(v in kept[a] for a, v in run.point.items())
    ]
    needs = {need for run in runs for need in run.needs}
    prepared: list[StudyRun] = []
    for run in reversed(made.values()):
        if run.folder in needs or not only:
            needs.update(run.needs)
            prepared.insert(0, run)
    return Plan(
        file=file,
        root=Path(root),
        question=str(content["question"]),
        seeds=chosen,
        overrides=tuple(overrides),
        only=tuple(only),
        axes={axis: tuple(kept[axis]) for axis in axes},
        compare_to=compare_to if compare_to in kept["configuration"] else None,
        measures=tuple(dict.fromkeys(map(str, measures))),
        prepared=tuple(prepared),
        runs=tuple(runs),
    )


@contextmanager
def _errors_at(where: str) -> Iterator[None]:
    """Errors inside name the study and the part of it that they are of."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{where}: {error}") from error


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(message("study", "a YAML file", f"none at {file}", _SEE))
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(message(str(file), "YAML", str(error), "Correct it there.")) from error
    if not isinstance(content, dict):
        raise ValueError(message(str(file), "a mapping of keys", repr(content)[:60], _SEE))
    for key in content:
        check_known(f"{file}: key", key, KEYS)
    for key in ("question", "configurations"):
        if not content.get(key):
            raise ValueError(message(str(file), f"a {key!r}", content.get(key), _SEE))
    return content


def _entries(
    file: Path, content: Mapping[str, Any], section: str, known: Sequence[str]
) -> dict[str, dict[str, Any]]:
    entries = content.get(section) or {}
    if not isinstance(entries, dict):
        expected = "a mapping from names to {config: ..., set: [...]}"
        raise ValueError(message(f"{file}: {section}", expected, repr(entries)[:60], _SEE))
    found = {}
    for name, entry in entries.items():
        where = f"{file}: {section} {name!r}"
        if not isinstance(entry, dict) or not entry.get("config"):
            raise ValueError(message(where, "a mapping with a config", repr(entry)[:60], _SEE))
        for key in entry:
            check_known(f"{where}: key", key, known)
        if section == "prepare" and not re.fullmatch(r"\w+", str(name)):
            fix = "It stands in braces in overrides."
            raise ValueError(message(where, "a name of letters and digits", repr(name), fix))
        found[str(name)] = entry
    if section == "prepare" and "seed" in found:
        raise ValueError(message(f"{file}: prepare", "another name", "'seed'", "Rename it."))
    return found


def _seeds(given: Any) -> tuple[int, ...]:
    seeds = list(range(given)) if type(given) is int else given
    fix = "Give a number of seeds, or a list of them."
    if not isinstance(seeds, list | tuple) or not seeds:
        raise ValueError(message("seeds", "one seed or more", repr(given), fix))
    if any(type(seed) is not int or seed < 0 for seed in seeds):
        raise ValueError(message("seeds", "integers of 0 or more", list(seeds), fix))
    return tuple(dict.fromkeys(seeds))


def _list(where: str, given: Any) -> list[Any]:
    if not isinstance(given, list):
        raise ValueError(message(where, "a list", repr(given)[:60], _SEE))
    return given


def _overrides_of(where: str, given: Any) -> list[str]:
    """A list of overrides; lists within it, which an alias may bring, are laid flat."""
    found: list[str] = []
    for item in _list(where, given or []):
        if isinstance(item, list):
            found += _overrides_of(where, item)
        elif isinstance(item, str) and "=" in item:
            found.append(item)
        else:
            fix = 'In quotes where there are braces, such as "src_ckpt={teacher}".'
            raise ValueError(message(f"{where}: set", "overrides key=value", repr(item), fix))
    return found


def _axes(file: Path, grid: Any) -> dict[str, dict[Any, list[str]]]:
    """The overrides of each value of each axis."""
    if not isinstance(grid, dict):
        raise ValueError(message(f"{file}: grid", "a mapping of axes", repr(grid)[:60], _SEE))
    axes: dict[str, dict[Any, list[str]]] = {}
    for axis, given in grid.items():
        where = f"{file}: grid {axis!r}"
        if not isinstance(given, dict) or not given:
            expected = "{key: ..., values: [...]}, or lists of overrides by value"
            raise ValueError(message(where, expected, repr(given)[:60], _SEE))
        if set(given) <= {"key", "values"}:
            for key in ("key", "values"):
                if not given.get(key):
                    raise ValueError(message(where, f"a {key!r}", given.get(key), _SEE))
            values = _list(f"{where}: values", given["values"])
            axes[str(axis)] = {_name(v): [f"{given['key']}={_text(v)}"] for v in values}
        else:
            axes[str(axis)] = {
                value: _overrides_of(f"{where}: {value!r}", changes)
                for value, changes in given.items()
            }
    return axes


def _kept(only: Sequence[str], places: Mapping[str, Iterable[Any]]) -> dict[str, list[Any]]:
    """The values of each axis that are left; of an axis that is not named, all."""
    named: dict[str, list[Any]] = {}
    for choice in only:
        axis, _, value = choice.partition("=")
        check_known("--only", axis, places)
        known = {_text(place): place for place in places[axis]}
        check_known(f"--only {axis}", value, known)
        named.setdefault(axis, []).append(known[value])
    return {axis: named.get(axis, list(values)) for axis, values in places.items()}


def _text(value: Any) -> str:
    """A value as people type it, so that it makes the same run."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _name(value: Any) -> Any:
    """A value of an axis as tables show it."""
    return value if isinstance(value, str | int | float) else json.dumps(value)


def _run(
    file: Path,
    entry: Mapping[str, Any],
    name: str,
    point: Mapping[str, Any],
    seed: int,
    overrides: Sequence[str],
    prepared: Mapping[str, StudyRun],
    root: Path,
) -> StudyRun:
    config = Path(os.path.normpath(file.parent / entry["config"]))
    used = [n for n in prepared if any(f"{{{n}}}" in override for override in overrides)]

    def filled(values: Mapping[str, str]) -> tuple[str, ...]:
        known = {"seed": str(seed), **values}

        def fill(match: re.Match[str]) -> str:
            check_known("set: in braces", match[1], known)
            return known[match[1]]

        return tuple(re.sub(r"\{(\w+)\}", fill, override) for override in overrides)

    # What a prepared run is, not where it lies: moved along with it, a run stays known.
    names = {n: f"{run.folder.parent.name}/{run.seed}" for n, run in prepared.items()}
    document = resolve_config(config, filled(names))
    content = document.values
    _check_files(content, list(names.values()))
    key = hash_contents(document.text.encode())[:10]
    dataset, method = config.resolve().parent.parent.name, config.resolve().parent.name
    folder = root / dataset / method / f"{config.stem}-{key}" / str(seed)
    final = filled({n: str(run.folder / "best.pt") for n, run in prepared.items()})
    needs = tuple(prepared[n].folder for n in used)
    return StudyRun(name, dict(point), seed, config, final, folder, needs, _epochs(content))


def _check_files(content: Mapping[str, Any], promised: Sequence[str]) -> None:
    """Raise FileNotFoundError unless weights and checkpoints are there, or promised."""
    models = content.get("models")
    for role, entry in models.items() if isinstance(models, dict) else ():
        if not isinstance(entry, dict):
            continue
        kwargs = entry.get("kwargs")
        weights = kwargs.get("weights") if isinstance(kwargs, dict) else None
        for key, value in (("src_ckpt", entry.get("src_ckpt")), ("weights", weights)):
            if not isinstance(value, str) or value in promised:
                continue
            path = Path(os.path.expandvars(value)).expanduser()
            if not path.is_file():
                made_by = entry.get("_made_by")
                fix = f"Make it with: {made_by}" if made_by else "Correct it, or set it to null."
                if key == "src_ckpt":
                    fix = f"{fix} Or prepare it in the study, and set {key} to its name in braces."
                where = f"models.{role}: {key}"
                raise FileNotFoundError(message(where, "a file", f"none at {path}", fix))


def _epochs(content: Mapping[str, Any]) -> int:
    train = content.get("train") or {}
    stages = [train[key] for key in train if re.fullmatch(r"stage\d+", str(key))] or [train]
    planned = [stage.get("num_epochs") for stage in stages if isinstance(stage, dict)]
    return sum(number for number in planned if type(number) is int)
