"""Right for the right reasons: a mid-level loss of the student and what its images show."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchdistill.losses.registry import register_mid_level_loss

from kd_lrp_plugin import losses
from kd_lrp_plugin.relevance.masks import resize_masks, share_outside
from kd_lrp_plugin.torchdistill.forward_proc import companion, get_logits, recorded
from kd_lrp_plugin.torchdistill.mid_level import (
    TARGETS,
    check_every,
    check_same_outputs,
    contrast,
)
from kd_lrp_plugin.utils.validation import check_known, check_targets, strict

KEY = "RightReasonsLoss"


class RightReasonsLoss(nn.Module):
    r"""Share of the student's squared relevance that lies outside of the object, layer by layer.

    .. math:: L = \frac1{|I|} \sum_{i \in I} \frac{\sum_p (1 - m_{ip}) R_{ip}^2}{\sum_p R_{ip}^2}

    The mean over the images I of the batch whose mask is known and not empty, then over the layers;
    R is signed and m the share of a cell of the map that the mask covers (by area, so that a cell
    that it covers in part counts by the part outside). It takes no teacher, but a recorder of the
    student and the data set wrapper ``companions`` with ``mask: True``. Where the loader of
    validation lacks the wrapper, there is an accuracy but no loss.

    Args:
        target: whose relevance: that of the "label", of the "teacher"'s top-1 prediction, or the
            "contrast", the label minus the mean of the other classes.
        every: in training, compute every n-th batch only; see
            :class:`~kd_lrp_plugin.torchdistill.mid_level.RecordedLoss`.

    Attributes:
        computed: whether the latest batch was; one without any mask counts as 0 and is left out
            of the means that are reported.
        zero_maps: maps without any relevance so far, of those images; each has the share 1.

    Raises:
        ValueError: for an unknown target or ``every`` below 1; from a batch, without masks or a
            recording.

    Reference:
        Ross, Hughes and Doshi-Velez, IJCAI 2017, eq. 1. Deviation: relevance maps of recorded
        layers in place of gradients of the summed log-probabilities by the input, as a share of
        their sum, so that the weight has no unit; images without a mask are left out.

    Example:
        .. code-block:: yaml

            train_data_loader:
              dataset_wrapper: {key: companions, kwargs: {mask: True}}
            criterion:
              key: DisWOTPlusLoss
              kwargs: {alpha: 0.5, beta: 0, gamma: 0.5, delta: 0, semantic: {key: RightReasonsLoss}}
    """

    def __init__(self, target: str = "label", every: int = 1) -> None:
        super().__init__()
        check_known(f"{KEY}: target", target, TARGETS)
        check_every(KEY, every)
        self.target, self.every = target, every
        self.computed = False
        self.zero_maps: Tensor | int = 0
        self.reset()

    def reset(self) -> None:
        """Start counting batches and zero maps from 0."""
        self._batches = 0
        self.zero_maps = 0

    def forward(
        self, student_io_dict: Mapping, teacher_io_dict: Mapping, targets: Tensor
    ) -> Tensor:
        logits, recording = recorded(student_io_dict, "student", KEY)
        masks = companion(student_io_dict, "mask", KEY)
        shown = companion(student_io_dict, "mask_known", KEY) & masks.flatten(1).any(1)
        derived = torch.is_grad_enabled()
        self.computed = bool(shown.any()) and (not derived or self._batches % self.every == 0)
        self._batches += derived
        if not self.computed:
            return (logits * 0).sum()  # has a graph, in case that there is no other term
        explained = self._choose_explained(targets, logits, teacher_io_dict)
        with torch.autocast(logits.device.type, enabled=False):
            shares = []
            for map_ in recording.maps(logits, explained, derived, signed=True):
                inside = resize_masks(masks[shown].to(map_), (map_.shape[1], map_.shape[2]))
                self.zero_maps = self.zero_maps + losses.zero_maps(map_[shown]).sum()
                shares.append(share_outside(map_[shown], inside).mean())
            return torch.stack(shares).mean()

    def _choose_explained(self, targets: Tensor, logits: Tensor, teacher: Mapping) -> Tensor:
        if self.target == "teacher":
            of_teacher = get_logits(KEY, "teacher", teacher)
            check_same_outputs(KEY, logits, of_teacher)
            return of_teacher.argmax(1)
        if self.target == "contrast":
            return contrast(KEY, targets, logits)
        check_targets(KEY, targets, logits)
        return targets

    def extra_repr(self) -> str:
        return f"target={self.target}, every={self.every}"


register_mid_level_loss(strict(KEY)(RightReasonsLoss), key=KEY)
