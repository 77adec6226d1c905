"""Mid-level losses: distances between what was recorded of student and teacher."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT, register_mid_level_loss

from kd_lrp_plugin import losses
from kd_lrp_plugin.data.subclasses import Subclasses
from kd_lrp_plugin.relevance.methods import METHODS
from kd_lrp_plugin.relevance.recording import Recording
from kd_lrp_plugin.torchdistill.forward_proc import CachedRecording, recorded
from kd_lrp_plugin.utils.registry import Registry
from kd_lrp_plugin.utils.validation import (
    check_known,
    check_targets,
    find_labelled,
    message,
    strict,
)

KINDS = ("relevance", "grad_cam", "features")
TARGETS = ("label", "teacher", "contrast")


@dataclass(frozen=True)
class Comparison:
    """What a mid-level loss compares, and how.

    Attributes:
        distance: ``f(student, teacher) -> scalar`` of one layer's maps (n, h, w) or features
            (n, c, h, w).
        kind: "relevance" for maps of any method but the pooled ones, "grad_cam" for maps of the
            pooled ones, "features" for the outputs of the layers.
        has_size: whether the distance sees the size of the maps, so that a teacher's map that is
            resized has to keep its total.
    """

    distance: Callable[[Tensor, Tensor], Tensor]
    kind: str = "relevance"
    has_size: bool = False

    @property
    def methods(self) -> list[str] | None:
        """Names of the methods whose maps it takes; None where it compares features.

        Looked up each time, since a user's module may register methods at any time.
        """
        if self.kind == "features":
            return None
        pooled = self.kind == "grad_cam"
        return sorted(name for name, method in METHODS.items() if method.pooled == pooled)

    @property
    def signed(self) -> bool:
        """Whether maps keep their sign unless the config says otherwise."""
        return self.kind != "relevance"


COMPARISONS: Registry[Comparison] = Registry("mid-level loss")
"""The mid-level losses by key; :func:`register_recorded_loss` adds one.

