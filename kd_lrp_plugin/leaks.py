"""What leaks from training into the test set, and a split of the same images that does not.

:mod:`kd_lrp_plugin.fingerprints` says what twins are. Splits are ranked: training (names that begin
with ``train``, or else the largest split), then validation (``val``), then all others. The clean
split comes of four rules:

1. Twins, twins of twins and so on are one set. A group is one set, or, with a column of patients,
   all sets that patients join.
2. In a set of several classes, only images of its most frequent class may be kept; none, if there
   is no such class.
3. Of a group, only what lies in the highest split that it reaches may be kept: a test set stays
   nearly as it was published, and training loses what it shares with it.
4. Of what is left of a set, one image is kept: the one with most pixels, or the first by name.

Where the images are in no splits yet, test images are cut out of what is kept by
:func:`kd_lrp_plugin.splits.held_out`, never through a group.
"""

import csv
import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from matplotlib.figure import Figure
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from kd_lrp_plugin.checks import message
from kd_lrp_plugin.fingerprints import (
    KINDS,
    VERSION,
    Fingerprint,
    Listed,
    Twins,
    by_class,
    claimed,
    describe,
    find_twins,
    fingerprints,
    list_images,
)
from kd_lrp_plugin.progress import Silence
from kd_lrp_plugin.runs import RunFolder
from kd_lrp_plugin.splits import held_out, read_groups
from kd_lrp_plugin.verdict import verdict

COLUMNS = ("file_a", "file_b", "kind", "similarity", "mirrored", "cross_split")
SPLIT_COLUMNS = ("file", "split", "class", "group", "kept", "why")
OUTPUTS = ("summary.json", "pairs.csv", "clean_split.csv", "pairs.png")
_SHOWN = 12  # pairs in the picture


class Checked(NamedTuple):
    """n images with what is known of them, all in one order.

    Attributes:
        images: the files.
        prints: their fingerprints.
        splits: names, lowest rank first; [""] if there are none yet.
        ranks: rank of each image's split.
        twins: pairs of them.
        sets: number of each image's set of twins.
        groups: number of each image's group.
        patients: by file, as far as given.
    """

    images: Sequence[Listed]
    prints: Sequence[Fingerprint]
    splits: Sequence[str]
    ranks: Int[np.ndarray, " n"]
    twins: Twins
    sets: Int[np.ndarray, " n"]
    groups: Int[np.ndarray, " n"]
    patients: Mapping[str, str]

    @property
    def across(self) -> Bool[np.ndarray, " pairs"]:
        """Whether the two of a pair lie in different splits."""
        return self.ranks[self.twins.a] != self.ranks[self.twins.b]


def check_data(
    root: str | Path,
    out: str | Path,
    test_share: float = 0.2,
    group_by: str | None = None,
    manifest: str | Path | None = None,
    show: Silence | None = None,
) -> dict[str, Any]:
    """Look for twins and faulty files in ``root``; write summary, pairs and clean split to ``out``.

    Nothing in ``root`` is changed. Fingerprints stay in ``out``: the same call goes on after a
    kill, later reads only what is new, and where nothing is, gives the answer that is there.

    Args:
        root: images in ``<root>/<split>/<class>/`` or ``<root>/<class>/``; ``<root>/masks`` is left
            out.
        out: folder outside of ``root``.
        test_share: of the images to propose as test set, in (0, 1), where there are no splits.
        group_by: column of ``manifest`` whose groups, such as patients, must not be divided.
        manifest: CSV as :func:`kd_lrp_plugin.splits.read_groups` takes it; default
            ``<root>/manifest.csv``.
        show: told how far it is.

    Returns:
        The content of summary.json.

    Raises:
        FileNotFoundError: if there are no images, or no manifest.
        FileExistsError: if ``out`` holds something else.
        BlockingIOError: if another process is at work in it.
        ValueError: for a share outside (0, 1), ``out`` inside ``root``, a manifest that names none
            of the images, or a set in which nearly all images are alike.
        OSError: if something cannot be written.
    """
    root, out, show = Path(root).expanduser(), Path(out).expanduser(), show or Silence()
    if not 0 < test_share < 1:
        raise ValueError(message("check-data", "test_share in (0, 1)", test_share, "Use 0.2."))
    if out.resolve().is_relative_to(root.resolve()):
        fix = "Its pictures would be taken for images of the set."
        raise ValueError(message("check-data: out", f"a folder outside {root}", out, fix))
    images, aside = list_images(root)
    table = Path(manifest).expanduser() if manifest else root / "manifest.csv"
    patients = _patients(images, table, group_by) if group_by else {}
    question = {
        "root": str(root.resolve()),
        "test_share": None if images[0].split else test_share,
        "group_by": group_by,
        "manifest": str(table.resolve()) if group_by else None,
    }
    folder = RunFolder(out)
    with claimed(out, question, OUTPUTS) as cache:
        prints = fingerprints(root, images, cache, show)
        state = _state(images, prints, aside, patients)
        if before := _answered(out, state):
            return before
        checked = put_together(images, prints, find_twins(prints, show), patients)
        rows = clean_split(checked, test_share)
        summary = {"question": question, "state": state, **describe(images, prints, aside)}
        summary |= _findings(checked, rows)
        summary["verdict"] = verdict(summary)
        order = _worst_first(checked)
        text = _csv(SPLIT_COLUMNS, rows)
        split = out / "clean_split.csv"
        if split.exists() and split.read_text(encoding="utf-8") != text:
            show.note(f"{split} changes, since the images have changed")
        for stale in ("summary.json", "pairs.png"):  # until the summary is written, nothing is said
            (out / stale).unlink(missing_ok=True)
        folder.write("clean_split.csv", text)
        folder.write("pairs.csv", _csv(COLUMNS, (_pair(checked, k) for k in order)))
        if len(order):
            figure = pairs_figure(root, checked, order)
            folder.put("pairs.png", lambda draft: figure.savefig(draft, format="png"))
        folder.write("summary.json", json.dumps(summary, indent=2, ensure_ascii=False))
    return summary


