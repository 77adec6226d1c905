"""Methods that ask the model for changed images: Score-CAM, LIME and RISE."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from captum._utils.models.linear_model import SkLearnRidge
from captum.attr import Lime
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from kd_lrp_plugin.attribution.methods import ATTRIBUTIONS, BATCH, INPUT, Attribution, mean_colour
from kd_lrp_plugin.losses import resize_maps
from kd_lrp_plugin.relevance.recording import record
from kd_lrp_plugin.utils.extras import imports_of_an_extra

SUPERPIXELS = 50
LIME_SAMPLES = 200
RISE_MASKS = 1000
RISE_CELLS = 7
RISE_KEPT = 0.5


@torch.no_grad()
def score_cam(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    targets: Int[Tensor, " n"],
    layer: str,
) -> Float[Tensor, "n h2 w2"]:
    r"""Channels weighted by the logit of the image that each of them, as a mask, leaves over.

    .. math:: R = ReLU(\sum_k \mathrm{softmax}_k(S_c(x \odot s(A^k))) A^k)

    with :math:`s` the channel at the image's size, scaled to [0, 1]. Two choices are made that
    others make differently: channels are enlarged bilinearly without aligned corners
    (:func:`kd_lrp_plugin.losses.resize_maps`), and the weights of an image are a softmax of the
    logits over all channels that a mask is made of, so that they sum to one.

    Reference:
        Wang et al., CVPR workshops 2020, algorithm 1. The logit of its base line is left out,
        for a softmax over the channels cancels it. The package grad-cam differs in the aligned
        corners alone. Where a mask is 0 the image is 0, as there:
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
    with imports_of_an_extra():  # Captum would find out after the first draws
        import sklearn  # noqa: F401
    explainer = Lime(model, SkLearnRidge(alpha=1.0), _closeness)
    maps = []
    for image, target in zip(images, targets, strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            weights = explainer.attribute(
                image[None],
                baselines=mean_colour(image[None]).expand_as(image[None]),
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
    with imports_of_an_extra():  # a second, which only LIME has to wait for
        from skimage.segmentation import slic

    values = image - image.min()
    picture = (values / values.max().clamp(min=1e-12)).permute(1, 2, 0).cpu().double().numpy()
    # Unsmoothed, a noisy image falls into crumbs that are merged until a single part is left.
    regions = slic(picture, SUPERPIXELS, compactness=10, sigma=1, start_label=0, channel_axis=-1)
    return torch.from_numpy(np.asarray(regions))[None, None].to(image.device)


@torch.no_grad()
def rise(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    targets: Int[Tensor, " n"],
    layer: str = INPUT,
) -> Float[Tensor, "n h w"]:
    r"""Random masks, averaged with the probability that the image behind each of them has.

    .. math:: R = \frac{1}{N p} \sum_{i=1}^N f_c(x \odot M_i) M_i

    with 1,000 masks of 7 x 7 cells, each kept with p = 0.5, bilinearly enlarged and shifted at
    random. All images see the same masks, from one seed, a batch of them in memory at a time. No
    probability is negative, so that all of a map lies above zero: its peaks tell, not its zeros.

    Reference:
        Petsiuk, Das and Saenko, BMVC 2018, eq. 6 and section 3.2. Where a mask is 0 the image is
        0, as there. Deviation: cells are rounded up to whole pixels, as in the published code,
        so that shifted masks cover the image whatever its size.
    """
    height, width = images.shape[2:]
    maps = images.new_zeros(len(images), height, width)
    for drawn in _draw_masks(height, width):
        masks = drawn.to(images)
        for found, image, target in zip(maps, images, targets, strict=True):
            scores = model(image * masks[:, None]).softmax(1)[:, target]
            found += torch.tensordot(scores, masks, 1)
    return maps / (RISE_MASKS * RISE_KEPT)


def _draw_masks(height: int, width: int) -> Iterator[Float[Tensor, "batch {height} {width}"]]:
    """The masks of every image of a size, in batches."""
    generator = torch.Generator().manual_seed(0)
    shape = (RISE_MASKS, 1, RISE_CELLS, RISE_CELLS)
    kept = (torch.rand(shape, generator=generator) < RISE_KEPT).float()
    cell = [math.ceil(side / RISE_CELLS) for side in (height, width)]
    tops, lefts = (torch.randint(side, (RISE_MASKS,), generator=generator) for side in cell)
    large = [side * (RISE_CELLS + 1) for side in cell]
    for some, top, left in zip(
        kept.split(BATCH), tops.split(BATCH), lefts.split(BATCH), strict=True
    ):
        grown = functional.interpolate(some, large, mode="bilinear")[:, 0]
        shifts = zip(grown, top.tolist(), left.tolist(), strict=True)
        yield torch.stack([mask[y : y + height, x : x + width] for mask, y, x in shifts])


ATTRIBUTIONS.register(Attribution(score_cam, slow=True), "score_cam")
ATTRIBUTIONS.register(Attribution(lime, layered=False, slow=True), "lime")
ATTRIBUTIONS.register(Attribution(rise, layered=False, slow=True), "rise")
