"""The rim, continued: how a training is run, whatever it trains: schedules, weights, mixing.

YAML reaches these under ``kd_lrp_plugin.torchdistill``.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from timm.data import Mixup
from torch import nn
from torch.utils.data import default_collate
from torchdistill.core.interfaces.pre_epoch_proc import (
    default_pre_epoch_process_with_teacher,
    default_pre_epoch_process_without_teacher,
)
from torchdistill.core.interfaces.registry import register_pre_epoch_proc_func
from torchdistill.datasets.registry import register_collate_func

from kd_lrp_plugin.checks import check_known, message, strict

_FINAL_WEIGHTS: WeakKeyDictionary[nn.Module, dict[str, float]] = WeakKeyDictionary()


@strict("weight_schedule")
def weight_schedule(terms: Mapping[str, Mapping[str, int]]) -> str:
    r"""Make and register a pre-epoch process that lets loss terms set in late, or slowly.

    In epoch e a term weighs ``final * clamp((e - after + 1) / max(warm_up, 1), 0, 1)``, with its
    weight in the criterion as the final one: nothing before epoch ``after``, all of it from the
    end of its ``warm_up`` on. The other terms are not scaled up meanwhile, so that the weights of
    ``DisWOTPlusLoss`` sum to one only after the last warm-up. The weight depends on the epoch
    alone, so that a resumed run needs no state.

    Epochs count from 0, as torchdistill's scripts and the driver give them to
    ``pre_epoch_process``, and in a multi-stage training over all stages (``box.current_epoch``).
    Each stage that is to follow a schedule names one. The process does what torchdistill's default
    does, too.

    ``DisWOTPlusLoss`` does not compute a term while it weighs nothing; torchdistill's
    ``WeightedSumLoss`` does.

    Args:
        terms: by name of the term in the criterion, ``{after: first epoch, warm_up: epochs}``,
            0 each if left out.

    Returns:
        The key under which it is registered, which is what ``pre_epoch_process`` takes.

    Raises:
        ValueError: for an unknown keyword or no epoch; as an epoch begins, for a criterion
            without such terms.

    Example:
        .. code-block:: yaml

            train:
              pre_epoch_process: !import_call
                key: kd_lrp_plugin.torchdistill.weight_schedule
                init: {kwargs: {terms: {semantic: {after: 5, warm_up: 10}}}}
    """
    for name, when in terms.items():
        where = f"weight_schedule: {name}"
        if not isinstance(when, Mapping):
            fix = "For example {after: 5, warm_up: 10}."
            raise ValueError(message(where, "a mapping", when, fix))
        for key, epochs in when.items():
            check_known(f"{where}: keyword", key, ("after", "warm_up"))
            if type(epochs) is not int or epochs < 0:
                fix = "Count epochs from 0."
                raise ValueError(message(f"{where}: {key}", "an integer >= 0", epochs, fix))

    def set_weights(box: Any, epoch: int | None = None, **kwargs: Any) -> None:
        if hasattr(box, "teacher_model"):
            default_pre_epoch_process_with_teacher(box, epoch=epoch, **kwargs)
        else:
            default_pre_epoch_process_without_teacher(box, epoch=epoch, **kwargs)
        if epoch is None:
            fix = "Call box.pre_epoch_process(epoch=epoch), with epochs from 0."
            raise ValueError(message("weight_schedule", "an epoch", None, fix))
        in_use = getattr(box.criterion, "term_dict", {})
        final = _FINAL_WEIGHTS.setdefault(box.criterion, {n: w for n, (_, w) in in_use.items()})
        for name, when in terms.items():
            check_known("weight_schedule: term of the criterion", name, in_use)
            share = (epoch - when.get("after", 0) + 1) / max(when.get("warm_up", 0), 1)
            in_use[name] = in_use[name][0], final[name] * min(max(share, 0), 1)

    key = f"kd_lrp_weight_schedule({ {name: dict(when) for name, when in terms.items()} })"
    register_pre_epoch_proc_func(set_weights, key=key)
    return key


@strict("class_weights")
def class_weights(dataset: Any) -> list[float]:
    """Weights that make up for the imbalance of a data set: n / (classes * images of the class).

    Args:
        dataset: one with ``targets``, class indices; ``classes``, if it has them, says how many.

    Returns:
        One weight per class; their mean over the images is 1.

    Raises:
        ValueError: for a data set without targets, or without an image of some class.

    Example:
        A YAML alias hands over the data set itself, without building another:

        .. code-block:: yaml

            datasets:
              &train_set mri/train: &train_images !import_call
                key: kd_lrp_plugin.torchdistill.folder_images
                init: {kwargs: {root: data/mri, split: Training}}
            train:
              criterion:
                key: DisWOTPlusLoss
                kwargs:
                  class_weights: !import_call
                    key: kd_lrp_plugin.torchdistill.class_weights
                    init: {kwargs: {dataset: *train_images}}

    Reference:
        King and Zeng, 2001, by ``sklearn.utils.class_weight.compute_class_weight``.
    """
    from sklearn.utils.class_weight import compute_class_weight  # slow to import

    targets = np.asarray(getattr(dataset, "targets", []))
    if not targets.size:
        fix = "Give the alias of a data set node, such as *train_images."
        got = f"{type(dataset).__name__} without any"
        raise ValueError(message("class_weights", "a data set with targets", got, fix))
    names = getattr(dataset, "classes", None) or range(int(targets.max()) + 1)
    counts = np.bincount(targets, minlength=len(names))
    if absent := [name for name, count in zip(names, counts, strict=True) if not count]:
        fix = "Leave the class out of the data sets, or the class weights out."
        got = f"none of {absent}"
        raise ValueError(message("class_weights", "an image or more of each class", got, fix))
    return compute_class_weight("balanced", classes=np.arange(len(names)), y=targets).tolist()


@strict("mixup")
def mixup(
    num_classes: int,
    mixup_alpha: float = 1.0,
    cutmix_alpha: float = 0.0,
    prob: float = 1.0,
    switch_prob: float = 0.5,
    mode: str = "batch",
    label_smoothing: float = 0.0,
) -> str:
    """Make and register a collate function that mixes images by ``timm.data.Mixup``.

    Targets become weights (n, classes), which ``DisWOTPlusLoss`` and the relevance of the "label"
    take as they are. Use it for the training loader, as ``collate_fn``, with batches of an even
    size. timm draws from NumPy's global generator, which the driver seeds for each epoch, and
    PyTorch for each worker of a loader.

    Args:
        num_classes: outputs of the head.
        mixup_alpha: of the beta distribution for mixup; 0 for none.
        cutmix_alpha: the same for CutMix.
        prob: share of batches, or of elements, that are mixed.
        switch_prob: of CutMix instead of mixup, where both are on.
        mode: mix a whole "batch", each "pair" or each "elem" in a way of its own.
        label_smoothing: of the mixed targets; leave that of ``DisWOTPlusLoss`` at 0 then.

    Returns:
        The key under which it is registered, which is what ``collate_fn`` takes.

    Raises:
        ValueError: if both alphas are 0 or one is negative; from the loader, for a batch of odd
            size, or labels outside of ``num_classes``.

    Example:
        .. code-block:: yaml

            train:
              train_data_loader:
                collate_fn: !import_call
                  key: kd_lrp_plugin.torchdistill.mixup
                  init: {kwargs: {num_classes: 4, mixup_alpha: 0.2}}
    """
    check_known("mixup: mode", mode, ("batch", "pair", "elem"))
    if min(mixup_alpha, cutmix_alpha) < 0 or not (mixup_alpha or cutmix_alpha):
        got = {"mixup_alpha": mixup_alpha, "cutmix_alpha": cutmix_alpha}
        raise ValueError(message("mixup", "an alpha above 0, none below", got, "Use 0.2."))
    settings = (mixup_alpha, cutmix_alpha, None, prob, switch_prob, mode, True, label_smoothing)
    mix = Mixup(*settings, num_classes)
    key = f"kd_lrp_mixup({num_classes}, {settings})"
    register_collate_func(partial(_mixed, mix), key=key)  # unlike a closure, it can be pickled
    return key


def _mixed(mix: Mixup, batch: list[tuple]) -> tuple:
    images, targets, *rest = default_collate(batch)
    if len(images) % 2:
        fix = "Use an even batch_size, and drop_last: True."
        raise ValueError(message("mixup", "a batch of even size", len(images), fix))
    if int(targets.min()) < 0 or int(targets.max()) >= mix.num_classes:
        fix = "Set num_classes of mixup to the number of classes."
        got = sorted(set(targets.tolist()))
        raise ValueError(message("mixup", f"labels in [0, {mix.num_classes})", got, fix))
    return *mix(images, targets), *rest
