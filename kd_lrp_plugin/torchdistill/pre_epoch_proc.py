"""Pre-epoch processes: schedules of the weights of loss terms."""

import logging
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

logger = logging.getLogger(__name__)
_FULL_WEIGHTS: WeakKeyDictionary[nn.Module, dict[str, float]] = WeakKeyDictionary()


@strict("weight_schedule")
def weight_schedule(terms: Mapping[str, Mapping[str, float]]) -> str:
    r"""Make and register a pre-epoch process that lets loss terms set in late or slowly, or fade.

    In epoch e a term weighs ``full * clamp((e - after + 1) / max(warm_up, 1), 0, 1)``, with its
    weight in the criterion as the full one: nothing before epoch ``after``, all of it from the
    end of its ``warm_up`` on; where no epoch is left for it, a warning says so. The other terms
    are not scaled up meanwhile, so that the weights of ``DisWOTPlusLoss`` sum to one only after
    the last warm-up.

    A term with ``until`` weighs ``full * clamp(1 - e / until, 0, 1)``: all of it at first, nothing
    from epoch ``until`` on; a number below 1 is a share of all epochs. What it loses goes to the
    terms without ``until``, in proportion to their full weights, so that the sum stays. Maps that
    fade hold the student back in the end neither from its labels nor from a shortcut.

    The weight depends on the epoch alone, so that a resumed run needs no state.

    Epochs count from 0, as torchdistill's scripts and the trainer give them to
    ``pre_epoch_process``, and in a multi-stage training over all stages (``box.current_epoch``).
    Each stage that is to follow a schedule names one. The process does what torchdistill's default
    does, too.

    ``DisWOTPlusLoss`` does not compute a term while it weighs nothing; torchdistill's
    ``WeightedSumLoss`` does.

    Args:
        terms: by name of the term in the criterion, ``{after: first epoch, warm_up: epochs}``,
            0 each if left out, or ``{until: epoch or share}``.

    Returns:
        The key under which it is registered, which is what ``pre_epoch_process`` takes.

    Raises:
        ValueError: for an unknown keyword, ``until`` beside another, or no epoch; as an epoch
            begins, for a criterion without such terms, or without one that does not fade.

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
            check_known(f"{where}: keyword", key, ("after", "warm_up", "until"))
            if key == "until" and type(epochs) is float and 0 < epochs < 1:
                continue
            least = int(key == "until")
            if type(epochs) is not int or epochs < least:
                expected, fix = f"an integer >= {least}", "Count epochs from 0."
                if key == "until":
                    expected, fix = f"{expected}, or a share in (0, 1)", "Such as 0.7."
                raise ValueError(message(f"{where}: {key}", expected, epochs, fix))
        if "until" in when and len(when) > 1:
            fix = "A term sets in, or fades."
            raise ValueError(message(where, "until alone", sorted(when), fix))

    def set_weights(box: Any, epoch: int | None = None, **kwargs: Any) -> None:
        if hasattr(box, "teacher_model"):
            default_pre_epoch_process_with_teacher(box, epoch=epoch, **kwargs)
        else:
            default_pre_epoch_process_without_teacher(box, epoch=epoch, **kwargs)
        if epoch is None:
            fix = "Call box.pre_epoch_process(epoch=epoch), with epochs from 0."
            raise ValueError(message("weight_schedule", "an epoch", None, fix))
        in_use = getattr(box.criterion, "term_dict", {})
        is_first = box.criterion not in _FULL_WEIGHTS
        full = full_weights(box.criterion)
        for name in terms:
            check_known("weight_schedule: term of the criterion", name, in_use)
            if is_first and (after := terms[name].get("after", 0)) >= box.num_epochs:
                words = "sets in with epoch %d, and there are %d: it never weighs anything"
                logger.warning(f"weight_schedule: %s {words}", name, after, box.num_epochs)
        for name, weight in scheduled_weights(full, terms, epoch, box.num_epochs).items():
            in_use[name] = in_use[name][0], weight

    key = f"kd_lrp_weight_schedule({ {name: dict(when) for name, when in terms.items()} })"
    register_pre_epoch_proc_func(set_weights, key=key)
    return key


def full_weights(criterion: nn.Module) -> dict[str, float]:
    """The weights that the terms of a criterion had when this was first asked of it."""
    terms = getattr(criterion, "term_dict", {})
    return _FULL_WEIGHTS.setdefault(
        criterion, {name: weight for name, (_, weight) in terms.items()}
    )


def scheduled_weights(
    full: Mapping[str, float], terms: Mapping[str, Mapping[str, float]], epoch: int, epochs: int
) -> dict[str, float]:
    """The weights of all terms in an epoch, by the formulas of :func:`weight_schedule`.

    Example:
        >>> full = {"ce": 0.05, "kl": 0.05, "semantic": 0.9}
        >>> weights = scheduled_weights(full, {"semantic": {"until": 0.5}}, epoch=2, epochs=8)
        >>> {name: round(weight, 3) for name, weight in weights.items()}
        {'ce': 0.275, 'kl': 0.275, 'semantic': 0.45}
    """
    weights = dict(full)
    for name, when in terms.items():
        if "until" in when:
            until = when["until"] if when["until"] >= 1 else when["until"] * epochs
            share = 1 - epoch / until
        else:
            share = (epoch - when.get("after", 0) + 1) / max(when.get("warm_up", 0), 1)
        weights[name] = full[name] * min(max(share, 0), 1)
    fading = [name for name, when in terms.items() if "until" in when]
    if not fading:
        return weights
    lasting = {name: weight for name, weight in full.items() if name not in fading}
    if not sum(lasting.values()):
        fix = "Give alpha or beta a weight, to which that of the others goes."
        expected = "a term without until, with a weight"
        raise ValueError(message("weight_schedule", expected, dict(full), fix))
    lost = sum(full[name] - weights[name] for name in fading)
    for name, weight in lasting.items():
        weights[name] += lost * weight / sum(lasting.values())
    return weights
