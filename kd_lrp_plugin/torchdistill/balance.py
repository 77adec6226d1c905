"""Factors of loss terms that give each its share of the gradient."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kd_lrp_plugin.utils.distributed import DistributedContext, rank_and_world_size
from kd_lrp_plugin.utils.validation import message

SMOOTHING = 0.9
"""What the moving average of the norms keeps in each step."""


class GradientBalance(nn.Module):
    r"""Factors by which the gradients of several terms have the sizes that their weights say.

    .. math:: f_k = w_k \frac{S}{n_k}, \qquad
        S = \frac{\sum_{k \in R} w_k n_k}{\sum_{k \in R} w_k}

    with n_k the norm of the gradient of term k at the target layers, all of them together, and R
    the terms of reference. So term k has the share w_k of the gradients' summed norms, and the
    terms of R together keep the norm that they have with their weights as factors: a learning rate
    that suits them without balance suits them with it. Where R is a single term, its factor is its
    weight. Where no term of R weighs anything, R is all terms.

    The norms are smoothed by an exponential moving average, which begins with the first batch. A
    gradient of zero is left out of it, so that the term keeps its factor; one that has had no
    gradient yet has its weight for a factor.

    Args:
        terms: names of all terms.
        reference: names of those of R.

    Attributes:
        norms: the averages in the order of the terms, 0 before the first; they are state, which a
            checkpoint has to hold.
        context: the processes that share their norms; None for those that torchrun has started.

    Reference:
        The target, equal gradient norms at shared layers, is that of GradNorm (Chen et al., ICML
        2018), without its training rates; the closed form, a ratio of norms in place of weights
        that are learned, that of VQGAN (Esser et al., CVPR 2021, eq. 7). Deviation from both:
        activations in place of weights, given shares, smoothing.
    """

    norms: Tensor

    def __init__(self, terms: Sequence[str], reference: Sequence[str]) -> None:
        super().__init__()
        self.terms, self.reference = list(terms), list(reference)
        self.context: DistributedContext | None = None
        self.register_buffer("norms", torch.zeros(len(self.terms)))

    def update(self, values: Mapping[str, Tensor], activations: Sequence[Tensor]) -> None:
        """Take the gradients of a batch into the averages; one backward pass for each value.

        Raises:
            FloatingPointError: if a gradient is not finite.
        """
        squares = torch.stack([_squared_norm(value, activations) for value in values.values()])
        context = self.context
        if context is None:
            context = DistributedContext(squares.device, *rank_and_world_size())
        # The mean of squares is, up to a factor common to all terms, what one process would find
        # for the batches of all.
        context.all_reduce_mean(squares)
        if not squares.isfinite().all():
            wrong = [n for n, s in zip(values, squares, strict=True) if not torch.isfinite(s)]
            fix = "Lower the learning rate, or the weight of the term; no step was taken."
            got = f"{wrong} with a gradient that is not"
            raise FloatingPointError(message("balance", "finite gradients", got, fix))
        index = [self.terms.index(name) for name in values]
        old, new = self.norms[index], squares.sqrt().to(self.norms)
        averaged = torch.where(old > 0, SMOOTHING * old + (1 - SMOOTHING) * new, new)
        self.norms[index] = torch.where(new > 0, averaged, old)

    def factors(self, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """The factor of each term that has a weight, from the averages as they are."""
        norms = {name: self.norms[self.terms.index(name)] for name in weights}
        known = [name for name in weights if norms[name] > 0]
        reference = [name for name in known if name in self.reference] or known
        scale = sum(weights[name] * norms[name] for name in reference)
        total = sum(weights[name] for name in reference)
        found = {name: torch.full_like(self.norms[0], weight) for name, weight in weights.items()}
        return found | {name: weights[name] * (scale / total) / norms[name] for name in known}


def _squared_norm(value: Tensor, activations: Sequence[Tensor]) -> Tensor:
    gradients = torch.autograd.grad(value, activations, retain_graph=True, allow_unused=True)
    parts = [g.detach().float().square().sum() for g in gradients if g is not None]
    return torch.stack(parts).sum() if parts else value.new_zeros((), dtype=torch.float32)
