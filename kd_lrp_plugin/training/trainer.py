"""The trainer: one torchdistill config in, one run folder out.

It runs torchdistill's own boxes, with a teacher or without, and adds what its example script
leaves out: overrides, a check before any work is done, validation of every loss term, a run that
resumes after a kill as if nothing had happened, and several processes on CPUs as well.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch.utils.data import DataLoader, SequentialSampler
from torchdistill.common import main_util

from kd_lrp_plugin.config.build import Assembly, assemble
from kd_lrp_plugin.config.document import Document
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.metrics.efficiency import count_parameters
from kd_lrp_plugin.models.factory import timm_arguments
from kd_lrp_plugin.models.weights import load_weights
from kd_lrp_plugin.plots.figures import curves_figure
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.runs.predictions import predictions_csv
from kd_lrp_plugin.runs.provenance import list_files
from kd_lrp_plugin.torchdistill.high_level import check_finite
from kd_lrp_plugin.training.check.dry_run import check
from kd_lrp_plugin.training.experiment import AUC, LAST, MONITOR, OF_PREDICTIONS, Experiment
from kd_lrp_plugin.training.loggers import Show, check_installed, open_logger
from kd_lrp_plugin.training.meter import Meter
from kd_lrp_plugin.training.session import describe_session, measure_memory
from kd_lrp_plugin.training.state import describe_nonfinite, restore_state, take_state
from kd_lrp_plugin.training.workers import choose_workers
from kd_lrp_plugin.utils.distributed import DistributedContext, init_distributed
from kd_lrp_plugin.utils.progress import NullProgress, current_progress
from kd_lrp_plugin.utils.validation import message

FORMAT = 2  # of the checkpoints: goes up when what they hold changes


def distill(spec: RunSpec) -> dict[str, Any]:
    """Train the student of a config, with its teacher if it has one, and test it.

    Called again, it resumes after the last finished epoch, and ends with the weights that it would
    have had without the interruption (bitwise on CPUs); for a finished run it only returns the
    summary. Under torchrun, every process calls it.

    Args:
        spec: what to run; ``distill(RunSpec("my.yaml", out="runs/first"))``.

    Returns:
        The summary, as in the run folder.

    Raises:
        FileExistsError: if the run folder holds anything but this run.
        BlockingIOError: if another process has locked it.
        FileNotFoundError: if there is no config.
        ValueError: for a config that cannot be run, with all its problems.
        FloatingPointError: if a loss is not finite; no step is taken with it.
        OSError: on a full disk, for example, or if the logger fails.
        ModuleNotFoundError: if the logger is not installed.
    """
    config = spec.read()
    check_installed(spec.log)
    with init_distributed(spec.device) as context, ExitStack() as stack:
        if context.rank > 0:  # the first process speaks for all
            stack.enter_context(NullProgress())
        folder = RunFolder(spec.folder)

        def claim() -> None:
            about = {
                "seed": spec.seed,
                "processes": context.world_size,
                "files": list_files(config),
            }
            stack.enter_context(folder.claimed(config.text, about))

        context.run_on_rank_zero(claim)
        if context.run_on_rank_zero(folder.is_intact):
            current_progress().note(f"{folder.path} is finished already")
            return context.run_on_rank_zero(folder.summary)
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        _keep_threads(context, folder)
        run = Trainer(build_checked(spec, config, context), folder, spec.seed)
        context.run_on_rank_zero(lambda: folder.note_files(run.experiment.pretrained))
        state = context.run_on_rank_zero(lambda: folder.checkpoints.load(describe_nonfinite))
        workers = choose_workers(run.experiment)
        if context.rank == 0:
            folder.add_session(describe_session(spec, context) | {"workers": workers})
        if state is not None:
            run.restore(state)
            current_progress().note(f"{folder.path}: resumes after epoch {run.epoch}")
        first = context.rank == 0
        logger = open_logger(spec, folder, run.records) if first else nullcontext(_show_nowhere)
        show = stack.enter_context(logger)
        run.train(show)
        return run.test(show)


def _keep_threads(context: DistributedContext, folder: RunFolder) -> None:
    """Resume with the threads that the run began with.

    Sums are taken in other orders by another number of them, so the weights would differ.
    """
    before = context.run_on_rank_zero(lambda: folder.threads)
    if before and before != (now := torch.get_num_threads()):
        torch.set_num_threads(before)
        resumed = f"{folder.path}: resumes with {before} threads, as it began, not with {now}"
        current_progress().note(f"{resumed}: another number would change the weights")


def build_checked(spec: RunSpec, config: Document, context: DistributedContext) -> Experiment:
    """The experiment, of models and data sets that were built once and checked.

    The weights are drawn first from the seed, before the check takes any number; it gives the
    generators back as it has found them. So a run has the same weights whatever is checked.
    """
    built: list[Assembly] = []

    def build_and_check() -> None:
        if problems := spec.list_unsafe(config):
            raise ValueError("\n".join(problems))
        main_util.set_seed(spec.seed)
        report = check(config, context)
        if report.problems or report.assembly is None:
            raise ValueError("\n".join(report.problems))
        for warning in report.warnings:
            current_progress().note(f"warning: {warning}")
        built.append(report.assembly)

    # The first process alone, and before the others build: it may have to choose the student.
    context.run_on_rank_zero(build_and_check)
    if not built:
        main_util.set_seed(spec.seed)
        built.append(assemble(config))
    return Experiment(built.pop(), context, spec.seed)


class Trainer:
    """The epochs of one experiment, and what they leave in the folder."""

    def __init__(self, experiment: Experiment, folder: RunFolder, seed: int) -> None:
        self.experiment, self.folder, self.seed = experiment, folder, seed
        self.context = experiment.context
        self.records: list[dict[str, float]] = []
        self.best: dict[str, Any] = {}  # content of best.pt
        self.monitor = experiment.monitor
        # Where no epoch is chosen, schedulers and early stopping see this all the same.
        self.watched = MONITOR if self.monitor == LAST else self.monitor
        self._said_missing = False

    @property
    def epoch(self) -> int:
        return len(self.records)

    def restore(self, state: Mapping[str, Any]) -> None:
        if state.get("format") != FORMAT:
            fix = "Finish the run with the version that began it, or delete the folder."
            got = f"format {state.get('format')}"
            raise ValueError(message("checkpoint", f"format {FORMAT}", got, fix))
        restore_state(self.experiment, state["experiment"])
        self.records, self.best = state["records"], state["best"]
        if self.context.rank == 0:
            self._save_best()  # may be missing, behind, or ahead of a checkpoint that was damaged
            self._write_records()

    # --- training -----------------------------------------------------------------------------

    def train(self, show: Show) -> None:
        """The epochs that are left; after each, the folder holds all that the next one needs."""
        while not self.experiment.finished:
            metrics = self._train_epoch()
            show(metrics)
            current_progress().epoch(metrics)

    def _train_epoch(self) -> dict[str, float]:
        self._open_cache()
        experiment, started = self.experiment, time.monotonic()
        number = self.epoch + 1
        self._set_seed(number)
        experiment.begin_epoch()
        rates = [group["lr"] for group in experiment.box.optimizer.param_groups]
        metrics = {"epoch": number, "stage": experiment.stage, "lr": rates[0]}
        metrics |= self._train_batches(number)
        self._check_weights(number)
        metrics |= self._evaluate(experiment.val_loader, "val", f"epoch {number} val")[0]
        metrics["memory_mb"] = round(measure_memory(self.context), 1)
        metrics["seconds"] = round(time.monotonic() - started, 2)
        improved = self._keep_best(metrics)
        self.records.append(metrics)
        experiment.end_epoch(metrics[self.watched], self._stalls())
        if self.context.rank == 0:
            self._save(improved)
        return metrics

    def _open_cache(self) -> None:
        """From here on a cached teacher is not asked about training images."""
        cache = self.experiment.cache
        if cache is None or cache.is_open:
            return
        cache.open(self.context, self.experiment.beside_teacher or self.folder.path)
        current_progress().note(str(cache))
        if self.context.rank == 0:
            self.folder.note_cache(cache.describe())

    def _check_weights(self, number: int) -> None:
        """Raise FloatingPointError for weights that are not finite, before they are saved.

        The loss is checked before its step; what the last step of an epoch has made of the
        weights would else be found by nobody, and kept for the best.
        """
        wrong = [
            f"{name}.{key}" if name != "original" else key
            for name, model in self.experiment.list_changing().items()
            for key, value in model.state_dict().items()
            if value.is_floating_point() and not bool(torch.isfinite(value).all())
        ]
        # Of all processes, so that none waits for one that has stopped.
        wrong = sorted({key for keys in self.context.gather(wrong) for key in keys})
        if wrong:
            kept = (
                f"the checkpoint of epoch {number - 1} stays" if number > 1 else "nothing is kept"
            )
            fix = f"Lower the learning rate, or set optimizer.max_grad_norm; {kept}."
            got = f"nan or inf in {len(wrong)} tensors, such as {wrong[:3]}"
            raise FloatingPointError(message(f"epoch {number}", "finite weights", got, fix))

    def _set_seed(self, number: int) -> None:
        """Seeds of its own make an epoch independent of how its process came to it."""
        key = np.random.SeedSequence([self.seed, number, self.context.rank])
        main_util.set_seed(seed := int(key.generate_state(1)[0]))
        self.experiment.loading.set_seed(seed)

    def _train_batches(self, number: int) -> dict[str, float]:
        experiment, box, started = self.experiment, self.experiment.box, time.monotonic()
        loader = box.train_data_loader
        classifies = experiment.student is experiment.original
        subclass_of = experiment.parts.subclass_of
        with Meter(box.criterion, classifies=classifies, subclass_of=subclass_of) as meter:
            for images, targets, supplement in current_progress().track(
                loader, f"epoch {number}", len(loader)
            ):
                images, targets = images.to(self.context.device), targets.to(self.context.device)
                loss = experiment.training_loss(images, targets, supplement)
                check_finite(loss, meter.latest)
                meter.update(loss, targets)
                box.post_forward_process(loss=loss)
        seconds = time.monotonic() - started
        metrics = meter.summary("train", self.context)
        images_seen = sum(self.context.gather(meter.images))
        metrics["images_per_second"] = round(images_seen / max(seconds, 1e-9), 1)
        return metrics

    def _value(self, metrics: Mapping[str, float]) -> float:
        """What is watched; more is better."""
        value = metrics[self.watched]
        return value if self.watched in OF_PREDICTIONS else -value

    def _keep_best(self, metrics: Mapping[str, float]) -> bool:
        """Keep the weights of an epoch that is the best so far; of equal ones the lower loss."""
        measure = self.experiment.loss_is_measure
        value = metrics["epoch"] if self.monitor == LAST else self._value(metrics)
        measured = value, -metrics.get("val_loss", 0.0) if measure else 0.0
        # Nothing is greater than nan, so that one would stay the best for ever.
        quality = tuple(-math.inf if math.isnan(value) else value for value in measured)
        improved = not self.best or quality > tuple(self.best["quality"])
        if improved:
            state = self.experiment.original.state_dict() if self.context.rank == 0 else {}
            self.best = {
                "model": {k: v.detach().to("cpu", copy=True) for k, v in state.items()},
                "classes": self.experiment.parts.outputs,
                "epoch": self.epoch + 1,
                "quality": list(quality),
            }
        return improved

    def _stalls(self) -> bool:
        """Whether this stage has had the epochs of its patience without a gain."""
        stopping = self.experiment.stage_config.get("early_stopping") or {}
        reference, since = -math.inf, 0
        for metrics in self.records:
            if metrics["stage"] == self.experiment.stage:
                value, since = self._value(metrics), since + 1
                if value > reference + stopping.get("min_delta", 0.0):
                    reference, since = value, 0
        return since >= stopping.get("patience", math.inf)

    def _save(self, improved: bool) -> None:
        # First what the next epoch needs; all else can be made again from it. A kill between two
        # of these files leaves the others behind by an epoch, which `restore` makes up for.
        self.folder.checkpoints.save(
            {
                "format": FORMAT,
                "experiment": take_state(self.experiment),
                "records": self.records,
                "best": self.best,
            }
        )
        if improved:
            self._save_best()
        self._write_records()

    def _write_records(self) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        self.folder.write("metrics.jsonl", lines)

    def _save_best(self) -> None:
        self.folder.put("best.pt", lambda file: torch.save(self.best, file))

    # --- evaluation ---------------------------------------------------------------------------

    def _evaluate(
        self, loader: DataLoader, prefix: str, what: str, keep: bool = False
    ) -> tuple[dict[str, float], list[Mapping[str, Any]]]:
        """Means of accuracy and every loss term, relevance included; the predictions if kept.

        Where it is the monitor, the area under the ROC curve as well.

        One image alone has no relation to others: where the criterion compares samples, a batch
        of one counts for the accuracy only. So does every batch where the loader lacks what the
        training's data set wrapper adds.
        """
        experiment = self.experiment
        student, teacher = experiment.original, experiment.original_teacher
        auc, subclass_of = self.monitor == AUC, experiment.parts.subclass_of
        meter = Meter(experiment.box.criterion, keep, subclass_of=subclass_of, auc=auc)
        with experiment.evaluating(), meter:
            missing = experiment.missing_wrapper(loader)
            if missing and not self._said_missing:
                self._said_missing = True
                current_progress().note(f"{what}: accuracy only, for its images lack {missing}")
            least = math.inf if missing else 2 if meter.compares else 1
            for images, targets, *rest in current_progress().track(loader, what, len(loader)):
                images, targets = images.to(self.context.device), targets.to(self.context.device)
                if len(targets) >= least:
                    # A stage may make of either model one that gives no logits.
                    logits = student(images) if experiment.student is not student else None
                    redesigned = experiment.teacher is not teacher
                    of_teacher = teacher(images) if teacher and keep and redesigned else None
                    loss = experiment.loss(images, targets, rest[0] if rest else {})
                    meter.update(loss, targets, logits, of_teacher)
                else:
                    of_teacher = teacher(images) if teacher else None
                    meter.count(student(images), targets, of_teacher)
        return meter.summary(prefix, self.context), meter.predictions(self.context)

    def test(self, show: Show) -> dict[str, Any]:
        """Test the best weights, and write what a finished run has."""
        experiment, folder = self.experiment, self.folder
        self.context.run_on_rank_zero(lambda: None)  # the first process has written the weights
        load_weights(experiment.original, folder / "best.pt", strict=True)
        self._set_seed(0)
        loader = experiment.test_loader
        tested, predictions = self._evaluate(loader, "test", "test", keep=True)
        experiment.box.clean_modules()
        summary = {
            **tested,
            "best_epoch": self.best["epoch"],
            **_only_of("val", self.records[self.best["epoch"] - 1]),
            "epochs": self.epoch,
            "parameters": count_parameters(experiment.original),
            "seconds": round(sum(record["seconds"] for record in self.records), 1),
            "classes": experiment.parts.classes,
            "preprocessing": experiment.parts.preprocessing,
            "image_shape": list(experiment.parts.test[0][0].shape),
            "seed": self.seed,
            "device": str(self.context.device),
        }
        if experiment.parts.subclasses:  # with them the outputs of the weights are folded again
            summary["subclasses"] = experiment.parts.subclasses
            summary["subclass_of"] = experiment.parts.subclass_of
        if self.context.rank == 0:
            if caches := folder.list_caches():
                summary["teacher_caches"] = caches
            names = _names(experiment.parts.test, loader)
            groups = _groups(experiment.parts.test, loader)
            folder.write(
                "predictions.csv",
                predictions_csv(
                    predictions,
                    experiment.parts.classes,
                    names,
                    groups,
                    experiment.parts.subclasses,
                ),
            )
            weights = experiment.original.state_dict()
            state = {k: v.detach().clone().contiguous() for k, v in weights.items()}
            summary["timm"] = timm_arguments(experiment.original)
            # What a model that chose itself has chosen, so that the run can be loaded without.
            summary["student"] = getattr(experiment.original, "chosen", None)
            about = {"timm.create_model": json.dumps(summary["timm"])}
            folder.put("student.safetensors", lambda file: file.write_bytes(save(state, about)))
            figure = curves_figure(self.records)
            folder.put("curves.png", lambda file: figure.savefig(file, format="png"))
            show({"epoch": summary["best_epoch"], **_only_of("test", summary)})
            folder.finish(summary)
            (folder / "previous.pt").unlink(missing_ok=True)
        return self.context.run_on_rank_zero(lambda: summary)


def _show_nowhere(metrics: Mapping[str, float]) -> None:
    """Of a process that is not the first, which speaks for all."""


def _only_of(part: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name.startswith(f"{part}_")}


def _names(dataset: Any, loader: DataLoader) -> list[str] | None:
    """What a data set calls its images, in the order of its loader; None where that is not known.

    Files have the path below the folder that they share; an image with several variants is called
    the same in each.
    """
    if not isinstance(loader.sampler, SequentialSampler):
        return None
    samples = getattr(dataset, "samples", None)
    if not samples:
        named = getattr(dataset, "names", None) or getattr(dataset, "numbers", None)
        return None if named is None else list(map(str, named))
    files = [str(file) for file, _ in samples]
    common = os.path.commonpath(files) if len(files) > 1 else os.path.dirname(files[0])
    return [os.path.relpath(file, common) for file in files]


def _groups(dataset: Any, loader: DataLoader) -> list[str] | None:
    """The group of each image in the order of the loader; None where there are none."""
    groups = getattr(dataset, "groups", None)
    return list(groups) if groups and isinstance(loader.sampler, SequentialSampler) else None
