"""Image files in class folders, and what is kept of each to find its duplicates.

Two images are duplicates if, read as training reads them, they have the same pixels (``exact``);
they are near-duplicates if their thumbnails of 56 × 56 grey values correlate at 0.98 or more, as
they are or one mirrored left to right (``thumbnail``); or if they do at 0.95 and their 64-bit
perceptual hashes differ in at most 2 bits (``hash``). So copies are found that were re-encoded,
resized, mirrored, made brighter, or shifted by a quarter of a thumbnail's pixel, and some
neighbouring slices; not turned or cropped copies, nor most slices of one patient.
"""

import hashlib
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from kd_lrp_plugin.data.images import DecodedImage, ascii_name, decode_image
from kd_lrp_plugin.data.layout import (
    PLAIN,
    ClassFolders,
    Parts,
    arrange,
    find_alike,
    find_class,
    is_image,
    walk,
)
from kd_lrp_plugin.utils.extras import imports_of_an_extra
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message

SIDE = 56  # of the thumbnails
CACHE = "fingerprints.sqlite"
_BATCH = 256  # fingerprints that a kill may cost
VERSION = 2  # of the fingerprints and of what is made of them


class ImageFile(NamedTuple):
    """An image file: its path below the root, its split ("" if there are none) and its class."""

    file: str
    split: str
    label: str


class ImageList(NamedTuple):
    """Images, of what lies beside them why it is left out, and patients by file, if known.

    ``unmasked`` is how many of them have no mask; None where no masks are asked for.
    """

    images: Sequence[ImageFile]
    ignored: Mapping[str, str]
    patients: Mapping[str, str]
    unmasked: int | None = None


class Fingerprint(NamedTuple):
    """What is kept of an image.

    Attributes:
        unreadable: why it cannot be read; all else is empty then.
        format: such as JPEG, by content.
        mode: Pillow's, as in the file.
        size: width and height in pixels.
        anomalies: what is unusual about it.
        digest: of size and RGB pixels, in hex.
        hashes: perceptual hash of the grey image and of its mirror image, 8 bytes each, in hex.
        thumbnail: 56 × 56 grey values in [0, 255], row by row.
    """

    unreadable: str = ""
    format: str = ""
    mode: str = ""
    size: Sequence[int] = (0, 0)
    anomalies: Sequence[str] = ()
    digest: str = ""
    hashes: str = "00" * 16
    thumbnail: bytes = bytes(SIDE * SIDE)


def list_images(
    root: Path, folders: ClassFolders = PLAIN
) -> tuple[list[ImageFile], dict[str, str]]:
    """The image files in ``<root>/<split>/<class>/`` or ``<root>/<class>/``, sorted by path.

    What holds more of them decides between the two; where class folders lie deeper, ``folders``
    names them, and the uppermost folders are splits if a class is in two of them. What counts as
    an image of a class is what :mod:`kd_lrp_plugin.data.layout` says, as for training.

    Returns:
        The images, and of what no data set reads, why.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if the folders are no class folders, or not those that are named, splits have
            no class in common and none is called training, or a name is not text in UTF-8.
    """
    tree, masks = walk(root), root / "masks"
    found = [parts for parts in tree.files if parts[0] != masks.name]
    tree = tree._replace(files=found)
    split = _has_splits([parts for parts in found if is_image(parts[-1])], folders)
    tops = sorted({parts[0] for parts in found if len(parts) > 2}) if split else [""]
    if alike := find_alike(tops):
        fix = "Put their images into one folder."
        expected = "splits that differ in more than case"
        raise ValueError(message(f"images {root}", expected, alike[0], fix))
    ignored = {masks.name: "the masks of the images"} if masks.is_dir() else {}
    ignored |= {file: why for file, why in tree.ignored.items() if file.count("/") == 0}
    images = []
    for top in tops:
        layout = arrange(root, tree, folders, (top,) if split else ())
        start = f"{top}/" * split
        for problem in layout.problems:
            raise ValueError(problem)
        ignored |= {f"{start}{file}": why for file, why in layout.ignored.items()}
        if layout.classes:
            empty = dict.fromkeys(layout.empty, "a class folder without images")
            ignored |= {f"{start}{name}": why for name, why in empty.items() if name != masks.name}
        images += [ImageFile(start + "/".join(p), top, name) for p, name in layout.images.items()]
    for parts in found:
        file = ascii_name("/".join(parts))
        if not is_image(parts[-1]):
            if len(parts) > 1:  # beside the folders lie manifests and the like
                ignored.setdefault(file, _describe_other(root.joinpath(*parts)))
        elif len(parts) < 2 + split:
            ignored.setdefault(file, "an image in no class folder")
    if not images:
        expected = "images in ROOT/<split>/<class>/ or ROOT/<class>/"
        fix = "Give the folder above the splits or classes."
        raise FileNotFoundError(message("check-data", expected, f"none below {root}", fix))
    _check_classes(root, images, folders)
    return sorted(images, key=lambda image: image.file.split("/")), dict(sorted(ignored.items()))


