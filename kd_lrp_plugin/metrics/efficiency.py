"""What a model costs: parameters, size, arithmetic, memory access and time.

Every measurement runs a copy of the model, in evaluation mode and on its own device and dtype;
the model and torch's random state stay as they were. Hooks on the model run on the copy too.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import thop
import torch
from jaxtyping import Float
from thop.vision.basic_hooks import count_convNd, count_linear, zero_ops
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kd_lrp_plugin.utils.validation import message

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# The first batch allocates memory and, on a GPU, chooses kernels; the second should be like all
# that follow.
WARM_UP = 2
LEAST_REPEATS = 3


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
    with _copied(model, image_size, channels) as (copied, image):
        return _macs(copied, image)


def count_flops(model: nn.Module, image_size: int, channels: int = 3) -> int:
    """FLOPs of one image in evaluation mode as torch itself counts them: two for each MAC.

    Counts what is computed rather than which modules there are: convolutions, transposed ones
    too, and every matrix product, so also those inside attention that :func:`count_macs` leaves
    out. Biases, norms, activations and pooling are free here as well.

    Args:
        model: takes images of shape (1, channels, image_size, image_size).
        image_size: side of the square image, in pixels.
        channels: of the image.

    Returns:
        A number of floating-point operations.

    Example:
        >>> count_flops(nn.Conv2d(3, 8, kernel_size=3, padding=1), image_size=10)
        43200

    Reference:
        [T], section 3.3.2: FLOPs = 2·H·W·Cin·Cout·K². Deviation: Cin/groups where a convolution
        has groups, and matrix products. Counted by torch.utils.flop_counter.FlopCounterMode.
    """
    with _copied(model, image_size, channels) as (copied, image):
        return _flops(copied, image)


def memory_access_cost(model: nn.Module, image_size: int, channels: int = 3) -> int:
    """Scalars that the convolutions read and write for one image: maps in and out, and weights.

    Sums over the calls of convolutions, subclasses included; no other layer counts.

    Args:
        model: takes images of shape (1, channels, image_size, image_size).
        image_size: side of the square image, in pixels.
        channels: of the image.

    Returns:
        A number of scalars, not of bytes.

    Example:
        >>> memory_access_cost(nn.Conv2d(3, 8, kernel_size=3, padding=1), image_size=10)
        1316

    Reference:
        [T], section 3.3.2, eq. 3.7: H·W·(Cin + Cout) + K²·Cin·Cout for each convolution, H×W the
        output's size, even where a stride makes the input larger. Deviation: Cin/groups in the
        product with K² where a convolution has groups.
    """
    with _copied(model, image_size, channels) as (copied, image):
        return _memory_access_cost(copied, image)


def megabytes(model: nn.Module) -> float:
    """Size of the weights as saved, in units of 10^6 bytes.

    Parameters and the buffers of the state dict, at their own dtypes, shared ones once; without
    the few kilobytes of names and shapes around them.

    Args:
        model: any module.

    Returns:
        A number of megabytes.

    Example:
        >>> megabytes(nn.Linear(999, 250))
        1.0

    Reference:
        [T], section 3.3.2 and table 3.6. Deviation: none.
    """
    saved = model.state_dict().keys()  # non-persistent buffers are not in it
    buffers = [buffer for name, buffer in model.named_buffers() if name in saved]
    tensors: list[Tensor] = [*model.parameters(), *buffers]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def measure_latency(
    model: nn.Module,
    image_size: int,
    batch_size: int = 1,
    channels: int = 3,
    seconds: float = 0.5,
) -> float:
    """Median time of a batch in evaluation mode, without gradients and after a warm-up.

    Measures for ``seconds`` or three batches, whichever takes longer. Each batch is waited for
    where the device works asynchronously. The figure is noisy: it depends on the machine, on its
    number of threads and on what else it does, so compare only figures of one quiet machine.

    Args:
        model: takes images of shape (batch_size, channels, image_size, image_size).
        image_size: side of the square images, in pixels.
        batch_size: images in the batch.
        channels: of the images.
        seconds: how long to measure, warm-up excluded.

    Returns:
        Seconds per batch.

    Raises:
        ValueError: if ``batch_size`` is below 1.

    Example:
        >>> measure_latency(nn.Conv2d(3, 8, 3), image_size=8, seconds=0.01) > 0
        True

    Reference:
        [T], section 3.3.2, which states no protocol: batch, warm-up and median are ours.
    """
    _check_batch_sizes("measure_latency", [batch_size])
    with _copied(model, image_size, channels) as (copied, image):
        return _latency(copied, image, batch_size, seconds)


def cost(
    model: nn.Module, image_size: int, channels: int = 3, batch_sizes: Sequence[int] = (1, 32)
) -> dict[str, int | float]:
    """All figures of this module in one flat record, ready for JSON.

    Args:
        model: takes images of shape (n, channels, image_size, image_size) for any n.
        image_size: side of the square images, in pixels.
        channels: of the images.
        batch_sizes: where to measure time; noisy, see :func:`measure_latency`.

    Returns:
        ``parameters``; ``parameters_and_statistics``, with the running statistics of batch norms;
        ``macs``, ``flops`` (twice the MACs), ``memory_access_cost``, all for one image;
        ``megabytes``; for each batch size ``latency_ms_batch_N`` and
        ``images_per_second_batch_N``. As a check of ``macs``, counted by thop, also
        ``macs_by_torch`` (half of :func:`count_flops`) and ``counters_differ_by``, the difference
        of both as a part of the larger: 0 where they agree, at most 1. Attention makes it large,
        since torch alone counts its products.

    Raises:
        ValueError: if a batch size is below 1.

    Example:
        >>> record = cost(nn.Conv2d(3, 8, kernel_size=3, padding=1), image_size=10)
        >>> record["parameters"], record["macs"], record["flops"], record["counters_differ_by"]
        (224, 21600, 43200, 0.0)

    Reference:
        [T], section 3.3.2 and table 3.6. Deviations: those of the functions above.
    """
    _check_batch_sizes("cost", batch_sizes)
    record: dict[str, int | float] = {
        "parameters": count_parameters(model),
        "parameters_and_statistics": count_parameters(model, buffers=True),
    }
    with _copied(model, image_size, channels) as (copied, image):
        accesses = _memory_access_cost(copied, image)
        by_torch = _flops(copied, image) // 2
        latencies = {n: _latency(copied, image, n) for n in batch_sizes}
        macs = _macs(copied, image)  # last: thop leaves its counters on the copy
    record |= {
        "macs": macs,
        "flops": 2 * macs,
        "memory_access_cost": accesses,
        "megabytes": megabytes(model),
    }
    for n, latency in latencies.items():
        record[f"latency_ms_batch_{n}"] = 1e3 * latency
        record[f"images_per_second_batch_{n}"] = n / latency
    record["macs_by_torch"] = by_torch
    record["counters_differ_by"] = abs(macs - by_torch) / max(macs, by_torch, 1)
    return record


@contextmanager
def _copied(
    model: nn.Module, image_size: int, channels: int
) -> Iterator[tuple[nn.Module, Float[Tensor, "1 c h w"]]]:
    """A copy in evaluation mode and one image of noise; no gradients, random state put back."""
    like = next(model.parameters(), torch.empty(0))
    gpus = [like.device] if like.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(gpus):
        size = (1, channels, image_size, image_size)
        yield copy.deepcopy(model).eval(), torch.rand(size, dtype=like.dtype, device=like.device)


def _macs(model: nn.Module, image: Float[Tensor, "1 c h w"]) -> int:
    # thop goes by exact type and skips subclasses such as timm's Conv2dSame in silence. A type
    # with children gets no rule, since thop would not look inside it any more.
    parents = {type(module) for module in model.modules() if next(module.children(), None)}
    rules = {type(m): _rule(m) for m in model.modules() if type(m) not in parents}
    macs, _ = thop.profile(model, inputs=(image,), custom_ops=rules, verbose=False)
    return int(macs)


def _rule(module: nn.Module) -> Callable[..., None]:
    if isinstance(module, CONVOLUTIONS):
        return count_convNd
    return count_linear if isinstance(module, nn.Linear) else zero_ops


def _flops(model: nn.Module, image: Float[Tensor, "1 c h w"]) -> int:
    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops()


def _memory_access_cost(model: nn.Module, image: Float[Tensor, "1 c h w"]) -> int:
    costs: list[int] = []

    def add(module: nn.Conv2d, _: tuple[Tensor, ...], output: Tensor) -> None:
        positions = output.numel() // module.out_channels
        maps = positions * (module.in_channels + module.out_channels)
        costs.append(maps + module.weight.numel())

    convolutions = [module for module in model.modules() if isinstance(module, CONVOLUTIONS)]
    handles = [module.register_forward_hook(add) for module in convolutions]
    model(image)
    for handle in handles:
        handle.remove()
    return sum(costs)


def _latency(
    model: nn.Module, image: Float[Tensor, "1 c h w"], batch_size: int, seconds: float = 0.5
) -> float:
    images = image.repeat(batch_size, 1, 1, 1)

    def once() -> float:
        start = time.perf_counter()
        model(images)
        if not images.is_cpu:
            torch.accelerator.synchronize(images.device)
        return time.perf_counter() - start

    for _ in range(WARM_UP):
        once()
    stop = time.perf_counter() + seconds
    times: list[float] = []
    while len(times) < LEAST_REPEATS or time.perf_counter() < stop:
        times.append(once())
    return statistics.median(times)


def _check_batch_sizes(where: str, batch_sizes: Sequence[int]) -> None:
    if any(size < 1 for size in batch_sizes):
        fix = "Give the number of images in a batch."
        raise ValueError(message(where, "batch sizes of 1 or more", list(batch_sizes), fix))
