"""How good a student is beyond its loss: where its maps look, and whether its teacher agrees.

Pure functions, one value per sample. A sample for which a figure is not defined (a map without
relevance, an image without a tumour) gets nan, so that samples stay in line with their images:
average with ``values.nanmean()``, and report ``values.isnan().sum()`` beside it.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kd_lrp_plugin.checks import message
from kd_lrp_plugin.losses import resize_maps, zero_maps

# --- relevance maps -----------------------------------------------------------------------------


def mass_inside(
    maps: Float[Tensor, "n h w"], masks: Bool[Tensor, "n height width"]
) -> Float[Tensor, " n"]:
    r"""Share of each map's positive relevance that lies inside the mask.

    .. math:: \frac{\sum_{p \in M_i} r_{ip}^+}{\sum_p r_{ip}^+}

    The positive part is brought to the masks' size first, by :func:`losses.resize_maps`.

    Args:
        maps: relevance maps; negative relevance does not count.
        masks: the object's pixels, in the geometry of the images that the model saw.

    Returns:
        Values in [0, 1]; a map spread evenly gets the mask's share of the image. nan where the
        map has no positive relevance or the mask is empty.

    Raises:
        ValueError: if these are not maps (n, h, w) and boolean masks (n, H, W) of one n.

    Example:
        >>> maps = torch.tensor([[[3.0, 1.0], [0.0, -9.0]]])
        >>> masks = torch.tensor([[[True, False], [False, False]]])
        >>> mass_inside(maps, masks).tolist()
        [0.75]

    Reference:
        Kohlbrenner et al., IJCNN 2020, attribution localisation (the positive relevance inside
        an object's box, over all of it). Deviation: masks instead of boxes.
    """
    if maps.ndim != 3 or masks.ndim != 3 or len(maps) != len(masks):
        got = f"{tuple(maps.shape)} and {tuple(masks.shape)}"
        fix = "Give one mask per map, each without a channel axis."
        raise ValueError(message("mass_inside", "maps (n, h, w) and masks (n, H, W)", got, fix))
    if masks.dtype != torch.bool:
        fix = "Compare with a threshold, as in mask > 0."
        raise ValueError(message("mass_inside", "boolean masks", masks.dtype, fix))
    height, width = masks.shape[1:]
    positive = _scaled(resize_maps(maps.detach().clamp(min=0), (height, width)))
    inside = (positive * masks).sum((1, 2)) / positive.sum((1, 2))
    return torch.where(masks.any(2).any(1), inside, torch.nan)


def agreement(
    student: Float[Tensor, "n h w"], teacher: Float[Tensor, "n height width"]
) -> Float[Tensor, " n"]:
    r"""Cosine similarity of each student map with its teacher's.

    .. math:: \frac{\langle s_i, t_i \rangle}{\|s_i\| \|t_i\|}

    Args:
        student: relevance maps, brought to the teacher's size by :func:`losses.resize_maps`.
        teacher: relevance maps of the same images and targets.

    Returns:
        Values in [-1, 1], in [0, 1] for positive maps; 1 when a pair is positively proportional.
        nan where either map is zero.

    Raises:
        ValueError: if these are not maps (n, h, w) of one n.

    Example:
        >>> teacher = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
        >>> student = torch.cat([3 * teacher, teacher.flip(2), 0 * teacher])
        >>> agreement(student, teacher.expand(3, 2, 2)).tolist()
        [1.0, 0.0, nan]

    Reference:
        The thesis, eq. 2.21, as a figure instead of a loss.
    """
    if student.ndim != 3 or teacher.ndim != 3 or len(student) != len(teacher):
        shapes = {"student": tuple(student.shape), "teacher": tuple(teacher.shape)}
        fix = "Give both models the same images."
        raise ValueError(message("agreement", "maps (n, h, w) of one n", shapes, fix))
    height, width = teacher.shape[1:]
    ours = _scaled(resize_maps(student.detach(), (height, width))).flatten(1)
    theirs = _scaled(teacher.detach()).flatten(1)
    return torch.cosine_similarity(ours, theirs).clamp(-1, 1)


def _scaled(maps: Float[Tensor, "n h w"]) -> Float[Tensor, "n h w"]:
    """Maps with largest entry 1, whose squares neither vanish nor overflow; zero maps are nan."""
    largest = maps.abs().amax((1, 2), keepdim=True)
    return maps / torch.where(zero_maps(maps)[:, None, None], torch.nan, largest)