def _state(
    images: Sequence[Listed],
    prints: Sequence[Fingerprint],
    aside: Mapping[str, str],
    patients: Mapping[str, str],
) -> str:
    """A digest of all that the answer depends on beside the question."""
    facts = json.dumps([images, [one[:-1] for one in prints], aside, patients, VERSION])
    return hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()


def _answered(out: Path, state: str) -> dict[str, Any] | None:
    """The summary in ``out``, if it is of this state and all that goes with it is there."""
    missing = {name for name in OUTPUTS if not (out / name).is_file()}
    if missing - {"pairs.png"}:
        return None
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    whole = not missing or not summary["images_with_twin"]
    return summary if whole and summary["state"] == state else None


def _patients(images: Sequence[Listed], table: Path, column: str) -> dict[str, str]:
    where = f"check-data: manifest {table}"
    fix = "A row names an image by file (its path, or its name), or by file, split and class."
    if not table.is_file():
        raise FileNotFoundError(message(where, "a CSV file", "none", "Give it by --manifest."))
    named = read_groups(table, [image.file for image in images], column)
    if not named:
        expected = f"columns file and {column}, that name some of the {len(images)} images"
        raise ValueError(message(where, expected, "none of them", fix))
    return named


# --- the clean split ----------------------------------------------------------------------------


def put_together(
    images: Sequence[Listed],
    prints: Sequence[Fingerprint],
    twins: Twins,
    patients: Mapping[str, str],
) -> Checked:
    """Rank the splits, and join twins to sets and sets to groups."""
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
    sets = _components(n, twins.a, twins.b)
    groups = _components(n, np.concatenate([twins.a, a]), np.concatenate([twins.b, b]))
    ranks = np.array([splits.index(image.split) for image in images])
    return Checked(images, prints, splits, ranks, twins, sets, groups, patients)


def _components(n: int, a: Any, b: Any) -> Int[np.ndarray, " n"]:
    return connected_components(coo_array((np.ones(len(a), bool), (a, b)), (n, n)), False)[1]


def clean_split(checked: Checked, test_share: float) -> list[dict[str, Any]]:
    """The rows of clean_split.csv by the rules above, one per image, in the order of the images.

    ``split`` is the given one, or the proposed; ``group`` numbers the groups; ``kept`` is 1 or 0,
    and ``why`` says why not.
    """
    images, prints, ranks = checked.images, checked.prints, checked.ranks
    why = [f"unreadable: {one.unreadable}" if one.unreadable else "" for one in prints]
    for members in _members(checked.sets):
        votes = Counter(images[i].label for i in members).most_common()
        tie = votes[1:] and votes[0][1] == votes[1][1]
        for i in members:
            if tie or images[i].label != votes[0][0]:
                why[i] = f"class in doubt: its twins are of {', '.join(sorted(dict(votes)))}"
    for members in _members(checked.groups):
        alive = [i for i in members if not why[i]]
        for i in alive:
            if ranks[i] < (top := max(ranks[alive])):
                why[i] = f"group: it reaches {checked.splits[top]}"
    for members in _members(checked.sets):
        alive = [i for i in members if not why[i]]
        alive.sort(key=lambda i: (-prints[i].size[0] * prints[i].size[1], images[i].file))
        for i in alive[1:]:
            why[i] = f"twin: {images[alive[0]].file} is kept"
    splits = [image.split for image in images]
    if checked.splits == [""]:
        kept: dict[str, list[str]] = defaultdict(list)
        for image, reason in zip(images, why, strict=True):
            if not reason:
                kept[image.label].append(image.file)
        group = {image.file: g for image, g in zip(images, checked.groups.tolist(), strict=True)}
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
            images, splits, checked.groups.tolist(), why, strict=True
        )
    ]


def _members(numbers: Int[np.ndarray, " n"]) -> Iterable[list[int]]:
    """The indices that have the same number, where there are several."""
    order = np.argsort(numbers, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)
    return (part.tolist() for part in parts if len(part) > 1)


