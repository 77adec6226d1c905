"""What a pass over a data set has shown: means of every loss term, accuracy, predictions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.losses import mid_level

from kd_lrp_plugin.losses import fold_logits, fold_targets
from kd_lrp_plugin.relevance.recording import find_logits
from kd_lrp_plugin.torchdistill.high_level import DisWOTPlusLoss
from kd_lrp_plugin.torchdistill.mid_level import RecordedLoss
from kd_lrp_plugin.torchdistill.right_reasons import RightReasonsLoss
from kd_lrp_plugin.torchdistill.subclass import SubclassAuxiliaryLoss
from kd_lrp_plugin.utils.distributed import DistributedContext
from kd_lrp_plugin.utils.validation import check_targets, find_labelled, message

COMPARING = (
    RecordedLoss,
    SubclassAuxiliaryLoss,
    mid_level.CCKDLoss,
    mid_level.DISTLoss,
    mid_level.PKTLoss,
    mid_level.RKDLoss,
    mid_level.SKDDirectionLoss,
    mid_level.SPKDLoss,
)
"""Losses that set the samples of a batch in relation, and say nothing of one alone."""

_COUNTING = (RecordedLoss, RightReasonsLoss)  # batches, and maps without relevance


class Meter:
    """Means over a pass, read off torchdistill's criterion while it works.

    Args:
        criterion: of torchdistill's box; its hooks are there while the context is open.
        keep: whether to keep the predictions, for :meth:`predictions`.
        classifies: whether the criterion is given logits; features, say, have no accuracy.
        subclass_of: the class index of each output, where the outputs are subclasses: accuracy and
            predictions are of the classes then, and so is what ``subclass_accuracy`` is beside.
        auc: whether the summary has :func:`kd_lrp_plugin.metrics.classification.macro_auc`, too.

    Attributes:
        latest: the terms of the latest batch.
        images: how many were seen.
    """

    def __init__(
        self,
        criterion: nn.Module,
        keep: bool = False,
        classifies: bool = True,
        subclass_of: Sequence[int] = (),
        auc: bool = False,
    ) -> None:
        self.latest: dict[str, Tensor] = {}
        self.images = 0
        self._keep, self._classifies, self._subclass_of = keep or auc, classifies, subclass_of
        self._auc = auc
        self._kept: list[dict[str, list[Any]]] = []  # of each batch, columns of predictions
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._criterion = criterion
        self._terms: dict[str, nn.Module] = {
            name: term for name, (term, _) in getattr(criterion, "term_dict", {}).items()
        }
        self._outputs: dict[str, Tensor | None] = {}
        self._handles: list[Any] = []

    @property
    def compares(self) -> bool:
        """Whether a term is of :data:`COMPARING`, and so may need more than one image."""
        return any(isinstance(term, COMPARING) for term in self._terms.values())

    def __enter__(self) -> "Meter":
        def read_outputs(_: nn.Module, inputs: tuple) -> None:
            self.latest.clear()
            for role in ("student", "teacher"):
                self._outputs[role] = inputs[0][role].get(".", {}).get("output")

        def read_term(name: str) -> Callable[..., None]:
            def read(term: nn.Module, _: tuple, value: Tensor) -> None:
                if getattr(term, "computed", True):
                    self.latest[name] = value.detach()

            return read

        self._handles = [self._criterion.register_forward_pre_hook(read_outputs)]
        for name, term in self._terms.items():
            self._handles.append(term.register_forward_hook(read_term(name)))
            if isinstance(term, _COUNTING):
                term.reset()
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._outputs.clear()

    def update(
        self,
        loss: Tensor,
        targets: Tensor,
        logits: Tensor | None = None,
        of_teacher: Tensor | None = None,
    ) -> None:
        """Count a batch that the criterion has just seen.

        Args:
            loss: what the criterion returned.
            targets: class indices (n,), or soft labels (n, classes).
            logits: of the student, where they are not what the criterion was given.
            of_teacher: likewise.
        """
        for name, value in {"loss": loss.detach(), **self.latest}.items():
            self._add(name, value.float(), len(targets))
        criterion = self._criterion
        if torch.is_grad_enabled() and isinstance(criterion, DisWOTPlusLoss) and criterion.balance:
            for name, factor in criterion.factors.items():
                self._add(f"{name}_factor", torch.as_tensor(factor), len(targets))
        student = self._outputs["student"] if logits is None else logits
        assert student is not None
        teacher = self._outputs["teacher"] if of_teacher is None else of_teacher
        self.count(
            find_logits("student", student),  # of several outputs, such as GoogLeNet's
            targets,
            None if teacher is None else find_logits("teacher", teacher),
        )

    def count(self, logits: Tensor, targets: Tensor, teacher: Tensor | None = None) -> None:
        """Count the predictions of a batch.

        Raises:
            FloatingPointError: for logits that are not finite, which have no largest one.
            ValueError: for targets that are neither class indices nor soft labels; several
                classes at once have no largest one either.
        """
        if not bool(torch.isfinite(logits).all()):
            got, fix = f"nan or inf for some of {len(logits)} images", "Lower the learning rate."
            raise FloatingPointError(message("logits", "finite logits", got, fix))
        self.images += len(targets)
        if not self._classifies:
            return
        known = find_labelled(targets) if torch.is_grad_enabled() else None
        if known is not None:  # in training; what is evaluated must have labels
            logits, targets, teacher = logits[known], targets[known], None
            if not len(targets):
                return
        columns: dict[str, list[Any]] = {}
        if subclass_of := self._subclass_of:
            if teacher is not None and teacher.shape[1:] != (len(subclass_of),):
                teacher = None
            columns = self._count_subclasses(logits, targets, teacher)
            logits, targets = fold_logits(logits, subclass_of), fold_targets(targets, subclass_of)
            teacher = None if teacher is None else fold_logits(teacher, subclass_of)
        check_targets("targets", targets, logits)
        labels = targets.argmax(1) if targets.is_floating_point() else targets
        right = (logits.detach().argmax(1) == labels).float()
        self._add("accuracy", right.mean(), len(targets))
        if self._keep:
            # A stage may compare other outputs of its teacher.
            of_teacher = teacher if teacher is not None and teacher.ndim == 2 else None
            columns |= {
                "label": labels.tolist(),
                "student": _list_probabilities(logits, len(labels)),
                "teacher": _list_probabilities(of_teacher, len(labels)),
            }
            self._kept.append(columns)

    def _count_subclasses(
        self, logits: Tensor, targets: Tensor, teacher: Tensor | None
    ) -> dict[str, list[Any]]:
        """What predictions of subclasses add to those of classes, where they are kept."""
        labels = targets.argmax(1) if targets.is_floating_point() else targets
        known = labels < len(self._subclass_of)
        if known.any():
            right = (logits.detach().argmax(1) == labels)[known].float()
            self._add("subclass_accuracy", right.mean(), len(right))
        if not self._keep:
            return {}
        pairs = zip(labels.tolist(), known.tolist(), strict=True)
        return {
            "subclass": [label if is_known else None for label, is_known in pairs],
            "student subclass": _list_probabilities(logits, len(labels)),
            "teacher subclass": _list_probabilities(teacher, len(labels)),
        }

    def _add(self, name: str, mean: Tensor, n: int) -> None:
        total, count = self._sums.get(name, (torch.zeros_like(mean), 0))
        self._sums[name] = total + mean * n, count + n

    def summary(self, prefix: str, context: DistributedContext) -> dict[str, float]:
        """The means over all processes, under names that begin with ``prefix``.

        Raises:
            ValueError: where ``auc`` is asked for, and all images are of one class.
        """
        parts = context.gather({name: (float(total), n) for name, (total, n) in self._sums.items()})
        names = dict.fromkeys(name for part in parts for name in part)
        means = {}
        for name in names:
            total, count = map(sum, zip(*(p[name] for p in parts if name in p), strict=True))
            means[f"{prefix}_{name}"] = total / count
        for name, term in self._terms.items():
            if name not in names:  # its weight is zero for now
                continue
            if isinstance(term, _COUNTING) and term.zero_maps is not None:
                means[f"{prefix}_{name}_zero_maps"] = sum(context.gather(float(term.zero_maps)))
        if self._auc:
            means[f"{prefix}_auc"] = self._measure_auc(prefix, context)
        return means

    def _measure_auc(self, prefix: str, context: DistributedContext) -> float:
        from kd_lrp_plugin.metrics.classification import macro_auc  # seconds, and seldom asked for

        rows = self.predictions(context)
        labels = torch.tensor([row["label"] for row in rows])
        area = macro_auc(torch.tensor([row["student"] for row in rows]), labels)
        if area is None:
            got = f"{len(rows)} images, all of class {rows[0]['label']}"
            fix = "Monitor val_accuracy, or take other images."
            raise ValueError(message(f"{prefix}_auc", "images of two classes", got, fix))
        return area

    def predictions(self, context: DistributedContext) -> list[Mapping[str, Any]]:
        """Per image, in the order of the data set: label and probabilities of both models.

        Where the outputs are subclasses, also ``subclass``, its index or None where it is unknown,
        and their probabilities, ``student subclass`` and ``teacher subclass``.

        The processes must have taken turns through the data set.
        """
        rows = [
            dict(zip(columns, values, strict=True))
            for columns in self._kept
            for values in zip(*columns.values(), strict=True)
        ]
        shares = context.gather(rows)
        longest = max(map(len, shares))
        return [share[turn] for turn in range(longest) for share in shares if turn < len(share)]


def _list_probabilities(logits: Tensor | None, n: int) -> list[list[float] | None]:
    return [None] * n if logits is None else logits.detach().float().softmax(1).tolist()
