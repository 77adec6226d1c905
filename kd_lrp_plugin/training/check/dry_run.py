"""All problems of a config at once, each with its place, before any work is lost to them."""

from collections.abc import Mapping
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from kd_lrp_plugin.config.build import construct, get_stages
from kd_lrp_plugin.config.document import Config
from kd_lrp_plugin.data.validation import unreadable_images
from kd_lrp_plugin.torchdistill.high_level import check_finite
from kd_lrp_plugin.training.check.problems import CheckReport, check_keys
from kd_lrp_plugin.training.check.sections import SEE, check_sections, share
from kd_lrp_plugin.training.experiment import LAST, MONITOR, Experiment
from kd_lrp_plugin.training.meter import Meter
from kd_lrp_plugin.utils.distributed import DistributedContext
from kd_lrp_plugin.utils.validation import check_known, message


def check(config: Config, here: DistributedContext) -> CheckReport:
    """Build everything that a config names, take one step in each stage, and list what is wrong.

    Args:
        config: see :func:`kd_lrp_plugin.config.document.resolve_config`.
        here: where to compute, and how many will; the other processes are left alone.

    Returns:
        Every problem and remark, each with its place in the file.
    """
    findings = CheckReport(config)
    content: dict[str, Any] | None = None

    def note(mark: yaml.Mark, error: Exception) -> None:
        findings.add("", error, config.show(mark))
        findings.failed.append(mark)

    with findings.at("dependencies"):
        content = construct(config, note)
    if content is None:
        return findings
    with findings.at(""):
        check_keys(findings, "config", "", content)
        for section in ("datasets", "models", "train", "test"):
            if not isinstance(content.get(section), Mapping) or not content[section]:
                got = content.get(section)
                findings.add("", message("config", f"a section {section!r}", got, SEE))
        if not findings.problems or findings.failed:
            check_sections(findings, content, here)
        if not findings.problems:
            _check_images(findings, content)
        if not findings.problems:
            _check_steps(findings, content, here)
    return findings


def _check_images(findings: CheckReport, content: Mapping[str, Any]) -> None:
    places: dict[str, str] = {}
    for dotted, stage in get_stages(content["train"]).items():
        for name in ("train_data_loader", "val_data_loader"):
            if stage.get(name):
                places.setdefault(stage[name]["dataset_id"], f"{dotted}.{name}.dataset_id")
    places.setdefault(
        content["test"]["test_data_loader"]["dataset_id"], "test.test_data_loader.dataset_id"
    )
    for name, dotted in places.items():
        with findings.at(dotted):
            broken = unreadable_images(content["datasets"][name])
            if broken:
                shown = "; ".join(f"{file} ({why})" for file, why in list(broken.items())[:5])
                fix = "Mend or remove them, or set skip_corrupt: True to leave them out."
                got = f"{len(broken)} of {name} that cannot be read: {shown}"
                raise ValueError(message("images", "readable files", got, fix))


def _check_steps(findings: CheckReport, content: dict[str, Any], here: DistributedContext) -> None:
    """A step of each stage, alone in this process, and a batch of all that is evaluated."""
    with findings.at("models"):
        experiment = Experiment(content, DistributedContext(here.device))
    stages = get_stages(content["train"])
    for number, (dotted, stage) in enumerate(stages.items(), start=1):
        if findings.problems:
            return
        with findings.at(dotted):
            while experiment.stage < number:
                experiment.box.current_epoch = experiment.box.stage_end_epoch - 1
                experiment.end_epoch(0.0, stop=False)
            if loader := stage.get("train_data_loader"):
                own = share(content["datasets"][loader["dataset_id"]], loader, here)
            _check_accumulation(findings, dotted, experiment, len(own), stage["num_epochs"])
            first, box = experiment.epochs_done, experiment.box
            last = getattr(box, "stage_end_epoch", box.num_epochs) - 1
            scheduled = "pre_epoch_process" in stage  # terms may set in late
            for box.current_epoch in (first, last) if scheduled else (first,):
                _check_step(findings, dotted, experiment, here, own)
                if findings.problems:
                    return
            validation = f"{dotted}.val_data_loader"
            _check_evaluation(findings, validation, experiment, experiment.val_loader)
    if not findings.problems:
        _check_evaluation(findings, "test.test_data_loader", experiment, experiment.test_loader)


def _check_accumulation(
    findings: CheckReport, dotted: str, experiment: Experiment, batches: int, epochs: int
) -> None:
    steps = experiment.box.grad_accum_step
    with findings.at(f"{dotted}.optimizer"):
        if batches * epochs < steps:
            each = f"{batches} in each of {epochs} epochs"
            expected = f"at most {batches * epochs}, the batches of a process ({each})"
            fix = "Lower it: no step would be taken."
            raise ValueError(message("grad_accum_step", expected, steps, fix))


