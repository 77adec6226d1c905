"""The checks of each section of a config for itself: its types, and the names that it uses."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader
from torchdistill.common.module_util import get_module
from torchdistill.core.interfaces import registry as procedures
from torchdistill.datasets.registry import BATCH_SAMPLER_DICT, COLLATE_FUNC_DICT
from torchdistill.datasets.util import build_data_loader
from torchdistill.losses import registry as losses
from torchdistill.optim.registry import OPTIM_DICT, SCHEDULER_DICT

from kd_lrp_plugin.config.build import build_model_entry, fill_model, get_stages
from kd_lrp_plugin.training.check.problems import (
    KEYS,
    CheckReport,
    check_keys,
    check_keywords,
    check_mapping,
    check_numbers,
    section,
)
from kd_lrp_plugin.training.experiment import LAST, MONITOR, PRECISIONS
from kd_lrp_plugin.utils.distributed import DistributedContext
from kd_lrp_plugin.utils.registry import unknown_name
from kd_lrp_plugin.utils.validation import check_known, message

SEE = "See torchdistill_configs for examples."
_PROCESSES = {
    "pre_epoch_process": procedures.PRE_EPOCH_PROC_FUNC_DICT,
    "pre_forward_process": procedures.PRE_FORWARD_PROC_FUNC_DICT,
    "post_forward_process": procedures.POST_FORWARD_PROC_FUNC_DICT,
    "post_epoch_process": procedures.POST_EPOCH_PROC_FUNC_DICT,
}


@dataclass(frozen=True)
class _Others:
    """What the check of a section looks up in the others.

    Attributes:
        train: the section.
        datasets: by name.
        roles: the models by role, None for one that cannot be built.
        here: how many processes share the training images.
    """

    train: Mapping[str, Any]
    datasets: Mapping[str, Any]
    roles: Mapping[str, nn.Module | None]
    here: DistributedContext

    @property
    def trained(self) -> str:
        return "student" if "student" in self.roles else "model"


def check_sections(
    findings: CheckReport, content: Mapping[str, Any], here: DistributedContext
) -> None:
    """Note what is wrong with the sections of a config, each for itself.

    Args:
        findings: added to.
        content: of the config, from :func:`kd_lrp_plugin.config.build.construct`.
        here: how many processes share the training images.
    """
    models, train, datasets, test = (
        found if isinstance(found := content.get(name), Mapping) else {}
        for name in ("models", "train", "datasets", "test")
    )
    others = _Others(train, datasets, _build_models(findings, models), here)
    _check_train(findings, train)
    for dotted, stage in get_stages(train).items():
        with findings.at(dotted):
            if not isinstance(stage, Mapping):
                raise ValueError(message("stage", "a stage", repr(stage), SEE))
            if dotted != "train":
                check_keys(findings, "stage", dotted, stage)
            _check_stage(findings, dotted, stage, others)
    _check_loader(findings, "test.test_data_loader", test.get("test_data_loader"), others)


def _build_models(findings: CheckReport, models: Mapping[str, Any]) -> dict[str, nn.Module | None]:
    built: dict[str, nn.Module | None] = {}
    for role, entry in models.items():
        with findings.at(f"models.{role}"):
            check_known("models: key", role, ("model", "teacher_model", "student_model"))
            check_keys(findings, "model", f"models.{role}", entry)
            if isinstance(entry, Mapping) and "kwargs" in entry:
                check_mapping("kwargs", entry["kwargs"], "Write {} for none.")
            built[role.removesuffix("_model")] = None
            model = build_model_entry(entry, f"models.{role}")
            built[role.removesuffix("_model")] = model
            fill_model(model, entry, f"models.{role}", [])
    if not {"model", "student_model"} & set(models):
        findings.add("models", message("models", "a student_model or a model", [*models], SEE))
    return built


def _check_train(findings: CheckReport, train: Mapping[str, Any]) -> None:
    """What holds for all stages."""
    check_keys(findings, "train", "train", train)
    _check_no_checkpoints(findings, "train", train)
    stages = get_stages(train)
    with findings.at("train.monitor"):
        monitor = train.get("monitor", MONITOR)
        if monitor != LAST and not str(monitor).startswith("val_"):
            fix = "For example val_accuracy or val_loss."
            raise ValueError(message("monitor", "a metric of the validation", monitor, fix))
        if monitor != MONITOR and "stage1" in train:
            fix = f"Monitor {MONITOR}: the losses of different stages are no one measure."
            raise ValueError(message("monitor", f"{MONITOR} with stages", monitor, fix))
    with findings.at("train.precision"):
        precision = train.get("precision") or "float32"
        check_known("precision", precision, PRECISIONS)
        mappings = {d: stage for d, stage in stages.items() if isinstance(stage, Mapping)}
        own = [d for d, stage in mappings.items() if stage.get("post_forward_process")]
        if precision == "float16" and own:
            fix = "Leave it out, or use bfloat16: float16 needs a step of its own."
            raise ValueError(message("precision", "no post_forward_process", own, fix))
    with findings.at("train.compile"):
        how = train.get("compile") or False
        if isinstance(how, Mapping):
            check_keywords("compile", torch.compile, how)
            nn.Identity().compile(**how)
        elif not isinstance(how, bool):
            fix = "For example True, or {backend: inductor}."
            raise ValueError(message("compile", "True or options of torch.compile", how, fix))
    if "train" not in stages:
        with findings.at("train"):
            expected = [f"train.stage{number}" for number in range(1, len(stages) + 1)]
            if list(stages) != expected:
                fix = "Number the stages from 1."
                raise ValueError(message("train", f"stages {expected}", list(stages), fix))
            if both := sorted(set(train) & set(KEYS["stage"].split()) - {"log_freq"}):
                got, fix = f"{both} beside them", "Move them into each stage."
                raise ValueError(message("train", "only stages", got, fix))


def _check_no_checkpoints(findings: CheckReport, dotted: str, part: Any) -> None:
    """torchdistill would load a ``src_ckpt`` below ``train`` without asking what is in it."""
    for key, value in part.items() if isinstance(part, Mapping) else ():
        if key == "src_ckpt" and value:
            fix = "Put it under models: torchdistill would load this one with its code."
            findings.add(f"{dotted}.src_ckpt", message("src_ckpt", "none here", value, fix))
        _check_no_checkpoints(findings, f"{dotted}.{key}", value)


# --- a stage ------------------------------------------------------------------------------------


def _check_stage(
    findings: CheckReport, dotted: str, stage: Mapping[str, Any], others: _Others
) -> None:
    first = dotted in ("train", "train.stage1")
    with findings.at(f"{dotted}.num_epochs"):
        epochs = stage.get("num_epochs")
        if not isinstance(epochs, int) or epochs < 1:
            raise ValueError(message("num_epochs", "an integer of 1 or more", epochs, ""))
    for role in ("teacher", "student", "model"):
        entry = stage.get(role) or {}
        _check_role(findings, f"{dotted}.{role}", entry, others)
        if role in others.roles:
            with findings.at(f"{dotted}.{role}"):
                if not entry:
                    fix = "Each stage needs one, for example {forward_proc: forward_batch_only}."
                    raise ValueError(message("model", f"a section {role!r}", stage.get(role), fix))
    for name, known in _PROCESSES.items():
        with findings.at(f"{dotted}.{name}"):
            if name in stage:
                check_known(name, stage[name], known)
    _check_criterion(findings, f"{dotted}.criterion", stage.get("criterion") or {}, others)
    optimizer, trial = stage.get("optimizer") or {}, None
    if optimizer or first:
        trial = _check_optimizer(findings, f"{dotted}.optimizer", optimizer, (stage, others))
    if scheduler := stage.get("scheduler"):
        _check_scheduler(findings, f"{dotted}.scheduler", scheduler, (trial, stage, others))
    if (stopping := stage.get("early_stopping")) is not None:
        with findings.at(f"{dotted}.early_stopping"):
            patience = stopping.get("patience") if isinstance(stopping, Mapping) else None
            fix = "For example {patience: 5, min_delta: 0.001}; YAML reads 1e-3 as text."
            if not isinstance(patience, int) or patience < 1:
                raise ValueError(message("early_stopping", "a patience >= 1", stopping, fix))
            delta = stopping.get("min_delta", 0.0)
            if not isinstance(delta, int | float) or delta < 0:
                raise ValueError(message("early_stopping", "a min_delta >= 0", repr(delta), fix))
            check_keys(findings, "early_stopping", f"{dotted}.early_stopping", stopping)
    for name in ("train_data_loader", "val_data_loader"):
        if stage.get(name) is not None or first:
            _check_loader(findings, f"{dotted}.{name}", stage.get(name), others)


@section("role", "what a stage does with a model", "For example {requires_grad: False}.")
def _check_role(
    findings: CheckReport, dotted: str, role: Mapping[str, Any], others: _Others
) -> None:
    name = dotted.rpartition(".")[2]
    with findings.at(f"{dotted}.forward_proc"):
        if role:
            known = procedures.FORWARD_PROC_FUNC_DICT
            check_known("key", role.get("forward_proc"), known)
            recorded = str(role["forward_proc"]).startswith("kd_lrp_recorder(")
            hooked = recorded or role.get("forward_hook")
            if hooked and others.train.get("compile") and name != "teacher":
                fix = "Leave train.compile out: hooks and second derivatives do not compile."
                got = role["forward_proc"]
                raise ValueError(message("compile", "a student without hooks", got, fix))
    several = others.here.world > 1 and name in others.roles
    with findings.at(f"{dotted}.requires_grad"):
        if several and name == "teacher" and role.get("requires_grad", True):
            fix = "Set requires_grad: False; only the student is trained by several."
            raise ValueError(message("teacher", "a frozen one under torchrun", True, fix))
    for key, why in {
        "wrapper": "under torchrun the driver wraps the student",
        "dst_ckpt": "the run folder holds what is trained",
    }.items():
        if role.get(key):
            findings.remark(f"{dotted}.{key}", f"not used, {why}")
    model = others.roles.get(name)
    if model is not None and not role.get("auxiliary_model_wrapper"):  # that is another model
        _check_paths(findings, dotted, role, model)


def _check_paths(
    findings: CheckReport, dotted: str, role: Mapping[str, Any], model: nn.Module
) -> None:
    """Every path to a part of a model; torchdistill would pass over those that lead nowhere."""
    rebuilt, added = role.get("sequential") or [], role.get("adaptations") or {}
    with findings.at(f"{dotted}.sequential"):
        for path in _paths("sequential", rebuilt):
            if str(path).startswith("+"):
                check_known("adaptations", path[1:], added)
            else:
                _check_path("sequential", path, model)
    with findings.at(f"{dotted}.frozen_modules"):
        for path in _paths("frozen_modules", role.get("frozen_modules", [])):
            kind = re.fullmatch(r"instance\((.*)\)", str(path))
            if kind and not rebuilt:
                kinds = {c.__name__ for m in model.modules() for c in type(m).__mro__}
                check_known("frozen_modules", kind[1], kinds & set(vars(nn)))
            elif f"+{path}" not in rebuilt:
                _check_path("frozen_modules", path, model)
    with findings.at(f"{dotted}.forward_hook"):
        hooks = role.get("forward_hook", {})
        check_mapping("forward_hook", hooks, "For example {output: [layer4]}.")
        for key, paths in hooks.items():
            check_known("forward_hook", key, ("input", "output"))
            for path in _paths(f"forward_hook.{key}", paths):
                if not (rebuilt and str(path).startswith("+")):
                    _check_path(f"forward_hook.{key}", str(path).removeprefix("+"), model)


def _paths(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        fix = "For example [layer3, layer4]."
        raise ValueError(message(where, "a list of module paths", repr(value), fix))
    return value


def _check_path(where: str, path: Any, model: nn.Module) -> None:
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    if path in modules:
        return
    if path == ".":
        hooked = where.startswith("forward_hook")
        fix = "Leave it out: without a hook, too, '.' is what the model returns." if hooked else ""
        raise ValueError(message(where, "parts of the model", "'.'", fix))
    found = get_module(model, path) if isinstance(path, str) else None  # a parameter, or layer.-1
    if not isinstance(found, nn.Module | nn.Parameter):
        raise ValueError(unknown_name(where, path, modules))


@section("criterion", "a loss", "Give key and kwargs.")
def _check_criterion(
    findings: CheckReport, dotted: str, criterion: Mapping[str, Any], others: _Others
) -> None:
    before = len(findings.problems)
    with findings.at(f"{dotted}.key"):
        check_known("key", criterion.get("key"), losses.HIGH_LEVEL_LOSS_DICT)
    kwargs = criterion.get("kwargs") or {}
    check_mapping("kwargs", kwargs, "")
    check_numbers("kwargs", kwargs)
    if criterion.get("key") == "WeightedSumLoss":
        check_keys(findings, "WeightedSumLoss", f"{dotted}.kwargs", kwargs)
        terms = kwargs.get("sub_terms") or {}
        check_mapping("kwargs.sub_terms", terms, "Give each term a name.")
        for name, term in terms.items():
            _check_term(findings, f"{dotted}.kwargs.sub_terms.{name}", term)
    if len(findings.problems) == before:
        losses.get_high_level_loss(criterion)


def _check_term(findings: CheckReport, dotted: str, term: Any) -> None:
    known = losses.LOSS_DICT | losses.LOW_LEVEL_LOSS_DICT | losses.MIDDLE_LEVEL_LOSS_DICT
    with findings.at(dotted):
        check_mapping("term", term, "Give criterion and weight.")
        for key in ("criterion", "weight"):
            check_known("key", key, term)
        with findings.at(f"{dotted}.criterion"):
            entry = term["criterion"] or {}
            check_mapping("criterion", entry, "Give key and kwargs.")
            check_known("key", entry.get("key"), known)
            losses.get_mid_level_loss(entry, term.get("criterion_wrapper"))


_Stage = tuple[Mapping[str, Any], _Others]


@section("optimizer", "an optimizer", "For example {key: Adam, kwargs: {lr: 0.001}}.")
def _check_optimizer(
    findings: CheckReport, dotted: str, optimizer: Mapping[str, Any], rest: _Stage
) -> Optimizer:
    """Also makes one, of a number per group, for the scheduler to be tried with."""
    stage, others = rest
    check_known("key", optimizer.get("key"), OPTIM_DICT)
    make = OPTIM_DICT[optimizer["key"]]
    check_keywords("kwargs", make, optimizer["kwargs"])
    steps = optimizer.get("grad_accum_step", 1)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(message("grad_accum_step", "an integer >= 1", steps, ""))
    norm = optimizer.get("max_grad_norm")
    if norm is not None and not (isinstance(norm, int | float) and norm > 0):
        raise ValueError(message("max_grad_norm", "a number above 0", repr(norm), "For example 1."))
    read, ignored = "module_wise_configs", "module_wise_kwargs"  # as torchdistill has it
    if "teacher" not in others.roles:
        read, ignored = ignored, read
    if optimizer.get(ignored):
        raise ValueError(message(ignored, f"{read} with these models", ignored, "Rename it."))
    defaults = make([nn.Parameter(torch.zeros(1))], **optimizer["kwargs"]).defaults
    groups: list[dict[str, Any]] = []
    for place, entry in enumerate(optimizer.get(read) or []):
        where = f"{read}.{place}"
        check_mapping(where, entry, "For example {module: layer4, kwargs: {lr: 0.001}}.")
        check_known(f"{where}: key", "module", entry)
        kwargs = entry.get("kwargs") or {}
        check_numbers(f"{where}.kwargs", kwargs)
        for key in kwargs:
            check_known(f"{where}.kwargs", key, defaults)
        groups.append({"params": [nn.Parameter(torch.zeros(1))], **kwargs})
        role = "teacher" if entry.get("is_teacher") else others.trained
        model, how = others.roles.get(role), stage.get(role)
        redesigned = ("sequential", "auxiliary_model_wrapper")
        if model and isinstance(how, Mapping) and not any(how.get(key) for key in redesigned):
            _check_path(f"{where}.module", entry["module"], model)
    groups = groups or [{"params": [nn.Parameter(torch.zeros(1))]}]
    return make(groups, **optimizer["kwargs"])


@section("scheduler", "a scheduler", "For example {key: StepLR, kwargs: {step_size: 5}}.")
def _check_scheduler(
    findings: CheckReport,
    dotted: str,
    scheduler: Mapping[str, Any],
    rest: tuple[Optimizer | None, Mapping[str, Any], _Others],
) -> None:
    trial, stage, others = rest
    check_known("key", scheduler.get("key"), SCHEDULER_DICT)
    make, kwargs = SCHEDULER_DICT[scheduler["key"]], scheduler["kwargs"]
    check_keywords("kwargs", make, kwargs)
    within = scheduler.get("scheduling_step", 0)
    if not isinstance(within, int):
        raise ValueError(message("scheduling_step", "an integer", repr(within), ""))
    if trial is None:  # the optimizer is wrong, or that of an earlier stage
        return
    built = make(trial, **kwargs)
    monitor = others.train.get("monitor", MONITOR)
    mode = "max" if monitor == LAST or str(monitor).endswith("accuracy") else "min"
    if isinstance(built, ReduceLROnPlateau) and built.mode != mode:
        got, fix = f"mode {built.mode!r}", f"Set scheduler.kwargs.mode to {mode}."
        raise ValueError(message("scheduler", f"mode {mode!r} for {monitor}", got, fix))
    if isinstance(built, ReduceLROnPlateau) and within > 0:
        fix = "Leave it out: there is no metric within an epoch."
        raise ValueError(message("scheduling_step", "none", within, fix))
    trial.step()
    epochs = stage.get("num_epochs")
    for _ in range(epochs if isinstance(epochs, int) and within <= 0 else 0):  # OneCycleLR ends
        built.step(0.0) if isinstance(built, ReduceLROnPlateau) else built.step()


# --- data ---------------------------------------------------------------------------------------


@section("loader", "a loader", "Give dataset_id, sampler and kwargs.")
def _check_loader(
    findings: CheckReport, dotted: str, loader: Mapping[str, Any], others: _Others
) -> None:
    check_known("dataset_id", loader.get("dataset_id"), others.datasets)
    for key in ("sampler", "kwargs"):
        check_known("keys", key, loader)
    fix = "For example {class_or_func: !import_get {key: torch.utils.data.RandomSampler}}."
    check_mapping("sampler", loader["sampler"], fix)
    check_keywords("kwargs", DataLoader, loader["kwargs"])
    if loader["kwargs"].get("persistent_workers"):
        fix = "Leave it out: workers that live on cannot be brought back when a run goes on."
        raise ValueError(message("kwargs", "no persistent_workers", True, fix))
    name = loader.get("collate_fn")
    if name is not None and name not in COLLATE_FUNC_DICT:
        fix = "!import_call of kd_lrp_plugin.torchdistill.mixup makes one."
        raise ValueError(f"{unknown_name('collate_fn', name, COLLATE_FUNC_DICT)} {fix}")
    if (batches := loader.get("batch_sampler")) is not None:
        check_mapping("batch_sampler", batches, "Give key and kwargs.")
        check_known("batch_sampler.key", batches.get("key"), BATCH_SAMPLER_DICT)
    dataset = others.datasets[loader["dataset_id"]]
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        fix = "For example !import_call {key: kd_lrp_plugin.torchdistill.phantom, init: ...}."
        name = f"datasets.{loader['dataset_id']}"
        findings.add(name, message("data set", "images that can be counted", dataset, fix))
        return
    trains = dotted.endswith("train_data_loader")
    world = others.here.world if trains else 1
    if world > 1 and (kwargs := loader["sampler"].get("kwargs")):
        expected, fix = "none under torchrun, which shares out the images", "Leave them out."
        raise ValueError(message("sampler.kwargs", expected, [*kwargs], fix))
    if not callable(loader["sampler"].get("class_or_func")):
        got = repr(loader["sampler"].get("class_or_func"))
        raise ValueError(message("sampler.class_or_func", "a class or function", got, fix))
    for processes in (1, world):  # the check itself takes its step alone
        built = share(dataset, loader, DistributedContext(others.here.device, 0, processes))
    if built.batch_sampler is None:
        raise ValueError(message("kwargs.batch_size", "a number", None, "For example 32."))
    size = getattr(built.batch_sampler, "batch_size", 1)
    dropped = len(dataset) % size if getattr(built.batch_sampler, "drop_last", False) else 0
    if not trains and dropped:
        fix = f"Leave it out: the last images, {dropped} of {len(dataset)}, would not be counted."
        raise ValueError(message("kwargs.drop_last", "False", True, fix))
    if len(built) == 0:
        got = "none" if world == 1 else f"none for each of {world} processes"
        fix = "Lower batch_size, or set drop_last: False." if len(dataset) else "Add images."
        raise ValueError(message("batches", "one or more in an epoch", got, fix))


def share(dataset: Any, loader: Mapping[str, Any], here: DistributedContext) -> DataLoader:
    """The loader that torchdistill makes of a section, for one process of those that train.

    Args:
        dataset: what it loads.
        loader: the section.
        here: the process; with others, the group of PyTorch need not have been joined.
    """
    if here.world > 1:
        sampler = loader["sampler"]
        place = {"num_replicas": here.world, "rank": here.rank}
        loader = {**loader, "sampler": {**sampler, "kwargs": place | (sampler.get("kwargs") or {})}}
    return build_data_loader(dataset, loader, here.world > 1)
