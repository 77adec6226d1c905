"""Models by name: timm's, MobileNetV2, OFA-595, MNIST's, the student that chooses itself."""

import importlib
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torchdistill.models.registry import MODEL_DICT, get_model, register_model

from kd_lrp_plugin.models import factory, mnist, mobilenetv2, ofa
from kd_lrp_plugin.models.weights import load_weights
from kd_lrp_plugin.selection.candidates import Entry
from kd_lrp_plugin.selection.select import Selection, is_dry_run, load_choice, save_choice
from kd_lrp_plugin.selection.spec import WHERE, SelectionSpec
from kd_lrp_plugin.utils.distributed import rank_and_world_size
from kd_lrp_plugin.utils.validation import check_known, strict

timm_model = register_model(strict("timm_model")(factory.build_model), key="timm_model")
timm_mobilenetv2 = register_model(mobilenetv2.mobilenetv2, key="timm_mobilenetv2")
mnist_cnn = register_model(strict("mnist_cnn")(mnist.mnist_cnn), key="mnist_cnn")
mnist_mlp = register_model(strict("mnist_mlp")(mnist.mnist_mlp), key="mnist_mlp")
mnist_assistant = register_model(
    strict("mnist_assistant")(mnist.mnist_assistant), key="mnist_assistant"
)
mnist_assistant_small = register_model(
    strict("mnist_assistant_small")(mnist.mnist_assistant_small), key="mnist_assistant_small"
)

ofa_595 = register_model(strict("ofa_595")(ofa.ofa_595), key="ofa_595")

logger = logging.getLogger(__name__)


def diswot_student(**kwargs: Any) -> nn.Module:
    """The best of some untrained students by a score, chosen once and built from then on.

    The choice is recorded in a file. Where that is, the student is built from it without a look
    at teacher, data or scores; so a second run, a resumed one and a test get the same student.
    Under torchrun the first process selects, and the others wait for its record.

    Args:
        **kwargs: see :class:`SelectionSpec`.

    Returns:
        The student, untrained.

    Raises:
        ValueError: for an argument that :class:`SelectionSpec` lacks, a record of another
            selection or a damaged one, a budget that no candidate keeps, or a candidate that
            cannot be built, run or scored.

    Example:
        .. code-block:: yaml

            models:
              teacher_model: &teacher {key: timm_model, kwargs: {name: resnet10t, num_classes: 4}}
              student_model:
                key: diswot_student
                kwargs: {num_classes: 4, candidates: thesis, teacher: *teacher,
                  data: *train_images, budget: [params=1M], record: runs/choice.json}
    """
    spec = SelectionSpec.from_kwargs(**kwargs)
    if is_dry_run() and not spec.file.exists():
        with torch.random.fork_rng(devices=[]):
            entry = Selection(spec, make_builder).first_affordable()
    else:
        entry = _choose(spec)
    model = make_builder(entry)()
    model.__dict__["chosen"] = entry  # the trainer writes it into its summary
    return model


register_model(diswot_student, key="diswot_student")


def _choose(spec: SelectionSpec) -> Entry:
    rank, _ = rank_and_world_size()
    while rank > 0 and not spec.file.exists():  # torchrun ends this process if the first fails
        time.sleep(0.2)
    if not spec.file.exists():
        with torch.random.fork_rng(devices=[]):  # a run is the same with the record and without
            records = Selection(spec, make_builder).rank()
        save_choice(spec, records)
        for record in records:
            if record["score"] is None:
                logger.warning("left out: %s: %s", record["candidate"], record["problem"])
        chosen = records[0]["candidate"]
        logger.warning("%s chose %s; recorded in %s", spec.score, chosen, spec.file)
    return load_choice(spec)


def make_builder(entry: Entry, checkpoint: str | None = None) -> Callable[[], nn.Module]:
    """Makes the model of an entry, in another process as well."""
    _register()
    check_known(f"{WHERE}: key", entry["key"], MODEL_DICT)
    made = MODEL_DICT[entry["key"]]
    while isinstance(made, partial):
        made = made.func
    module = getattr(made, "__module__", "__main__")
    return partial(_build, module, entry["key"], entry["kwargs"], checkpoint)


def _build(module: str, key: str, kwargs: Mapping[str, Any], checkpoint: str | None) -> nn.Module:
    if key not in MODEL_DICT:
        _register(module)
    model = get_model(key, None, **kwargs)
    if checkpoint:
        load_weights(model, checkpoint, f"{WHERE}: teacher", strict=True)
    return model


def _register(module: str = "__main__") -> None:
    """A new process has registered no models yet: neither ours, nor those of a module."""
    importlib.import_module("kd_lrp_plugin.torchdistill")
    if module != "__main__":
        importlib.import_module(module)