def _check_step(
    findings: CheckReport,
    dotted: str,
    experiment: Experiment,
    here: DistributedContext,
    own: DataLoader,
) -> None:
    """One batch through everything, as a step would take it; ``own`` has a process's share."""
    box, device = experiment.box, experiment.here.device
    loader = box.train_data_loader
    with findings.at(f"{dotted}.train_data_loader"):
        items = _items(loader)
        images, targets, supplement = _collated(loader, items, device)
        # The last batch of an epoch may be too small for a loss, or of odd size for mixup.
        rest = 0 if own.drop_last else len(own.sampler) % (own.batch_size or 1)  # type: ignore
        short = _collated(loader, items[:rest], device) if rest else None
    if findings.problems:
        return
    with findings.at(f"{dotted}.pre_epoch_process"):
        experiment.begin_epoch()
    roles = {experiment.student_name.removesuffix("_model"): experiment.student}
    if experiment.teacher is not None:
        roles["teacher"] = experiment.teacher
    for role, model in roles.items():
        derived = role != "teacher" or box.teacher_updatable
        with findings.at(f"{dotted}.{role}.forward_proc"), torch.set_grad_enabled(derived):
            procedure = getattr(box, f"{role}_forward_proc")
            procedure(model, images, targets, supplement)
    if findings.problems:
        return
    if short is not None:  # in training mode: norms, too, may need more than one image
        with findings.at(f"{dotted}.train_data_loader"), torch.no_grad():
            try:
                experiment.loss(*short[:3])
            except (ValueError, RuntimeError) as error:
                got, fix = f"a last one of {rest}", f"Set drop_last: True. ({error})"
                raise ValueError(message("batches", "full ones", got, fix)) from error
    classifies = experiment.student is experiment.original
    with findings.at(f"{dotted}.criterion"), Meter(box.criterion, False, classifies) as meter:
        loss = experiment.training_loss(images, targets, supplement)
        check_finite(loss, meter.latest)
        meter.update(loss, targets)
        left = _step(experiment, loss, images)
        if left and here.world > 1:
            got = f"none for {len(left)}, such as {left[:3]}"
            fix = "Give CE or KL a weight, or freeze them (frozen_modules)."
            expected = "a gradient for all that is trained, under torchrun"
            raise ValueError(message("criterion", expected, got, fix))
        with experiment.evaluating():
            experiment.loss(images, targets)
    with findings.at("train.monitor"):
        known = [MONITOR, LAST, "val_loss", *(f"val_{name}" for name in meter.latest)]
        check_known("train.monitor", experiment.monitor, known)


def _step(experiment: Experiment, loss: Tensor, images: Tensor) -> list[str]:
    """Take a step; the names of what is trained, and waited for under torchrun, without a gradient.

    Where something is frozen, PyTorch does not wait for what the outputs do not reach.
    """
    trained = {n: p for n, p in experiment.student.named_parameters() if p.requires_grad}
    reached: set[Tensor] = set()
    handles = [p.register_post_accumulate_grad_hook(reached.add) for p in trained.values()]
    experiment.box.post_forward_process(loss=loss)
    for handle in handles:
        handle.remove()
    left = [name for name, parameter in trained.items() if parameter not in reached]
    if left and len(trained) < len(list(experiment.student.parameters())):
        outputs, weights = experiment.student(images), [trained[name] for name in left]
        found = torch.autograd.grad(outputs.sum(), weights, allow_unused=True)
        left = [name for name, gradient in zip(left, found, strict=True) if gradient is not None]
    return left


def _check_evaluation(
    findings: CheckReport, dotted: str, experiment: Experiment, loader: DataLoader
) -> None:
    """One batch, as validation and test will take it."""
    original = experiment.original
    with findings.at(dotted), experiment.evaluating(), Meter(experiment.box.criterion) as meter:
        original.eval()
        images, targets, *_ = _collated(loader, _items(loader), experiment.here.device)
        if len(targets) == 1 and meter.compares:
            meter.count(original(images), targets)
        else:
            logits = None if experiment.student is original else original(images)
            meter.update(experiment.loss(images, targets), targets, logits)


def _items(loader: DataLoader) -> list[Any]:
    """What a loader's first batch is made of, read in this process."""
    return [loader.dataset[place] for place in next(iter(loader.batch_sampler))]  # type: ignore


def _collated(loader: DataLoader, items: list[Any], device: torch.device) -> list[Any]:
    images, targets, *rest = (loader.collate_fn or default_collate)(items)
    return [images.to(device), targets.to(device), *rest]
