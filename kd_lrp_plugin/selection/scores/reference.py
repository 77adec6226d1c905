"""DisWOT's published code: Gram matrices of the classifier's gradient and of the last map."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kd_lrp_plugin.selection.scores.diswot import sum_scores
from kd_lrp_plugin.selection.scores.observation import Observation
from kd_lrp_plugin.selection.scores.registry import SCORES, Score
from kd_lrp_plugin.utils.validation import message

FLOOR = 1e-12  # of a row's length, in the published code


def reference_semantic(student: Observation, teacher: Observation, exact: bool = False) -> float:
    r"""Mean squared distance of row-normalised channel Gram matrices, one per class.

    The matrices :math:`g g^T` are of the gradient g (channels) of the cross entropy for the
    classifier's weights of a class. Their row i, normalised, is :math:`s_i g/|g|`, with the sign
    :math:`s_i` of g_i, so that no matrix need be made. Where a row is shorter than 1e-12 the
    published code divides by that, which makes s_i small: with weights from N(0, 1) the softmax is
    saturated, and the gradients of most classes are that small, or zero in single precision.
    ``exact`` normalises every row to length 1, however short.
    """
    ours, theirs = (_classifier_gradient(network, exact) for network in (student, teacher))
    if ours.shape != theirs.shape:
        got = f"{tuple(ours.shape)} and {tuple(theirs.shape)}"
        fix = "Leave this score out for students whose last map has other channels."
        expected = "classifier gradients (classes, channels) of one shape"
        raise ValueError(message("reference_semantic", expected, got, fix))
    unit, signs = [], []
    floor = 1e-300 if exact else FLOOR
    for gradient in (ours.double(), theirs.double()):
        length = gradient.norm(dim=1, keepdim=True)
        unit.append(gradient / length.clamp(min=1e-300))
        signs.append(gradient * length / (gradient.abs() * length).clamp(min=floor))
    cosine = (unit[0] * unit[1]).sum(1)
    rows = sum(sign.square().sum(1) for sign in signs) - 2 * (signs[0] * signs[1]).sum(1) * cosine
    return float((rows / ours.shape[1]).mean())


def _classifier_gradient(network: Observation, exact: bool) -> Float[Tensor, "classes channels"]:
    """Of the mean cross entropy, for a linear classifier on the pooled last map.

    With ``exact``, in double precision and, for each class, only in direction: then no factor
    vanishes that a saturated softmax leaves.
    """
    pooled, logits = network.features[-1].mean((2, 3)), network.logits
    hit = nn.functional.one_hot(network.targets, logits.shape[1]).bool()
    if not exact:
        return (logits.softmax(1) - hit.to(logits)).T @ pooled / len(pooled)
    logits = logits.double()
    missing = logits.masked_fill(hit, -math.inf).logsumexp(1) - logits.logsumexp(1)
    logs = torch.where(hit, missing[:, None], logits.log_softmax(1))
    wrong = (logs - logs.amax(0)).exp() * torch.where(hit, -1.0, 1.0)
    return wrong.T @ pooled.double()


def reference_relation(student: Observation, teacher: Observation) -> float:
    """Mean squared distance of the row-normalised batch Gram matrices of the last map."""
    grams = []
    for network in (student, teacher):
        flat = network.features[-1].flatten(1)
        grams.append(nn.functional.normalize(flat @ flat.T))
    return float((grams[0] - grams[1]).square().mean())


def reference_exact(student: Observation, teacher: Observation) -> float:
    """Both parts, with rows normalised exactly, however short they are."""
    return reference_semantic(student, teacher, exact=True) + reference_relation(student, teacher)


_CODE = "the published code of DisWOT"
for _name, _function, _source in (
    ("diswot_reference", sum_scores("reference_semantic", "reference_relation"), _CODE),
    ("reference_semantic", reference_semantic, _CODE),
    ("reference_relation", reference_relation, _CODE),
    ("reference_exact", reference_exact, f"{_CODE}, without its floor of 1e-12"),
):
    SCORES.register(Score(_function, _source, "normal"), _name)
