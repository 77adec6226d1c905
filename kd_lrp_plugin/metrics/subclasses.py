"""How a model spreads the images of a class over its subclasses."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from kd_lrp_plugin.utils.validation import message


def effective_subclasses(
    probabilities: Float[np.ndarray, "n subclasses"],
    labels: Int[np.ndarray, " n"],
    subclass_of: Sequence[int],
) -> list[float | None]:
    r"""By class, the number of subclasses that a model uses for its images.

    .. math:: \exp\Big(-\sum_k \bar q_k \log \bar q_k\Big), \qquad
              \bar q_k = \frac1n \sum_i \frac{p_{ik}}{\sum_{l \in G(c)} p_{il}}

    over the images of class c and its subclasses k.

    Args:
        probabilities: of the subclasses.
        labels: classes of the images.
        subclass_of: the class index of each subclass.

    Returns:
        Numbers from 1, where one subclass has all, to the subclasses of the class, which then have
        equal shares; None for a class without images. A model that never decides between the
        subclasses of an image uses all of them, too.

    Raises:
        ValueError: if there is not one probability per subclass.

    Example:
        >>> p = np.array([[0.5, 0.0, 0.5], [0.0, 0.6, 0.4]])
        >>> [round(n, 6) for n in effective_subclasses(p, np.array([0, 0]), [0, 0, 1])[:1]]
        [2.0]
    """
    if probabilities.shape[1:] != (len(subclass_of),):
        got, fix = probabilities.shape, "Give those of the subclasses, not of the classes."
        expected = f"probabilities (n, {len(subclass_of)})"
        raise ValueError(message("effective_subclasses", expected, got, fix))
    owners = np.asarray(subclass_of)
    found: list[float | None] = []
    for label in range(max(subclass_of) + 1):
        inside = probabilities[labels == label][:, owners == label]
        if not len(inside):
            found.append(None)
            continue
        # Where rounding has left none of the class' probability, its subclasses count alike.
        total = inside.sum(1, keepdims=True)
        even = np.full_like(inside, 1 / inside.shape[1])
        shares = np.divide(inside, total, out=even, where=total > 0).mean(0)
        used = shares[shares > 0]
        found.append(float(np.exp(-(used * np.log(used)).sum())))
    return found
