"""Explanations of a finished model: maps by any method, and what a map tells of its model.

Training needs maps that can be trained through (:mod:`kd_lrp_plugin.relevance`); afterwards the
methods that only ask the model again are welcome, too. All of them explain a logit.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from captum._utils.models.linear_model import SkLearnRidge
from captum.attr import Lime
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.functional import gaussian_blur

from kd_lrp_plugin.checks import check_known, check_same_shape, message
from kd_lrp_plugin.localisation import rank_correlation
from kd_lrp_plugin.losses import resize_maps
from kd_lrp_plugin.progress import Silence
from kd_lrp_plugin.registry import Registry
from kd_lrp_plugin.relevance import record, relevance_maps
from kd_lrp_plugin.rules import METHODS

BATCH = 32
SUPERPIXELS = 50
LIME_SAMPLES = 200
STEPS = 16  # of insertion and deletion

Maps = Callable[[nn.Module, Tensor, Tensor, str], Tensor]


@dataclass(frozen=True)
class Attribution:
    """A way to explain a model.

    Attributes:
        maps: (model, images (n, c, h, w), class indices (n,), layer) -> maps (n, h', w') without
            negative entries.
        layered: whether it looks at a layer; otherwise at the input, and the layer is ignored.
        slow: whether it asks the model hundreds of times for one image.
    """

    maps: Maps
    layered: bool = True
    slow: bool = False


ATTRIBUTIONS: Registry[Attribution] = Registry("method")

INPUT = "input"
"""What stands for the layer of methods that have none."""


def attribute(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    targets: Int[Tensor, " n"],
    method: str,
    layer: str = INPUT,
    show: Silence | None = None,
) -> Float[Tensor, "n h2 w2"]:
    """Maps of why the model sees ``targets`` in ``images``, by any method.

    Args:
        model: in evaluation mode; left as it was.
        images: as the model takes them.
        targets: one class index per image.
        method: a name of :data:`ATTRIBUTIONS`.
        layer: name of a module with output (n, c, h, w).
        show: told how far it is.

    Returns:
        Maps on the CPU, of the layer's size or, for methods without one, the images'.

    Raises:
        ValueError: for an unknown method or layer, a model in train mode, targets that do not
            fit, or a model that the method cannot handle.

    Example:
        >>> import timm
        >>> model = timm.create_model("mobilenetv2_035", num_classes=4).eval()
        >>> images, targets = torch.rand(2, 3, 64, 64), torch.tensor([0, 3])
        >>> tuple(attribute(model, images, targets, "score_cam", "blocks.4").shape)
        (2, 4, 4)
    """
    check_known("method", method, ATTRIBUTIONS)
    if model.training:
        got = "train mode, where images of a batch change each other's maps"
        raise ValueError(message("attribute", "evaluation mode", got, "Call model.eval()."))
    if images.ndim != 4 or targets.shape != images.shape[:1] or targets.is_floating_point():
        got = f"{tuple(images.shape)} and {tuple(targets.shape)} of {targets.dtype}"
        fix = "Give one class index per image."
        raise ValueError(message("attribute", "images (n, c, h, w) and targets (n,)", got, fix))
    batch = BATCH // 8 if ATTRIBUTIONS[method].slow else BATCH  # so that progress shows
    parts = list(zip(images.split(batch), targets.split(batch), strict=True))
    tracked = (show or Silence()).track(parts, method, len(parts))
    maps = ATTRIBUTIONS[method].maps
    return torch.cat([maps(model, x, target, layer).detach().cpu() for x, target in tracked])


# --- methods ------------------------------------------------------------------------------------


def _relevance(
    model: nn.Module, images: Tensor, targets: Tensor, layer: str, method: str
) -> Tensor:
    return relevance_maps(model, images, targets, [layer], method)[0]


for _method in METHODS:
    ATTRIBUTIONS.register(Attribution(partial(_relevance, method=_method)), _method)


@torch.no_grad()
def score_cam(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    targets: Int[Tensor, " n"],
    layer: str,
) -> Float[Tensor, "n h2 w2"]:
    r"""Channels weighted by the logit of the image that each of them, as a mask, leaves over.

    .. math:: R = ReLU(\sum_k \mathrm{softmax}_k(S_c(x \odot s(A^k))) A^k)

    with :math:`s` the channel at the image's size, scaled to [0, 1].

    Reference:
        Wang et al., CVPR workshops 2020, algorithm 1. The logit of its base line is left out,
        for a softmax over the channels cancels it. Where a mask is 0 the image is 0, as there:
        after normalisation that is the mean colour. Deviation: a channel that is the same
        everywhere, which no mask can be made of, is left out.
    """
    with record(model, [layer]) as recording:
        model(images)
    (activations,) = recording.activations
    maps = []
    for image, target, channels in zip(images, targets, activations.detach(), strict=True):
        large = resize_maps(channels, (image.shape[1], image.shape[2]))
        low, high = (edge((1, 2), keepdim=True) for edge in (large.amin, large.amax))
        used = (high > low).flatten()
        masks = ((large - low) / (high - low))[used]
        scores = [model(image * some[:, None])[:, target] for some in masks.split(BATCH)]
        weights = torch.cat([image.new_zeros(0), *scores]).softmax(0)
        maps.append((weights[:, None, None] * channels[used]).sum(0).relu())
    return torch.stack(maps)


@torch.no_grad()
def lime(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    targets: Int[Tensor, " n"],
    layer: str = INPUT,
) -> Float[Tensor, "n h w"]:
    """Weights of superpixels in a linear model of what hiding them does to the logit.

    Captum's LIME with its random draws from one seed per image, so that a map does not depend on
    the images beside it; half of the superpixels are hidden in each of 200 draws.

    Reference:
        Ribeiro et al., KDD 2016, with the kernel and the ridge regression of its published code.
        Deviations: SLIC superpixels (Achanta et al., PAMI 2012), about 50; a hidden one takes the
        image's mean colour, not its own, which would leave an even tumour in sight; the positive
        part of the weights is kept, and a logit explained instead of a probability.
    """
    explainer = Lime(model, SkLearnRidge(alpha=1.0), _closeness)
    maps = []
    for image, target in zip(images, targets, strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            weights = explainer.attribute(
                image[None],
                baselines=_mean_colour(image[None]).expand_as(image[None]),
                target=int(target),
                feature_mask=_superpixels(image),
                n_samples=LIME_SAMPLES,
                perturbations_per_eval=BATCH,
            )
        maps.append(weights[0, 0].relu())
    return torch.stack(maps)


def _closeness(_: Tensor, __: Tensor, kept: Int[Tensor, "1 features"], **___: Any) -> Tensor:
    """Of a draw to the whole image: by the cosine of what is kept with everything."""
    distance = 1 - kept.float().mean().sqrt()
    return torch.exp(-(distance**2) / (2 * 0.25**2))


def _superpixels(image: Float[Tensor, "c h w"]) -> Int[Tensor, "1 1 h w"]:
    from skimage.segmentation import slic  # a second, which only LIME has to wait for

    values = image - image.min()
    picture = (values / values.max().clamp(min=1e-12)).permute(1, 2, 0).cpu().double().numpy()
    # Unsmoothed, a noisy image falls into crumbs that are merged until a single part is left.
    parts = slic(picture, SUPERPIXELS, compactness=10, sigma=1, start_label=0, channel_axis=-1)
    return torch.from_numpy(np.asarray(parts))[None, None].to(image.device)


ATTRIBUTIONS.register(Attribution(score_cam, slow=True), "score_cam")
ATTRIBUTIONS.register(Attribution(lime, layered=False, slow=True), "lime")


# --- figures that need the model ----------------------------------------------------------------


def deletion(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    targets: Int[Tensor, " n"],
    maps: Float[Tensor, "n h2 w2"],
) -> Float[Tensor, " n"]:
    """Area under the probability of ``targets`` while pixels go, the most relevant first.

    Pixels take the image's mean colour, in 16 equal steps. Low values speak for the maps.

    Args:
        model: in evaluation mode.
        images: as the model takes them.
        targets: one class index per image.
        maps: of the images, of any size; of equally relevant pixels the upper left ones go first.

    Returns:
        Values in [0, 1], on the CPU; nan where the map has no positive relevance.

    Raises:
        ValueError: if these do not have one n.

    Reference:
        Petsiuk et al., BMVC 2018, sec. 3.3. Deviation: the image's own mean in place of grey.
    """
    return _area("deletion", model, images, _mean_colour(images), targets, maps)


def insertion(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    targets: Int[Tensor, " n"],
    maps: Float[Tensor, "n h2 w2"],
) -> Float[Tensor, " n"]:
    """Area under the probability of ``targets`` while pixels come, the most relevant first.

    They come into the blurred image, in 16 equal steps. High values speak for the maps.

    Args, result and errors are those of :func:`deletion`.

    Reference:
        Petsiuk et al., BMVC 2018, sec. 3.3. Deviation: a Gaussian blur whose standard deviation
        is 1/16 of the longer side (there 5 pixels of 224), so that a tumour does not stay in
        sight.
    """
    return _area("insertion", model, _blurred(images), images, targets, maps)


@torch.no_grad()
def _area(
    where: str, model: nn.Module, start: Tensor, end: Tensor, targets: Tensor, maps: Tensor
) -> Float[Tensor, " n"]:
    if maps.ndim != 3 or not len(start) == len(targets) == len(maps):
        got = f"{tuple(start.shape)}, {tuple(targets.shape)} and {tuple(maps.shape)}"
        expected = "images (n, c, h, w), targets (n,) and maps (n, h, w) of one n"
        raise ValueError(message(where, expected, got, "Give one map per image."))
    areas = []
    for first, last, target, relevance in zip(
        *(t.split(BATCH) for t in (start, end.expand_as(start), targets, maps)), strict=True
    ):
        large = resize_maps(relevance.clamp(min=0), (first.shape[2], first.shape[3])).flatten(1)
        place = large.argsort(dim=1, descending=True, stable=True).argsort(1).to(first.device)
        values = []
        for step in range(STEPS + 1):
            taken = (place < round(step * place.shape[1] / STEPS)).view(-1, 1, *first.shape[2:])
            probability = model(torch.where(taken, last, first)).softmax(1)
            values.append(probability.gather(1, target[:, None]).squeeze(1).cpu())
        area = torch.trapezoid(torch.stack(values, 1), dx=1 / STEPS, dim=1)
        areas.append(torch.where((large > 0).any(1).cpu(), area, torch.nan))
    return torch.cat(areas)


def _mean_colour(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c 1 1"]:
    return images.mean((2, 3), keepdim=True)


def _blurred(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    sigma = max(images.shape[2:]) / 16
    width = min(2 * int(3 * sigma) + 1, 2 * min(images.shape[2:]) - 1)  # padding has to fit
    return gaussian_blur(images, [width, width], [sigma, sigma])


def randomisation(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    maps: Float[Tensor, "n h2 w2"],
    method: str,
    layer: str = INPUT,
    points: int = 4,
    show: Silence | None = None,
) -> dict[str, Float[Tensor, " n"]]:
    """How like its maps are to those of the model once its layers have forgotten what they learnt.

    From the classifier downwards, layer after layer is initialised anew. A method whose maps
    stay the same does not explain the model but, say, the edges of the image. The changed network
    is explained for the class that it predicts, for it has learnt none; where the output of that
    is negative, which leaves LRP's maps without a positive part, for its negation.

    Args:
        model: in evaluation mode; left as it is.
        images: as the model takes them.
        maps: of :func:`attribute` by this method, for this model.
        method: a name of :data:`ATTRIBUTIONS`.
        layer: as for :func:`attribute`.
        points: how often to compare, from the classifier alone to all layers.
        show: told how far it is.

    Returns:
        From the name of the lowest layer that is new to Spearman's correlation of each pair of
        maps; nan where one of them is the same everywhere. The last entry is a random model.

    Raises:
        ValueError: as :func:`attribute`.

    Reference:
        Adebayo et al., NeurIPS 2018, cascading randomisation (sec. 3.1), Spearman's correlation
        without taking absolute values. Layers are all modules that PyTorch can reset, in the
        reversed order of their definition. Deviations: the class, there the true one; batch norms
        that are reset take their statistics from ``images``, without which the features of a
        random network vanish.
    """
    found = {}
    for name, changed in _forgetting(model, images, points):
        with torch.no_grad():
            logits = changed(images)
        highest, predicted = logits.max(1)
        if method in METHODS:
            signs = functional.one_hot(predicted, logits.shape[1]) * highest.sign()[:, None]
            parts = zip(images.split(BATCH), signs.split(BATCH), strict=True)
            maps_of = (relevance_maps(changed, x, sign, [layer], method) for x, sign in parts)
            again = torch.cat([found[0].detach().cpu() for found in maps_of])
        else:
            again = attribute(changed, images, predicted, method, layer, show)
        check_same_shape("randomisation", "Give this method's maps.", maps=maps, again=again)
        found[name] = rank_correlation(again, maps)
    return found


def _forgetting(model: nn.Module, images: Tensor, points: int) -> Iterator[tuple[str, nn.Module]]:
    """The same copy of a model, with more and more of its layers reset."""
    copy = deepcopy(model)
    layers = [(n, m) for n, m in copy.named_modules() if hasattr(m, "reset_parameters")][::-1]
    stops = {round(place) for place in np.linspace(0, len(layers) - 1, points)}
    norms = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for place, (name, module) in enumerate(layers):
            module.reset_parameters()
            if hasattr(module, "running_mean"):
                norms.append(module)
            if place in stops:
                _measure(copy, norms, images)
                yield name, copy


@torch.no_grad()
def _measure(model: nn.Module, norms: list[Any], images: Tensor) -> None:
    """Let norms take the statistics of images."""
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    model(images)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.eval()
        norm.momentum = momentum
