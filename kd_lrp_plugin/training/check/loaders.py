"""The check of a loader, and the share of the images that a process gets from it."""

import inspect
import os
from collections.abc import Mapping
from copy import copy
from typing import Any

from torch.utils.data import DataLoader
from torchdistill.datasets.registry import (
    BATCH_SAMPLER_DICT,
    COLLATE_FUNC_DICT,
    DATASET_WRAPPER_DICT,
)
from torchdistill.datasets.util import build_data_loader

from kd_lrp_plugin.torchdistill.collate import MIXUP
from kd_lrp_plugin.training.check.problems import (
    CheckReport,
    ConfigParts,
    check_keywords,
    check_mapping,
    section,
)
from kd_lrp_plugin.utils.distributed import DistributedContext
from kd_lrp_plugin.utils.registry import unknown_name
from kd_lrp_plugin.utils.validation import check_known, message


@section("loader", "a loader", "Give dataset_id, sampler and kwargs.")
def check_loader(
    report: CheckReport, key_path: str, loader: Mapping[str, Any], parts: ConfigParts
) -> None:
    check_known("dataset_id", loader.get("dataset_id"), parts.datasets)
    for key in ("sampler", "kwargs"):
        check_known("keys", key, loader)
    fix = "For example {class_or_func: !import_get {key: torch.utils.data.RandomSampler}}."
    check_mapping("sampler", loader["sampler"], fix)
    check_keywords("kwargs", DataLoader, loader["kwargs"])
    workers, most = loader["kwargs"].get("num_workers") or 0, 8 * max(4, os.cpu_count() or 1)
    if not 0 <= workers <= most:
        fix = "Each is a process that holds the data set; as many as processors are enough."
        raise ValueError(message("kwargs.num_workers", f"0 to {most}", workers, fix))
    if loader["kwargs"].get("persistent_workers"):
        fix = "Leave it out: workers that live on cannot be brought back when a run resumes."
        raise ValueError(message("kwargs", "no persistent_workers", True, fix))
    name = loader.get("collate_fn")
    if name is not None and name not in COLLATE_FUNC_DICT:
        fix = "!import_call of kd_lrp_plugin.torchdistill.mixup makes one."
        raise ValueError(f"{unknown_name('collate_fn', name, COLLATE_FUNC_DICT)} {fix}")
    trains = key_path.endswith("train_data_loader")
    if not trains and str(name).startswith(MIXUP):
        fix = "Leave it out: what is evaluated are the images as they are."
        raise ValueError(message("collate_fn", "none that mixes images", name, fix))
    if trains and not loader.get("requires_supp", True):
        fix = "Leave it out: a step is given what wrappers add, be it nothing."
        raise ValueError(message("requires_supp", "True", loader["requires_supp"], fix))
    if (wrapper := loader.get("dataset_wrapper")) is not None:
        check_mapping("dataset_wrapper", wrapper, "Give key and kwargs.")
        check_known("dataset_wrapper.key", wrapper.get("key"), DATASET_WRAPPER_DICT)
    if (batches := loader.get("batch_sampler")) is not None:
        check_mapping("batch_sampler", batches, "Give key and kwargs.")
        check_known("batch_sampler.key", batches.get("key"), BATCH_SAMPLER_DICT)
    dataset = parts.datasets[loader["dataset_id"]]
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        fix = "For example !import_call {key: kd_lrp_plugin.torchdistill.phantom, init: ...}."
        name = f"datasets.{loader['dataset_id']}"
        report.add(name, message("data set", "images that can be counted", dataset, fix))
        return
    world_size = parts.context.world_size if trains else 1
    if world_size > 1 and (kwargs := loader["sampler"].get("kwargs")):
        expected, fix = "none under torchrun, which shares out the images", "Leave them out."
        raise ValueError(message("sampler.kwargs", expected, [*kwargs], fix))
    if not callable(loader["sampler"].get("class_or_func")):
        got = repr(loader["sampler"].get("class_or_func"))
        raise ValueError(message("sampler.class_or_func", "a class or function", got, fix))
    _check_order(loader["sampler"]["class_or_func"])
    for processes in (1, world_size):  # the check itself takes its step alone
        built = share(dataset, loader, DistributedContext(parts.context.device, 0, processes))
    if built.batch_sampler is None:
        raise ValueError(message("kwargs.batch_size", "a number", None, "For example 32."))
    if name is not None and not hasattr(built.dataset, "__dict__"):
        fix = "Give the data set a class of its own, or leave collate_fn out."
        expected = "a data set that knows the images of a batch, which seed what is drawn for it"
        raise ValueError(message("collate_fn", expected, type(built.dataset).__name__, fix))
    size = getattr(built.batch_sampler, "batch_size", 1)
    dropped = len(dataset) % size if getattr(built.batch_sampler, "drop_last", False) else 0
    if not trains and dropped:
        fix = f"Leave it out: the last images, {dropped} of {len(dataset)}, would not be counted."
        raise ValueError(message("kwargs.drop_last", "False", True, fix))
    if len(built) == 0:
        got = "none" if world_size == 1 else f"none for each of {world_size} processes"
        fix = "Lower batch_size, or set drop_last: False." if len(dataset) else "Add images."
        raise ValueError(message("batches", "one or more in an epoch", got, fix))


def _check_order(sampler: Any) -> None:
    """torchdistill calls a sampler with the data set, whatever its first argument is."""
    first = next(iter(inspect.signature(sampler).parameters), None)
    if first in ("weights", "indices"):
        name = getattr(sampler, "__name__", repr(sampler))
        fix = "Name a function of yours, of the data set and keywords, which returns the sampler."
        expected = "one whose first argument is the data set"
        where = "sampler.class_or_func"
        raise ValueError(message(where, expected, f"{name} of {first}", fix))


def share(dataset: Any, loader: Mapping[str, Any], context: DistributedContext) -> DataLoader:
    """The loader that torchdistill makes of a section, for one process of those that train.

    Args:
        dataset: what it loads.
        loader: the section.
        context: the process; with others, the group of PyTorch need not have been joined.
    """
    if context.world_size > 1:
        sampler = loader["sampler"]
        sharing = {"num_replicas": context.world_size, "rank": context.rank}
        loader = {
            **loader,
            "sampler": {**sampler, "kwargs": sharing | (sampler.get("kwargs") or {})},
        }
    # A copy, since a wrapper (torchdistill's for SSKD) may change what it wraps.
    return build_data_loader(copy(dataset), loader, context.world_size > 1)
