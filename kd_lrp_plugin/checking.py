"""All problems of a config at once, each with its place, before any work is lost to them."""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import ModuleType
from typing import Any

import torch
import yaml
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import default_collate
from torchdistill.core.interfaces import registry as procedures
from torchdistill.losses import registry as losses
from torchdistill.optim.registry import OPTIM_DICT, SCHEDULER_DICT

from kd_lrp_plugin.checks import check_known, message
from kd_lrp_plugin.config import Config
from kd_lrp_plugin.data import unreadable_images
from kd_lrp_plugin.experiment import (
    MONITOR,
    PRECISIONS,
    Experiment,
    build_model_of,
    construct,
    fill_model,
    stages_of,
)
from kd_lrp_plugin.meter import Meter
from kd_lrp_plugin.processes import Processes
from kd_lrp_plugin.progress import Silence
from kd_lrp_plugin.registry import unknown_name
from kd_lrp_plugin.torchdistill import check_finite

# Every key that torchdistill or the driver reads, by kind of section.
_STAGE = (
    "num_epochs train_data_loader val_data_loader teacher student model optimizer scheduler "
    "criterion log_freq pre_epoch_process pre_forward_process post_forward_process "
    "post_epoch_process early_stopping"
)
KEYS = {
    "config": "dependencies datasets models train test",
    "stage": _STAGE,
    "train": f"{_STAGE} monitor precision compile",
    "loader": "dataset_id sampler batch_sampler collate_fn kwargs requires_supp dataset_wrapper",
    "role": "forward_proc requires_grad frozen_modules forward_hook sequential adaptations "
    "auxiliary_model_wrapper wrapper dst_ckpt",
    "model": "key kwargs src_ckpt dst_ckpt repo_or_dir experiment quantized",
    "optimizer": "key kwargs max_grad_norm grad_accum_step filters_params module_wise_configs "
    "module_wise_kwargs",
    "scheduler": "key kwargs scheduling_step",
    "criterion": "key kwargs args func2extract_model_loss",
    "WeightedSumLoss": "model_term sub_terms",
    "early_stopping": "patience min_delta",
}
ROLES = ("teacher", "student", "model")


@dataclass
class Findings:
    """What :func:`check` has found.

    Attributes:
        problems: what prevents a run, or makes another run than was meant.
        remarks: keys that nothing reads.
    """

    config: Config
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add(self, dotted: str, error: Exception | str, place: str | None = None) -> None:
        """Note a problem at a key."""
        words = " ".join(_words(error).split())  # one line each
        named, separator, rest = words.partition(": expected ")
        if separator and " " not in named:  # what the message names is this key or one below
            if named.split(".")[0] in ("datasets", "models", "train", "test"):
                dotted, words = named, f"expected {rest}"
            elif self.config.holds(f"{dotted}.{named}"):
                dotted, words = f"{dotted}.{named}", f"expected {rest}"
            elif f".{dotted}".endswith(f".{named}"):
                words = f"expected {rest}"
        place = place or self.config.place(dotted)
        self.problems.append(f"{place}  {dotted}: {words}" if dotted else f"{place}  {words}")

    @contextmanager
    def at(self, dotted: str) -> Iterator[None]:
        """Note an error inside as a problem at a key, and go on."""
        try:
            yield
        except Exception as error:
            logging.getLogger(__name__).info("%s", dotted, exc_info=error)
            self.add(dotted, error)


