"""The images of a folder that nobody has described: in class folders, in splits, or in a table."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kd_lrp_plugin.data.csv_images import plain_value
from kd_lrp_plugin.data.layout import ClassFolders, Tree, is_image, walk
from kd_lrp_plugin.data.leakage.images import ImageFile, ImageList, list_images
from kd_lrp_plugin.data.splits import (
    check_first,
    check_spelling,
    find_column,
    plain_path,
    read_groups,
    read_table,
)
from kd_lrp_plugin.utils.validation import check_known, message

WHERE = "init"
KINDS = ("train", "val", "test")
_SPLIT = re.compile(r"(?P<kind>train|val|test|dev|eval)(ing|id|idation|uation)?", re.IGNORECASE)
_KIND_OF = {"dev": "val", "eval": "test"}
# Words by which a column is known where nobody has named it.
ROLES = {
    "file": ("file", "filename", "filepath", "path", "image", "img"),
    "label": ("label", "class", "target", "diagnosis", "dx", "category"),
    "split": ("split", "partition", "subset"),
    "patient": ("patient", "subject", "group"),
}
_LAYOUTS = "FOLDER/CLASS/ or FOLDER/SPLIT/CLASS/, or a table with columns of file and label"


@dataclass(frozen=True)
class Listing:
    """The images below a folder, and how they were found.

    Attributes:
        folder: the root; files count from here.
        images: all of them; their split is "" where there are none yet.
        ignored: of what is left out, why.
        patients: by file, as far as known.
        layout: how the images lie, in words.
        table: that lists them, or None.
        columns: of the table, or of manifest.csv, by what they stand for.
    """

    folder: Path
    images: Sequence[ImageFile]
    ignored: Mapping[str, str]
    patients: Mapping[str, str]
    layout: str
    table: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def inner_folders(self) -> list[str]:
        """Names of the folders in class folders, which nothing tells apart."""
        if self.table is not None:
            return []
        below = (image.file.rpartition(f"{image.label}/")[2].split("/") for image in self.images)
        return sorted({parts[0] for parts in below if len(parts) > 1})

    @property
    def image_list(self) -> ImageList:
        return ImageList(self.images, self.ignored, self.patients)


def get_split_kind(name: str) -> str | None:
    """What a folder or value named like a split is for: train, val or test; None for others.

    Example:
        >>> [get_split_kind(name) for name in ("Training", "valid", "test", "tests", "cat")]
        ['train', 'val', 'test', None, None]
    """
    found = _SPLIT.fullmatch(name.strip())
    return _KIND_OF.get(found["kind"].lower(), found["kind"].lower()) if found else None


def list_folder(
    folder: Path,
    table: Path | None = None,
    columns: Mapping[str, str] | None = None,
    classes: Sequence[str] = (),
) -> Listing:
    """Find the images of a folder and their classes.

    A class folder may hold folders, whose images are of the class. Folders named like splits are
    splits. A table in the folder says what folders do not; where both say something, and not the
    same, the folder is refused.

    Args:
        folder: holds the images.
        table: CSV that lists them; by default the one in the folder, where there are no classes.
        columns: names of its columns by file, label, split and patient, where they are not known
            by their words; of class folders only patient, of ``<folder>/manifest.csv``.
        classes: names of the class folders, at any depth; by default the uppermost ones.

    Raises:
        FileNotFoundError: if there is no such folder, or no image, table or file of the table.
        ValueError: if classes or splits cannot be told, a table cannot be read, or its columns.
    """
    columns = dict(columns or {})
    for role in columns:
        check_known(f"{WHERE}: column", role, ROLES)
    if not folder.is_dir():
        raise FileNotFoundError(message(WHERE, "a folder of images", f"none at {folder}", ""))
    tree = walk(folder)
    images = [parts for parts in tree.files if is_image(parts[-1]) and parts[0] != "masks"]
    if not images:
        fix = f"Put the images into {_LAYOUTS}."
        raise FileNotFoundError(message(f"{WHERE}: {folder}", "images (.png, ...)", "none", fix))
    if classes:
        if table is not None:
            got, fix = f"--classes with --table {table}", "Leave one of them out."
            raise ValueError(message(f"{WHERE}: classes", "folders or a table", got, fix))
        return _list_class_folders(folder, ClassFolders(tuple(classes)), columns)
    tops = sorted({parts[0] for parts in images if len(parts) > 1})
    splits = [name for name in tops if get_split_kind(name)]
    has_classes = any(len(parts) > 2 for parts in images) if splits else len(tops) > 1
    if table is None and not has_classes:
        table = _find_table(folder, tree)
    if table is not None:
        return list_table(folder, table, columns, [Path(*parts).as_posix() for parts in images])
    if splits and splits != tops:
        others = [name for name in tops if name not in splits]
        got = f"splits {splits} beside {others}"
        fix = "Move the classes into the splits, rename the folders, or give --table."
        raise ValueError(message(f"{WHERE}: {folder}", "splits or classes", got, fix))
    loose = [parts for parts in images if len(parts) == 2]
    if splits and loose:
        got, fix = f"{len(loose)}, such as {'/'.join(loose[0])}", "Move them into class folders."
        expected = "no image beside the classes of a split"
        raise ValueError(message(f"{WHERE}: {folder}", expected, got, fix))
    _refuse_inner_splits(folder, [parts[:-1] for parts in images if not splits])
    depth = 1 + bool(splits)  # of an image in a class folder
    nested = any(len(parts) > depth + 1 for parts in images)
    named = {parts[depth - 1] for parts in images if len(parts) > depth} if nested else ()
    return _list_class_folders(folder, ClassFolders(tuple(sorted(named))), columns)


def _refuse_inner_splits(folder: Path, above: Sequence[Sequence[str]]) -> None:
    """Raise ValueError for splits in class folders, which would all be trained with.

    Args:
        folder: the root, for messages.
        above: of each image, the folders that it lies in below the root.
    """
    inner = sorted({parts[1] for parts in above if len(parts) > 1})
    kinds = {get_split_kind(name) for name in inner} - {None}
    if "train" in kinds and len(kinds) > 1:
        got = f"{[name for name in inner if get_split_kind(name)]} in the folders of classes"
        fix = "Put the class folders into those of the splits: FOLDER/SPLIT/CLASS/."
        raise ValueError(message(f"{WHERE}: {folder}", "splits above the classes", got, fix))


def _list_class_folders(folder: Path, folders: ClassFolders, columns: Mapping[str, str]) -> Listing:
    images, ignored = list_images(folder, folders)
    if wrong := columns.keys() - {"patient"}:
        got = f"{sorted(wrong)} of class folders"
        fix = "Give --table, or the column patient of manifest.csv alone."
        raise ValueError(message(f"{WHERE}: column", "columns of a table", got, fix))
    ignored |= _check_against_tables(folder, images)
    patients: dict[str, str] = {}
    manifest, given = folder / "manifest.csv", columns.get("patient")
    if given is not None and not manifest.is_file():
        fix = f"Write one, with columns file and {given}."
        raise FileNotFoundError(message(f"{WHERE}: column", "a table", f"no {manifest}", fix))
    known = read_table(manifest)[0] if manifest.is_file() else []
    column = _choose_column(manifest, known, "patient", given)
    if column is not None:
        columns = {"patient": column}
        patients = read_groups(manifest, [image.file for image in images], column)
        if not patients:
            got, fix = "none of them", "Name images by their path below the folder."
            raise ValueError(message(f"{WHERE}: {manifest}", "some of the images", got, fix))
    has_splits = any(image.split for image in images)
    layout = "in splits, each with a folder per class" if has_splits else "in a folder per class"
    return Listing(folder, images, ignored, patients, layout, None, columns)


def _check_against_tables(folder: Path, images: Sequence[ImageFile]) -> dict[str, str]:
    """The tables that are not read; ValueError where one names other classes than the folders."""
    classes, unread = {image.label for image in images}, {}
    for table in sorted(folder.glob("*.csv")):
        known, rows = read_table(table)
        found = [_match(known, role) for role in ("file", "label")]
        if table.name != "manifest.csv":
            unread[table.name] = "a table beside class folders: what it says does not count"
        if not all(len(names) == 1 for names in found):
            continue
        (label,) = found[1]
        labels = {row[label] for _, row in rows if row[label]}
        if not labels <= classes:
            got = f"folders {_few(classes)} and labels {_few(labels)} in {table.name}"
            fix = "Give the one that counts by --table, or move the table away."
            raise ValueError(message(f"{WHERE}: {folder}", "one word on the classes", got, fix))
    return unread


def _find_table(folder: Path, tree: Tree) -> Path:
    tables = [parts[0] for parts in tree.files if len(parts) == 1 and parts[0].endswith(".csv")]
    if len(tables) == 1:
        return folder / tables[0]
    if tables:
        fix = "Give it by --table."
        raise ValueError(message(f"{WHERE}: {folder}", "one table", f"{tables}", fix))
    classes = sorted({parts[0] for parts in tree.files if len(parts) > 1})
    got = f"folders {classes}" if classes else "images in no folder"
    fix = f"Put the images of each class into a folder of its own: {_LAYOUTS}."
    raise ValueError(message(f"{WHERE}: {folder}", "two classes or more", got, fix))


def list_table(
    folder: Path, table: Path, columns: Mapping[str, str], images: Sequence[str]
) -> Listing:
    """The images that a table names; see :func:`list_folder`.

    Args:
        folder: their root; a table may also count from one of the folders in it.
        table: a CSV.
        columns: as far as named.
        images: all that lie below the folder.
    """
    where = f"{WHERE}: {table}"
    if not table.is_file():
        raise FileNotFoundError(message(f"{WHERE}: table", "a CSV", f"none at {table}", ""))
    known, _ = read_table(table)
    named = {
        role: name
        for role in ROLES
        if (name := _choose_column(table, known, role, columns.get(role))) is not None
    }
    if len({*named.values()}) < len(named):
        fix = "Name them: --column file=NAME --column label=NAME."
        raise ValueError(message(where, "a column for each of them", named, fix))
    _, rows = read_table(table, [named[role] for role in ("label", "split") if role in named])
    if not rows:
        raise ValueError(message(where, "a row for each image", "an empty table", ""))
    for line, row in rows:
        for role in ("file", "label", "split"):
            if role in named and not row[named[role]]:
                at, fix = f"{where} line {line}", "Fill it in, or delete the line."
                raise ValueError(message(at, f"a {named[role]}", "an empty cell", fix))
    base = _find_base(folder, table, [row[named["file"]] for _, row in rows])
    found, patients = [], {}
    lines: dict[str, int] = {}
    for line, row in rows:
        file = (base / plain_path(folder / base, row[named["file"]], where)).as_posix()
        check_first(where, lines, file, line, file)
        split = row[named["split"]] if "split" in named else ""
        found.append(ImageFile(file, split, plain_value(where, row[named["label"]])))
        if "patient" in named and row[named["patient"]]:
            patients[file] = row[named["patient"]]
    check_spelling(where, "labels", {image.label for image in found})
    for name in sorted({image.split for image in found} - {""}):
        if get_split_kind(name) is None:
            got = f"{name!r} in column {named['split']!r}"
            fix = "Rename its values, or leave the column out of the table."
            raise ValueError(message(where, "splits train, test and perhaps val", got, fix))
    ignored = dict.fromkeys(sorted({*images} - lines.keys()), "an image that the table leaves out")
    found.sort(key=lambda image: image.file.split("/"))
    return Listing(folder, found, ignored, patients, f"listed in {table.name}", table, named)


def _match(columns: Iterable[str], role: str) -> list[str]:
    """The columns whose name has a word of the role; of several, those that are such a word."""
    words = {name: re.split(r"[^a-z]+", name.lower()) for name in columns}
    having = [name for name in words if set(words[name]) & {*ROLES[role]}]
    exact = [name for name in having if name.lower() in ROLES[role]]
    return exact if len(having) > 1 and len(exact) == 1 else having


def _choose_column(table: Path, columns: Sequence[str], role: str, given: str | None) -> str | None:
    if given is not None:
        return find_column(f"{WHERE}: column {role}", table, given, columns)
    found = _match(columns, role)
    if len(found) == 1:
        return found[0]
    if not found and role in ("split", "patient"):
        return None
    got = found or list(columns)
    fix = f"Name it: --column {role}=NAME."
    raise ValueError(message(f"{WHERE}: {table}", f"one column of the {role}", got, fix))


def _find_base(folder: Path, table: Path, files: Sequence[str]) -> Path:
    """The folder, below the root, that the paths of a table count from."""
    for file in files:  # an absolute one would be there from each
        plain_path(folder, file, f"{WHERE}: {table}")
    inner = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    bases = [Path(), *map(Path, inner)]
    absent = {base: [f for f in files if not _is_there(folder / base, f)] for base in bases}
    fits = [base for base in bases if not absent[base]]
    if len(fits) > 1:
        got, fix = f"{[base.as_posix() for base in fits]} alike", "Rename one of the folders."
        raise ValueError(message(f"{WHERE}: {table}", "files in one folder", got, fix))
    if not fits:
        best = min(bases, key=lambda base: len(absent[base]))
        got = f"{len(absent[best])} of {len(files)} that are not there, such as {absent[best][0]!r}"
        fix = "Give paths below the folder, or below one folder in it, with their ending."
        raise FileNotFoundError(message(f"{WHERE}: {table}", f"images in {folder}", got, fix))
    return fits[0]


def _is_there(base: Path, name: str) -> bool:
    return (base / name).is_file() or (base / name.replace("\\", "/")).is_file()


def _few(names: Iterable[str]) -> list[str]:
    found = sorted(names)
    return found[:5] + ["..."] * (len(found) > 5)


def check_counts(listing: Listing) -> None:
    """Raise ValueError unless there are splits and images enough to train, choose and test.

    What the leak check leaves out comes off later, and is looked at again.
    """
    where = f"{WHERE}: {listing.folder}"
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for image in listing.images:
        counts[image.split][image.label] += 1
    classes = sorted({image.label for image in listing.images})
    if len(classes) < 2:
        fix = f"Put the images of each class into a folder of its own: {_LAYOUTS}."
        raise ValueError(message(where, "two classes or more", f"one, {classes[0]!r}", fix))
    for split, found in counts.items():
        if missing := [name for name in classes if not found[name]]:
            got, fix = f"none of {missing} in {split!r}", "Give each split images of each class."
            raise ValueError(message(where, "the same classes in each split", got, fix))
    roles = name_splits(listing.folder, counts)
    least = 2 if roles["val"] is None else 1
    if list(counts) == [""]:
        least = 3  # for training, validation and test
    name, count = min(counts[roles["train"] or ""].items(), key=lambda pair: pair[1])
    if count < least:
        got = f"{count} of {name!r}"
        raise ValueError(message(where, f"{least} images or more to a class", got, "Add some."))


def name_splits(folder: Path, names: Iterable[str]) -> dict[str, str | None]:
    """Which split is for training, validation and test.

    Args:
        folder: for messages.
        names: of the splits; "" alone for none yet.

    Returns:
        By train, val and test the name. Without a split of its own, val is None: it is cut out of
        train. Where there is no test set, the validation set is taken for it.

    Raises:
        ValueError: for several splits for one thing, or none for training or test.
    """
    kinds: dict[str, list[str]] = {kind: [] for kind in KINDS}
    found = sorted(names)
    if found == [""]:
        return {"train": "", "val": None, "test": ""}
    for name in found:
        kinds[str(get_split_kind(name))].append(name)
    if not kinds["test"]:
        kinds["test"], kinds["val"] = kinds["val"], []
    if any(len(found) > 1 for found in kinds.values()) or not (kinds["train"] and kinds["test"]):
        fix = "Keep one of each; move the others away."
        expected = "a split for training, one for test and perhaps one for validation"
        raise ValueError(message(f"{WHERE}: {folder}", expected, found, fix))
    return {kind: next(iter(names), None) for kind, names in kinds.items()}
