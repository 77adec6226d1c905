"""Arithmetic of a model, counted where torch computes it: MACs, thop's as a check, Keras' FLOPs.

Every count runs a copy of the model, in evaluation mode and on its own device and dtype; the model
and torch's random state stay as they were. Hooks on the model run on the copy too.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import thop
import torch
import torchvision  # noqa: F401  # registers deform_conv2d
from jaxtyping import Float
from thop.vision.basic_hooks import count_convNd, count_linear, zero_ops
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_flop_count

from kd_lrp_plugin.utils.preserved import preserved

ImageSize = int | tuple[int, int]  # the side of a square, or height and width
Formulas = Mapping[Any, Callable[..., int]]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TOLERANCE = 0.01  # both counters agree where they differ by no more than this part
aten = torch.ops.aten


def count_macs(model: nn.Module, image_size: ImageSize, channels: int = 3) -> int:
    """Multiply-accumulates of one image in evaluation mode; FLOPs are twice as many.

    Counts what is computed rather than which modules there are: every convolution and matrix
    product, as often as it is called, whether it is a module's, a function's or inside of
    attention or a recurrent layer. Biases, norms, activations and pooling are free, and so is what
    prepares weights without looking at the image, such as a parametrization.

    Args:
        model: takes images of shape (1, channels, height, width).
        image_size: side of the square image in pixels, or its height and width.
        channels: of the image.

    Returns:
        A number of multiply-accumulates.

    Example:
        >>> layer = nn.Conv2d(3, 8, kernel_size=3, padding=1)
        >>> count_macs(layer, image_size=10), count_macs(layer, image_size=(5, 20))
        (21600, 21600)

    Reference:
        [T], section 3.3.2: MACs = H·W·Cin·Cout·K², with H×W the output's size, for each
        convolution. Deviation: Cin/groups where a convolution has groups, and matrix products.
        Counted by torch.utils.flop_counter.FlopCounterMode, which counts two for each.
    """
    return count_flops(model, image_size, channels) // 2


def count_flops(model: nn.Module, image_size: ImageSize, channels: int = 3) -> int:
    """FLOPs of one image in evaluation mode: two for each of :func:`count_macs`.

    Args:
        model: takes images of shape (1, channels, height, width).
        image_size: side of the square image in pixels, or its height and width.
        channels: of the image.

    Returns:
        A number of floating-point operations.

    Example:
        >>> count_flops(nn.Conv2d(3, 8, kernel_size=3, padding=1), image_size=10)
        43200

    Reference:
        [T], section 3.3.2: FLOPs = 2·H·W·Cin·Cout·K². Deviations: see :func:`count_macs`.
    """
    with copied(model, image_size, channels) as (copy_of_model, image):
        return run_counter(fold_weights(copy_of_model), image).get_total_flops()


def count_flops_keras(model: nn.Module, image_size: ImageSize, channels: int = 3) -> int | None:
    """FLOPs of one image by the convention of Keras' profile, which counts more than products.

    Two for each multiply-accumulate of convolutions and linear layers; one for each value that a
    bias is added to; the cells of the window for each output of a max pooling; one for each sum
    of a shortcut; one for each input of a global average pooling; five for each entry of a
    softmax, where the model computes one. ReLU, ReLU6, batch norms of maps and what only moves
    values are free.

    Args:
        model: takes images of shape (1, channels, height, width).
        image_size: side of the square image in pixels, or its height and width.
        channels: of the image.

    Returns:
        A number of floating-point operations; None for a model that computes something else, such
        as attention, another activation or another average pooling: the convention does not say.

    Example:
        >>> pooled = nn.Sequential(nn.Conv2d(3, 8, kernel_size=3, padding=1), nn.MaxPool2d(2))
        >>> count_flops_keras(pooled, image_size=10)  # 2 * 21,600 + 800 + 4 * 200
        44800

    Reference:
        [A], its tables of FLOPs, recovered from its figures. Deviation: none.
    """
    with copied(model, image_size, channels) as (copy_of_model, image):
        folded = fold_weights(copy_of_model)
        counter = _KerasCounter()
        with counter:
            folded(image)
    return None if counter.is_incomplete else counter.flops


def count_macs_by_thop(model: nn.Module, image_size: ImageSize, channels: int = 3) -> int:
    """Multiply-accumulates as thop counts them: those of convolution and linear modules.

    A second opinion on :func:`count_macs`. It misses what no such module computes, as in attention,
    and counts a module that has several parents several times.

    Args:
        model: takes images of shape (1, channels, height, width).
        image_size: side of the square image in pixels, or its height and width.
        channels: of the image.

    Returns:
        A number of multiply-accumulates.

    Example:
        >>> count_macs_by_thop(nn.Conv2d(3, 8, kernel_size=3, padding=1), image_size=10)
        21600
    """
    with copied(model, image_size, channels) as (copy_of_model, image):
        folded = fold_weights(copy_of_model)
        # thop goes by exact type and skips subclasses such as timm's Conv2dSame in silence. A type
        # with children gets no rule, since thop would not look inside it any more.
        parents = {type(module) for module in folded.modules() if next(module.children(), None)}
        rules = {type(m): _thop_rule(m) for m in folded.modules() if type(m) not in parents}
        macs, _ = thop.profile(folded, inputs=(image,), custom_ops=rules, verbose=False)
        return int(macs)


def compare_counters(macs: int, by_thop: int | None) -> float | None:
    """How far both counters are apart, as a part of the larger: 0 where they agree, at most 1."""
    return None if by_thop is None else abs(macs - by_thop) / max(macs, by_thop, 1)


def explain_counters(name: str, cost: Mapping[str, Any] | None) -> str | None:
    """A line for whoever reads the cost of a model, where the counters of MACs do not agree.

    Args:
        name: of the model.
        cost: a record with "macs", "macs_by_thop" and "counters_differ_by", such as that of
            :func:`kd_lrp_plugin.metrics.efficiency.cost`; None for one that has none.

    Returns:
        None where they agree to :data:`TOLERANCE`, or nothing was counted.

    Example:
        >>> record = {"macs": 400, "macs_by_thop": 300, "counters_differ_by": 0.25}
        >>> explain_counters("student", record)
        'student: 400 MACs; thop counts 300 (25 % apart), by modules and not by what is computed'
    """
    if cost is None:
        return None
    apart = cost["counters_differ_by"]
    if apart is None:
        return f"{name}: {cost['macs']:,} MACs; thop cannot count it"
    if apart <= TOLERANCE:
        return None
    return (
        f"{name}: {cost['macs']:,} MACs; thop counts {cost['macs_by_thop']:,} "
        f"({apart:.0%} apart), by modules and not by what is computed".replace("%", " %")
    )


# --- the counter --------------------------------------------------------------------------------


def run_counter(
    model: nn.Module, image: Float[Tensor, "1 c h w"], formulas: Formulas | None = None
) -> FlopCounterMode:
    """Torch's counter after one forward pass, in which nothing is fused that it does not know.

    Args:
        model: a copy, in evaluation mode.
        image: its input.
        formulas: by operation, instead of those that count FLOPs.
    """
    # Of fused operations the counter sees one name, and knows few: multi-head attention and
    # encoder layers have a fast path in evaluation mode, attention has several kernels.
    fused = torch.backends.mha.get_fastpath_enabled()
    counter = FlopCounterMode(display=False, custom_mapping={**_FORMULAS, **(formulas or {})})
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), counter:
            model(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter


def _vector_flops(_matrix: Any, vector: Any = None, *_: Any, **__: Any) -> int:
    return 2 * math.prod(_matrix)


def _added_vector_flops(_: Any, matrix: Any, *__: Any, **___: Any) -> int:
    return 2 * math.prod(matrix)


def _added_products_flops(_: Any, one: Any, other: Any, *__: Any, **___: Any) -> int:
    return 2 * math.prod(one) * other[-1]


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _trilinear_flops(
    one: Any, two: Any, three: Any, expand1: Any, expand2: Any, expand3: Any, *_: Any, **__: Any
) -> int:
    shapes = []
    for shape, expand in ((one, expand1), (two, expand2), (three, expand3)):
        sizes = list(shape)
        for axis in sorted(expand):
            sizes.insert(axis, 1)
        shapes.append(sizes)
    return 2 * math.prod(torch.broadcast_shapes(*shapes))


def _deformable_flops(images: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return conv_flop_count(images, weight, out_shape)


def _recurrent_layer_flops(steps: Any, inputs: Any, hidden: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(steps[:-1]) * (math.prod(inputs) + math.prod(hidden))


def _recurrent_stack_flops(steps: Any, weights: Any, *_: Any, **__: Any) -> int:
    matrices = [shape for shape in weights if len(shape) == 2]  # the others are biases
    return 2 * math.prod(steps[:-1]) * sum(math.prod(shape) for shape in matrices)


# What FlopCounterMode has no formula for, and does not take apart.
_FORMULAS: Formulas = {
    aten.mv: _vector_flops,
    aten.dot: _vector_flops,
    aten.vdot: _vector_flops,
    aten.addmv: _added_vector_flops,
    aten.addbmm: _added_products_flops,
    aten._trilinear: _trilinear_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_fused_attention_overrideable: _attention_flops,
    aten.mkldnn_rnn_layer: _recurrent_layer_flops,
    aten._cudnn_rnn: _recurrent_stack_flops,
    torch.ops.torchvision.deform_conv2d: _deformable_flops,
}


def _thop_rule(module: nn.Module) -> Callable[..., None]:
    if isinstance(module, CONVOLUTIONS):
        return count_convNd
    return count_linear if isinstance(module, nn.Linear) else zero_ops


# --- Keras' convention --------------------------------------------------------------------------


class _KerasCounter(TorchDispatchMode):
    """Adds up what :func:`count_flops_keras` counts, and notes whether there was anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.is_incomplete = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        operation, kwargs = func.overloadpacket, kwargs or {}
        if operation not in _FREE and operation not in _KERAS:
            with self:  # inference mode does not take apart what has no kernel of its own
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        output = func(*args, **kwargs)
        if operation not in _FREE:
            count = _KERAS.get(operation)
            flops = count(args, output) if count and not kwargs else None  # a factor, say
            self.flops += flops or 0
            self.is_incomplete |= flops is None
        return output


