"""Subclass distillation: mid-level losses of models with an output per subclass."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.losses.registry import register_mid_level_loss

from kd_lrp_plugin import losses
from kd_lrp_plugin.data.subclasses import Subclasses
from kd_lrp_plugin.data.validation import check_flags
from kd_lrp_plugin.torchdistill.forward_proc import get_logits
from kd_lrp_plugin.utils.validation import message, strict


class SubclassKDLoss(nn.Module):
    """:func:`kd_lrp_plugin.losses.subclass_kl` of student and teacher.

    Both models have an output per subclass; the data sets are wrapped in ``subclasses``. It has
    nothing to do with torchdistill's ``SKDInstanceLoss`` and ``SKDDirectionLoss``, whose SKD is
    streamlined knowledge distillation. Without distance weights it is the ``kl`` term of
    ``DisWOTPlusLoss``.

    Args:
        temperature: τ in [0.01, 100].
        distance_weights: whether an image counts 1.5 times on which student and teacher are two
            subclasses or more apart.

    Raises:
        ValueError: from a batch, if student and teacher differ in their number of outputs, or τ is
            outside its range.

    Example:
        .. code-block:: yaml

            datasets:
              mnist/train: &train_digits !import_call
                key: kd_lrp_plugin.torchdistill.mnist
                init: {kwargs: {split: train, part: train, classes: parity}}
              &train_set parity/train: &train_images !import_call
                key: kd_lrp_plugin.torchdistill.subclasses
                init: {kwargs: {images: *train_digits}}
            train:
              criterion:
                key: WeightedSumLoss
                kwargs:
                  sub_terms:
                    ce:
                      criterion: {key: SubclassCrossEntropyLoss, kwargs: {dataset: *train_images}}
                      weight: 0.5
                    kl:
                      criterion: {key: SubclassKDLoss, kwargs: {distance_weights: True}}
                      weight: 0.5

    Reference:
        Müller, Kornblith and Hinton, 2020; the weights are ours.
    """

    def __init__(self, temperature: float = 4.0, distance_weights: bool = False) -> None:
        super().__init__()
        check_flags("SubclassKDLoss", distance_weights=distance_weights)
        self.temperature, self.distance_weights = temperature, distance_weights

    def forward(self, student_io_dict: Mapping, teacher_io_dict: Mapping, _: Tensor) -> Tensor:
        student = get_logits("SubclassKDLoss", "student", student_io_dict)
        teacher = get_logits("SubclassKDLoss", "teacher", teacher_io_dict)
        with torch.autocast(student.device.type, enabled=False):
            return losses.subclass_kl(student, teacher, self.temperature, self.distance_weights)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, distance_weights={self.distance_weights}"


class SubclassCrossEntropyLoss(nn.Module):
    """:func:`kd_lrp_plugin.losses.subclass_cross_entropy` of the model that is trained.

    Args:
        dataset: the training images by alias, wrapped in ``subclasses``: they say which class a
            subclass is of.

    Raises:
        ValueError: for data that are not labelled by subclasses; from a batch, for a model with
            another number of outputs, or labels of other data.

    Reference:
        Müller, Kornblith and Hinton, 2020. Deviation: cross entropy of the subclass where it is
        known.
    """

    def __init__(self, dataset: Any) -> None:
        super().__init__()
        if not isinstance(dataset, Subclasses):
            fix = "Give the alias of a data set of kd_lrp_plugin.torchdistill.subclasses."
            where = "SubclassCrossEntropyLoss: dataset"
            got = type(dataset).__name__
            raise ValueError(message(where, "images labelled by subclass", got, fix))
        self.subclass_of = list(dataset.subclass_of)

    def forward(self, student_io_dict: Mapping, _: Mapping, targets: Tensor) -> Tensor:
        logits = get_logits("SubclassCrossEntropyLoss", "student", student_io_dict)
        with torch.autocast(logits.device.type, enabled=False):
            return losses.subclass_cross_entropy(logits, targets, self.subclass_of)

    def extra_repr(self) -> str:
        return f"subclass_of={self.subclass_of}"


class SubclassAuxiliaryLoss(nn.Module):
    """:func:`kd_lrp_plugin.losses.subclass_auxiliary` of the model that is trained.

    It spreads the images over subclasses that nobody knows, for a teacher. It compares the images
    of a batch: one of a single image is refused, and in validation counts for the accuracy only.

    Args:
        temperature: T in [0.01, 100].

    Raises:
        ValueError: from a batch, if T is outside its range or the batch of one image.

    Reference:
        Müller, Kornblith and Hinton, 2020.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student_io_dict: Mapping, _: Mapping, __: Tensor) -> Tensor:
        logits = get_logits("SubclassAuxiliaryLoss", "student", student_io_dict)
        with torch.autocast(logits.device.type, enabled=False):
            return losses.subclass_auxiliary(logits, self.temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


for _loss in (SubclassKDLoss, SubclassCrossEntropyLoss, SubclassAuxiliaryLoss):
    register_mid_level_loss(strict(_loss.__name__)(_loss), key=_loss.__name__)
