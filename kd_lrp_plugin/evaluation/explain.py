"""From run folders to explanations: figures in numbers, and pictures side by side.

``RUN/explanations.json`` is written anew after each method: ``rows``, one per model, method, layer
and number of samples, each with ``figures`` (:func:`kd_lrp_plugin.attribution.summary.summary`) and
``randomisation``. A row that is there is not computed again.
"""

import json
import shlex
import time
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
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
from kd_lrp_plugin.attribution.summary import FAITHFUL, INSIDE, METRICS, flat, summary
from kd_lrp_plugin.evaluation.explain_inputs import (
    DisplayImage,
    LoadedRun,
    Sample,
    choose_images,
    list_runs,
    make_sample,
    open_run,
    read_images,
    sample_indices,
)
from kd_lrp_plugin.plots.maps import MapRow, map_figure
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.utils.files import hash_contents
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import check_known, message

MOST = 1000  # images for the figures of quick methods, without --samples
FEW = 32  # for what asks the model hundreds of times
SIDE_BY_SIDE = ("grad_cam", "lrp_composite")  # of several runs, without --method
FILE = "explanations.json"
_INSIDE = dict(zip(INSIDE, (relevance_mass_accuracy, rank_accuracy, pointing_game), strict=True))
_FAITHFUL = dict(zip(FAITHFUL, (insertion, deletion), strict=True))


def explain(
    folders: Sequence[str | Path],
    methods: Sequence[str] = (),
    layers: Sequence[str] = (),
    roles: Sequence[str] = ("student", "teacher"),
    images: Sequence[str | Path] = (),
    n: int = 8,
    samples: int | None = None,
    out: str | Path | None = None,
    device: torch.device | str = "cpu",
    safe: bool = False,
) -> list[dict[str, Any]]:
    """Explain the models of finished runs, in pictures and in numbers.

    The numbers are of the true class, on images of the test set, where it has masks on images
    with a mask: all of them (1,000 at most) for quick methods, 32 of them for LIME, Score-CAM,
    insertion and deletion, and half of these for the randomisation (8 for slow methods). A map
    without relevance, as an LRP map of a class with a negative output is, counts as 0 where the
    figure is of a place or a likeness to the teacher's, and is left out elsewhere. The pictures
    are of the class that each model predicts.

    Args:
        folders: finished runs, or studies with such; several must have one test set.
        methods: names of :data:`~kd_lrp_plugin.attribution.methods.ATTRIBUTIONS`; without any, all
            that can handle a model.
        layers: names of modules; without any, the deepest before the last reduction, where maps
            still have places to compare. Pictures show the first.
        roles: "student", "teacher" or both; a run without a teacher has none to explain.
        images: files to picture in place of test images; then nothing is computed in numbers.
        n: test images to picture: classes in turn, right and wrong predictions in turn.
        samples: images for all numbers, in place of the counts above; half or a quarter of them
            for the randomisation.
        out: folder for ``maps.png`` and ``explanations.csv``, all runs side by side, and for
            ``maps.json``, the command that makes them.
        device: to compute on.
        safe: see :func:`kd_lrp_plugin.runs.loading.load_run`.

    Returns:
        The rows of all runs, each with "run".

    Raises:
        FileNotFoundError: if there is no run, no image, or no file of a teacher's weights.
        ValueError: for an unknown method, layer or role, runs with different test sets, models
            or images that are not those of the run's predictions, or a preprocessing of its own
            with ``images``.
    """
    _check(folders, methods, roles, n, samples)
    runs = [
        open_run(folder, name, methods, layers, roles, device, safe)
        for folder, name in list_runs([Path(folder) for folder in folders])
    ]
    if len({run.test_print for run in runs}) > 1:
        counts = {run.name: len(run.labels) for run in runs}
        fix = "Compare runs of one data set; explain the others by themselves."
        raise ValueError(message("explain", "runs with the same test images", counts, fix))
    work = Explainer()
    shown = read_images(runs, images) if images else choose_images(runs[0], n)
    found = [] if images else [row for run in runs for row in work.rows(run, samples)]
    for run in runs:
        name = "explanations-images.png" if images else "explanations.png"
        _save(run.folder, name, work.figure_of_run(run, shown(run)))
    if out is not None:
        folder = RunFolder(out)
        folder.path.mkdir(parents=True, exist_ok=True)
        chosen = methods or SIDE_BY_SIDE
        _save(folder, "maps.png", work.figure_of_all(runs, [shown(run) for run in runs], chosen))
        if not images:
            folder.write("explanations.csv", flat(found))
        options = {"--method": methods, "--layer": layers, "--images": images, "--n": [n]}
        options |= {"--samples": [samples] if samples else [], "--out": [out]}
        options["--model"] = roles if len(roles) == 1 else []
        words = [w for option, values in options.items() for v in values for w in (option, v)]
        command = shlex.join(map(str, ["kd-lrp", "explain", *folders, *words]))
        folder.write("maps.json", json.dumps({"command": command}))
    return found


