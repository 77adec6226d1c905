"""The recording forward procedure, and access to what it has recorded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn
from torchdistill.core.interfaces.registry import register_forward_proc_func

from kd_lrp_plugin.relevance.methods import METHODS
from kd_lrp_plugin.relevance.recording import Recording, find_logits, record
from kd_lrp_plugin.utils.validation import check_known, message, strict

_RECORDER_HELP = (
    "Set train.{role}.forward_proc to !import_call {{key: kd_lrp_plugin.torchdistill.recorder, "
    "init: {{kwargs: {{layers: [...], method: ...}}}}}}."
)


_WRAPPER_HELP = (
    "Set dataset_wrapper: {{key: companions, kwargs: {{{name}: True}}}} of the loader; for losses, "
    "take a forward_proc that hands it on: a recorder, or forward_with_companions."
)
VIEWS = ("image", "clean")
_KEY = "kd_lrp_recorder("


@strict("recorder")
def recorder(
    layers: Sequence[str] | str = "auto", method: str = "gradient_activation", view: str = "image"
) -> str:
    """Make and register a forward procedure that records the model at ``layers``.

    Use one for the teacher and one for the student, in ``train.teacher`` and ``train.student``
    or in a stage. A model without trainable parameters is set to evaluation mode and recorded
    with gradients, which torchdistill does neither.

    What the data set wrapper ``companions`` adds to the batch is kept beside the recording, for
    losses that need it.

    Args:
        layers: see :func:`kd_lrp_plugin.relevance.recording.record`; of a transformer its blocks
            or stages.
        method: see :data:`kd_lrp_plugin.relevance.methods.METHODS`; ``attn_lrp`` for AttnLRP.
        view: "clean" runs a frozen teacher on the image without its marker, which ``companions``
            adds, while the student sees the marked one: its logits, maps and predictions are those
            of the clean image. A loader without the wrapper counts the accuracy only, of marked
            images for both, as always where the training's wrapper is missing.

    Returns:
        The key under which it is registered, which is what ``forward_proc`` takes.

    Raises:
        ValueError: for an unknown method or view; from a step, if there is no clean view, or the
            model that is to see it is trained.

    Example:
        .. code-block:: yaml

            train_data_loader:
              dataset_wrapper: {key: companions, kwargs: {clean: True}}
            teacher:
              requires_grad: False
              forward_proc: !import_call
                key: kd_lrp_plugin.torchdistill.recorder
                init: {kwargs: {layers: [layer2, layer3], view: clean}}
    """
    check_known("recorder: method", method, METHODS)
    check_known("recorder: view", view, VIEWS)

    def forward_recorded(
        model: nn.Module, sample_batch: Tensor, targets: Any = None, supp_dict: Any = None
    ) -> Tensor:
        frozen = not any(parameter.requires_grad for parameter in model.parameters())
        if frozen:
            model.eval()
        if view == "clean":
            if not frozen:
                got, fix = "one that is trained", "Give the student a recorder of its own, without."
                raise ValueError(message("recorder: view: clean", "a frozen teacher", got, fix))
            clean = _find_companion("recorder: view: clean", supp_dict, "clean")
            sample_batch = clean.to(sample_batch.device)
        with record(model, layers, method) as recording:
            output = model(sample_batch)
        logits: Any = find_logits("recorder", output)
        logits._kd_lrp_recording = recording
        logits._kd_lrp_companions = supp_dict
        return output

    key = f"{_KEY}{method}, {layers}{', clean' * (view == 'clean')})"
    register_forward_proc_func(forward_recorded, key=key)
    return key


def find_method(forward_proc: object) -> str | None:
    """The method of a :func:`recorder` by its key; None for another forward procedure."""
    key = str(forward_proc)
    return key.removeprefix(_KEY).partition(",")[0] if key.startswith(_KEY) else None


@register_forward_proc_func
def forward_with_companions(
    model: nn.Module, sample_batch: Tensor, targets: Any = None, supp_dict: Any = None
) -> Any:
    """torchdistill's ``forward_batch_only``, for losses that need what ``companions`` adds.

    A :func:`recorder` hands it on as well.
    """
    output = model(sample_batch)
    logits: Any = find_logits("forward_with_companions", output)
    logits._kd_lrp_companions = supp_dict
    return output


@dataclass(frozen=True)
class CachedRecording:
    """What a teacher has answered before, in the place of its recording.

    Attributes:
        layers: names of the target layers.
        method: name of the method.
        answers: by question of a loss, maps or features of each layer, in the order of ``layers``.
    """

    layers: list[str]
    method: str
    answers: Mapping[str, list[Tensor]]

    def answer(self, question: str, where: str) -> list[Tensor]:
        """The maps or features that a loss has asked for when the cache was made."""
        if question not in self.answers:
            self._refuse(where)
        return self.answers[question]

    @property
    def activations(self) -> NoReturn:
        """Not there, like :meth:`maps`: a loss of one's own asks for what no cache knows of."""
        self._refuse("recorded: activations")

    def maps(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse("recorded: maps")

    def _refuse(self, where: str) -> NoReturn:
        expected = f"a question that the cached teacher was asked ({', '.join(self.answers)})"
        fix = "Leave train.teacher.cache out, or make the loss by register_recorded_loss."
        raise ValueError(message(where, expected, "another", fix))


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


def companion(io_dict: Mapping[str, Any], name: str, where: str = "companion") -> Any:
    """What ``companions`` has added to the batch: for a loss of yours, as :func:`recorded` is.

    Args:
        io_dict: what torchdistill gives a loss of the student, see :func:`recorded`.
        name: "clean", "mask", "mask_known", "group" or "group_name".
        where: name of the loss, for the messages.

    Returns:
        A tensor of n entries, on the device of the logits; of "group_name" a list of names.

    Raises:
        ValueError: if the loader or the forward procedure does not hand it on.
    """
    logits = get_logits(where, "student", io_dict)
    found = _find_companion(where, getattr(logits, "_kd_lrp_companions", None), name)
    return found.to(logits.device) if isinstance(found, Tensor) else found


def _find_companion(where: str, supplement: Any, name: str) -> Any:
    if not isinstance(supplement, Mapping) or name not in supplement:
        asked = name.partition("_")[0]
        fix = _WRAPPER_HELP.format(name=asked)
        raise ValueError(message(where, f"a batch with {name!r} of companions", "none", fix))
    return supplement[name]


def get_logits(where: str, role: str, io_dict: Mapping[str, Any]) -> Tensor:
    if "." not in io_dict:
        fix = f"Give models.{role}_model and train.{role}."
        raise ValueError(message(where, f"a {role} model", "none", fix))
    return find_logits(where, io_dict["."]["output"])
