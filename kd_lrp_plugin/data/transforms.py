"""Transforms of images, and the preprocessing that prediction repeats."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image
from torchvision import transforms

from kd_lrp_plugin.data.validation import check_integer
from kd_lrp_plugin.utils.validation import message


def make_transforms(
    image_size: int,
    augment: bool = False,
    mean: float = 0.5,
    std: float = 0.5,
    channels: int = 3,
) -> Callable[[Image.Image], Any]:
    """PIL image -> normalised tensor of shape (``channels``, ``image_size``, ``image_size``).

    Of one channel, colours become their luma (ITU-R 601); grey images keep their values.
    With ``augment``: left-right flips, rotation up to 10 degrees, shift up to 5 %, zoom 0.9 to 1.1.
    ``mean`` and ``std`` apply to all channels; 0.5 and 0.5 map [0, 1] to [-1, 1], which is what the
    MobileNetV2 weights of TensorFlow's origin expect.

    Raises:
        ValueError: if ``image_size`` is not a positive integer, ``std`` not positive, or
            ``channels`` neither 1 nor 3.
    """
    check_integer("make_transforms", "image_size", image_size)
    check_integer("make_transforms", "channels", channels)
    if channels not in (1, 3):
        fix = "Use 1 for grey images, 3 for colours."
        raise ValueError(message("make_transforms", "1 or 3 channels", channels, fix))
    if std <= 0:
        raise ValueError(message("make_transforms", "std above 0", std, "Use 0.5."))
    bilinear = transforms.InterpolationMode.BILINEAR
    steps: list[Any] = [transforms.Grayscale()] if channels == 1 else []
    steps.append(transforms.Resize((image_size, image_size), antialias=True))
    if augment:
        steps += [
            transforms.RandomHorizontalFlip(),
            transforms.RandomAffine(
                10, translate=(0.05, 0.05), scale=(0.9, 1.1), interpolation=bilinear
            ),
        ]
    steps += [transforms.ToTensor(), transforms.Normalize([mean] * channels, [std] * channels)]
    return transforms.Compose(steps)


def preprocessing(dataset: Any) -> dict[str, Any] | None:
    """What :func:`preparation` needs to prepare images as the data set does.

    That is, the arguments of :func:`make_transforms` and, where the data set states them, ``bits``
    of its images. None if its transform is anything but a bilinear resize to a square and a
    normalisation that is the same for all channels, perhaps of an image made grey before.
    """
    steps = getattr(getattr(dataset, "transform", None), "transforms", [])
    grey = bool(steps) and isinstance(steps[0], transforms.Grayscale)
    channels = steps[0].num_output_channels if grey else 3
    steps = steps[grey:]
    kinds = (transforms.Resize, transforms.ToTensor, transforms.Normalize)
    if len(steps) != 3 or not all(isinstance(s, k) for s, k in zip(steps, kinds, strict=True)):
        return None
    resize, _, normalize = steps
    sides = resize.size if isinstance(resize.size, Sequence) else []
    if len(sides) != 2 or resize.interpolation != transforms.InterpolationMode.BILINEAR:
        return None
    means, stds = set(map(float, normalize.mean)), set(map(float, normalize.std))
    if len(set(sides)) > 1 or len(means) > 1 or len(stds) > 1:
        return None
    if len(normalize.mean) != channels or (grey and channels != 1):
        return None  # grey in three channels, or of as many channels as the images happen to have
    found = {"image_size": sides[0], "mean": means.pop(), "std": stds.pop()}
    if channels != 3:
        found["channels"] = channels
    bits = getattr(dataset, "bits", None)
    return found if bits is None else {**found, "bits": bits}


def preparation(
    preprocessing: Mapping[str, Any],
) -> tuple[int | None, Callable[[Image.Image], Any]]:
    """How images are read and prepared: ``bits`` of ``images.read_image``, and the transform.

    Args:
        preprocessing: from the function of this name.

    Example:
        >>> bits, prepare = preparation({"image_size": 32, "mean": 0.5, "std": 0.5})
        >>> bits, prepare(Image.new("RGB", (9, 9))).shape
        (None, torch.Size([3, 32, 32]))
    """
    arguments = dict(preprocessing)
    return arguments.pop("bits", None), make_transforms(**arguments)


def describe_transform(
    where: str, transform: Any, image_shape: Sequence[int], bits: int | None = None
) -> dict[str, Any]:
    """A transform as a policy that JSON can hold and any language can follow.

    In this order: an image in RGB is made grey (``grey``, ITU-R 601 luma) and of ``channels``, its
    sides take the lengths of ``resize`` (height and width, or one number, the shorter side) by
    ``interpolation``, with antialiasing, as Pillow does it; its centre of ``crop`` (height, width)
    is taken; [0, 255] becomes [0, 1]; ``mean`` is subtracted and ``std`` divides, by channel.
    ``size`` (height, width) is what must come out. None stands for a step that there is not.

    Args:
        where: who asks, for messages.
        transform: torchvision's, or a ``Compose`` of them.
        image_shape: channels, height and width of what comes out.
        bits: of the images, see :func:`kd_lrp_plugin.data.images.read_image`.

    Returns:
        The policy, for :func:`build_transform`.

    Raises:
        ValueError: for a step, or an order of steps, that this cannot say; names the step.

    Example:
        >>> describe_transform("mine", make_transforms(32), (3, 32, 32))["resize"]
        [32, 32]
    """
    channels, *size = image_shape
    policy: dict[str, Any] = {"channels": channels, "grey": channels == 1, "bits": bits}
    policy |= {"resize": None, "interpolation": None, "crop": None, "size": list(size)}
    readers: dict[type, Callable[[Any], dict[str, Any] | None]] = {
        transforms.Grayscale: lambda step: _describe_grey(step, channels),
        transforms.Resize: _describe_resize,
        transforms.CenterCrop: lambda step: {"crop": list(step.size)},
        transforms.ToTensor: lambda _: {"mean": [0.0] * channels, "std": [1.0] * channels},
        transforms.Normalize: lambda step: _describe_normalisation(step, channels),
    }
    order = list(readers)
    fix = "Use Grayscale, Resize, CenterCrop, ToTensor and Normalize of torchvision, in this order."
    left = order
    for step in getattr(transform, "transforms", [transform]):
        found = readers[type(step)](step) if type(step) in left else None
        if found is None:
            raise ValueError(message(where, "a transform that can be written down", step, fix))
        left = order[order.index(type(step)) + 1 :]
        policy |= found
    if "mean" not in policy:
        raise ValueError(message(where, "a transform that ends in a tensor", transform, fix))
    return policy


def _describe_grey(step: transforms.Grayscale, channels: int) -> dict[str, Any] | None:
    return {"grey": True} if step.num_output_channels == channels else None


def _describe_resize(step: transforms.Resize) -> dict[str, Any] | None:
    if step.max_size is not None:
        return None
    sides = [step.size] if isinstance(step.size, int) else list(step.size)
    resize = sides if len(sides) == 2 else sides[0]
    return {"resize": resize, "interpolation": step.interpolation.value}


def _describe_normalisation(step: transforms.Normalize, channels: int) -> dict[str, Any] | None:
    values = {"mean": [float(v) for v in step.mean], "std": [float(v) for v in step.std]}
    return values if {len(v) for v in values.values()} == {channels} else None


def build_transform(policy: Mapping[str, Any]) -> Callable[[Image.Image], Any]:
    """The transform that :func:`describe_transform` has described, of an image in RGB.

    It raises ``ValueError`` for an image that does not come out in the policy's size.

    Example:
        >>> policy = describe_transform("mine", make_transforms(32), (3, 32, 32))
        >>> build_transform(policy)(Image.new("RGB", (9, 9))).shape
        torch.Size([3, 32, 32])
    """
    steps: list[Any] = [transforms.Grayscale(policy["channels"])] if policy["grey"] else []
    if policy["resize"] is not None:
        kind = transforms.InterpolationMode(policy["interpolation"])
        steps.append(transforms.Resize(policy["resize"], kind))
    if policy["crop"] is not None:
        steps.append(transforms.CenterCrop(policy["crop"]))
    steps += [transforms.ToTensor(), transforms.Normalize(policy["mean"], policy["std"])]
    prepare = transforms.Compose(steps)

    def prepare_and_check(image: Image.Image) -> Any:
        prepared = prepare(image)
        if list(prepared.shape[1:]) != list(policy["size"]):
            got = " x ".join(map(str, prepared.shape[1:]))
            expected = f"an image that comes out as {' x '.join(map(str, policy['size']))} pixels"
            fix = "The model takes this size alone: cut or scale the image."
            raise ValueError(message("preprocessing", expected, got, fix))
        return prepared

    return prepare_and_check


def choose_transform(
    where: str,
    transform: Callable[[Image.Image], Any] | None,
    image_size: int,
    augment: bool,
    channels: int = 3,
) -> Callable[[Image.Image], Any]:
    """The transform that is given, or :func:`make_transforms`.

    Raises:
        ValueError: if a transform is given together with what only ours takes.
    """
    if transform is None:
        return make_transforms(image_size, augment, channels=channels)
    if augment:
        fix = "Put the augmentation into the transform, or leave transform out."
        raise ValueError(message(where, "transform or augment", "both", fix))
    if channels != 3:
        fix = "Put torchvision's Grayscale into the transform, or leave transform out."
        raise ValueError(message(where, "transform or channels", "both", fix))
    return transform
