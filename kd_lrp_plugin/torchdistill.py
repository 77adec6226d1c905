"""The rim: what torchdistill's YAML can name once ``dependencies`` lists this module.

=====================  ==========================================================================
where in YAML          names
=====================  ==========================================================================
forward procedures     by ``!import_call`` of :func:`recorder`
mid-level losses       ``LRPSemanticCosineLoss``, ``LRPSemanticL2Loss``, ``GradCAML2Loss``,
                       ``GradCAMCosineLoss``, ``RelationCosineLoss``, ``RelationL2Loss``
high-level loss        ``DisWOTPlusLoss``; its ``class_weights`` by ``!import_call`` of
                       :func:`class_weights`
pre-epoch processes    by ``!import_call`` of :func:`weight_schedule`
collate functions      by ``!import_call`` of :func:`mixup`
models                 ``timm_model``, ``timm_mobilenetv2``; ``diswot_student``, which chooses one
datasets               ``phantom``, ``folder_images``; in ``datasets`` by ``!import_call`` of
                       :func:`phantom` and :func:`folder_images`
=====================  ==========================================================================

Everything here is a thin shell around the core, and takes exactly the keywords that it lists:
torchdistill itself would drop a misspelled one without a word.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.core.interfaces.registry import register_forward_proc_func
from torchdistill.datasets.registry import register_dataset
from torchdistill.losses.high_level import AbstractLoss
from torchdistill.losses.registry import register_high_level_loss, register_mid_level_loss
from torchdistill.models.registry import register_model

from kd_lrp_plugin import data, losses, spaces, students
from kd_lrp_plugin.checks import check_known, check_targets, message, strict
from kd_lrp_plugin.hook import diswot_student as diswot_student
from kd_lrp_plugin.recipes import class_weights as class_weights
from kd_lrp_plugin.recipes import mixup as mixup
from kd_lrp_plugin.recipes import weight_schedule as weight_schedule
from kd_lrp_plugin.relevance import Recording, record
from kd_lrp_plugin.rules import METHODS

# --- forward procedure ------------------------------------------------------------------------

_RECORDER_HELP = (
    "Set train.{role}.forward_proc to !import_call {{key: kd_lrp_plugin.torchdistill.recorder, "
    "init: {{kwargs: {{layers: [...], method: ...}}}}}}."
)


@strict("recorder")
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
"""The mid-level losses by key.

