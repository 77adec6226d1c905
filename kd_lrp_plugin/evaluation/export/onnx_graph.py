"""A model as an ONNX graph: written with a free batch, described in its metadata, run again."""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from kd_lrp_plugin.utils.extras import EXTRAS, imports_of_an_extra
from kd_lrp_plugin.utils.validation import message

OPSET = 20
INPUT, OUTPUT = "images", "logits"
KEYS = ("preprocessing", "classes", "output", "calibration")  # of the metadata, each in JSON
Scorer = Callable[[Float[np.ndarray, "n c h w"]], Float[np.ndarray, "n outputs"]]


def check_installed() -> None:
    """Raise ModuleNotFoundError, with what to install, unless the extra ``export`` is there."""
    with imports_of_an_extra():
        for name in EXTRAS["export"]:
            import_module(name)


def to_onnx(model: nn.Module, image_shape: Sequence[int]) -> Any:
    """A model as an ONNX graph whose batch may have any size.

    The graph holds neither where the code lay that it was made from, nor anything else of its
    origin.

    Args:
        model: in evaluation mode, from images (n, channels, height, width) to logits.
        image_shape: channels, height and width.

    Returns:
        An ``onnx.ModelProto``.

    Raises:
        ModuleNotFoundError: without the extra ``export``.
        ValueError: for an operator that ONNX does not have, or a model whose graph depends on the
            values or the number of its images; says what PyTorch's exporter says.
    """
    check_installed()
    import onnx

    images = torch.zeros(2, *image_shape)
    try:
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    except Exception as error:  # the exporter raises whatever its many passes do
        got = f"one that the exporter refuses ({_find_reason(error)})"
        fix = "Use --format timm, or a model without this operator."
        raise ValueError(message("export --format onnx", "a model for ONNX", got, fix)) from error
    assert program is not None
    graph = program.model_proto
    for part in (*graph.graph.node, *graph.graph.input, *graph.graph.output, *graph.functions):
        del part.metadata_props[:]
        part.doc_string = ""
    for part in (*graph.graph.value_info, *graph.graph.initializer, graph.graph, graph):
        del part.metadata_props[:]
    batch = graph.graph.input[0].type.tensor_type.shape.dim[0]
    if len(graph.graph.input) != 1 or len(graph.graph.output) != 1 or not batch.dim_param:
        kind = "free" if batch.dim_param else "fixed"
        got = f"{len(graph.graph.input)} inputs, {len(graph.graph.output)} outputs, a {kind} batch"
        fix = "Use --format timm."
        expected = "a model of images of any number, with one output"
        raise ValueError(message("export --format onnx", expected, got, fix))
    onnx.checker.check_model(graph)
    return graph


def _find_reason(error: BaseException) -> str:
    """What the innermost error says first: the operator, or why a graph cannot be traced."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def set_metadata(graph: Any, about: Mapping[str, Any]) -> None:
    """Put a description into a graph, under :data:`KEYS`; what it had is gone."""
    from onnx import helper

    helper.set_model_props(graph, {key: json.dumps(about[key]) for key in KEYS})


def read_metadata(file: Path) -> dict[str, Any]:
    """What :func:`set_metadata` has put into a file.

    Raises:
        ModuleNotFoundError: without the extra ``export``.
        ValueError: if the file is damaged, or no graph of ours.
    """
    fix = "Give a file that kd-lrp export has written."
    session = open_session(file)
    found = session.get_modelmeta().custom_metadata_map
    if missing := sorted(set(KEYS) - found.keys()):
        got = f"none of {missing}"
        raise ValueError(message(str(file), f"metadata {list(KEYS)}", got, fix))
    try:
        return {key: json.loads(found[key]) for key in KEYS}
    except ValueError as error:
        raise ValueError(message(str(file), "metadata in JSON", error, fix)) from error


def open_session(graph: Any) -> Any:
    """An ``onnxruntime.InferenceSession`` of one thread.

    Args:
        graph: an ``onnx.ModelProto``, or a file.

    Raises:
        ModuleNotFoundError: without the extra ``export``.
        FileNotFoundError: if there is no such file.
        ValueError: if onnxruntime cannot run it; says why.
    """
    with imports_of_an_extra():
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if isinstance(graph, Path):
        if not graph.is_file():
            raise FileNotFoundError(message("ONNX", "a file", f"none at {graph}", ""))
        where, content = str(graph), graph.read_bytes()
    else:
        where, content = "ONNX graph", graph.SerializeToString()
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of pybind11's making, each with its own base
        got = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        fix = "Export it again, or install a newer onnxruntime."
        raise ValueError(message(where, "a graph that onnxruntime runs", got, fix)) from error


def make_scorer(session: Any) -> Scorer:
    """From a session, a function from images to logits."""
    (name,) = (of.name for of in session.get_inputs())
    return lambda images: session.run(None, {name: images})[0]
