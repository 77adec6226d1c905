"""Which files below a folder are images of which class: one answer for data sets and checks.

``<folder>/<class>/`` holds the images of a class, in one sub-folder of it at most; where the names
of the classes are given, class folders may lie at any depth, and hold sub-folders of any number
(:class:`ClassFolders`). Left out, each with a reason, are hidden folders and files
(``.ipynb_checkpoints``, ``._1.png``), ``__MACOSX``, folders and files of masks, images whose ending
is not read (``.gif``), symbolic links that lead back to a folder above them, and what is no regular
file. What cannot be told is a problem: class names that differ in case only, a class without
images, images of a class in several sub-folders, a folder that belongs to two classes, and splits
or classes nested deeper.
"""

import os
import re
import stat
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
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

Parts = tuple[str, ...]
"""A path below some folder."""


@dataclass(frozen=True)
class ClassFolders:
    """What is said of class folders: which they are, and what lies in them.

    Attributes:
        classes: names of folders that are classes whatever they look like. Where none of the
            uppermost folders has such a name, they are looked for at any depth.
        images: the sub-folder of each class folder that holds its images; all else in it is left
            out. "" for the class folder itself, or the only sub-folder.
        masks: the folder that holds the masks, in the place of ``images`` in an image's path, or
            without that in a folder beside the image. "" for none.
        bits: of the images' values, as for :class:`kd_lrp_plugin.data.folder.FolderImages`.

    Raises:
        ValueError: for what is no name of a folder, or one name for both.

    Example:
        >>> folders = ClassFolders(images="images", masks="lung masks")
        >>> [str(path) for path in folders.list_masks(Path("Train/Normal/images/1.jpg"))]
        ['Train/Normal/lung masks/1.png', 'Train/Normal/lung masks/1.jpg']
    """

    classes: tuple[str, ...] = ()
    images: str = ""
    masks: str = ""
    bits: int | None = None

    def __post_init__(self) -> None:
        for name in ("images", "masks"):
            value = getattr(self, name)
            if not isinstance(value, str) or "/" in value or "\\" in value or value in (".", ".."):
                fix = "Such as images, or lung masks."
                raise ValueError(message(name, "the name of a sub-folder", repr(value), fix))
        if self.masks and self.masks == self.images:
            raise ValueError(message("masks", "another folder than images", repr(self.masks), ""))

    def list_masks(self, file: Path) -> list[Path]:
        """Where the mask of an image may lie, by its path below the root; nowhere without masks."""
        *above, name = file.parts
        if not self.masks or (self.images and self.images not in above):
            return []
        if self.images:
            above[len(above) - 1 - above[::-1].index(self.images)] = self.masks
        else:
            above.append(self.masks)
        return [Path(*above, each) for each in dict.fromkeys((f"{_get_stem(name)}.png", name))]

    def find_mask(self, root: Path, file: Path) -> Path | None:
        """The mask of an image, by their paths below the root; None where there is none."""
        return next(
            (root / path for path in self.list_masks(file) if (root / path).is_file()), None
        )

    def holds(self, path: Parts) -> bool:
        """Whether a path, from the class folder on, is that of an image in its sub-folder."""
        return not self.images or (len(path) > 2 and path[1] == self.images)

    def count_unmasked(self, where: str, root: Path, files: Sequence[str]) -> int:
        """How many images have no mask.

        Args:
            where: who asks, for messages.
            root: of the data set.
            files: paths of the images below it.

        Raises:
            ValueError: if none of them has one.
        """
        count = sum(self.find_mask(root, Path(file)) is None for file in files)
        if count == len(files):
            got = f"none of {count:,} images"
            fix = "Correct the names of the sub-folders images and masks, or leave masks out."
            expected = f"a mask or more in folders {self.masks!r}"
            raise ValueError(message(f"{where}: masks", expected, got, fix))
        return count


PLAIN = ClassFolders()
"""Nothing is said."""


class Layout(NamedTuple):
    """The image files of class folders.

    Attributes:
        classes: sorted names of those that hold images.
        images: paths below the folder, in parts, and their class; in the order of torchvision's
            ``ImageFolder``.
        ignored: by path below the folder, why it is left out.
        empty: class folders without an image.
        problems: what keeps it from being a data set, as messages.
    """

    classes: list[str]
    images: dict[Parts, str]
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

    files: list[Parts]
    ignored: dict[str, str]
    folders: dict[tuple[int, int], list[Parts]]


def read_layout(folder: Path, folders: ClassFolders = PLAIN) -> Layout:
    """The classes and images below a folder.

    Args:
        folder: it holds the class folders.
        folders: what is known of them.

    Raises:
        ValueError: if the name of an image is not UTF-8.
    """
    return arrange(folder, walk(folder), folders)


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


