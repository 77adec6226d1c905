"""Small networks for handwritten digits of 28 x 28 pixels: a teacher, a student, two assistants."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from kd_lrp_plugin.utils.validation import message

SIDE = 28


class DigitNetwork(nn.Sequential):
    """Named layers on images of 28 x 28 pixels; other images are refused.

    Attributes:
        in_chans: channels of the images.
        num_classes: outputs.
    """

    def __init__(self, layers: Mapping[str, nn.Module], in_chans: int, num_classes: int) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.in_chans, self.num_classes = in_chans, num_classes

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        expected = (self.in_chans, SIDE, SIDE)
        if tuple(images.shape[1:]) != expected:
            fix = f"Set image_size: {SIDE} of the data sets, and channels as in_chans of the model."
            raise ValueError(
                message("digit network", f"images (n, *{expected})", tuple(images.shape), fix)
            )
        return super().forward(images)


def mnist_cnn(num_classes: int = 10, in_chans: int = 1, dropout: float = 0.5) -> nn.Module:
    """The teacher: two convolutions, the first pooled with stride 1, and two linear layers.

    1,011,466 parameters and 10,937,728 MACs at ten classes.

    Args:
        num_classes: outputs.
        in_chans: channels of the images.
        dropout: probability of dropping a value in front of each linear layer.

    Returns:
        The model, untrained, in training mode.

    Raises:
        ValueError: for no classes, no channels or a dropout outside [0, 1).

    Example:
        >>> import torch
        >>> mnist_cnn()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])

    Reference:
        [A], MNIST, teacher, recovered from its notebook; the record of its layers has no
        activation between the linear ones. Deviation: logits, for the softmax is in our losses.
    """
    _check("mnist_cnn", num_classes, in_chans, dropout)
    layers = {
        "conv1": nn.Conv2d(in_chans, 32, 3),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2, stride=1),
        "conv2": nn.Conv2d(32, 64, 3),
        "relu2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "dropout1": nn.Dropout(dropout),
        "linear1": nn.Linear(7744, 128),
        "dropout2": nn.Dropout(dropout),
        "linear2": nn.Linear(128, num_classes),
    }
    return DigitNetwork(layers, in_chans, num_classes)


def mnist_mlp(num_classes: int = 10, in_chans: int = 1) -> nn.Module:
    """The student: two hidden layers as wide as the image has pixels. It has no maps to compare.

    1,238,730 parameters at ten classes, more than :func:`mnist_cnn`, and a ninth of its MACs.
    Losses of relevance maps refuse it; distil it by its logits.

    Args:
        num_classes: outputs.
        in_chans: channels of the images; the hidden layers stay 784 wide.

    Returns:
        The model, untrained, in training mode.

    Raises:
        ValueError: for no classes or no channels.

    Example:
        >>> import torch
        >>> mnist_mlp()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])

    Reference:
        [A], MNIST, student, recovered from its notebook. Deviation: logits.
    """
    _check("mnist_mlp", num_classes, in_chans)
    pixels = SIDE * SIDE
    layers = {
        "flatten": nn.Flatten(),
        "linear1": nn.Linear(in_chans * pixels, pixels),
        "relu1": nn.ReLU(),
        "linear2": nn.Linear(pixels, pixels),
        "relu2": nn.ReLU(),
        "linear3": nn.Linear(pixels, num_classes),
    }
    return DigitNetwork(layers, in_chans, num_classes)


def mnist_assistant(num_classes: int = 10, in_chans: int = 1) -> nn.Module:
    """The source's assistant, which has 26 times the parameters of its teacher.

    26,155,529 parameters at ten classes, nearly all of them behind the second convolution, whose
    maps are not pooled. So it does not lie between teacher and student in size, as assistants are
    meant to: for that take :func:`mnist_assistant_small`.

    Args:
        num_classes: outputs.
        in_chans: channels of the images.

    Returns:
        The model, untrained, in training mode.

    Raises:
        ValueError: for no classes or no channels.

    Example:
        >>> sum(parameter.numel() for parameter in mnist_assistant().parameters())
        26155529

    Reference:
        [A], MNIST, assistant, recovered from its notebook. Deviations: logits, and ReLU behind the
        convolutions as in its teacher, which the record of its layers does not state.
    """
    _check("mnist_assistant", num_classes, in_chans)
    layers = {
        "conv1": nn.Conv2d(in_chans, 32, 3),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2, stride=1),
        "conv2": nn.Conv2d(32, 63, 3),
        "relu2": nn.ReLU(),
        "flatten": nn.Flatten(),
        "linear1": nn.Linear(33327, 784),
        "linear2": nn.Linear(784, num_classes),
    }
    return DigitNetwork(layers, in_chans, num_classes)


def mnist_assistant_small(num_classes: int = 10, in_chans: int = 1) -> nn.Module:
    """An assistant between teacher and student: one convolution, where they have two and none.

    1,084,130 parameters at ten classes, between 1,011,466 of :func:`mnist_cnn` and 1,238,730 of
    :func:`mnist_mlp`; its MACs, too, lie between theirs.

    Args:
        num_classes: outputs.
        in_chans: channels of the images.

    Returns:
        The model, untrained, in training mode.

    Raises:
        ValueError: for no classes or no channels.

    Example:
        >>> sum(parameter.numel() for parameter in mnist_assistant_small().parameters())
        1084130

    Reference:
        None: ours, after the idea of Mirzadeh et al., AAAI 2020.
    """
    _check("mnist_assistant_small", num_classes, in_chans)
    layers = {
        "conv1": nn.Conv2d(in_chans, 32, 3),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "linear1": nn.Linear(5408, 200),
        "relu2": nn.ReLU(),
        "linear2": nn.Linear(200, num_classes),
    }
    return DigitNetwork(layers, in_chans, num_classes)


def _check(where: str, num_classes: int, in_chans: int, dropout: float = 0.0) -> None:
    for name, value in (("num_classes", num_classes), ("in_chans", in_chans)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            fix = "Give what your data have."
            raise ValueError(message(f"{where}: {name}", "a whole number >= 1", value, fix))
    if not 0 <= dropout < 1:
        raise ValueError(message(f"{where}: dropout", "0 <= p < 1", dropout, "Use 0.5."))
