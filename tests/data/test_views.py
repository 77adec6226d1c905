"""Views by a key are the same whoever draws them; followed ones are those of no cache."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder, VisionDataset
from torchvision.transforms import v2

from kd_lrp_plugin.data.companions import Companions
from kd_lrp_plugin.data.folder import FolderImages
from kd_lrp_plugin.data.identity import identify_items
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.data.shortcuts import Marked
from kd_lrp_plugin.data.unlabelled import WithUnlabelled
from kd_lrp_plugin.data.views import CELLS, ROW, FollowedViews, KeyedViews
from kd_lrp_plugin.utils.preserved import Generators


def phantom(size: int = 6, **kwargs) -> Phantom:
    return Phantom("train", size=size, image_size=32, **kwargs)


def read(views: KeyedViews, workers: int, order: list[int]) -> dict[int, torch.Tensor]:
    found = {}
    for images, _, companions in DataLoader(views, 2, sampler=order, num_workers=workers):
        found |= dict(zip(companions[ROW].tolist(), images, strict=True))
    return found


FAR = [transforms.RandomPerspective(far, p=1.0) for far in (0.2, 0.6)]


class OneNoisy(Dataset):
    """Images of which the sixth alone is random."""

    def __init__(self, images: Phantom) -> None:
        self.images, self.transform = images, images.transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.images[index]
        return (image + torch.rand(()) if index == 5 else image), label


class Pets(VisionDataset):
    """Pictures that are transformed by ``transforms``, as torchvision's OxfordIIITPet does it."""

    def __init__(self, transform) -> None:
        super().__init__("nowhere", transform=transform)
        self._images = Phantom("train", size=4, image_size=32)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transforms(self._images.image(index), 0)


class TestKeyedViews:
    def test_they_do_not_depend_on_workers_order_or_the_global_state(self):
        views = KeyedViews("mine", phantom(augment=True), views=3, seed=1)
        views.epoch = 4
        torch.manual_seed(0)
        first = read(views, 0, [0, 1, 2, 3, 4, 5])
        torch.manual_seed(9)
        other = read(views, 2, [5, 3, 1, 0, 2, 4])
        assert sorted(first) == [6, 7, 8, 9, 10, 11]  # of view 4 % 3
        assert all(torch.equal(first[row], other[row]) for row in first)
        assert all(torch.equal(views.ask(row)[0], first[row]) for row in first)

    def test_view_image_and_seed_each_choose_another_augmentation(self):
        images = phantom(augment=True)
        views = KeyedViews("mine", images, views=8)
        assert len({views.ask(row)[0].numpy().tobytes() for row in range(views.rows)}) == 48
        assert not torch.equal(KeyedViews("mine", images, seed=1).ask(0)[0], views.ask(0)[0])
        flip = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor()])
        both = [KeyedViews("mine", phantom(2, transform=flip), 64).ask(2 * v)[0] for v in range(64)]
        flips = sum(not torch.equal(image, both[0]) for image in both)
        assert 16 < flips < 48  # a fair coin falls outside with a probability of 1e-4

    def test_generators_are_left_as_they_were(self):
        views = KeyedViews("mine", phantom(augment=True))
        before = Generators.take()
        views[0], views.ask(3)
        assert Generators.take().is_same(before)

    def test_without_randomness_there_is_one_view_and_it_is_the_image(self):
        images = phantom()
        views = KeyedViews("mine", images, views=4)
        views.epoch = 3
        assert (views.views, views.rows, views[2][2][ROW]) == (1, 6, 2)
        assert torch.equal(views[2][0], images[2][0])

    def test_randomness_that_no_key_reaches_is_refused(self):
        own = random.Random(0)
        turn = transforms.Lambda(lambda image: image.rotate(own.random() * 90))
        transform = transforms.Compose([turn, transforms.ToTensor()])
        with pytest.raises(ValueError, match="by the global random number generators, got two"):
            KeyedViews("mine", phantom(transform=transform))

    def test_randomness_of_a_part_of_the_images_counts(self):
        pair = WithUnlabelled(phantom(9), phantom(2, augment=True, seed=1))
        views = KeyedViews("mine", pair, views=3)
        assert views.views == 3
        assert not torch.equal(views.ask(9)[0], views.ask(9 + 11)[0])
        assert torch.equal(views.ask(1)[0], views.ask(1 + 11)[0])

    def test_a_random_image_among_others_that_are_not_is_refused(self):
        views = KeyedViews("mine", OneNoisy(phantom(8)), views=2)
        assert views.rows == 8
        with pytest.raises(ValueError, match=r"such as item 0, got a random item 5\. Set views: 1"):
            [views.ask(row) for row in range(8)]
        first, *again = [KeyedViews("mine", OneNoisy(phantom(8)), views=1)[5][0] for _ in range(3)]
        assert all(torch.equal(image, first) for image in again)

    def test_companions_are_of_the_same_view(self):
        images = Marked(phantom(augment=True), size=0.2)
        views = KeyedViews("mine", Companions(images, clean=True))
        image, _, companions = views[1]
        assert 0 < (image != companions["clean"]).float().mean() < 0.1  # the marker's pixels alone


