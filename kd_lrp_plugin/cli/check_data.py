"""``kd-lrp check-data``."""

from pathlib import Path
from typing import Annotated

import typer

from kd_lrp_plugin.cli.console import RichProgress, errors_in_words, say
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
    bits: Annotated[
        int | None,
        typer.Option(help="How many the values of 16-bit images have, such as 12; else all."),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A class folder, at any depth; once for each, if they lie deeper."
        ),
    ] = None,
    images: Annotated[
        str, typer.Option(metavar="NAME", help="Sub-folder of each class folder with its images.")
    ] = "",
    masks: Annotated[
        str, typer.Option(metavar="NAME", help="Sub-folder beside it with masks, to count them.")
    ] = "",
) -> None:
    """Does the test set leak? Faulty files, class balance, duplicates, and a split without them.

    Duplicates are images of the same pixels; near-duplicates look the same: re-encoded, resized,
    mirrored, brighter. Says, too, what a linear classifier makes of tiny thumbnails: classes that
    differ in brightness or framing invite a model to be right for that. Writes pairs.csv, pairs.png
    to judge them by eye, summary.json and clean_split.csv; the images stay as they are.
    `folder_images` reads the clean split by `manifest: DIR/clean_split.csv`. A call that was killed
    resumes when it is rerun. Examples:

        kd-lrp check-data images --out checked

        kd-lrp check-data images --out checked --group-by patient --manifest patients.csv

        kd-lrp check-data covid --out checked --images images --masks "lung masks"
    """
    last = "What was read is kept; the same command resumes from there."
    with RichProgress(), errors_in_words(last):
        from kd_lrp_plugin.data.layout import ClassFolders
        from kd_lrp_plugin.data.leakage import check

        folders = ClassFolders(tuple(classes or ()), images, masks, bits)
        found = check.check_data(root, out, test_share, group_by, manifest, folders)
    for name in ("splits", "clean"):
        say(f"\n{'given' if name == 'splits' else 'clean split'}\n")
        rows = [
            {"split": split, **of, "all": sum(of.values())} for split, of in found[name].items()
        ]
        say(tables.table(rows, list(dict.fromkeys(key for row in rows for key in row))))
    for name in ("sizes", "modes", "formats"):
        counts = [f"{value} ({n:,})" for value, n in found[name].items()]
        rest = f" and {len(counts) - 5} more" if len(counts) > 5 else ""
        say(f"{name}: {', '.join(counts[:5])}{rest}")
    for name in ("unreadable", "anomalies", "ignored"):
        for file, why in list(found[name].items())[:SHOWN]:
            say(f"{name}: {file}: {why}")
        if (more := len(found[name]) - SHOWN) > 0:
            say(f"{name}: {more:,} more, in summary.json")
    say("\npairs of duplicates\n")
    say(tables.table([{"where": where, **n} for where, n in found["pairs"].items()]))
    say(f"\n{found['summary']}")
    made = [name for name in check.OUTPUTS if (out / name).exists()]
    say(f"written to {out}: {', '.join(made)}")
