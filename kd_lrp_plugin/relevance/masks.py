"""Relevance inside and outside of what an image shows."""

import torch
from jaxtyping import Float
from torch import Tensor

from kd_lrp_plugin.utils.validation import check_same_shape, message


def share_outside(
    maps: Float[Tensor, "n h w"], inside: Float[Tensor, "n h w"]
) -> Float[Tensor, " n"]:
    r"""Share of the relevance, squared, that lies outside of an object.

    .. math:: \frac{\sum_p (1 - m_p) R_p^2}{\sum_p R_p^2}

    Args:
        maps: signed relevance maps, at any scale.
        inside: share of each cell that the object covers, in [0, 1]; a cell that it covers in part
            counts by the part outside. See :func:`resize_masks`.

    Returns:
        One share in [0, 1] per map. A map without any relevance counts as 1 and passes no gradient,
        as in :mod:`kd_lrp_plugin.losses`.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> share_outside(torch.tensor([[[3.0, -4.0]]]), torch.tensor([[[1.0, 0.0]]]))
        tensor([0.6400])

    Reference:
        Ross, Hughes and Doshi-Velez, IJCAI 2017, eq. 1, its second term. Deviation: that sums the
        squared gradient of the summed log-probabilities by the input outside of the mask; this is
        relevance at a layer, over its sum, so that it has no unit and no scale.
    """
    check_same_shape("share_outside", "Use resize_masks.", maps=maps, inside=inside)
    maps, inside = maps.flatten(1), inside.detach().to(maps).flatten(1)
    largest = maps.detach().abs().amax(1, keepdim=True)  # squares of 1e-20 vanish in float32
    is_zero = largest < torch.finfo(maps.dtype).tiny
    squares = (maps / torch.where(is_zero, 1, largest)).square()
    squares = torch.where(is_zero, 1 - inside * 0, squares)
    share = ((1 - inside) * squares).sum(1) / squares.sum(1)
    return torch.where(is_zero[:, 0], 1, share)


def resize_masks(
    masks: Float[Tensor, "n height width"], size: tuple[int, int]
) -> Float[Tensor, "n h w"]:
    """The share of each cell of a coarser or finer grid that a mask covers, exactly.

    Args:
        masks: in [0, 1], or booleans.
        size: height and width wanted, in cells.

    Returns:
        Shares (n, h, w) in [0, 1], in the floating-point type of the masks, float32 for booleans;
        their mean is that of the mask.

    Raises:
        ValueError: if the masks are not (n, height, width).

    Example:
        >>> resize_masks(torch.tensor([[[1, 1, 0]]]).bool(), (1, 2))
        tensor([[[1.0000, 0.3333]]])
    """
    if masks.ndim != 3:
        fix = "Give one mask per image."
        raise ValueError(message("resize_masks", "masks (n, h, w)", tuple(masks.shape), fix))
    masks = masks if masks.is_floating_point() else masks.float()
    rows, columns = (
        _overlaps(old, new).to(masks) for old, new in zip(masks.shape[1:], size, strict=True)
    )
    return rows @ masks @ columns.mT


def _overlaps(old: int, new: int) -> Float[Tensor, "new old"]:
    """The share of each of ``new`` cells of a line that each of ``old`` cells of it covers."""
    step = old / new
    begin = torch.arange(new, dtype=torch.float64)[:, None] * step
    cell = torch.arange(old, dtype=torch.float64)[None]
    shared = torch.minimum(begin + step, cell + 1) - torch.maximum(begin, cell)
    return shared.clamp(min=0) / step
