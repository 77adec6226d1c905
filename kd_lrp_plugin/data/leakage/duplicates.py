r"""Duplicates and near-duplicates among fingerprints.

Two thumbnails of unit norm and mean zero, x and y, are compared by P x and P y first, their 255
coefficients of lowest frequency of the cosine transform, whose rows are orthonormal. Of what is
left out no more is known than its norm, and by Cauchy and Schwarz

.. math:: \langle x, y \rangle \le \langle Px, Py \rangle
    + \sqrt{1 - \|Px\|^2} \sqrt{1 - \|Py\|^2}.

Pairs for which the right side is below the limit are passed over; all others are compared in full.
So no pair is missed, and most cost a twelfth. Where thumbnails have most of their contrast in the
finest detail, as noise has, hardly a pair is passed over, and the full price is paid.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy.fft import dct

from kd_lrp_plugin.data.leakage.images import SIDE, Fingerprint
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message

ALIKE = 0.98
ALIKE_BY_HASH, BITS = 0.95, 2
KINDS = ("exact", "thumbnail", "hash")
MANY = 2_000_000  # pairs; beyond it images are alike by their making, not by copying
_BLOCK = 1024  # images compared at once: 4 MB of bounds, and up to 2 × 13 MB of thumbnails
_KEPT = 16  # frequencies along each side
_ROUNDING = 1e-4  # far above that of sums of 256 products, far below what tells images apart
_DENSE = 32  # a matrix product takes so much less time for a pair than a product of its own


class Duplicates(NamedTuple):
    """Pairs of images by index, a < b, each once, in the order of a and b.

    Attributes:
        a: index of one.
        b: index of the other.
        kind: index in KINDS.
        similarity: correlation of the thumbnails; 1 for the same pixels.
        mirrored: whether one is the mirror image of the other.
    """

    a: Int[np.ndarray, " pairs"]
    b: Int[np.ndarray, " pairs"]
    kind: Int[np.ndarray, " pairs"]
    similarity: Float[np.ndarray, " pairs"]
    mirrored: Bool[np.ndarray, " pairs"]


def find_duplicates(prints: Sequence[Fingerprint]) -> Duplicates:
    """All pairs of duplicates and near-duplicates.

    Unreadable images have none, those of one even colour only such with the same pixels.

    Raises:
        ValueError: if there are more than two million with the same pixels, or that look alike.
    """
    n = len(prints)
    thumbnails = np.frombuffer(b"".join(p.thumbnail for p in prints), np.uint8)
    thumbnails = thumbnails.reshape(n, SIDE, SIDE)
    hashes = np.array([list(bytes.fromhex(p.hashes)) for p in prints], np.uint8).reshape(n, 2, 8)
    copies = defaultdict(list)
    for index, one in enumerate(prints):
        if one.digest:
            copies[one.digest].append(index)
    _check_amount(sum(len(same) * (len(same) - 1) // 2 for same in copies.values()), n)
    parts = []
    for same in copies.values():
        a, b = np.array(same)[np.array(np.triu_indices(len(same), 1))]
        parts.append(Duplicates(a, b, 0 * a, np.ones(len(a), np.float32), np.zeros(len(a), bool)))
    exact, codes = len(parts), np.unique([p.digest for p in prints], return_inverse=True)[1]
    blocks = [(top, left) for top in range(0, n, _BLOCK) for left in range(top, n, _BLOCK)]
    spectra = _project(thumbnails)
    for top, left in current_progress().track(blocks, "comparing", len(blocks)):
        rows = spectra[top : top + _BLOCK]
        for mirrored in (False, True):
            columns = spectra[left : left + _BLOCK] * (_MIRROR if mirrored else 1)
            near = np.flatnonzero(rows @ columns.T >= ALIKE_BY_HASH - _ROUNDING)
            a, b = near // len(columns) + top, near % len(columns) + left
            keep = (a < b) & (codes[a] != codes[b])
            a, b = a[keep], b[keep]
            similarity = _correlate(thumbnails, a, b, mirrored).clip(max=1)
            bits = _bits(hashes, a, b, mirrored)
            keep = (similarity >= ALIKE) | ((similarity >= ALIKE_BY_HASH) & (bits <= BITS))
            a, b, similarity = a[keep], b[keep], similarity[keep]
            kind = np.where(similarity >= ALIKE, 1, 2)
            parts.append(Duplicates(a, b, kind, similarity, np.full(len(a), mirrored)))
        _check_amount(sum(len(part.a) for part in parts[exact:]), n)
    pairs = Duplicates(*map(np.concatenate, zip(*parts, strict=True)))
    order = np.lexsort((pairs.mirrored, -pairs.similarity, pairs.kind > 0, pairs.b, pairs.a))
    pairs = Duplicates(*(part[order] for part in pairs))
    first = np.ones(len(order), bool)
    first[1:] = (pairs.a[1:] != pairs.a[:-1]) | (pairs.b[1:] != pairs.b[:-1])
    return Duplicates(*(part[first] for part in pairs))


_COSINES = dct(np.eye(SIDE), axis=0, norm="ortho")[:_KEPT].astype(np.float32)
# Mirrored left to right, coefficients of odd frequency change their sign; the last is the norm.
_MIRROR = np.append(np.tile([1, -1], _KEPT * _KEPT // 2), 1).astype(np.float32)


def _project(thumbnails: UInt8[np.ndarray, "n h w"]) -> Float[np.ndarray, "n k"]:
    """Coefficients of low frequency and the norm of the others; scalar products are bounds."""
    found = np.empty((len(thumbnails), _KEPT * _KEPT + 1), np.float32)
    for start in range(0, len(thumbnails), _BLOCK):
        part = slice(start, start + _BLOCK)
        values = _normal(thumbnails[part])
        low = _COSINES @ values.reshape(-1, SIDE, SIDE) @ _COSINES.T
        found[part, :-1] = low.reshape(len(low), -1)
        rest = (values**2).sum(1) - (found[part, :-1] ** 2).sum(1)
        found[part, -1] = np.sqrt(rest.clip(min=0))
    return found


def _correlate(
    thumbnails: UInt8[np.ndarray, "n h w"],
    a: Int[np.ndarray, " pairs"],
    b: Int[np.ndarray, " pairs"],
    mirrored: bool,
) -> Float[np.ndarray, " pairs"]:
    """Correlations of the pairs' thumbnails, of the second ones mirrored where that is asked."""
    turn = slice(None, None, -1 if mirrored else None)
    rows, row = np.unique(a, return_inverse=True)
    columns, column = np.unique(b, return_inverse=True)
    if _DENSE * len(a) >= len(rows) * len(columns):
        products = _normal(thumbnails[rows]) @ _normal(thumbnails[columns][:, :, turn]).T
        return products[row, column]
    found = np.empty(len(a), np.float32)
    for start in range(0, len(a), _BLOCK):
        part = slice(start, start + _BLOCK)
        first, second = _normal(thumbnails[a[part]]), _normal(thumbnails[b[part]][:, :, turn])
        found[part] = np.einsum("np,np->n", first, second)
    return found


