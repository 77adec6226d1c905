"""Is a model looking where it should? What its border, corners and background are worth to it.

Without knowing a shortcut: the share of its relevance in regions where nothing should tell the
class, beside the chance level and the teacher's, and what it predicts once these regions are
replaced. A model whose predictions depend on them has learnt something else than the object; so
has one that is still right once the object itself is gone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.ndimage import binary_fill_holes, label
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from kd_lrp_plugin.attribution.localisation import area_share, relevance_mass_accuracy
from kd_lrp_plugin.attribution.methods import BATCH, attribute
from kd_lrp_plugin.evaluation.audit_inputs import open_audited
from kd_lrp_plugin.evaluation.explain_inputs import (
    ExplainOptions,
    LoadedRun,
    Sample,
    make_sample,
    sample_indices,
)
from kd_lrp_plugin.losses import resize_maps
from kd_lrp_plugin.plots.maps import MapRow, map_figure
from kd_lrp_plugin.utils.files import get_command, put, read_json, write_json
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message

MOST = 400  # images, unless asked otherwise
BORDER = 1 / 8  # of the shorter side: the width of the border, half of a corner's side
SHOWN = 6  # images in the picture
METHOD = "gradient_activation"
FILE = "audit.json"
Region = Bool[Tensor, "n h w"]


@dataclass(frozen=True)
class AuditOptions:
    """What is audited, and how.

    Attributes:
        layer: of the maps; None for the deepest before the last reduction.
        samples: images at most.
        data: a folder with a folder of images per class, instead of the run's test set.
        device: to compute on.
        safe: see :func:`kd_lrp_plugin.runs.loading.load_run`.

    Raises:
        ValueError: for less than one image.
    """

    layer: str | None = None
    samples: int = MOST
    data: str | Path | None = None
    device: torch.device | str = "cpu"
    safe: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(message("audit: samples", "1 or more", self.samples, "Use 400."))


def audit(folder: str | Path, options: AuditOptions | None = None) -> dict[str, Any]:
    """What the regions where nothing should tell the class are worth to a run's models.

    The regions are border, corners, background; where the data set puts markers on its images, the
    marker, unless it is everywhere; and, of images with a mask, what is most relevant outside of
    it: the same share of each image's pixels as a corner has, another part for each model.

    Writes ``audit.json`` and ``audit.png`` into the run folder: the images whose prediction changes
    most. Of other images than the test set, the files have the folder's name too; those of another
    folder of this name are not overwritten.

    Args:
        folder: a finished run, or a model in a folder of timm's, with ``data``.
        options: all of them as they are by themselves, if None.

    Returns:
        ``images``; ``data``, the folder of other images; ``relevance``, by role and region the mean
        share of positive relevance there (``mean``), and the region's share of the image
        (``chance``), of images with a mask also for all that lies outside of it, which is not
        replaced; ``replaced``, by role, region
        and replacement (``blur``, ``mean``, ``swap``: another image's) the accuracy before and
        after (``accuracy_before``, ``accuracy``) and the share of predictions that change
        (``flips``); ``object_removed``, by role, accuracy where the masked object takes the mean of
        the image, of images with a mask, or None without masks; ``most_flips``, the largest share
        of the student's.

    Raises:
        FileNotFoundError: if there is no finished run.
        FileExistsError: where the files are those of another folder of this name.
        ValueError: for a run that cannot be loaded, an unknown layer, or images of other classes
            than the run's.

    Reference:
        Geirhos et al., Nature Machine Intelligence 2020 (shortcuts); Ross et al., IJCAI 2017
        (right for the right reasons). The regions and replacements are ours.
    """
    options = options or AuditOptions()
    table, picture = name_files(options)
    data = None if options.data is None else str(Path(options.data).resolve())
    _refuse_another_folder(Path(folder) / table, data)
    layers = [options.layer] if options.layer else []
    asked = ExplainOptions(
        methods=[METHOD], layers=layers, device=options.device, safe=options.safe
    )
    run = open_audited(Path(folder), asked, options.data)
    indices = sample_indices(run, options.samples)
    if len(indices) < 2:
        got, fix = len(indices), "One takes the region of another: raise samples, or add images."
        raise ValueError(message(f"audit {folder}", "two images or more", got, fix))
    sample = make_sample(run, indices, options.device)
    regions = find_regions(sample.images)
    if markers := find_markers(run, indices):
        regions["marker"] = torch.stack(markers)
    answers: dict[str, Answers] = {}
    maps: dict[str, Float[Tensor, "n h2 w2"]] = {}
    regions_of: dict[str, dict[str, Region]] = {}
    found: dict[str, Any] = {"images": len(sample.labels), "command": get_command()}
    found |= run.folder.of
    found |= {} if data is None else {"data": data}
    others = {how: make(sample.images) for how, make in _REPLACEMENTS.items()}
    parts: dict[str, dict[str, Any]] = {"relevance": {}, "replaced": {}, "object_removed": {}}
    for role in current_progress().track(list(run.models), "auditing", len(run.models)):
        model, layer = run.models[role], run.layers[role][0]
        # Of what the model predicts, for what it looks at is the question.
        before = _predict(model, sample.images)
        maps[role] = attribute(model, sample.images, before.argmax(1), METHOD, layer)
        regions_of[role] = dict(regions)
        if sample.masks is not None:
            outside = find_most_relevant(maps[role], ~sample.masks)
            regions_of[role]["most relevant outside"] = outside
        answers[role] = ask(model, sample.images, regions_of[role], others, before)
        measured = dict(regions_of[role])
        if sample.masks is not None:
            measured["outside the mask"] = ~sample.masks
        parts["relevance"][role] = measure_relevance(maps[role], measured)
        parts["replaced"][role] = measure_replacements(
            answers[role], sample.labels, regions_of[role]
        )
        parts["object_removed"][role] = _remove_object(model, sample, answers[role])
    found |= parts
    flips = [r["flips"] for of in found["replaced"]["student"].values() for r in of.values()]
    found["most_flips"] = max(flips)
    figure = _draw(run, sample, regions_of["student"], maps["student"], answers["student"])
    put(run.folder / picture, lambda file: figure.savefig(file, format="png"))
    write_json(run.folder / table, found)
    return found


def name_files(options: AuditOptions) -> tuple[str, str]:
    """Table and picture of an audit, in the run folder."""
    if options.data is None:
        return FILE, "audit.png"
    name = Path(options.data).resolve().name
    return f"audit-{name}.json", f"audit-{name}.png"


def _refuse_another_folder(file: Path, data: str | None) -> None:
    """Raise FileExistsError where an audit of other images would be overwritten."""
    if data is None or not file.is_file():
        return
    before = read_json(file, "Delete it.").get("data", data)
    if before != data:
        fix = "Rename one of the folders, or move the file away."
        got = f"that of {before}"
        raise FileExistsError(message(str(file), f"the audit of {data}", got, fix))


def find_regions(images: Float[Tensor, "n c h w"]) -> dict[str, Region]:
    """Border, corners and background of each image.

    The background is what lies outside the largest bright or textured part: pixels that differ
    from the median of the image's edge by more than a tenth of its range, with holes filled. An
    image without such a part, or with nothing else, has no background: an empty region.

    Example:
        >>> images = torch.zeros(1, 1, 16, 16)
        >>> images[0, 0, 4:12, 4:12] = 1
        >>> {name: int(region.sum()) for name, region in find_regions(images).items()}
        {'border': 112, 'corners': 64, 'background': 192}
    """
    n, _, height, width = images.shape
    side = max(1, round(BORDER * min(height, width)))
    border = torch.ones(n, height, width, dtype=torch.bool)
    border[:, side:-side, side:-side] = False
    corners = torch.zeros_like(border)
    for rows in (slice(None, 2 * side), slice(-2 * side, None)):
        for columns in (slice(None, 2 * side), slice(-2 * side, None)):
            corners[:, rows, columns] = True
    grey = images.mean(1).cpu().numpy()
    background = torch.stack([torch.from_numpy(~_find_foreground(image)) for image in grey])
    background[background.all(2).all(1)] = False
    return {"border": border, "corners": corners, "background": background}


def find_most_relevant(
    maps: Float[Tensor, "n h2 w2"], where: Region, share: float = (2 * BORDER) ** 2
) -> Region:
    """The most relevant pixels of each image among those that are allowed.

    Args:
        maps: relevance; its positive part counts.
        where: pixels to choose from.
        share: of the image's pixels that are chosen, fewer where fewer are relevant or allowed.

    Example:
        >>> maps = torch.arange(16.0).reshape(1, 4, 4)
        >>> where = torch.ones(1, 4, 4, dtype=torch.bool)
        >>> where[0, 3, 3] = False
        >>> find_most_relevant(maps, where, share=2 / 16).nonzero()[:, 1:].tolist()
        [[3, 1], [3, 2]]
    """
    _, height, width = where.shape
    relevance = resize_maps(maps.clamp(min=0).cpu(), (height, width)) * where.cpu()
    most = max(1, round(share * height * width))
    chosen = torch.zeros(len(where), height * width, dtype=torch.bool)
    chosen.scatter_(1, relevance.flatten(1).topk(most, dim=1).indices, True)
    return chosen.view(where.shape) & (relevance > 0)


def find_markers(run: LoadedRun, indices: Sequence[int]) -> list[Bool[Tensor, "h w"]]:
    """Where the data set has put a marker; empty where it has put none, or over all the image."""
    find = getattr(run.test_set, "marker", None)
    if find is None:
        return []
    nothing = np.zeros(run.summary["image_shape"][-2:], bool)
    found = [find(index) for index in indices]
    # Of all of the image, what is replaced is no longer the region but the image.
    return [torch.from_numpy(nothing if m is None or m.all() else m) for m in found]


def _find_foreground(image: Float[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    differs = np.abs(image - np.median(edge)) > 0.1 * max(float(np.ptp(image)), 1e-12)
    parts, count = label(differs)
    if count == 0:
        return np.zeros(image.shape, bool)
    largest = 1 + int(np.bincount(parts.ravel())[1:].argmax())
    return binary_fill_holes(parts == largest)


def measure_relevance(
    maps: Float[Tensor, "n h2 w2"], regions: Mapping[str, Region]
) -> dict[str, dict[str, float | None]]:
    """Mean share of positive relevance in each region, beside the region's share of the image."""
    found = {}
    for name, region in regions.items():
        shares = relevance_mass_accuracy(maps, region)
        known = ~shares.isnan()
        chance = area_share(region)[known]
        found[name] = {
            "mean": float(shares[known].mean()) if known.any() else None,
            "chance": float(chance.mean()) if known.any() else None,
            "n": int(known.sum()),
        }
    return found


def replace_region(
    images: Float[Tensor, "n c h w"], region: Region, how: str
) -> Float[Tensor, "n c h w"]:
    """The images with a region of each blurred, of the image's mean colour, or another image's.

    Args:
        images: as the model takes them.
        region: pixels to replace.
        how: "blur" (its standard deviation is an eighth of the shorter side), "mean" or "swap" (of
            the next image, the last one of the first).

    Example:
        >>> images = torch.arange(2.0)[:, None, None, None].expand(2, 1, 4, 4)
        >>> region = torch.zeros(2, 4, 4, dtype=torch.bool)
        >>> region[:, 0] = True
        >>> replace_region(images, region, "swap")[:, 0, :2, 0].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    return _put(images, region, _REPLACEMENTS[how](images))


def _put(images: Tensor, region: Region, other: Tensor) -> Float[Tensor, "n c h w"]:
    return torch.where(region[:, None].to(images.device), other, images)


def _blur(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    shorter = min(images.shape[-2:])
    width = min(2 * (3 * shorter // 8) + 1, 2 * shorter - 1)  # odd, and the padding has to fit
    sigma = [shorter / 8, shorter / 8]
    rows = gaussian_blur(images, [width, 1], sigma)  # along one side at a time: the kernel is wide
    return gaussian_blur(rows, [1, width], sigma)


_REPLACEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "blur": _blur,
    "mean": lambda images: images.mean((2, 3), keepdim=True).expand_as(images),
    "swap": lambda images: images.roll(-1, 0),
}


@dataclass(frozen=True)
class Answers:
    """What a model says of images, as probabilities (n, outputs) on the CPU.

    Attributes:
        before: of the images as they are.
        after: of the images with a region replaced, by region and replacement; none of a region
            that no image has.
    """

    before: Float[Tensor, "n outputs"]
    after: dict[tuple[str, str], Float[Tensor, "n outputs"]]


def ask(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    regions: Mapping[str, Region],
    others: Mapping[str, Float[Tensor, "n c h w"]] | None = None,
    before: Float[Tensor, "n outputs"] | None = None,
) -> Answers:
    """What the model says of the images, and of them with each region replaced in each way.

    Args:
        model: in evaluation mode.
        images: as the model takes them.
        regions: pixels to replace, by name.
        others: what stands in the place of the images, by replacement; made here if None.
        before: what the model says of the images as they are; asked here if None.
    """
    if others is None:
        others = {how: make(images) for how, make in _REPLACEMENTS.items()}
    after = {
        (name, how): _predict(model, _put(images, region, other))
        for name, region in regions.items()
        if region.any()
        for how, other in others.items()
    }
    return Answers(_predict(model, images) if before is None else before, after)


def measure_replacements(
    answers: Answers, labels: Int[Tensor, " n"], regions: Mapping[str, Region]
) -> dict[str, dict[str, dict[str, float]]]:
    """By region and replacement: accuracy before and after, and the share of changed predictions.

    Images without the region are left out; a region that no image has is, too.
    """
    before, labels = answers.before.argmax(1), labels.cpu()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (name, how), probabilities in answers.after.items():
        after, has = probabilities.argmax(1), regions[name].any(2).any(1)
        found.setdefault(name, {})[how] = {
            "accuracy_before": float((before == labels)[has].float().mean()),
            "accuracy": float((after == labels)[has].float().mean()),
            "flips": float((after != before)[has].float().mean()),
        }
    return found


def _remove_object(model: nn.Module, sample: Sample, answers: Answers) -> dict[str, float] | None:
    """Accuracy with the masked object gone: a model that is still right sees something else."""
    if sample.masks is None:
        return None
    labels = sample.labels.cpu()
    after = _predict(model, replace_region(sample.images, sample.masks, "mean"))
    return {
        "accuracy_before": float((answers.before.argmax(1) == labels).float().mean()),
        "accuracy": float((after.argmax(1) == labels).float().mean()),
    }


@torch.no_grad()
def _predict(model: nn.Module, images: Tensor) -> Float[Tensor, "n outputs"]:
    return torch.cat([model(part).float().softmax(1).cpu() for part in images.split(BATCH)])


def _draw(
    run: LoadedRun,
    sample: Sample,
    regions: Mapping[str, Region],
    maps: Float[Tensor, "n h2 w2"],
    answers: Answers,
) -> Any:
    """The images whose predicted class loses most by a replacement, before and after it."""
    classes = answers.before.argmax(1, keepdim=True)
    effects: list[tuple[float, int, str, str]] = []
    for (name, how), after in answers.after.items():
        lost = (answers.before.gather(1, classes) - after.gather(1, classes)).squeeze(1)
        effects += [(float(lost[i]), i, name, how) for i in range(len(lost))]
    chosen: dict[int, tuple[float, int, str, str]] = {}
    for effect in sorted(effects, reverse=True):
        chosen.setdefault(effect[1], effect)
        if len(chosen) == SHOWN:
            break
    rows = []
    for _, index, name, how in chosen.values():
        said = [
            (run.class_name(int(of[index].argmax())), float(of[index].max()))
            for of in (answers.before, answers.after[name, how])
        ]
        picture = sample.images[index].mean(0).cpu()
        low, high = picture.min(), picture.max()
        column = "relevance; below, said once the region is replaced"
        rows.append(
            MapRow(
                f"{run.class_name(int(sample.labels[index]))}\n{name}\n{how}",
                ((picture - low) / (high - low).clamp(min=1e-12)).numpy(),
                {column: maps[index].numpy()},
                {"image": said[0], column: said[1]},
                regions[name][index].numpy(),
            )
        )
    return map_figure(rows, "Where a replaced region changes the prediction most", "region")
