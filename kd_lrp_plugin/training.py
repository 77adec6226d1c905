"""The driver: one torchdistill config in, one run folder out.

It runs torchdistill's own boxes, with a teacher or without, and adds what its example script
leaves out: overrides, validation of every loss term, checks before any work is done, and a run
folder that is complete or not there.
"""

import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torchdistill.common import main_util, yaml_util
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.training import get_training_box
from torchdistill.datasets.util import build_data_loader
from torchdistill.losses import registry as loss_registry
from torchdistill.models.official import get_image_classification_model
from torchdistill.models.registry import get_model

from kd_lrp_plugin import __version__
from kd_lrp_plugin.checks import check_known, message
from kd_lrp_plugin.config import only_sections, resolve_config
from kd_lrp_plugin.data import check_same_classes, make_transforms, preprocessing
from kd_lrp_plugin.efficiency import count_parameters
from kd_lrp_plugin.report import curves_figure
from kd_lrp_plugin.students import load_weights
from kd_lrp_plugin.torchdistill import RecordedLoss, check_finite

logger = logging.getLogger(__name__)


class Silence:
    """What a run tells while it works: here, nothing. The command line shows it."""

    def track(self, batches: DataLoader, what: str) -> Iterable:
        """Pass the batches on; a subclass shows how far they are."""
        return batches

    def epoch(self, metrics: Mapping[str, float]) -> None:
        """Told the metrics of a finished epoch."""


# --- one run ----------------------------------------------------------------------------------


def _read(text: str) -> Any:
    """A config with torchdistill's tags resolved, its dependencies imported."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_text(text, encoding="utf-8")
        config = yaml_util.load_yaml_file(str(file))
    if isinstance(config, dict):
        main_util.import_dependencies(config.get("dependencies"))
    return config


def _load_config(text: str) -> dict[str, Any]:
    config = _read(text)
    for key in ("datasets", "models", "train", "test"):
        if not isinstance(config, dict) or not config.get(key):
            got = sorted(config) if isinstance(config, dict) else type(config).__name__
            fix = f"Add the section {key!r}; see torchdistill_configs."
            raise ValueError(message("config", f"a section {key!r}", got, fix))
    _check_losses(config["train"])
    return config


def _check_losses(train: Mapping[str, Any]) -> None:
    stages = [train[key] for key in train if key.startswith("stage")] or [train]
    middle = loss_registry.MIDDLE_LEVEL_LOSS_DICT | loss_registry.LOW_LEVEL_LOSS_DICT
    middle |= loss_registry.LOSS_DICT
    for stage in stages:
        criterion = stage.get("criterion") or {}
        known = loss_registry.HIGH_LEVEL_LOSS_DICT
        check_known("train.criterion.key", criterion.get("key"), known)
        for name, term in ((criterion.get("kwargs") or {}).get("sub_terms") or {}).items():
            check_known(f"train.criterion: {name!r}: key", "criterion", term)
            check_known(f"train.criterion: loss of {name!r}", term["criterion"]["key"], middle)


def default_run_folder(path: str | Path, seed: int) -> Path:
    """``runs/<dataset>/<method>/<config>/<seed>``, from the last parts of the config's path."""
    config = Path(path).resolve()
    return Path("runs", config.parent.parent.name, config.parent.name, config.stem, str(seed))


