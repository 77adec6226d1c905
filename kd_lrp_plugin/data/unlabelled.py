"""Images whose class nobody knows, beside those with a label."""

from typing import Any

from torch.utils.data import Dataset

from kd_lrp_plugin.data.subclasses import Subclasses
from kd_lrp_plugin.utils.preserved import preserved_generators
from kd_lrp_plugin.utils.validation import UNLABELLED, message

_WHERE = "with_unlabelled"


class WithUnlabelled(Dataset):
    """The images of a data set, and after them others without a label: (image, -100).

    For training alone. ``DisWOTPlusLoss`` takes the unlabelled images for all terms but the cross
    entropy, and relevance losses take the teacher's top-1 prediction for their label; other losses
    of labels refuse them, but for PyTorch's cross entropy, which ignores -100. Training accuracy
    is that of the labelled images.

    Args:
        images: a data set with ``targets``, class indices.
        unlabelled: any data set of images of the same shape, from the same domain or another; its
            labels, where it has some, are not looked at.

    Attributes:
        classes: names of the classes of ``images``, empty if it names none.
        targets: the label of each image, -100 where there is none.
        samples: file and label of the images that have a file.

    Raises:
        ValueError: for images without targets, or whose labels are subclasses, none that are
            unlabelled, or ones of another shape.

    Example:
        >>> from kd_lrp_plugin.data.phantom.dataset import Phantom
        >>> data = WithUnlabelled(Phantom("train", size=3), Phantom("train", size=2, seed=1))
        >>> data.targets[-3:]
        [2, -100, -100]
    """

    def __init__(self, images: Any, unlabelled: Any) -> None:
        if not hasattr(images, "targets"):
            fix = "Alias a data set such as phantom or folder_images, not a part of it or its name."
            got = type(images).__name__
            raise ValueError(message(f"{_WHERE}: images", "data with targets", got, fix))
        if isinstance(images, Subclasses):
            got, fix = "labels of subclasses", "Subclasses cannot have images without a label."
            raise ValueError(message(f"{_WHERE}: images", "labels of classes", got, fix))
        if isinstance(unlabelled, str) or not hasattr(unlabelled, "__getitem__"):
            fix = "Alias a data set, such as *others."
            got = repr(unlabelled)
            raise ValueError(message(f"{_WHERE}: unlabelled", "a data set", got, fix))
        if not len(unlabelled):
            fix = "Leave with_unlabelled out, or add images."
            raise ValueError(message(f"{_WHERE}: unlabelled", "an image or more", "none", fix))
        with preserved_generators():
            shapes = [tuple(getattr(of[0][0], "shape", ())) for of in (images, unlabelled)]
        if shapes[0] != shapes[1]:
            fix = "Give both the same image_size and channels."
            got = f"{shapes[1]} beside {shapes[0]}"
            raise ValueError(message(f"{_WHERE}: unlabelled", "images of one shape", got, fix))
        self.images, self.unlabelled = images, unlabelled
        self.classes = list(getattr(images, "classes", None) or [])
        self.targets = [*images.targets, *[UNLABELLED] * len(unlabelled)]
        self.samples = [
            (str(file), UNLABELLED if of is unlabelled else label)
            for of in (images, unlabelled)
            for file, label in getattr(of, "samples", [])
        ]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        labelled = len(self.images)
        if index < labelled:
            return self.images[index]
        return self.unlabelled[index - labelled][0], UNLABELLED