def _has_splits(images: Sequence[Parts], folders: ClassFolders) -> bool:
    """Whether the uppermost folders are splits, rather than classes or what holds some of them."""
    if not folders.classes:
        depths = [len(parts) - bool(folders.images) for parts in images]
        return sum(depth > 2 for depth in depths) > depths.count(2)
    homes: dict[str, set[str]] = {}
    for parts in images:
        if parts[0] in folders.classes:
            return False
        if depth := find_class(parts[:-1], folders.classes):
            homes.setdefault(parts[depth], set()).add(parts[0])
    tops = set().union(*homes.values())
    return len(tops) == 1 or any(len(found) > 1 for found in homes.values())


def _check_classes(root: Path, images: Sequence[ImageFile], folders: ClassFolders) -> None:
    named = sorted({image.label for image in images})
    if folders.classes and named != sorted(folders.classes):
        fix = "Correct the names, or leave classes out."
        expected = f"classes {sorted(folders.classes)}"
        raise ValueError(message(f"images {root}", expected, named, fix))
    of_split = {split: [*of] for split, of in by_class((i.split, i.label) for i in images).items()}
    trained = any(split.lower().startswith("train") for split in of_split)
    if len(of_split) > 1 and not trained and sum(map(len, of_split.values())) == len(named):
        fix = "If these folders are no splits, name the class folders in classes."
        raise ValueError(message(f"images {root}", "splits that share a class", of_split, fix))


def fingerprint(file: str | Path, bits: int | None = None) -> Fingerprint:
    """The fingerprint of an image file, as the data sets here see it.

    The perceptual hash is :func:`imagehash.phash`. A file that cannot be read raises nothing: the
    fingerprint says so.

    Args:
        file: of the image.
        bits: as for :func:`kd_lrp_plugin.data.images.read_image`.

    Example:
        >>> fingerprint("nowhere.png").unreadable
        'no such file'
    """
    with imports_of_an_extra():
        import imagehash

    try:
        image = decode_image(file, bits)
    except FileNotFoundError:
        return Fingerprint("no such file")
    except ValueError as error:
        return Fingerprint(str(error))
    anomalies, rgb = _find_anomalies(image, str(file)), image.rgb
    grey = rgb.convert("L")
    thumbnail = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    if thumbnail.std() < 1:
        anomalies.append("of one even colour")
    small = grey.resize((32, 32), Image.Resampling.LANCZOS)  # phash would do it, for each again
    hashes = [imagehash.phash(each).hash for each in (small, ImageOps.mirror(small))]
    content = hashlib.blake2b(str(rgb.size).encode(), digest_size=16)
    content.update(rgb.tobytes())
    return Fingerprint(
        format=image.format,
        mode=image.mode,
        size=rgb.size,
        anomalies=anomalies,
        digest=content.hexdigest(),
        hashes=np.packbits(hashes).tobytes().hex(),
        thumbnail=thumbnail.tobytes(),
    )


def _find_anomalies(image: DecodedImage, file: str) -> list[str]:
    anomalies = []
    ending = os.path.splitext(file)[1].lower()
    named = Image.registered_extensions().get(ending)
    if named != image.format and {named, image.format} != {"JPEG", "MPO"}:
        anomalies.append(f"{image.format}, but named {ending}")
    if image.mode not in ("L", "RGB"):
        anomalies.append(": ".join([f"mode {image.mode}", *image.changes]))
    else:
        anomalies += image.changes
    width, height = image.rgb.size
    if min(width, height) < 32 or max(width, height) > 3 * min(width, height):
        anomalies.append(f"{width} x {height} pixels")
    return anomalies


def _describe_other(file: Path) -> str:
    try:
        with Image.open(file) as image:
            return f"an image ({image.format}) that data sets leave unread for its ending"
    except Exception:  # Pillow raises many kinds
        return "not an image"


def count_properties(
    images: Sequence[ImageFile], prints: Sequence[Fingerprint], ignored: Mapping[str, str]
) -> dict[str, Any]:
    """Counts, sizes and modes, and the files that are unlike what is expected, as JSON.

    Args:
        images: of the set.
        prints: of the images.
        ignored: what no data set reads, and why.
    """
    readable = [one for one in prints if not one.unreadable]
    sizes = Counter(f"{one.size[0]}x{one.size[1]}" for one in readable)
    modes, formats = Counter(one.mode for one in readable), Counter(one.format for one in readable)
    usual = {name for kind in (sizes, modes) for name, n in kind.items() if n > 0.95 * kind.total()}
    anomalies = {}
    for image, one in zip(images, prints, strict=True):
        words = list(one.anomalies)
        for kind, name in ((sizes, f"{one.size[0]}x{one.size[1]}"), (modes, one.mode)):
            if usual & kind.keys() and name not in usual and not one.unreadable:
                words.append(f"{name}, unlike the {max(kind, key=lambda k: kind[k])} of most")
        if words:
            anomalies[image.file] = "; ".join(words)
    sides = np.array([one.size for one in readable]).reshape(-1, 2)
    return {
        "images": len(images),
        "splits": by_class((image.split or "no split", image.label) for image in images),
        "sizes": dict(sizes.most_common(20)),
        "smallest_and_largest_side": [int(sides.min()), int(sides.max())] if len(sides) else [],
        "median_shorter_side": float(np.median(sides.min(1))) if len(sides) else None,
        "modes": dict(modes.most_common()),
        "formats": dict(formats.most_common()),
        "unreadable": {
            image.file: one.unreadable
            for image, one in zip(images, prints, strict=True)
            if one.unreadable
        },
        "anomalies": anomalies,
        "ignored": dict(ignored),
    }


