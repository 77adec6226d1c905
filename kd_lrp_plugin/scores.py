r"""Scores of untrained students against a teacher: the lower, the better.

Each is a function of two observations on the same images, registered in :data:`SCORES` with what
it needs: how the networks are initialised, and in which mode they run. An observation computes
what a score asks for once, so that the teacher's side is computed once for all candidates.

======================  ===========================================================================
score                   what it is
======================  ===========================================================================
``diswot``              Grad-CAM correlations by L2 + feature relations by L2; its parts are
                        ``gradcam_l2`` and ``relation_l2`` (DisWOT, eq. 2.10-2.13 of the thesis)
``diswot_lrp_cosine``   relevance by cosine + feature relations by cosine; its parts are
                        ``lrp_cosine`` and ``relation_cosine`` (the thesis, eq. 2.21-2.27)
``diswot_reference``    the formula of DisWOT's published code; its parts are
                        ``reference_semantic`` and ``reference_relation``
``reference_exact``     the same with rows normalised exactly, however short they are
``parameters``,         size and cost, negated: the bigger, the better. What any claim must beat.
``macs``
``nwot``, ``synflow``,  baselines that see no teacher
``bn_log_variance``
======================  ===========================================================================
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_lrp_plugin.checks import check_targets, message
from kd_lrp_plugin.efficiency import count_macs, count_parameters
from kd_lrp_plugin.losses import (
    correlation_l2,
    relation_cosine,
    relation_l2,
    resize_maps,
    semantic_cosine,
)
from kd_lrp_plugin.registry import Registry
from kd_lrp_plugin.relevance import Recording, record

RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.LeakyReLU)


class Observation:
    """One network on one batch; everything is computed when it is first asked for, and once.

    Args:
        model: a network that ends in logits; it is changed in no way.
        images: the batch.
        targets: class indices.
        layers: where maps and features are taken from; by default the last map before pooling.
        train_mode: normalise by the statistics of the batch, as an untrained network must.
        seed: of what a forward pass draws, such as dropout: it is the same whenever it runs.

    Raises:
        ValueError: for fewer than two images, or targets that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Float[Tensor, "n c h w"],
        targets: Int[Tensor, " n"],
        layers: tuple[str, ...] | None = None,
        train_mode: bool = True,
        seed: int = 0,
    ) -> None:
        if len(images) < 2:
            fix = "Use a larger batch: relations are between images."
            raise ValueError(message("Observation", "two images or more", len(images), fix))
        self.model = model
        self.images, self.targets = images, targets
        self.layers = layers or (last_map(model),)
        self.train_mode, self.seed = train_mode, seed
        self._recordings: dict[str, tuple[Recording, Tensor]] = {}
        self._maps: dict[tuple[str, bool], list[Tensor]] = {}

    def _recorded(self, method: str) -> tuple[Recording, Tensor]:
        if method not in self._recordings:
            kept, draws = _as_it_was(self.model, self.train_mode), torch.random.fork_rng([])
            with kept, draws, record(self.model, self.layers, method) as recording:
                torch.manual_seed(self.seed)
                logits = self.model(self.images)
            check_targets("Observation", self.targets, logits)
            self._recordings[method] = recording, logits
        return self._recordings[method]

    def maps(self, method: str, signed: bool) -> list[Float[Tensor, "n h w"]]:
        """Relevance of the label, one map per layer."""
        if (method, signed) not in self._maps:
            recording, logits = self._recorded(method)
            found = recording.maps(logits, self.targets, signed=signed)
            self._maps[method, signed] = [relevance.detach() for relevance in found]
        return self._maps[method, signed]

    @property
    def features(self) -> list[Float[Tensor, "n c h w"]]:
        """Activations, one per layer."""
        return [feature.detach() for feature in self._forward[0].activations]

    @property
    def logits(self) -> Float[Tensor, "n classes"]:
        return self._forward[1].detach()

    @property
    def _forward(self) -> tuple[Recording, Tensor]:
        return self._recorded(next(iter(self._recordings), "grad_cam"))  # any method's will do

    @cached_property
    def parameters(self) -> int:
        return count_parameters(self.model)

    @cached_property
    def macs(self) -> int:
        return count_macs(self.model, self.images.shape[-1], self.images.shape[1])


