"""From run folders to explanations: metrics, and pictures side by side.

``RUN/explanations.json`` is written again after each method: ``rows``, one per model, method, layer
and number of samples, each with ``metrics`` (:func:`kd_lrp_plugin.attribution.summary.summary`) and
``randomisation``. A row that is there, of this run or another of the command with the same model,
is not computed again. ``without`` has by model and method why there is none.
"""

import json
import time
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kd_lrp_plugin.attribution.faithfulness import deletion, insertion
from kd_lrp_plugin.attribution.localisation import (
    area_share,
    attribution_similarity,
    pointing_game,
    rank_accuracy,
    relevance_mass_accuracy,
)
from kd_lrp_plugin.attribution.methods import ATTRIBUTIONS, INPUT, attribute
from kd_lrp_plugin.attribution.randomisation import randomisation
from kd_lrp_plugin.attribution.summary import FAITHFUL, INSIDE, flat, summary
from kd_lrp_plugin.evaluation.explain_inputs import (
    ExplainOptions,
    LoadedRun,
    Sample,
    list_runs,
    make_sample,
    open_run,
    sample_indices,
)
from kd_lrp_plugin.evaluation.explain_pictures import (
    DisplayImage,
    check_pictured_alike,
    choose_images,
    read_images,
)
from kd_lrp_plugin.evaluation.explain_records import get_file, read_rows
from kd_lrp_plugin.evaluation.explain_trials import Trial
from kd_lrp_plugin.plots.maps import MapRow, map_figure
from kd_lrp_plugin.utils.extras import imports_of_an_extra
from kd_lrp_plugin.utils.files import (
    get_command,
    hash_contents,
    put,
    write_json,
    write_text,
)
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message

with imports_of_an_extra():
    from matplotlib.figure import Figure

MOST = 1000  # images for the metrics of quick methods, without --samples
FEW = 32  # for what asks the model hundreds of times
ROWS = 32  # of the picture of several runs, at most, but for a single image
_INSIDE = dict(zip(INSIDE, (relevance_mass_accuracy, rank_accuracy, pointing_game), strict=True))
_FAITHFUL = dict(zip(FAITHFUL, (insertion, deletion), strict=True))


def explain(
    folders: Sequence[str | Path], options: ExplainOptions | None = None
) -> list[dict[str, Any]]:
    """Explain the models of finished runs, in pictures and in metrics.

    The metrics are of the true class, on images of the test set, where it has masks on images
    with a mask: all of them (1,000 at most) for quick methods, 32 of them for LIME, RISE,
    Score-CAM, insertion and deletion, and half of these for the randomisation (8 for slow
    methods). A map without relevance, as an LRP map of a class with a negative output is, counts
    as 0 where the metric is of a location or a likeness to the teacher's, and is left out
    elsewhere. The pictures are of the class that each model predicts. A model without maps, such
    as an MLP, is explained by the methods that need no layer.

    Writes ``explanations.png`` and ``explanations.json`` into each run folder; of subclasses their
    names are ``explanations-subclasses``. With ``out``, writes
    there ``maps.png`` and ``explanations.csv``, all runs side by side, and ``maps.json``, the
    command that makes them.

    Args:
        folders: finished runs, or studies with such; several must have one test set.
        options: all of them as they are by themselves, if None.

    Returns:
        The rows of all runs, each with "run".

    Raises:
        FileNotFoundError: if there is no run, no image, or no file of a teacher's weights.
        ValueError: for no runs or seeds, an unknown method or layer, runs with different test sets,
            with ``out`` also images of one name that differ or are cut otherwise, models or images
            that are not those of the run's predictions, a damaged file, or a transform that is not
            known with ``images``.
    """
    options = options or ExplainOptions()
    if not folders:
        raise ValueError(message("explain", "one run at least", "none", ""))
    if options.out is not None:
        _check_out(Path(options.out))
    named = list_runs([Path(folder) for folder in folders], options.seeds)
    trials: dict[tuple[str, ...], Trial] = {}
    runs = [open_run(folder, name, options, trials) for folder, name in named]
    if len({run.test_hash for run in runs}) > 1:
        counts = {run.name: len(run.labels) for run in runs}
        fix = "Compare runs of one data set; explain the others by themselves."
        raise ValueError(message("explain", "runs with the same test images", counts, fix))
    explainer = Explainer()
    if options.images:
        display = read_images(runs, options.images, options.safe)
    else:
        display = choose_images(runs[0], options.n)
    displayed = [display(run) for run in runs]
    if options.out is not None:
        check_pictured_alike(runs, displayed)
    rows: list[dict[str, Any]] = []
    if not options.images:
        explainer.announce(runs, options.samples)
        rows = [row for run in runs for row in explainer.rows(run, options.samples)]
    for run, images in zip(runs, displayed, strict=True):
        ending = f"{'-subclasses' * run.of_subclasses}{'-images' if options.images else ''}"
        name = f"explanations{ending}.png"
        _save(run.folder.path / name, explainer.draw_run(run, images))
    if options.out is not None:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        _save(out / "maps.png", explainer.draw_all(runs, displayed))
        if not options.images:
            write_text(out / "explanations.csv", flat(rows))
        write_json(out / "maps.json", {"command": get_command()})
    return rows