def arrange(folder: Path, tree: Tree, folders: ClassFolders = PLAIN, at: Parts = ()) -> Layout:
    """The classes of one folder of a tree.

    Args:
        folder: the root of the tree.
        tree: from :func:`walk`.
        folders: as for :func:`read_layout`.
        at: path of the folder that holds the class folders, below the root, in parts.

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
    tops = {parts[0] for parts in images if len(parts) > 1}
    deep = bool(folders.classes) and tops.isdisjoint(folders.classes)
    start = {parts: find_class(parts[:-1], folders.classes) if deep else 0 for parts in images}
    masks: set[Parts] = set()
    for mask_folder, members in _find_mask_folders(start, folders).items():
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
    where = f"images {Path(folder, *at)}"
    own = {parts: parts[start[parts] :] for parts in images}  # from the class folder on
    problems = [*_find_missing(where, [*own.values()], folders.images)]
    if folders.images:
        for parts in [parts for parts, path in own.items() if not folders.holds(path)]:
            outside = parts[: max(start[parts] + 2, 2)]
            ignored["/".join(outside)] = f"outside of the folder {folders.images!r}"
            del own[parts]
    labels = {parts: path[0] for parts, path in own.items()}
    named = sorted({*labels.values()})
    paths = [path[depth:] for same in tree.folders.values() for path in same if path[:depth] == at]
    given = {
        path[-1]
        for path in paths
        if path and (path[-1] in folders.classes if deep else len(path) == 1)
    }
    problems += _find_problems(where, tree, at, labels)
    problems += _find_nested(where, [*own.values()], folders)
    empty = sorted(map(ascii_name, given - ignored.keys() - {*named}))
    return Layout(named, labels, ignored, empty, problems)


def find_class(path: Parts, classes: Collection[str]) -> int:
    """How deep the class folder of a path lies: the first of such a name, or the uppermost."""
    return next((depth for depth, part in enumerate(path) if part in classes), 0)


def _find_mask_folders(
    images: Mapping[Parts, int], folders: ClassFolders
) -> dict[Parts, set[Parts]]:
    """Folders that are said to hold masks, or named like masks and where most have the name of
    another image.

    Args:
        images: and how deep their class folders lie.
        folders: what is known of them.
    """
    found: dict[Parts, set[Parts]] = {}
    for parts, start in images.items():
        for depth, name in enumerate(parts[:-1]):
            if depth == start and name in folders.classes:
                continue
            said = name == folders.masks and depth > start
            if said or (_MASK_FOLDER.fullmatch(name) and name != folders.images):
                found.setdefault(parts[: depth + 1], set()).add(parts)
                break
    inside = set().union(*found.values())
    outside = [parts for parts in images if parts not in inside]
    stems = {_get_stem(parts[-1]) for parts in outside}
    for folder, members in list(found.items()):
        if folder[-1] == folders.masks:
            continue
        named = _MASK_FOLDER.fullmatch(folder[-1])
        level = len(folder) - 1
        beside = {parts[level] for parts in outside if parts[:level] == folder[:level]}
        known = [
            bool({_get_stem(parts[-1]), _find_masked_stem(parts[-1])} & stems) for parts in members
        ]
        # Of with_mask and without_mask neither is another class' masks.
        fits = named and (
            named["of"] in {None, *beside} or (level > 0 and any(map(is_image, beside)))
        )
        if not fits or 2 * sum(known) <= len(known):
            del found[folder]
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


def _find_problems(where: str, tree: Tree, at: Parts, labels: Mapping[Parts, str]) -> Iterator[str]:
    for alike in find_alike({*labels.values()}):
        fix = "Put their images into one folder."
        yield message(where, "class names that differ in more than case", alike, fix)
    owners_of: dict[Parts, set[str]] = {}
    for parts, label in labels.items():
        for k in range(1, len(parts)):
            owners_of.setdefault(parts[:k], set()).add(label)
    depth = len(at)
    for same in tree.folders.values():
        paths = [path[depth:] for path in same if path[:depth] == at]
        owners = sorted(set().union(*(owners_of.get(path, ()) for path in paths)))
        if len(paths) > 1 and len(owners) > 1:
            fix = "Remove the link from one of them."
            yield message(where, "a folder in one class alone", f"one in {owners}", fix)


def _find_missing(where: str, images: Sequence[Parts], name: str) -> Iterator[str]:
    """Class folders without the sub-folder that is said to hold their images."""
    holders = {path[0] for path in images if ClassFolders(images=name).holds(path)}
    if lacking := sorted({path[0] for path in images} - holders) if name else []:
        inner = sorted({path[1] for path in images if path[0] in lacking and len(path) > 2})
        got = f"none in {lacking}, which hold {inner or 'images'}"
        expected = f"a sub-folder {name!r} of images in each class folder"
        yield message(where, expected, got, "Correct images, or leave it out.")


def _find_nested(where: str, images: Sequence[Parts], folders: ClassFolders) -> Iterator[str]:
    """Folders that hold classes, or others beside the images, rather than being a class.

    Args:
        where: the folder, for messages.
        images: paths of images from their class folder on.
        folders: what is known of them.
    """
    below: dict[str, list[Parts]] = {}
    for path in images:
        below.setdefault(path[0], []).append(path[1 + bool(folders.images) : -1])
    named, classes = sorted(below), folders.classes
    fix = (
        "Give the folder that holds the class folders; name the sub-folder of the images by "
        "images; or list the class folders, which may lie deeper, in classes."
    )
    inner = {name: _list_branches(found) for name, found in below.items()}
    shared = set.intersection(*inner.values()) if inner else set()
    if len(shared) > 1 and not {*named} & {*classes}:
        got = f"{[*named]}, which hold folders {sorted(shared)}"
        yield message(where, "one folder per class", got, fix)
        return
    for name in named:
        if name in classes:
            continue
        others = {folders[0] for folders in below[name] if folders} & {*named} - {name}
        if others:
            got = f"{name!r}, which holds folders named like classes: {sorted(others)}"
            yield message(where, "one folder per class", got, fix)
        elif len(inner[name]) > 1:
            got = f"images of {name!r} in {sorted(inner[name])}"
            yield message(where, "images of a class in one sub-folder", got, fix)


def _list_branches(folders: Sequence[Parts]) -> set[str]:
    """Where the way to images parts below a class."""
    ends = zip(min(folders), max(folders), strict=False)
    depth = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    return {parts[depth] for parts in folders if len(parts) > depth}
