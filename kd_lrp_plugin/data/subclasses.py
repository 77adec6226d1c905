"""A data set whose labels are subclasses, while its classes stay what is reported."""

from typing import Any

from torch.utils.data import Dataset, Subset

from kd_lrp_plugin.data.validation import check_integer
from kd_lrp_plugin.utils.validation import message

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

    Attributes:
        classes: names of the classes.
        subclasses: of the subclasses, in the order of the outputs.
        subclass_of: the class index of each subclass.
        targets: the label of each image.
        class_targets: the class index of each image.
        known: whether the subclasses are.
        images: as given.

    Raises:
        ValueError: for data without known subclasses, or with them where ``per_class`` is given; a
            class without subclasses, or subclasses of one name.

    Example:
        >>> from kd_lrp_plugin.data.phantom.dataset import Phantom
        >>> data = Subclasses(Phantom("test", size=4), per_class=2)
        >>> data.subclasses[:3], data.subclass_of, data.targets
        (['glioma 1', 'glioma 2', 'meningioma 1'], [0, 0, 1, 1, 2, 2, 3, 3], [10, 9, 8, 11])
    """

    def __init__(self, images: Any, per_class: int | None = None) -> None:
        classes = list(getattr(images, "classes", None) or [])
        if not classes or not hasattr(images, "targets"):
            fix = "Alias a data set such as csv_images or mnist, not a part of it or its name."
            got = type(images).__name__
            raise ValueError(
                message(f"{_WHERE}: images", "data with targets and classes", got, fix)
            )
        self.images, self.classes, self.known = images, classes, per_class is None
        self.class_targets = list(images.targets)
        if per_class is None:
            if not hasattr(images, "subclass_targets"):
                fix = "Give csv_images its subclasses, mnist classes: parity, or set per_class."
                got = f"{type(images).__name__} without"
                raise ValueError(message(f"{_WHERE}: images", "known subclasses", got, fix))
            self.subclasses, self.subclass_of = list(images.subclasses), list(images.subclass_of)
            self.targets = list(images.subclass_targets)
        else:
            check_integer(_WHERE, "per_class", per_class)
            if hasattr(images, "subclass_targets"):
                fix = "Leave one of them out."
                raise ValueError(
                    message(_WHERE, "known subclasses or per_class", "both of them", fix)
                )
            numbers = range(1, per_class + 1)
            self.subclasses = [f"{name} {number}" for name in classes for number in numbers]
            self.subclass_of = [index for index in range(len(classes)) for _ in numbers]
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

    Returns:
        As of :class:`Subclasses`; empty lists where the data sets are labelled by classes.

    Raises:
        ValueError: if they are labelled by different subclasses, some by classes, or one is a
            ``Subset`` of subclasses.
    """
    found: dict[str, tuple] = {}
    for name, dataset in datasets.items():
        inner = dataset
        while isinstance(inner, Subset):
            inner = inner.dataset
        by_subclass = isinstance(inner, Subclasses)
        if by_subclass and inner is not dataset:
            fix = "Choose the images before, by keywords of their data set."
            expected = "subclasses around the images"
            raise ValueError(message(f"datasets: {name}", expected, "a Subset of subclasses", fix))
        found[name] = (inner.subclasses, inner.subclass_of, inner.known) if by_subclass else ()
    first, *others = found.values()
    if any(other != first for other in others):
        got = {name: about[0] if about else "classes" for name, about in found.items()}
        fix = "Wrap them all in subclasses, with the same ones of the same classes."
        raise ValueError(message("datasets", "labels by the same subclasses", got, fix))
    return first[:2] if first else ([], [])
