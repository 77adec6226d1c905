"""The checks of how a stage is optimised: criterion, optimizer, scheduler."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchdistill.losses import registry as losses
from torchdistill.optim.registry import OPTIM_DICT, SCHEDULER_DICT

from kd_lrp_plugin.training.check.problems import (
    CheckReport,
    ConfigParts,
    check_keys,
    check_keywords,
    check_mapping,
    check_numbers,
    check_path,
    check_scalars,
    is_number,
    section,
)
from kd_lrp_plugin.training.experiment import LAST, MONITOR, OF_PREDICTIONS
from kd_lrp_plugin.utils.validation import check_known, message


@section("criterion", "a loss", "Give key and kwargs.")
def check_criterion(
    report: CheckReport, key_path: str, criterion: Mapping[str, Any], parts: ConfigParts
) -> None:
    before = len(report.problems)
    with report.at(f"{key_path}.key"):
        check_known("key", criterion.get("key"), losses.HIGH_LEVEL_LOSS_DICT)
    kwargs = criterion.get("kwargs") or {}
    check_mapping("kwargs", kwargs, "")
    if make := losses.HIGH_LEVEL_LOSS_DICT.get(criterion.get("key")):
        check_scalars("kwargs", make, kwargs)
    if criterion.get("key") == "WeightedSumLoss":
        check_keys(report, "WeightedSumLoss", f"{key_path}.kwargs", kwargs)
        terms = kwargs.get("sub_terms") or {}
        check_mapping("kwargs.sub_terms", terms, "Give each term a name.")
        for name, term in terms.items():
            _check_term(report, f"{key_path}.kwargs.sub_terms.{name}", term)
    if len(report.problems) == before:
        _check_nothing_to_learn(losses.get_high_level_loss(criterion))


def _check_nothing_to_learn(criterion: nn.Module) -> None:
    """torchdistill's optimizers are of models; the weights of a loss would stay as they are."""
    parts = {"": criterion}
    parts |= {f"{name}.": term for name, (term, _) in getattr(criterion, "term_dict", {}).items()}
    for where, loss in parts.items():
        for name, parameter in loss.named_parameters():
            if parameter.requires_grad:
                fix = "Put them into the student, as ModelWithHeads does, or freeze them."
                expected = "losses without weights to train"
                raise ValueError(message("criterion", expected, f"{where}{name}", fix))


def _check_term(report: CheckReport, key_path: str, term: Any) -> None:
    name = key_path.rpartition(".")[2]
    known = losses.LOSS_DICT | losses.LOW_LEVEL_LOSS_DICT | losses.MIDDLE_LEVEL_LOSS_DICT
    with report.at(key_path):
        check_mapping("term", term, "Give criterion and weight.")
        if name in _METRICS:
            fix = "Rename it: a metric has this name."
            raise ValueError(message("term", "a name of its own", repr(name), fix))
        for key in ("criterion", "weight"):
            check_known("key", key, term)
        if not is_number(term["weight"]):
            raise ValueError(message("weight", "a number", repr(term["weight"]), ""))
        with report.at(f"{key_path}.criterion"):
            entry = term["criterion"] or {}
            check_mapping("criterion", entry, "Give key and kwargs.")
            check_known("key", entry.get("key"), known)
            losses.get_mid_level_loss(entry, term.get("criterion_wrapper"))


_METRICS = ("loss", *(name.removeprefix("val_") for name in OF_PREDICTIONS))
_Stage = tuple[Mapping[str, Any], ConfigParts]


