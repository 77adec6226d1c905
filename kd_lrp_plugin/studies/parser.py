"""A study as planned: one YAML file becomes the list of its runs, each with a folder of its own.

.. code-block:: yaml

    question: does relevance add anything to KD?
    seeds: 3                      # 0, 1 and 2; a list names them
    set: [image_size=96]          # overrides for every run
    prepare:                      # trained once; {teacher} below is its best.pt. With seed: each
                                  # one for each seed of the study, of the same number
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
    primary: {measure: test_accuracy, configuration: KD, minus: [CE], where: {...}}

What ``primary`` says is in :mod:`kd_lrp_plugin.studies.primary`. Overrides are those of ``--set``;
``{seed}`` in one is the seed of the run. A run is known by what it is: a hash of its config as it
runs is in the name of its folder. So studies share their runs.
"""

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from kd_lrp_plugin.config.build import get_stages
from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.config.inheritance import read_text
from kd_lrp_plugin.config.nodes import compose
from kd_lrp_plugin.studies.plan import COLUMNS, MEASURES, Plan, StudyRun, check_measure
from kd_lrp_plugin.studies.primary import read_primary, refuse_further_seeds
from kd_lrp_plugin.utils.files import hash_contents
from kd_lrp_plugin.utils.validation import check_known, message

EACH = "each"
KEYS = (
    *("question", "seeds", "set", "prepare", "configurations", "compare_to", "grid"),
    *("measures", "primary"),
)
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
        seeds: how many, the file's first, or which; those of the file if None.
        root: folder of the runs.
        only: ``axis=value`` or ``configuration=name``, what to keep; all of an axis not named.

    Raises:
        FileNotFoundError: if there is no such file, or none that a config names.
        ValueError: for text that is not YAML, an unknown or missing key, or a wrong override.
    """
    file = Path(file)
    content = _read(file)
    with _errors_at(f"{file}: seeds"):
        registered = _list_seeds(content.get("seeds", 3))
        chosen = registered if seeds is None else _choose_seeds(seeds, registered)
    measures = _list(f"{file}: measures", content.get("measures", list(MEASURES)))
    axes = _read_axes(file, content.get("grid") or {})
    for axis in axes:
        if axis in (*COLUMNS, *measures):
            got, fix = repr(axis), "Rename it: results have a column of this name."
            raise ValueError(message(f"{file}: grid", "a name of its own for an axis", got, fix))
    primary = read_primary(file, content, list(map(str, measures)), axes, registered)
    if overrides:
        primary = None  # registered is the file as it stands
    refuse_further_seeds(file, primary, chosen)
    common = _list_overrides(f"{file}: set", content.get("set"))
    planner = RunPlanner(file, Path(root))
    made = planner.prepared
    for name, entry in _read_entries(file, content, "prepare", ("config", "set", "seed")).items():
        where = f"{file}: prepare {name!r}"
        own = _list_overrides(where, entry.get("set"))
        with _errors_at(where):
            changes, seed = (*common, *own, *overrides), entry.get("seed", 0)
            if seed == EACH:
                made[name] = {
                    s: planner.plan(name, entry["config"], {}, s, changes) for s in chosen
                }
            else:
                if of_each := planner.find_each(changes):
                    fix = "Its model of one seed would go into the runs of all."
                    raise ValueError(message("seed", f"each, as of {of_each}", seed, fix))
                (seed,) = _list_seeds([seed])
                made[name] = {None: planner.plan(name, entry["config"], {}, seed, changes)}
    runs = []
    entries = _read_entries(file, content, "configurations", ("config", "set", "axes"))
    for name, entry in entries.items():
        where = f"{file}: configuration {name!r}"
        own = _list_overrides(where, entry.get("set"))
        crossed = _list(f"{where}: axes", entry.get("axes", list(axes)))
        for axis in crossed:
            check_known(f"{where}: axes", axis, axes)
        for values in itertools.product(*(axes[axis] for axis in crossed)):
            point = dict(zip(crossed, values, strict=True))
            of_point = [o for axis, value in point.items() for o in axes[axis][value]]
            with _errors_at(where):
                changes = (*common, *own, *of_point, *overrides)
                run = None
                for seed in chosen:
                    if run is None or planner.depend_on_seed(changes):
                        run = planner.plan(name, entry["config"], point, seed, changes)
                    runs.append(replace(run, seed=seed, folder=run.folder.parent / str(seed)))
    _check_different(file, runs)
    of_prepared = [run for by_seed in made.values() for run in by_seed.values()]
    terms = {term for run in (*of_prepared, *runs) for term in run.terms}
    for measure in measures:
        check_measure(f"{file}: measures", str(measure), terms)
    compare_to = content.get("compare_to")
    if compare_to is not None:
        check_known(f"{file}: compare_to", compare_to, entries)
    kept = _choose_values(only, {"configuration": list(entries), **axes})
    runs = [
        run
        for run in runs
        if run.name in kept["configuration"] and all(v in kept[a] for a, v in run.point.items())
    ]
    needs = {need for run in runs for need in run.needs}
    prepared: list[StudyRun] = []
    for run in reversed(of_prepared):
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
        primary=primary,
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
    text = read_text(file)
    compose(str(file), text)  # refuses a key that is there twice
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(message(str(file), "YAML", str(error), "Correct it there.")) from error
    if not isinstance(content, dict):
        raise ValueError(message(str(file), "a mapping of keys", repr(content)[:60], _SEE))
    for key in content:
        check_known(f"{file}: key", key, KEYS)
    for key in ("question", "configurations"):
        if not content.get(key):
            raise ValueError(message(str(file), f"a {key!r}", content.get(key), _SEE))
    return content


def _read_entries(
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


def _list_seeds(given: Any) -> tuple[int, ...]:
    seeds = list(range(given)) if type(given) is int else given
    fix = "Give a number of seeds, or a list of them."
    if not isinstance(seeds, list | tuple) or not seeds:
        raise ValueError(message("seeds", "one seed or more", repr(given), fix))
    if any(type(seed) is not int or seed < 0 for seed in seeds):
        raise ValueError(message("seeds", "integers of 0 or more", list(seeds), fix))
    return tuple(dict.fromkeys(seeds))


def _choose_seeds(given: int | Sequence[int], of_file: tuple[int, ...]) -> tuple[int, ...]:
    """Those given; of a number as many: the file's first, then the lowest that it lacks."""
    if type(given) is not int or given < 1:
        return _list_seeds(given)
    lacking = (seed for seed in itertools.count() if seed not in of_file)
    return tuple(itertools.islice(itertools.chain(of_file, lacking), given))


