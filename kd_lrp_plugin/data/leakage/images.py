"""Image files in class folders, and what is kept of each to find its twins.

Two images are twins if, read as RGB, they have the same pixels (``exact``); if their thumbnails of
56 × 56 grey values correlate at 0.98 or more, as they are or one mirrored left to right
(``thumbnail``); or if they do at 0.95 and their 64-bit perceptual hashes differ in at most 2 bits
(``hash``). So copies are found that were re-encoded, resized, mirrored, made brighter, or shifted
by a quarter of a thumbnail's pixel, and some neighbouring slices; not turned or cropped copies, nor
most slices of one patient.
"""

import hashlib
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message

SIDE = 56  # of the thumbnails
CACHE = "fingerprints.sqlite"
_BATCH = 256  # fingerprints that a kill may cost
VERSION = 1  # of the fingerprints and of what is made of them


class ImageFile(NamedTuple):
    """An image file: its path below the root, its split ("" if there are none) and its class."""

    file: str
    split: str
    label: str


class Fingerprint(NamedTuple):
    """What is kept of an image.

    Attributes:
        unreadable: why it cannot be read; all else is empty then.
        format: such as JPEG, by content.
        mode: Pillow's, as in the file.
        size: width and height in pixels.
        odd: what is unusual about it.
        digest: of size and RGB pixels, in hex.
        hashes: perceptual hash of the grey image and of its mirror image, 8 bytes each, in hex.
        thumbnail: 56 × 56 grey values in [0, 255], row by row.
    """

    unreadable: str = ""
    format: str = ""
    mode: str = ""
    size: Sequence[int] = (0, 0)
    odd: Sequence[str] = ()
    digest: str = ""
    hashes: str = "00" * 16
    thumbnail: bytes = bytes(SIDE * SIDE)


def list_images(root: Path) -> tuple[list[ImageFile], dict[str, str]]:
    """The image files in ``<root>/<split>/<class>/`` or ``<root>/<class>/``, sorted by path.

    What holds more of them decides between the two. Folders below a class belong to it, as they do
    for torchvision; ``<root>/masks`` and hidden folders beside it are left out.

    Returns:
        The images, and of the files that no data set reads, why.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if a name is not text in UTF-8.
    """
    found = sorted(
        Path(folder, name).relative_to(root).parts
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
    )
    found = [parts for parts in found if parts[0] != "masks" and not parts[0].startswith(".")]
    depths = [len(parts) for parts in found if _is_image(parts[-1])]
    split = sum(depth > 2 for depth in depths) > depths.count(2)
    images, aside = [], {}
    for parts in found:
        file = "/".join(parts)
        if any("\ud800" <= sign <= "\udfff" for sign in file):  # Python's stand-ins for bytes
            raise ValueError(message("check-data", "names in UTF-8", ascii(file), "Rename it."))
        if not _is_image(file):
            if len(parts) > 1:  # beside the folders lie manifests and the like
                aside[file] = _what_else(root / file)
        elif len(parts) < 2 + split:
            aside[file] = "an image in no class folder"
        else:
            images.append(ImageFile(file, parts[0] if split else "", parts[split]))
    if not images:
        expected = "images in ROOT/<split>/<class>/ or ROOT/<class>/"
        fix = "Give the folder above the splits or classes."
        raise FileNotFoundError(message("check-data", expected, f"none below {root}", fix))
    return images, aside


def fingerprint(file: str | Path) -> Fingerprint:
    """The fingerprint of an image file, as the data sets here see it: in RGB, without alpha.

    The perceptual hash is :func:`imagehash.phash`. A file that cannot be read raises nothing: the
    fingerprint says so.

    Example:
        >>> fingerprint("nowhere.png").unreadable
        'no such file'
    """
    import imagehash

    try:
        if not os.path.getsize(file):
            return Fingerprint("an empty file")
        with Image.open(file) as image:
            rgb = image.convert("RGB")
            odd = _find_anomalies(image, str(file))
    except FileNotFoundError:
        return Fingerprint("no such file")
    except UnidentifiedImageError:
        return Fingerprint("not an image")
    except Exception as error:  # Pillow raises many kinds
        return Fingerprint(f"{type(error).__name__}: {error}".replace(f"'{file}'", "it"))
    grey = rgb.convert("L")
    thumbnail = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    if thumbnail.std() < 1:
        odd.append("of one even colour")
    small = grey.resize((32, 32), Image.Resampling.LANCZOS)  # phash would do it, for each anew
    hashes = [imagehash.phash(each).hash for each in (small, ImageOps.mirror(small))]
    content = hashlib.blake2b(str(rgb.size).encode(), digest_size=16)
    content.update(rgb.tobytes())
    return Fingerprint(
        format=str(image.format),
        mode=image.mode,
        size=rgb.size,
        odd=odd,
        digest=content.hexdigest(),
        hashes=np.packbits(hashes).tobytes().hex(),
        thumbnail=thumbnail.tobytes(),
    )


