"""Distances between relevance maps, between features and between logits.

Every loss is a pure function ``f(student, teacher) -> scalar`` for any PyTorch loop: the teacher's
side is a constant, the gradient reaches the student alone. [T] in the references is the thesis
this package implements.

The correlation and relation losses compare the samples of a batch with each other, and
``semantic_relative_l2`` sets them off against the whole batch. Under several processes each sees
its own process's part of the batch, not the gathered one, so that their value depends on the
number of processes; the other losses are means over samples, and theirs does not.

Zero maps, and matrices of norm zero, are defined rather than NaN: their cosine similarity with
anything is 0 (so the distance is 1) and they pass no gradient. :func:`zero_maps` finds them.
"Zero" means that no entry reaches the smallest normal number of the data type; maps above that
are compared by direction, however small they are.

Of subclasses, :mod:`kd_lrp_plugin.losses.subclass` says what is a distance, and what the classes
make of them.
"""

from kd_lrp_plugin.losses.checks import FEATURES, LOGITS, LOSSES, MAPS
from kd_lrp_plugin.losses.divergence import kl_divergence
from kd_lrp_plugin.losses.maps import (
    correlation_cosine,
    correlation_l2,
    relation_cosine,
    relation_l2,
    resize_maps,
    semantic_cosine,
    semantic_l2,
    semantic_relative_l2,
    zero_maps,
)
from kd_lrp_plugin.losses.subclass import (
    fold_logits,
    fold_targets,
    subclass_auxiliary,
    subclass_cross_entropy,
    subclass_kl,
)

__all__ = [
    "FEATURES",
    "LOGITS",
    "LOSSES",
    "MAPS",
    "correlation_cosine",
    "correlation_l2",
    "fold_logits",
    "fold_targets",
    "kl_divergence",
    "relation_cosine",
    "relation_l2",
    "resize_maps",
    "semantic_cosine",
    "semantic_l2",
    "semantic_relative_l2",
    "subclass_auxiliary",
    "subclass_cross_entropy",
    "subclass_kl",
    "zero_maps",
]
