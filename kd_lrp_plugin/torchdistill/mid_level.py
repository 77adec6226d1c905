"""Mid-level losses: distances between what was recorded of student and teacher."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchdistill.losses.registry import register_mid_level_loss

from kd_lrp_plugin import losses
from kd_lrp_plugin.relevance.methods import METHODS
from kd_lrp_plugin.relevance.recording import Recording
from kd_lrp_plugin.torchdistill.forward_proc import recorded
from kd_lrp_plugin.utils.validation import check_known, message, strict


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
        student_logits, student = recorded(self.key, "student", student_io_dict)
        teacher_logits, teacher = recorded(self.key, "teacher", teacher_io_dict)
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


def make_mid_level(key: str) -> Callable[..., RecordedLoss]:
    @strict(key)
    def make(target: str = "label", every: int = 1) -> RecordedLoss:
        return RecordedLoss(key, target, every)

    return make


for _key in COMPARISONS:
    register_mid_level_loss(make_mid_level(_key), key=_key)