def _list(where: str, given: Any) -> list[Any]:
    if not isinstance(given, list):
        raise ValueError(message(where, "a list", repr(given)[:60], _SEE))
    return given


def _list_overrides(where: str, given: Any) -> list[str]:
    """A list of overrides; lists within it, which an alias may bring, are laid flat."""
    found: list[str] = []
    for item in _list(where, given or []):
        if isinstance(item, list):
            found += _list_overrides(where, item)
        elif isinstance(item, str) and "=" in item:
            found.append(item)
        else:
            fix = 'In quotes where there are braces, such as "src_ckpt={teacher}".'
            raise ValueError(message(f"{where}: set", "overrides key=value", repr(item), fix))
    return found


def _read_axes(file: Path, grid: Any) -> dict[str, dict[Any, list[str]]]:
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
            if len(axes[str(axis)]) < len(values):  # 1 and true are one, too
                fix = "Leave one out, or name each by a list of its overrides."
                raise ValueError(message(f"{where}: values", "each value once", values, fix))
        else:
            axes[str(axis)] = {
                value: _list_overrides(f"{where}: {value!r}", changes)
                for value, changes in given.items()
            }
    return axes


def _choose_values(
    only: Sequence[str], values: Mapping[str, Iterable[Any]]
) -> dict[str, list[Any]]:
    """The values of each axis that are left; of an axis that is not named, all."""
    named: dict[str, list[Any]] = {}
    for choice in only:
        axis, _, value = choice.partition("=")
        check_known("--only", axis, values)
        known = {_text(one): one for one in values[axis]}
        check_known(f"--only {axis}", value, known)
        named.setdefault(axis, []).append(known[value])
    return {axis: named.get(axis, list(all_)) for axis, all_ in values.items()}


