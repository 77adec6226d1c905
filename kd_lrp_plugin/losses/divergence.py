"""Divergence between predictions."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from kd_lrp_plugin.losses.checks import LOGITS, LOSSES, check_axes
from kd_lrp_plugin.utils.validation import check_same_shape, message


@LOSSES.register
def kl_divergence(
    student: Float[Tensor, "n classes"],
    teacher: Float[Tensor, "n classes"],
    temperature: float = 4.0,
) -> Float[Tensor, ""]:
    r"""Divergence of the student's softened predictions from the teacher's, batch mean.

    .. math:: L = \frac{\tau^2}{n} \sum_i \sum_c p^T_{ic} \log \frac{p^T_{ic}}{p^S_{ic}},
              \qquad p = \mathrm{softmax}(\mathrm{logits} / \tau)

    Args:
        student: logits that carry gradient.
        teacher: logits of the same shape, treated as constant.
        temperature: τ in [0.01, 100]; the factor τ² keeps gradients comparable across
            temperatures. Beyond 100 the predictions differ by less than float32 can tell, and τ²
            times the difference would be its rounding.

    Returns:
        Scalar >= 0, in nats times τ², float32 for logits in half precision. A class that both
        rule out (a logit of -inf) adds nothing; one that the student alone does, infinity.

    Raises:
        ValueError: if the shapes differ, are not (n, classes) with n >= 1 and two classes or
            more (the prediction of one class is 1 whatever the logits), or τ is outside its range.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 4.0]])
        >>> round(kl_divergence(student, teacher).item(), 4)
        1.7751

    Reference:
        Hinton, Vinyals and Dean, 2015, section 2; [T], eq. 2.4. Deviation: none.
    """
    terms = divergence_terms("kl_divergence", student, teacher, temperature)
    return temperature**2 * (terms.sum() / len(terms))


def divergence_terms(
    where: str,
    student: Float[Tensor, "n classes"],
    teacher: Float[Tensor, "n classes"],
    temperature: float,
) -> Float[Tensor, "n classes"]:
    """What each class of each image adds to :func:`kl_divergence`, without τ².

    Args:
        where: who asks, for messages.
        student, teacher, temperature: see :func:`kl_divergence`, as for the errors.
    """
    check_same_shape(
        where, "Give both models the same number of classes.", student=student, teacher=teacher
    )
    check_axes(where, LOGITS, 1, student, teacher)
    if student.shape[1] < 2:
        fix = "Give the model one output per class, also for two classes."
        raise ValueError(message(where, "logits of two classes or more", "one", fix))
    if not 0.01 <= temperature <= 100:
        fix = "Use 4, the paper's value."
        expected = "a temperature from 0.01 to 100" if temperature > 0 else "a temperature above 0"
        raise ValueError(message(where, expected, temperature, fix))
    # Logits in half precision would be rounded by more than the predictions differ.
    student, teacher = (
        t.to(torch.promote_types(t.dtype, torch.float32)) for t in (student, teacher)
    )
    of_student = functional.log_softmax(student / temperature, dim=1)
    of_teacher = functional.log_softmax(teacher.detach() / temperature, dim=1)
    probability = of_teacher.exp()
    # 0 log 0 is 0 in a divergence. NaN is not equal to 0, and so is not hidden.
    return torch.where(probability == 0, 0, probability * (of_teacher - of_student))