def _words(error: Exception | str) -> str:
    if isinstance(error, KeyError):
        text = str(error.args[0]) if error.args else ""
        return text if ": expected " in text else f"expected a key {text!r}, got none."
    if isinstance(error, AttributeError) and isinstance(error.obj, ModuleType):
        return unknown_name(f"name in {error.obj.__name__}", error.name, dir(error.obj))
    if isinstance(error, str | ValueError | OSError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def check(config: Config, here: Processes, show: Silence | None = None) -> Findings:
    """Build everything that a config names, take one step in each stage, and list what is wrong.

    Args:
        config: see :func:`kd_lrp_plugin.config.resolve_config`.
        here: where to compute; other processes are left alone.
        show: told how far the reading of the images is.

    Returns:
        Every problem and remark, each with its place in the file.
    """
    findings = Findings(config)
    tag_problems: list[tuple[yaml.Mark, Exception]] = []
    with findings.at("dependencies"):
        content = construct(config, lambda mark, error: tag_problems.append((mark, error)))
        for mark, error in tag_problems:
            findings.add("", error, config.show(mark))
        _check_keys(findings, "config", "", content)
        for section in ("datasets", "models", "train", "test"):
            if not isinstance(content.get(section), Mapping) or not content[section]:
                got = content.get(section)
                findings.add("", message("config", f"a section {section!r}", got, _SEE))
        if not findings.problems or tag_problems:
            _check_parts(findings, content, here)
        if not findings.problems:
            _check_images(findings, content, show or Silence())
        if not findings.problems:
            _check_steps(findings, content, Processes(here.device))
    return findings


_SEE = "See torchdistill_configs for examples."


# --- each part for itself -----------------------------------------------------------------------


def _check_keys(findings: Findings, kind: str, dotted: str, section: Any) -> None:
    """A key that looks like a misspelling is a problem; one that nothing reads, a remark."""
    known = KEYS[kind].split()
    if not isinstance(section, Mapping):
        return
    for key in section:
        name = str(key)
        if name in known or name.startswith("_") or (kind == "train" and name[:5] == "stage"):
            continue
        where = f"{dotted}.{name}".lstrip(".")
        near = [k for k in get_close_matches(name, known, cutoff=0.75) if k not in section]
        if near:
            fix = f"Did you mean {near[0]!r}?"
            findings.add(where, message(where, "a key that is read", repr(name), fix))
        elif kind != "config":  # at the top, people keep their anchors
            findings.remarks.append(f"{findings.config.place(where)}  {where}: nothing reads it")


def _check_parts(findings: Findings, content: Mapping[str, Any], here: Processes) -> None:
    models, train, datasets = (content.get(k) or {} for k in ("models", "train", "datasets"))
    _check_keys(findings, "train", "train", train)
    _check_models(findings, models)
    with findings.at("train.monitor"):
        monitor = train.get("monitor", MONITOR)
        if not str(monitor).startswith("val_"):
            fix = "For example val_accuracy or val_loss."
            raise ValueError(message("monitor", "a metric of the validation", monitor, fix))
        if monitor != MONITOR and "stage1" in train:
            fix = f"Monitor {MONITOR}: the losses of different stages are no one measure."
            raise ValueError(message("monitor", f"{MONITOR} with stages", monitor, fix))
    with findings.at("train.precision"):
        precision = train.get("precision") or "float32"
        check_known("precision", precision, PRECISIONS)
        own = [d for d, stage in stages_of(train).items() if stage.get("post_forward_process")]
        if precision == "float16" and own:
            fix = "Leave it out, or use bfloat16: float16 needs a step of its own."
            raise ValueError(message("precision", "no post_forward_process", own, fix))
    _check_no_checkpoints(findings, "train", train)
    stages = stages_of(train)
    if "train" not in stages:
        with findings.at("train"):
            expected = [f"train.stage{number}" for number in range(1, len(stages) + 1)]
            if list(stages) != expected:
                fix = "Number the stages from 1."
                raise ValueError(message("train", f"stages {expected}", list(stages), fix))
            if both := sorted(set(train) & set(_STAGE.split()) - {"log_freq"}):
                got, fix = f"{both} beside them", "Move them into each stage."
                raise ValueError(message("train", "only stages", got, fix))
    for dotted, stage in stages.items():
        if dotted != "train":
            _check_keys(findings, "stage", dotted, stage)
        first = dotted in ("train", "train.stage1")
        _check_stage(findings, dotted, stage, train, first)
        for name in models:
            role = name.removesuffix("_model")
            with findings.at(f"{dotted}.{role}"):
                if not stage.get(role):
                    fix = "Each stage needs one, for example {forward_proc: forward_batch_only}."
                    raise ValueError(message("model", f"a section {role!r}", stage.get(role), fix))
        for name in ("train_data_loader", "val_data_loader"):
            if stage.get(name) is not None or first:
                _check_loader(findings, f"{dotted}.{name}", stage.get(name), datasets)
    test = (content.get("test") or {}).get("test_data_loader")
    _check_loader(findings, "test.test_data_loader", test, datasets)
    if here.world > 1 and "teacher_model" in models:
        for dotted, stage in stages_of(train).items():
            with findings.at(f"{dotted}.teacher.requires_grad"):
                if (stage.get("teacher") or {}).get("requires_grad", True):
                    fix = "Set requires_grad: False; only the student is trained by several."
                    raise ValueError(message("teacher", "a frozen one under torchrun", True, fix))


def _check_models(findings: Findings, models: Mapping[str, Any]) -> None:
    for role, entry in models.items():
        with findings.at(f"models.{role}"):
            check_known("models: key", role, ("model", "teacher_model", "student_model"))
            _check_keys(findings, "model", f"models.{role}", entry)
            model = build_model_of(entry, f"models.{role}")
            fill_model(model, entry, f"models.{role}", [])
    if not {"model", "student_model"} & set(models):
        findings.add("models", message("models", "a student_model or a model", [*models], _SEE))


def _check_stage(
    findings: Findings,
    dotted: str,
    stage: Mapping[str, Any],
    train: Mapping[str, Any],
    first: bool,
) -> None:
    with findings.at(f"{dotted}.num_epochs"):
        epochs = stage.get("num_epochs")
        if not isinstance(epochs, int) or epochs < 1:
            raise ValueError(message("num_epochs", "an integer of 1 or more", epochs, ""))
    for role in ROLES:
        _check_role(findings, f"{dotted}.{role}", stage.get(role) or {}, train)
    _check_criterion(findings, f"{dotted}.criterion", stage.get("criterion") or {})
    optimizer = stage.get("optimizer") or {}
    _check_keys(findings, "optimizer", f"{dotted}.optimizer", optimizer)
    trial = None
    if optimizer or first:
        with findings.at(f"{dotted}.optimizer"):
            check_known("key", optimizer.get("key"), OPTIM_DICT)
            _check_keywords(OPTIM_DICT[optimizer["key"]], optimizer["kwargs"])
            trial = OPTIM_DICT[optimizer["key"]](
                [nn.Parameter(torch.zeros(1))], **optimizer["kwargs"]
            )
            steps = optimizer.get("grad_accum_step", 1)
            if not isinstance(steps, int) or steps < 1:
                raise ValueError(message("grad_accum_step", "an integer >= 1", steps, ""))
    scheduler = stage.get("scheduler") or {}
    _check_keys(findings, "scheduler", f"{dotted}.scheduler", scheduler)
    if scheduler and trial is not None:
        with findings.at(f"{dotted}.scheduler"):
            check_known("key", scheduler.get("key"), SCHEDULER_DICT)
            _check_keywords(SCHEDULER_DICT[scheduler["key"]], scheduler["kwargs"])
            built = SCHEDULER_DICT[scheduler["key"]](trial, **scheduler["kwargs"])
            monitor = train.get("monitor", MONITOR)
            mode = "max" if monitor.endswith("accuracy") else "min"
            if isinstance(built, ReduceLROnPlateau) and built.mode != mode:
                got, fix = f"mode {built.mode!r}", f"Set scheduler.kwargs.mode to {mode}."
                raise ValueError(message("scheduler", f"mode {mode!r} for {monitor}", got, fix))
            within = scheduler.get("scheduling_step")
            if isinstance(built, ReduceLROnPlateau) and within:
                fix = "Leave it out: there is no metric within an epoch."
                raise ValueError(message("scheduling_step", "none", within, fix))
            trial.step()
            for _ in range(0 if within else stage.get("num_epochs") or 0):  # OneCycleLR ends early
                built.step(0.0) if isinstance(built, ReduceLROnPlateau) else built.step()
    if (stopping := stage.get("early_stopping")) is not None:
        with findings.at(f"{dotted}.early_stopping"):
            patience = stopping.get("patience") if isinstance(stopping, Mapping) else None
            fix = "For example {patience: 5, min_delta: 0.001}; YAML reads 1e-3 as text."
            if not isinstance(patience, int) or patience < 1:
                raise ValueError(message("early_stopping", "a patience >= 1", stopping, fix))
            delta = stopping.get("min_delta", 0.0)
            if not isinstance(delta, int | float) or delta < 0:
                raise ValueError(message("early_stopping", "a min_delta >= 0", repr(delta), fix))
            _check_keys(findings, "early_stopping", f"{dotted}.early_stopping", stopping)


def _check_keywords(function: Callable[..., object], kwargs: Mapping[str, Any]) -> None:
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in kwargs:
            check_known("kwargs", key, parameters)


def _check_role(
    findings: Findings, dotted: str, role: Mapping[str, Any], train: Mapping[str, Any]
) -> None:
    _check_keys(findings, "role", dotted, role)
    with findings.at(f"{dotted}.forward_proc"):
        if role:
            known = procedures.FORWARD_PROC_FUNC_DICT
            check_known("key", role.get("forward_proc"), known)
            recorded = str(role["forward_proc"]).startswith("kd_lrp_recorder(")
            hooked = recorded or role.get("forward_hook")
            if hooked and train.get("compile") and not dotted.endswith("teacher"):
                fix = "Leave train.compile out: hooks and second derivatives do not compile."
                got = role["forward_proc"]
                raise ValueError(message("compile", "a student without hooks", got, fix))
    for key, why in {
        "wrapper": "under torchrun the driver wraps the student",
        "dst_ckpt": "the run folder holds what is trained",
    }.items():
        if role.get(key):
            where = f"{dotted}.{key}"
            findings.remarks.append(f"{findings.config.place(where)}  {where}: not used, {why}")


def _check_no_checkpoints(findings: Findings, dotted: str, section: Any) -> None:
    """torchdistill would load a ``src_ckpt`` below ``train`` without asking what is in it."""
    for key, value in section.items() if isinstance(section, Mapping) else ():
        if key == "src_ckpt" and value:
            fix = "Put it under models: torchdistill would load this one with its code."
            findings.add(f"{dotted}.src_ckpt", message("src_ckpt", "none here", value, fix))
        _check_no_checkpoints(findings, f"{dotted}.{key}", value)


def _check_criterion(findings: Findings, dotted: str, criterion: Mapping[str, Any]) -> None:
    _check_keys(findings, "criterion", dotted, criterion)
    before = len(findings.problems)
    with findings.at(f"{dotted}.key"):
        check_known("key", criterion.get("key"), losses.HIGH_LEVEL_LOSS_DICT)
    kwargs = criterion.get("kwargs") or {}
    if criterion.get("key") == "WeightedSumLoss":
        _check_keys(findings, "WeightedSumLoss", f"{dotted}.kwargs", kwargs)
        known = losses.LOSS_DICT | losses.LOW_LEVEL_LOSS_DICT | losses.MIDDLE_LEVEL_LOSS_DICT
        for name, term in (kwargs.get("sub_terms") or {}).items():
            place = f"{dotted}.kwargs.sub_terms.{name}"
            with findings.at(place):
                for key in ("criterion", "weight"):
                    check_known("key", key, term)
            with findings.at(f"{place}.criterion"):
                entry = term.get("criterion") or {}
                check_known("key", entry.get("key"), known)
                losses.get_mid_level_loss(entry, term.get("criterion_wrapper"))
    if len(findings.problems) == before:
        with findings.at(dotted):
            losses.get_high_level_loss(criterion)


def _check_loader(findings: Findings, dotted: str, loader: Any, datasets: Mapping) -> None:
    _check_keys(findings, "loader", dotted, loader)
    with findings.at(dotted):
        if not isinstance(loader, Mapping):
            fix = "Give dataset_id, sampler and kwargs."
            raise ValueError(message("loader", "a loader", loader, fix))
        check_known("dataset_id", loader.get("dataset_id"), datasets)
        for key in ("sampler", "kwargs"):
            check_known("keys", key, loader)
        if loader["kwargs"].get("persistent_workers"):
            fix = "Leave it out: workers that live on cannot be brought back when a run goes on."
            raise ValueError(message("kwargs", "no persistent_workers", True, fix))


# --- all together -------------------------------------------------------------------------------


def _check_images(findings: Findings, content: Mapping[str, Any], show: Silence) -> None:
    places: dict[str, str] = {}
    for dotted, stage in stages_of(content["train"]).items():
        for name in ("train_data_loader", "val_data_loader"):
            if stage.get(name):
                places.setdefault(stage[name]["dataset_id"], f"{dotted}.{name}.dataset_id")
    places.setdefault(
        content["test"]["test_data_loader"]["dataset_id"], "test.test_data_loader.dataset_id"
    )
    for name, dotted in places.items():
        with findings.at(dotted):
            broken = unreadable_images(content["datasets"][name], show)
            if broken:
                shown = "; ".join(f"{file} ({why})" for file, why in list(broken.items())[:5])
                fix = "Mend or remove them, or set skip_corrupt: True to leave them out."
                got = f"{len(broken)} of {name} that cannot be read: {shown}"
                raise ValueError(message("images", "readable files", got, fix))


def _check_steps(findings: Findings, content: dict[str, Any], here: Processes) -> None:
    with findings.at("models"):
        experiment = Experiment(content, here)
        stages = stages_of(content["train"])
        for number, dotted in enumerate(stages, start=1):
            while experiment.stage < number:
                experiment.box.current_epoch = experiment.box.stage_end_epoch - 1
                experiment.end_epoch(0.0, stop=False)
            first, box = experiment.epochs_done, experiment.box
            last = getattr(box, "stage_end_epoch", box.num_epochs) - 1
            scheduled = "pre_epoch_process" in stages[dotted]  # terms may set in late
            for box.current_epoch in (first, last) if scheduled else (first,):
                _check_step(findings, dotted, experiment)
                if findings.problems:
                    return


def _check_step(findings: Findings, dotted: str, experiment: Experiment) -> None:
    """One batch through everything, as a step would take it."""
    box, device = experiment.box, experiment.here.device
    loader = box.train_data_loader
    with findings.at(f"{dotted}.train_data_loader"):
        if len(loader) == 0:
            fix = "Lower batch_size, or set drop_last: False."
            raise ValueError(message("batches", "one or more in an epoch", "none", fix))
        places = next(iter(loader.batch_sampler))
        collate = loader.collate_fn or default_collate
        items = [loader.dataset[i] for i in places]
        images, targets, supplement = collate(items)
        images, targets = images.to(device), targets.to(device)
        # The last batch of an epoch may be too small for a loss, or of odd size for mixup.
        rest = 0 if loader.drop_last else len(loader.dataset) % (loader.batch_size or 1)
        short = collate(items[:rest]) if rest else None
    if findings.problems:
        return
    experiment.begin_epoch()
    roles = {experiment.student_name.removesuffix("_model"): experiment.student}
    if experiment.teacher is not None:
        roles["teacher"] = experiment.teacher
    for role, model in roles.items():
        with findings.at(f"{dotted}.{role}.forward_proc"), torch.no_grad():
            procedure = getattr(box, f"{role}_forward_proc")
            procedure(model, images, targets, supplement)
    if findings.problems:
        return
    classifies = experiment.student is experiment.original
    with findings.at(f"{dotted}.criterion"), Meter(box.criterion, False, classifies) as meter:
        loss = experiment.training_loss(images, targets, supplement)
        check_finite(loss, meter.latest)
        meter.update(loss, targets)
        box.post_forward_process(loss=loss)
        with experiment.evaluating():
            experiment.loss(images, targets)
    if short is not None:
        with findings.at(f"{dotted}.train_data_loader"), experiment.evaluating():
            try:
                experiment.loss(short[0].to(device), short[1].to(device), short[2])
            except ValueError as error:
                got, fix = f"a last one of {rest}", f"Set drop_last: True. ({error})"
                raise ValueError(message("batches", "full ones", got, fix)) from error
    with findings.at("train.monitor"):
        known = [MONITOR, "val_loss", *(f"val_{name}" for name in meter.latest)]
        check_known("train.monitor", experiment.monitor, known)
