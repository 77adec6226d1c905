"""Maps follow the image: flips exactly, other moves as a model would see them, the rest refused."""

import pytest
import torch
from PIL import Image
from torch.nn import functional
from torchvision import transforms
from torchvision.transforms import v2

from kd_lrp_plugin.data.following import Following, move_maps, sample_field
from kd_lrp_plugin.data.transforms import make_transforms

BILINEAR = transforms.InterpolationMode.BILINEAR


def picture(size: tuple[int, int] = (48, 48), seed: int = 0) -> Image.Image:
    """Smooth noise, zero at the border, so that a turn loses nothing of it."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand((1, 3, 5, 5), generator=generator)
    noise = functional.pad(noise, (2, 2, 2, 2))
    pixels = functional.interpolate(noise, size=size, mode="bicubic").clamp(0, 1)[0]
    return transforms.ToPILImage()(pixels)


def pooled(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A toy model whose map moves as its image does: brightness, averaged over the cells."""
    return functional.adaptive_avg_pool2d(image.mean(0, keepdim=True), size)


def both(steps: list, size: tuple[int, int], seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """The map of the moved image, and the moved map of the plain one."""
    follow = Following("mine", transforms.Compose([*steps, transforms.ToTensor()]))
    torch.manual_seed(seed)
    moved = follow(picture())
    plain = follow.plain()(picture())
    cells = sample_field(follow.field, size)
    return pooled(moved, size), move_maps(pooled(plain, size), cells[None])


class TestMaps:
    @pytest.mark.parametrize("size", [(4, 4), (6, 6), (4, 6)])
    @pytest.mark.parametrize(
        "flip",
        [transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip, v2.RandomHorizontalFlip],
    )
    def test_a_flip_is_exact(self, flip, size):
        live, followed = both([flip(p=1.0)], size)
        torch.testing.assert_close(followed, live, atol=1e-5, rtol=1e-5)  # float32's rounding
        still, same = both([flip(p=0.0)], size)
        torch.testing.assert_close(same, still, atol=1e-5, rtol=1e-5)
        assert (still - live).abs().max() > 0.05

    @pytest.mark.parametrize(
        "step",
        [
            transforms.RandomRotation((20, 20), interpolation=BILINEAR),
            transforms.RandomAffine(10, (0.1, 0.1), (0.9, 1.1), interpolation=BILINEAR),
            transforms.RandomPerspective(0.3, p=1.0),
            transforms.RandomResizedCrop(48, scale=(0.6, 0.9)),
            transforms.RandomCrop(48, padding=6),
            transforms.RandomApply([transforms.RandomRotation((20, 20))], p=1.0),
            v2.RandomAffine(
                10, (0.1, 0.1), (0.9, 1.1), interpolation=v2.InterpolationMode(BILINEAR)
            ),
        ],
        ids=lambda step: f"{type(step).__module__.split('.')[-1]} {type(step).__name__}",
    )
    def test_another_move_is_that_of_the_image_up_to_resampling(self, step):
        live, followed = both([step], (16, 16))
        still, _ = both([], (16, 16))
        error = (followed - live).square().mean().sqrt()
        unmoved = (still - live).square().mean().sqrt()
        assert error < 0.25 * unmoved

    def test_two_moves_are_followed_one_after_the_other(self):
        turn = transforms.RandomRotation((20, 20), interpolation=BILINEAR)
        live, followed = both([transforms.RandomHorizontalFlip(p=1.0), turn], (16, 16))
        _, wrong = both([turn, transforms.RandomHorizontalFlip(p=1.0)], (16, 16))
        assert (followed - live).abs().mean() < 0.25 * (wrong - live).abs().mean()

    def test_whatever_fill_enters_the_image_has_no_relevance(self):
        def find_inside(fill: int) -> torch.Tensor:
            follow = Following("mine", transforms.RandomAffine(0, (0.5, 0.5), fill=fill))
            torch.manual_seed(0)
            follow(picture())
            return (sample_field(follow.field, (48, 48)).abs() <= 1).all(-1)

        black = find_inside(0)
        assert 0 < int(black.sum()) < 48 * 48
        assert all(torch.equal(find_inside(fill), black) for fill in range(1, 256))

    def test_what_enters_the_image_has_no_relevance(self):
        shift = transforms.RandomCrop(
            48, padding=(24, 0, 0, 0)
        )  # 0 to 24 black columns at the left
        follow = Following("mine", shift)
        torch.manual_seed(0)
        moved = transforms.ToTensor()(follow(Image.new("RGB", (48, 48), (255, 255, 255))))
        entered = moved[0, 0] == 0
        assert 0 < int(entered.sum()) < 24
        maps = move_maps(torch.ones(1, 48, 48), sample_field(follow.field, (48, 48))[None])
        assert torch.equal(maps[0, 0] == 0, entered)

    def test_features_are_moved_channel_by_channel(self):
        follow = Following("mine", transforms.RandomVerticalFlip(p=1.0))
        follow(picture())
        features = torch.rand(2, 3, 4, 4)
        cells = sample_field(follow.field, (4, 4)).expand(2, -1, -1, -1)
        torch.testing.assert_close(move_maps(features, cells), features.flip(2))


class TestImages:
    @pytest.mark.parametrize("seed", range(3))
    def test_they_are_bitwise_what_the_transform_makes_and_draw_the_same(self, seed):
        transform = make_transforms(48, augment=True)
        torch.manual_seed(seed)
        expected, after = transform(picture((60, 60))), torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(Following("mine", transform)(picture((60, 60))), expected)
        assert torch.equal(torch.get_rng_state(), after)

    def test_colours_leave_the_maps_where_they_are(self):
        jitter = transforms.RandomApply([transforms.ColorJitter(0.5, 0.5)], p=1.0)
        live, followed = both([jitter], (4, 4))
        still, _ = both([], (4, 4))
        assert torch.allclose(followed, still, atol=1e-6)
        assert not torch.allclose(live, still, atol=1e-3)

    def test_the_plain_image_is_that_of_the_fixed_steps(self):
        plain = Following("mine", make_transforms(48, augment=True)).plain()
        assert torch.equal(plain(picture((60, 60))), make_transforms(48)(picture((60, 60))))


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        ([transforms.Lambda(lambda image: image)], "steps that a map can follow, got Lambda"),
        ([transforms.RandomRotation(5), transforms.Resize(32)], "Resize behind a random move"),
        (
            [transforms.RandomApply([transforms.ColorJitter(), transforms.RandomRotation(5)])],
            "steps that a map can follow, got RandomApply",
        ),
        ([lambda image: image.rotate(5)], "steps that a map can follow, got <function"),
    ],
    ids=["unknown", "order", "mixed", "own"],
)
def test_what_no_map_can_follow_is_refused_by_name(steps, match):
    with pytest.raises(ValueError, match=match):
        Following("mine", transforms.Compose(steps))
