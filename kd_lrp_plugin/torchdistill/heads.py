"""Heads on the inside of a model: regressors for hints, and probes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.losses.registry import register_mid_level_loss
from torchdistill.models.registry import (
    get_adaptation_module,
    register_adaptation_module,
    register_auxiliary_model_wrapper,
)
from torchdistill.models.wrapper import AuxiliaryModelWrapper

from kd_lrp_plugin import losses
from kd_lrp_plugin.utils.validation import check_known, check_targets, message, strict


class ModelWithHeads(AuxiliaryModelWrapper):
    """A model, and small networks that read the outputs of its modules.

    The logits are those of the model, and what is saved in the end is the model without heads. A
    loss finds the output of a head where ``forward_hook`` lists it, as ``heads.<name>``. A student
    learns through its heads; a teacher does not: it stays in evaluation mode without gradients,
    and ``requires_grad: True`` (torchdistill's default) of its section trains the heads alone.

    Args:
        heads: by name, ``{path: ..., key: ..., kwargs: ...}``: the module that is read, and what
            reads it, an adaptation module of torchdistill's such as torch's ``Conv2d``, or our
            :func:`linear_probe`.
        teacher_model: the model, where it teaches.
        student_model: the model, where it learns.
        device: given by torchdistill, and not needed, nor are the next two.
        device_ids: likewise.
        distributed: likewise.

    Raises:
        ValueError: for a head without a path or key, or with a path that the model does not have.

    Example:
        .. code-block:: yaml

            student:
              forward_proc: forward_batch_only
              auxiliary_model_wrapper:
                key: ModelWithHeads
                kwargs:
                  heads:
                    hint:
                      path: layer2
                      key: Conv2d
                      kwargs: {in_channels: 48, out_channels: 128, kernel_size: 1}
              forward_hook: {input: [], output: [heads.hint]}
    """

    def __init__(
        self,
        heads: Mapping[str, Mapping[str, Any]],
        teacher_model: nn.Module | None = None,
        student_model: nn.Module | None = None,
        device: Any = None,
        device_ids: Any = None,
        distributed: bool = False,
    ) -> None:
        super().__init__()
        model = student_model if teacher_model is None else teacher_model
        assert model is not None
        self.teaches = teacher_model is not None
        self.model = model.requires_grad_(False) if self.teaches else model
        self.paths: dict[str, str] = {}
        self.heads = nn.ModuleDict()
        for name, head in heads.items():
            for key in ("path", "key"):
                check_known(f"ModelWithHeads: heads.{name}", key, head)
            for key in head:
                check_known(f"ModelWithHeads: heads.{name}", key, ("path", "key", "kwargs"))
            known = dict(model.named_modules())
            check_known(f"ModelWithHeads: heads.{name}.path", head["path"], known)
            self.paths[name] = head["path"]
            self.heads[name] = get_adaptation_module(head["key"], **(head.get("kwargs") or {}))

    def forward(self, sample_batch: Tensor) -> Tensor:
        read: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            return lambda _, __, output: read.update({name: output})

        modules = {name: self.model.get_submodule(path) for name, path in self.paths.items()}
        handles = [m.register_forward_hook(keep(name)) for name, m in modules.items()]
        if self.teaches:
            self.model.eval()
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.teaches):
                output = self.model(sample_batch)
        finally:
            for handle in handles:
                handle.remove()
        for name, head in self.heads.items():
            head(read[name])
        return output


@register_adaptation_module
@strict("linear_probe")
def linear_probe(in_features: int, num_classes: int) -> nn.Module:
    """Logits from the mean of a layer's output over all positions.

    Args:
        in_features: channels of the layer.
        num_classes: of the data set.

    Reference:
        Alain and Bengio, 2016. Deviation: of the mean over positions, not of every position.
    """
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_features, num_classes))


class ProbeKLLoss(nn.Module):
    r"""Soft labels from the inside: the student's probes learn from those of the teacher.

    .. math:: L = \frac1m \sum_{l=1}^m CE(t_l, y) + T^2\, KL(p_T(t_l) \,\|\, p_T(s_l))

    with the logits s and t of the probes of student and teacher. The first part teaches the
    teacher's probes the labels, the second, in which they are constant, the student and its
    probes. Student and teacher are :class:`ModelWithHeads`, whose heads are probes.

    Args:
        probes: names of the heads, the same for both models.
        temperature: of the KL divergence.

    Raises:
        ValueError: for no probes, or where the output of one is missing.

    Reference:
        After Boland, Tsaftaris and Dahdouh, MELBA 2025:020, whose formulas are not followed here.
        Known deviation: the teacher's probes are trained along with the student, not before.
    """

    def __init__(self, probes: Sequence[str], temperature: float = 4.0) -> None:
        super().__init__()
        if isinstance(probes, str) or not probes:
            fix = "Give the heads that are probes, such as [layer2, layer3]."
            raise ValueError(message("ProbeKLLoss: probes", "a list of names", repr(probes), fix))
        self.probes, self.temperature = list(probes), temperature

    def forward(
        self, student_io_dict: Mapping, teacher_io_dict: Mapping, targets: Tensor
    ) -> Tensor:
        parts = []
        for name in self.probes:
            student = _get_output("student", name, student_io_dict)
            teacher = _get_output("teacher", name, teacher_io_dict)
            check_targets("ProbeKLLoss", targets, teacher)
            with torch.autocast(teacher.device.type, enabled=False):
                kind = torch.promote_types(teacher.dtype, torch.float32)  # autocast's are half
                parts.append(nn.functional.cross_entropy(teacher.to(kind), targets))
                parts.append(losses.kl_divergence(student, teacher, self.temperature))
        return torch.stack(parts).sum() / len(self.probes)


def _get_output(role: str, name: str, io_dict: Mapping) -> Tensor:
    path = f"heads.{name}"
    if path not in io_dict:
        fix = f"List it in train.{role}.forward_hook.output, and make it in ModelWithHeads."
        raise ValueError(message("ProbeKLLoss", f"an output of {path} of the {role}", "none", fix))
    return io_dict[path]["output"]


register_auxiliary_model_wrapper(strict("ModelWithHeads")(ModelWithHeads), key="ModelWithHeads")
register_mid_level_loss(strict("ProbeKLLoss")(ProbeKLLoss), key="ProbeKLLoss")