Under several processes each compares its own process's part of the batch, not the gathered one.
For Grad-CAM and relation losses, which relate the samples of a batch to each other, that is
another value than one process would find for the whole batch.
"""


class RecordedLoss(nn.Module):
    """Distance between what was recorded of student and teacher, averaged over the layers.

    Of maps that differ in size, the teacher's is resized to the student's by
    :func:`kd_lrp_plugin.losses.resize_maps`; for ``LRPRelativeL2Loss`` its total is kept, so that
    signed maps still add up to the logit. With gradients disabled, as in validation, the value is
    the same and nothing is kept for a derivative.

    Args:
        key: the name it is registered under, one of :data:`COMPARISONS`.
        target: which relevance is compared: that of the "label", of the "teacher"'s top-1
            prediction, or the "contrast", the label minus the mean of the other classes. Where
            labels are subclasses, so are these; "class" is the sum of the logits of all subclasses
            of the label's class, also where no more is known than the class. An image without a
            label (:func:`with_unlabelled`) has the teacher's top-1 prediction for one.
        every: in training, compare every n-th batch only, beginning with the first after
            :meth:`reset`, which the trainer calls as an epoch begins; the other batches cost no
            maps and count as 0. The weight is not rescaled: on average the term weighs an n-th.
            With gradients disabled every batch is compared.
        signed: compare maps with their sign, instead of their positive part. Of losses of
            relevance only; Grad-CAM losses compare signed maps always.
        dataset: the training images by alias, wrapped in ``subclasses``; for the target "class".

    Attributes:
        computed: whether the latest batch was compared.
        zero_maps: maps without any relevance seen so far, of student and teacher together; None
            for a loss that compares features.

    Raises:
        ValueError: for an unknown target, ``every`` below 1, or ``target``, ``signed`` or
            ``dataset`` where it says nothing; for the target "class" without subclasses; from a
            batch, for maps of models that differ in their number of outputs.
    """

    def __init__(
        self,
        key: str,
        target: str = "label",
        every: int = 1,
        signed: bool | None = None,
        dataset: Any = None,
    ) -> None:
        super().__init__()
        check_known("mid-level loss", key, COMPARISONS)
        check_known(f"{key}: target", target, [*TARGETS, "class"])
        if target != "label" and COMPARISONS[key].kind == "features":
            expected = "no target, which is a choice for maps"
            raise ValueError(message(key, expected, target, "Leave it out."))
        check_every(key, every)
        fits = isinstance(dataset, Subclasses) if target == "class" else dataset is None
        if not fits:
            expected = "target: class and a dataset of subclasses, or neither of them"
            given = "no dataset" if dataset is None else type(dataset).__name__
            got = f"target {target!r} and {given}"
            fix = "Give the alias of a data set of kd_lrp_plugin.torchdistill.subclasses."
            raise ValueError(message(key, expected, got, fix))
        self.subclass_of = list(dataset.subclass_of) if target == "class" else []
        self.key = key
        self.comparison = COMPARISONS[key]
        self.target = target
        self.every = every
        self.signed = self.comparison.signed if signed is None else signed
        if type(self.signed) is not bool:
            raise ValueError(message(f"{key}: signed", "True or False", signed, "Use True."))
        if signed is not None and self.comparison.kind != "relevance":
            expected = "no signed, which is a choice for maps of relevance"
            raise ValueError(message(key, expected, signed, "Leave it out."))
        self.computed = False
        self.zero_maps: Tensor | int | None = None
        self.reset()

    def reset(self) -> None:
        """Start counting batches and zero maps from 0."""
        self._batches = 0
        self.zero_maps = None if self.comparison.kind == "features" else 0

    def forward(
        self, student_io_dict: Mapping, teacher_io_dict: Mapping, targets: Tensor
    ) -> Tensor:
        student_logits, student = recorded(student_io_dict, "student", self.key)
        teacher_logits, teacher = recorded(teacher_io_dict, "teacher", self.key)
        if len(student.layers) != len(teacher.layers):
            got = {"student": student.layers, "teacher": teacher.layers}
            fix = "Give both recorders the same number of layers."
            raise ValueError(message(self.key, "as many layers of each model", got, fix))
        self.computed = not torch.is_grad_enabled() or self._batches % self.every == 0
        self._batches += torch.is_grad_enabled()
        if not self.computed:
            return (student_logits * 0).sum()  # has a graph, in case that there is no other term
        if self.comparison.kind == "features":
            own, theirs = student.activations, self.read_teacher(teacher_logits, teacher, targets)
        else:
            check_same_outputs(self.key, student_logits, teacher_logits)
            if self.target == "label":
                check_targets(self.key, _label_by_teacher(targets, teacher_logits), student_logits)
            classes = self._choose_explained(targets, teacher_logits)
            create_graph = torch.is_grad_enabled()
            with torch.autocast(student_logits.device.type, enabled=False):
                own = self._maps("student", student_logits, student, classes, create_graph)
                theirs = self.read_teacher(teacher_logits, teacher, targets)
        pairs = zip(own, theirs, strict=True)
        with torch.autocast(student_logits.device.type, enabled=False):
            return torch.stack([self._distance(one, other) for one, other in pairs]).mean()

    @property
    def question(self) -> str:
        """What is asked of the teacher: losses that ask the same can share an answer."""
        if self.comparison.kind == "features":
            return "features"
        signs = "signed" if self.signed else "positive"
        return f"{signs} maps of {self.target}{self.subclass_of or ''}"

    def read_teacher(
        self, logits: Tensor, recording: Recording | CachedRecording, targets: Tensor
    ) -> list[Tensor]:
        """The teacher's part of the comparison: its maps or features, layer by layer.

        Args:
            logits: of the teacher.
            recording: of the teacher; of one that was asked before, what it has answered.
            targets: of the batch.
        """
        if isinstance(recording, CachedRecording):
            return recording.answer(self.question, self.key)
        if self.comparison.kind == "features":
            return recording.activations
        classes = self._choose_explained(targets, logits)
        return self._maps("teacher", logits, recording, classes, False)

    def _choose_explained(self, targets: Tensor, of_teacher: Tensor) -> Tensor:
        """Whose relevance is compared, given the labels and the teacher's logits."""
        if self.target == "teacher":
            return of_teacher.argmax(1)
        targets = _label_by_teacher(targets, of_teacher)
        if self.target == "class":
            return self._mark_subclasses(targets).to(of_teacher)
        return targets

    def _mark_subclasses(self, targets: Tensor) -> Tensor:
        """Weights of the logits (n, subclasses): 1 for the subclasses of the label's class."""
        classes = losses.fold_targets(targets, self.subclass_of)
        owners = torch.tensor(self.subclass_of, device=targets.device)
        if classes.is_floating_point():
            return classes[:, owners]
        return (owners == classes[:, None]).float()

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.zero_maps is not None:
            pixels = teacher.shape[-2] * teacher.shape[-1]
            teacher = losses.resize_maps(teacher, (student.shape[-2], student.shape[-1]))
            zeros = losses.zero_maps(student).sum() + losses.zero_maps(teacher).sum()
            self.zero_maps = self.zero_maps + zeros
            if self.comparison.has_size:
                teacher = teacher * (pixels / (student.shape[-2] * student.shape[-1]))
        return self.comparison.distance(student, teacher)

    def _maps(
        self, role: str, logits: Tensor, recording: Recording, classes: Tensor, create_graph: bool
    ) -> list[Tensor]:
        methods = self.comparison.methods
        if methods is not None and recording.method not in methods:
            fix = f"Set method in train.{role}.forward_proc, or take a loss for this method."
            expected = f"the {role} recorded with one of {methods}"
            raise ValueError(message(self.key, expected, repr(recording.method), fix))
        if self.target == "contrast":
            classes = contrast(self.key, classes, logits)
        return recording.maps(logits, classes, create_graph, self.signed)

    def extra_repr(self) -> str:
        return f"{self.key}, target={self.target}, every={self.every}, signed={self.signed}"