def _find_anomalies(image: Image.Image, file: str) -> list[str]:
    odd = []
    named = Image.registered_extensions().get(_ending(file))
    if named != image.format and {named, image.format} != {"JPEG", "MPO"}:
        odd.append(f"{image.format}, but named {_ending(file)}")
    if image.mode[0] in "IF":
        odd.append(f"mode {image.mode}: its values above 255 all read as white")
    elif image.mode not in ("L", "RGB"):
        odd.append(f"mode {image.mode}")
    if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
        odd.append(f"{frames} frames, of which the first is read")
    if min(image.size) < 32 or max(image.size) > 3 * min(image.size):
        odd.append(f"{image.width} x {image.height} pixels")
    return odd


def _is_image(name: str) -> bool:
    return _ending(name) in IMG_EXTENSIONS


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _what_else(file: Path) -> str:
    try:
        with Image.open(file) as image:
            return f"an image ({image.format}) that data sets leave unread for its ending"
    except Exception:  # Pillow raises many kinds
        return "not an image"


def count_properties(
    images: Sequence[ImageFile], prints: Sequence[Fingerprint], aside: Mapping[str, str]
) -> dict[str, Any]:
    """Counts, sizes and modes, and the files that are unlike what is expected, as JSON.

    Args:
        images: of the set.
        prints: of the images.
        aside: files that no data set reads, and why.
    """
    readable = [one for one in prints if not one.unreadable]
    sizes = Counter(f"{one.size[0]}x{one.size[1]}" for one in readable)
    modes, formats = Counter(one.mode for one in readable), Counter(one.format for one in readable)
    usual = {name for kind in (sizes, modes) for name, n in kind.items() if n > 0.95 * kind.total()}
    odd = {}
    for image, one in zip(images, prints, strict=True):
        words = list(one.odd)
        for kind, name in ((sizes, f"{one.size[0]}x{one.size[1]}"), (modes, one.mode)):
            if usual & kind.keys() and name not in usual and not one.unreadable:
                words.append(f"{name}, unlike the {max(kind, key=lambda k: kind[k])} of most")
        if words:
            odd[image.file] = "; ".join(words)
    sides = np.array([one.size for one in readable]).reshape(-1, 2)
    return {
        "images": len(images),
        "splits": by_class((image.split or "no split", image.label) for image in images),
        "sizes": dict(sizes.most_common(20)),
        "smallest_and_largest_side": [int(sides.min()), int(sides.max())] if len(sides) else [],
        "modes": dict(modes.most_common()),
        "formats": dict(formats.most_common()),
        "unreadable": {
            image.file: one.unreadable
            for image, one in zip(images, prints, strict=True)
            if one.unreadable
        },
        "odd": odd,
        "not_in_the_set": dict(aside),
    }


def by_class(pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """How often each pair of split and class comes, sorted."""
    counts: dict[str, dict[str, int]] = {}
    for (split, label), n in sorted(Counter(pairs).items()):
        counts.setdefault(split, {})[label] = n
    return counts


@contextmanager
def claimed(
    out: Path, question: Mapping[str, Any], outputs: Sequence[str]
) -> Iterator[sqlite3.Connection]:
    """Hold folder ``out`` for one question; the database of its fingerprints, committed or not.

    Args:
        out: a new or empty folder, or one that this question has begun.
        question: what is asked, as JSON.
        outputs: files that the question writes there.

    Raises:
        FileExistsError: if the folder holds another question's files, or something else's.
        BlockingIOError: if another process is at work in it.
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
            base.execute("CREATE TABLE IF NOT EXISTS question (words TEXT)")
            base.execute(
                "CREATE TABLE IF NOT EXISTS prints "
                "(file TEXT PRIMARY KEY, stamp TEXT, facts TEXT, thumbnail BLOB)"
            )
            words = json.dumps(question)
            for (before,) in base.execute("SELECT words FROM question").fetchall():
                if before != words:
                    got = f"{out}, which holds the answer to another: {before}, now {words}"
                    raise FileExistsError(message("check-data: out", "a new folder", got, fix))
            base.execute("DELETE FROM question")
            base.execute("INSERT INTO question VALUES (?)", [words])
            base.commit()
            yield base
    except sqlite3.Error as error:
        if "locked" in str(error):
            got = f"{out}, where another process is at work"
            raise BlockingIOError(message("check-data: out", "a free folder", got, fix)) from None
        fix = "Make room if the disk is full; delete the file if it is damaged."
        raise OSError(message(str(file), "a database to read and write", error, fix)) from error


def fingerprints(
    root: Path, images: Sequence[ImageFile], base: sqlite3.Connection
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
        made = pool.map(fingerprint, [root / file for file in missing])
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
