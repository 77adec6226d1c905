"""DisWOT and the variant of the thesis: distances of maps and of relations."""

from collections.abc import Callable

import torch
from torch import Tensor

from kd_lrp_plugin.losses import (
    correlation_l2,
    relation_cosine,
    relation_l2,
    resize_maps,
    semantic_cosine,
)
from kd_lrp_plugin.selection.scores.registry import SCORES, Function, Score
from kd_lrp_plugin.utils.validation import message


def semantic_score(distance: Callable[..., Tensor], method: str, signed: bool) -> Function:
    return lambda student, teacher: _mean(
        distance, student.maps(method, signed), teacher.maps(method, signed)
    )


def resized_cosine(ours: Tensor, theirs: Tensor) -> Tensor:
    return semantic_cosine(ours, resize_maps(theirs, (ours.shape[-2], ours.shape[-1])))


def relation_score(distance: Callable[..., Tensor]) -> Function:
    return lambda student, teacher: _mean(distance, student.features, teacher.features)


def _mean(distance: Callable[..., Tensor], ours: list[Tensor], theirs: list[Tensor]) -> float:
    if len(ours) != len(theirs):
        got = f"{len(ours)} of the student, {len(theirs)} of the teacher"
        fix = "Name as many layers of each."
        raise ValueError(message("score", "as many layers of each network", got, fix))
    pairs = zip(ours, theirs, strict=True)
    return float(torch.stack([distance(s, t) for s, t in pairs]).mean())


def sum_scores(*names: str) -> Function:
    return lambda student, teacher: sum(SCORES[n].function(student, teacher) for n in names)


_THESIS = "the thesis, eq. 2.21-2.27, after DisWOT"
_DISWOT = "Dong et al., CVPR 2023; the thesis, eq. 2.5-2.13"
for _name, _function, _source in (
    ("diswot", sum_scores("gradcam_l2", "relation_l2"), _DISWOT),
    ("gradcam_l2", semantic_score(correlation_l2, "grad_cam", signed=True), _DISWOT),
    ("relation_l2", relation_score(relation_l2), _DISWOT),
    ("diswot_lrp_cosine", sum_scores("lrp_cosine", "relation_cosine"), _THESIS),
    ("lrp_cosine", semantic_score(resized_cosine, "gradient_activation", signed=False), _THESIS),
    ("relation_cosine", relation_score(relation_cosine), _THESIS),
):
    SCORES.register(Score(_function, _source), _name)
