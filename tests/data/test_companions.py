"""What belongs to an image moves with it, and leaves it and what comes after as they are."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.transforms import v2

from kd_lrp_plugin.data.companions import Companions
from kd_lrp_plugin.data.folder import FolderImages
from kd_lrp_plugin.data.following import Following
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.data.shortcuts import Marked
from kd_lrp_plugin.data.transforms import make_transforms


def states() -> tuple:
    numpy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), numpy[1].tolist(), numpy[2:], random.getstate()


def seeded(images, index: int, seed: int = 0):
    """An item drawn from a state of its own, and the state that it leaves."""
    torch.manual_seed(seed + index)
    np.random.seed(seed + index)  # noqa: NPY002
    random.seed(seed + index)
    return images[index], states()


class Outlines:
    """Images that show their mask: white blots on black."""

    classes = ("a", "b")

    def __init__(self, transform, n: int = 6, side: int = 40) -> None:
        self.targets = [index % 2 for index in range(n)]
        self.transform = transform
        self.blots = np.zeros((n, side, side + 8), bool)
        for index, blot in enumerate(self.blots):
            blot[5 + index : 18 + index, 8 : 22 + index] = True
            blot[5 + index, 8:12] = False

    def __len__(self) -> int:
        return len(self.targets)

    def mask(self, index: int):
        return self.blots[index]

    def __getitem__(self, index: int):
        page = Image.fromarray(np.uint8(255) * self.blots[index].astype(np.uint8))
        return self.transform(page.convert("RGB")), self.targets[index]


RANDOM = {
    "ours": make_transforms(32, augment=True),
    "crop and python": transforms.Compose(
        [
            transforms.RandomChoice(
                [transforms.RandomRotation(40), transforms.RandomVerticalFlip(1.0)]
            ),
            transforms.RandomResizedCrop(32),
            transforms.ToTensor(),
        ]
    ),
    "colours": transforms.Compose(
        [
            transforms.RandomAffine(30, shear=20),
            transforms.ColorJitter(0.3, 0.3),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    ),
}


class TestClean:
    @pytest.fixture
    def images(self) -> Phantom:
        return Phantom("train", size=8, image_size=64, augment=True)

    def test_it_is_the_image_without_its_marker_by_the_same_augmentation(self, images):
        marked = Marked(images, agreement=0.5)
        both = Companions(marked, clean=True)
        for index in range(8):
            (item, label, found), left = seeded(both, index)
            (plain, of_plain), _ = seeded(images, index)
            (alone, _), left_alone = seeded(marked, index)
            assert torch.equal(item, alone)
            assert torch.equal(found["clean"], plain)
            assert not torch.equal(item, plain)
            assert label == of_plain
            assert left == left_alone

    def test_what_comes_after_the_marker_is_drawn_alike(self, images):
        erasing = transforms.RandomErasing(p=0.7)
        marked = Marked(images, kind="frame", size=0.2, transform=erasing)
        both = Companions(marked, clean=True)
        erased = 0
        for index in range(8):
            (item, _, found), left = seeded(both, index)
            differs = (item != found["clean"]).any(0).numpy()
            (plain, _), _ = seeded(images, index)
            assert left == seeded(marked, index)[1]
            assert not (differs & ~marked.marker(index)).any()
            erased += not torch.equal(found["clean"], plain)
        assert 0 < erased < 8

    def test_without_a_marker_it_is_the_image(self, images):
        both = Companions(Marked(images, variants="none"), clean=True)
        image, _, found = both[3]
        assert torch.equal(image, found["clean"])

    def test_of_two_markers_it_has_neither(self, images):
        twice = Marked(Marked(images), kind="frame")
        (_, _, found), _ = seeded(Companions(twice, clean=True), 2)
        assert torch.equal(found["clean"], seeded(images, 2)[0][0])


class TestMask:
    @pytest.mark.parametrize("name", RANDOM)
    def test_it_moves_as_the_image_does(self, name):
        """The image shows the mask, so that it says where the mask must be."""
        images = Outlines(RANDOM[name])
        both = Companions(images, mask=True)
        positions = set()
        for index in range(6):
            (item, _, found), left = seeded(both, index, 10)
            white = item[0] > (item.min() + item.max()) / 2
            if name == "colours":  # that dims white, too: only its geometry is the mask's
                bare = transforms.Compose([RANDOM[name].transforms[0], transforms.ToTensor()])
                white = seeded(Outlines(bare), index, 10)[0][0][0] > 0.5
            assert torch.equal(found["mask"], white)
            assert found["mask"].dtype == torch.bool
            assert found["mask_known"] is True
            assert left == seeded(images, index, 10)[1]
            positions.add(tuple(found["mask"].nonzero().float().mean(0).tolist()))
        assert len(positions) == 6

    def test_a_flip_flips_it(self):
        images = Outlines(
            transforms.Compose([transforms.RandomHorizontalFlip(1.0), transforms.ToTensor()])
        )
        found = Companions(images, mask=True)[1][2]["mask"]
        assert found.tolist() == [row[::-1].tolist() for row in images.blots[1]]

    def test_of_marked_images_it_is_moved_by_what_comes_after_the_marker_too(self):
        flip = transforms.RandomVerticalFlip(1.0)
        images = Outlines(transforms.ToTensor())
        found = Companions(Marked(images, transform=flip), mask=True)[2][2]["mask"]
        assert found.tolist() == images.blots[2][::-1].tolist()

    @pytest.mark.parametrize(
        "colours",
        [
            transforms.ColorJitter(contrast=(0.01, 0.02)),
            transforms.ColorJitter(0.9, 0.9, 0.9, 0.5),
            transforms.RandomApply([transforms.ColorJitter((0.1, 0.2))], p=0.5),
            transforms.RandomInvert(0.5),
            transforms.RandomSolarize(9, 0.5),
            v2.RandomPhotometricDistort(p=1.0),
        ],
        ids=lambda step: type(step).__name__,
    )
    @pytest.mark.parametrize("followed", [False, True])
    def test_colours_leave_it_as_it_is(self, colours, followed):
        turn = transforms.RandomRotation(40)
        images = Outlines(transforms.Compose([colours, turn, transforms.ToTensor()]))
        if followed:
            images.transform = Following("mine", images.transform)
        found = Companions(images, mask=True)
        for seed in range(12):
            torch.manual_seed(seed)
            colours(Image.new("RGB", (48, 40)))
            expected = np.asarray(turn(Image.fromarray(images.blots[3]))) > 0
            torch.manual_seed(seed)
            assert np.array_equal(found[3][2]["mask"], expected)

    def test_an_erased_pixel_stays_the_objects(self):
        erase = transforms.RandomErasing(1.0, (0.9, 0.9), value=0, inplace=True)
        images = Outlines(transforms.Compose([transforms.ToTensor(), erase]))
        image, _, found = Companions(images, mask=True)[2]
        assert np.array_equal(found["mask"], images.blots[2])
        assert image.sum() < images.blots[2].sum()

    def test_half_of_a_pixel_is_enough_however_the_image_is_normalised(self):
        first = [transforms.Resize((20, 20)), transforms.ToTensor()]
        plain, last = transforms.Compose(first), transforms.Normalize([0.1] * 3, [0.1] * 3)
        expected = Companions(Outlines(plain), mask=True)[1][2]["mask"]
        ways = [
            Outlines(v2.Compose([*first, v2.Normalize([0.1] * 3, [0.1] * 3)])),
            Outlines(transforms.Compose([plain, last])),
            Marked(Outlines(plain), variants="none", transform=last),
        ]
        for images in ways:
            assert torch.equal(Companions(images, mask=True)[1][2]["mask"], expected)

    def test_nothing_there_is_known_and_no_mask_is_not(self, tmp_path):
        images = Phantom("train", size=8, image_size=48, augment=True, cache=True)
        both = Companions(images, mask=True)
        nothing = images.classes.index("notumor")
        for index in range(8):
            _, label, found = both[index]
            assert found["mask_known"] is True
            assert bool(found["mask"].any()) == (label != nothing)
        for label in "ab":
            (tmp_path / "Training" / label).mkdir(parents=True)
            Image.new("RGB", (20, 30)).save(tmp_path / "Training" / label / "1.png")
        (tmp_path / "masks/Training/b").mkdir(parents=True)
        Image.new("L", (20, 30), 255).save(tmp_path / "masks/Training/b/1.png")
        both = Companions(FolderImages(str(tmp_path), image_size=16), mask=True)
        unknown, known = (found for _, _, found in both)
        assert (unknown["mask_known"], bool(unknown["mask"].any())) == (False, False)
        assert (known["mask_known"], bool(known["mask"].all())) == (True, True)
        assert unknown["mask"].shape == known["mask"].shape == (16, 16)

    def test_a_cached_mask_is_the_one_that_is_drawn(self):
        plain, cached = (Phantom("val", size=4, image_size=48, cache=c) for c in (False, True))
        for index in (0, 1, 2, 3, 0):
            cached[index]
            assert np.array_equal(cached.mask(index), plain.mask(index))
            assert np.array_equal(np.asarray(cached.image(index)), plain.image(index))


def test_groups_are_numbered_by_their_sorted_names_in_a_part_too():
    marked = Marked(Phantom("train", size=40, image_size=48), agreement=0.5)
    part = Subset(Subset(marked, range(5, 40)), range(0, 30, 3))
    both = Companions(part, clean=True, group=True)
    assert (len(both), both.groups) == (10, ["agrees", "conflicts"])
    images, labels, found = next(iter(DataLoader(both, batch_size=10)))
    names = [marked.groups[5 + index] for index in range(0, 30, 3)]
    assert found["group_name"] == names
    assert found["group"].tolist() == [sorted(set(marked.groups)).index(name) for name in names]
    assert len(set(names)) == 2
    for row, index in enumerate(range(5, 35, 3)):
        assert torch.equal(images[row], marked[index][0])
        assert torch.equal(found["clean"][row], marked.images[index][0])
        assert labels[row] == marked.targets[index]


def test_only_what_is_asked_for_is_added_and_it_can_be_iterated():
    both = Companions(Marked(Phantom("train", size=4, image_size=48)), group=True)
    assert [set(found) for _, _, found in both] == [{"group", "group_name"}] * 4
    loaded = next(iter(DataLoader(Companions(both.images, mask=True), batch_size=4)))[2]
    assert (loaded["mask"].shape, loaded["mask"].dtype) == ((4, 48, 48), torch.bool)
    assert (loaded["mask_known"].shape, loaded["mask_known"].dtype) == ((4,), torch.bool)


def test_making_it_draws_nothing():
    images = Marked(Phantom("train", size=4, image_size=48, augment=True))
    before = states()
    Companions(images, clean=True, mask=True, group=True)
    assert states() == before


class OwnGenerator:
    """A transform whose randomness is its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        page = transforms.functional.to_tensor(image)
        return page.flip(2) if torch.rand((), generator=self.generator) < 0.5 else page


