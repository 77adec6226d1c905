"""The rim: what torchdistill's YAML can name once ``dependencies`` lists this module.

=====================  ==========================================================================
where in YAML          names
=====================  ==========================================================================
forward procedures     by ``!import_call`` of :func:`recorder`
mid-level losses       ``LRPSemanticCosineLoss``, ``LRPSemanticL2Loss``, ``GradCAML2Loss``,
                       ``GradCAMCosineLoss``, ``RelationCosineLoss``, ``RelationL2Loss``
high-level loss        ``DisWOTPlusLoss``
models                 ``timm_model``
datasets               ``phantom``, ``folder_images``; in ``datasets`` by ``!import_call`` of
                       :func:`phantom` and :func:`folder_images`
=====================  ==========================================================================

Everything here is a thin shell around the core, and takes exactly the keywords that it lists:
torchdistill itself would drop a misspelled one without a word.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torchdistill.core.interfaces.registry import register_forward_proc_func
from torchdistill.datasets.registry import register_dataset
from torchdistill.losses.high_level import AbstractLoss
from torchdistill.losses.registry import register_high_level_loss, register_mid_level_loss
from torchdistill.models.registry import register_model

from kd_lrp_plugin import data, losses, students
from kd_lrp_plugin.checks import check_known, check_targets, message
from kd_lrp_plugin.relevance import Recording, record
from kd_lrp_plugin.rules import METHODS

P = ParamSpec("P")
T = TypeVar("T")


def _strict(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Refuse keywords that the function does not have, with the nearest ones."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        known = inspect.signature(function).parameters

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            for key in kwargs:
                check_known(f"{name}: keyword", key, known)
            return function(*args, **kwargs)

        return call

    return decorate


# --- forward procedure ------------------------------------------------------------------------

_RECORDER_HELP = (
    "Set train.{role}.forward_proc to !import_call {{key: kd_lrp_plugin.torchdistill.recorder, "
    "init: {{kwargs: {{layers: [...], method: ...}}}}}}."
)


@_strict("recorder")
def recorder(layers: Sequence[str] | str = "auto", method: str = "gradient_activation") -> str:
    """Make and register a forward procedure that records the model at ``layers``.

    Use one for the teacher and one for the student, in ``train.teacher`` and ``train.student``
    or in a stage. A model without trainable parameters is set to evaluation mode and recorded
    with gradients, which torchdistill does neither.

    Args:
        layers: see :func:`kd_lrp_plugin.relevance.record`.
        method: see :data:`kd_lrp_plugin.rules.METHODS`.

    Returns:
        The key under which it is registered, which is what ``forward_proc`` takes.
    """
    check_known("recorder: method", method, METHODS)

    def forward_recorded(
        model: nn.Module, sample_batch: Tensor, targets: Any = None, supp_dict: Any = None
    ) -> Tensor:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            model.eval()
        with record(model, layers, method) as recording:
            logits = model(sample_batch)
        logits._kd_lrp_recording = recording
        return logits

    key = f"kd_lrp_recorder({method}, {layers})"
    register_forward_proc_func(forward_recorded, key=key)
    return key


def _recorded(where: str, role: str, io_dict: Mapping[str, Any]) -> tuple[Tensor, Recording]:
    logits = _logits(where, role, io_dict)
    recording = getattr(logits, "_kd_lrp_recording", None)
    if recording is None:
        fix = _RECORDER_HELP.format(role=role)
        raise ValueError(message(where, f"logits of the {role} with a recording", "none", fix))
    return logits, recording


def _logits(where: str, role: str, io_dict: Mapping[str, Any]) -> Tensor:
    if "." not in io_dict:
        fix = f"Give models.{role}_model and train.{role}."
        raise ValueError(message(where, f"a {role} model", "none", fix))
    return io_dict["."]["output"]


# --- mid-level losses -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Comparison:
    """What a mid-level loss compares: maps of some methods, or features."""

    distance: Callable[[Tensor, Tensor], Tensor]
    methods: frozenset[str] | None = None  # None: features, for which any recording will do
    signed: bool = True


_LRP = frozenset(METHODS) - {"grad_cam"}
_GRAD_CAM = frozenset({"grad_cam"})

COMPARISONS = {
    "LRPSemanticCosineLoss": _Comparison(losses.semantic_cosine, _LRP, signed=False),
    "LRPSemanticL2Loss": _Comparison(losses.semantic_l2, _LRP, signed=False),
    "GradCAML2Loss": _Comparison(losses.correlation_l2, _GRAD_CAM),
    "GradCAMCosineLoss": _Comparison(losses.correlation_cosine, _GRAD_CAM),
    "RelationCosineLoss": _Comparison(losses.relation_cosine),
    "RelationL2Loss": _Comparison(losses.relation_l2),
}


class RecordedLoss(nn.Module):
    """Distance between what was recorded of student and teacher, averaged over the layers.

    Of maps that differ in size, the teacher's is resized to the student's by
    :func:`kd_lrp_plugin.losses.resize_maps`. With gradients disabled, as in validation, the
    value is the same and nothing is kept for a derivative.

    Args:
        key: the name it is registered under, one of :data:`COMPARISONS`.
        target: which class's relevance is compared: the "label", or the "teacher"'s first choice.

    Attributes:
        zero_maps: maps without any relevance seen so far, of student and teacher together; None
            for a loss that compares features.
    """

    def __init__(self, key: str, target: str = "label") -> None:
        super().__init__()
        check_known(f"{key}: target", target, ("label", "teacher"))
        self.key = key
        self.target = target
        self.zero_maps: Tensor | int | None = None
        self.reset()

    def reset(self) -> None:
        """Start counting zero maps anew."""
        self.zero_maps = None if COMPARISONS[self.key].methods is None else 0

    def forward(
        self, student_io_dict: Mapping, teacher_io_dict: Mapping, targets: Tensor
    ) -> Tensor:
        student_logits, student = _recorded(self.key, "student", student_io_dict)
        teacher_logits, teacher = _recorded(self.key, "teacher", teacher_io_dict)
        if len(student.layers) != len(teacher.layers):
            got = {"student": student.layers, "teacher": teacher.layers}
            fix = "Give both recorders the same number of layers."
            raise ValueError(message(self.key, "as many layers of each model", got, fix))
        comparison = COMPARISONS[self.key]
        if comparison.methods is None:
            pairs = zip(student.activations, teacher.activations, strict=True)
        else:
            classes = targets if self.target == "label" else teacher_logits.argmax(1)
            create_graph = torch.is_grad_enabled()
            pairs = zip(
                self._maps("student", student, student_logits, classes, create_graph),
                self._maps("teacher", teacher, teacher_logits, classes, False),
                strict=True,
            )
        distances = []
        for of_student, of_teacher in pairs:
            if comparison.methods is not None:
                height, width = of_student.shape[-2:]
                of_teacher = losses.resize_maps(of_teacher, (height, width))
                zeros = losses.zero_maps(of_student).sum() + losses.zero_maps(of_teacher).sum()
                self.zero_maps = zeros + (self.zero_maps or 0)
            distances.append(comparison.distance(of_student, of_teacher))
        return torch.stack(distances).mean()

    def _maps(
        self, role: str, recording: Recording, logits: Tensor, classes: Tensor, create_graph: bool
    ) -> list[Tensor]:
        comparison = COMPARISONS[self.key]
        if comparison.methods is not None and recording.method not in comparison.methods:
            fix = f"Set method in train.{role}.forward_proc, or take a loss for this method."
            expected = f"the {role} recorded with one of {sorted(comparison.methods)}"
            raise ValueError(message(self.key, expected, repr(recording.method), fix))
        return recording.maps(logits, classes, create_graph, comparison.signed)

    def extra_repr(self) -> str:
        return f"{self.key}, target={self.target}"


def _mid_level(key: str) -> Callable[..., RecordedLoss]:
    @_strict(key)
    def make(target: str = "label") -> RecordedLoss:
        return RecordedLoss(key, target)

    return make


for _key in COMPARISONS:
    register_mid_level_loss(_mid_level(_key), key=_key)


# --- high-level loss --------------------------------------------------------------------------


class _CrossEntropy(nn.Module):
    def forward(self, student_io_dict: Mapping, _: Mapping, targets: Tensor) -> Tensor:
        logits = _logits("DisWOTPlusLoss", "student", student_io_dict)
        check_targets("DisWOTPlusLoss", targets, logits)
        return nn.functional.cross_entropy(logits, targets)


class _KLDivergence(nn.Module):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student_io_dict: Mapping, teacher_io_dict: Mapping, _: Tensor) -> Tensor:
        student = _logits("DisWOTPlusLoss", "student", student_io_dict)
        teacher = _logits("DisWOTPlusLoss", "teacher", teacher_io_dict)
        return losses.kl_divergence(student, teacher, self.temperature)


class DisWOTPlusLoss(AbstractLoss):
    r"""Classification, distillation, semantic and relation terms, weighted to a sum of one.

    .. math:: L = \alpha L_{CE} + \beta L_{KL} + \gamma L_{sem} + \delta L_{rel}

    A term of weight zero is not computed.

    Args:
        alpha: weight of the cross entropy.
        beta: weight of the KL divergence.
        gamma: weight of the semantic term.
        delta: weight of the relation term.
        temperature: of the KL divergence.
        semantic: mid-level loss of the semantic term, as ``{key: ..., kwargs: ...}``.
        relation: mid-level loss of the relation term, likewise.

    Attributes:
        terms: value of each term, unweighted, of the latest batch, in training and validation.

    Raises:
        ValueError: if a weight is negative or the weights do not sum to one.
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
    ) -> None:
        super().__init__()
        weights = {"alpha": alpha, "beta": beta, "gamma": gamma, "delta": delta}
        if min(weights.values()) < 0 or abs(sum(weights.values()) - 1) > 1e-6:
            fix = "Change them so that alpha + beta + gamma + delta = 1."
            got = f"{weights} with sum {sum(weights.values()):g}"
            raise ValueError(message("DisWOTPlusLoss", "weights of at least 0, sum 1", got, fix))
        terms = {
            "ce": (_CrossEntropy(), alpha),
            "kl": (_KLDivergence(temperature), beta),
            "semantic": (_term("semantic", semantic, "LRPSemanticCosineLoss"), gamma),
            "relation": (_term("relation", relation, "RelationCosineLoss"), delta),
        }
        self.term_dict = {name: term for name, term in terms.items() if term[1] > 0}
        self.terms: dict[str, Tensor] = {}

    def forward(self, io_dict: Mapping, model_loss_dict: Mapping, targets: Tensor) -> Tensor:
        values = {
            name: term(io_dict["student"], io_dict["teacher"], targets)
            for name, (term, _) in self.term_dict.items()
        }
        self.terms = {name: value.detach() for name, value in values.items()}
        total = sum(weight * values[name] for name, (_, weight) in self.term_dict.items())
        assert isinstance(total, Tensor)
        check_finite(total, self.terms)
        return total

    def __str__(self) -> str:
        return "Loss = " + " + ".join(f"{w:g} * {name}" for name, (_, w) in self.term_dict.items())


