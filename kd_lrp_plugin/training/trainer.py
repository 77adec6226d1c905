"""The driver: one torchdistill config in, one run folder out.

It runs torchdistill's own boxes, with a teacher or without, and adds what its example script
leaves out: overrides, a check before any work is done, validation of every loss term, a run that
goes on after a kill as if nothing had happened, and several processes on CPUs as well.
"""

import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch.utils.data import DataLoader, SequentialSampler
from torch.utils.tensorboard import SummaryWriter
from torchdistill.common import main_util

from kd_lrp_plugin.config.build import construct
from kd_lrp_plugin.config.document import Config, resolve_config
from kd_lrp_plugin.config.safety import unsafe_tags
from kd_lrp_plugin.metrics.efficiency import count_parameters
from kd_lrp_plugin.models.factory import timm_arguments
from kd_lrp_plugin.models.weights import load_weights
from kd_lrp_plugin.plots.figures import curves_figure
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.runs.predictions import predictions_csv
from kd_lrp_plugin.runs.provenance import list_files
from kd_lrp_plugin.torchdistill.high_level import check_finite
from kd_lrp_plugin.training.check.dry_run import check
from kd_lrp_plugin.training.experiment import LAST, MONITOR, Experiment
from kd_lrp_plugin.training.meter import Meter
from kd_lrp_plugin.utils.distributed import DistributedContext, init_distributed
from kd_lrp_plugin.utils.progress import NullProgress, current_progress
from kd_lrp_plugin.utils.validation import message

FORMAT = 2  # of the checkpoints: goes up when what they hold changes


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
    safe: bool = False,
) -> dict[str, Any]:
    """Train the student of a config, with its teacher if it has one, and test it.

    Given again, the same command goes on after the last finished epoch, and ends with the weights
    that it would have had without the interruption (bitwise on CPUs); on a finished run it only
    returns the summary. Under torchrun, every process calls it.

    Args:
        path: a torchdistill YAML file.
        overrides: see :func:`kd_lrp_plugin.config.document.resolve_config`.
        out: the run folder (:mod:`kd_lrp_plugin.runs.folder`), :func:`default_run_folder` if None.
        seed: of every random number generator, anew in each epoch.
        device: see :func:`kd_lrp_plugin.utils.distributed.init_distributed`.
        safe: refuse tags beyond :data:`kd_lrp_plugin.config.safety.HARMLESS`.

    Returns:
        The summary, as in the run folder.

    Raises:
        FileExistsError: if the run folder holds anything but this run.
        BlockingIOError: if another process is at work in it.
        FileNotFoundError: if there is no config.
        ValueError: for a config that cannot be run, with all its problems.
        FloatingPointError: if a loss is not finite; no step is taken with it.
        OSError: on a full disk, for example.
    """
    if seed < 0:
        raise ValueError(message("seed", "a number of 0 or more", seed, ""))
    config = resolve_config(path, overrides)
    with init_distributed(device) as here, ExitStack() as stack:
        if here.rank > 0:  # the first process speaks for all
            stack.enter_context(NullProgress())
        folder = RunFolder(out if out is not None else default_run_folder(path, seed))

        def claim() -> None:
            about = {"seed": seed, "processes": here.world, "files": list_files(config.text)}
            stack.enter_context(folder.claimed(config.text, about))

        here.first(claim)
        if here.first(lambda: folder.finished):
            current_progress().note(f"{folder.path} is finished already")
            return here.first(folder.summary)
        here.first(lambda: _refuse_problems(config, here, safe))
        main_util.set_seed(seed)
        run = Trainer(Experiment(construct(config), here, seed), folder, seed)
        state = here.first(folder.load)
        if here.rank == 0:
            folder.add_session(_session(config, overrides, here))
        if state is not None:
            run.restore(state)
            current_progress().note(f"{folder.path}: going on after epoch {run.epoch}")
        run.train()
        return run.test()


def _refuse_problems(config: Config, here: DistributedContext, safe: bool) -> None:
    problems = unsafe_tags(config) if safe else []
    problems = problems or check(config, here).problems
    if problems:
        raise ValueError("\n".join(problems))


