"""Files that cannot be read, and classes that do not agree."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import repeat
from typing import Any

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


def unreadable_images(dataset: Any) -> dict[str, str]:
    """The files of a data set that cannot be read to the end, and why.

    Args:
        dataset: with ``samples`` (file, label) and perhaps its own ``loader``, as torchvision's
            folders have; of others nothing is known, and nothing returned.

    Example:
        >>> from kd_lrp_plugin.data.phantom.dataset import Phantom
        >>> unreadable_images(Phantom(size=4))
        {}
    """
    files = [str(file) for file, _ in getattr(dataset, "samples", [])]
    stamps = [os.stat(f).st_mtime_ns if os.path.exists(f) else 0 for f in files]
    loader = getattr(dataset, "loader", ImageLoader())
    with ThreadPoolExecutor() as pool:
        reasons = pool.map(_why_unreadable, files, repeat(loader), stamps)
        tracked = current_progress().track(reasons, "reading images", len(files))
        return {file: why for file, why in zip(files, tracked, strict=True) if why}


@cache
def _why_unreadable(file: str, loader: Callable[[str], object], stamp: int) -> str | None:
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
