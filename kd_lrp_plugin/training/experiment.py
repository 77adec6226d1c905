"""A config made real: models, data sets, and the state of their training."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from torch.utils.data.distributed import DistributedSampler
from torchdistill.datasets.util import build_data_loader
from torchdistill.datasets.wrapper import BaseDatasetWrapper

from kd_lrp_plugin.config.build import Assembly, check_classes, get_stages
from kd_lrp_plugin.models.factory import get_pretrained_hash
from kd_lrp_plugin.torchdistill.balance import GradientBalance
from kd_lrp_plugin.torchdistill.group_dro import GroupDROLoss
from kd_lrp_plugin.training.box import Datasets, build_box, check_head
from kd_lrp_plugin.training.cache.teacher import cache_teacher
from kd_lrp_plugin.training.loading import Loading
from kd_lrp_plugin.training.parts import find_parts
from kd_lrp_plugin.utils.distributed import DistributedContext

MONITOR = "val_accuracy"
AUC = "val_auc"  # computed where it is the monitor
OF_PREDICTIONS = (MONITOR, "val_subclass_accuracy", AUC)
"""Monitors that are the better, the higher, and one measure whatever the criterion is."""
LAST = "last"  # as a monitor: no epoch is chosen, the last one is kept
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Experiment:
    """Models, data and torchdistill's box of one config.

    Args:
        assembly: all that the config names; used up, for torchdistill changes it in place.
        context: this process; under torchrun the student is wrapped for it.
        seed: of the order of the images under torchrun.

    Attributes:
        box: torchdistill's, single-stage or multi-stage.
        loading: of the images in this stage.
        parts: the data sets by what they are for, and their classes.
        pretrained: by key path, the hash of the weights of timm that a model begins with.
        cache: of the teacher in this stage; None without ``train.teacher.cache``.
        beside_teacher: the folder of the teacher's checkpoint; None without one.
    """

    def __init__(self, assembly: Assembly, context: DistributedContext, seed: int = 0) -> None:
        content = assembly.content
        self.context = context
        self.train = content["train"]
        self._seed = seed
        self._datasets = Datasets(content["datasets"])
        self._test_loader = content["test"]["test_data_loader"]
        self.loading = Loading(self._test_loader)
        self.parts = parts = find_parts(self._datasets, self.train, self._test_loader)
        models = {}
        self.pretrained: dict[str, str] = {}
        checkpoint = content["models"].get("teacher_model", {}).get("src_ckpt")
        self.beside_teacher = None
        if checkpoint:
            self.beside_teacher = Path(os.path.expandvars(checkpoint)).expanduser().parent
        for role, built in assembly.models.items():
            if found := get_pretrained_hash(built.module):
                self.pretrained[f"models.{role}.pretrained"] = found
            check_classes(built, content["models"][role], f"models.{role}", parts.outputs)
            # Depthwise convolutions take less time so, on CPUs too.
            models[role] = built.module.to(context.device).to(memory_format=torch.channels_last)
            check_head(role, models[role], parts.val, parts.classes)
        self._taught_by = _sum_tensors(models["teacher_model"]) if "teacher_model" in models else {}
        self.box = build_box(models, self._datasets, self.train, context)
        self._enter_stage()

    # --- models -------------------------------------------------------------------------------

    @property
    def student_name(self) -> str:
        """What the box calls the model that is trained."""
        return "student_model" if hasattr(self.box, "student_model") else "model"

    @property
    def student(self) -> nn.Module:
        """The model that is trained, as the box has it in this stage, unwrapped."""
        model = getattr(self.box, self.student_name)
        return model.module if isinstance(model, DistributedDataParallel) else model

    @property
    def original(self) -> nn.Module:
        """The model that is trained, as ``models`` describes it, whatever a stage makes of it."""
        return getattr(self.box, f"org_{self.student_name}")

    @property
    def teacher(self) -> nn.Module | None:
        return getattr(self.box, "teacher_model", None)

    @property
    def original_teacher(self) -> nn.Module | None:
        """The teacher as ``models`` describes it, whatever a stage makes of it."""
        return getattr(self.box, "org_teacher_model", None)

    # --- one step -----------------------------------------------------------------------------

    def loss(self, images: Tensor, targets: Tensor, supplement: Any = None) -> Tensor:
        """Forward passes and criterion, in the precision of ``train.precision``."""
        kind = PRECISIONS[self.train.get("precision") or "float32"]
        with torch.autocast(self.context.device.type, kind, enabled=kind != torch.float32):
            return self.box.forward_process(images, targets, supplement)

    def missing_wrapper(self, loader: DataLoader) -> str | None:
        """The data set wrapper that the training's loader has and this one lacks, if there is one.

        It adds to a batch what the criterion needs (negative samples for CRD, rotated images for
        SSKD), so that without it there is an accuracy, but no loss.
        """
        plain = {BaseDatasetWrapper, Subset, *map(type, self._datasets.values())}
        dataset = self.box.train_data_loader.dataset
        wrapper = type(dataset.images if self.cache else dataset)
        return None if wrapper in plain | {type(loader.dataset)} else wrapper.__name__

    def training_loss(self, images: Tensor, targets: Tensor, supplement: Any) -> Tensor:
        """:meth:`loss`; the processes wait for each other in the last batch of a step only."""
        self.box.pre_forward_process(sample_batch=images, targets=targets, supp_dict=supplement)
        model = getattr(self.box, self.student_name)
        last = (self.box.stage_grad_count + 1) % self.box.grad_accum_step == 0
        if last or not isinstance(model, DistributedDataParallel):
            return self.loss(images, targets, supplement)
        with model.no_sync():
            return self.loss(images, targets, supplement)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode of models and losses, without gradients; no process waits inside.

        Also of the teacher, which a run that resumes in its test has given no epoch to begin with.
        """
        shared = getattr(self.box, self.student_name)
        setattr(self.box, self.student_name, self.student)
        # Batch statistics differ between processes, each of which has seen its share. Those of the
        # first are saved with its weights, so all must evaluate with them.
        for buffer in self.student.buffers():
            self.context.broadcast(buffer)
        for model in (self.student, self.original, self.teacher, self.original_teacher):
            if model is not None:
                model.eval()
        parts = [part for loss in self.losses().values() for part in loss.modules()]
        modes = [(part, part.training) for part in parts]  # no epoch begins by setting them
        for part in parts:
            part.training = False
        try:
            with torch.no_grad():
                yield
        finally:
            for part, mode in modes:
                part.training = mode
            setattr(self.box, self.student_name, shared)

    def begin_epoch(self) -> None:
        """Modes of all modules: what is frozen is frozen with its batch statistics."""
        if self.cache is not None:
            self.cache.views.epoch = self.epochs_done
            self.cache.prepare()
        self.box.pre_epoch_process(epoch=self.epochs_done)
        trained = list(self.student.modules())
        if self.teacher is not None:
            self.teacher.train(self.box.teacher_updatable)
            trained += self.teacher.modules()  # of one that is trained, a part may be frozen
        for module in trained:
            weights = list(module.parameters(recurse=False))
            if isinstance(module, _BatchNorm) and weights:
                module.train(module.training and any(w.requires_grad for w in weights))

    @property
    def monitor(self) -> str:
        """The metric that says which epoch is the best: higher if of predictions, else lower."""
        return self.train.get("monitor", MONITOR)

    @property
    def loss_is_measure(self) -> bool:
        """Whether the losses of different epochs are one measure: of one criterion, unchanged.

        Neither the weights of its terms change, nor those of groups within one.
        """
        changing = "stage1" in self.train or "pre_epoch_process" in self.train
        by_group = any(isinstance(loss, GroupDROLoss) for loss in self.losses().values())
        return not changing and not by_group and self._balance is None

    @property
    def _balance(self) -> GradientBalance | None:
        found = getattr(self.box.criterion, "balance", None)
        return found if isinstance(found, GradientBalance) else None

    @property
    def pending(self) -> bool:
        """Whether gradients wait for their step, which may reach across epochs."""
        return self.box.stage_grad_count % self.box.grad_accum_step != 0

    def losses(self) -> dict[str, nn.Module]:
        """The criterion and its terms, which torchdistill keeps in a plain dict."""
        terms = getattr(self.box.criterion, "term_dict", {})
        return {"": self.box.criterion} | {name: term for name, (term, _) in terms.items()}

    def list_models(self) -> dict[str, nn.Module]:
        """Every model by name, each once; a stage may train another than it returns."""
        named = {
            "original": self.original,
            "student": self.student,
            "teacher": self.teacher,
            "original_teacher": self.original_teacher,
        }
        models: dict[str, nn.Module] = {}
        for name, model in named.items():
            if model is not None and not any(model is other for other in models.values()):
                models[name] = model
        return models

    def list_changing(self) -> dict[str, nn.Module]:
        """Those that are not what the config says: all but a teacher that nothing has changed.

        A frozen one, too, may have been trained in an earlier stage, follow its student, or have
        a part that this stage has added.
        """
        return {
            name: model
            for name, model in self.list_models().items()
            if name in ("original", "student")
            or self.box.teacher_updatable
            or not _sum_tensors(model).items() <= self._taught_by.items()
        }

    # --- stages -------------------------------------------------------------------------------

    @property
    def stage(self) -> int:
        return getattr(self.box, "stage_number", 1)

    @property
    def stage_config(self) -> dict[str, Any]:
        return list(get_stages(self.train).values())[self.stage - 1]

    @property
    def finished(self) -> bool:
        return self.epochs_done >= self.box.num_epochs

    @property
    def epochs_done(self) -> int:
        """Epochs behind the box, those that an early stop has skipped included."""
        return self.box.current_epoch

    def end_epoch(self, metric: float, stop: bool) -> None:
        """Schedulers step; the next stage begins where this one ends, or is stopped."""
        box, before = self.box, self.stage
        if self.pending:  # a step reaches into the next epoch
            for model in self.list_changing().values():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        # Each process has its own, while a checkpoint holds but one: the mean is
                        # what the step will take, and what a resumed run begins with.
                        self.context.all_reduce_mean(parameter.grad)
        end = getattr(box, "stage_end_epoch", box.num_epochs)
        if stop:
            box.current_epoch = end - 1
        if box.current_epoch + 1 == end:
            setattr(box, self.student_name, self.student)  # the next stage wraps it again
        box.post_epoch_process(metrics=metric)
        if not hasattr(box, "stage_number"):
            box.current_epoch += 1
        if self.stage != before:
            for model in self.list_changing().values():
                model.zero_grad()  # a step that the stage before has not completed
            self._enter_stage()

    def go_to_stage(self, number: int) -> None:
        """Later stages of a new box without training."""
        if number > self.stage:
            setattr(self.box, self.student_name, self.student)
            while self.stage < number:
                self.box.advance_to_next_stage()
            self._enter_stage()

    def _enter_stage(self) -> None:
        box = self.box
        if not hasattr(box, "current_epoch"):
            box.current_epoch = 0
        for loss in self.losses().values():
            loss.to(self.context.device)  # torchdistill leaves the weights of a loss behind
        if (balance := self._balance) is not None:
            balance.context = self.context  # a check is alone, whatever torchrun has started
        key_path = list(get_stages(self.train))[self.stage - 1]
        precision = PRECISIONS[self.train.get("precision") or "float32"]
        losses = self.losses().values()
        self.cache = cache_teacher(
            key_path, self.stage_config, box, losses, self.context.device, precision
        )
        stages = list(get_stages(self.train).values())[: self.stage]
        kept = [found for stage in stages if (found := stage.get("val_data_loader"))]
        self.val_loader = self._loader(kept[-1])  # that of an earlier stage without one of its own
        self.test_loader = self._loader(self._test_loader)
        if self.context.world_size > 1:
            sampler = box.train_data_loader.batch_sampler.sampler
            if isinstance(sampler, DistributedSampler):
                sampler.seed = self._seed
            self._share_student()
        loaders = [box.train_data_loader, self.val_loader, self.test_loader]
        self.loading.enter(loaders, stages)

    def _share_student(self) -> None:
        trained = [parameter.requires_grad for parameter in self.student.parameters()]
        if any(trained) and getattr(self.box, self.student_name) is self.student:
            ids = [self.context.device.index] if self.context.device.type == "cuda" else None
            shared = DistributedDataParallel(
                self.student, device_ids=ids, find_unused_parameters=not all(trained)
            )
            setattr(self.box, self.student_name, shared)

    def _loader(self, config: Mapping[str, Any]) -> DataLoader:
        """A loader of this process's share, every image once over all processes."""
        dataset = self._datasets[config["dataset_id"]]
        if self.context.world_size > 1:
            dataset = Subset(
                dataset, range(self.context.rank, len(dataset), self.context.world_size)
            )
        return build_data_loader(dataset, config, False)


def _sum_tensors(model: nn.Module) -> dict[int, float]:
    """The sum of each parameter and buffer, by which a change of them is found."""
    tensors = (*model.parameters(), *model.buffers())
    return {id(tensor): float(tensor.detach().double().sum()) for tensor in tensors}
