"""What a model costs: parameters, size, arithmetic, memory access and time.

Every measurement runs a copy of the model, in evaluation mode and on its own device and dtype;
the model and torch's random state stay as they were. Hooks on the model run on the copy too.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kd_lrp_plugin.metrics.counting import (
    ImageSize,
    compare_counters,
    copied,
    count_flops,
    count_flops_keras,
    count_macs,
    count_macs_by_thop,
    fold_weights,
    run_counter,
)
from kd_lrp_plugin.utils.validation import message

__all__ = [
    "cost",
    "count_flops",
    "count_flops_keras",
    "count_macs",
    "count_parameters",
    "measure_latency",
    "measure_side_by_side",
    "megabytes",
    "memory_access_cost",
]
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


def memory_access_cost(model: nn.Module, image_size: ImageSize, channels: int = 3) -> int:
    """Scalars that the convolutions read and write for one image: maps in and out, and weights.

    Sums over the calls of convolutions, be they modules or functions; nothing else counts, nor do
    transposed ones.

    Args:
        model: takes images of shape (1, channels, height, width).
        image_size: side of the square image in pixels, or its height and width.
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
    with copied(model, image_size, channels) as (copy_of_model, image):
        formulas = {torch.ops.aten.convolution: _count_accesses}
        counter = run_counter(fold_weights(copy_of_model), image, formulas)
        return counter.get_flop_counts().get("Global", {}).get(torch.ops.aten.convolution, 0)


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
    image_size: ImageSize,
    batch_size: int = 1,
    channels: int = 3,
    seconds: float = 0.5,
) -> float:
    """Median time of a batch in evaluation mode, without gradients and after a warm-up.

    Measures for ``seconds`` or three batches, whichever takes longer. Each batch is waited for
    where the device works asynchronously. The figure is noisy: it depends on the machine, on its
    number of threads and on what else it does, so compare only figures of one quiet machine.

    Args:
        model: takes images of shape (batch_size, channels, height, width).
        image_size: side of the square images in pixels, or their height and width.
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
    with copied(model, image_size, channels) as (copy_of_model, image):
        return _latency(copy_of_model, image, batch_size, seconds)


def measure_side_by_side(
    calls: Mapping[str, Callable[[], object]], seconds: float = 1.0
) -> dict[str, float]:
    """Median time of each of several calls, which take turns, with one thread of PyTorch.

    What else the machine does meanwhile slows all of them alike.

    Args:
        calls: by name; what they compute with beside PyTorch must have one thread already.
        seconds: for each call, warm-up excluded.

    Returns:
        Seconds by name.

    Example:
        >>> calls = {"short": lambda: 1, "long": lambda: sum(range(9999))}
        >>> times = measure_side_by_side(calls, 0.01)
        >>> times["short"] < times["long"]
        True
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in calls}
    try:
        for call in [*calls.values()] * WARM_UP:
            call()
        stop = time.perf_counter() + seconds * len(calls)
        turn = 0
        while turn < LEAST_REPEATS or time.perf_counter() < stop:
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
            turn += 1
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(values) for name, values in times.items()}


def cost(
    model: nn.Module, image_size: ImageSize, channels: int = 3, batch_sizes: Sequence[int] = (1, 32)
) -> dict[str, Any]:
    """All figures of this module in one flat record, ready for JSON.

    Args:
        model: takes images of shape (n, channels, height, width) for any n.
        image_size: side of the square images in pixels, or their height and width.
        channels: of the images.
        batch_sizes: where to measure time; noisy, see :func:`measure_latency`.

    Returns:
        ``parameters``; ``parameters_and_statistics``, with the running statistics of batch norms;
        ``macs``, ``flops`` (twice the MACs), ``flops_keras`` (of :func:`count_flops_keras`, None
        where its convention does not say), ``memory_access_cost``, all for one image;
        ``megabytes``; for each batch size ``latency_ms_batch_N`` and
        ``images_per_second_batch_N``. As a check of ``macs`` also ``macs_by_thop`` and
        ``counters_differ_by``, the difference of both as a part of the larger: 0 where they agree,
        at most 1; :func:`~kd_lrp_plugin.metrics.counting.explain_counters` puts it in words. Both
        are None for a model that thop cannot run.

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
    macs = count_macs(model, image_size, channels)
    record: dict[str, Any] = {
        "parameters": count_parameters(model),
        "parameters_and_statistics": count_parameters(model, buffers=True),
        "macs": macs,
        "flops": 2 * macs,
        "flops_keras": count_flops_keras(model, image_size, channels),
        "memory_access_cost": memory_access_cost(model, image_size, channels),
        "megabytes": megabytes(model),
    }
    with copied(model, image_size, channels) as (copy_of_model, image):
        for n in batch_sizes:
            latency = _latency(copy_of_model, image, n)
            record[f"latency_ms_batch_{n}"] = 1e3 * latency
            record[f"images_per_second_batch_{n}"] = n / latency
    return record | check_macs(model, macs, image_size, channels)


def check_macs(
    model: nn.Module, macs: int, image_size: ImageSize, channels: int = 3
) -> dict[str, Any]:
    """What thop counts for a model of ``macs``, and how far off that is; see :func:`cost`."""
    try:
        by_thop = count_macs_by_thop(model, image_size, channels)
    except Exception:  # only a check: thop's hooks may fail in any way on others' modules
        by_thop = None
    return {"macs_by_thop": by_thop, "counters_differ_by": compare_counters(macs, by_thop)}


def _count_accesses(
    images: Sequence[int],
    weight: Sequence[int],
    *settings: object,  # bias, stride, padding, dilation, transposed, output padding, groups
    out_shape: Sequence[int],
    **_: object,
) -> int:
    is_transposed = settings[4]
    if is_transposed:
        return 0
    positions = out_shape[0] * math.prod(out_shape[2:])
    return positions * (images[1] + out_shape[1]) + math.prod(weight)


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
