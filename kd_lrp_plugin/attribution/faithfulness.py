"""Insertion and deletion: how a probability moves as relevant pixels come and go."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from kd_lrp_plugin.attribution.methods import BATCH, mean_colour
from kd_lrp_plugin.losses import resize_maps
from kd_lrp_plugin.utils.validation import message

STEPS = 16  # of insertion and deletion


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
    return _area("deletion", model, images, mean_colour(images), targets, maps)


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
        rank = large.argsort(dim=1, descending=True, stable=True).argsort(1).to(first.device)
        values = []
        for step in range(STEPS + 1):
            taken = (rank < round(step * rank.shape[1] / STEPS)).view(-1, 1, *first.shape[2:])
            probability = model(torch.where(taken, last, first)).softmax(1)
            values.append(probability.gather(1, target[:, None]).squeeze(1).cpu())
        area = torch.trapezoid(torch.stack(values, 1), dx=1 / STEPS, dim=1)
        areas.append(torch.where((large > 0).any(1).cpu(), area, torch.nan))
    return torch.cat(areas)


def _blurred(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    sigma = max(images.shape[2:]) / 16
    width = min(2 * int(3 * sigma) + 1, 2 * min(images.shape[2:]) - 1)  # padding has to fit
    return gaussian_blur(images, [width, width], [sigma, sigma])
