"""Figures about maps against loops over single pixels."""

import math

import pytest
import torch
from torch import Tensor

from kd_lrp_plugin.evaluation import agreement, mass_inside


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
        assert mass_inside(maps, masks).tolist() == pytest.approx(expected, rel=1e-12)

    def test_small_maps_are_interpolated_to_the_size_of_the_mask(self):
        maps, masks = maps_of(1, 3, 4).abs(), maps_of(1, 6, 8) > 0
        expected = mass_by_loops(enlarge(maps[0].tolist()), masks[0].tolist())
        assert mass_inside(maps, masks).item() == pytest.approx(expected, rel=1e-12)

    def test_negative_relevance_beside_a_peak_does_not_lower_it(self):
        maps = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
        masks = torch.zeros(1, 8, 8, dtype=torch.bool)
        masks[:, :4, :4] = True
        signed = maps.clone()
        signed[:, 1, 1] = -5
        assert torch.equal(mass_inside(signed, masks), mass_inside(maps, masks))

    def test_of_an_even_map_is_the_share_of_the_mask(self):
        masks = torch.zeros(1, 8, 8, dtype=torch.bool)
        masks[:, :2, :4] = True
        assert mass_inside(torch.ones(1, 3, 3), masks).item() == pytest.approx(8 / 64)

    def test_does_not_depend_on_the_scale_of_a_map(self):
        maps, masks = maps_of(3, 4, 4).float(), maps_of(3, 4, 4, seed=1) > 0
        for scale in (1e-25, 1e25):
            torch.testing.assert_close(mass_inside(scale * maps, masks), mass_inside(maps, masks))

    def test_is_nan_without_relevance_or_mask_and_for_that_sample_alone(self):
        maps = torch.stack(
            [torch.ones(2, 2), torch.zeros(2, 2), -torch.ones(2, 2), torch.ones(2, 2)]
        )
        masks = torch.ones(4, 2, 2, dtype=torch.bool)
        masks[3] = False
        assert mass_inside(maps, masks).isnan().tolist() == [False, True, True, True]

    def test_refuses_masks_that_are_not_boolean(self):
        with pytest.raises(ValueError, match="mask > 0"):
            mass_inside(torch.ones(1, 2, 2), torch.ones(1, 2, 2))

    def test_refuses_a_channel_axis_and_names_both_shapes(self):
        with pytest.raises(ValueError, match=r"\(1, 2, 2\) and \(1, 1, 2, 2\)"):
            mass_inside(torch.ones(1, 2, 2), torch.ones(1, 1, 2, 2, dtype=torch.bool))


class TestAgreement:
    @pytest.mark.parametrize("seed", range(3))
    def test_agrees_with_a_loop(self, seed):
        student, teacher = maps_of(4, 5, 6, seed=seed), maps_of(4, 5, 6, seed=seed + 9)
        pairs = zip(student.tolist(), teacher.tolist(), strict=True)
        expected = [cosine_by_loops(s, t) for s, t in pairs]
        assert agreement(student, teacher).tolist() == pytest.approx(expected, rel=1e-12)

    def test_is_one_for_proportional_and_minus_one_for_opposite_maps(self):
        maps = maps_of(3, 4, 4).float()
        for scale in (1e-25, 1.0, 1e18):
            torch.testing.assert_close(agreement(scale * maps, maps), torch.ones(3))
            torch.testing.assert_close(agreement(-scale * maps, maps), -torch.ones(3))

    def test_maps_of_another_size_are_brought_to_the_teachers(self):
        student, teacher = maps_of(1, 3, 4), maps_of(1, 6, 8, seed=1)
        expected = cosine_by_loops(enlarge(student[0].tolist()), teacher[0].tolist())
        assert agreement(student, teacher).item() == pytest.approx(expected, rel=1e-12)

    def test_is_nan_for_a_zero_map_of_either_side_and_for_that_sample_alone(self):
        student, teacher = torch.ones(3, 2, 2), torch.ones(3, 2, 2)
        student[0], teacher[2] = 0, 0
        assert agreement(student, teacher).isnan().tolist() == [True, False, True]

    def test_refuses_different_numbers_of_samples(self):
        with pytest.raises(ValueError, match="same images"):
            agreement(torch.ones(2, 3, 3), torch.ones(3, 3, 3))

    def test_keeps_no_graph(self):
        student = maps_of(2, 3, 3).requires_grad_()
        assert not agreement(student, student.detach()).requires_grad
