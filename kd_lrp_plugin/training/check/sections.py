"""The checks of each section of a config for itself: its types, and the names that it uses."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchdistill.core.interfaces import registry as procedures
from torchdistill.models.registry import MODEL_DICT

from kd_lrp_plugin.config.build import Assembly, BuiltModel, build_filled_model, get_stages
from kd_lrp_plugin.config.document import Document
from kd_lrp_plugin.relevance.methods import METHODS
from kd_lrp_plugin.torchdistill.forward_proc import find_method
from kd_lrp_plugin.training.cache.spec import check_cache, get_cache
from kd_lrp_plugin.training.check.loaders import check_loader
from kd_lrp_plugin.training.check.optimisation import (
    check_criterion,
    check_optimizer,
    check_scheduler,
)
from kd_lrp_plugin.training.check.problems import (
    KEYS,
    CheckReport,
    ConfigParts,
    check_keys,
    check_keywords,
    check_mapping,
    check_path,
    check_scalars,
    is_number,
    section,
)
from kd_lrp_plugin.training.experiment import LAST, MONITOR, OF_PREDICTIONS, PRECISIONS
from kd_lrp_plugin.utils.distributed import DistributedContext
from kd_lrp_plugin.utils.validation import check_known, message

SEE = "See torchdistill_configs for examples."
_PROCESSES = {
    "pre_epoch_process": procedures.PRE_EPOCH_PROC_FUNC_DICT,
    "pre_forward_process": procedures.PRE_FORWARD_PROC_FUNC_DICT,
    "post_forward_process": procedures.POST_FORWARD_PROC_FUNC_DICT,
    "post_epoch_process": procedures.POST_EPOCH_PROC_FUNC_DICT,
}


def check_sections(report: CheckReport, assembly: Assembly, context: DistributedContext) -> None:
    """Note what is wrong with the sections of a config, each for itself.

    Args:
        report: added to.
        assembly: of the config; a model that could not be built is missing.
        context: how many processes share the training images.
    """
    models, train, datasets, test = (
        found if isinstance(found := assembly.content.get(name), Mapping) else {}
        for name in ("models", "train", "datasets", "test")
    )
    roles: dict[str, nn.Module | None] = {role.removesuffix("_model"): None for role in models}
    roles |= {r.removesuffix("_model"): built.module for r, built in assembly.models.items()}
    parts = ConfigParts(train, datasets, roles, context)
    _check_train(report, train)
    for key_path, stage in get_stages(train).items():
        with report.at(key_path):
            if not isinstance(stage, Mapping):
                raise ValueError(message("stage", "a stage", repr(stage), SEE))
            if key_path != "train":
                check_keys(report, "stage", key_path, stage)
            _check_stage(report, key_path, stage, parts)
    check_keys(report, "test", "test", test)
    check_loader(report, "test.test_data_loader", test.get("test_data_loader"), parts)


def build_models(
    report: CheckReport, models: Mapping[str, Any], known: dict[str, BuiltModel] | None
) -> dict[str, BuiltModel]:
    """Every model that can be built; why the others cannot is noted.

    Args:
        report: added to.
        models: the section.
        known: see :func:`kd_lrp_plugin.training.check.dry_run.check`.
    """
    built: dict[str, BuiltModel] = {}
    for role, entry in models.items():
        with report.at(f"models.{role}"):
            check_known("models: key", role, ("model", "teacher_model", "student_model"))
            check_keys(report, "model", f"models.{role}", entry)
            if isinstance(entry, Mapping) and "kwargs" in entry:
                check_mapping("kwargs", entry["kwargs"], "Write {} for none.")
                if make := MODEL_DICT.get(entry.get("key")):
                    check_scalars("kwargs", make, entry["kwargs"])
            identity = identify_model(report.config, role)
            found = known.get(identity) if known is not None else None
            if found in built.values():  # a teacher of the same kind would freeze its student
                found = None
            built[role] = found or build_filled_model(entry, f"models.{role}")
            if known is not None:
                known[identity] = built[role]
    if not {"model", "student_model"} & set(models):
        report.add("models", message("models", "a student_model or a model", [*models], SEE))
    elif ("teacher_model" in models) != ("student_model" in models) or len(models) > 2:
        expected, fix = "a student_model beside a teacher_model", "Rename model to student_model."
        if "teacher_model" not in models:
            fix = "Rename student_model, and train.student, to model."
            expected = "a model without a teacher_model"
        report.add("models", message("models", expected, [*models], fix))
    return built


def identify_model(config: Document, role: str, weights: Path | None = None) -> str:
    """What tells a model of a config from others, with the weights that it begins with.

    Args:
        config: tags still unread.
        role: a key of its models.
        weights: a checkpoint of it, in place of what the entry names.
    """
    keys = ["dependencies", *(f"models.{role}.{key}" for key in ("key", "kwargs", "repo_or_dir"))]
    parts = [config.get_text(key) if config.holds(key) else "" for key in keys]
    source = f"models.{role}.src_ckpt"
    named = config.get_text(source) if config.holds(source) else ""
    return "\n".join([*parts, str(weights) if weights else named.removesuffix("\n...\n")])


def _check_train(report: CheckReport, train: Mapping[str, Any]) -> None:
    """What holds for all stages."""
    check_keys(report, "train", "train", train)
    _check_no_checkpoints(report, "train", train)
    stages = get_stages(train)
    with report.at("train.monitor"):
        monitor = train.get("monitor", MONITOR)
        if monitor not in OF_PREDICTIONS and "stage1" in train:
            fix = "The losses of different stages are no one measure."
            names = f"one of {list(OF_PREDICTIONS)} with stages"
            raise ValueError(message("monitor", names, repr(monitor), fix))
        if monitor != LAST:
            _check_one_judge(report, stages)
    with report.at("train.precision"):
        precision = train.get("precision") or "float32"
        check_known("precision", precision, PRECISIONS)
        mappings = {d: stage for d, stage in stages.items() if isinstance(stage, Mapping)}
        own = [d for d, stage in mappings.items() if stage.get("post_forward_process")]
        if precision == "float16" and own:
            fix = "Leave it out, or use bfloat16: float16 needs a step of its own."
            raise ValueError(message("precision", "no post_forward_process", own, fix))
    with report.at("train.compile"):
        how = train.get("compile") or False
        if isinstance(how, Mapping):
            check_keywords("compile", torch.compile, how)
            nn.Identity().compile(**how)
        elif not isinstance(how, bool):
            fix = "For example True, or {backend: inductor}."
            raise ValueError(message("compile", "True or options of torch.compile", how, fix))
    if "train" not in stages:
        with report.at("train"):
            expected = [f"train.stage{number}" for number in range(1, len(stages) + 1)]
            if list(stages) != expected:
                fix = "Number the stages from 1."
                raise ValueError(message("train", f"stages {expected}", list(stages), fix))
            if both := sorted(set(train) & set(KEYS["stage"].split()) - {"log_freq"}):
                got, fix = f"{both} beside them", "Move them into each stage."
                raise ValueError(message("train", "only stages", got, fix))


def _check_one_judge(report: CheckReport, stages: Mapping[str, Any]) -> None:
    """The best epoch is one of all stages, so that the same images must say how good each is."""
    first = None
    for key_path, stage in stages.items():
        loader = stage.get("val_data_loader") if isinstance(stage, Mapping) else None
        name = loader.get("dataset_id") if isinstance(loader, Mapping) else None
        first = first or name
        if name and name != first:
            where = f"{key_path}.val_data_loader.dataset_id"
            fix = "Take it in each stage, or set monitor: last."
            expected = f"the validation set of all stages, {first!r}"
            report.add(where, message("dataset_id", expected, repr(name), fix))


def _check_no_checkpoints(report: CheckReport, key_path: str, part: Any) -> None:
    """torchdistill would load a ``src_ckpt`` below ``train`` without asking what is in it."""
    for key, value in part.items() if isinstance(part, Mapping) else ():
        if key == "src_ckpt" and value:
            fix = "Put it under models: torchdistill would load this one with its code."
            report.add(f"{key_path}.src_ckpt", message("src_ckpt", "none here", value, fix))
        _check_no_checkpoints(report, f"{key_path}.{key}", value)


# --- a stage ------------------------------------------------------------------------------------


def _check_stage(
    report: CheckReport, key_path: str, stage: Mapping[str, Any], parts: ConfigParts
) -> None:
    first = key_path in ("train", "train.stage1")
    with report.at(f"{key_path}.num_epochs"):
        epochs = stage.get("num_epochs")
        if type(epochs) is not int or epochs < 1:  # True would pass for one
            raise ValueError(message("num_epochs", "an integer of 1 or more", repr(epochs), ""))
    for role in ("teacher", "student", "model"):
        entry = stage.get(role) or {}
        _check_role(report, f"{key_path}.{role}", entry, parts)
        if role in parts.roles:
            with report.at(f"{key_path}.{role}"):
                if not entry:
                    fix = "Each stage needs one, for example {forward_proc: forward_batch_only}."
                    raise ValueError(message("model", f"a section {role!r}", stage.get(role), fix))
    roles = [stage.get(role) for role in parts.roles]
    if all(isinstance(role, Mapping) and role.get("requires_grad") is False for role in roles):
        with report.at(f"{key_path}.{parts.trained}"):
            fix = "Leave requires_grad out, or name frozen_modules."
            raise ValueError(message(parts.trained, "something to train", "a frozen model", fix))
    if get_cache(stage) is not None:
        with report.at(f"{key_path}.teacher.cache"):
            if "teacher" not in parts.roles:
                fix = "Give models.teacher_model."
                raise ValueError(message("cache", "a teacher", "none", fix))
            check_cache(key_path, get_stages(parts.train), parts.datasets)
    for name, known in _PROCESSES.items():
        with report.at(f"{key_path}.{name}"):
            if name in stage:
                check_known(name, stage[name], known)
    check_criterion(report, f"{key_path}.criterion", stage.get("criterion") or {}, parts)
    optimizer, trial = stage.get("optimizer", {}), None
    if optimizer != {} or first:
        trial = check_optimizer(report, f"{key_path}.optimizer", optimizer, (stage, parts))
    if scheduler := stage.get("scheduler"):
        check_scheduler(report, f"{key_path}.scheduler", scheduler, (trial, stage, parts))
    if (stopping := stage.get("early_stopping")) is not None:
        with report.at(f"{key_path}.early_stopping"):
            patience = stopping.get("patience") if isinstance(stopping, Mapping) else None
            fix = "For example {patience: 5, min_delta: 0.001}; YAML reads 1e-3 as text."
            if type(patience) is not int or patience < 1:
                raise ValueError(message("early_stopping", "a patience >= 1", stopping, fix))
            delta = stopping.get("min_delta", 0.0)
            if not is_number(delta) or delta < 0:
                raise ValueError(message("early_stopping", "a min_delta >= 0", repr(delta), fix))
            check_keys(report, "early_stopping", f"{key_path}.early_stopping", stopping)
    for name in ("train_data_loader", "val_data_loader"):
        if name in stage or first:
            check_loader(report, f"{key_path}.{name}", stage.get(name), parts)


@section("role", "what a stage does with a model", "For example {requires_grad: False}.")
def _check_role(
    report: CheckReport, key_path: str, role: Mapping[str, Any], parts: ConfigParts
) -> None:
    name = key_path.rpartition(".")[2]
    with report.at(f"{key_path}.cache"):
        if name != "teacher" and role.get("cache") is not None:
            fix = "Only what a frozen teacher says stays the same."
            raise ValueError(message("cache", "none but the teacher's", role["cache"], fix))
    with report.at(f"{key_path}.forward_proc"):
        if role:
            known = procedures.FORWARD_PROC_FUNC_DICT
            check_known("key", role.get("forward_proc"), known)
            method = find_method(role["forward_proc"])
            hooked = method or role.get("forward_hook")
            if hooked and parts.train.get("compile") and name != "teacher":
                fix = "Leave train.compile out: hooks and second derivatives do not compile."
                got = role["forward_proc"]
                raise ValueError(message("compile", "a student without hooks", got, fix))
            if method and METHODS[method].has_spikes and name != "teacher":
                words = (
                    f"{method} explains what is trained: the derivative of LRP-epsilon has spikes, "
                    "which may keep it from learning; prefer gradient_activation, lrp_zplus, "
                    "lrp_gamma or lrp_composite for it, whatever its teacher has"
                )
                report.warn(f"{key_path}.forward_proc", words)
    several = parts.context.world_size > 1 and name in parts.roles
    with report.at(f"{key_path}.requires_grad"):
        if several and name == "teacher" and role.get("requires_grad", True):
            fix = "Set requires_grad: False; only the student is trained by several."
            raise ValueError(message("teacher", "a frozen one under torchrun", True, fix))
    for key, why in {
        "wrapper": "under torchrun the trainer wraps the student",
        "dst_ckpt": "the run folder holds what is trained",
    }.items():
        if role.get(key):
            report.warn(f"{key_path}.{key}", f"not used, {why}")
    if name == "teacher" and role and name in parts.roles and "requires_grad" not in role:
        words = "trained with the student, which requires_grad: False prevents"
        report.warn(f"{key_path}.requires_grad", words)
    if role and name not in parts.roles:
        report.warn(key_path, f"nothing reads it without models.{name}")
    model = parts.roles.get(name)
    if model is not None and not role.get("auxiliary_model_wrapper"):  # that is another model
        _check_paths(report, key_path, role, model)


def _check_paths(
    report: CheckReport, key_path: str, role: Mapping[str, Any], model: nn.Module
) -> None:
    """Every path to a part of a model; torchdistill would pass over those that lead nowhere."""
    rebuilt, added = role.get("sequential") or [], role.get("adaptations") or {}
    with report.at(f"{key_path}.sequential"):
        for path in _paths("sequential", rebuilt):
            if str(path).startswith("+"):
                check_known("adaptations", path[1:], added)
            else:
                check_path("sequential", path, model)
    with report.at(f"{key_path}.frozen_modules"):
        for path in _paths("frozen_modules", role.get("frozen_modules", [])):
            kind = re.fullmatch(r"instance\((.*)\)", str(path))
            if kind and not rebuilt:
                kinds = {c.__name__ for m in model.modules() for c in type(m).__mro__}
                check_known("frozen_modules", kind[1], kinds & set(vars(nn)))
            elif f"+{path}" not in rebuilt:
                check_path("frozen_modules", path, model)
    with report.at(f"{key_path}.forward_hook"):
        hooks = role.get("forward_hook", {})
        check_mapping("forward_hook", hooks, "For example {output: [layer4]}.")
        for key, paths in hooks.items():
            check_known("forward_hook", key, ("input", "output"))
            for path in _paths(f"forward_hook.{key}", paths):
                if not (rebuilt and str(path).startswith("+")):
                    check_path(f"forward_hook.{key}", str(path).removeprefix("+"), model)


def _paths(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        fix = "For example [layer3, layer4]."
        raise ValueError(message(where, "a list of module paths", repr(value), fix))
    return value
