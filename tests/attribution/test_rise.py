"""RISE against loops over masks and pixels, and on models that look at a known place."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kd_lrp_plugin.attribution import perturbation
from kd_lrp_plugin.attribution.methods import attribute


def loop_masks(count: int, height: int, width: int) -> np.ndarray:
    """RISE's masks, pixel by pixel: each between the four cells around it, in float64."""
    generator = torch.Generator().manual_seed(0)
    kept = (torch.rand((count, 1, 7, 7), generator=generator) < 0.5).numpy()[:, 0]
    sides = (-(-height // 7), -(-width // 7))
    shifts = [torch.randint(side, (count,), generator=generator).tolist() for side in sides]
    masks = np.zeros((count, height, width))
    for number, row, column in np.ndindex(masks.shape):
        around = []
        for place, shift, side in zip((row, column), shifts, sides, strict=True):
            # the 7 cells are stretched over 8 * side pixels
            at = max((place + shift[number] + 0.5) * 7 / (8 * side) - 0.5, 0)
            low = min(int(at), 6)
            around.append(((low, 1 - (at - low)), (min(low + 1, 6), at - low)))
        for (r, of_row), (c, of_column) in product(*around):
            masks[number, row, column] += kept[number, r, c] * of_row * of_column
    return masks


class Region(nn.Module):
    """Two classes; the logit of the second is the brightness of a few pixels."""

    def __init__(self, row: int, column: int) -> None:
        super().__init__()
        self.rows, self.columns = slice(row, row + 3), slice(column, column + 3)

    def forward(self, images: Tensor) -> Tensor:
        value = images[:, :, self.rows, self.columns].mean((1, 2, 3))
        return torch.stack([torch.zeros_like(value), 2 * value], 1)


class TestRise:
    @pytest.mark.parametrize(("height", "width"), [(9, 16), (28, 28), (5, 7)])
    def test_agrees_with_loops_over_masks_and_pixels(self, monkeypatch, height, width):
        monkeypatch.setattr(perturbation, "RISE_MASKS", 35)  # more than a batch, and no multiple
        model = nn.Sequential(nn.Flatten(), nn.Linear(2 * height * width, 3)).double().eval()
        images, targets = torch.rand(2, 2, height, width, dtype=torch.float64), torch.tensor([2, 0])
        got = attribute(model, images, targets, "rise")
        masks = loop_masks(35, height, width)
        assert masks.std() > 0.2
        for index in range(2):
            expected = np.zeros((height, width))
            for mask in masks:
                logits = model(images[index][None] * torch.from_numpy(mask)).detach().numpy()[0]
                powers = np.exp(logits)
                expected += powers[targets[index]] / powers.sum() * mask / (35 * 0.5)
            np.testing.assert_allclose(got[index].numpy(), expected, atol=1e-5)  # float32 masks

    @pytest.mark.parametrize(("row", "column"), [(2, 20), (12, 12), (22, 4)])
    def test_peaks_where_a_model_looks(self, row, column):
        images = torch.ones(1, 1, 28, 28)
        (found,) = attribute(Region(row, column).eval(), images, torch.tensor([1]), "rise")
        peak = np.unravel_index(int(found.argmax()), found.shape)
        centre = (row + 1, column + 1)
        assert all(abs(int(a) - b) <= 3 for a, b in zip(peak, centre, strict=True))  # within a cell

    def test_of_a_model_that_looks_at_nothing_is_the_mean_of_the_masks(self):
        def half(images: Tensor) -> Tensor:
            return torch.zeros(len(images), 2)

        model = nn.Identity().eval()
        model.forward = half
        (found,) = attribute(model, torch.rand(1, 1, 28, 28), torch.tensor([0]), "rise")
        torch.testing.assert_close(found, torch.full((28, 28), 0.5), rtol=0, atol=0.05)

    def test_asks_for_no_more_than_a_batch_at_once(self):
        sizes = []

        def hear(images: Tensor) -> Tensor:
            sizes.append(len(images))
            return torch.zeros(len(images), 2)

        model = nn.Identity().eval()
        model.forward = hear
        attribute(model, torch.rand(2, 1, 9, 9), torch.tensor([0, 1]), "rise")
        assert sum(sizes) == 2 * 1000
        assert max(sizes) <= 32
