"""Score-CAM: channels weighted by what they leave of the image."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd_lrp_plugin.attribution.methods import ATTRIBUTIONS, BATCH, Attribution
from kd_lrp_plugin.losses import resize_maps
from kd_lrp_plugin.relevance.recording import record


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


ATTRIBUTIONS.register(Attribution(score_cam, slow=True), "score_cam")