Under several processes each compares its own process's part of the batch, not the gathered one.
For Grad-CAM and relation losses, which relate the samples of a batch to each other, that is
another value than one process would find for the whole batch.
"""


class RecordedLoss(nn.Module):
    """Distance between what was recorded of student and teacher, averaged over the layers.

    Of maps that differ in size, the teacher's is resized to the student's by
    :func:`kd_lrp_plugin.losses.resize_maps`. With gradients disabled, as in validation, the
    value is the same and nothing is kept for a derivative.

    Args:
        key: the name it is registered under, one of :data:`COMPARISONS`.
        target: which class's relevance is compared: the "label", or the "teacher"'s first choice.
        every: in training, compare every n-th batch only, beginning with the first after
            :meth:`reset`, which the driver calls as an epoch begins; the other batches cost no
            maps and count as 0. The weight is not rescaled: on average the term weighs an n-th.
            With gradients disabled every batch is compared.

    Attributes:
        computed: whether the latest batch was compared.
        zero_maps: maps without any relevance seen so far, of student and teacher together; None
            for a loss that compares features.
    """

    def __init__(self, key: str, target: str = "label", every: int = 1) -> None:
        super().__init__()
        check_known(f"{key}: target", target, ("label", "teacher"))
        if type(every) is not int or every < 1:
            fix = "Use 1 to compare every batch."
            raise ValueError(message(f"{key}: every", "an integer of 1 or more", every, fix))
        self.key = key
        self.target = target
        self.every = every
        self.computed = False
        self.zero_maps: Tensor | int | None = None
        self._batches = 0
        self.reset()

    def reset(self) -> None:
        """Start counting batches and zero maps anew."""
        self._batches = 0
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
        self.computed = not torch.is_grad_enabled() or self._batches % self.every == 0
        self._batches += torch.is_grad_enabled()
        if not self.computed:
            return (student_logits * 0).sum()  # has a graph, in case that there is no other term
        classes = targets if self.target == "label" else teacher_logits.argmax(1)
        with torch.autocast(student_logits.device.type, enabled=False):
            return self._distance((student_logits, student), (teacher_logits, teacher), classes)

    def _distance(
        self,
        of_student: tuple[Tensor, Recording],
        of_teacher: tuple[Tensor, Recording],
        classes: Tensor,
    ) -> Tensor:
        comparison = COMPARISONS[self.key]
        if comparison.methods is None:
            pairs = zip(of_student[1].activations, of_teacher[1].activations, strict=True)
        else:
            create_graph = torch.is_grad_enabled()
            pairs = zip(
                self._maps("student", *of_student, classes, create_graph),
                self._maps("teacher", *of_teacher, classes, False),
                strict=True,
            )
        distances = []
        for student, teacher in pairs:
            if comparison.methods is not None:
                height, width = student.shape[-2:]
                teacher = losses.resize_maps(teacher, (height, width))
                zeros = losses.zero_maps(student).sum() + losses.zero_maps(teacher).sum()
                self.zero_maps = zeros + (self.zero_maps or 0)
            distances.append(comparison.distance(student, teacher))
        return torch.stack(distances).mean()

    def _maps(
        self, role: str, logits: Tensor, recording: Recording, classes: Tensor, create_graph: bool
    ) -> list[Tensor]:
        comparison = COMPARISONS[self.key]
        if comparison.methods is not None and recording.method not in comparison.methods:
            fix = f"Set method in train.{role}.forward_proc, or take a loss for this method."
            expected = f"the {role} recorded with one of {sorted(comparison.methods)}"
            raise ValueError(message(self.key, expected, repr(recording.method), fix))
        return recording.maps(logits, classes, create_graph, comparison.signed)

    def extra_repr(self) -> str:
        return f"{self.key}, target={self.target}, every={self.every}"


def _mid_level(key: str) -> Callable[..., RecordedLoss]:
    @strict(key)
    def make(target: str = "label", every: int = 1) -> RecordedLoss:
        return RecordedLoss(key, target, every)

    return make


for _key in COMPARISONS:
    register_mid_level_loss(_mid_level(_key), key=_key)


# --- high-level loss --------------------------------------------------------------------------


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
        logits = _full(_logits("DisWOTPlusLoss", "student", student_io_dict))
        check_targets("DisWOTPlusLoss", targets, logits)
        weights = None if self.weights is None else self.weights.to(logits)
        if weights is not None and len(weights) != logits.shape[1]:
            expected = f"{logits.shape[1]} class_weights, one per output of the head"
            fix = "Give one weight per class, in the order of the classes."
            raise ValueError(message("DisWOTPlusLoss", expected, len(weights), fix))
        smoothing = self.label_smoothing
        return nn.functional.cross_entropy(logits, targets, weights, label_smoothing=smoothing)


class _KLDivergence(nn.Module):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student_io_dict: Mapping, teacher_io_dict: Mapping, _: Tensor) -> Tensor:
        student = _full(_logits("DisWOTPlusLoss", "student", student_io_dict))
        teacher = _full(_logits("DisWOTPlusLoss", "teacher", teacher_io_dict))
        return losses.kl_divergence(student, teacher, self.temperature)


def _full(logits: Tensor) -> Tensor:
    """Logits that autocast has left in half precision, in float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class DisWOTPlusLoss(AbstractLoss):
    r"""Classification, distillation, semantic and relation terms, weighted to a sum of one.

    .. math:: L = \alpha L_{CE} + \beta L_{KL} + \gamma L_{sem} + \delta L_{rel}

    A term of weight zero is not computed, nor one that :func:`weight_schedule` holds at zero.

    Args:
        alpha: weight of the cross entropy.
        beta: weight of the KL divergence.
        gamma: weight of the semantic term.
        delta: weight of the relation term.
        temperature: of the KL divergence.
        semantic: mid-level loss of the semantic term, as ``{key: ..., kwargs: ...}``.
        relation: mid-level loss of the relation term, likewise.
        label_smoothing: share of the cross entropy's target that is spread over all classes.
        class_weights: of the cross entropy, one positive weight per class, such as those of
            :func:`class_weights`. Of class indices the weighted mean is taken, of soft targets
            the sum over the batch, divided by its size, as PyTorch does.

    Attributes:
        terms: value of each term computed, unweighted, of the latest batch, in training and
            validation.

    Raises:
        ValueError: if a weight is negative or the weights do not sum to one, if the class
            weights do not fit, or if no term is left in an epoch.
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
        self.terms: dict[str, Tensor] = {}

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
            total = torch.stack([weight * values[name] for name, (_, weight) in parts.items()])
            total = total.sum()
        self.terms = {
            name: value.detach()
            for name, value in values.items()
            if getattr(parts[name][0], "computed", True)
        }
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


register_high_level_loss(strict("DisWOTPlusLoss")(DisWOTPlusLoss), key="DisWOTPlusLoss")

# --- models and datasets ----------------------------------------------------------------------

timm_model = register_model(strict("timm_model")(students.build_model), key="timm_model")
timm_mobilenetv2 = register_model(spaces.mobilenetv2, key="timm_mobilenetv2")
phantom = register_dataset(strict("phantom")(data.Phantom), key="phantom")
folder_images = register_dataset(strict("folder_images")(data.FolderImages), key="folder_images")
