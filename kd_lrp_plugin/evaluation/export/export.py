"""A student leaves PyTorch: as ONNX, in int8, for timm, or as PyTorch's own archive.

Nothing is written that was not compared with the student on all test images, and nothing is
overwritten: the folder is made under another name and takes its own once all of it is there.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file

from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.evaluation.export import onnx_graph, timm_folder
from kd_lrp_plugin.evaluation.export.card import read_leak_check, write_card
from kd_lrp_plugin.evaluation.export.quantise import Quantised, quantise
from kd_lrp_plugin.evaluation.export.student import (
    PARITY,
    Student,
    check_parity,
    open_student,
    score_all,
    softmax,
)
from kd_lrp_plugin.evaluation.predictors import ONNX, PT2, FoldedModel, no_gradients
from kd_lrp_plugin.metrics.classification import classification_metrics
from kd_lrp_plugin.metrics.efficiency import measure_side_by_side
from kd_lrp_plugin.metrics.groups import group_metrics
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.runs.loading import load_data_set
from kd_lrp_plugin.runs.predictions import name_outputs
from kd_lrp_plugin.utils import files
from kd_lrp_plugin.utils.validation import check_known, message

FORMATS = ("onnx", "timm", "pt2")
INT8 = "student-int8.onnx"
RECORD = "export.json"
AGREEMENT = 0.98  # of int8 with float32
CALIBRATION = 128  # training images
JUDGED = 1000  # validation images at most


@dataclass(frozen=True)
class ExportOptions:
    """What a student becomes, and where.

    Attributes:
        format: "onnx", "timm" or "pt2".
        int8: whether an ONNX file in int8 is made beside the one in float32.
        out: a new folder; None for ``export-<format>`` in the run folder.
        agreement: of the int8 file with the float32 one on validation images, in (0, 1].
        data_check: what ``kd-lrp check-data`` has written, for the model card.
        safe: see :func:`kd_lrp_plugin.runs.loading.load_run`.

    Raises:
        ValueError: for an unknown format, int8 of another than ONNX, or an agreement out of range.
    """

    format: str = "onnx"
    int8: bool = False
    out: str | Path | None = None
    agreement: float = AGREEMENT
    data_check: str | Path | None = None
    safe: bool = False

    def __post_init__(self) -> None:
        check_known("export --format", self.format, FORMATS)
        if self.int8 and self.format != "onnx":
            fix = "Leave --int8 out, or take --format onnx."
            raise ValueError(message("export --int8", "--format onnx", self.format, fix))
        if not 0 < self.agreement <= 1:
            got = self.agreement
            raise ValueError(message("export --agreement", "a share in (0, 1]", got, "Use 0.98."))


def export(folder: str | Path, options: ExportOptions | None = None) -> dict[str, Any]:
    """The student of a finished run in a format of others, in a new folder.

    ============  ================================================================================
    format        what is written, beside ``export.json``
    ============  ================================================================================
    ``onnx``      ``student.onnx``, whose metadata has the preprocessing, the classes, what the
                  output is, and the calibration; with ``int8`` also ``student-int8.onnx``
    ``timm``      ``config.json``, ``model.safetensors`` and a model card, ``README.md``
    ``pt2``       ``student.pt2`` for ``torch.export.load``, with the same in ``kd_lrp.json``
    ============  ================================================================================

    Args:
        folder: a finished run, whose data are needed: its test images, for int8 also those of
            training and validation.
        options: all of them as they are by themselves, if None.

    Returns:
        The content of ``export.json``: ``models``, a row for each with accuracy, agreement with
        the student and largest difference of a logit on the test images, size in 10^6 bytes and
        latency of one image at one thread, of this machine; ``int8``, how it was chosen.

    Raises:
        FileExistsError: if there is something at ``out``.
        FileNotFoundError: if there is no finished run, or its images are gone.
        ModuleNotFoundError: without the extra ``export``, for ONNX.
        ValueError: for a student, operator or preprocessing that the format cannot hold, test
            images or weights that are not those of the run's predictions, logits that differ by
            more than :data:`PARITY`, or int8 that does not reach its bound.
    """
    options = options or ExportOptions()
    run = RunFolder(folder)
    summary = run.summary()
    out = run / f"export-{options.format}" if options.out is None else Path(options.out)
    if os.path.lexists(out):
        fix = "Choose another --out, or delete it."
        raise FileExistsError(
            message("export --out", "a new folder", f"one that is there, {out}", fix)
        )
    if options.format == "onnx":
        onnx_graph.check_installed()
    if options.format == "timm" and summary["timm"] is None:
        fix = "Use --format onnx; timm has no heads mlp and flatten_mlp, and no models of others."
        got = "one that timm cannot build by itself"
        raise ValueError(message("export --format timm", "a model of timm's", got, fix))
    leaks = read_leak_check(Path(options.data_check) if options.data_check else None, run)
    with _making(out) as draft:
        student = open_student(run, options.safe)
        record: dict[str, Any] = {"format": options.format, "command": files.get_command()}
        if options.format == "onnx":
            record |= _write_onnx(student, draft, options)
        elif options.format == "timm":
            record |= _write_timm(student, draft, leaks)
        else:
            record |= _write_pt2(student, draft)
        record |= {"images": len(student.logits), "parity": PARITY, **run.of}
        record |= student.describe(student.logits)
        files.write_json(draft / RECORD, record)
    return record


@contextmanager
def _making(out: Path) -> Iterator[Path]:
    """A folder that takes its name once it is whole; without a trace if it is not."""
    draft = out.with_name(f".{out.name}-{os.getpid()}")
    draft.mkdir(parents=True)
    try:
        yield draft
        draft.rename(out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _add_latencies(rows: list[dict[str, Any]], calls: Mapping[str, Callable[[], object]]) -> None:
    times = measure_side_by_side(calls)
    for row in rows:
        row["latency_ms"] = 1e3 * times[row["model"]]


# --- formats ------------------------------------------------------------------------------------


def _write_onnx(student: Student, folder: Path, options: ExportOptions) -> dict[str, Any]:
    import onnx

    graph = onnx_graph.to_onnx(student.exported, student.image.shape[1:])
    sessions = {"onnxruntime": onnx_graph.make_scorer(onnx_graph.open_session(graph))}
    logits = {"onnxruntime": _score_graph(sessions["onnxruntime"], student.test_set)}
    check_parity(student, ONNX, logits["onnxruntime"])
    graphs = {"onnxruntime": (ONNX, graph)}
    found: dict[str, Any] = {"opset": onnx_graph.OPSET}
    if options.int8:
        made, found["int8"] = _make_int8(student, graph, options)
        graphs["onnxruntime int8"] = (INT8, made.graph)
        score = onnx_graph.make_scorer(onnx_graph.open_session(made.graph))
        sessions["onnxruntime int8"] = score
        logits["onnxruntime int8"] = _score_graph(score, student.test_set)
    rows = [_describe_eager(student)]
    for name, (file, made_graph) in graphs.items():
        onnx_graph.set_metadata(made_graph, student.describe(logits[name]))
        onnx.save(made_graph, folder / file)
        rows.append(student.compare(name, folder / file, logits[name]))
    image = student.image.contiguous().numpy()
    calls = {name: _bind(score, image) for name, score in sessions.items()}
    _add_latencies(rows, {"eager": _bind(no_gradients(student.model), student.image), **calls})
    return {"models": rows, **found}


def _bind(score: Callable[[Any], object], image: Any) -> Callable[[], object]:
    return lambda: score(image)


def _score_graph(score: onnx_graph.Scorer, dataset: Any) -> Float[np.ndarray, "n outputs"]:
    return score_all(lambda images: score(images.contiguous().numpy()), dataset)


def _describe_eager(student: Student) -> dict[str, Any]:
    return student.compare("eager", student.run / "student.safetensors", student.logits)


def _make_int8(
    student: Student, graph: Any, options: ExportOptions
) -> tuple[Quantised, dict[str, Any]]:
    """int8 whose ranges are of training images, and which validation images are satisfied with."""
    parts = {
        name: _draw(load_data_set(student.run.path, name, options.safe), most)
        for name, most in {"train": CALIBRATION, "val": JUDGED}.items()
    }
    judged = _leave_out_tested(parts["val"], student.test_set)
    made = quantise(graph, parts["train"], judged, options.agreement)
    return made, {
        "float_layers": made.float_layers,
        "layers": made.layers,
        "calibration_images": len(parts["train"]),
        "agreement_bound": options.agreement,
        "validation_agreement": made.agreement,
        "validation_images": len(judged),
    }


def _leave_out_tested(
    images: Sequence[Float[np.ndarray, "c h w"]], test_set: Any
) -> list[Float[np.ndarray, "c h w"]]:
    """Those that are no test image, pixel by pixel: what is measured on these may choose nothing.

    Raises:
        ValueError: if all of them are.
    """
    rows = range(len(test_set))
    tested = {files.hash_contents(test_set[row][0].contiguous().numpy().tobytes()) for row in rows}
    left = [image for image in images if files.hash_contents(image.tobytes()) not in tested]
    if not left:
        got = f"{len(images)} that are all test images, too"
        fix = "Leave --int8 out, or train with a validation set of its own."
        raise ValueError(message("export --int8", "validation images to judge by", got, fix))
    return left


def _draw(dataset: Any, most: int) -> Sequence[Float[np.ndarray, "c h w"]]:
    """Some images, always the same ones, as the data set gives them, augmented or not."""
    chosen = np.random.default_rng(0).permutation(len(dataset))[:most]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [dataset[int(index)][0].contiguous().numpy() for index in chosen]


def _write_timm(student: Student, folder: Path, leaks: str) -> dict[str, Any]:
    summary, predictions = student.summary, student.predictions
    state = {k: v.detach().clone().contiguous() for k, v in student.bare.state_dict().items()}
    save_file(state, folder / timm_folder.WEIGHTS, {"format": "pt"})
    about = student.describe(student.logits)
    subclass_of = summary.get("subclass_of")
    outputs = summary["subclasses"] if subclass_of else about["classes"]
    known = {**about, "subclass_of": subclass_of} if subclass_of else about
    timm_folder.write_config(folder, summary["timm"], student.bare, outputs, known)
    loaded, _ = timm_folder.load_folder(folder)
    again = loaded.state_dict()
    changed = [key for key in state if key not in again or not torch.equal(again[key], state[key])]
    if changed or again.keys() != state.keys():
        got, fix = f"others, first {(changed or sorted(again))[0]}", "Use --format onnx."
        raise ValueError(message("export --format timm", "the same weights again", got, fix))
    score = no_gradients(FoldedModel(loaded, subclass_of) if subclass_of else loaded)
    logits = score_all(score, student.test_set)
    check_parity(student, "timm", logits)
    labels = predictions.labels
    probabilities = softmax(student.logits)
    names = name_outputs(summary["classes"], probabilities.shape[1])
    metrics = classification_metrics(probabilities, labels, names, images=predictions.images)
    if predictions.groups:
        metrics["groups"] = group_metrics(probabilities, labels, predictions.groups)
    config = resolve_config(student.run / "config.yaml").values
    how = timm_folder.write_example(loaded, known)
    files.write_text(folder / "README.md", write_card(summary, config, metrics, about, leaks, how))
    rows = [_describe_eager(student), student.compare("timm", folder / timm_folder.WEIGHTS, logits)]
    calls = {"eager": no_gradients(student.model), "timm": score}
    _add_latencies(rows, {name: _bind(call, student.image) for name, call in calls.items()})
    return {"models": rows}


def _write_pt2(student: Student, folder: Path) -> dict[str, Any]:
    images = torch.zeros(2, *student.image.shape[1:])
    try:
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(student.exported, (images,), dynamic_shapes=shapes)
    except Exception as error:  # of many passes, each with errors of its own
        got = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        fix = "Use --format timm."
        expected = "a model that torch.export can trace"
        raise ValueError(message("export --format pt2", expected, got, fix)) from error
    about = json.dumps(student.describe(student.logits))
    torch.export.save(program, folder / PT2, extra_files={"kd_lrp.json": about})
    score = no_gradients(torch.export.load(folder / PT2).module())
    logits = score_all(score, student.test_set)
    check_parity(student, PT2, logits)
    rows = [_describe_eager(student), student.compare("pt2", folder / PT2, logits)]
    calls = {"eager": no_gradients(student.model), "pt2": score}
    _add_latencies(rows, {name: _bind(call, student.image) for name, call in calls.items()})
    return {"models": rows}
