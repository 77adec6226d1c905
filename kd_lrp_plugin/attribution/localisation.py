"""Where relevance lies: metrics of maps and masks, and of maps beside each other.

Pure functions, one value per sample; a sample for which a metric is not defined (a map without
relevance, an image without a tumour) gets nan, so that samples stay in line with their images:
average with ``values.nanmean()``, and report ``values.isnan().sum()`` beside it.

Of the metrics of maps and masks :func:`area_share` is the chance level: the value of an even map,
of relevance in any order, and of a point set blindly.
"""

import torch
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from torch import Tensor

from kd_lrp_plugin.losses import resize_maps, zero_maps
from kd_lrp_plugin.utils.validation import message


def relevance_mass_accuracy(
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
        >>> relevance_mass_accuracy(maps, masks).tolist()
        [0.75]

    Reference:
        Kohlbrenner et al., IJCNN 2020, attribution localisation (the positive relevance inside
        an object's box, over all of it). Deviation: masks instead of boxes, which makes it the
        relevance mass accuracy of Arras et al., Information Fusion 81 (2022), sec. 3.3.
    """
    positive = _positive("relevance_mass_accuracy", maps, masks)
    inside = (positive * masks).sum((1, 2)) / positive.sum((1, 2))
    return torch.where(masks.any(2).any(1), inside, torch.nan)


def rank_accuracy(
    maps: Float[Tensor, "n h w"], masks: Bool[Tensor, "n height width"]
) -> Float[Tensor, " n"]:
    """Of the most relevant pixels, as many as the mask has, the share that lies inside it.

    Unlike :func:`relevance_mass_accuracy` it does not ask how much relevance a pixel has, only
    which has more.

    Args:
        maps: as for :func:`relevance_mass_accuracy`.
        masks: likewise.

    Returns:
        Values in [0, 1]; nan where :func:`relevance_mass_accuracy` is.

    Raises:
        ValueError: as :func:`relevance_mass_accuracy`.

    Example:
        >>> maps = torch.tensor([[[3.0, 1.0], [2.0, 0.0]]])
        >>> masks = torch.tensor([[[True, True], [False, False]]])
        >>> rank_accuracy(maps, masks).tolist()
        [0.5]

    Reference:
        Arras et al., Information Fusion 81 (2022), sec. 3.3. Deviation: of pixels that are
        equally relevant, such as those without any, each counts with the same share, so that no
        order of pixels matters.
    """
    relevance = _positive("rank_accuracy", maps, masks).flatten(1)
    inside = masks.flatten(1)
    size = inside.sum(1, keepdim=True)
    last = relevance.sort(1, descending=True).values.gather(1, (size - 1).clamp(min=0))
    above, tied = relevance > last, relevance == last
    share = (tied & inside).sum(1).to(relevance) / tied.sum(1)
    hits = (above & inside).sum(1) + (size.squeeze(1) - above.sum(1)) * share
    undefined = relevance.isnan().any(1) | ~inside.any(1)
    return torch.where(undefined, torch.nan, hits / size.squeeze(1).clamp(min=1))


def pointing_game(
    maps: Float[Tensor, "n h w"], masks: Bool[Tensor, "n height width"]
) -> Float[Tensor, " n"]:
    """Whether the most relevant pixel lies inside the mask: 1 or 0.

    Args:
        maps: as for :func:`relevance_mass_accuracy`.
        masks: likewise.

    Returns:
        Where several pixels share the maximum, the share of them that lies inside. nan where
        :func:`relevance_mass_accuracy` is.

    Raises:
        ValueError: as :func:`relevance_mass_accuracy`.

    Example:
        >>> maps = torch.tensor([[[3.0, 1.0], [2.0, 0.0]]])
        >>> masks = torch.tensor([[[True, True], [False, False]]])
        >>> pointing_game(maps, masks).tolist()
        [1.0]

    Reference:
        Zhang et al., IJCV 126 (2018), sec. 4.2. Deviation: no tolerance around the mask, which
        there is 15 pixels.
    """
    relevance = _positive("pointing_game", maps, masks)
    largest = relevance == relevance.amax((1, 2), keepdim=True)
    hits = (largest & masks).sum((1, 2)).to(relevance) / largest.sum((1, 2))
    return torch.where(masks.any(2).any(1), hits, torch.nan)


def area_share(masks: Bool[Tensor, "n height width"]) -> Float[Tensor, " n"]:
    """Each mask's share of its image: the chance level of the metrics above.

    Example:
        >>> area_share(torch.tensor([[[True, False], [False, False]]])).tolist()
        [0.25]
    """
    return masks.float().mean((1, 2))


def attribution_similarity(
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
        >>> attribution_similarity(student, teacher.expand(3, 2, 2)).tolist()
        [1.0, 0.0, nan]

    Reference:
        The thesis, eq. 2.21, as a metric instead of a loss.
    """
    _check_pair("attribution_similarity", student=student, teacher=teacher)
    height, width = teacher.shape[1:]
    ours = _scaled(resize_maps(student.detach(), (height, width))).flatten(1)
    theirs = _scaled(teacher.detach()).flatten(1)
    return torch.cosine_similarity(ours, theirs).clamp(-1, 1)


def rank_correlation(
    one: Float[Tensor, "n h w"], other: Float[Tensor, "n h w"]
) -> Float[Tensor, " n"]:
    """Spearman's correlation of each pair of maps: whether they put locations in the same order.

    Args:
        one: relevance maps.
        other: of the same size.

    Returns:
        Values in [-1, 1], about 0 for unrelated maps; nan where either map is the same everywhere.

    Raises:
        ValueError: if these are not maps (n, h, w) of one shape.

    Example:
        >>> one = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        >>> rank_correlation(one, one.exp()).tolist(), rank_correlation(one, -one).tolist()
        ([1.0], [-1.0])

    Reference:
        Spearman 1904; as a similarity of maps in Adebayo et al., NeurIPS 2018, sec. 4.1.
    """
    _check_pair("rank_correlation", one=one, other=other)
    if one.shape != other.shape:
        got = f"{tuple(one.shape)} and {tuple(other.shape)}"
        fix = "Compare maps of one layer."
        raise ValueError(message("rank_correlation", "maps of one size", got, fix))
    ranks = (rankdata(maps.detach().cpu().flatten(1).numpy(), axis=1) for maps in (one, other))
    first, second = (torch.from_numpy(r - r.mean(1, keepdims=True)) for r in ranks)
    return attribution_similarity(first[:, None], second[:, None]).to(one)


def _positive(where: str, maps: Tensor, masks: Tensor) -> Float[Tensor, "n height width"]:
    """The positive relevance at the masks' size, of largest entry 1; nan in maps without any."""
    if maps.ndim != 3 or masks.ndim != 3 or len(maps) != len(masks):
        got = f"{tuple(maps.shape)} and {tuple(masks.shape)}"
        fix = "Give one mask per map, each without a channel axis."
        raise ValueError(message(where, "maps (n, h, w) and masks (n, H, W)", got, fix))
    if masks.dtype != torch.bool:
        fix = "Compare with a threshold, as in mask > 0."
        raise ValueError(message(where, "boolean masks", masks.dtype, fix))
    height, width = masks.shape[1:]
    return _scaled(resize_maps(maps.detach().clamp(min=0), (height, width)))


def _check_pair(where: str, **maps: Tensor) -> None:
    if any(m.ndim != 3 for m in maps.values()) or len({len(m) for m in maps.values()}) > 1:
        shapes = {name: tuple(m.shape) for name, m in maps.items()}
        fix = "Give both models the same images."
        raise ValueError(message(where, "maps (n, h, w) of one n", shapes, fix))


def _scaled(maps: Float[Tensor, "n h w"]) -> Float[Tensor, "n h w"]:
    """Maps with largest entry 1, whose squares neither vanish nor overflow; zero maps are nan."""
    largest = maps.abs().amax((1, 2), keepdim=True)
    return maps / torch.where(zero_maps(maps)[:, None, None], torch.nan, largest)