def _normal(thumbnails: UInt8[np.ndarray, "n h w"]) -> Float[np.ndarray, "n hw"]:
    """Vectors whose scalar products are correlations; zero where there is hardly any contrast."""
    values = thumbnails.reshape(-1, SIDE * SIDE).astype(np.float32)
    values -= values.mean(1, keepdims=True)
    contrast = np.linalg.norm(values, axis=1, keepdims=True)
    return np.where(contrast >= SIDE, values / contrast.clip(min=1), 0)  # a standard deviation of 1


def _bits(
    hashes: UInt8[np.ndarray, "n 2 8"], a: Any, b: Any, mirrored: bool
) -> Int[np.ndarray, " pairs"]:
    """Bits in which hashes differ; of the two ways to mirror one of a pair, the smaller number."""
    ways = [(0, 1), (1, 0)] if mirrored else [(0, 0)]
    counts = [np.unpackbits(hashes[a, i] ^ hashes[b, j], axis=1).sum(1) for i, j in ways]
    return np.min(counts, axis=0)


def _check_amount(count: int, images: int) -> None:
    if count > MANY:
        got = f"more than {MANY:,} pairs that look the same among {images:,}"
        fix = "Thumbnails cannot tell these apart; take out images of one even colour, if any."
        raise ValueError(message("check-data", "images that differ", got, fix))