def _term(name: str, config: Mapping[str, Any] | None, default: str) -> nn.Module:
    config = {"key": default} if config is None else config
    for key in config:
        check_known(f"DisWOTPlusLoss: {name}: keyword", key, ("key", "kwargs"))
    key = config.get("key", default)
    check_known(f"DisWOTPlusLoss: {name}: key", key, COMPARISONS)
    return _mid_level(key)(**(config.get("kwargs") or {}))


def check_finite(total: Tensor, terms: Mapping[str, Tensor]) -> None:
    """Raise ``FloatingPointError`` unless the total is finite, naming the terms that are not."""
    if not torch.isfinite(total.detach()).all():
        values = {name: float(value) for name, value in terms.items()}
        wrong = [name for name, value in terms.items() if not torch.isfinite(value).all()]
        fix = "Lower the learning rate, or the weight of the term; no step was taken."
        got = f"{wrong or 'a total'} not finite in {values}"
        raise FloatingPointError(message("loss", "finite terms", got, fix))


register_high_level_loss(_strict("DisWOTPlusLoss")(DisWOTPlusLoss), key="DisWOTPlusLoss")

# --- models and datasets ----------------------------------------------------------------------

timm_model = register_model(_strict("timm_model")(students.build_model), key="timm_model")
phantom = register_dataset(_strict("phantom")(data.Phantom), key="phantom")
folder_images = register_dataset(_strict("folder_images")(data.FolderImages), key="folder_images")