def _check(
    folders: Sequence[Any],
    methods: Sequence[str],
    roles: Sequence[str],
    n: int,
    samples: int | None,
) -> None:
    for method in methods:
        check_known("method", method, ATTRIBUTIONS)
    for role in roles:
        check_known("model", role, ("student", "teacher"))
    if not folders or not roles or n < 1 or (samples is not None and samples < 1):
        got = f"{len(folders)} runs, {len(roles)} models, n {n} and samples {samples}"
        raise ValueError(message("explain", "one run, model and image at least", got, ""))


# --- work ---------------------------------------------------------------------------------------


class Explainer:
    """Maps and rows, each made once for all runs of a command: they may share a teacher."""

    def __init__(self) -> None:
        self._maps: dict[tuple, Tensor] = {}
        self._made: dict[tuple, dict[str, Any]] = {}
        self._by_chance: dict[tuple, Tensor] = {}

    # --- numbers ------------------------------------------------------------------------------

    def rows(self, run: LoadedRun, samples: int | None) -> list[dict[str, Any]]:
        """The run's rows for what is asked; those that are new are written as they are made."""
        content = _read(run)
        jobs = [
            (role, method, place)
            for role in run.models
            for place in range(len(run.layers[role]))
            for method in run.methods[role]
            if ATTRIBUTIONS[method].layered or place == 0
        ]
        sample: Sample | None = None
        found = []
        for role, method, place in current_progress().track(jobs, "explaining", len(jobs)):
            layer = _layer(run, role, method, place)
            key = {"model": role, "method": method, "layer": layer, "samples": samples}
            row = next((r for r in content["rows"] if key.items() <= r.items()), None)
            if row is not None and row["weights"] != run.prints[role]:
                content["rows"].remove(row)
                row = None
            taught = role == "student" and method in run.methods.get("teacher", [])
            compared = row["figures"].get("attribution_similarity", {}) if row else {}
            if row is None or (taught and compared.get("teacher") != run.prints["teacher"]):
                if sample is None:
                    sample = make_sample(run, sample_indices(run, samples or MOST), run.device)
                if row is None:
                    row = {**key, **self._row(run, role, method, layer, sample, samples or FEW)}
                    content["rows"].append(row)
                if taught:
                    other = _layer(run, "teacher", method, place)
                    alike = self._similarity(run, method, (layer, other), sample, samples or FEW)
                    row["figures"]["attribution_similarity"] = {
                        **alike,
                        "teacher": run.prints["teacher"],
                    }
                run.folder.write(FILE, json.dumps(content, indent=1))
            found.append({"run": run.name, **row})
        return found

    def _row(
        self, run: LoadedRun, role: str, method: str, layer: str, sample: Sample, few: int
    ) -> dict[str, Any]:
        known = (run.prints[role], method, layer, len(sample.labels), few)
        if known in self._made:
            return deepcopy(self._made[known])
        started = time.monotonic()
        model, slow = run.models[role], ATTRIBUTIONS[method].slow
        sample = sample.first(few) if slow else sample
        maps = self._maps_of(run, role, method, layer, sample.images, sample.labels)
        figures: dict[str, Any] = {}
        if sample.masks is not None:
            chance = area_share(sample.masks)
            for name, inside in _INSIDE.items():
                figures[name] = summary(inside(maps, sample.masks), chance, otherwise=0)
        part = sample.first(few)
        for name, measure in _FAITHFUL.items():
            values = measure(model, part.images, part.labels, maps[:few])
            figures[name] = summary(values, self._chance(run, role, name, part))
        part = sample.first(max(2, few // (4 if slow else 2)))
        curve = []
        if len(part.labels) > 1:  # the statistics of a batch norm need two
            arguments = (part.images, maps[: len(part.labels)], method, layer)
            again = randomisation(model, *arguments, points=2 if slow else 4)
            curve = [{"down_to": name} | summary(values) for name, values in again.items()]
            figures["randomised"] = summary(list(again.values())[-1])
        made = {
            "weights": run.prints[role],
            "images": len(sample.labels),
            "map": list(maps.shape[1:]),
            "seconds": round(time.monotonic() - started, 1),
            "figures": figures,
            "randomisation": curve,
        }
        self._made[known] = deepcopy(made)
        return made

    def _similarity(
        self, run: LoadedRun, method: str, layers: tuple[str, str], sample: Sample, few: int
    ) -> dict[str, Any]:
        part = sample.first(few) if ATTRIBUTIONS[method].slow else sample
        student, teacher = (
            self._maps_of(run, role, method, layer, part.images, part.labels)
            for role, layer in zip(("student", "teacher"), layers, strict=True)
        )
        return summary(attribution_similarity(student, teacher), otherwise=0)

    def _chance(self, run: LoadedRun, role: str, name: str, part: Sample) -> Tensor:
        """The figure of maps that know nothing, of each image."""
        key = (run.prints[role], name, len(part.labels))
        if key not in self._by_chance:
            shape = (len(part.labels), 8, 8)
            noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
            self._by_chance[key] = _FAITHFUL[name](
                run.models[role], part.images, part.labels, noise
            )
        return self._by_chance[key]

    def _maps_of(
        self,
        run: LoadedRun,
        role: str,
        method: str,
        layer: str,
        images: Float[Tensor, "n c h w"],
        targets: Int[Tensor, " n"],
    ) -> Float[Tensor, "n h2 w2"]:
        seen = hash_contents(images.cpu().numpy().tobytes(), targets.tolist())
        key = (run.prints[role], method, layer, seen)
        if key not in self._maps:
            self._maps[key] = attribute(run.models[role], images, targets, method, layer)
        return self._maps[key]

    # --- pictures -----------------------------------------------------------------------------

    def figure_of_run(self, run: LoadedRun, shown: Sequence[DisplayImage]) -> Figure:
        """A row per image and model, a column per method."""
        methods = _able_in_all([run])
        roles = sorted(run.models, reverse=True)  # the teacher first
        parts = {role: self._pictured(run, role, shown, methods) for role in roles}
        rows = [
            MapRow(
                f"{one.label}\n{role}",
                one.picture,
                {method.replace("_", " "): part.maps[method][i].numpy() for method in methods},
                {"image": part.predictions[i]},
                one.mask,
                one.known,
            )
            for i, one in enumerate(shown)
            for role, part in parts.items()
        ]
        layers = ", ".join(f"{role} at {run.layers[role][0]}" for role in parts)
        return map_figure(rows, f"Relevance of the predicted class: {layers}")

    def figure_of_all(
        self,
        runs: Sequence[LoadedRun],
        shown: Sequence[Sequence[DisplayImage]],
        wanted: Sequence[str],
    ) -> Figure:
        """A row per image and method, a column per model."""
        able = _able_in_all(runs)
        methods = [method for method in wanted if method in able]
        columns = {}
        teachers = {run.prints["teacher"] for run in runs if "teacher" in run.models}
        pictured: set[str] = set()
        for role in ("teacher", "student"):
            for run, images in zip(runs, shown, strict=True):
                if role not in run.models or (role == "teacher" and run.prints[role] in pictured):
                    continue
                alone = len(runs) == 1 or (role == "teacher" and len(teachers) == 1)
                of_run = run.name.replace("/", "\n")
                heading = (
                    role if alone else f"teacher of\n{of_run}" if role == "teacher" else of_run
                )
                columns[heading] = self._pictured(run, role, images, methods)
                pictured.add(run.prints[role])
        rows = [
            MapRow(
                f"{one.label}\n{method.replace('_', ' ')}",
                one.picture,
                {name: part.maps[method][i].numpy() for name, part in columns.items()},
                {name: part.predictions[i] for name, part in columns.items()},
                one.mask,
                one.known,
            )
            for i, one in enumerate(shown[0])
            for method in methods
        ]
        return map_figure(rows, "Relevance of the class that each model predicts")

    def _pictured(
        self, run: LoadedRun, role: str, shown: Sequence[DisplayImage], methods: Sequence[str]
    ) -> "_Pictured":
        images = torch.stack([one.image for one in shown]).to(run.device)
        with torch.no_grad():
            probabilities = run.models[role](images).softmax(1)
        confidence, predicted = probabilities.max(1)
        maps = {
            method: self._maps_of(
                run, role, method, _layer(run, role, method, 0), images, predicted
            )
            for method in methods
        }
        names = [run.class_name(number) for number in predicted.tolist()]
        return _Pictured(maps, list(zip(names, confidence.tolist(), strict=True)))


class _Pictured(NamedTuple):
    """A model's maps by method, and its prediction of each image."""

    maps: dict[str, Float[Tensor, "n h w"]]
    predictions: list[tuple[str, float]]


def _able_in_all(runs: Sequence[LoadedRun]) -> list[str]:
    lists = [methods for run in runs for methods in run.methods.values()]
    return [method for method in lists[0] if all(method in other for other in lists)]


def _layer(run: LoadedRun, role: str, method: str, place: int) -> str:
    return run.layers[role][place] if ATTRIBUTIONS[method].layered else INPUT


def _read(run: LoadedRun) -> dict[str, Any]:
    """What is known of the run already; not what other definitions of the figures gave."""
    file = run.folder / FILE
    about = {"test_set": run.test_print, "explained": "the true class", "about": METRICS}
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else about
    if content["about"] != METRICS:
        content = about
    if content["test_set"] != run.test_print:
        fix = "Delete it to explain the run anew."
        raise ValueError(message(str(file), "figures of this run", "those of another", fix))
    return {"rows": [], **content}


def _save(folder: RunFolder, name: str, figure: Figure) -> None:
    folder.put(name, lambda draft: figure.savefig(draft, format="png", dpi=80))
