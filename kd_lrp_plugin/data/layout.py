"""Which files below a folder are images of which class: one answer for data sets and checks.

``<folder>/<class>/`` holds the images of a class, in folders of any depth below it. Left out, each
with a reason, are hidden folders and files (``.ipynb_checkpoints``, ``._1.png``), ``__MACOSX``,
folders and files of masks, images whose ending is not read (``.gif``), symbolic links that lead
back to a folder above them, and what is no regular file. What cannot be told is a problem: class
names that differ in case only, a class without images, a folder that belongs to two classes, and
splits or classes nested deeper.
"""

import os
import re
import stat
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from kd_lrp_plugin.data.images import ascii_name, is_text
from kd_lrp_plugin.utils.validation import message

_MASKS = r"masks?|segmentations?|segs?|annotations?|labels?|contours?|ground[ _-]?truths?|gt"
_MASK_FOLDER = re.compile(rf"({_MASKS})|(?P<of>.+?)[ _-]({_MASKS})", re.IGNORECASE)
_MASK_FILE = re.compile(rf"(?P<of>.+?)[ _-]?({_MASKS})([ _-]?\d+)?", re.IGNORECASE)
# Images all the same, which torchvision's folders leave unread.
_OTHER_IMAGES = (".gif", ".avif", ".heic", ".heif", ".jfif", ".jp2", ".j2k", ".tga", ".dcm", ".nii")
_METADATA = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found")


class Layout(NamedTuple):
    """The image files of class folders.

    Attributes:
        classes: sorted names of those that hold images.
        images: paths below the folder, in parts, of which the first is the class; in the order of
            torchvision's ``ImageFolder``.
        ignored: by path below the folder, why it is left out.
        empty: class folders without an image.
        problems: what keeps it from being a data set, as messages.
    """

    classes: list[str]
    images: list[tuple[str, ...]]
    ignored: dict[str, str]
    empty: list[str]
    problems: list[str]


class Tree(NamedTuple):
    """What lies below a folder: regular files, those left out, and where folders came from.

    Attributes:
        files: paths in parts, sorted.
        ignored: by path, why it is left out.
        folders: by device and inode, the paths in parts at which a folder was met.
    """

    files: list[tuple[str, ...]]
    ignored: dict[str, str]
    folders: dict[tuple[int, int], list[tuple[str, ...]]]


def read_layout(folder: Path, classes: Collection[str] = ()) -> Layout:
    """The classes and images below a folder.

    Args:
        folder: it holds one folder per class.
        classes: names of folders that are classes whatever they look like, if it is known.

    Raises:
        ValueError: if the name of an image is not UTF-8.
    """
    return arrange(folder, walk(folder), classes)


def walk(folder: Path) -> Tree:
    """All files below a folder, symbolic links followed.

    Raises:
        OSError: if a folder cannot be listed.
    """
    tree = Tree([], {}, {})
    _walk(folder, (), [_identify(above) for above in folder.resolve().parents], tree)
    tree.files.sort()
    return tree


def _walk(folder: Path, parts: tuple[str, ...], above: list[tuple[int, int]], tree: Tree) -> None:
    identity = _identify(folder)
    if identity in above:
        tree.ignored[ascii_name("/".join(parts))] = "a link to a folder that holds it"
        return
    tree.folders.setdefault(identity, []).append(parts)
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        own = (*parts, entry.name)
        file = ascii_name("/".join(own))
        if entry.name.startswith(".") or entry.name.lower() in _METADATA:
            if _is_folder(entry) or is_image(entry.name):
                tree.ignored[file] = "hidden" if entry.name[0] == "." else "made by the system"
        elif _is_folder(entry):
            _walk(Path(entry.path), own, [*above, identity], tree)
        elif (kind := _describe_special(entry)) is not None:
            tree.ignored[file] = kind
        else:
            tree.files.append(own)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identify(folder: Path) -> tuple[int, int]:
    about = folder.stat()
    return about.st_dev, about.st_ino


def _describe_special(entry: os.DirEntry) -> str | None:
    """What a path is that is neither file nor folder; None also for links that lead nowhere."""
    try:
        mode = entry.stat().st_mode
    except OSError:
        return None  # whoever reads it says so
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return f"{kinds.get(stat.S_IFMT(mode), 'a device')}, no file"


def is_image(name: str) -> bool:
    """Whether a file counts as an image, by its ending."""
    return os.path.splitext(name)[1].lower() in IMG_EXTENSIONS


