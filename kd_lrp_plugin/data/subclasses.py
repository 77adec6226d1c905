"""A data set whose labels are subclasses, while its classes stay what is reported."""

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset

from kd_lrp_plugin.data.clusters import Table, look_up, name_subclasses
from kd_lrp_plugin.data.validation import check_integer
from kd_lrp_plugin.utils.validation import UNLABELLED, message

_WHERE = "subclasses"


class Subclasses(Dataset):
    """The images of a data set, labelled by subclass: (image, subclass index).

    A model of them has an output per subclass. Everything else, such as groups, masks or files, is
    that of the images.

    Args:
        images: a data set with known subclasses, as of
            :class:`~kd_lrp_plugin.data.csv_images.CsvImages` and
            :class:`~kd_lrp_plugin.data.mnist.Mnist`; with ``per_class`` any with ``targets`` and
            ``classes``.
        per_class: so many subclasses of each class that nobody knows; the model finds them. Labels
            are then the number of subclasses plus the class index, which only losses of subclasses
            take.
        table: known subclasses by the names of the images: a CSV of columns image, class and
            subclass, or what ``kmeans_subclasses`` returns. Names are paths below the folder of the
            data, of digits such as "train 17".

    Attributes:
        classes: names of the classes.
        subclasses: of the subclasses, in the order of the outputs.
        subclass_of: the class index of each subclass.
        targets: the label of each image.
        class_targets: the class index of each image.
        known: whether the subclasses are.
        source: by what they were found, where names such as "cat 1" do not tell; else empty.
        images: as given.

    Raises:
        FileNotFoundError: if there is no such table.
        ValueError: for data without known subclasses, or two sources of them; a class without
            subclasses, or subclasses of one name; a table that does not fit, see
            :func:`~kd_lrp_plugin.data.clusters.look_up`.

    Example:
        >>> from kd_lrp_plugin.data.phantom.dataset import Phantom
        >>> data = Subclasses(Phantom("test", size=4), per_class=2)
        >>> data.subclasses[:3], data.subclass_of, data.targets
        (['glioma 1', 'glioma 2', 'meningioma 1'], [0, 0, 1, 1, 2, 2, 3, 3], [10, 9, 8, 11])
    """

    def __init__(
        self, images: Any, per_class: int | None = None, table: str | Path | Table | None = None
    ) -> None:
        classes = list(getattr(images, "classes", None) or [])
        if not classes or not hasattr(images, "targets"):
            fix = "Alias a data set such as csv_images or mnist, not a part of it or its name."
            got = type(images).__name__
            raise ValueError(
                message(f"{_WHERE}: images", "data with targets and classes", got, fix)
            )
        self.images, self.classes, self.known = images, classes, per_class is None
        self.class_targets = list(images.targets)
        if UNLABELLED in self.class_targets or isinstance(images, Subclasses):
            fix = "Wrap a data set in subclasses that with_unlabelled or subclasses do not wrap."
            got = "images without a label" if UNLABELLED in self.class_targets else "subclasses"
            raise ValueError(message(f"{_WHERE}: images", "a class for each image", got, fix))
        self.source = getattr(table, "source", "")
        given = {"per_class": per_class is not None, "table": table is not None}
        sources = [name for name, there in given.items() if there]
        if hasattr(images, "subclass_targets"):
            sources = ["known subclasses", *sources]
        if len(sources) > 1:
            got = f"{'both' if len(sources) == 2 else 'all'} of them: {', '.join(sources)}"
            expected = "known subclasses, per_class or a table"
            raise ValueError(message(_WHERE, expected, got, "Leave all but one of them out."))
        if table is not None:
            self.subclasses, self.subclass_of, self.targets = look_up(images, table)
        elif per_class is None:
            if not hasattr(images, "subclass_targets"):
                fix = (
                    "Give csv_images its subclasses, mnist classes: parity, or set per_class or "
                    "table."
                )
                got = f"{type(images).__name__} without"
                raise ValueError(message(f"{_WHERE}: images", "known subclasses", got, fix))
            self.subclasses, self.subclass_of = list(images.subclasses), list(images.subclass_of)
            self.targets = list(images.subclass_targets)
        else:
            check_integer(_WHERE, "per_class", per_class)
            self.subclasses = name_subclasses(classes, per_class)
            self.subclass_of = [index for index in range(len(classes)) for _ in range(per_class)]
            self.targets = [len(self.subclasses) + label for label in self.class_targets]
        if absent := [name for i, name in enumerate(classes) if i not in self.subclass_of]:
            fix = "Give each class a subclass, itself where it is not divided."
            raise ValueError(
                message(_WHERE, "a subclass or more of each class", f"none of {absent}", fix)
            )
        if len(set(self.subclasses)) < len(self.subclasses):
            fix = "Rename one of them."
            expected = "subclasses of different names"
            raise ValueError(message(_WHERE, expected, self.subclasses, fix))

    @property
    def transform(self) -> Any:
        """That of the images; it cannot be taken away, for it is they who apply it."""
        return getattr(self.images, "transform", None)

    def __getattr__(self, name: str) -> Any:
        if name == "images" or name.startswith("__"):  # asked for while a copy is being made
            raise AttributeError(name)
        return getattr(self.images, name)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index][0], self.targets[index]


def share_subclasses(**datasets: Any) -> tuple[list[str], list[int]]:
    """Names of the subclasses by which all of the data sets are labelled, and their classes.

    Behind the first they may be unknown, as of test images where k-means has found those of others.

    Args:
        **datasets: what is trained with first.

    Returns:
        As of :class:`Subclasses`; empty lists where the data sets are labelled by classes.

    Raises:
        ValueError: if they are labelled by different subclasses, or ones found differently, some
            by classes, those of the first alone are unknown, or one is a ``Subset`` of subclasses.
    """
    found: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, dataset in datasets.items():
        inner = dataset
        while isinstance(inner, Subset):
            inner = inner.dataset
        by_subclass = isinstance(inner, Subclasses)
        if by_subclass and inner is not dataset:
            fix = "Choose the images before, by keywords of their data set."
            expected = "subclasses around the images"
            raise ValueError(message(f"datasets: {name}", expected, "a Subset of subclasses", fix))
        found[name] = (inner.subclasses, inner.subclass_of) if by_subclass else ()
        if by_subclass:
            how = f"found as {inner.source}" if inner.source else "known"
            sources[name] = how if inner.known else "unknown"
    first, *others = found.values()
    if any(other != first for other in others):
        got = {name: about[0] if about else "classes" for name, about in found.items()}
        fix = "Wrap them all in subclasses, with the same ones of the same classes."
        raise ValueError(message("datasets", "labels by the same subclasses", got, fix))
    known = {how for how in sources.values() if how != "unknown"}
    if len(known) > 1 or (known and next(iter(sources.values())) == "unknown"):
        fix = "Take one table for all, or per_class for the others: theirs are then unknown."
        expected = "subclasses found in one way, known where they are trained"
        raise ValueError(message("datasets", expected, sources, fix))
    return first or ([], [])
