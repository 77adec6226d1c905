"""What a leak check comes to, in plain words."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kd_lrp_plugin.data.leakage.clean_split import DatasetAudit
from kd_lrp_plugin.data.leakage.duplicates import KINDS
from kd_lrp_plugin.data.leakage.images import by_class


def count_leaks(checked: DatasetAudit, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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


def summarise_leaks(summary: Mapping[str, Any]) -> str:
    """What a summary comes to, in plain words: a sentence or two per line."""
    lines = []
    for split, found in summary["leaks"].items():
        n, twin, rest = found["images"], found["twin"], " or ".join(found["against"])
        if not twin:
            lines.append(f"None of the {n:,} images of {split} has a twin in {rest}.")
            continue
        shown = 100 * (0.8 + 0.2 * twin / n)
        lines.append(
            f"LEAK: {twin:,} of the {n:,} images of {split} ({100 * twin / n:.1f} %) have a twin "
            f"in {rest}, {found['exact']:,} of them the same pixel for pixel. For this part "
            f"accuracy on {split} measures memory: a model that is right on 80 % of new images, "
            f"and remembers old ones, shows {shown:.1f} %."
        )
    if not summary["leaks"] and (twin := summary["images_with_twin"]):
        share = summary["twins_apart_at_random"]
        lines.append(
            f"There is no split yet, and {twin:,} of the {summary['images']:,} images have a twin: "
            f"in a random fifth as test set, about {100 * share:.1f} % would have one in training."
        )
    elif not summary["leaks"]:
        lines.append(f"No two of the {summary['images']:,} images are twins.")
    if summary["leaks"] and (within := sum(summary["pairs"]["within"].values())):
        lines.append(f"Within the splits there are {within:,} pairs of twins.")
    if two := summary["pairs_of_two_classes"]:
        lines.append(f"{two:,} pairs of twins are of two classes: at least one label is wrong.")
    groups = summary["groups"]
    if groups["divided"]:
        column = summary["question"]["group_by"]
        lines.append(
            f"LEAK: of the {groups['given']:,} groups by {column}, {groups['divided']:,} lie in "
            "several splits."
        )
    if groups["images_without"]:
        lines.append(f"{groups['images_without']:,} images are in no group of the manifest.")
    if bad := len(summary["unreadable"]):
        lines.append(f"{bad:,} image files cannot be read; training would stop there.")
    sets = {frozenset(classes) for classes in summary["splits"].values()}
    if len(sets) > 1:
        lines.append("The splits have different classes.")
    kept = ", ".join(f"{sum(c.values()):,} in {split}" for split, c in summary["clean"].items())
    lines.append(f"clean_split.csv keeps {kept or 'nothing'}, one of each set of twins.")
    for split, classes in _lacking(summary).items():
        lines.append(
            f"clean_split.csv has no {' and no '.join(classes)} in {split}: groups are not divided."
        )
    if not groups["given"]:
        lines.append("Other slices of one patient are no twins: give --group-by if it is known.")
    return "\n".join(lines)


def _lacking(summary: Mapping[str, Any]) -> dict[str, list[str]]:
    """Classes that a split of the clean ones is without, though there are images of them."""
    classes = sorted({name for counts in summary["splits"].values() for name in counts})
    splits = [*summary["clean"]]
    if [*summary["splits"]] == [""]:
        splits = ["Training", "Testing"]
    found = {s: [c for c in classes if not summary["clean"].get(s, {}).get(c)] for s in splits}
    return {split: names for split, names in found.items() if names}