def by_pixels(image: torch.Tensor) -> torch.Tensor:
    """Draws once more for a bright image."""
    if image.mean() > 0.06:
        torch.rand(())
    return image + 0 * torch.rand(())


class Unmasked(Outlines):
    mask = property()  # as if there were none


class WithoutTransform(Outlines):
    """Tensors, made by nothing that a mask could be given to."""

    def __init__(self) -> None:
        super().__init__(None)

    def __getitem__(self, index: int):
        return torch.zeros(3, 40, 48), self.targets[index]


def steps(*more) -> transforms.Compose:
    return transforms.Compose([*more, transforms.ToTensor()])


INVERTS, PLAIN = transforms.Lambda(ImageOps.invert), steps()
BOTH = transforms.RandomApply([transforms.ColorJitter(0.4), transforms.RandomRotation(9)])


@pytest.mark.parametrize(
    ("images", "asked", "words"),
    [
        (Outlines(PLAIN), {}, "companions: expected clean, mask or group, got none"),
        (Outlines(PLAIN), {"clean": "yes"}, "companions clean: expected True or False"),
        (Outlines(PLAIN), {"clean": True}, "companions: clean: expected marked data, got Outlines"),
        (Outlines(PLAIN), {"group": True}, "companions: group: expected data with groups"),
        (Unmasked(PLAIN), {"mask": True}, "companions: mask: expected data with a mask or more"),
        (Marked(Unmasked(PLAIN)), {"mask": True}, "a mask or more, got none of 6"),
        (Outlines(lambda page: page), {"mask": True}, "images that are tensors, got Image"),
        (WithoutTransform(), {"mask": True}, "mask: expected data with a transform, got none"),
        (Outlines(steps(INVERTS)), {"mask": True}, "black stays black, and white white"),
        (Outlines(steps(BOTH)), {"mask": True}, "colours or move pixels, got both in RandomApply"),
        (Outlines(steps(v2.RandAugment())), {"mask": True}, "got both in RandAugment"),
        (Outlines(OwnGenerator()), {"mask": True}, "got two images from one state"),
        (Marked(Outlines(OwnGenerator())), {"clean": True}, "got two images from one state"),
    ],
)
def test_what_a_data_set_does_not_have_is_refused(images, asked, words):
    with pytest.raises(ValueError, match=words):
        Companions(images, **asked)


@pytest.mark.parametrize("name", ["clean", "mask"])
def test_a_transform_that_draws_by_the_pixels_is_found_out(name):
    marked = Marked(Outlines(PLAIN), size=0.4, kind="frame", transform=by_pixels)
    marked.images.blots[:] = False
    marked.images.blots[:, 3:5, 3:5] = True  # too little to be bright without its frame
    with pytest.raises(ValueError, match=f"companions: {name}: expected as many random numbers"):
        list(Companions(marked, **{name: True}))
