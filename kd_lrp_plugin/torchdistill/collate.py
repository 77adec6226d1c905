"""Collate functions."""

from collections.abc import Mapping
from functools import partial

from timm.data import Mixup
from torch.utils.data import default_collate
from torchdistill.datasets.registry import register_collate_func

from kd_lrp_plugin.utils.validation import check_known, message, strict

MIXUP = "kd_lrp_mixup("  # what the keys of its collate functions begin with


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
    size. timm draws from NumPy's global generator, which the trainer seeds for each batch.

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
            size, labels outside of ``num_classes``, or images with ``companions``.

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
    key = f"{MIXUP}{num_classes}, {settings})"
    register_collate_func(partial(_mixed, mix), key=key)  # unlike a closure, it can be pickled
    return key


def _mixed(mix: Mixup, batch: list[tuple]) -> tuple:
    images, targets, *rest = default_collate(batch)
    supplement = rest[0] if rest and isinstance(rest[0], Mapping) else {}
    if named := sorted({"clean", "mask", "group"} & set(supplement)):
        fix = "Leave mixup out, or the companions: they would be those of other images."
        raise ValueError(message("mixup", "images without companions", named, fix))
    if len(images) % 2:
        fix = "Use an even batch_size, and drop_last: True."
        raise ValueError(message("mixup", "a batch of even size", len(images), fix))
    if int(targets.min()) < 0 or int(targets.max()) >= mix.num_classes:
        fix = "Set num_classes of mixup to the number of classes."
        got = sorted(set(targets.tolist()))
        raise ValueError(message("mixup", f"labels in [0, {mix.num_classes})", got, fix))
    return *mix(images, targets), *rest