class TestFollowedViews:
    def test_images_are_those_that_there_are_without(self):
        images = phantom(augment=True)
        views = FollowedViews("mine", images)
        views.sizes = [(4, 4)]
        for index in range(3):
            torch.manual_seed(index)
            expected = images[index][0]
            torch.manual_seed(index)
            image, _, companions = views[index]
            assert torch.equal(image, expected)
            assert companions[ROW] == index
            assert companions[CELLS]["4x4"].shape == (4, 4, 2)
        assert torch.equal(views.ask(1)[0], phantom()[1][0])

    def test_wrapped_data_are_followed_inside(self):
        pair = WithUnlabelled(phantom(3, augment=True), phantom(3, augment=True, seed=1))
        views = FollowedViews("mine", pair)
        views.sizes = [(8, 8)]
        torch.manual_seed(1)
        cells = [views[index][2][CELLS]["8x8"] for index in (0, 4)]
        still = views.ask(4)
        assert torch.equal(still[0], phantom(3, seed=1)[1][0])
        assert not torch.equal(cells[0], cells[1])

    def test_companions_stay_those_of_the_moved_image(self):
        def wrap(images):
            return Companions(images, mask=True)

        images = phantom(augment=True)
        views = FollowedViews("mine", images, wrap)
        torch.manual_seed(2)
        _, _, expected = wrap(images)[1]
        torch.manual_seed(2)
        assert torch.equal(views[1][2]["mask"], expected["mask"])
        assert torch.equal(views.ask(1)[2]["mask"], wrap(phantom())[1][2]["mask"])

    def test_plain_images_of_another_shape_are_refused(self):
        steps = [transforms.RandomCrop(24), transforms.ToTensor()]
        with pytest.raises(ValueError, match="Put Resize in front of random crops"):
            FollowedViews("mine", phantom(transform=transforms.Compose(steps)))

    def test_images_that_another_transform_moves_are_refused(self):
        steps = [transforms.RandomRotation(30), transforms.ToTensor()]
        with pytest.raises(ValueError, match="without randomness, got a random item 0"):
            FollowedViews("mine", Pets(transforms.Compose(steps)))
        assert torch.equal(FollowedViews("mine", Pets(steps[1])).ask(3)[0], Pets(steps[1])[3][0])

    def test_one_random_image_that_no_step_moves_is_refused(self):
        views = FollowedViews("mine", OneNoisy(phantom(8)))
        with pytest.raises(ValueError, match="or take cache: exact"):
            views.ask(5)

    def test_plain_images_that_differ_by_a_generator_of_their_own_are_refused(self):
        own = random.Random(0)

        class Noisy(OneNoisy):
            def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
                return self.images[index][0] + own.random(), 0

        with pytest.raises(ValueError, match="plain images without randomness"):
            FollowedViews("mine", Noisy(phantom(2)))

    def test_data_without_a_transform_are_refused(self):
        with pytest.raises(ValueError, match="data with a transform, got list without"):
            FollowedViews("mine", [(torch.zeros(3, 8, 8), 0)])