def _text(value: Any) -> str:
    """A value as people type it, so that it makes the same run."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _name(value: Any) -> Any:
    """A value of an axis as tables show it."""
    return value if isinstance(value, str | int | float) else json.dumps(value)


@dataclass
class RunPlanner:
    """Makes the runs of a study, one after another.

    Attributes:
        file: of the study; configs lie beside it.
        root: folder of the runs.
        prepared: runs that overrides may name in braces: by name, then by the seed of the run that
            names it, or under None for all seeds.
    """

    file: Path
    root: Path
    prepared: dict[str, dict[int | None, StudyRun]] = field(default_factory=dict)

    def depend_on_seed(self, overrides: Sequence[str]) -> bool:
        """Whether overrides say something else for another seed."""
        return bool(self.find_each(overrides)) or any("{seed}" in text for text in overrides)

    def find_each(self, overrides: Sequence[str]) -> list[str]:
        """Names in overrides of what is prepared once for each seed."""
        each = [name for name, by_seed in self.prepared.items() if None not in by_seed]
        return [name for name in each if any(f"{{{name}}}" in text for text in overrides)]

    def plan(
        self, name: str, config: str, point: Mapping[str, Any], seed: int, overrides: Sequence[str]
    ) -> StudyRun:
        """One run of a configuration at a point of the grid."""
        path = Path(os.path.normpath(self.file.parent / config))
        prepared = {
            name: by_seed[None if None in by_seed else seed]
            for name, by_seed in self.prepared.items()
            if None in by_seed or seed in by_seed
        }
        used = [n for n in prepared if any(f"{{{n}}}" in override for override in overrides)]
        # What a prepared run is, not where it lies: moved along with it, a run stays known.
        names = {n: f"{run.folder.parent.name}/{run.seed}" for n, run in prepared.items()}
        document = resolve_config(path, _fill(overrides, {"seed": str(seed), **names}))
        _check_files(document.values, list(names.values()))
        key = hash_contents(document.text.encode())[:10]
        dataset, method = path.resolve().parent.parent.name, path.resolve().parent.name
        files = {n: str(run.folder / "best.pt") for n, run in prepared.items()}
        stages = _list_stages(document.values)
        return StudyRun(
            name=name,
            point=dict(point),
            seed=seed,
            config=path,
            overrides=_fill(overrides, {"seed": str(seed), **files}),
            folder=self.root / dataset / method / f"{path.stem}-{key}" / str(seed),
            needs=tuple(prepared[n].folder for n in used),
            epochs=sum(n for stage in stages if type(n := stage.get("num_epochs")) is int),
            terms=tuple(term for stage in stages for term in _list_terms(stage)),
        )


def _fill(overrides: Sequence[str], known: Mapping[str, str]) -> tuple[str, ...]:
    """Overrides with what stands for the names in braces."""

    def fill(match: re.Match[str]) -> str:
        check_known("set: in braces", match[1], known)
        return known[match[1]]

    return tuple(re.sub(r"\{(\w+)\}", fill, override) for override in overrides)


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


def _list_stages(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    train = content.get("train")
    stages = get_stages(train).values() if isinstance(train, dict) else ()
    return [stage for stage in stages if isinstance(stage, dict)]


def _list_terms(stage: Mapping[str, Any]) -> list[str]:
    """The names of a criterion's terms."""
    node: Any = stage
    for key in ("criterion", "kwargs", "sub_terms"):
        node = node.get(key) if isinstance(node, dict) else None
    return list(map(str, node)) if isinstance(node, dict) else []


def _check_different(file: Path, runs: Sequence[StudyRun]) -> None:
    """Raise ValueError where two configurations are one: a comparison would be of noise."""
    found: dict[Path, str] = {}
    for run in runs:
        other = found.setdefault(run.folder, run.cell)
        if other != run.cell:
            got = f"{other!r} and {run.cell!r} with the same config"
            fix = "Leave one out, or the override that makes them alike."
            raise ValueError(message(str(file), "configurations that differ", got, fix))
