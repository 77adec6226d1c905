"""torchdistill's box, built from models and data sets that are there already."""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.interfaces.registry import register_post_forward_proc_func
from torchdistill.core.training import get_training_box

from kd_lrp_plugin.config.build import get_stages
from kd_lrp_plugin.data.subclasses import Subclasses
from kd_lrp_plugin.training.cache.spec import wrap_images
from kd_lrp_plugin.utils.distributed import DistributedContext
from kd_lrp_plugin.utils.validation import message


@register_post_forward_proc_func
def scaled_step(box: Any, loss: Tensor, metrics: Any = None, **_: Any) -> None:
    """torchdistill's default after a forward pass, with the loss scaled to suit float16."""
    box.stage_grad_count += 1
    box.grad_scaler.scale(loss / box.grad_accum_step).backward()
    if box.stage_grad_count % box.grad_accum_step != 0:
        return
    if box.max_grad_norm is not None:
        box.grad_scaler.unscale_(box.optimizer)
        parameters = [p for group in box.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, box.max_grad_norm)
    box.grad_scaler.step(box.optimizer)
    box.grad_scaler.update()
    box.optimizer.zero_grad()
    every, scheduler = box.scheduling_step or 0, box.lr_scheduler
    if scheduler is not None and every > 0 and box.stage_grad_count % every == 0:
        restarts = isinstance(scheduler, CosineAnnealingWarmRestarts)  # counts batches, not steps
        scheduler.step(*[box.stage_grad_count // every] * restarts)


class Datasets(dict[str, Any]):
    """Data sets by name, each handed out as a shallow copy.

    A wrapper around a data set may change it (torchdistill's for SSKD takes its transform away),
    and of one data set several loaders are made.
    """

    def __getitem__(self, name: str) -> Any:
        return copy(super().__getitem__(name))


def check_head(role: str, model: nn.Module, dataset: Any, classes: Sequence[str]) -> None:
    """Raise ValueError for a model of other channels, or fewer outputs than there are classes.

    Of data that are labelled by subclass it is one output for each of them, and no further one.
    """
    image = dataset[0][0]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    was_training = model.training
    try:
        with torch.no_grad():
            outputs = model.eval()(image[None].to(device)).shape[-1]
    except RuntimeError as error:
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        if first is None or first.in_channels == len(image):
            raise
        fix = (
            f"Set channels: {first.in_channels} of the data sets, or timm_kwargs: "
            f"{{in_chans: {len(image)}}} of models.{role}.kwargs."
        )
        expected = f"images of {first.in_channels} channels"
        raise ValueError(message(f"models.{role}", expected, len(image), fix)) from error
    model.train(was_training)
    by_subclass = isinstance(dataset, Subclasses)
    if by_subclass:
        classes = dataset.subclasses
    needed = len(classes) or max(getattr(dataset, "targets", [0])) + 1
    if outputs < needed or (by_subclass and outputs > needed):
        fix = f"Set models.{role}.kwargs.num_classes to {needed}."
        expected = f"{needed} outputs{', one per subclass' if by_subclass else ' or more'}"
        raise ValueError(message(f"models.{role}", expected, outputs, fix))


def build_box(
    models: Mapping[str, nn.Module],
    datasets: Datasets,
    train: dict[str, Any],
    context: DistributedContext,
) -> Any:
    """A box of a single stage or of several, with a teacher or without.

    Args:
        models: by their key in the config, on the device.
        datasets: of the config.
        train: of the config; changed in place.
        context: this process.
    """
    student = models["student_model"] if "student_model" in models else models["model"]
    if how := train.get("compile"):
        student.compile(**(how if isinstance(how, Mapping) else {}))
    scales = train.get("precision") == "float16"
    for key_path, stage in get_stages(train).items():
        wrap_images(key_path, stage)
        if scales:
            stage["post_forward_process"] = scaled_step.__name__
        for role in ("teacher", "student", "model"):
            (stage.get(role) or {}).pop("wrapper", None)  # the experiment wraps the student itself
    device_ids = [context.device.index] if context.device.type == "cuda" else None
    rest = (datasets, train, context.device, device_ids, context.world_size > 1, 1)
    if "teacher_model" in models:
        box = get_distillation_box(models["teacher_model"], student, *rest)
    else:
        box = get_training_box(student, *rest)
    box.save_stage_ckpt = lambda *_: None  # the run folder holds what a stage has made
    if scales:
        box.grad_scaler = torch.amp.GradScaler(context.device.type)
    return box
