"""The recording forward procedure, and access to what it has recorded."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchdistill.core.interfaces.registry import register_forward_proc_func

from kd_lrp_plugin.relevance.methods import METHODS
from kd_lrp_plugin.relevance.recording import Recording, find_logits, record
from kd_lrp_plugin.utils.validation import check_known, message, strict

_RECORDER_HELP = (
    "Set train.{role}.forward_proc to !import_call {{key: kd_lrp_plugin.torchdistill.recorder, "
    "init: {{kwargs: {{layers: [...], method: ...}}}}}}."
)


@strict("recorder")
def recorder(layers: Sequence[str] | str = "auto", method: str = "gradient_activation") -> str:
    """Make and register a forward procedure that records the model at ``layers``.

    Use one for the teacher and one for the student, in ``train.teacher`` and ``train.student``
    or in a stage. A model without trainable parameters is set to evaluation mode and recorded
    with gradients, which torchdistill does neither.

    Args:
        layers: see :func:`kd_lrp_plugin.relevance.recording.record`.
        method: see :data:`kd_lrp_plugin.relevance.methods.METHODS`.

    Returns:
        The key under which it is registered, which is what ``forward_proc`` takes.
    """
    check_known("recorder: method", method, METHODS)

    def forward_recorded(
        model: nn.Module, sample_batch: Tensor, targets: Any = None, supp_dict: Any = None
    ) -> Tensor:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            model.eval()
        with record(model, layers, method) as recording:
            output = model(sample_batch)
        logits: Any = find_logits("recorder", output)
        logits._kd_lrp_recording = recording
        return output

    key = f"kd_lrp_recorder({method}, {layers})"
    register_forward_proc_func(forward_recorded, key=key)
    return key


def recorded(
    io_dict: Mapping[str, Any], role: str, where: str = "recorded"
) -> tuple[Tensor, Recording]:
    """Logits of a model and what was recorded on the way to them: all that a loss of yours needs.

    Args:
        io_dict: what torchdistill gives a loss of this model: ``student_io_dict`` or
            ``teacher_io_dict`` of a mid-level loss, ``io_dict["student"]`` of a high-level one.
        role: "student" or "teacher", for the messages.
        where: name of the loss, for the messages.

    Returns:
        The logits (n, classes) and the :class:`~kd_lrp_plugin.relevance.recording.Recording`
        whose ``maps(logits, targets, create_graph=...)`` and ``activations`` belong to them.

    Raises:
        ValueError: if there is no such model, or its forward procedure is no :func:`recorder`.

    Example:
        .. code-block:: python

            @register_mid_level_loss
            class MapsOfTheFirstClass(nn.Module):
                def forward(self, student_io_dict, teacher_io_dict, targets):
                    logits, recording = recorded(student_io_dict, "student", "MapsOfTheFirstClass")
                    maps = recording.maps(logits, torch.zeros_like(targets), create_graph=True)
                    return torch.stack([m.mean() for m in maps]).mean()
    """
    logits = get_logits(where, role, io_dict)
    recording = getattr(logits, "_kd_lrp_recording", None)
    if recording is None:
        fix = _RECORDER_HELP.format(role=role)
        raise ValueError(message(where, f"logits of the {role} with a recording", "none", fix))
    return logits, recording


def get_logits(where: str, role: str, io_dict: Mapping[str, Any]) -> Tensor:
    if "." not in io_dict:
        fix = f"Give models.{role}_model and train.{role}."
        raise ValueError(message(where, f"a {role} model", "none", fix))
    return find_logits(where, io_dict["."]["output"])