def arrange(folder: Path, tree: Tree, classes: Collection[str] = (), at: tuple = ()) -> Layout:
    """The classes of one folder of a tree.

    Args:
        folder: the root of the tree.
        tree: from :func:`walk`.
        classes: as for :func:`read_layout`.
        at: path of the class folders below the root, in parts.

    Raises:
        ValueError: if the name of an image is not UTF-8.
    """
    depth, prefix = len(at), "".join(f"{part}/" for part in at)
    ignored = {
        file.removeprefix(prefix): why
        for file, why in tree.ignored.items()
        if file.startswith(prefix)
    }
    below = [parts[depth:] for parts in tree.files if parts[:depth] == at]
    images = [parts for parts in below if is_image(parts[-1])]
    for parts in images:
        if not is_text("/".join(parts)):
            got, fix = ascii_name("/".join(parts)), "Rename it."
            raise ValueError(message(f"images {folder}", "names in UTF-8", got, fix))
    masks: set[tuple[str, ...]] = set()
    for mask_folder, members in _find_mask_folders(images, classes).items():
        ignored["/".join(mask_folder)] = f"a folder of {len(members):,} masks"
        masks |= members
    for parts in sorted(found := _find_mask_files([p for p in images if p not in masks])):
        ignored["/".join(parts)] = f"the mask of {_find_masked_stem(parts[-1])}"
    for parts in below:
        ending = os.path.splitext(parts[-1])[1].lower()
        if ending in _OTHER_IMAGES and len(parts) > 1:
            why = f"an image ({ending[1:].upper()}) that data sets leave unread for its ending"
            ignored[ascii_name("/".join(parts))] = why
    for parts in images:
        if len(parts) == 1:
            ignored[parts[0]] = "an image in no class folder"
    images = [parts for parts in images if len(parts) > 1 and parts not in masks | found]
    images.sort(key=lambda parts: (parts[0], "/".join(parts[:-1]), parts[-1]))
    named = sorted({parts[0] for parts in images})
    paths = [path[depth:] for same in tree.folders.values() for path in same if path[:depth] == at]
    given = {path[0] for path in paths if len(path) == 1} - ignored.keys()
    problems = [*_find_problems(f"images {Path(folder, *at)}", tree, at, images, named)]
    problems += _find_nested(f"images {Path(folder, *at)}", images, named, classes)
    empty = sorted(map(ascii_name, given - {*named}))
    return Layout(named, images, ignored, empty, problems)


def _find_mask_folders(
    images: Sequence[tuple[str, ...]], classes: Collection[str]
) -> dict[tuple[str, ...], set[tuple[str, ...]]]:
    """Folders that are named like masks, and where most have the name of another image."""
    folders: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for parts in images:
        for depth, name in enumerate(parts[:-1]):
            if _MASK_FOLDER.fullmatch(name) and not (depth == 0 and name in classes):
                folders.setdefault(parts[: depth + 1], set()).add(parts)
                break
    inside = set().union(*folders.values())
    outside = [parts for parts in images if parts not in inside]
    stems = {_get_stem(parts[-1]) for parts in outside}
    found = {}
    for folder, members in folders.items():
        named = _MASK_FOLDER.fullmatch(folder[-1])
        level = len(folder) - 1
        beside = {parts[level] for parts in outside if parts[:level] == folder[:level]}
        known = [
            bool({_get_stem(parts[-1]), _find_masked_stem(parts[-1])} & stems) for parts in members
        ]
        # Of with_mask and without_mask neither is another class' masks.
        if named and named["of"] in {None, *beside} and 2 * sum(known) > len(known):
            found[folder] = members
    return found


def _find_mask_files(images: Sequence[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Images such as ``1_mask.png`` beside ``1.png``."""
    known = {(*parts[:-1], _get_stem(parts[-1])) for parts in images}
    return {parts for parts in images if (*parts[:-1], _find_masked_stem(parts[-1])) in known}


def _get_stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _find_masked_stem(name: str) -> str | None:
    found = _MASK_FILE.fullmatch(_get_stem(name))
    return found["of"] if found else None


def find_alike(names: Collection[str]) -> list[list[str]]:
    """Names that some file systems, and most readers, take for one.

    Example:
        >>> find_alike(["cat", "dog", "Cat", "cat "])
        [['Cat', 'cat', 'cat ']]
    """
    spelt: dict[str, list[str]] = {}
    for name in sorted(names):
        key = unicodedata.normalize("NFKC", name).casefold().strip()
        spelt.setdefault(key, []).append(name)
    return [alike for alike in spelt.values() if len(alike) > 1]


def _find_problems(
    where: str,
    tree: Tree,
    at: tuple[str, ...],
    images: Sequence[tuple[str, ...]],
    named: Sequence[str],
) -> Iterator[str]:
    for alike in find_alike(named):
        fix = "Put their images into one folder."
        yield message(where, "class names that differ in more than case", alike, fix)
    depth, used = len(at), {parts[:k] for parts in images for k in range(1, len(parts))}
    for same in tree.folders.values():
        paths = [path[depth:] for path in same if path[:depth] == at]
        owners = sorted({path[0] for path in paths if path in used})
        if len(owners) > 1:
            fix = "Remove the link from one of them."
            yield message(where, "a folder in one class alone", f"one in {owners}", fix)


def _find_nested(
    where: str,
    images: Sequence[tuple[str, ...]],
    named: Sequence[str],
    classes: Collection[str],
) -> Iterator[str]:
    """Folders that hold classes rather than being one."""
    below: dict[str, list[tuple[str, ...]]] = {name: [] for name in named}
    for parts in images:
        below[parts[0]].append(parts[1:-1])
    fix = "Give the folder that holds the class folders, or list these folders in classes."
    inner = {name: _list_branches(folders) for name, folders in below.items()}
    shared = set.intersection(*inner.values()) if inner else set()
    if len(shared) > 1 and not set(named) & set(classes):
        got = f"{[*named]}, which hold folders {sorted(shared)}"
        yield message(where, "one folder per class", got, fix)
        return
    for name in named:
        others = {folders[0] for folders in below[name] if folders} & set(named) - {name}
        if name not in classes and others:
            got = f"{name!r}, which holds folders named like classes: {sorted(others)}"
            yield message(where, "one folder per class", got, fix)


def _list_branches(folders: Sequence[tuple[str, ...]]) -> set[str]:
    """Where the way to images parts below a class; none if images lie there, too."""
    ends = zip(min(folders), max(folders), strict=False)
    depth = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    if any(len(parts) == depth for parts in folders):
        return set()
    return {parts[depth] for parts in folders}