def _keras_convolution(args: Sequence[Any], output: Tensor) -> int | None:
    _, weight, bias, _, _, _, is_transposed, *_ = args
    products = 2 * output.numel() * math.prod(weight.shape[1:])
    return None if is_transposed else products + (output.numel() if bias is not None else 0)


def _keras_linear(args: Sequence[Any], output: Tensor) -> int | None:
    """Of ``addmm(bias, x, weight)``, without factors in front of its terms."""
    bias, inputs, _ = args
    return output.numel() * (2 * inputs.shape[1] + 1) if bias.ndim == 1 else None


def _keras_product(args: Sequence[Any], output: Tensor) -> int:
    return 2 * output.numel() * args[0].shape[1]


def _keras_max_pooling(args: Sequence[Any], output: tuple[Tensor, Tensor]) -> int:
    kernel = args[1]
    return output[0].numel() * math.prod(kernel if len(kernel) > 1 else kernel * 2)


def _keras_mean(args: Sequence[Any], output: Tensor) -> int | None:
    image = args[0]
    is_global = image.ndim == 4 and math.prod(output.shape) == math.prod(image.shape[:2])
    axes = (args[1] or ()) if len(args) > 1 else ()
    is_spatial = sorted(axis % image.ndim for axis in axes) == [2, 3]
    return image.numel() if is_global and is_spatial else None


