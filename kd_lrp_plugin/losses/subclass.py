"""Losses over subclasses, and the classes that subclasses add up to.

``subclass_of`` says the class index of each subclass; a class has one subclass or more. A model has
an output per subclass. A target is the index of a subclass; where only the class is known, it is
the number of subclasses plus the class index, which no other loss takes for a label.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from kd_lrp_plugin.losses.checks import LOGITS, check_axes
from kd_lrp_plugin.losses.divergence import divergence_terms
from kd_lrp_plugin.losses.maps import unit_rows
from kd_lrp_plugin.utils.validation import check_targets, message

FAR_WEIGHT = 1.5
"""Of an image whose most likely subclasses by student and teacher are two steps apart or more."""


def subclass_kl(
    student: Float[Tensor, "n subclasses"],
    teacher: Float[Tensor, "n subclasses"],
    temperature: float = 4.0,
    distance_weights: bool = False,
) -> Float[Tensor, ""]:
    r"""Divergence of the student's softened subclasses from the teacher's, weighted batch mean.

    .. math:: L = \frac{\tau^2}{n} \sum_i w_i \sum_k p^T_{ik} \log \frac{p^T_{ik}}{p^S_{ik}}

    Args:
        student: logits that carry gradient.
        teacher: logits of the same shape, treated as constant.
        temperature: τ, as of :func:`~kd_lrp_plugin.losses.kl_divergence`.
        distance_weights: w of 1.5 for an image whose most likely subclasses by student and
            teacher are two steps or more apart in the order of the outputs, else 1; constants for
            the gradient. Without them all are 1, and this is ``kl_divergence``.

    Returns:
        Scalar >= 0, in nats times τ².

    Raises:
        ValueError: as ``kl_divergence``.

    Example:
        >>> student, teacher = torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 4.0]])
        >>> plain = subclass_kl(student, teacher)
        >>> round((subclass_kl(student, teacher, distance_weights=True) / plain).item(), 4)
        1.5

    Reference:
        Müller, Kornblith and Hinton, 2020 (the divergence over subclasses); the weights are
        ours.
    """
    terms = divergence_terms("subclass_kl", student, teacher, temperature)
    if distance_weights:
        steps = (student.argmax(1) - teacher.argmax(1)).abs()
        terms = torch.where(steps >= 2, FAR_WEIGHT, 1.0).to(terms)[:, None] * terms
    return temperature**2 * (terms.sum() / len(terms))


def subclass_cross_entropy(
    logits: Float[Tensor, "n subclasses"],
    targets: Int[Tensor, " n"] | Float[Tensor, "n subclasses"],
    subclass_of: Sequence[int],
) -> Float[Tensor, ""]:
    """Cross entropy of the subclass where it is known, else of the class; batch mean.

    Args:
        logits: of the subclasses.
        targets: subclass indices, or the number of subclasses plus a class index, or soft labels
            of the subclasses.
        subclass_of: the class index of each subclass.

    Returns:
        Scalar >= 0, in nats, float32 for logits in half precision.

    Raises:
        ValueError: if logits, targets and subclasses do not fit.

    Example:
        >>> logits = torch.zeros(1, 4)
        >>> round(subclass_cross_entropy(logits, torch.tensor([1]), [0, 0, 0, 1]).item(), 4)
        1.3863
        >>> round(subclass_cross_entropy(logits, torch.tensor([4]), [0, 0, 0, 1]).item(), 4)
        0.2877

    Reference:
        Müller, Kornblith and Hinton, 2020: the probability of a class is the sum of its
        subclasses'. Deviation: cross entropy of the subclass where it is known.
    """
    where = "subclass_cross_entropy"
    check_axes(where, LOGITS, 1, logits)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    folded = fold_logits(logits, subclass_of)
    if targets.is_floating_point():
        check_targets(where, targets, logits)
        return functional.cross_entropy(logits, targets)
    classes = fold_targets(targets, subclass_of)
    if len(classes) != len(logits):
        got, fix = f"{len(classes)} for {len(logits)} images", "Give one target per image."
        raise ValueError(message(where, "a target for each image", got, fix))
    known = targets < len(subclass_of)
    # An index that is there stands in where no subclass is known; its value is not taken.
    of_subclass = functional.cross_entropy(
        logits, torch.where(known, targets, 0).long(), reduction="none"
    )
    of_class = functional.cross_entropy(folded, classes, reduction="none")
    return torch.where(known, of_subclass, of_class).mean()


def subclass_auxiliary(
    logits: Float[Tensor, "n subclasses"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    r"""How alike the directions of a batch's logits are; 0 if all are the same, else negative.

    .. math:: L = \frac1n \sum_i \log \sum_j e^{v_i \cdot v_j / T} - \frac1T - \log n,
              \qquad v = \frac{z}{\|z\|}

    Beside the cross entropy of the classes it keeps a teacher that knows no subclasses from
    using but one of each class.

    Under several processes the images are those of one process, not the gathered batch.

    Args:
        logits: z, of the subclasses.
        temperature: T in [0.01, 100].

    Returns:
        Scalar in [-2 / T, 0], float32 for logits in half precision. Logits that are all zero have
        no direction: their product with any, themselves included, is 0.

    Raises:
        ValueError: if logits are not (n, subclasses) with n >= 2, or T is outside its range.

    Example:
        >>> subclass_auxiliary(torch.tensor([[1.0, 0.0], [3.0, 0.0]])).item()
        0.0
        >>> round(subclass_auxiliary(torch.eye(2)).item(), 4)
        -0.3799

    Reference:
        Müller, Kornblith and Hinton, 2020. Deviation: zero logits.
    """
    where = "subclass_auxiliary"
    check_axes(where, LOGITS, 2, logits)
    if not 0.01 <= temperature <= 100:
        expected = "a temperature from 0.01 to 100"
        raise ValueError(message(where, expected, temperature, "Use 1."))
    rows = unit_rows(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    # Rounding makes products of more than 1, and with them a loss above its highest value.
    scaled = ((rows @ rows.mT).clamp(max=1) - 1) / temperature
    return (scaled.logsumexp(1) - torch.zeros_like(scaled).logsumexp(1)).mean()


def fold_logits(
    logits: Float[Tensor, "n subclasses"], subclass_of: Sequence[int]
) -> Float[Tensor, "n classes"]:
    """Logits of the classes: their softmax adds up the softmax of each class's subclasses.

    Args:
        logits: of the subclasses.
        subclass_of: the class index of each subclass.

    Returns:
        The log-sum-exp over the subclasses of each class.

    Raises:
        ValueError: if there is not one logit per subclass, or a class without subclasses.

    Example:
        >>> fold_logits(torch.tensor([[0.0, 0.0, 1.0]]), [0, 0, 1]).softmax(1).sum().item()
        1.0
    """
    if logits.ndim != 2 or logits.shape[1] != len(subclass_of):
        got = tuple(logits.shape)
        fix = "Give the model as many outputs as there are subclasses."
        expected = f"logits (n, {len(subclass_of)}), one per subclass"
        raise ValueError(message("fold_logits", expected, got, fix))
    members = _list_members(subclass_of)
    return torch.stack([logits[:, of_class].logsumexp(1) for of_class in members], 1)


def fold_targets(
    targets: Int[Tensor, " n"] | Float[Tensor, "n subclasses"], subclass_of: Sequence[int]
) -> Int[Tensor, " n"] | Float[Tensor, "n classes"]:
    """Targets of the classes: indices of indices, soft labels of soft labels.

    Args:
        targets: as of :func:`subclass_cross_entropy`.
        subclass_of: the class index of each subclass.

    Raises:
        ValueError: for indices out of range, soft labels of another number of subclasses, or a
            class without subclasses.

    Example:
        >>> fold_targets(torch.tensor([0, 2, 3]), [0, 0, 1]).tolist()  # 3: of class 0
        [0, 1, 0]
    """
    members, outputs = _list_members(subclass_of), len(subclass_of)
    if targets.is_floating_point():
        if targets.ndim != 2 or targets.shape[1] != outputs:
            expected = f"soft labels (n, {outputs})"
            fix = "Set num_classes of mixup to the number of subclasses."
            raise ValueError(message("fold_targets", expected, tuple(targets.shape), fix))
        return torch.stack([targets[:, of_class].sum(1) for of_class in members], 1)
    most = outputs + len(members)
    if targets.ndim != 1 or ((targets < 0) | (targets >= most)).any():
        got = f"{tuple(targets.shape)} of {sorted(set(targets.flatten().tolist()))}"
        fix = "Wrap the images in subclasses, as those that the model is trained with."
        expected = f"subclass indices (n,) below {outputs}, or classes from there to {most - 1}"
        raise ValueError(message("fold_targets", expected, got, fix))
    table = torch.tensor([*subclass_of, *range(len(members))], device=targets.device)
    return table[targets.long()]


def _list_members(subclass_of: Sequence[int]) -> list[list[int]]:
    """By class, the indices of its subclasses."""
    found = [
        [index for index, owner in enumerate(subclass_of) if owner == number]
        for number in range(max(subclass_of, default=0) + 1)
    ]
    if sum(map(len, found)) != len(subclass_of) or not all(found):
        fix = "Give the class index of each subclass, and no class without a subclass."
        expected = "class indices from 0, each once or more"
        raise ValueError(message("subclass_of", expected, list(subclass_of), fix))
    return found
