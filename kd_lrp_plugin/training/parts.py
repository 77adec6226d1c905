"""The data sets of a run by what they are for, and the classes that they share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kd_lrp_plugin.config.build import get_stages
from kd_lrp_plugin.data.subclasses import share_subclasses
from kd_lrp_plugin.data.transforms import preprocessing
from kd_lrp_plugin.data.validation import check_same_classes
from kd_lrp_plugin.utils.validation import UNLABELLED, message


@dataclass(frozen=True)
class Parts:
    """What training, validation and test say together.

    Attributes:
        val, test: data sets, of the first stage and of the test.
        classes: names of the classes, empty if the data sets have none.
        subclasses, subclass_of: names of the subclasses and the class index of each, empty unless
            the data sets are labelled by them.
        outputs: what the outputs of the models stand for: subclasses, if there are any, or classes.
            Subclasses that were found have what they were found by in their names.
        knows_subclasses: whether validation images have known ones.
        preprocessing: see :func:`kd_lrp_plugin.data.transforms.preprocessing`.
    """

    val: Any
    test: Any
    classes: list[str]
    subclasses: list[str]
    subclass_of: list[int]
    outputs: list[str]
    knows_subclasses: bool
    preprocessing: dict[str, Any] | None


def find_parts(
    datasets: Mapping[str, Any], train: Mapping[str, Any], test_loader: Mapping[str, Any]
) -> Parts:
    """The parts of a run.

    Args:
        datasets: by name.
        train: the section of the config.
        test_loader: that of the test.

    Raises:
        ValueError: for parts of other classes, classes named alike, or validation and test images
            without a label.
    """
    (_, first), *later = get_stages(train).items()
    parts = {
        "train": datasets[first["train_data_loader"]["dataset_id"]],
        "val": datasets[first["val_data_loader"]["dataset_id"]],
        "test": datasets[test_loader["dataset_id"]],
    }
    of_all = dict(parts)
    for key_path, stage in later:
        for name in ("train", "val"):
            if loader := stage.get(f"{name}_data_loader"):
                where = f"{key_path.removeprefix('train.')} {name}"
                of_all[where] = datasets[loader["dataset_id"]]
    named = {name: part for name, part in of_all.items() if hasattr(part, "classes")}
    if parts.keys() <= named.keys():
        check_same_classes(**named)
    for name, part in of_all.items():
        if not name.endswith("train") and UNLABELLED in getattr(part, "targets", []):
            fix = "Take with_unlabelled for the training alone."
            got = "some without a label"
            raise ValueError(message(f"datasets: {name}", "labelled images", got, fix))
    classes = list(getattr(parts["val"], "classes", []))
    if len(set(classes)) < len(classes):
        fix = "Rename one of them."
        raise ValueError(message("datasets", "classes of different names", classes, fix))
    subclasses, subclass_of = share_subclasses(**of_all)
    source = getattr(parts["train"], "source", "")
    return Parts(
        parts["val"],
        parts["test"],
        classes,
        subclasses,
        subclass_of,
        [f"{name} ({source})" if source else name for name in subclasses] or classes,
        bool(subclasses) and parts["val"].known,
        preprocessing(parts["val"]),
    )
