"""What a leak check comes to, in plain words and as a picture."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from kd_lrp_plugin.data.images import read_image
from kd_lrp_plugin.data.leakage.clean_split import DatasetAudit, describe_pair
from kd_lrp_plugin.data.leakage.duplicates import KINDS
from kd_lrp_plugin.data.leakage.images import by_class
from kd_lrp_plugin.plots.text import PLAIN, plain_text
from kd_lrp_plugin.utils.extras import imports_of_an_extra

with imports_of_an_extra():
    from matplotlib.figure import Figure

_SHOWN = 12  # pairs in the picture


def count_leaks(audit: DatasetAudit, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    pairs, ranks, across = audit.duplicates, audit.ranks, audit.across
    labels = np.array([image.label for image in audit.images])
    higher = np.where(ranks[pairs.a] > ranks[pairs.b], pairs.a, pairs.b)
    lowest = np.full(audit.sets.max() + 1, len(ranks))
    np.minimum.at(lowest, audit.sets, ranks)
    shares = {
        "duplicate": np.unique(higher[across]),
        "exact": np.unique(higher[across & (pairs.kind == 0)]),
        "near": np.unique(higher[across & (pairs.kind > 0)]),
        "set": np.flatnonzero(lowest[audit.sets] < ranks),
    }
    leaks = {}
    for rank, split in list(enumerate(audit.splits))[1:]:
        counts = {name: int((ranks[found] == rank).sum()) for name, found in shares.items()}
        leaking = labels[shares["duplicate"]][ranks[shares["duplicate"]] == rank]
        leaks[split] = {
            "images": int((ranks == rank).sum()),
            "against": list(audit.splits[:rank]),
            **counts,
            "duplicate_by_class": dict(sorted(Counter(leaking.tolist()).items())),
        }
    partners = np.bincount(np.concatenate([pairs.a, pairs.b]), minlength=len(ranks))
    homes = defaultdict(set)
    for image in audit.images:
        if image.file in audit.patients:
            homes[audit.patients[image.file]].add(image.split)
    kept = [row for row in rows if row["kept"]]
    reasons = Counter(row["why"].split(":")[0] for row in rows if row["why"])
    return {
        "pairs": {
            where: {kind: int((chosen & (pairs.kind == k)).sum()) for k, kind in enumerate(KINDS)}
            for where, chosen in (("within", ~across), ("across", across))
        },
        "mirrored_pairs": int(pairs.mirrored.sum()),
        "pairs_of_two_classes": int((labels[pairs.a] != labels[pairs.b]).sum()),
        "images_with_duplicate": int((partners > 0).sum()),
        "leaks": leaks,
        "duplicates_apart_at_random": float(np.mean(1 - 0.2**partners)),
        "groups": {
            "given": len(homes),
            "divided": sum(len(home) > 1 for home in homes.values()),
            "images_without": len(ranks) - len(audit.patients) if homes else 0,
        },
        "clean": by_class((row["split"], row["class"]) for row in kept),
        "left_out": dict(reasons),
    }


def summarise_leaks(summary: Mapping[str, Any]) -> str:
    """What a summary comes to, in plain words: a sentence or two per line."""
    lines = []
    for split, found in summary["leaks"].items():
        n, count, rest = found["images"], found["duplicate"], " or ".join(found["against"])
        if not count:
            lines.append(f"None of the {n:,} images of {split} has a duplicate in {rest}.")
            continue
        shown = 100 * (0.8 + 0.2 * count / n)
        lines.append(
            f"LEAK: {count:,} of the {n:,} images of {split} ({100 * count / n:.1f} %) have a "
            f"duplicate or near-duplicate in {rest}, {found['exact']:,} of them the same pixel for "
            f"pixel. For this part accuracy on {split} measures memory: a model that is right on "
            f"80 % of new images, and remembers old ones, shows {shown:.1f} %."
        )
    if not summary["leaks"] and (count := summary["images_with_duplicate"]):
        share = summary["duplicates_apart_at_random"]
        lines.append(
            f"There is no split yet, and {count:,} of the {summary['images']:,} images have a "
            f"duplicate: in a random fifth as test set, about {100 * share:.1f} % would have one "
            "in training."
        )
    elif not summary["leaks"]:
        lines.append(f"No two of the {summary['images']:,} images are duplicates.")
    if summary["leaks"] and (within := sum(summary["pairs"]["within"].values())):
        lines.append(f"Within the splits there are {within:,} pairs of duplicates.")
    if two := summary["pairs_of_two_classes"]:
        lines.append(f"{two:,} pairs of duplicates are of two classes: a label or more is wrong.")
    groups = summary["groups"]
    if groups["divided"]:
        column = summary["options"]["group_by"]
        lines.append(
            f"LEAK: of the {groups['given']:,} groups by {column}, {groups['divided']:,} lie in "
            "several splits."
        )
    if groups["images_without"]:
        lines.append(f"{groups['images_without']:,} images are in no group of the manifest.")
    if masks := summary.get("masks"):
        count, total = masks["images_without"], summary["images"]
        lines.append(f"{count:,} of the {total:,} images have no mask in {masks['folder']!r}.")
    if bad := len(summary["unreadable"]):
        lines.append(f"{bad:,} image files cannot be read; training would stop there.")
    sets = {frozenset(classes) for classes in summary["splits"].values()}
    if len(sets) > 1:
        lines.append("The splits have different classes.")
    kept = ", ".join(f"{sum(c.values()):,} in {split}" for split, c in summary["clean"].items())
    lines.append(f"clean_split.csv keeps {kept or 'nothing'}, one of each set of duplicates.")
    for split, classes in _lacking(summary).items():
        missing = " and no ".join(classes)
        why = "there are too few images, or groups are not divided"
        lines.append(f"clean_split.csv has no {missing} in {split}: {why}.")
    if look := summary.get("look"):
        side, right, one = (look[name] for name in ("side", "accuracy", "most_frequent"))
        lines.append(
            f"A linear classifier of {side} x {side} grey thumbnails is right on {100 * right:.1f} "
            f"% of {look['images']:,} clean test images, always saying one class on "
            f"{100 * one:.1f} %: so much do brightness and framing tell, which may be of the "
            "machine or the place and not of the matter."
        )
    if not groups["given"]:
        lines.append(
            "Other slices of one patient are no duplicates: give --group-by if it is known."
        )
    return "\n".join(lines)


def _lacking(summary: Mapping[str, Any]) -> dict[str, list[str]]:
    """Classes that a split of the clean ones is without, though there are images of them."""
    classes = sorted({name for counts in summary["splits"].values() for name in counts})
    splits = [*summary["clean"]]
    if summary["options"]["test_share"] is not None:  # the split is proposed
        splits = ["Training", "Testing"]
    found = {s: [c for c in classes if not summary["clean"].get(s, {}).get(c)] for s in splits}
    return {split: names for split, names in found.items() if names}


def pairs_figure(
    root: Path, audit: DatasetAudit, order: Int[np.ndarray, " pairs"], bits: int | None = None
) -> Figure:
    """Up to twelve pairs side by side: across splits, if there are any.

    First up to four exact ones, then others, spread evenly from the most to the least alike.
    """
    across = audit.across[order]
    chosen = order[across] if across.any() else order
    exact = chosen[audit.duplicates.kind[chosen] == 0]
    near = chosen[audit.duplicates.kind[chosen] > 0]
    exact = exact[: max(4, _SHOWN - len(near))]
    room = min(len(near), _SHOWN - len(exact))
    picked = [*exact, *near[np.linspace(0, len(near) - 1, room).astype(int)]]
    rows, columns = -(-len(picked) // 3), min(3, len(picked))
    figure = Figure(figsize=(4 * columns, 2.75 * rows + 0.4), dpi=100, layout="constrained")
    widths = [1, 1, 0.12] * columns
    axes = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    for ax in axes.flat:
        ax.set_axis_off()
    for number, k in enumerate(picked):
        pair = describe_pair(audit, k)
        line, column = divmod(number, 3)
        for ax, side in zip(axes[line, 3 * column :], ("file_a", "file_b"), strict=False):
            shown = read_image(root / pair[side], bits)
            shown.thumbnail((256, 256))
            ax.imshow(shown)
            ax.set_axis_on()
            ax.set(xticks=[], yticks=[])
            parts = [_short(plain_text(name)) for name in pair[side].split("/")]
            ax.set_xlabel("\n".join(parts), fontsize=8, **PLAIN)
        words = f"{pair['kind']} {float(pair['similarity']):.3f}{', mirrored' * pair['mirrored']}"
        axes[line, 3 * column].set_title(words, loc="left", fontsize=10)
    where = "across splits" if across.any() else "within splits" if audit.splits[1:] else ""
    figure.suptitle(f"{len(picked)} of {len(chosen):,} pairs of duplicates {where}".rstrip())
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:12]}...{name[-13:]}"
