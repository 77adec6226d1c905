"""Duplicates and near-duplicates among fingerprints."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from kd_lrp_plugin.data.leakage.images import SIDE, Fingerprint
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message

ALIKE = 0.98
ALIKE_BY_HASH, BITS = 0.95, 2
KINDS = ("exact", "thumbnail", "hash")
MANY = 2_000_000  # pairs; beyond it images are alike by their making, not by copying
_BLOCK = 1024  # images compared at once: 2 × 13 MB of thumbnails, 4 MB of correlations


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
    for top, left in current_progress().track(blocks, "comparing", len(blocks)):
        rows, columns = (_normal(thumbnails[k : k + _BLOCK]) for k in (top, left))
        for mirrored in (False, True):
            if mirrored:
                columns = _normal(thumbnails[left : left + _BLOCK, :, ::-1])
            found = rows @ columns.T
            a, b = np.nonzero(found >= ALIKE_BY_HASH)
            similarity = found[a, b].clip(max=1)
            a, b = a + top, b + left
            near = (similarity >= ALIKE) | (_bits(hashes, a, b, mirrored) <= BITS)
            keep = near & (a < b) & (codes[a] != codes[b])
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


def _normal(thumbnails: UInt8[np.ndarray, "n h w"]) -> Float[np.ndarray, "n hw"]:
    """Vectors whose scalar products are correlations; zero where there is hardly any contrast."""
    values = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
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
