"""What a model costs: parameters and multiply-accumulates."""

import copy
from collections.abc import Callable

import thop
import torch
from thop.vision.basic_hooks import count_convNd, count_linear, zero_ops
from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def count_parameters(model: nn.Module, buffers: bool = False) -> int:
    """Number of parameters; shared ones count once.

    Args:
        model: any module.
        buffers: also count the running means and variances of batch norms, as Keras (and so the
            thesis) does.

    Returns:
        A number of scalars.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        >>> count_parameters(model), count_parameters(model, buffers=True)
        (48, 64)
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    if buffers:
        running = ("running_mean", "running_var")
        count += sum(b.numel() for name, b in model.named_buffers() if name.endswith(running))
    return count


def count_macs(model: nn.Module, image_size: int, channels: int = 3) -> int:
    """Multiply-accumulates of one image in evaluation mode; FLOPs are twice as many.

    Counts convolutions and linear layers, subclasses included; not norms, activations, pooling or
    the products inside attention. The model is left untouched: thop measures a copy of it.

    Args:
        model: takes images of shape (1, channels, image_size, image_size).
        image_size: side of the square image, in pixels.
        channels: of the image.

    Returns:
        A number of multiply-accumulates.

    Example:
        >>> count_macs(nn.Conv2d(3, 8, kernel_size=3, padding=1), image_size=10)
        21600

    Reference:
        [T], section 3.3.2: MACs = H·W·Cin·Cout·K², with H×W the output's size, for each
        convolution. Deviation: Cin/groups where a convolution has groups, and linear layers.
    """
    model = copy.deepcopy(model).eval()
    # thop goes by exact type and skips subclasses such as timm's Conv2dSame in silence. A type
    # with children gets no rule, since thop would not look inside it any more.
    parents = {type(module) for module in model.modules() if next(module.children(), None)}
    rules = {type(m): _rule(m) for m in model.modules() if type(m) not in parents}
    like = next(model.parameters())
    images = torch.zeros(1, channels, image_size, image_size, dtype=like.dtype, device=like.device)
    macs, _ = thop.profile(model, inputs=(images,), custom_ops=rules, verbose=False)
    return int(macs)


def _rule(module: nn.Module) -> Callable[..., None]:
    if isinstance(module, CONVOLUTIONS):
        return count_convNd
    return count_linear if isinstance(module, nn.Linear) else zero_ops
