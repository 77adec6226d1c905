"""Static int8 of an ONNX graph, whose first layers stay in float until it agrees with the float."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from kd_lrp_plugin.evaluation.export.onnx_graph import INPUT, make_scorer, open_session
from kd_lrp_plugin.utils.extras import imports_of_an_extra
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message

WEIGHTED = ("Conv", "Gemm", "MatMul")
BATCH = 32


@dataclass(frozen=True)
class Quantised:
    """A graph with weights and activations in int8, and how it was chosen.

    Attributes:
        graph: an ``onnx.ModelProto`` with pairs of QuantizeLinear and DequantizeLinear.
        float_layers: how many of its first layers with weights stay in float.
        layers: of those with weights there are.
        agreement: share of the judged images whose largest logit is the float graph's.
    """

    graph: Any
    float_layers: int
    layers: int
    agreement: float


def quantise(
    graph: Any,
    calibration: Sequence[Float[np.ndarray, "c h w"]],
    judged: Sequence[Float[np.ndarray, "c h w"]],
    bound: float,
) -> Quantised:
    """Weights in int8 by channel, activations in uint8 by tensor, with as few float layers as do.

    The ranges of the activations are the least and largest values on the calibration images. The
    layers before the first, second, fourth, eighth... layer with weights stay in float, and the
    first graph that agrees with the float one on enough of the judged images is taken.

    Args:
        graph: the float one.
        calibration: images to take the ranges from.
        judged: images to compare both graphs on; their classes are not asked for.
        bound: the least agreement, in (0, 1].

    Raises:
        ModuleNotFoundError: without the extra ``export``.
        ValueError: if no graph reaches the bound.

    Reference:
        Jacob et al., CVPR 2018 (affine int8 by calibrated ranges); Krishnamoorthi, 2018 (weights by
        channel). Deviation: the first layers may stay in float.
    """
    expected = _list_predictions(graph, judged)
    best, kept = 0.0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared, layers = _prepare(graph, folder)
        counts = list(_list_counts(len(layers)))
        for count in current_progress().track(counts, "quantising", len(counts)):
            first = layers[count]
            found = _quantise(prepared, folder, calibration, first)
            agreement = float((_list_predictions(found, judged) == expected).mean())
            if agreement >= bound:
                return Quantised(found, count, len(layers), agreement)
            if agreement > best:
                best, kept = agreement, count
    got = f"{best:.3f} at best, with {kept} of {len(layers)} layers in float"
    fix = "Lower --agreement, or leave --int8 out."
    expected_words = f"an agreement of {bound:g} on {len(judged)} images with the float model"
    raise ValueError(message("export --int8", expected_words, got, fix))


def _list_counts(layers: int) -> Iterator[int]:
    """How many first layers may stay in float: 0, 1, 2, 4, ... of all but the last."""
    yield 0
    count = 1
    while count < layers:
        yield count
        count *= 2


def _prepare(graph: Any, folder: Path) -> tuple[Any, list[list[str]]]:
    """The graph with shapes and folded constants, and the nodes before each layer with weights."""
    with imports_of_an_extra():
        import onnx
        from onnxruntime.quantization.shape_inference import quant_pre_process

    onnx.save(graph, folder / "given.onnx")
    with _naming_failure():
        # PyTorch's exporter has noted the shapes, some of which the symbolic inference cannot find.
        files = (str(folder / name) for name in ("given.onnx", "prepared.onnx"))
        quant_pre_process(*files, skip_symbolic_shape=True)
    prepared = onnx.load(folder / "prepared.onnx")
    names: list[str] = []
    before: list[list[str]] = []
    for number, node in enumerate(prepared.graph.node):
        node.name = f"{number}-{node.op_type}"
        if node.op_type in WEIGHTED:
            before.append(list(names))
        names.append(node.name)
    if not before:
        fix = "Leave --int8 out."
        raise ValueError(message("export --int8", "a model with layers to quantise", "none", fix))
    return prepared, before


@contextmanager
def _naming_failure() -> Iterator[None]:
    """What onnxruntime's quantiser raises, which may be of any kind, as one of ours."""
    try:
        yield
    except Exception as error:
        got = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        fix = "Leave --int8 out, or install a newer onnxruntime."
        expected = "a graph that onnxruntime can quantise"
        raise ValueError(message("export --int8", expected, got, fix)) from error


def _quantise(
    prepared: Any, folder: Path, calibration: Sequence[np.ndarray], excluded: list[str]
) -> Any:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {INPUT: image[None]}

    onnx.save(prepared, folder / "float.onnx")
    with _naming_failure():
        quantize_static(
            folder / "float.onnx",
            folder / "int8.onnx",
            Reader(),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=excluded,
        )
    return onnx.load(folder / "int8.onnx")


def _list_predictions(graph: Any, images: Sequence[np.ndarray]) -> np.ndarray:
    score: Callable[..., Any] = make_scorer(open_session(graph))
    parts = [np.stack(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    return np.concatenate([score(part).argmax(1) for part in parts])