def distill(
    path: str | Path,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    seed: int = 0,
    device: str | None = None,
    show: Silence | None = None,
) -> dict[str, Any]:
    """Train the student of a config, with its teacher if it has one, and test it.

    Args:
        path: a torchdistill YAML file.
        overrides: see :func:`resolve_config`.
        out: the run folder, :func:`default_run_folder` if None. It must not exist yet.
        seed: of every random number generator.
        device: such as "cpu" or "cuda:0"; None takes a GPU if there is one.
        show: told how the work goes.

    Returns:
        The summary, as in the run folder.

    The folder holds ``config.yaml`` (overrides applied), ``metrics.jsonl`` (a line per epoch),
    ``curves.png``, TensorBoard events, ``best.pt`` (weights of the best epoch on the validation
    set) and ``summary.json``. Until the run is finished its name ends in ``.partial``.

    Raises:
        FileExistsError: if the run folder exists, finished or not.
        FileNotFoundError: for a missing config, data set, weights or teacher.
        ValueError: for a config that cannot be run.
        FloatingPointError: if a loss is not finite; no step is taken with it.
    """
    show = show or Silence()
    folder = Path(out) if out is not None else default_run_folder(path, seed)
    partial = folder.with_name(folder.name + ".partial")
    for taken in (folder, partial):
        if taken.exists():
            fix = "Choose another --out or --seed, or delete it."
            raise FileExistsError(
                message("run folder", "a new one", f"{taken}, which is there", fix)
            )
    text = resolve_config(path, overrides)
    main_util.set_seed(seed)
    run = _Run(_load_config(text), torch.device(device or _best_device()))
    partial.mkdir(parents=True)
    (partial / "config.yaml").write_text(text, encoding="utf-8")
    summary = {"config": str(path), "overrides": list(overrides), "seed": seed}
    try:
        summary |= run.train(partial, show)
    except BaseException:
        if not (partial / "metrics.jsonl").exists():  # nothing of value was made
            shutil.rmtree(partial)
        raise
    _write(partial / "summary.json", json.dumps(summary, indent=2))
    partial.rename(folder)
    return summary


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _write(file: Path, text: str) -> None:
    """All of it or nothing, whenever the process ends."""
    draft = file.with_name(file.name + ".draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(file)


class _Run:
    """Models, data and torchdistill's box of one config."""

    def __init__(self, config: dict[str, Any], device: torch.device) -> None:
        self.device = device
        datasets, models, train = config["datasets"], config["models"], config["train"]
        known = list(datasets)
        loaders = {
            "train": train.get("train_data_loader"),
            "val": train.get("val_data_loader"),
            "test": config["test"].get("test_data_loader"),
        }
        for name, loader in loaders.items():
            check_known(f"{name}_data_loader.dataset_id", (loader or {}).get("dataset_id"), known)
        parts = {name: datasets[loader["dataset_id"]] for name, loader in loaders.items()}
        if all(hasattr(part, "classes") for part in parts.values()):
            check_same_classes(**parts)
        self.classes = list(getattr(parts["val"], "classes", []))
        self.preprocessing = preprocessing(parts["val"])
        teacher_config = models.get("teacher_model")
        teacher = self._model("teacher_model", teacher_config) if teacher_config else None
        own = "student_model" if models.get("student_model") else "model"
        check_known("models: key", own, models)
        student = self._model(own, models[own])
        for role, model in {"teacher_model": teacher, own: student}.items():
            if model is not None:
                self._check_head(role, model, parts["val"])
        arguments = (datasets, train, device, None, False, 1)
        if teacher is None:
            self.box = get_training_box(student, *arguments)
        else:
            self.box = get_distillation_box(teacher, student, *arguments)
        if self.box.num_epochs < 1:
            got, fix = self.box.num_epochs, "Set train.num_epochs."
            raise ValueError(message("train", "1 epoch or more", got, fix))
        if len(self.box.train_data_loader) == 0:
            fix = "Lower batch_size, or set drop_last: False."
            raise ValueError(message("train_data_loader", "a batch or more", "none", fix))
        self.test_loader = build_data_loader(parts["test"], loaders["test"], False)

    def _model(self, role: str, config: dict[str, Any]) -> nn.Module:
        model = get_image_classification_model(config, False)
        if model is None:
            model = get_model(config["key"], config.get("repo_or_dir"), **config["kwargs"])
        checkpoint = config.get("src_ckpt")
        if checkpoint:
            file = Path(os.path.expandvars(checkpoint)).expanduser()
            if not file.is_file():
                made_by = config.get("_made_by")
                fix = f"Make it with: {made_by}" if made_by else "Train it, or correct src_ckpt."
                raise FileNotFoundError(
                    message(f"models.{role}.src_ckpt", "a checkpoint", f"none at {file}", fix)
                )
            self._check_classes(role, file)
            load_weights(model, file, f"models.{role}.src_ckpt")
        return model.to(self.device)

    def _check_classes(self, role: str, file: Path) -> None:
        if file.suffix == ".safetensors" or not self.classes:
            return
        found = torch.load(file, map_location="cpu", weights_only=True)
        classes = found.get("classes") if isinstance(found, dict) else None
        if classes and list(classes) != self.classes:
            got = {"checkpoint": classes, "data": self.classes}
            fix = "Use a checkpoint that was trained on these classes, in this order."
            raise ValueError(message(f"{role} {file}", "the classes of the data", got, fix))

    def _check_head(self, role: str, model: nn.Module, dataset: Any) -> None:
        image, _ = dataset[0]
        was_training = model.training
        with torch.no_grad():
            outputs = model.eval()(image[None].to(self.device)).shape[-1]
        model.train(was_training)
        needed = len(self.classes) or max(getattr(dataset, "targets", [0])) + 1
        if outputs < needed:
            fix = f"Set models.{role}.kwargs.num_classes to {needed}."
            raise ValueError(message(f"models.{role}", f"{needed} outputs or more", outputs, fix))

    @property
    def student(self) -> nn.Module:
        return self.box.student_model if hasattr(self.box, "student_model") else self.box.model

    def train(self, folder: Path, show: Silence) -> dict[str, Any]:
        """All epochs and the test; files go to ``folder`` as they are made."""
        box, best, started = self.box, (-1.0, 0.0), time.time()
        best_epoch = 0
        with SummaryWriter(str(folder)) as board:
            for epoch in range(1, box.num_epochs + 1):
                metrics = {"epoch": epoch, "lr": box.optimizer.param_groups[0]["lr"]}
                metrics |= self._train_epoch(epoch, show)
                metrics |= self._evaluate(box.val_data_loader, "val", f"epoch {epoch} val", show)
                box.post_epoch_process(metrics=metrics["val_accuracy"])
                with (folder / "metrics.jsonl").open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(metrics) + "\n")
                for name, value in metrics.items():
                    board.add_scalar(name, value, epoch)
                quality = (metrics["val_accuracy"], -metrics.get("val_loss", 0.0))
                if quality > best:
                    best, best_epoch = quality, epoch
                    self._save(folder / "best.pt", metrics)
                show.epoch(metrics)
        records = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
        curves_figure(records).savefig(folder / "curves.png")
        load_weights(self.student, folder / "best.pt")
        tested = self._evaluate(self.test_loader, "test", "test", show)
        box.clean_modules()
        return {
            **tested,
            "best_epoch": best_epoch,
            "val_accuracy": best[0],
            "epochs": box.num_epochs,
            "parameters": count_parameters(self.student),
            "seconds": round(time.time() - started, 1),
            "classes": self.classes,
            "preprocessing": self.preprocessing,
            "device": str(self.device),
            "versions": {
                "kd_lrp_plugin": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }

    def _train_epoch(self, epoch: int, show: Silence) -> dict[str, float]:
        box, started = self.box, time.time()
        box.pre_epoch_process(epoch=epoch)
        if teacher := getattr(box, "teacher_model", None):
            teacher.train(box.teacher_updatable)
        with _Meter(box.criterion) as meter:
            for images, targets, supplement in show.track(box.train_data_loader, f"epoch {epoch}"):
                images, targets = images.to(self.device), targets.to(self.device)
                loss = box.forward_process(images, targets, supplement)
                check_finite(loss, meter.latest)
                meter.update(loss, targets)
                box.post_forward_process(loss=loss)
        metrics = meter.summary("train")
        metrics["images_per_second"] = round(meter.images / (time.time() - started), 1)
        return metrics

    @torch.no_grad()
    def _evaluate(
        self, loader: DataLoader, prefix: str, what: str, show: Silence
    ) -> dict[str, float]:
        """Accuracy and every loss term; relevance included, which needs no graph to be kept."""
        self.student.eval()
        with _Meter(self.box.criterion) as meter:
            for images, targets in show.track(loader, what):
                images, targets = images.to(self.device), targets.to(self.device)
                if len(targets) > 1:
                    meter.update(self.box.forward_process(images, targets), targets)
                else:  # one image alone has no relation to others, only a prediction
                    meter.count(self.student(images), targets)
        return meter.summary(prefix)

    def _save(self, file: Path, metrics: Mapping[str, float]) -> None:
        state = {name: tensor.cpu() for name, tensor in self.student.state_dict().items()}
        record = {"model": state, "classes": self.classes, "epoch": metrics["epoch"]}
        draft = file.with_name(file.name + ".draft")
        torch.save(record | {"best_value": metrics["val_accuracy"]}, draft)
        draft.replace(file)


class _Meter:
    """Means over a pass, read off torchdistill's criterion while it works.

    Attributes:
        latest: the terms of the latest batch.
        images: how many were seen.
    """

    def __init__(self, criterion: nn.Module) -> None:
        self.latest: dict[str, Tensor] = {}
        self.images = 0
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._criterion = criterion
        self._terms: dict[str, nn.Module] = {
            name: term for name, (term, _) in getattr(criterion, "term_dict", {}).items()
        }
        self._logits: Tensor | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> "_Meter":
        def read_logits(_: nn.Module, inputs: tuple) -> None:
            self._logits = inputs[0]["student"]["."]["output"]

        def read_term(name: str) -> Callable[..., None]:
            return lambda _, __, value: self.latest.__setitem__(name, value.detach())

        self._handles = [self._criterion.register_forward_pre_hook(read_logits)]
        for name, term in self._terms.items():
            self._handles.append(term.register_forward_hook(read_term(name)))
            if isinstance(term, RecordedLoss):
                term.reset()
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._logits = None

    def update(self, loss: Tensor, targets: Tensor) -> None:
        """Count a batch that the criterion has just seen."""
        assert self._logits is not None
        for name, value in {"loss": loss.detach(), **self.latest}.items():
            self._add(name, value, len(targets))
        self.count(self._logits, targets)

    def count(self, logits: Tensor, targets: Tensor) -> None:
        """Count the predictions of a batch."""
        self.images += len(targets)
        self._add("accuracy", (logits.detach().argmax(1) == targets).float().mean(), len(targets))

    def _add(self, name: str, mean: Tensor, n: int) -> None:
        total, count = self._sums.get(name, (torch.zeros_like(mean), 0))
        self._sums[name] = total + mean * n, count + n

    def summary(self, prefix: str) -> dict[str, float]:
        means = {f"{prefix}_{k}": float(total) / n for k, (total, n) in self._sums.items()}
        for name, term in self._terms.items():
            if isinstance(term, RecordedLoss) and term.zero_maps is not None:
                means[f"{prefix}_{name}_zero_maps"] = float(term.zero_maps)
        return means


# --- a finished run ---------------------------------------------------------------------------


def load_run(folder: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """The trained student of a run folder, in evaluation mode, and the run's summary.

    Raises:
        FileNotFoundError: if the folder holds no finished run.
    """
    folder = Path(folder)
    if not (folder / "summary.json").is_file():
        fix = "Give the folder that kd-lrp distill has written; one in .partial is unfinished."
        raise FileNotFoundError(message("run", "a finished run", f"none at {folder}", fix))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    config = _read(only_sections(text, ("dependencies", "models")))
    entry = config["models"].get("student_model") or config["models"]["model"]
    kwargs = {k: v for k, v in entry["kwargs"].items() if k != "weights"}
    model = get_image_classification_model({**entry, "kwargs": kwargs}, False)
    model = model or get_model(entry["key"], entry.get("repo_or_dir"), **kwargs)
    load_weights(model, folder / "best.pt")
    return model.eval(), summary


def predict(folder: str | Path, images: Sequence[str | Path]) -> list[dict[str, Any]]:
    """What the student of a run makes of image files.

    Returns:
        One record per image: file, class and its probability, and all probabilities by class.

    Raises:
        FileNotFoundError: if there is no run or no image.
        ValueError: for a file that is no image, or a run with a preprocessing of its own.
    """
    model, summary = load_run(folder)
    if summary["preprocessing"] is None:
        fix = "Load the model with training.load_run, and prepare the images as in training."
        raise ValueError(message("predict", "a known preprocessing", "a custom one", fix))
    prepare = make_transforms(**summary["preprocessing"])
    records = []
    for file in images:
        try:
            with Image.open(file) as image:
                batch = prepare(image.convert("RGB"))[None]
        except FileNotFoundError:
            raise FileNotFoundError(message("predict", "an image", f"none at {file}", "")) from None
        except OSError as error:
            raise ValueError(message(f"predict {file}", "an image", str(error), "")) from error
        with torch.no_grad():
            probabilities = model(batch)[0].softmax(0)
        names = summary["classes"] or [str(place) for place in range(len(probabilities))]
        by_class = dict(zip(names, probabilities.tolist(), strict=False))
        best = max(by_class, key=by_class.__getitem__)
        records.append(
            {"file": str(file), "class": best, "probability": by_class[best], "all": by_class}
        )
    return records