class Trainer:
    """The epochs of one experiment, and what they leave in the folder."""

    def __init__(self, experiment: Experiment, folder: RunFolder, seed: int) -> None:
        self.experiment, self.folder, self.seed = experiment, folder, seed
        self.here = experiment.here
        self.records: list[dict[str, float]] = []
        self.best: dict[str, Any] = {}  # content of best.pt
        self.monitor = experiment.monitor

    @property
    def epoch(self) -> int:
        return len(self.records)

    def restore(self, state: Mapping[str, Any]) -> None:
        if state.get("format") != FORMAT:
            fix = "Finish the run with the version that began it, or delete the folder."
            got = f"format {state.get('format')}"
            raise ValueError(message("checkpoint", f"format {FORMAT}", got, fix))
        self.experiment.restore(state["experiment"])
        self.records, self.best = state["records"], state["best"]
        if self.here.rank == 0:
            self._save_best()  # may be missing, behind, or ahead of a checkpoint that was damaged
            self._write_records()

    # --- training -----------------------------------------------------------------------------

    def train(self) -> None:
        """The epochs that are left; after each, the folder holds all that the next one needs."""
        if self.experiment.finished:
            return
        with ExitStack() as stack:
            board = None
            if self.here.rank == 0:
                self.folder.clear_events()
                board = stack.enter_context(SummaryWriter(str(self.folder.path)))
                for metrics in self.records:
                    _show_on(board, metrics)
            while not self.experiment.finished:
                metrics = self._train_epoch()
                if board is not None:
                    _show_on(board, metrics)
                current_progress().epoch(metrics)

    def _train_epoch(self) -> dict[str, float]:
        experiment, started = self.experiment, time.time()
        number = self.epoch + 1
        self._set_seed(number)
        experiment.begin_epoch()
        rates = [group["lr"] for group in experiment.box.optimizer.param_groups]
        metrics = {"epoch": number, "stage": experiment.stage, "lr": rates[0]}
        metrics |= self._train_batches(number)
        metrics |= self._evaluate(experiment.val_loader, "val", f"epoch {number} val")[0]
        metrics["memory_mb"] = round(_memory(self.here), 1)
        metrics["seconds"] = round(time.time() - started, 2)
        improved = self._keep_best(metrics)
        self.records.append(metrics)
        experiment.end_epoch(
            metrics[MONITOR if self.monitor == LAST else self.monitor], self._stalls()
        )
        if self.here.rank == 0:
            self._save(improved)
        return metrics

    def _set_seed(self, number: int) -> None:
        """Seeds of its own make an epoch independent of how its process came to it."""
        key = np.random.SeedSequence([self.seed, number, self.here.rank])
        main_util.set_seed(int(key.generate_state(1)[0]))

    def _train_batches(self, number: int) -> dict[str, float]:
        experiment, box, started = self.experiment, self.experiment.box, time.time()
        loader = box.train_data_loader
        classifies = experiment.student is experiment.original
        with Meter(box.criterion, classifies=classifies) as meter:
            for images, targets, supplement in current_progress().track(
                loader, f"epoch {number}", len(loader)
            ):
                images, targets = images.to(self.here.device), targets.to(self.here.device)
                loss = experiment.training_loss(images, targets, supplement)
                check_finite(loss, meter.latest)
                meter.update(loss, targets)
                box.post_forward_process(loss=loss)
        seconds = time.time() - started
        metrics = meter.summary("train", self.here)
        images_seen = sum(self.here.gather(meter.images))
        metrics["images_per_second"] = round(images_seen / seconds, 1)
        return metrics

    def _value(self, metrics: Mapping[str, float]) -> float:
        """What is monitored; more is better."""
        if self.monitor == LAST:
            return metrics["epoch"]
        value = metrics[self.monitor]
        return value if self.monitor.endswith("accuracy") else -value

    def _keep_best(self, metrics: Mapping[str, float]) -> bool:
        """Keep the weights of an epoch that is the best so far; of equal ones the lower loss."""
        one_stage = "stage1" not in self.experiment.train  # losses of stages are no one measure
        quality = self._value(metrics), -metrics.get("val_loss", 0.0) if one_stage else 0.0
        improved = not self.best or quality > tuple(self.best["quality"])
        if improved:
            state = self.experiment.original.state_dict() if self.here.rank == 0 else {}
            self.best = {
                "model": {k: v.detach().to("cpu", copy=True) for k, v in state.items()},
                "classes": self.experiment.classes,
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
        # First what the next epoch needs; all else can be made again from it.
        self.folder.save(
            {
                "format": FORMAT,
                "experiment": self.experiment.state(),
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

        One image alone has no relation to others: where the criterion compares recordings, a batch
        of one counts for the accuracy only.
        """
        experiment = self.experiment
        redesigned = experiment.student is not experiment.original
        with experiment.evaluating(), Meter(experiment.box.criterion, keep) as meter:
            experiment.original.eval()
            least = 2 if meter.compares else 1
            for images, targets, *_ in current_progress().track(loader, what, len(loader)):
                images, targets = images.to(self.here.device), targets.to(self.here.device)
                if len(targets) >= least:
                    logits = experiment.original(images) if redesigned else None
                    meter.update(experiment.loss(images, targets), targets, logits)
                else:
                    of_teacher = experiment.teacher(images) if experiment.teacher else None
                    meter.count(experiment.original(images), targets, of_teacher)
        return meter.summary(prefix, self.here), meter.predictions(self.here)

    def test(self) -> dict[str, Any]:
        """Test the best weights, and write what a finished run has."""
        experiment, folder = self.experiment, self.folder
        self.here.first(lambda: None)  # the first process has written the weights
        load_weights(experiment.original, folder / "best.pt")
        self._set_seed(0)
        loader = experiment.test_loader
        tested, predictions = self._evaluate(loader, "test", "test", keep=True)
        experiment.box.clean_modules()
        summary = {
            **tested,
            "best_epoch": self.best["epoch"],
            **{k: v for k, v in self.records[self.best["epoch"] - 1].items() if k[:4] == "val_"},
            "epochs": self.epoch,
            "parameters": count_parameters(experiment.original),
            "seconds": round(sum(record["seconds"] for record in self.records), 1),
            "classes": experiment.classes,
            "preprocessing": experiment.preprocessing,
            "image_shape": list(experiment.test_set[0][0].shape),
            "seed": self.seed,
            "device": str(self.here.device),
        }
        if self.here.rank == 0:
            names = _names(experiment.test_set, loader)
            groups = _groups(experiment.test_set, loader)
            folder.write(
                "predictions.csv", predictions_csv(predictions, experiment.classes, names, groups)
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
            folder.write("summary.json", json.dumps(summary, indent=2))
            (folder / "previous.pt").unlink(missing_ok=True)
        return self.here.first(lambda: summary)


def _show_on(board: SummaryWriter, metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
        board.add_scalar(name, value, int(metrics["epoch"]))
    board.flush()


def _names(dataset: Any, loader: DataLoader) -> list[str] | None:
    """The files of a data set in the order of its loader; None where they are not known."""
    samples = getattr(dataset, "samples", None)
    if not samples or not isinstance(loader.sampler, SequentialSampler):
        return None
    files = [str(file) for file, _ in samples]
    common = os.path.commonpath(files) if len(files) > 1 else os.path.dirname(files[0])
    return [os.path.relpath(file, common) for file in files]


def _groups(dataset: Any, loader: DataLoader) -> list[str] | None:
    """The group of each image in the order of the loader; None where there are none."""
    groups = getattr(dataset, "groups", None)
    return list(groups) if groups and isinstance(loader.sampler, SequentialSampler) else None


def _memory(here: DistributedContext) -> float:
    """The peak so far, in 10^6 bytes: of the GPU where there is one, else of the process."""
    if here.device.type == "cuda":
        return torch.cuda.max_memory_allocated(here.device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _session(config: Config, overrides: Sequence[str], here: DistributedContext) -> dict[str, Any]:
    packages = ("torchvision", "timm", "captum", "torchdistill", "kd_lrp_plugin")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    cuda = here.device.type == "cuda"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "config": config.path,
        "overrides": list(overrides),
        "versions": versions | {name: version(name) for name in packages},
        "commit": _commit(Path(__file__).parent),
        "commit_of_config": _commit(Path(config.path).resolve().parent),
        "device": torch.cuda.get_device_name(here.device) if cuda else str(here.device),
        "processes": here.world,
        "threads": torch.get_num_threads(),
    }


def _commit(folder: Path) -> str | None:
    """The commit that is checked out there, marked if files differ from it; None without git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