@contextmanager
def _as_it_was(model: nn.Module, train_mode: bool) -> Iterator[None]:
    """A model frozen in a mode; flags, modes and statistics are put back on exit.

    Without weights to derive for, a forward pass keeps no graph in front of the tapped layers.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train(train_mode).requires_grad_(False)
    try:
        yield
    finally:
        for buffer, value in buffers:
            buffer.data = value  # written in place, it would end the graph
        for module, mode in modes:
            module.training = mode
        for parameter in trained:
            parameter.requires_grad_(True)


def last_map(model: nn.Module) -> str:
    """The layer whose output is the last feature map before pooling, in a model of timm's kind.

    Raises:
        ValueError: if it is not known.
    """
    children = [name for name, _ in model.named_children()]
    if "global_pool" in children[1:]:
        return children[children.index("global_pool") - 1]
    info: Any = getattr(model, "feature_info", None) or []
    last = (info if isinstance(info, list) else info.get_dicts())[-1:]
    if not last or last[0]["module"] not in dict(model.named_modules()):
        fix = "Name the layers."
        raise ValueError(message("layers", "a timm model", type(model).__name__, fix))
    return last[0]["module"]


# --- the registry -------------------------------------------------------------------------------

Function = Callable[[Observation, Observation], float]


@dataclass(frozen=True)
class Score:
    """A registered score.

    Attributes:
        function: of the student's and the teacher's observation; lower is better.
        source: where it is from.
        init: "own", each network as it was built, or "normal", all weights drawn from N(0, 1) as
            DisWOT's code does (:func:`normal_init`), student and teacher alike.
        sees_teacher: whether the teacher matters.
    """

    function: Function
    source: str
    init: Literal["own", "normal"] = "own"
    sees_teacher: bool = True


SCORES: Registry[Score] = Registry("score")


def normal_init(model: nn.Module) -> nn.Module:
    """Weights of convolutions and linear layers from N(0, 1), biases 0, norms 1 and 0; in place.

    Reference:
        The published code of DisWOT, and Zen-NAS (Lin et al., ICCV 2021) before it.
    """
    with torch.no_grad():
        for module in model.modules():
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if isinstance(weight, nn.Parameter):
                drawn = isinstance(module, nn.Conv2d | nn.Linear)
                nn.init.normal_(weight) if drawn else nn.init.ones_(weight)
            if isinstance(bias, nn.Parameter):
                nn.init.zeros_(bias)
    return model


# --- DisWOT and the thesis ----------------------------------------------------------------------


def _semantic(distance: Callable[..., Tensor], method: str, signed: bool) -> Function:
    return lambda student, teacher: _mean(
        distance, student.maps(method, signed), teacher.maps(method, signed)
    )


def _resized_cosine(ours: Tensor, theirs: Tensor) -> Tensor:
    return semantic_cosine(ours, resize_maps(theirs, (ours.shape[-2], ours.shape[-1])))


def _relation(distance: Callable[..., Tensor]) -> Function:
    return lambda student, teacher: _mean(distance, student.features, teacher.features)


def _mean(distance: Callable[..., Tensor], ours: list[Tensor], theirs: list[Tensor]) -> float:
    if len(ours) != len(theirs):
        got = f"{len(ours)} of the student, {len(theirs)} of the teacher"
        fix = "Name as many layers of each."
        raise ValueError(message("score", "as many layers of each network", got, fix))
    pairs = zip(ours, theirs, strict=True)
    return float(torch.stack([distance(s, t) for s, t in pairs]).mean())


def _sum(*names: str) -> Function:
    return lambda student, teacher: sum(SCORES[n].function(student, teacher) for n in names)


# --- DisWOT's published code --------------------------------------------------------------------


FLOOR = 1e-12  # of a row's length, in the published code


def _reference_semantic(student: Observation, teacher: Observation, exact: bool = False) -> float:
    r"""Mean squared distance of row-normalised channel Gram matrices, one per class.

    The matrices :math:`g g^T` are of the gradient g (channels) of the cross entropy for the
    classifier's weights of a class. Their row i, normalised, is :math:`s_i g/|g|`, with the sign
    :math:`s_i` of g_i, so that no matrix need be made. Where a row is shorter than 1e-12 the
    published code divides by that, which makes s_i small: with weights from N(0, 1) the softmax is
    saturated, and the gradients of most classes are that small, or zero in single precision.
    ``exact`` normalises every row to length 1, however short.
    """
    ours, theirs = (_classifier_gradient(network, exact) for network in (student, teacher))
    if ours.shape != theirs.shape:
        got = f"{tuple(ours.shape)} and {tuple(theirs.shape)}"
        fix = "Leave this score out for students whose last map has other channels."
        expected = "classifier gradients (classes, channels) of one shape"
        raise ValueError(message("reference_semantic", expected, got, fix))
    unit, signs = [], []
    floor = 1e-300 if exact else FLOOR
    for gradient in (ours.double(), theirs.double()):
        length = gradient.norm(dim=1, keepdim=True)
        unit.append(gradient / length.clamp(min=1e-300))
        signs.append(gradient * length / (gradient.abs() * length).clamp(min=floor))
    cosine = (unit[0] * unit[1]).sum(1)
    rows = sum(sign.square().sum(1) for sign in signs) - 2 * (signs[0] * signs[1]).sum(1) * cosine
    return float((rows / ours.shape[1]).mean())


def _classifier_gradient(network: Observation, exact: bool) -> Float[Tensor, "classes channels"]:
    """Of the mean cross entropy, for a linear classifier on the pooled last map.

    With ``exact``, in double precision and, for each class, only in direction: then no factor
    vanishes that a saturated softmax leaves.
    """
    pooled, logits = network.features[-1].mean((2, 3)), network.logits
    hit = nn.functional.one_hot(network.targets, logits.shape[1]).bool()
    if not exact:
        return (logits.softmax(1) - hit.to(logits)).T @ pooled / len(pooled)
    logits = logits.double()
    missing = logits.masked_fill(hit, -math.inf).logsumexp(1) - logits.logsumexp(1)
    logs = torch.where(hit, missing[:, None], logits.log_softmax(1))
    wrong = (logs - logs.amax(0)).exp() * torch.where(hit, -1.0, 1.0)
    return wrong.T @ pooled.double()


def _reference_relation(student: Observation, teacher: Observation) -> float:
    """Mean squared distance of the row-normalised batch Gram matrices of the last map."""
    grams = []
    for network in (student, teacher):
        flat = network.features[-1].flatten(1)
        grams.append(nn.functional.normalize(flat @ flat.T))
    return float((grams[0] - grams[1]).square().mean())


# --- baselines ----------------------------------------------------------------------------------


def _inputs_of(
    network: Observation,
    kinds: tuple[type[nn.Module], ...],
    images: Tensor,
    see: Callable[[Tensor], object],
) -> None:
    """Run the network, and show the input of each module of some kinds."""
    modules = [module for module in network.model.modules() if isinstance(module, kinds)]
    if not modules:
        fix, kind = "Leave this score out for it.", kinds[0].__name__.lstrip("_")
        raise ValueError(message("score", f"a network with modules like {kind}", "none", fix))
    handles = [m.register_forward_pre_hook(lambda _, inputs: see(inputs[0])) for m in modules]
    try:
        with torch.no_grad(), _as_it_was(network.model, network.train_mode):
            network.model(images)
    finally:
        for handle in handles:
            handle.remove()


def _nwot(student: Observation, _: Observation) -> float:
    """Negated log determinant of how often rectifiers agree for two images."""
    kernel = torch.zeros(len(student.images), len(student.images), dtype=torch.float64)

    def count(inputs: Tensor) -> None:
        on = (inputs > 0).flatten(1).float()
        kernel.add_((on @ on.T + (1 - on) @ (1 - on).T).cpu())

    _inputs_of(student, RECTIFIERS, student.images, count)
    return -float(torch.linalg.slogdet(kernel).logabsdet)


def _synflow(student: Observation, _: Observation) -> float:
    """Negated log of the synaptic flow: all weights positive, an image of ones, no rectifier."""
    model = copy.deepcopy(student.model).double().eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, RECTIFIERS):
            model.set_submodule(name, nn.Identity())
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.abs_()
    model(torch.ones_like(student.images[:1], dtype=torch.float64)).sum().backward()
    flows = [(p * p.grad).sum() for p in model.parameters() if p.grad is not None]
    return -math.log(float(torch.stack(flows).sum().detach()))


def _bn_log_variance(student: Observation, _: Observation) -> float:
    """Negated sum of the log standard deviations of what batch norms normalise, on noise."""
    found: list[Tensor] = []

    def see(inputs: Tensor) -> None:
        found.append(inputs.var((0, 2, 3), unbiased=False).mean().log() / 2)

    _inputs_of(student, (_BatchNorm,), torch.randn_like(student.images), see)
    return -float(torch.stack(found).sum())


# --- all of them --------------------------------------------------------------------------------

_THESIS = "the thesis, eq. 2.21-2.27, after DisWOT"
_DISWOT = "Dong et al., CVPR 2023; the thesis, eq. 2.5-2.13"
_CODE = "the published code of DisWOT"
for _name, _entry in {
    "diswot": Score(_sum("gradcam_l2", "relation_l2"), _DISWOT),
    "gradcam_l2": Score(_semantic(correlation_l2, "grad_cam", signed=True), _DISWOT),
    "relation_l2": Score(_relation(relation_l2), _DISWOT),
    "diswot_lrp_cosine": Score(_sum("lrp_cosine", "relation_cosine"), _THESIS),
    "lrp_cosine": Score(_semantic(_resized_cosine, "gradient_activation", signed=False), _THESIS),
    "relation_cosine": Score(_relation(relation_cosine), _THESIS),
    "diswot_reference": Score(_sum("reference_semantic", "reference_relation"), _CODE, "normal"),
    "reference_semantic": Score(_reference_semantic, _CODE, "normal"),
    "reference_relation": Score(_reference_relation, _CODE, "normal"),
    "reference_exact": Score(
        lambda s, t: _reference_semantic(s, t, exact=True) + _reference_relation(s, t),
        f"{_CODE}, without its floor of 1e-12",
        "normal",
    ),
    "parameters": Score(lambda s, _: -float(s.parameters), "a count", sees_teacher=False),
    "macs": Score(lambda s, _: -float(s.macs), "a count, by thop", sees_teacher=False),
    "nwot": Score(_nwot, "Mellor et al., ICML 2021, in its second version", "own", False),
    "synflow": Score(_synflow, "Tanaka et al., NeurIPS 2020, without rectifiers", "own", False),
    "bn_log_variance": Score(
        _bn_log_variance, "Lin et al., ICCV 2021, its term for batch norms", "normal", False
    ),
}.items():
    SCORES.register(_entry, _name)
