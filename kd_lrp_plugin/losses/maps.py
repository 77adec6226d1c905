"""Distances between relevance maps, and between features."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from kd_lrp_plugin.losses.checks import FEATURES, LOSSES, MAPS, check_axes
from kd_lrp_plugin.utils.validation import check_same_shape, message


@LOSSES.register
def semantic_cosine(
    student: Float[Tensor, "n h w"], teacher: Float[Tensor, "n h w"]
) -> Float[Tensor, ""]:
    r"""Cosine distance between relevance maps, averaged over the batch.

    .. math:: L = 1 - \frac1n \sum_i \frac{\langle s_i, t_i \rangle}{\|s_i\| \|t_i\|}

    Args:
        student: maps that carry gradient.
        teacher: maps of the same shape, treated as constant.

    Returns:
        Scalar in [0, 2]; 0 when the maps are positively proportional. A sample with a zero map
        counts as 1.

    Raises:
        ValueError: if the shapes differ or are not (n, h, w) with n >= 1.

    Example:
        >>> m = torch.eye(2)[None]
        >>> semantic_cosine(m, 4 * m).item()
        0.0
        >>> round(semantic_cosine(m, m.flip(-1)).item(), 4)  # no pixel in common
        1.0

    Reference:
        [T], eq. 2.20-2.22. Deviation: none.
    """
    _check_same_maps("semantic_cosine", student, teacher)
    return _cosine_distance(
        unit_rows(student.flatten(1)), unit_rows(teacher.detach().flatten(1))
    ).mean()


@LOSSES.register
def semantic_l2(
    student: Float[Tensor, "n h w"], teacher: Float[Tensor, "n h w"]
) -> Float[Tensor, ""]:
    r"""Squared L2 distance between relevance maps, averaged over the batch.

    .. math:: L = \frac1n \sum_i \|t_i - s_i\|_2^2

    Args:
        student: maps that carry gradient.
        teacher: maps of the same shape, treated as constant.

    Returns:
        Scalar >= 0, in squared units of the maps: it depends on their scale and size.

    Raises:
        ValueError: if the shapes differ or are not (n, h, w) with n >= 1.

    Example:
        >>> semantic_l2(torch.ones(5, 2, 3), torch.zeros(5, 2, 3)).item()
        6.0

    Reference:
        [T], eq. 2.19. Deviation: none.
    """
    _check_same_maps("semantic_l2", student, teacher)
    return (student - teacher.detach()).flatten(1).square().sum(1).mean()


@LOSSES.register
def semantic_relative_l2(
    student: Float[Tensor, "n h w"], teacher: Float[Tensor, "n h w"]
) -> Float[Tensor, ""]:
    r"""Squared L2 distance between relevance maps, in shares of the teacher's.

    .. math:: L = \frac{\sum_i \|t_i - s_i\|_2^2}{\sum_i \|t_i\|_2^2}

    Unlike a cosine it sees the sign and the size of the relevance, and unlike ``semantic_l2`` it
    has no unit: a weight carries over between models, layers and methods.

    Under several processes the sum below the line is that of one process's part of the batch.

    Args:
        student: maps that carry gradient.
        teacher: maps of the same shape, treated as constant.

    Returns:
        Scalar >= 0; 1 for a student whose maps are zero. Where all maps of the teacher are zero
        there is nothing to compare with: it is 1 and passes no gradient.

    Raises:
        ValueError: if the shapes differ or are not (n, h, w) with n >= 1.

    Example:
        >>> m = torch.eye(2)[None]
        >>> semantic_relative_l2(m, 2 * m).item()
        0.25
        >>> semantic_relative_l2(-m, m).item()
        4.0

    Reference:
        Ours: [T], eq. 2.19, over its value for a student without relevance.
    """
    _check_same_maps("semantic_relative_l2", student, teacher)
    teacher = teacher.detach()
    largest = teacher.abs().amax()  # before squaring: squares of 1e-20 vanish in float32
    is_zero = largest < torch.finfo(teacher.dtype).tiny
    scale = torch.where(is_zero, 1, largest)
    error = (student / scale - teacher / scale).square().sum()
    energy = torch.where(is_zero, 1, (teacher / scale).square().sum())
    return torch.where(is_zero, 1 + (student * 0).sum(), error / energy)


@LOSSES.register
def correlation_l2(
    student: Float[Tensor, "n h w"], teacher: Float[Tensor, "n height width"]
) -> Float[Tensor, ""]:
    r"""Frobenius distance between the sample-by-sample correlation matrices of two sets of maps.

    .. math:: M = \frac{G G^\top}{\|G G^\top\|_F}, \qquad L = \|M_T - M_S\|_F

    with :math:`G` the maps as an (n, h·w) matrix.

    Under several processes the samples are those of one process, not the gathered batch.

    Args:
        student: signed maps that carry gradient.
        teacher: signed maps of the same samples, treated as constant; h and w may differ, since
            only the n × n matrices are compared.

    Returns:
        Scalar in [0, sqrt(2)].

    Raises:
        ValueError: if these are not maps (n, h, w) of the same n >= 2 samples (the matrix of one
            sample is 1 whatever the map).

    Example:
        >>> same, apart = torch.ones(2, 1, 1), torch.eye(2)[:, None]
        >>> correlation_l2(same, 2 * same).item()
        0.0
        >>> round(correlation_l2(same, apart).item(), 4)
        0.7654

    Reference:
        [T], eq. 2.7-2.9, after DisWOT (Dong et al., CVPR 2023), there with Grad-CAM maps.
        Deviation: none.
    """
    _check_same_batch("correlation_l2", MAPS, student, teacher)
    return _l2_distance(_batch_matrix(student), _batch_matrix(teacher.detach()))


@LOSSES.register
def correlation_cosine(
    student: Float[Tensor, "n h w"], teacher: Float[Tensor, "n height width"]
) -> Float[Tensor, ""]:
    r"""Cosine distance between the correlation matrices of :func:`correlation_l2`.

    .. math:: L = 1 - \frac{\langle M_T, M_S \rangle}{\|M_T\| \|M_S\|}

    Under several processes the samples are those of one process, not the gathered batch.

    Args:
        student: signed maps that carry gradient.
        teacher: signed maps of the same samples, treated as constant; h and w may differ.

    Returns:
        Scalar in [0, 1]: half the square of :func:`correlation_l2`, and 1 where all maps of a
        side are zero.

    Raises:
        ValueError: if these are not maps (n, h, w) of the same n >= 2 samples.

    Example:
        >>> same, apart = torch.ones(2, 1, 1), torch.eye(2)[:, None]
        >>> round(correlation_cosine(same, apart).item(), 4)
        0.2929

    Reference:
        Ours: the matrices of [T], eq. 2.7-2.8, under the cosine of eq. 2.23-2.27.
    """
    _check_same_batch("correlation_cosine", MAPS, student, teacher)
    return _cosine_distance(_batch_matrix(student), _batch_matrix(teacher.detach())).mean()


@LOSSES.register
def relation_l2(
    student: Float[Tensor, "n c h w"], teacher: Float[Tensor, "n channels height width"]
) -> Float[Tensor, ""]:
    r"""Frobenius distance between the sample-by-sample relation matrices of two sets of features.

    .. math:: R = \frac{A A^\top}{\|A A^\top\|_F}, \qquad L = \|R_T - R_S\|_F

    with :math:`A` the features as an (n, c·h·w) matrix.

    Under several processes the samples are those of one process, not the gathered batch.

    Args:
        student: features that carry gradient.
        teacher: features of the same samples, treated as constant; channels, h and w may differ.

    Returns:
        Scalar in [0, sqrt(2)].

    Raises:
        ValueError: if these are not features (n, c, h, w) of the same n >= 2 samples.

    Example:
        >>> features = torch.rand(3, 8, 4, 4)
        >>> relation_l2(features, features).item()
        0.0

    Reference:
        [T], eq. 2.10-2.12, after DisWOT (Dong et al., CVPR 2023). Deviation: none.
    """
    _check_same_batch("relation_l2", FEATURES, student, teacher)
    return _l2_distance(_batch_matrix(student), _batch_matrix(teacher.detach()))


@LOSSES.register
def relation_cosine(
    student: Float[Tensor, "n c h w"], teacher: Float[Tensor, "n channels height width"]
) -> Float[Tensor, ""]:
    r"""Cosine distance between the relation matrices of :func:`relation_l2`.

    .. math:: L = 1 - \frac{\langle M_T, M_S \rangle}{\|M_T\| \|M_S\|}

    Under several processes the samples are those of one process, not the gathered batch.

    Args:
        student: features that carry gradient.
        teacher: features of the same samples, treated as constant; channels, h and w may differ.

    Returns:
        Scalar in [0, 1]: half the square of :func:`relation_l2`, and 1 where all features of a
        side are zero.

    Raises:
        ValueError: if these are not features (n, c, h, w) of the same n >= 2 samples.

    Example:
        >>> features = torch.rand(3, 8, 4, 4)
        >>> relation_cosine(features, features).item()
        0.0

    Reference:
        [T], eq. 2.23-2.27. Deviation: none.
    """
    _check_same_batch("relation_cosine", FEATURES, student, teacher)
    return _cosine_distance(_batch_matrix(student), _batch_matrix(teacher.detach())).mean()


def zero_maps(maps: Float[Tensor, "n h w"]) -> Bool[Tensor, " n"]:
    """Which maps are zero everywhere, and so have no direction to compare.

    Args:
        maps: relevance maps.

    Returns:
        One boolean per map, on the device of the maps.

    Raises:
        ValueError: if ``maps`` is not (n, h, w).

    Example:
        >>> zero_maps(torch.stack([torch.eye(2), torch.zeros(2, 2)])).tolist()
        [False, True]
    """
    check_axes("zero_maps", MAPS, 0, maps)
    return _is_zero(maps.detach().flatten(1)).squeeze(1)


def resize_maps(
    maps: Float[Tensor, "n h w"], size: tuple[int, int]
) -> Float[Tensor, "n height width"]:
    """Maps brought to ``size`` = (height, width): the one way here to make two sizes equal.

    Bilinear interpolation; where an axis shrinks, the kernel is widened with it (antialiasing),
    so that every pixel's relevance counts. Differentiable, keeps the sign and constant maps;
    the total changes, which matters to ``semantic_l2`` but not to a cosine. Resize the teacher's
    maps to the student's size: that side is constant.

    Args:
        maps: relevance maps.
        size: height and width wanted, in pixels.

    Returns:
        Maps of shape (n, height, width); ``maps`` itself where the size fits already.

    Raises:
        ValueError: if ``maps`` is not (n, h, w) or ``size`` is not two positive numbers.

    Example:
        >>> resize_maps(torch.ones(1, 4, 4), (2, 2)).tolist()
        [[[1.0, 1.0], [1.0, 1.0]]]
    """
    check_axes("resize_maps", MAPS, 0, maps)
    if len(size) != 2 or min(size) < 1:
        fix = "Give the student's map size, student.shape[-2:]."
        raise ValueError(message("resize_maps", "a size of two positive numbers", size, fix))
    if maps.shape[1:] == tuple(size):
        return maps
    return functional.interpolate(
        maps[:, None], size=tuple(size), mode="bilinear", align_corners=False, antialias=True
    )[:, 0]


def _is_zero(rows: Float[Tensor, "m d"]) -> Bool[Tensor, "m 1"]:
    # Below the smallest normal number the inverse overflows, so there is no direction to speak of.
    return rows.abs().amax(1, keepdim=True) < torch.finfo(rows.dtype).tiny


def unit_rows(rows: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
    """Rows of length 1 at any scale; zero rows stay zero and pass no gradient."""
    zero = _is_zero(rows.detach())
    # Squares of 1e-20 vanish in float32. Dividing by the largest entry first prevents it; that
    # entry is detached, since the direction, and so its derivative, does not depend on it.
    largest = rows.detach().abs().amax(1, keepdim=True)
    scaled = rows / torch.where(zero, 1, largest)
    squares = torch.where(zero, 1, scaled.square().sum(1, keepdim=True))
    return torch.where(zero, 0, scaled / squares.sqrt())


def _batch_matrix(samples: Float[Tensor, "n ..."]) -> Float[Tensor, "1 n*n"]:
    """The n × n matrix of scalar products between samples, over its Frobenius norm, as one row."""
    rows = samples.flatten(1)
    largest = rows.detach().abs().amax()  # one for all: the samples' relative sizes count here
    rows = rows / torch.where(largest < torch.finfo(rows.dtype).tiny, 1, largest)
    return unit_rows((rows @ rows.mT).flatten()[None])


def _l2_distance(one: Float[Tensor, "1 d"], other: Float[Tensor, "1 d"]) -> Float[Tensor, ""]:
    return torch.linalg.vector_norm(one - other)  # its gradient at 0 is 0


def _cosine_distance(one: Float[Tensor, "m d"], other: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
    """1 - cosine of rows that are unit or zero."""
    # |a - b|² / 2 = 1 - <a, b> for unit vectors, but exact, and never negative, where they agree.
    distance = (one - other).square().sum(1) / 2
    return torch.where(one.any(1) & other.any(1), distance, 1)


def _check_same_maps(where: str, student: Tensor, teacher: Tensor) -> None:
    check_same_shape(where, "Use losses.resize_maps.", student=student, teacher=teacher)
    check_axes(where, MAPS, 1, student, teacher)


def _check_same_batch(where: str, expected: str, student: Tensor, teacher: Tensor) -> None:
    check_axes(where, expected, 2, student, teacher)
    if len(student) != len(teacher):
        shapes = {"student": tuple(student.shape), "teacher": tuple(teacher.shape)}
        fix = "Give both models the same images."
        raise ValueError(message(where, "one number of samples n", shapes, fix))