def _label_by_teacher(targets: Tensor, logits: Tensor) -> Tensor:
    """Class indices, of images without a label the teacher's top-1 prediction."""
    known = find_labelled(targets)
    return targets if known is None else torch.where(known, targets, logits.argmax(1))


def check_same_outputs(where: str, student: Tensor, teacher: Tensor) -> None:
    """A class of the student's has to be the teacher's of the same index."""
    if student.shape[1:] != teacher.shape[1:]:
        expected = f"a teacher with the student's {student.shape[-1]} outputs"
        fix = "Set num_classes of its model, and train it on these classes."
        raise ValueError(message(where, expected, teacher.shape[-1], fix))


def check_every(key: str, every: int) -> None:
    if type(every) is not int or every < 1:
        fix = "Use 1 to compare every batch."
        raise ValueError(message(f"{key}: every", "an integer of 1 or more", every, fix))


def contrast(where: str, targets: Tensor, logits: Tensor) -> Tensor:
    """Weights of the logits (n, classes) for the label minus the mean of the other classes."""
    if logits.ndim != 2 or logits.shape[1] < 2:
        fix = "Use target: label."
        got = tuple(logits.shape)
        raise ValueError(message(f"{where}: target: contrast", "two logits or more", got, fix))
    check_targets(where, targets, logits)
    classes = logits.shape[1]
    if not targets.is_floating_point():
        targets = nn.functional.one_hot(targets.long(), classes)
    targets = targets.to(logits)
    return targets - (targets.sum(1, keepdim=True) - targets) / (classes - 1)


def make_mid_level(key: str) -> Callable[..., RecordedLoss]:
    """What torchdistill calls for ``key``: a :class:`RecordedLoss` that refuses other keywords."""
    comparison = COMPARISONS[key]
    if comparison.kind == "features":

        @strict(key)
        def make_features(every: int = 1) -> RecordedLoss:
            return RecordedLoss(key, every=every)

        return make_features

    if comparison.kind != "relevance":

        @strict(key)
        def make(target: str = "label", every: int = 1, dataset: Any = None) -> RecordedLoss:
            return RecordedLoss(key, target, every, dataset=dataset)

        return make

    @strict(key)
    def make_signed(
        target: str = "label", every: int = 1, signed: bool = False, dataset: Any = None
    ) -> RecordedLoss:
        return RecordedLoss(key, target, every, signed, dataset)

    return make_signed


def register_recorded_loss(
    key: str,
    distance: Callable[[Tensor, Tensor], Tensor],
    kind: str = "relevance",
    has_size: bool = False,
) -> None:
    """Make a mid-level loss of your own out of a distance, and register it.

    From then on YAML can name it: as a term of torchdistill's ``WeightedSumLoss``, or as
    ``semantic`` or ``relation`` of ``DisWOTPlusLoss``, with the keywords of
    :class:`RecordedLoss`.

    Args:
        key: name for YAML, such as "ManhattanLoss"; none that torchdistill or we have.
        distance: ``f(student, teacher) -> scalar``, of maps (n, h, w) of one size or of features
            (n, c, h, w) as they are; differentiable in the student's. See
            :mod:`kd_lrp_plugin.losses` for what a good one does about zero maps.
        kind: what is compared: maps of "relevance", maps of "grad_cam", or "features".
        has_size: whether the distance sees the size of maps, not their direction alone: then a
            resized map of the teacher keeps its total.

    Raises:
        ValueError: if the key is taken or the kind unknown.

    Example:
        .. code-block:: python

            def manhattan(student, teacher):
                return (student - teacher).abs().mean()

            register_recorded_loss("ManhattanLoss", manhattan, has_size=True)

        .. code-block:: yaml

            semantic: {key: ManhattanLoss, kwargs: {signed: True, target: contrast}}
    """
    check_known(f"{key}: kind", kind, KINDS)
    if key in MIDDLE_LEVEL_LOSS_DICT and key not in COMPARISONS:  # torchdistill would overwrite
        fix = "Choose another name; torchdistill has this one."
        raise ValueError(message("mid-level loss", "a new name", repr(key), fix))
    COMPARISONS.register(Comparison(distance, kind, has_size), key)
    register_mid_level_loss(make_mid_level(key), key=key)


register_recorded_loss("LRPSemanticCosineLoss", losses.semantic_cosine)
register_recorded_loss("LRPSemanticL2Loss", losses.semantic_l2)
register_recorded_loss("LRPRelativeL2Loss", losses.semantic_relative_l2, has_size=True)
register_recorded_loss("GradCAML2Loss", losses.correlation_l2, "grad_cam")
register_recorded_loss("GradCAMCosineLoss", losses.correlation_cosine, "grad_cam")
register_recorded_loss("RelationCosineLoss", losses.relation_cosine, "features")
register_recorded_loss("RelationL2Loss", losses.relation_l2, "features")