def _keras_sum(args: Sequence[Any], output: Tensor) -> int | None:
    is_shortcut = all(isinstance(term, Tensor) and term.shape == output.shape for term in args[:2])
    return output.numel() if is_shortcut and output.ndim == 4 else None


def _keras_softmax(_: Sequence[Any], output: Tensor) -> int:
    return 5 * output.numel()


def _keras_norm(args: Sequence[Any], _: Any) -> int | None:
    return 0 if args[0].ndim == 4 else None  # of maps, one operation that is not profiled


def _keras_clip(args: Sequence[Any], _: Any) -> int | None:
    return 0 if len(args) > 1 and args[1] == 0 else None  # as of ReLU6


# fmt: off
_KERAS: Mapping[Any, Callable[[Sequence[Any], Any], int | None]] = {
    aten.convolution: _keras_convolution,
    aten.addmm: _keras_linear,
    aten.mm: _keras_product,
    aten.max_pool2d_with_indices: _keras_max_pooling,
    aten.mean: _keras_mean,
    aten.add: _keras_sum,
    aten.add_: _keras_sum,
    aten._softmax: _keras_softmax,
    aten.hardtanh: _keras_clip,
    aten.hardtanh_: _keras_clip,
    aten.native_batch_norm: _keras_norm,
    aten._native_batch_norm_legit_no_training: _keras_norm,
    aten.cudnn_batch_norm: _keras_norm,
    aten.miopen_batch_norm: _keras_norm,
}
_FREE = frozenset({
    aten.relu, aten.relu_, aten.view, aten._unsafe_view, aten.t, aten.transpose, aten.permute,
    aten.expand, aten.alias, aten.detach, aten.clone, aten.squeeze, aten.unsqueeze, aten.slice,
    aten.select, aten.split, aten.cat, aten.constant_pad_nd, aten.empty,
})
# fmt: on


