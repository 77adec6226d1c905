"""Decoded, resized images that are kept in memory, for every epoch after the first."""

import mmap
import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2

from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import check_known, message

CACHES = ("memory",)
SHARE = 0.5  # of the machine's memory, for all that is kept
_RESIZES = (transforms.Resize, v2.Resize)
_SURE = (*_RESIZES, transforms.Grayscale, v2.Grayscale, transforms.CenterCrop, v2.CenterCrop)
_GROUPS, _LIMITS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_ALIVE: "WeakSet[PixelMemory]" = WeakSet()


class PixelMemory:
    """The images of a data set as they are after the first steps of its transform, as bytes.

    Kept is what comes out of the steps Grayscale, Resize and CenterCrop of torchvision with which
    the transform begins; all that follows, such as random augmentation, is done again for each
    item. So items are, bit for bit, what they would be otherwise. An image is read when it is
    first asked for. The memory is one for this process and those that are forked from it, as the
    workers of a loader are on Linux; what a worker has read, those of the next epoch find.

    Args:
        where: who asks, for messages.
        keys: what tells the images apart, such as their files.
        transform: of the data set.

    Attributes:
        transform: as given; for items of another transform this memory is of no use.
        bytes: that are taken once every image was read.

    Raises:
        ValueError: if the transform begins with other steps, or does not bring images to one size
            by them; or if all that is kept would take more than half of the machine's memory.
    """

    def __init__(self, where: str, keys: Sequence[str], transform: Any) -> None:
        steps = getattr(transform, "transforms", [transform])
        count = next((n for n, step in enumerate(steps) if type(step) not in _SURE), len(steps))
        self._where, self.transform = where, transform
        self._prepare = transforms.Compose(steps[:count])
        self._finish = transforms.Compose(steps[count:])
        self._check_steps(steps, count)
        trials = [self._prepare(Image.new("RGB", size)) for size in ((64, 48), (48, 64))]
        if trials[0].size != trials[1].size:
            fix = "Give Resize both sides, such as [96, 96], or add CenterCrop."
            got = f"sizes such as {trials[0].size} and {trials[1].size}"
            raise ValueError(message(f"{where} cache", "images of one size", got, fix))
        self._slots = {key: slot for slot, key in enumerate(dict.fromkeys(keys))}
        shape = np.asarray(trials[0]).shape
        self.bytes = len(self._slots) * int(np.prod(shape))
        self._check_room(shape)
        # Unlike /dev/shm, such memory has no limit of its own, and takes room as it is filled.
        whole = mmap.mmap(-1, max(1, self.bytes + len(self._slots)))
        values = np.frombuffer(whole, np.uint8)
        self._pixels = values[: self.bytes].reshape(-1, *shape)
        self._filled = values[self.bytes :]
        _ALIVE.add(self)

    def _check_steps(self, steps: Sequence[Any], count: int) -> None:
        if any(isinstance(step, _RESIZES) for step in steps[:count]):
            return
        got = f"{type(steps[count]).__name__} before any Resize" if count < len(steps) else "none"
        fix = "Put Resize first, since what is kept cannot change by chance; or leave cache out."
        expected = "a transform that begins with Resize (or Grayscale, CenterCrop)"
        raise ValueError(message(f"{self._where} cache", expected, got, fix))

    def _check_room(self, shape: Sequence[int]) -> None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        needed, room = self.bytes * processes, SHARE * get_memory()
        others = sum(other.bytes for other in _ALIVE) * processes
        size = " x ".join(map(str, shape))
        words = f"{len(self._slots):,} images of {size} bytes"
        if needed + others > room:
            got = f"{_gib(needed)} for {words}" + f", beside {_gib(others)}" * bool(others)
            got += f", in {processes} processes" * (processes > 1)
            expected = f"at most {_gib(room)}, {SHARE:.0%} of the memory"
            fix = "Lower image_size, or leave cache out."
            raise ValueError(message(f"{self._where} cache", expected, got, fix))
        current_progress().note(f"{self._where}: {words} are kept in memory, {_gib(needed)}")

    def item(self, key: str, read: Callable[[], Image.Image]) -> Any:
        """An image, transformed.

        Args:
            key: of the image; one that was not named in the beginning is not kept.
            read: gives the image as it is before the transform.
        """
        slot = self._slots.get(key)
        if slot is None:
            return self.transform(read())
        if not self._filled[slot]:
            self._pixels[slot] = np.asarray(self._prepare(read()))
            self._filled[slot] = 1  # behind the pixels: a worker that is killed leaves no half
        return self._finish(Image.fromarray(self._pixels[slot]))

    def change(self, transform: Any, change: Callable[[Any], Any]) -> "PixelMemory":
        """Another of the same memory, for a copy of the data set with a changed transform.

        Args:
            transform: of the copy.
            change: what follows on the kept images, in the same way.
        """
        found = object.__new__(PixelMemory)
        vars(found).update(vars(self), transform=transform, _finish=change(self._finish))
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> "PixelMemory":
        """Another of the same memory, for a copy of the data set with a copy of its transform."""
        found = object.__new__(PixelMemory)
        changed = {name: deepcopy(vars(self)[name], memo) for name in ("transform", "_finish")}
        vars(found).update(vars(self), **changed)
        return found

    def __reduce__(self) -> Any:
        fix = "Add multiprocessing_context: fork to the loader's kwargs, or set num_workers: 0."
        got = "another way to start them"
        raise ValueError(message(f"{self._where} cache", "workers that are forked", got, fix))


def make_memory(
    where: str, cache: str | None, keys: Sequence[str], transform: Any
) -> PixelMemory | None:
    """What the keyword ``cache`` of a data set asks for.

    Raises:
        ValueError: for an unknown cache; see :class:`PixelMemory`.

    Example:
        >>> make_memory("mine", None, [], None) is None
        True
    """
    if cache is None:
        return None
    check_known(f"{where} cache", cache, CACHES)
    return PixelMemory(where, keys, transform)


def get_memory() -> int:
    """Bytes of memory that this machine has, or that this process is allowed to take."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in _list_limits():
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            found.append(int(text))
    return min(found)


def _list_limits() -> list[Path]:
    """Where the limits of this process's control group may be, and of those around it.

    A job of SLURM, for example, has a group of its own, while the outermost has no limit.
    """
    try:
        lines = _GROUPS.read_text().splitlines()
    except OSError:
        lines = []
    found = [_LIMITS / "memory.max", _LIMITS / "memory" / "memory.limit_in_bytes"]
    for line in lines:
        _, kinds, path = line.split(":", 2)
        version_1 = "memory" in kinds.split(",")
        if kinds and not version_1:
            continue
        top = _LIMITS / "memory" if version_1 else _LIMITS
        name = "memory.limit_in_bytes" if version_1 else "memory.max"
        inside = Path(path.lstrip("/"))
        found += [top / group / name for group in (inside, *inside.parents)]
    return found


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
