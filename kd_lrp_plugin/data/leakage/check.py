"""What leaks from training into the test set, and a split of the same images that does not.

:mod:`kd_lrp_plugin.data.leakage.images` says what duplicates are; here near-duplicates are meant,
too. Splits are ranked: training (names that begin with ``train``, or else the largest split), then
validation (``val``), then all others. The clean split comes of four rules:

1. Duplicates, duplicates of duplicates and so on are one set. A group is one set, or, with a column
   of patients, all sets that patients join.
2. In a set of several classes, only images of its most frequent class may be kept; none, if there
   is no such class.
3. Of a group, only what lies in the highest split that it reaches may be kept: a test set stays
   nearly as it was published, and training loses what it shares with it.
4. Of what is left of a set, one image is kept: the one with most pixels, or the first by name.

Where the images are in no splits yet, test images are cut out of what is kept by
:func:`kd_lrp_plugin.data.splits.held_out`, never through a group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from kd_lrp_plugin.data.layout import PLAIN, ClassFolders
from kd_lrp_plugin.data.leakage.appearance import judge_by_look
from kd_lrp_plugin.data.leakage.clean_split import (
    COLUMNS,
    DatasetAudit,
    clean_split,
    describe_pair,
    group_images,
)
from kd_lrp_plugin.data.leakage.duplicates import find_duplicates
from kd_lrp_plugin.data.leakage.images import (
    VERSION,
    Fingerprint,
    ImageFile,
    ImageList,
    claimed,
    count_properties,
    fingerprints,
    list_images,
)
from kd_lrp_plugin.data.leakage.summary import count_leaks, pairs_figure, summarise_leaks
from kd_lrp_plugin.data.splits import read_groups
from kd_lrp_plugin.data.validation import check_integer
from kd_lrp_plugin.utils.files import (
    damaged,
    get_command,
    hash_contents,
    hash_file,
    put,
    read_json,
    to_csv,
    write_json,
    write_text,
)
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message

SPLIT_COLUMNS = ("file", "split", "class", "group", "kept", "why")
OUTPUTS = ("summary.json", "pairs.csv", "clean_split.csv", "pairs.png")
TABLES = ("pairs.csv", "clean_split.csv")  # whose bytes the summary knows
_ANSWER = 2  # version of what a summary says


def check_data(
    root: str | Path,
    out: str | Path,
    test_share: float = 0.2,
    group_by: str | None = None,
    manifest: str | Path | None = None,
    folders: ClassFolders = PLAIN,
) -> dict[str, Any]:
    """Look for duplicates and faulty files; write summary, pairs and clean split to ``out``.

    Nothing in ``root`` is changed. Fingerprints stay in ``out``: the same call resumes after
    a kill, later reads only what is new, and where nothing is, gives the answer that is there.

    Args:
        root: images in ``<root>/<split>/<class>/`` or ``<root>/<class>/``; what is left out,
            :mod:`kd_lrp_plugin.data.layout` says, and ``<root>/masks``.
        out: folder outside of ``root``.
        test_share: of the images to propose as test set, in (0, 1), where there are no splits.
        group_by: column of ``manifest`` whose groups, such as patients, must not be divided.
        manifest: CSV as :func:`kd_lrp_plugin.data.splits.read_groups` takes it; default
            ``<root>/manifest.csv``.
        folders: what is known of the class folders, as for training.

    Returns:
        The content of summary.json.

    Raises:
        FileNotFoundError: if there are no images, or no manifest.
        FileExistsError: if ``out`` holds something else.
        BlockingIOError: if another process holds it.
        ValueError: for a share outside (0, 1), ``out`` inside ``root``, folders that are no class
            folders, masks that no image has, a manifest that names none of the images, or a set in
            which nearly all images are alike.
        OSError: if something cannot be written.
    """
    root = Path(root).expanduser()
    images, ignored = list_images(root, folders)
    unmasked = None
    if folders.masks:
        unmasked = folders.count_unmasked("check-data", root, [image.file for image in images])
    table = Path(manifest).expanduser() if manifest else root / "manifest.csv"
    patients = _patients(images, table, group_by) if group_by else {}
    about: dict[str, Any] = {
        "group_by": group_by,
        "manifest": str(table.resolve()) if group_by else None,
    }
    about |= {
        name: [*value] if isinstance(value, tuple) else value
        for name, value in asdict(folders).items()
        if value and name != "bits"
    }
    listed = ImageList(images, ignored, patients, unmasked)
    return check_images(root, out, listed, about, test_share, folders.bits)


def check_images(
    root: Path,
    out: str | Path,
    listed: ImageList,
    about: Mapping[str, Any],
    test_share: float = 0.2,
    bits: int | None = None,
) -> dict[str, Any]:
    """What :func:`check_data` does, of images that are listed already.

    Args:
        listed: images below ``root``, one or more.
        about: how they were listed and grouped, as JSON; an ``out`` of other words is refused.
        root, out, test_share, bits: as for :func:`check_data`.
    """
    out = Path(out).expanduser()
    if not 0 < test_share < 1:
        raise ValueError(message("check-data", "test_share in (0, 1)", test_share, "Use 0.2."))
    if bits is not None:
        check_integer("check-data", "bits", bits, least=9)
    if out.resolve().is_relative_to(root.resolve()):
        fix = "Its pictures would be taken for images of the set."
        raise ValueError(message("check-data: out", f"a folder outside {root}", out, fix))
    images, ignored, patients, unmasked = listed
    options: dict[str, Any] = {
        "root": str(root.resolve()),
        "test_share": None if images[0].split else test_share,
        **about,
        "bits": bits,
    }
    with claimed(out, options, OUTPUTS) as cache:
        prints = fingerprints(root, images, cache, bits)
        state = _state(images, prints, ignored, patients, unmasked)
        if before := _answered(out, state):
            return before
        audit = group_images(images, prints, find_duplicates(prints), patients)
        rows = clean_split(audit, test_share)
        summary = {"command": get_command(), "options": options, "state": state}
        summary |= count_properties(images, prints, ignored)
        summary |= count_leaks(audit, rows)
        summary["look"] = judge_by_look(rows, prints, audit.splits[0] or "Training")
        if unmasked is not None:
            summary["masks"] = {"folder": about["masks"], "images_without": unmasked}
        summary["summary"] = summarise_leaks(summary)
        order = _worst_first(audit)
        text = to_csv(SPLIT_COLUMNS, ([row[c] for c in SPLIT_COLUMNS] for row in rows))
        split = out / "clean_split.csv"
        if split.exists() and split.read_text(encoding="utf-8") != text:
            current_progress().note(f"{split} changes, since the images have changed")
        for stale in ("summary.json", "pairs.png"):  # until the summary is written, nothing is said
            (out / stale).unlink(missing_ok=True)
        write_text(split, text)
        pairs = (describe_pair(audit, k) for k in order)
        write_text(
            out / "pairs.csv", to_csv(COLUMNS, ([pair[c] for c in COLUMNS] for pair in pairs))
        )
        summary["outputs"] = {name: hash_file(out / name) for name in TABLES}
        if len(order):
            figure = pairs_figure(root, audit, order, bits)
            put(out / "pairs.png", lambda draft: figure.savefig(draft, format="png"))
        write_json(out / "summary.json", summary)
    return summary


def _state(
    images: Sequence[ImageFile],
    prints: Sequence[Fingerprint],
    ignored: Mapping[str, str],
    patients: Mapping[str, str],
    unmasked: int | None,
) -> str:
    """A digest of all that the answer depends on beside the options."""
    known = [images, [one[:-1] for one in prints], ignored, patients, VERSION, _ANSWER]
    return hash_contents(known if unmasked is None else [*known, unmasked])


def _answered(out: Path, state: str) -> dict[str, Any] | None:
    """The summary in ``out``, if it is of this state and all that goes with it is there."""
    missing = {name for name in OUTPUTS if not (out / name).is_file()}
    if missing - {"pairs.png"}:
        return None
    fix = "Delete it, and run kd-lrp check-data again: it makes it from what it has kept."
    summary = read_json(out / "summary.json", fix, state=str, images_with_duplicate=int)
    complete = not missing or not summary["images_with_duplicate"]
    if not complete or summary["state"] != state:
        return None
    for name, written in summary.get("outputs", {}).items():
        if hash_file(out / name) != written:
            got, fix = "other bytes", "Delete it to have it made again; rename it to keep changes."
            raise damaged(out / name, "the table that kd-lrp check-data has written", got, fix)
    return summary


def _patients(images: Sequence[ImageFile], table: Path, column: str) -> dict[str, str]:
    where = f"check-data: manifest {table}"
    fix = "A row names an image by file (its path, or its name), or by file, split and class."
    if not table.is_file():
        raise FileNotFoundError(message(where, "a CSV file", "none", "Give it by --manifest."))
    named = read_groups(table, [image.file for image in images], column)
    if not named:
        expected = f"columns file and {column}, that name some of the {len(images)} images"
        raise ValueError(message(where, expected, "none of them", fix))
    return named


def _worst_first(audit: DatasetAudit) -> Int[np.ndarray, " pairs"]:
    """The pairs: across splits before within, and the most alike first."""
    pairs = audit.duplicates
    return np.lexsort((pairs.b, pairs.a, pairs.kind, -pairs.similarity, ~audit.across))