class TestIdentity:
    def folder(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / "Training" / name).mkdir(parents=True)
            for index in range(12):
                image = Image.new("RGB", (16, 16), (index * 9, 0, 0))
                image.save(tmp_path / "Training" / name / f"{index}.png", compress_level=0)
        return lambda **kwargs: self.identify(FolderImages(str(tmp_path), image_size=16, **kwargs))

    @staticmethod
    def identify(images) -> str:
        views = KeyedViews("mine", images)
        return identify_items(images, views.ask, views.rows)

    def test_it_is_the_same_again_and_elsewhere(self, tmp_path):
        here = self.folder(tmp_path / "here")
        assert here() == here() == self.folder(tmp_path / "there")()

    def test_a_byte_of_any_file_changes_it(self, tmp_path):
        identify = self.folder(tmp_path)
        before = identify()
        file = tmp_path / "Training/a/1.png"  # none of those whose pixels are looked at
        size = file.stat().st_size
        Image.new("RGB", (16, 16), (200, 0, 0)).save(file, compress_level=0)
        assert file.stat().st_size == size
        assert identify() != before

    def test_transform_split_and_markers_change_it(self, tmp_path):
        identify = self.folder(tmp_path)
        found = {identify(), identify(augment=True), identify(channels=1)}
        found |= {self.identify(phantom(n, seed=s)) for n, s in ((8, 0), (9, 0), (8, 1))}
        marked = [Marked(phantom(8), agreement=0.5, seed=seed) for seed in (0, 1)]
        found |= {self.identify(images) for images in marked}
        assert len(found) == 8

    def test_images_without_names_count_by_all_their_pixels(self):
        images = [(torch.full((3, 4, 4), float(index)), 0) for index in range(40)]

        class Plain(list):
            pass

        one, other = Plain(images), Plain(images)
        other[7] = (torch.zeros(3, 4, 4), 0)
        assert self.identify(one) != self.identify(other)
        assert self.identify(one) == self.identify(Plain(images))

    def asked(self, images) -> int:
        """How many items count by their pixels, of a data set without randomness."""
        views, seen = KeyedViews("mine", images), []
        identify_items(images, lambda row: (seen.append(row), views.ask(row))[1], views.rows)
        return len(seen)

    def test_the_transform_behind_markers_counts(self):
        def identify(share):
            erase = transforms.RandomErasing(p=share, value=9.0)  # of none whose pixels count
            return self.identify(Marked(phantom(40), transform=erase))

        assert identify(0.02) != identify(0.05)

    @pytest.mark.parametrize(
        ("make", "values"),
        [
            (lambda far: transforms.RandomPerspective(far, p=0.01), (0.2, 0.6)),
            (lambda p: v2.RandomApply([transforms.RandomVerticalFlip(1.0)], p), (0.01, 0.02)),
            (lambda to: transforms.RandomChoice([transforms.CenterCrop(32), to], [99, 1]), FAR),
        ],
        ids=["distortion", "share", "inside"],
    )
    def test_what_no_text_of_a_transform_says_counts(self, make, values):
        def identify(value) -> str:
            steps = [make(value), transforms.ToTensor()]
            return self.identify(phantom(40, transform=transforms.Compose(steps)))

        one, other = map(identify, values)
        assert one == identify(values[0]) != other

    @pytest.mark.parametrize("wrap", [Subset, lambda i, at: Companions(Subset(i, at), mask=True)])
    @pytest.mark.parametrize("kind", [list, np.array])
    def test_which_images_are_taken_counts(self, wrap, kind):
        images, rows = phantom(40), list(range(32))
        other = [0, 39, 38, *rows[3:]]  # all of them alike where pixels are looked at
        found = [self.identify(wrap(images, kind(each))) for each in (rows, rows, other)]
        assert found[0] == found[1] != found[2]

    def test_names_and_files_count_if_there_is_one_for_each_item(self, tmp_path):
        class Own(Dataset):
            def __init__(self, values, **kwargs):
                vars(self).update(kwargs, values=values)

            def __len__(self):
                return len(self.values)

            def __getitem__(self, index):
                return self.values[index], 0

        one = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        other = one.clone()
        other[1:5] = 0
        for said in ({"names": ["cat", "dog"]}, {"samples": [(n, 0, 1) for n in range(40)]}):
            assert self.identify(Own(one, **said)) == self.identify(Own(one, **said))
            assert self.identify(Own(one, **said)) != self.identify(Own(other, **said))

    def test_a_transform_of_ones_own_lets_all_pixels_count(self):
        class Brighter:
            def __init__(self, by: float, least: float) -> None:
                self.by, self.least = by, least

            def __call__(self, image):
                return image + self.by * (float(image.sum()) > self.least)

        def make(*how):
            steps = [transforms.ToTensor(), Brighter(*how)]
            return phantom(40, transform=transforms.Compose(steps))

        least = sorted(float(image.sum()) for image, _ in make(0.0, 0.0))[-2]  # below one image
        assert self.identify(make(0.0, least)) == self.identify(make(0.0, least))
        assert self.identify(make(0.0, least)) != self.identify(make(0.1, least))
        assert self.asked(make(0.0, least)) == 40

    def test_of_what_says_all_of_itself_few_pixels_are_looked_at(self, tmp_path):
        self.folder(tmp_path)
        steps = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()])
        folders = [
            FolderImages(str(tmp_path), image_size=16),
            ImageFolder(str(tmp_path / "Training"), steps),
        ]
        for images in (*folders, phantom(24), Marked(phantom(24)), Subset(phantom(24), range(24))):
            assert self.asked(images) == 8