class Explainer:
    """Maps and rows, each made once for all runs of a command: they may share a teacher."""

    def __init__(self) -> None:
        self._maps: dict[tuple, Tensor] = {}
        self._known: dict[tuple, dict[str, Any]] = {}
        self._chance_levels: dict[tuple, Tensor] = {}
        self._indices: dict[tuple, list[int]] = {}

    # --- metrics ------------------------------------------------------------------------------

    def announce(self, runs: Sequence[LoadedRun], samples: int | None) -> None:
        """Take over the rows that runs have, and say how long the others will take."""
        for run in runs:
            for row in read_rows(run)["rows"]:
                self._keep_row(run, row)
        seconds: dict[tuple, float] = {}
        for run in runs:
            images = len(self._list_indices(run, samples))
            few = min(images, samples or FEW)
            for role, method, layer, _ in _list_jobs(run):
                key = _get_key(run, run.hashes[role], method, layer, samples)
                if key not in self._known:
                    seconds[key] = run.trials[role].estimate(method, images, few)
        if seconds:
            total = sum(seconds.values())
            about = f"{total / 60:.0f} min" if total >= 100 else f"{max(total, 1):.0f} s"
            words = f"metrics: {len(seconds)} rows to make, about {about}; then the pictures"
            current_progress().note(words)

    def _list_indices(self, run: LoadedRun, samples: int | None) -> list[int]:
        key = (run.test_hash, run.seen, samples)
        if key not in self._indices:
            self._indices[key] = sample_indices(run, samples or MOST)
        return self._indices[key]

    def _keep_row(self, run: LoadedRun, row: dict[str, Any]) -> None:
        """For another run with this model: all of it but what compares it with a teacher."""
        metrics = {k: v for k, v in row["metrics"].items() if k != "attribution_similarity"}
        key = _get_key(run, row["weights"], row["method"], row["layer"], row["samples"])
        self._known[key] = deepcopy({**row, "metrics": metrics})

    def rows(self, run: LoadedRun, samples: int | None) -> list[dict[str, Any]]:
        """The run's rows for what is asked; those that are new are written as they are made."""
        content = read_rows(run)
        current, rows = run.folder.is_current(content), content["rows"]
        # Of a model that is not loaded, the weights are those of the predictions.
        of_role = {row["model"]: row["weights"] for row in rows} if current else {}
        of_role |= run.hashes
        content["rows"] = [row for row in rows if row["weights"] == of_role.get(row["model"])]
        content |= run.folder.of
        if not current or len(content["rows"]) < len(rows):
            write_json(get_file(run), content)
        reasons = {role: trial.without for role, trial in run.trials.items()}
        content["without"] = {**content.get("without", {}), **reasons}
        jobs = _list_jobs(run)
        sample: Sample | None = None
        few = samples or FEW
        found = []
        for role, method, layer, index in current_progress().track(jobs, "explaining", len(jobs)):
            key = {"model": role, "method": method, "layer": layer, "samples": samples}
            row = next((r for r in content["rows"] if key.items() <= r.items()), None)
            taught = role == "student" and method in run.methods.get("teacher", [])
            with_teacher: dict[str, Any] = {}
            if taught:
                other = _get_layer(run, "teacher", method, index)
                with_teacher = {"teacher": run.hashes["teacher"], "teacher_layer": other}
            compared = row["metrics"].get("attribution_similarity", {}) if row else {}
            if row is None or not with_teacher.items() <= compared.items():
                if sample is None:
                    sample = make_sample(run, self._list_indices(run, samples), run.device)
                if row is None:
                    known = _get_key(run, run.hashes[role], method, layer, samples)
                    if known not in self._known:
                        made = self._make_row(run, role, method, layer, sample, few)
                        self._keep_row(run, {**key, **made})
                    row = {**deepcopy(self._known[known]), **key}
                    content["rows"].append(row)
                if taught:
                    alike = self._compare_with_teacher(run, method, (layer, other), sample, few)
                    row["metrics"]["attribution_similarity"] = alike | with_teacher
                write_json(get_file(run), {**content, "command": get_command()})
            found.append({"run": run.name, **row})
        return found

    def _make_row(
        self, run: LoadedRun, role: str, method: str, layer: str, sample: Sample, few: int
    ) -> dict[str, Any]:
        started = time.monotonic()
        model, slow = run.models[role], ATTRIBUTIONS[method].slow
        sample = sample.first(few) if slow else sample
        maps = self._get_maps(run, role, method, layer, sample.images, sample.labels)
        metrics: dict[str, Any] = {}
        if sample.masks is not None:
            chance = area_share(sample.masks)
            for name, inside in _INSIDE.items():
                metrics[name] = summary(inside(maps, sample.masks), chance, otherwise=0)
        part = sample.first(few)
        for name, measure in _FAITHFUL.items():
            values = measure(model, part.images, part.labels, maps[:few])
            metrics[name] = summary(values, self._get_chance_level(run, role, name, part))
        part = sample.first(max(2, few // (4 if slow else 2)))
        curve = []
        if len(part.labels) > 1:  # the statistics of a batch norm need two
            arguments = (part.images, maps[: len(part.labels)], method, layer)
            again = randomisation(model, *arguments, points=2 if slow else 4)
            curve = [{"down_to": name} | summary(values) for name, values in again.items()]
            metrics["randomised"] = summary(list(again.values())[-1])
        return {
            "weights": run.hashes[role],
            "images": len(sample.labels),
            "map": list(maps.shape[1:]),
            "seconds": round(time.monotonic() - started, 1),
            "metrics": metrics,
            "randomisation": curve,
        }

    def _compare_with_teacher(
        self, run: LoadedRun, method: str, layers: tuple[str, str], sample: Sample, few: int
    ) -> dict[str, Any]:
        part = sample.first(few) if ATTRIBUTIONS[method].slow else sample
        student, teacher = (
            self._get_maps(run, role, method, layer, part.images, part.labels)
            for role, layer in zip(("student", "teacher"), layers, strict=True)
        )
        return summary(attribution_similarity(student, teacher), otherwise=0)

    def _get_chance_level(self, run: LoadedRun, role: str, name: str, part: Sample) -> Tensor:
        """The metric of random maps, of each image."""
        key = (run.hashes[role], run.seen, name, len(part.labels))
        if key not in self._chance_levels:
            shape = (len(part.labels), 8, 8)
            noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
            self._chance_levels[key] = _FAITHFUL[name](
                run.models[role], part.images, part.labels, noise
            )
        return self._chance_levels[key]

    def _get_maps(
        self,
        run: LoadedRun,
        role: str,
        method: str,
        layer: str,
        images: Float[Tensor, "n c h w"],
        targets: Int[Tensor, " n"],
    ) -> Float[Tensor, "n h2 w2"]:
        seen = hash_contents(images.cpu().numpy().tobytes(), targets.tolist())
        key = (run.hashes[role], method, layer, seen)
        if key not in self._maps:
            self._maps[key] = attribute(run.models[role], images, targets, method, layer)
        return self._maps[key]

    # --- pictures -----------------------------------------------------------------------------

    def draw_run(self, run: LoadedRun, displayed: Sequence[DisplayImage]) -> Figure:
        """A row per image and model, a column per method."""
        methods = _list_common_methods([run])
        roles = sorted(run.models, reverse=True)  # the teacher first
        parts = {role: self._display_model(run, role, displayed, methods) for role in roles}
        rows = [
            MapRow(
                f"{one.label}\n{role}",
                one.picture,
                {method.replace("_", " "): part.maps[method][i].numpy() for method in methods},
                {"image": part.predictions[i]},
                one.mask,
                one.known,
            )
            for i, one in enumerate(displayed)
            for role, part in parts.items()
        ]
        layers = ", ".join(f"{role} at {run.layers[role][0]}" for role in parts)
        return map_figure(rows, f"Relevance of the predicted class: {layers}")

    def draw_all(
        self, runs: Sequence[LoadedRun], displayed: Sequence[Sequence[DisplayImage]]
    ) -> Figure:
        """A row per image and method, a column per model; all methods, of as many images as fit."""
        methods = _list_common_methods(runs)
        shown = max(1, ROWS // len(methods))
        displayed = [images[:shown] for images in displayed]
        columns = {}
        teachers = {run.hashes["teacher"] for run in runs if "teacher" in run.models}
        pictured: set[str] = set()
        for role in ("teacher", "student"):
            for run, images in zip(runs, displayed, strict=True):
                if role not in run.models or (role == "teacher" and run.hashes[role] in pictured):
                    continue
                alone = len(runs) == 1 or (role == "teacher" and len(teachers) == 1)
                of_run = run.name.replace("/", "\n")
                heading = (
                    role if alone else f"teacher of\n{of_run}" if role == "teacher" else of_run
                )
                columns[heading] = self._display_model(run, role, images, methods)
                pictured.add(run.hashes[role])
        rows = [
            MapRow(
                f"{one.label}\n{method.replace('_', ' ')}",
                one.picture,
                {name: part.maps[method][i].numpy() for name, part in columns.items()},
                {name: part.predictions[i] for name, part in columns.items()},
                one.mask,
                one.known,
            )
            for i, one in enumerate(displayed[0])
            for method in methods
        ]
        return map_figure(rows, "Relevance of the class that each model predicts")

    def _display_model(
        self, run: LoadedRun, role: str, displayed: Sequence[DisplayImage], methods: Sequence[str]
    ) -> "ModelDisplay":
        images = torch.stack([one.image for one in displayed]).to(run.device)
        with torch.no_grad():
            probabilities = run.models[role](images).softmax(1)
        confidence, predicted = probabilities.max(1)
        maps = {
            method: self._get_maps(
                run, role, method, _get_layer(run, role, method, 0), images, predicted
            )
            for method in methods
        }
        names = [run.class_name(number) for number in predicted.tolist()]
        return ModelDisplay(maps, list(zip(names, confidence.tolist(), strict=True)))


class ModelDisplay(NamedTuple):
    """A model's maps by method, and its prediction of each image."""

    maps: dict[str, Float[Tensor, "n h w"]]
    predictions: list[tuple[str, float]]


def _list_common_methods(runs: Sequence[LoadedRun]) -> list[str]:
    lists = [methods for run in runs for methods in run.methods.values()]
    return [method for method in lists[0] if all(method in other for other in lists)]


def _list_jobs(run: LoadedRun) -> list[tuple[str, str, str, int]]:
    """Model, method, layer and its number, one for each row."""
    return [
        (role, method, _get_layer(run, role, method, index), index)
        for role in run.models
        for index in range(len(run.layers[role]))
        for method in run.methods[role]
        if ATTRIBUTIONS[method].layered or index == 0
    ]


def _get_key(
    run: LoadedRun, weights: str, method: str, layer: str, samples: int | None
) -> tuple[object, ...]:
    """What rows of one model on the same images have in common, whichever run they are of."""
    return run.seen, weights, method, layer, samples


def _get_layer(run: LoadedRun, role: str, method: str, index: int) -> str:
    return run.layers[role][index] if ATTRIBUTIONS[method].layered else INPUT


def _check_out(out: Path) -> None:
    """Raise FileExistsError for files of the names that will be written, but of somebody else."""
    theirs = [name for name in ("maps.png", "explanations.csv") if (out / name).exists()]
    if out.is_dir() and theirs and "command" not in _read_command(out / "maps.json"):
        fix = "Choose another --out, or move them away."
        raise FileExistsError(message("explain --out", "none of these files", theirs, fix))
    if out.exists() and not out.is_dir():
        fix = "Choose another --out."
        raise FileExistsError(message("explain --out", "a folder", f"a file, {out}", fix))


def _read_command(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _save(file: Path, figure: Figure) -> None:
    put(file, lambda draft: figure.savefig(draft, format="png", dpi=80))