# --- the copy -----------------------------------------------------------------------------------


@contextmanager
def copied(
    model: nn.Module, image_size: ImageSize, channels: int
) -> Iterator[tuple[nn.Module, Float[Tensor, "1 c h w"]]]:
    """A copy in evaluation mode and one image of noise; no gradients, random state put back."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    like = next(model.parameters(), torch.empty(0))
    gpus = [like.device] if like.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(gpus):
        size = (1, channels, height, width)
        image = torch.rand(size, dtype=like.dtype, device=like.device)
        # A forward that was patched into the copy may hold the original.
        with preserved(model):
            model.eval()
            yield _copy(model).eval(), image


def _copy(model: nn.Module) -> nn.Module:
    # torch refuses to copy what belongs to a graph, such as the weight that weight_norm's hook
    # leaves as an attribute, or features that somebody's hook has kept.
    copies: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            items = value.values() if isinstance(value, dict) else value
            for item in items if isinstance(value, dict | list | tuple) else [value]:
                if isinstance(item, Tensor) and not item.is_leaf:
                    copies[id(item)] = item.detach().clone()
    return copy.deepcopy(model, copies)


def fold_weights(model: nn.Module) -> nn.Module:
    """Put in what parametrizations make of the weights, for good; in place, and returned.

    They cost nothing for an image, since they need none: deployed, the weights are fixed.
    """
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, WeightNorm | SpectralNorm):
                hook.remove(module)
                del module._forward_pre_hooks[key]
        if parametrize.is_parametrized(module):
            names = dict(module.get_submodule("parametrizations").named_children())
            made = {name: getattr(module, name).detach() for name in names}
            # Not remove_parametrizations: it takes properties from the class, which the original
            # shares.
            module.__class__ = type(module).__bases__[0]
            del module.parametrizations
            for name, value in made.items():
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return model
