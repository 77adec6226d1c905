"""``kd-lrp check-data``."""

from pathlib import Path
from typing import Annotated

import typer

from kd_lrp_plugin.cli.console import RichProgress, errors_in_words
from kd_lrp_plugin.plots import tables

SHOWN = 40  # files of a kind


def check_data(
    root: Annotated[Path, typer.Argument(help="Images in ROOT/SPLIT/CLASS/ or ROOT/CLASS/.")],
    out: Annotated[Path, typer.Option(help="Folder for the answer, outside of ROOT.")],
    test_share: Annotated[
        float, typer.Option(help="Of the images to propose as test set, if there are no splits.")
    ] = 0.2,
    group_by: Annotated[
        str | None,
        typer.Option(help="Column of the manifest, such as patient, that must not be divided."),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(help="CSV with columns file, perhaps split and class; ROOT/manifest.csv."),
    ] = None,
) -> None:
    """Does the test set leak? Faulty files, class balance, twins, and a split without them.

    Twins are images of the same pixels, or that look the same: re-encoded, resized, mirrored,
    brighter. Writes pairs.csv, pairs.png to judge them by eye, summary.json and clean_split.csv;
    the images stay as they are. `folder_images` reads the clean split by `manifest:
    DIR/clean_split.csv`. A call that was killed goes on when it is given again. Examples:

        kd-lrp check-data images --out checked

        kd-lrp check-data images --out checked --group-by patient --manifest patients.csv
    """
    from kd_lrp_plugin.data.leakage import check

    last = "What was read is kept; the same command goes on from there."
    with RichProgress(), errors_in_words(last):
        found = check.check_data(root, out, test_share, group_by, manifest)
    for name in ("splits", "clean"):
        print(f"\n{'given' if name == 'splits' else 'clean split'}\n")
        rows = [
            {"split": split, **of, "all": sum(of.values())} for split, of in found[name].items()
        ]
        print(tables.table(rows, list(dict.fromkeys(key for row in rows for key in row))))
    for name in ("sizes", "modes", "formats"):
        counts = [f"{value} ({n:,})" for value, n in found[name].items()]
        rest = f" and {len(counts) - 5} more" if len(counts) > 5 else ""
        print(f"{name}: {', '.join(counts[:5])}{rest}")
    for name in ("unreadable", "odd", "not_in_the_set"):
        for file, why in list(found[name].items())[:SHOWN]:
            print(f"{name.replace('_', ' ')}: {file}: {why}")
        if (more := len(found[name]) - SHOWN) > 0:
            print(f"{name.replace('_', ' ')}: {more:,} more, in summary.json")
    print("\npairs of twins\n")
    print(tables.table([{"where": place, **n} for place, n in found["pairs"].items()]))
    print(f"\n{found['verdict']}")
    made = [name for name in check.OUTPUTS if (out / name).exists()]
    print(f"written to {out}: {', '.join(made)}")
