"""The high-level loss: classification, distillation, maps and relations in one weighted sum."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.losses.high_level import AbstractLoss
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT, register_high_level_loss

from kd_lrp_plugin import losses
from kd_lrp_plugin.torchdistill import right_reasons
from kd_lrp_plugin.torchdistill.balance import GradientBalance
from kd_lrp_plugin.torchdistill.forward_proc import get_logits, recorded
from kd_lrp_plugin.torchdistill.mid_level import COMPARISONS
from kd_lrp_plugin.utils.validation import (
    check_known,
    check_targets,
    find_labelled,
    message,
    strict,
)


class _CrossEntropy(nn.Module):
    def __init__(self, label_smoothing: float, weights: Sequence[float] | Tensor | None) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            fix = "Use 0.1, or 0 for none."
            where = "DisWOTPlusLoss: label_smoothing"
            raise ValueError(message(where, "a number in [0, 1)", label_smoothing, fix))
        self.label_smoothing = label_smoothing
        self.weights: Tensor | None
        found = None if weights is None else torch.as_tensor(weights)
        if found is not None and not (found.ndim == 1 and ((found > 0) & found.isfinite()).all()):
            fix = "kd_lrp_plugin.torchdistill.class_weights makes them from a data set."
            where = "DisWOTPlusLoss: class_weights"
            raise ValueError(message(where, "a positive weight per class", found.tolist(), fix))
        self.register_buffer("weights", found, persistent=False)

    def forward(self, student_io_dict: Mapping, _: Mapping, targets: Tensor) -> Tensor:
        logits = get_logits("DisWOTPlusLoss", "student", student_io_dict)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # autocast's are half
        if (known := find_labelled(targets)) is not None:
            logits, targets = logits[known], targets[known]
        check_targets("DisWOTPlusLoss", targets, logits)
        weights = None if self.weights is None else self.weights.to(logits)
        if weights is not None and len(weights) != logits.shape[1]:
            expected = f"{logits.shape[1]} class_weights, one per output of the head"
            fix = "Give one weight per class, in the order of the classes."
            raise ValueError(message("DisWOTPlusLoss", expected, len(weights), fix))
        if not len(targets):
            return (logits * 0).sum()
        smoothing = self.label_smoothing
        return nn.functional.cross_entropy(logits, targets, weights, label_smoothing=smoothing)


class _KLDivergence(nn.Module):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student_io_dict: Mapping, teacher_io_dict: Mapping, _: Tensor) -> Tensor:
        student = get_logits("DisWOTPlusLoss", "student", student_io_dict)
        teacher = get_logits("DisWOTPlusLoss", "teacher", teacher_io_dict)
        return losses.kl_divergence(student, teacher, self.temperature)


class DisWOTPlusLoss(AbstractLoss):
    r"""Classification, distillation, semantic and relation terms, weighted to a sum of one.

    .. math:: L = \alpha L_{CE} + \beta L_{KL} + \gamma L_{sem} + \delta L_{rel}

    A term of weight zero is not computed, nor one that :func:`weight_schedule` holds at zero.
    Images of :func:`with_unlabelled` that have no label count in all terms but the cross entropy,
    which is the mean over the others, and 0 where there are none.

    Args:
        alpha: weight of the cross entropy.
        beta: weight of the KL divergence.
        gamma: weight of the semantic term.
        delta: weight of the relation term.
        temperature: of the KL divergence.
        semantic: mid-level loss of the semantic term, as ``{key: ..., kwargs: ...}``;
            ``RightReasonsLoss`` needs no teacher.
        relation: mid-level loss of the relation term, likewise.
        label_smoothing: share of the cross entropy's target that is spread over all classes.
        class_weights: of the cross entropy, one positive weight per class, such as those of
            :func:`class_weights`. Of class indices the weighted mean is taken, of soft targets
            the sum over the batch, divided by its size, as PyTorch does.
        balance: "gradient" takes the weights for shares of the gradient at the student's recorded
            layers: each step chooses factors by :class:`GradientBalance`, constants for the
            derivative, with cross entropy and KL divergence as the terms of reference. The scale
            of a distance no longer matters; the student needs a :func:`recorder` whatever the
            terms. A weight that a schedule has lowered is a lower share. With gradients disabled,
            as in validation, the latest factors are used, so that totals of different epochs are
            no one measure. Each term costs a backward pass down to the first recorded layer.

    Attributes:
        terms: value of each term computed, unweighted, of the latest batch, in training and
            validation.
        factors: what each of the terms was multiplied by.

    Raises:
        ValueError: if a weight is negative or the weights do not sum to one, if the class
            weights do not fit, if no term is left in an epoch, or if balance finds no recording.
        FloatingPointError: in a step whose loss is not finite, with the terms at fault.

    Reference:
        The thesis, eq. 2.14-2.15, which states no weights; these are ours.
    """

    def __init__(
        self,
        alpha: float = 0.4,
        beta: float = 0.4,
        gamma: float = 0.1,
        delta: float = 0.1,
        temperature: float = 4.0,
        semantic: Mapping[str, Any] | None = None,
        relation: Mapping[str, Any] | None = None,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | Tensor | None = None,
        balance: str | None = None,
    ) -> None:
        super().__init__()
        weights = {"alpha": alpha, "beta": beta, "gamma": gamma, "delta": delta}
        if min(weights.values()) < 0 or abs(sum(weights.values()) - 1) > 1e-6:
            fix = "Change them so that alpha + beta + gamma + delta = 1."
            got = f"{weights} with sum {sum(weights.values()):g}"
            raise ValueError(message("DisWOTPlusLoss", "weights of at least 0, sum 1", got, fix))
        terms = {
            "ce": (_CrossEntropy(label_smoothing, class_weights), alpha),
            "kl": (_KLDivergence(temperature), beta),
            "semantic": (_term("semantic", semantic, "LRPSemanticCosineLoss"), gamma),
            "relation": (_term("relation", relation, "RelationCosineLoss"), delta),
        }
        self.term_dict = {name: term for name, term in terms.items() if term[1] > 0}
        if balance is not None:
            check_known("DisWOTPlusLoss: balance", balance, ("gradient",))
        self.balance = GradientBalance(list(self.term_dict), ("ce", "kl")) if balance else None
        self.terms: dict[str, Tensor] = {}
        self.factors: Mapping[str, Tensor | float] = {}

    def forward(self, io_dict: Mapping, model_loss_dict: Mapping, targets: Tensor) -> Tensor:
        parts = {name: part for name, part in self.term_dict.items() if part[1] > 0}
        if not parts:
            fix = "Leave one term out of weight_schedule, or let one begin with epoch 0."
            raise ValueError(message("DisWOTPlusLoss", "a term in this epoch", "none", fix))
        # For the terms, autocast has done its part; their matrix products are not for it.
        with torch.autocast(targets.device.type, enabled=False):
            values = {
                name: term(io_dict["student"], io_dict["teacher"], targets)
                for name, (term, _) in parts.items()
            }
            self.terms = {
                name: value.detach()
                for name, value in values.items()
                if getattr(parts[name][0], "computed", True)
            }
            self.factors = self._choose_factors(
                {name: weight for name, (_, weight) in parts.items()}, values, io_dict
            )
            total = torch.stack([self.factors[name] * value for name, value in values.items()])
            total = total.sum()
        check_finite(total, self.terms)
        return total

    def _choose_factors(
        self, weights: Mapping[str, float], values: Mapping[str, Tensor], io_dict: Mapping
    ) -> Mapping[str, Tensor | float]:
        if self.balance is None:
            return weights
        _, recording = recorded(io_dict["student"], "student", "DisWOTPlusLoss: balance")
        if torch.is_grad_enabled():
            check_finite(torch.stack(list(values.values())).sum(), self.terms)
            computed = {name: values[name] for name in self.terms}
            self.balance.update(computed, recording.activations)
        return self.balance.factors(weights)

    def __str__(self) -> str:
        total = " + ".join(f"{w:g} * {name}" for name, (_, w) in self.term_dict.items())
        return f"Loss = {total}" + (", as shares of the gradient" if self.balance else "")


def _term(name: str, config: Mapping[str, Any] | None, default: str) -> nn.Module:
    config = {"key": default} if config is None else config
    for key in config:
        check_known(f"DisWOTPlusLoss: {name}: keyword", key, ("key", "kwargs"))
    key = config.get("key", default)
    check_known(f"DisWOTPlusLoss: {name}: key", key, [*COMPARISONS, right_reasons.KEY])
    return MIDDLE_LEVEL_LOSS_DICT[key](**(config.get("kwargs") or {}))


def check_finite(total: Tensor, terms: Mapping[str, Tensor]) -> None:
    """Raise ``FloatingPointError`` unless the total is finite, naming the terms that are not."""
    if not torch.isfinite(total.detach()).all():
        values = {name: float(value) for name, value in terms.items()}
        wrong = [name for name, value in terms.items() if not torch.isfinite(value).all()]
        fix = "Lower the learning rate, or the weight of the term; no step was taken."
        got = f"{wrong or 'a total'} not finite in {values}"
        raise FloatingPointError(message("loss", "finite terms", got, fix))


register_high_level_loss(strict("DisWOTPlusLoss")(DisWOTPlusLoss), key="DisWOTPlusLoss")
