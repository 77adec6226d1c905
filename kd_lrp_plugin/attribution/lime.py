"""LIME: superpixels weighted by a linear model of what hiding them does."""

from typing import Any

import numpy as np
import torch
from captum._utils.models.linear_model import SkLearnRidge
from captum.attr import Lime
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd_lrp_plugin.attribution.methods import ATTRIBUTIONS, BATCH, INPUT, Attribution, mean_colour

SUPERPIXELS = 50
LIME_SAMPLES = 200


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
    from skimage.segmentation import slic  # a second, which only LIME has to wait for

    values = image - image.min()
    picture = (values / values.max().clamp(min=1e-12)).permute(1, 2, 0).cpu().double().numpy()
    # Unsmoothed, a noisy image falls into crumbs that are merged until a single part is left.
    parts = slic(picture, SUPERPIXELS, compactness=10, sigma=1, start_label=0, channel_axis=-1)
    return torch.from_numpy(np.asarray(parts))[None, None].to(image.device)


ATTRIBUTIONS.register(Attribution(lime, layered=False, slow=True), "lime")