def by_class(pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """How often each pair of split and class comes, sorted."""
    counts: dict[str, dict[str, int]] = {}
    for (split, label), n in sorted(Counter(pairs).items()):
        counts.setdefault(split, {})[label] = n
    return counts


@contextmanager
def claimed(
    out: Path, options: Mapping[str, Any], outputs: Sequence[str]
) -> Iterator[sqlite3.Connection]:
    """Hold folder ``out`` for one set of options; the database of its fingerprints.

    Args:
        out: a new or empty folder, or one that was begun with these options.
        options: of the check, as JSON.
        outputs: files that the check writes there.

    Raises:
        FileExistsError: if the folder holds files of other options, or something else's.
        BlockingIOError: if another process holds it.
        OSError: if the database cannot be read or written.
    """
    file, fix = out / CACHE, "Choose another --out, or delete this one."
    taken = [name for name in outputs if (out / name).exists()]
    if (taken and not file.exists()) or (out.exists() and not out.is_dir()):
        got = f"{out}, which holds {taken}" if taken else f"{out}, a file"
        raise FileExistsError(message("check-data: out", "a new folder", got, fix))
    out.mkdir(parents=True, exist_ok=True)
    try:
        with closing(sqlite3.connect(file, timeout=0)) as base:
            base.execute("PRAGMA locking_mode = EXCLUSIVE")  # until the connection is closed
            base.execute("BEGIN EXCLUSIVE")
            base.execute("CREATE TABLE IF NOT EXISTS options (words TEXT)")
            base.execute(
                "CREATE TABLE IF NOT EXISTS prints "
                "(file TEXT PRIMARY KEY, stamp TEXT, facts TEXT, thumbnail BLOB)"
            )
            words = json.dumps(options)
            for (before,) in base.execute("SELECT words FROM options").fetchall():
                if before != words:
                    got = f"{out}, which was made with other options: {before}, now {words}"
                    raise FileExistsError(message("check-data: out", "a new folder", got, fix))
            base.execute("DELETE FROM options")
            base.execute("INSERT INTO options VALUES (?)", [words])
            base.commit()
            yield base
    except sqlite3.Error as error:
        if "locked" in str(error):
            got = f"{out}, which another process holds"
            raise BlockingIOError(message("check-data: out", "a free folder", got, fix)) from None
        fix = "Make room if the disk is full; delete the file if it is damaged."
        raise OSError(message(str(file), "a database to read and write", error, fix)) from error


def fingerprints(
    root: Path, images: Sequence[ImageFile], base: sqlite3.Connection, bits: int | None = None
) -> list[Fingerprint]:
    """Fingerprints of the images: those of unchanged files from the database, else made now.

    Made by as many threads as there are processors, each with one decoded image at a time.
    """
    stamps = [_stamp(root / image.file) for image in images]
    known: dict[str, Fingerprint] = {}
    stamp_of = {image.file: stamp for image, stamp in zip(images, stamps, strict=True)}
    for file, stamp, facts, thumbnail in base.execute("SELECT * FROM prints"):
        found = Fingerprint._make([*json.loads(facts), thumbnail])
        if stamp_of.get(file) == stamp and not found.unreadable:  # that may have passed
            known[file] = found
    missing = [image.file for image in images if image.file not in known]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(fingerprint, [root / file for file in missing], repeat(bits))
        try:
            tracked = current_progress().track(made, "reading images", len(missing))
            for count, (file, found) in enumerate(zip(missing, tracked, strict=True), 1):
                known[file] = found
                row = (file, stamp_of[file], json.dumps(found[:-1]), found.thumbnail)
                base.execute("INSERT OR REPLACE INTO prints VALUES (?, ?, ?, ?)", row)
                if count % _BATCH == 0:
                    base.commit()
        finally:
            pool.shutdown(cancel_futures=True)
            base.commit()
    return [known[image.file] for image in images]


def _stamp(file: Path) -> str:
    try:
        about = file.stat()
    except OSError as error:
        return f"{VERSION} {type(error).__name__}"
    return f"{VERSION} {about.st_size} {about.st_mtime_ns}"
