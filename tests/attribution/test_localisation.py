"""Figures of maps and masks against loops over single pixels, and SciPy.

Quantus as a reference: tests/test_attribution.py.
"""

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from kd_lrp_plugin.attribution.localisation import (
    area_share,
    attribution_similarity,
    pointing_game,
    rank_accuracy,
    rank_correlation,
    relevance_mass_accuracy,
)

FIGURES = (relevance_mass_accuracy, rank_accuracy, pointing_game)


def maps_of(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def mass_by_loops(relevance: list[list[float]], mask: list[list[bool]]) -> float:
    inside = total = 0.0
    for values, marks in zip(relevance, mask, strict=True):
        for value, mark in zip(values, marks, strict=True):
            total += max(value, 0)
            inside += max(value, 0) if mark else 0
    return inside / total


def cosine_by_loops(one: list[list[float]], other: list[list[float]]) -> float:
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    product = sum(a * b for a, b in pairs)
    return product / math.sqrt(sum(a * a for a, _ in pairs) * sum(b * b for _, b in pairs))


def twice_as_large(row: list[float]) -> list[float]:
    """Bilinear interpolation of one axis to twice its size, pixel centres aligned."""
    last = len(row) - 1
    result = []
    for i in range(len(row)):
        result.append(0.25 * row[max(i - 1, 0)] + 0.75 * row[i])
        result.append(0.75 * row[i] + 0.25 * row[min(i + 1, last)])
    return result


def enlarge(values: list[list[float]]) -> list[list[float]]:
    """Both axes of a map, one after the other."""
    for _ in range(2):
        wide = [twice_as_large(row) for row in values]
        values = [[row[i] for row in wide] for i in range(len(wide[0]))]  # transposed
    return values


class TestMassInside:
    @pytest.mark.parametrize("seed", range(3))
    def test_agrees_with_a_loop(self, seed):
        maps, masks = maps_of(4, 5, 6, seed=seed), maps_of(4, 5, 6, seed=seed + 9) > 0.5
        expected = [mass_by_loops(m, k) for m, k in zip(maps.tolist(), masks.tolist(), strict=True)]
        assert relevance_mass_accuracy(maps, masks).tolist() == pytest.approx(expected, rel=1e-12)

    def test_small_maps_are_interpolated_to_the_size_of_the_mask(self):
        maps, masks = maps_of(1, 3, 4).abs(), maps_of(1, 6, 8) > 0
        expected = mass_by_loops(enlarge(maps[0].tolist()), masks[0].tolist())
        assert relevance_mass_accuracy(maps, masks).item() == pytest.approx(expected, rel=1e-12)

    def test_negative_relevance_beside_a_peak_does_not_lower_it(self):
        maps = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
        masks = torch.zeros(1, 8, 8, dtype=torch.bool)
        masks[:, :4, :4] = True
        signed = maps.clone()
        signed[:, 1, 1] = -5
        assert torch.equal(
            relevance_mass_accuracy(signed, masks), relevance_mass_accuracy(maps, masks)
        )

    def test_of_an_even_map_is_the_share_of_the_mask(self):
        masks = torch.zeros(1, 8, 8, dtype=torch.bool)
        masks[:, :2, :4] = True
        assert relevance_mass_accuracy(torch.ones(1, 3, 3), masks).item() == pytest.approx(8 / 64)

    def test_does_not_depend_on_the_scale_of_a_map(self):
        maps, masks = maps_of(3, 4, 4).float(), maps_of(3, 4, 4, seed=1) > 0
        for scale in (1e-25, 1e25):
            torch.testing.assert_close(
                relevance_mass_accuracy(scale * maps, masks), relevance_mass_accuracy(maps, masks)
            )

    def test_refuses_masks_that_are_not_boolean(self):
        with pytest.raises(ValueError, match="mask > 0"):
            relevance_mass_accuracy(torch.ones(1, 2, 2), torch.ones(1, 2, 2))

    def test_refuses_a_channel_axis_and_names_both_shapes(self):
        with pytest.raises(ValueError, match=r"\(1, 2, 2\) and \(1, 1, 2, 2\)"):
            relevance_mass_accuracy(torch.ones(1, 2, 2), torch.ones(1, 1, 2, 2, dtype=torch.bool))


class TestAgreement:
    @pytest.mark.parametrize("seed", range(3))
    def test_agrees_with_a_loop(self, seed):
        student, teacher = maps_of(4, 5, 6, seed=seed), maps_of(4, 5, 6, seed=seed + 9)
        pairs = zip(student.tolist(), teacher.tolist(), strict=True)
        expected = [cosine_by_loops(s, t) for s, t in pairs]
        assert attribution_similarity(student, teacher).tolist() == pytest.approx(
            expected, rel=1e-12
        )

    def test_is_one_for_proportional_and_minus_one_for_opposite_maps(self):
        maps = maps_of(3, 4, 4).float()
        for scale in (1e-25, 1.0, 1e18):
            torch.testing.assert_close(attribution_similarity(scale * maps, maps), torch.ones(3))
            torch.testing.assert_close(attribution_similarity(-scale * maps, maps), -torch.ones(3))

    def test_maps_of_another_size_are_brought_to_the_teachers(self):
        student, teacher = maps_of(1, 3, 4), maps_of(1, 6, 8, seed=1)
        expected = cosine_by_loops(enlarge(student[0].tolist()), teacher[0].tolist())
        assert attribution_similarity(student, teacher).item() == pytest.approx(expected, rel=1e-12)

    def test_is_nan_for_a_zero_map_of_either_side_and_for_that_sample_alone(self):
        student, teacher = torch.ones(3, 2, 2), torch.ones(3, 2, 2)
        student[0], teacher[2] = 0, 0
        assert attribution_similarity(student, teacher).isnan().tolist() == [True, False, True]

    def test_refuses_different_numbers_of_samples(self):
        with pytest.raises(ValueError, match="same images"):
            attribution_similarity(torch.ones(2, 3, 3), torch.ones(3, 3, 3))

    def test_keeps_no_graph(self):
        student = maps_of(2, 3, 3).requires_grad_()
        assert not attribution_similarity(student, student.detach()).requires_grad


def rank_by_loops(relevance: list[list[float]], mask: list[list[bool]]) -> float:
    """Hits among the first pixels, averaged over orders of equal ones."""
    pixels = [
        (max(value, 0.0), mark)
        for values, marks in zip(relevance, mask, strict=True)
        for value, mark in zip(values, marks, strict=True)
    ]
    size = sum(mark for _, mark in pixels)
    generator, hits = np.random.default_rng(0), 0
    for _ in range(2000):
        order = generator.permutation(len(pixels))
        order = sorted(order, key=lambda place: -pixels[place][0])
        hits += sum(pixels[place][1] for place in order[:size])
    return hits / 2000 / size


class TestRankAccuracy:
    @pytest.mark.parametrize("seed", range(3))
    def test_agrees_with_orders_drawn_by_chance_where_pixels_are_equal(self, seed):
        maps, masks = maps_of(1, 5, 6, seed=seed), maps_of(1, 5, 6, seed=seed + 9) > 0.3
        expected = rank_by_loops(maps[0].tolist(), masks[0].tolist())  # half of the map is zero
        spread = 0.5 / math.sqrt(2000)  # of a share, in as many draws, at most
        assert rank_accuracy(maps, masks).item() == pytest.approx(expected, abs=4 * spread)

    def test_is_one_for_the_mask_itself_and_zero_for_its_opposite(self):
        masks = maps_of(2, 4, 4) > 0
        masks[:, 0] = True
        masks[:, 3] = False
        assert rank_accuracy(masks.float(), masks).tolist() == [1, 1]
        few = masks & (torch.arange(4) == 0)  # fewer pixels than their opposite has
        assert rank_accuracy((~few).float(), few).tolist() == [0, 0]


class TestPointingGame:
    def test_is_one_where_the_peak_is_inside_and_zero_where_it_is_not(self):
        maps = torch.zeros(2, 4, 4)
        maps[:, 1, 2] = 1
        masks = torch.zeros(2, 4, 4, dtype=torch.bool)
        masks[0, 1, 2] = masks[1, 2, 2] = True
        assert pointing_game(maps, masks).tolist() == [1, 0]

    def test_peaks_that_share_the_maximum_count_by_their_share(self):
        maps = torch.zeros(1, 4, 4)
        maps[0, 0, :4] = 2
        masks = torch.zeros(1, 4, 4, dtype=torch.bool)
        masks[0, :, 0] = True
        assert pointing_game(maps, masks).tolist() == [0.25]


@pytest.mark.parametrize("figure", FIGURES)
class TestEveryFigureOfMasks:
    def test_is_the_area_for_an_even_map(self, figure):
        masks = maps_of(5, 6, 6) > 0.4
        expected = area_share(masks)
        torch.testing.assert_close(figure(torch.ones(5, 6, 6), masks), expected)
        assert expected.tolist() == pytest.approx([int(m.sum()) / 36 for m in masks])

    def test_is_the_area_on_average_for_maps_that_know_nothing(self, figure):
        masks = (maps_of(1, 8, 8) > 0.8).expand(4000, 8, 8)
        maps = torch.rand(4000, 8, 8, generator=torch.Generator().manual_seed(0))
        share = float(area_share(masks[:1]))
        spread = math.sqrt(share / 4000)  # of a hit or miss; the other figures vary less
        assert float(figure(maps, masks).mean()) == pytest.approx(share, abs=4 * spread)

    def test_is_nan_without_relevance_or_mask_and_for_that_sample_alone(self, figure):
        maps = torch.stack([torch.eye(2), torch.zeros(2, 2), -torch.ones(2, 2), torch.eye(2)])
        masks = torch.ones(4, 2, 2, dtype=torch.bool)
        masks[3] = False
        assert figure(maps, masks).isnan().tolist() == [False, True, True, True]

    def test_names_itself_in_errors(self, figure):
        with pytest.raises(ValueError, match=f"^{figure.__name__}: expected boolean masks"):
            figure(torch.ones(1, 2, 2), torch.ones(1, 2, 2))


class TestRankCorrelation:
    def test_agrees_with_scipy_where_values_are_equal_too(self):
        one, other = maps_of(4, 5, 6).relu(), maps_of(4, 5, 6, seed=1).relu()
        other[0] = one[0].exp()
        expected = [spearmanr(a.flatten(), b.flatten())[0] for a, b in zip(one, other, strict=True)]
        assert rank_correlation(one, other).tolist() == pytest.approx(expected, abs=1e-12)

    def test_is_nan_where_a_map_is_the_same_everywhere(self):
        one = torch.stack([torch.eye(3), torch.ones(3, 3), torch.zeros(3, 3)])
        assert rank_correlation(one, torch.eye(3).expand(3, 3, 3)).isnan().tolist() == [
            False,
            True,
            True,
        ]

    def test_refuses_maps_of_two_sizes(self):
        with pytest.raises(ValueError, match=r"\(1, 2, 2\) and \(1, 3, 3\)"):
            rank_correlation(torch.ones(1, 2, 2), torch.ones(1, 3, 3))
