"""Group DRO: a mid-level loss that weighs the groups of the training images by their loss."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.losses.registry import register_mid_level_loss

from kd_lrp_plugin.torchdistill.forward_proc import companion, get_logits
from kd_lrp_plugin.utils.distributed import rank_and_world_size
from kd_lrp_plugin.utils.validation import check_known, check_targets, message, strict

KEY = "GroupDROLoss"


class GroupDROLoss(nn.Module):
    r"""Cross entropy of each group, weighted towards the groups where it is high.

    .. math:: L = \sum_g q_g \ell_g, \qquad q_g \leftarrow
              \frac{q_g e^{\eta \ell_g}}{\sum_k q_k e^{\eta \ell_k}}

    with :math:`\ell_g` the mean over the batch's images of group g, 0 for a group that it lacks,
    and q even at first. In training q is updated before it is used; with gradients disabled, as in
    validation, it stays. It is a buffer, so that a resumed run goes on with it.

    The data set wrapper ``companions`` with ``group: True`` and the forward procedure
    ``forward_with_companions``, or a recorder, say which group an image belongs to. Where the
    loader of validation lacks the wrapper, there is an accuracy but no loss.

    Args:
        dataset: the training images, by alias; their ``groups`` are what is weighed.
        step_size: η > 0.

    Attributes:
        groups: names of the groups, sorted.
        log_weights: logarithms of q, in this order.

    Raises:
        ValueError: for data without groups, or with a single one, for which this is nothing but
            cross entropy (as where each marker agrees); a step size that is none; several
            processes, each of which would weigh by its own share of the images; from a batch, for
            a group that the training images lack, or no groups.

    Reference:
        Sagawa, Koh, Hashimoto and Liang, ICLR 2020, algorithm 1. Deviation: of a batch that is
        drawn from all images each group present gives its mean, instead of one image of a group
        drawn at random; no adjustment by the size of the groups.

    Example:
        .. code-block:: yaml

            train:
              train_data_loader:
                dataset_wrapper: {key: companions, kwargs: {group: True}}
              model: {forward_proc: forward_with_companions}
              criterion:
                key: WeightedSumLoss
                kwargs:
                  sub_terms:
                    ce:
                      criterion: {key: GroupDROLoss, kwargs: {dataset: *train_marked}}
                      weight: 1.0
    """

    log_weights: Tensor

    def __init__(self, dataset: Any, step_size: float = 0.01) -> None:
        super().__init__()
        self.groups = sorted(set(getattr(dataset, "groups", None) or ()))
        if len(self.groups) < 2:
            got = self.groups or f"{type(dataset).__name__} without any"
            fix = "Lower agreement of marked: of one group, this is cross entropy."
            raise ValueError(message(f"{KEY}: dataset", "images of two groups or more", got, fix))
        number = isinstance(step_size, int | float) and not isinstance(step_size, bool)
        if not number or not 0 < step_size < math.inf:
            raise ValueError(
                message(f"{KEY}: step_size", "a number above 0", step_size, "Use 0.01.")
            )
        if (processes := rank_and_world_size()[1]) > 1:
            fix = "Train without torchrun: the weights would differ between processes."
            raise ValueError(message(KEY, "one process", processes, fix))
        self.step_size = step_size
        even = torch.full((len(self.groups),), -math.log(len(self.groups)))
        self.register_buffer("log_weights", even)

    def forward(self, student_io_dict: Mapping, _: Mapping, targets: Tensor) -> Tensor:
        logits = get_logits(KEY, "student", student_io_dict)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # autocast's are half
        check_targets(KEY, targets, logits)
        names = companion(student_io_dict, "group_name", KEY)
        for name in dict.fromkeys(names):
            check_known(f"{KEY}: group of the training images", name, self.groups)
        index = torch.tensor([self.groups.index(name) for name in names], device=logits.device)
        values = nn.functional.cross_entropy(logits, targets, reduction="none")
        counts = torch.bincount(index, minlength=len(self.groups))
        sums = values.new_zeros(len(self.groups)).index_add(0, index, values)
        means = sums / counts.clamp(min=1)
        if torch.is_grad_enabled():
            raised = self.log_weights + self.step_size * means.detach().to(self.log_weights)
            self.log_weights = raised.log_softmax(0)
        return (self.log_weights.exp().to(means) * means).sum()

    def extra_repr(self) -> str:
        return f"groups={self.groups}, step_size={self.step_size}"


register_mid_level_loss(strict(KEY)(GroupDROLoss), key=KEY)
