"""Relevance outside of a mask, and masks on other grids, against loops."""

from fractions import Fraction

import pytest
import torch

from kd_lrp_plugin.relevance.masks import resize_masks, share_outside


def share_by_loops(maps: torch.Tensor, inside: torch.Tensor) -> list[float]:
    shares = []
    for map_, cells in zip(maps.double().tolist(), inside.double().tolist(), strict=True):
        outside = total = 0.0
        for row, covered in zip(map_, cells, strict=True):
            for relevance, part in zip(row, covered, strict=True):
                outside += (1 - part) * relevance**2
                total += relevance**2
        shares.append(outside / total)
    return shares


def covered_by_loops(mask: list[list[int]], size: tuple[int, int]) -> list[list[float]]:
    """Cell by cell, pixel by pixel, in fractions: the area that both have in common."""

    def common(cell: int, cells: int, pixel: int, pixels: int) -> Fraction:
        begin, end = Fraction(cell * pixels, cells), Fraction((cell + 1) * pixels, cells)
        return max(Fraction(0), min(end, pixel + 1) - max(begin, pixel)) / (end - begin)

    height, width = len(mask), len(mask[0])
    return [
        [
            float(
                sum(
                    common(i, size[0], y, height) * common(j, size[1], x, width) * mask[y][x]
                    for y in range(height)
                    for x in range(width)
                )
            )
            for j in range(size[1])
        ]
        for i in range(size[0])
    ]


@pytest.fixture
def maps() -> torch.Tensor:
    return torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def inside() -> torch.Tensor:
    return torch.rand(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scale", [1.0, -1e-25, 1e25])
def test_the_share_agrees_with_loops_at_any_scale_and_sign(maps, inside, scale):
    found = share_outside((scale * maps).float(), inside)
    torch.testing.assert_close(found.tolist(), share_by_loops(maps, inside), rtol=1e-5, atol=1e-6)


def test_its_gradient_is_exact_and_the_mask_gets_none(maps, inside):
    maps.requires_grad_()
    assert torch.autograd.gradcheck(lambda m: share_outside(m, inside), maps)
    inside.requires_grad_()
    share_outside(maps, inside).sum().backward()
    assert inside.grad is None


def test_relevance_inside_is_none_outside(maps):
    assert share_outside(maps, torch.ones_like(maps)).tolist() == [0, 0, 0]
    assert share_outside(maps, torch.zeros_like(maps)).tolist() == [1, 1, 1]


def test_a_map_without_relevance_counts_as_one_and_passes_no_gradient(maps, inside):
    maps[1] = 0
    maps.requires_grad_()
    share = share_outside(maps, inside)
    assert share[1] == 1
    share.sum().backward()
    assert not maps.grad[1].any()
    assert maps.grad[0].any()
    assert maps.grad.isfinite().all()


@pytest.mark.parametrize("size", [(2, 3), (3, 2), (4, 5), (7, 11), (1, 1)])
def test_a_cell_is_covered_by_the_area_that_it_shares_with_the_mask(size):
    generator = torch.Generator().manual_seed(2)
    masks = torch.rand(2, 6, 7, generator=generator) < 0.4
    found = resize_masks(masks, size)
    expected = [covered_by_loops(mask, size) for mask in masks.int().tolist()]
    torch.testing.assert_close(found.tolist(), expected, rtol=1e-6, atol=1e-6)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1 + 1e-6
    torch.testing.assert_close(found.mean((1, 2)), masks.float().mean((1, 2)))


def test_shapes_that_do_not_fit_are_named(maps):
    with pytest.raises(ValueError, match=r"share_outside: expected tensors of one shape.*resize"):
        share_outside(maps, torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match=r"masks \(n, h, w\), got \(3, 4\)"):
        resize_masks(torch.zeros(3, 4), (2, 2))
