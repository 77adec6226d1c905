"""A split of the same images in which nothing leaks."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from kd_lrp_plugin.data.leakage.duplicates import KINDS, Duplicates
from kd_lrp_plugin.data.leakage.images import Fingerprint, ImageFile
from kd_lrp_plugin.data.splits import held_out

COLUMNS = ("file_a", "file_b", "kind", "similarity", "mirrored", "cross_split")


class DatasetAudit(NamedTuple):
    """n images with what is known of them, all in one order.

    Attributes:
        images: the files.
        prints: their fingerprints.
        splits: names, lowest rank first; [""] if there are none yet.
        ranks: rank of each image's split.
        duplicates: pairs of them.
        sets: number of each image's set of duplicates.
        groups: number of each image's group.
        patients: by file, as far as given.
    """

    images: Sequence[ImageFile]
    prints: Sequence[Fingerprint]
    splits: Sequence[str]
    ranks: Int[np.ndarray, " n"]
    duplicates: Duplicates
    sets: Int[np.ndarray, " n"]
    groups: Int[np.ndarray, " n"]
    patients: Mapping[str, str]

    @property
    def across(self) -> Bool[np.ndarray, " pairs"]:
        """Whether the two of a pair lie in different splits."""
        return self.ranks[self.duplicates.a] != self.ranks[self.duplicates.b]


def group_images(
    images: Sequence[ImageFile],
    prints: Sequence[Fingerprint],
    duplicates: Duplicates,
    patients: Mapping[str, str],
) -> DatasetAudit:
    """Rank the splits, and join duplicates to sets and sets to groups."""
    n, sizes = len(images), Counter(image.split for image in images)
    named = [split for split in sizes if split.lower().startswith("train")]
    training = named or [max(sorted(sizes), key=lambda split: sizes[split])]

    def rank(split: str) -> tuple[int, str]:
        return (0 if split in training else 1 if split.lower().startswith("val") else 2, split)

    splits = sorted(sizes, key=rank)
    members = defaultdict(list)
    for index, image in enumerate(images):
        if image.file in patients:
            members[patients[image.file]].append(index)
    chains = [(a, b) for indices in members.values() for a, b in pairwise(indices)]
    a, b = np.array(chains, int).reshape(-1, 2).T
    sets = _components(n, duplicates.a, duplicates.b)
    linked = np.concatenate([duplicates.a, a]), np.concatenate([duplicates.b, b])
    groups = _components(n, *linked)
    ranks = np.array([splits.index(image.split) for image in images])
    return DatasetAudit(images, prints, splits, ranks, duplicates, sets, groups, patients)


def _components(n: int, a: Any, b: Any) -> Int[np.ndarray, " n"]:
    return connected_components(coo_array((np.ones(len(a), bool), (a, b)), (n, n)), False)[1]


def clean_split(audit: DatasetAudit, test_share: float) -> list[dict[str, Any]]:
    """The rows of clean_split.csv by the rules above, one per image, in the order of the images.

    ``split`` is the given one, or the proposed; ``group`` numbers the groups; ``kept`` is 1 or 0,
    and ``why`` says why not.
    """
    images, prints, ranks = audit.images, audit.prints, audit.ranks
    why = [f"unreadable: {one.unreadable}" if one.unreadable else "" for one in prints]
    for members in list_members(audit.sets):
        votes = Counter(images[i].label for i in members).most_common()
        tie = votes[1:] and votes[0][1] == votes[1][1]
        for i in members:
            if tie or images[i].label != votes[0][0]:
                why[i] = f"class in doubt: its duplicates are of {', '.join(sorted(dict(votes)))}"
    for members in list_members(audit.groups):
        alive = [i for i in members if not why[i]]
        for i in alive:
            if ranks[i] < (top := max(ranks[alive])):
                why[i] = f"group: it reaches {audit.splits[top]}"
    for members in list_members(audit.sets):
        alive = [i for i in members if not why[i]]
        alive.sort(key=lambda i: (-prints[i].size[0] * prints[i].size[1], images[i].file))
        for i in alive[1:]:
            why[i] = f"duplicate: {images[alive[0]].file} is kept"
    splits = [image.split for image in images]
    if audit.splits == [""]:
        kept: dict[str, list[str]] = defaultdict(list)
        for image, reason in zip(images, why, strict=True):
            if not reason:
                kept[image.label].append(image.file)
        group = {image.file: g for image, g in zip(images, audit.groups.tolist(), strict=True)}
        test = {group[file] for file in held_out(kept, group, test_share)}
        splits = ["Testing" if group[image.file] in test else "Training" for image in images]
    return [
        {
            "file": image.file,
            "split": split,
            "class": image.label,
            "group": number,
            "kept": int(not reason),
            "why": reason,
        }
        for image, split, number, reason in zip(
            images, splits, audit.groups.tolist(), why, strict=True
        )
    ]


def list_members(numbers: Int[np.ndarray, " n"]) -> Iterable[list[int]]:
    """The indices that have the same number, where there are several."""
    order = np.argsort(numbers, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)
    return (part.tolist() for part in parts if len(part) > 1)


def describe_pair(audit: DatasetAudit, k: int) -> dict[str, Any]:
    """The row of pairs.csv of the k-th pair, by :data:`COLUMNS`."""
    a, b, kind, similarity, mirrored = (part[k] for part in audit.duplicates)
    files = (audit.images[a].file, audit.images[b].file)
    cross = int(audit.ranks[a] != audit.ranks[b])
    values = (*files, KINDS[kind], f"{similarity:.5f}", int(mirrored), cross)
    return dict(zip(COLUMNS, values, strict=True))
