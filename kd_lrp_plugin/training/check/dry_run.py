"""All problems of a config at once, each with its location, before any work is lost to them."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from kd_lrp_plugin.config.build import Assembly, BuiltModel, construct, get_stages
from kd_lrp_plugin.config.document import Document
from kd_lrp_plugin.config.nodes import describe_mark
from kd_lrp_plugin.data.images import ascii_name
from kd_lrp_plugin.data.validation import unreadable_images
from kd_lrp_plugin.torchdistill.group_dro import GroupDROLoss
from kd_lrp_plugin.torchdistill.high_level import check_finite
from kd_lrp_plugin.training.check.loaders import share
from kd_lrp_plugin.training.check.problems import CheckReport, check_keys
from kd_lrp_plugin.training.check.sections import SEE, build_models, check_sections
from kd_lrp_plugin.training.experiment import AUC, LAST, MONITOR, Experiment
from kd_lrp_plugin.training.meter import Meter
from kd_lrp_plugin.utils.distributed import DistributedContext
from kd_lrp_plugin.utils.preserved import preserved_generators
from kd_lrp_plugin.utils.validation import check_known, message

SAMPLE = 2_000  # training images that are read before a run, of those that never were


def check(
    config: Document, context: DistributedContext, known: dict[str, BuiltModel] | None = None
) -> CheckReport:
    """Build everything that a config names, take one step in each stage, and list what is wrong.

    What is built is handed on in the report, as it would be without the check: the steps are
    taken with copies, and the random number generators are those of the moment when the models
    were built.

    Args:
        config: see :func:`kd_lrp_plugin.config.document.resolve_config`.
        context: where to compute, and how many will; the other processes are left alone.
        known: models of earlier checks, by what the configs say of them; they are not built
            again, and what is built is added. For checks only: training would change them.

    Returns:
        Every problem and warning, each with its location in the file.
    """
    report = CheckReport(config)
    content: dict[str, Any] | None = None

    def note(mark: yaml.Mark, error: Exception) -> None:
        report.add("", error, describe_mark(mark))
        report.failed.append(mark)

    with report.at("dependencies"):
        content = construct(config, note)
    if content is None:
        return report
    with report.at(""):
        check_keys(report, "config", "", content)
        for section in ("datasets", "models", "train", "test"):
            if not isinstance(content.get(section), Mapping) or not content[section]:
                got = content.get(section)
                report.add("", message("config", f"a section {section!r}", got, SEE))
        if report.problems and not report.failed:
            return report
        models = content.get("models")
        models = models if isinstance(models, Mapping) else {}
        report.assembly = Assembly(content, build_models(report, models, known))
        with preserved_generators():
            _check_copy(report, report.assembly.copy(), context)
    return report


def _check_copy(report: CheckReport, copy: Assembly, context: DistributedContext) -> None:
    check_sections(report, copy, context)
    if not report.problems:
        _check_images(report, copy.content)
    if not report.problems:
        _check_steps(report, copy, context)


def _check_images(report: CheckReport, content: Mapping[str, Any]) -> None:
    """Whether images can be read: of those that only train, a sample, for an epoch reads them all.

    What a later test could not read would be found when all epochs are over.
    """
    key_paths: dict[str, str] = {}
    test = content["test"]["test_data_loader"]["dataset_id"]
    evaluated = {test}
    for key_path, stage in get_stages(content["train"]).items():
        for name in ("train_data_loader", "val_data_loader"):
            if stage.get(name):
                key_paths.setdefault(stage[name]["dataset_id"], f"{key_path}.{name}.dataset_id")
        if stage.get("val_data_loader"):
            judge = stage["val_data_loader"]["dataset_id"]
            evaluated.add(judge)
            if _are_prepared_otherwise(content["datasets"][judge], content["datasets"][test]):
                words = "prepares images otherwise than the test set does: predict prepares as "
                words += "this one does, so that test figures do not hold for what it predicts"
                report.warn(f"{key_path}.val_data_loader.dataset_id", words)
            chooses = content["train"].get("monitor") != LAST or stage.get("early_stopping")
            if chooses and content["datasets"][judge] is content["datasets"][test]:
                words = "the test images, which so choose the epoch: their figures will flatter"
                report.warn(f"{key_path}.val_data_loader.dataset_id", words)
    key_paths.setdefault(test, "test.test_data_loader.dataset_id")
    for name, key_path in key_paths.items():
        with report.at(key_path):
            most = None if name in evaluated else SAMPLE
            broken = unreadable_images(content["datasets"][name], most, name)
            if broken:
                shown = "; ".join(
                    f"{ascii_name(file)} ({why})" for file, why in list(broken.items())[:5]
                )
                fix = "Repair or remove them, or set skip_corrupt: True to leave them out."
                got = f"{len(broken)} of {name} that cannot be read: {shown}"
                raise ValueError(message("images", "readable files", got, fix))


def _are_prepared_otherwise(validation: Any, test: Any) -> bool:
    """Whether their transforms are known to differ, by what they say of themselves."""
    ours, theirs = (repr(getattr(images, "transform", None)) for images in (validation, test))
    return ours != theirs and not any(text == "None" or " at 0x" in text for text in (ours, theirs))


def _check_steps(report: CheckReport, assembly: Assembly, context: DistributedContext) -> None:
    """A step of each stage, alone in this process, and a batch of all that is evaluated."""
    with report.at("models"):
        experiment = Experiment(assembly, DistributedContext(context.device))
    content = assembly.content
    stages, taken = get_stages(content["train"]), Counter[Any]()
    for number, (key_path, stage) in enumerate(stages.items(), start=1):
        if report.problems:
            return
        with report.at(key_path):
            while experiment.stage < number:
                experiment.box.current_epoch = experiment.box.stage_end_epoch - 1
                experiment.end_epoch(0.0, stop=False)
            if experiment.cache is not None:
                with report.at(f"{key_path}.teacher.forward_proc"):
                    experiment.cache.prepare()
                    report.notes.append(str(experiment.cache))
                if report.problems:
                    return
            if loader := stage.get("train_data_loader"):
                own = share(content["datasets"][loader["dataset_id"]], loader, context)
            _check_accumulation(report, key_path, experiment, len(own), stage["num_epochs"])
            _check_schedule(report, key_path, experiment, len(own), taken)
            _check_trained(report, key_path, experiment)
            first, box = experiment.epochs_done, experiment.box
            last = getattr(box, "stage_end_epoch", box.num_epochs) - 1
            scheduled = "pre_epoch_process" in stage  # terms may set in late
            for box.current_epoch in (first, last) if scheduled else (first,):
                _check_step(report, key_path, experiment, context, own)
                if report.problems:
                    return
            validation = f"{key_path}.val_data_loader"
            _check_evaluation(report, validation, experiment, experiment.val_loader)
    if not report.problems:
        _check_evaluation(report, "test.test_data_loader", experiment, experiment.test_loader)


def _check_accumulation(
    report: CheckReport, key_path: str, experiment: Experiment, batches: int, epochs: int
) -> None:
    steps = experiment.box.grad_accum_step
    with report.at(f"{key_path}.optimizer"):
        if batches * epochs < steps:
            each = f"{batches} in each of {epochs} epochs"
            expected = f"at most {batches * epochs}, the batches of a process ({each})"
            fix = "Lower it: no step would be taken."
            raise ValueError(message("grad_accum_step", expected, steps, fix))


def _check_schedule(
    report: CheckReport, key_path: str, experiment: Experiment, batches: int, taken: Counter[Any]
) -> None:
    """OneCycleLR has an end, and would stop a run that goes on; a stage may keep that of another.

    Args:
        report: added to.
        key_path: of the stage.
        experiment: in the stage.
        batches: of a process in an epoch.
        taken: steps of each scheduler in the stages before; those of this one are added.
    """
    box, every = experiment.box, experiment.box.scheduling_step or 0
    epochs, scheduler = experiment.stage_config["num_epochs"], box.lr_scheduler
    within = every > 0
    steps = batches * epochs // math.lcm(every, box.grad_accum_step) if within else epochs
    taken[scheduler] += steps
    total = getattr(scheduler, "total_steps", None)
    with report.at(f"{key_path}.scheduler"):
        if total is not None and taken[scheduler] > total:
            expected = f"{taken[scheduler]} or more, the steps of all epochs"
            fix = f"Set it to {taken[scheduler]}."
            raise ValueError(message("total_steps", expected, total, fix))


def _check_trained(report: CheckReport, key_path: str, experiment: Experiment) -> None:
    """Whether the optimizer has all that a stage leaves free to train."""
    groups = experiment.box.optimizer.param_groups
    held = {id(parameter) for group in groups for parameter in group["params"]}
    named = experiment.student.named_parameters()
    left = [name for name, p in named if p.requires_grad and id(p) not in held]
    if left and not experiment.stage_config.get("optimizer"):
        with report.at(f"{key_path}.optimizer"):
            got = f"that of an earlier stage without {len(left)} tensors, such as {left[:3]}"
            fix = "Give the stage an optimizer of its own, or freeze them (frozen_modules)."
            expected = "one that has all that is trained"
            raise ValueError(message("optimizer", expected, got, fix))
    if left:
        words = f"not all that could be trained: {len(left)} tensors stay, such as {left[:3]}"
        report.warn(f"{key_path}.optimizer", words)


def _check_step(
    report: CheckReport,
    key_path: str,
    experiment: Experiment,
    context: DistributedContext,
    own: DataLoader,
) -> None:
    """One batch through everything, as a step would take it; ``own`` has a process's share."""
    box, device = experiment.box, experiment.context.device
    loader = box.train_data_loader
    with report.at(f"{key_path}.train_data_loader"):
        items = _items(loader)
        images, targets, supplement = _collated(loader, items, device)
        # The last batch of an epoch may be too small for a loss, or of odd size for mixup.
        rest = 0 if own.drop_last else len(own.sampler) % (own.batch_size or 1)  # type: ignore
        short = _collated(loader, items[:rest], device) if rest else None
    if report.problems:
        return
    with report.at(f"{key_path}.pre_epoch_process"):
        experiment.begin_epoch()
    roles = {experiment.student_name.removesuffix("_model"): experiment.student}
    if experiment.teacher is not None:
        roles["teacher"] = experiment.teacher
    for role, model in roles.items():
        derived = role != "teacher" or box.teacher_updatable
        with report.at(f"{key_path}.{role}.forward_proc"), torch.set_grad_enabled(derived):
            procedure = getattr(box, f"{role}_forward_proc")
            procedure(model, images, targets, supplement)
    if report.problems:
        return
    if short is not None:  # in training mode: norms, too, may need more than one image
        with report.at(f"{key_path}.train_data_loader"), torch.no_grad():
            try:
                experiment.loss(*short[:3])
            except (ValueError, RuntimeError) as error:
                got, fix = f"a last one of {rest}", f"Set drop_last: True. ({error})"
                raise ValueError(message("batches", "full ones", got, fix)) from error
    classifies = experiment.student is experiment.original
    meter = Meter(box.criterion, False, classifies, experiment.parts.subclass_of)
    with report.at(f"{key_path}.criterion"), meter:
        loss = experiment.training_loss(images, targets, supplement)
        check_finite(loss, meter.latest)
        meter.update(loss, targets)
        left = _step(experiment, loss, images)
        if left and context.world_size > 1:
            got = f"none for {len(left)}, such as {left[:3]}"
            fix = "Give CE or KL a weight, or freeze them (frozen_modules)."
            expected = "a gradient for all that is trained, under torchrun"
            raise ValueError(message("criterion", expected, got, fix))
        with experiment.evaluating():
            experiment.loss(images, targets, supplement)
    with report.at("train.monitor"):
        known = [MONITOR, AUC, LAST]
        if experiment.parts.knows_subclasses:
            known.append("val_subclass_accuracy")
        if not experiment.missing_wrapper(experiment.val_loader):
            terms = experiment.losses()
            steady = [n for n in meter.latest if not isinstance(terms.get(n), GroupDROLoss)]
            known += ["val_loss", *(f"val_{name}" for name in steady)]
        if experiment.monitor == "val_loss" and not experiment.loss_is_measure:
            fix = "Monitor a term, such as val_ce: the weights within the loss change as epochs go."
            raise ValueError(message("monitor", "one measure of all epochs", "val_loss", fix))
        check_known("train.monitor", experiment.monitor, known)
        if experiment.monitor == AUC:
            _check_two_classes(experiment)