# --- findings -----------------------------------------------------------------------------------


def _findings(checked: Checked, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    twins, ranks, across = checked.twins, checked.ranks, checked.across
    labels = np.array([image.label for image in checked.images])
    higher = np.where(ranks[twins.a] > ranks[twins.b], twins.a, twins.b)
    lowest = np.full(checked.sets.max() + 1, len(ranks))
    np.minimum.at(lowest, checked.sets, ranks)
    shares = {
        "twin": np.unique(higher[across]),
        "exact": np.unique(higher[across & (twins.kind == 0)]),
        "near": np.unique(higher[across & (twins.kind > 0)]),
        "set": np.flatnonzero(lowest[checked.sets] < ranks),
    }
    leaks = {}
    for rank, split in list(enumerate(checked.splits))[1:]:
        counts = {name: int((ranks[found] == rank).sum()) for name, found in shares.items()}
        leaking = labels[shares["twin"]][ranks[shares["twin"]] == rank]
        leaks[split] = {
            "images": int((ranks == rank).sum()),
            "against": list(checked.splits[:rank]),
            **counts,
            "twin_by_class": dict(sorted(Counter(leaking.tolist()).items())),
        }
    partners = np.bincount(np.concatenate([twins.a, twins.b]), minlength=len(ranks))
    homes = defaultdict(set)
    for image in checked.images:
        if image.file in checked.patients:
            homes[checked.patients[image.file]].add(image.split)
    kept = [row for row in rows if row["kept"]]
    reasons = Counter(row["why"].split(":")[0] for row in rows if row["why"])
    return {
        "pairs": {
            place: {kind: int((chosen & (twins.kind == k)).sum()) for k, kind in enumerate(KINDS)}
            for place, chosen in (("within", ~across), ("across", across))
        },
        "mirrored_pairs": int(twins.mirrored.sum()),
        "pairs_of_two_classes": int((labels[twins.a] != labels[twins.b]).sum()),
        "images_with_twin": int((partners > 0).sum()),
        "leaks": leaks,
        "twins_apart_at_random": float(np.mean(1 - 0.2**partners)),
        "groups": {
            "given": len(homes),
            "divided": sum(len(home) > 1 for home in homes.values()),
            "images_without": len(ranks) - len(checked.patients) if homes else 0,
        },
        "clean": by_class((row["split"], row["class"]) for row in kept),
        "left_out": dict(reasons),
    }


# --- writing ------------------------------------------------------------------------------------


def _worst_first(checked: Checked) -> Int[np.ndarray, " pairs"]:
    """The pairs: across splits before within, and the most alike first."""
    twins = checked.twins
    return np.lexsort((twins.b, twins.a, twins.kind, -twins.similarity, ~checked.across))


def _pair(checked: Checked, k: int) -> dict[str, Any]:
    a, b, kind, similarity, mirrored = (part[k] for part in checked.twins)
    files = (checked.images[a].file, checked.images[b].file)
    cross = int(checked.across[k])
    values = (*files, KINDS[kind], f"{similarity:.5f}", int(mirrored), cross)
    return dict(zip(COLUMNS, values, strict=True))


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def pairs_figure(root: Path, checked: Checked, order: Int[np.ndarray, " pairs"]) -> Figure:
    """Up to twelve pairs side by side: across splits, if there are any.

    First up to four exact ones, then others, spread evenly from the most to the least alike.
    """
    across = checked.across[order]
    chosen = order[across] if across.any() else order
    exact = chosen[checked.twins.kind[chosen] == 0]
    near = chosen[checked.twins.kind[chosen] > 0]
    exact = exact[: max(4, _SHOWN - len(near))]
    room = min(len(near), _SHOWN - len(exact))
    picked = [*exact, *near[np.linspace(0, len(near) - 1, room).astype(int)]]
    rows, across_page = -(-len(picked) // 3), min(3, len(picked))
    figure = Figure(figsize=(4 * across_page, 2.75 * rows + 0.4), dpi=100, layout="constrained")
    widths = [1, 1, 0.12] * across_page
    axes = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    for ax in axes.flat:
        ax.set_axis_off()
    for number, k in enumerate(picked):
        pair = _pair(checked, k)
        line, column = divmod(number, 3)
        for ax, side in zip(axes[line, 3 * column :], ("file_a", "file_b"), strict=False):
            with Image.open(root / pair[side]) as image:
                shown = image.convert("RGB")
            shown.thumbnail((256, 256))
            ax.imshow(shown)
            ax.set_axis_on()
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel("\n".join(_short(name) for name in pair[side].split("/")), fontsize=8)
        words = f"{pair['kind']} {float(pair['similarity']):.3f}{', mirrored' * pair['mirrored']}"
        axes[line, 3 * column].set_title(words, loc="left", fontsize=10)
    place = "across splits" if across.any() else "within splits" if checked.splits[1:] else ""
    figure.suptitle(f"{len(picked)} of {len(chosen):,} pairs of twins {place}".rstrip())
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:12]}...{name[-13:]}"
