"""Pre-epoch processes: schedules of the weights of loss terms."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torchdistill.core.interfaces.pre_epoch_proc import (
    default_pre_epoch_process_with_teacher,
    default_pre_epoch_process_without_teacher,
)
from torchdistill.core.interfaces.registry import register_pre_epoch_proc_func

from kd_lrp_plugin.utils.validation import check_known, message, strict

_FINAL_WEIGHTS: WeakKeyDictionary[nn.Module, dict[str, float]] = WeakKeyDictionary()


@strict("weight_schedule")
def weight_schedule(terms: Mapping[str, Mapping[str, int]]) -> str:
    r"""Make and register a pre-epoch process that lets loss terms set in late, or slowly.

    In epoch e a term weighs ``final * clamp((e - after + 1) / max(warm_up, 1), 0, 1)``, with its
    weight in the criterion as the final one: nothing before epoch ``after``, all of it from the
    end of its ``warm_up`` on. The other terms are not scaled up meanwhile, so that the weights of
    ``DisWOTPlusLoss`` sum to one only after the last warm-up. The weight depends on the epoch
    alone, so that a resumed run needs no state.

    Epochs count from 0, as torchdistill's scripts and the trainer give them to
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
