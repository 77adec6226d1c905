"""Files that cannot be read, and classes that do not agree."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import repeat
from typing import Any

from kd_lrp_plugin.data import verified
from kd_lrp_plugin.data.images import ImageLoader, decode_image, is_text
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message


def check_same_classes(**datasets: Any) -> None:
    """Raise ``ValueError`` unless all named datasets list the same classes in the same order.

    Example:
        >>> from kd_lrp_plugin.data.phantom.dataset import Phantom
        >>> check_same_classes(train=Phantom(split="train"), test=Phantom(split="test"))
    """
    classes = {name: list(dataset.classes) for name, dataset in datasets.items()}
    if len({tuple(names) for names in classes.values()}) > 1:
        fix = "Give every set the same class folders; their sorted order numbers the classes."
        raise ValueError(message("datasets", "sets with the same classes", classes, fix))


def unreadable_images(
    dataset: Any, most: int | None = None, where: str = "images"
) -> dict[str, str]:
    """The files of a data set that cannot be read to the end, and why.

    What was read before and is unchanged, see :mod:`kd_lrp_plugin.data.verified`, is not read
    again; how many these are, current progress is told.

    Args:
        dataset: with ``samples`` (file, label) and perhaps its own ``loader``, as torchvision's
            folders have; of others nothing is known, and nothing returned.
        most: read so many at most, spread evenly over those that were not read before; of the
            others, only such as are not there, or empty, are found. None for all.
        where: who asks, for what progress is told.

    Example:
        >>> from kd_lrp_plugin.data.phantom.dataset import Phantom
        >>> unreadable_images(Phantom(size=4))
        {}
    """
    files = list(dict.fromkeys(str(file) for file, _ in getattr(dataset, "samples", [])))
    loader = getattr(dataset, "loader", ImageLoader())
    ours = isinstance(loader, ImageLoader)
    stamps = {file: verified.stamp(file, loader.bits if ours else None) for file in files}
    known = verified.find_verified(stamps) if ours else set()
    new = [file for file in files if file not in known]
    taken = set(new)
    if most is not None and len(new) > most:
        taken = {new[index * len(new) // most] for index in range(most)}
        taken |= {file for file in new if not stamps[file] or os.path.getsize(file) == 0}
    to_read = [file for file in new if file in taken]
    with ThreadPoolExecutor() as pool:
        reasons = pool.map(_why_unreadable, to_read, repeat(loader), map(stamps.get, to_read))
        tracked = current_progress().track(reasons, "reading images", len(to_read))
        found = dict(zip(to_read, tracked, strict=True))
    if ours:
        verified.remember_verified((file, stamps[file]) for file, why in found.items() if not why)
    if len(to_read) < len(files):
        left = len(new) - len(to_read)
        words = f"{where}: of {len(files):,} files {len(known):,} read before and unchanged"
        rest = f", {left:,} not read yet: training names those that it cannot read" if left else ""
        current_progress().note(f"{words}, {len(to_read):,} read now{rest}")
    return {file: why for file, why in found.items() if why}


@cache
def _why_unreadable(file: str, loader: Callable[[str], object], stamp: str) -> str | None:
    """Asked again for an unchanged file, the answer is remembered."""
    if not is_text(file):  # it could not be written into predictions.csv
        return "a name that is not UTF-8; rename it"
    try:
        if isinstance(loader, ImageLoader):
            decode_image(file, loader.bits)  # its errors do not name the file
        else:
            loader(file)
    except FileNotFoundError:
        return "no such file"
    except ValueError as error:
        return str(error)
    except Exception as error:  # Pillow raises many kinds
        return f"{type(error).__name__}: {error}".replace(f"'{file}'", "it")
    return None


def check_flags(where: str, **flags: object) -> None:
    """Raise ``ValueError`` for a switch that is neither True nor False: any text counts as True."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(message(f"{where} {name}", "True or False", repr(value), ""))


def check_integer(where: str, name: str, value: object, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(message(where, f"an integer {name} of {least} or more", repr(value), ""))