def _check_two_classes(experiment: Experiment) -> None:
    """Of images of one class there is no ROC curve, which an epoch of training would end with."""
    for name, loader in (("val", experiment.val_loader), ("test", experiment.test_loader)):
        dataset = loader.dataset
        known = getattr(dataset, "class_targets", None) or getattr(dataset, "targets", ())
        labels = np.asarray(known)
        if len(labels) and labels.ndim == 1 and len(np.unique(labels)) < 2:
            fix = "Monitor val_accuracy, or take other images."
            got = f"{len(labels)} {name} images, all of one"
            raise ValueError(message("monitor: val_auc", "images of two classes", got, fix))


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
    report: CheckReport, key_path: str, experiment: Experiment, loader: DataLoader
) -> None:
    """One batch, as validation and test will take it."""
    original = experiment.original
    meter = Meter(experiment.box.criterion, subclass_of=experiment.parts.subclass_of)
    with report.at(key_path), experiment.evaluating(), meter:
        batch = _collated(loader, _items(loader), experiment.context.device)
        images, targets, supplement = [*batch, {}][:3]
        if experiment.missing_wrapper(loader) or (len(targets) == 1 and meter.compares):
            meter.count(original(images), targets)
        else:
            logits = None if experiment.student is original else original(images)
            meter.update(experiment.loss(images, targets, supplement), targets, logits)


def _items(loader: DataLoader) -> list[Any]:
    """What a loader's first batch is made of, read in this process."""
    return [loader.dataset[index] for index in next(iter(loader.batch_sampler))]  # type: ignore


def _collated(loader: DataLoader, items: list[Any], device: torch.device) -> list[Any]:
    images, targets, *rest = (loader.collate_fn or default_collate)(items)
    return [images.to(device), targets.to(device), *rest]