@section("optimizer", "an optimizer", "For example {key: Adam, kwargs: {lr: 0.001}}.")
def check_optimizer(
    report: CheckReport, key_path: str, optimizer: Mapping[str, Any], rest: _Stage
) -> Optimizer:
    """Also makes one, of a number per group, for the scheduler to be tried with."""
    stage, parts = rest
    check_known("key", optimizer.get("key"), OPTIM_DICT)
    make = OPTIM_DICT[optimizer["key"]]
    check_keywords("kwargs", make, optimizer["kwargs"])
    steps = optimizer.get("grad_accum_step", 1)
    if type(steps) is not int or steps < 1:
        raise ValueError(message("grad_accum_step", "an integer >= 1", steps, ""))
    norm = optimizer.get("max_grad_norm")
    if norm is not None and not (is_number(norm) and norm > 0):
        raise ValueError(message("max_grad_norm", "a number above 0", repr(norm), "For example 1."))
    if optimizer.get("filters_params", True) is not True:
        fix = "Leave it out: torchdistill would hand modules to the optimizer."
        raise ValueError(message("filters_params", "True", optimizer["filters_params"], fix))
    read, ignored = "module_wise_configs", "module_wise_kwargs"  # as torchdistill has it
    if "teacher" not in parts.roles:
        read, ignored = ignored, read
    if optimizer.get(ignored):
        raise ValueError(message(ignored, f"{read} with these models", ignored, "Rename it."))
    defaults = make([nn.Parameter(torch.zeros(1))], **optimizer["kwargs"]).defaults
    groups: list[dict[str, Any]] = []
    for index, entry in enumerate(optimizer.get(read) or []):
        where = f"{read}.{index}"
        check_mapping(where, entry, "For example {module: layer4, kwargs: {lr: 0.001}}.")
        check_known(f"{where}: key", "module", entry)
        kwargs = entry.get("kwargs") or {}
        check_numbers(f"{where}.kwargs", kwargs)
        for key in kwargs:
            check_known(f"{where}.kwargs", key, defaults)
        groups.append({"params": [nn.Parameter(torch.zeros(1))], **kwargs})
        role = "teacher" if entry.get("is_teacher") else parts.trained
        model, how = parts.roles.get(role), stage.get(role)
        redesigned = ("sequential", "auxiliary_model_wrapper")
        if model and isinstance(how, Mapping) and not any(how.get(key) for key in redesigned):
            check_path(f"{where}.module", entry["module"], model)
    groups = groups or [{"params": [nn.Parameter(torch.zeros(1))]}]
    return make(groups, **optimizer["kwargs"])


@section("scheduler", "a scheduler", "For example {key: StepLR, kwargs: {step_size: 5}}.")
def check_scheduler(
    report: CheckReport,
    key_path: str,
    scheduler: Mapping[str, Any],
    rest: tuple[Optimizer | None, Mapping[str, Any], ConfigParts],
) -> None:
    trial, stage, parts = rest
    check_known("key", scheduler.get("key"), SCHEDULER_DICT)
    make, kwargs = SCHEDULER_DICT[scheduler["key"]], scheduler["kwargs"]
    check_keywords("kwargs", make, kwargs)
    within = scheduler.get("scheduling_step", 0)
    if type(within) is not int:
        raise ValueError(message("scheduling_step", "an integer", repr(within), ""))
    if trial is None:  # the optimizer is wrong, or that of an earlier stage
        return
    built = make(trial, **kwargs)
    monitor = parts.train.get("monitor", MONITOR)
    mode = "max" if monitor in (LAST, *OF_PREDICTIONS) else "min"
    if isinstance(built, ReduceLROnPlateau) and built.mode != mode:
        got, fix = f"mode {built.mode!r}", f"Set scheduler.kwargs.mode to {mode}."
        raise ValueError(message("scheduler", f"mode {mode!r} for {monitor}", got, fix))
    if isinstance(built, ReduceLROnPlateau) and within > 0:
        fix = "Leave it out: there is no metric within an epoch."
        raise ValueError(message("scheduling_step", "none", within, fix))
    trial.step()
    epochs = stage.get("num_epochs")
    for _ in range(epochs if type(epochs) is int and within <= 0 else 0):  # OneCycleLR ends
        built.step(0.0) if isinstance(built, ReduceLROnPlateau) else built.step()
