"""Markers tell what they are asked to tell, on whatever image, and nothing else changes."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2

from kd_lrp_plugin.data.folder import FolderImages
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.data.shortcuts import KINDS, VARIANTS, Marked, draw_marker
from kd_lrp_plugin.data.transforms import preprocessing
from kd_lrp_plugin.data.unlabelled import WithUnlabelled
from kd_lrp_plugin.data.validation import unreadable_images


class Blank:
    """Grey images with labels in turn; ``classes`` of them."""

    def __init__(self, n: int = 400, classes: int = 4, shape: tuple[int, int] = (40, 32)) -> None:
        self.classes = [f"class {k}" for k in range(classes)]
        self.targets = [index % classes for index in range(n)]
        self.transform = transforms.Compose([transforms.Normalize([0.5] * 3, [0.5] * 3)])
        self.shape = shape

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(3, *self.shape), self.targets[index]


def shown_by(marked: Marked, index: int) -> int:
    """The class that the pixels tell: the one whose marker on the image gives the same item."""
    item = marked[index][0]
    found = []
    for shown in range(len(marked.classes)):
        value, alpha = draw_marker(
            marked.kind, shown, len(marked.classes), item.shape[-2:], (marked.size, marked.strength)
        )
        black, white = -1.0, 1.0
        expected = alpha * (black + value * (white - black))
        if marked.kind == "diffuse":
            expected = (value * (white - black)).clamp(black, white)
        if torch.allclose(item, expected.expand_as(item)):
            found.append(shown)
    (only,) = found
    return only


@pytest.mark.parametrize("classes", [2, 4, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_the_pixels_tell_the_class_that_is_said(kind, classes):
    marked = Marked(Blank(60, classes), kind, size=0.2, strength=0.5, variants="random")
    assert [shown_by(marked, i) for i in range(20)] == marked.shown[:20]
    assert len(set(marked.shown)) == classes


@pytest.mark.parametrize("agreement", [0.0, 0.5, 0.9, 1.0])
def test_a_share_agrees_and_the_others_say_any_class(agreement):
    marked = Marked(Blank(4000), agreement=agreement)
    agrees = np.mean([s == t for s, t in zip(marked.shown, marked.targets, strict=True)])
    assert agrees == pytest.approx(agreement + (1 - agreement) / 4, abs=0.03)
    words = {True: "agrees", False: "conflicts"}
    pairs = zip(marked.shown, marked.targets, strict=True)
    assert marked.groups == [words[s == t] for s, t in pairs]


def test_variants_stand_one_after_the_other_and_do_what_they_are_called():
    data = Blank()
    marked = Marked(data, variants=list(VARIANTS))
    assert len(marked) == 4 * len(data)
    of = {name: [i for i, g in enumerate(marked.groups) if g == name] for name in VARIANTS}
    assert [len(items) for items in of.values()] == [400] * 4
    assert all(marked.shown[i] == marked.targets[i] for i in of["as_trained"])
    assert all(marked.shown[i] not in (marked.targets[i], None) for i in of["conflicting"])
    assert {marked.shown[i] for i in of["random"]} == {0, 1, 2, 3}
    assert all(marked.marker(i) is None for i in of["none"])
    assert torch.equal(marked[of["none"][3]][0], data[3][0])


def test_what_is_drawn_does_not_depend_on_the_other_variants_or_the_order():
    alone, among = Marked(Blank(), variants="random"), Marked(Blank(), variants=["none", "random"])
    assert alone.shown == among.shown[400:]
    later = alone[17][0]
    assert torch.equal(later, Marked(Blank(), variants="random")[17][0])
    assert alone.shown != Marked(Blank(), variants="random", seed=1).shown


def test_the_marker_is_where_the_image_changed():
    data = Phantom("test", size=8, image_size=64)
    marked = Marked(data, size=0.1)
    for index in range(8):
        changed = (marked[index][0] != data[index][0]).any(0).numpy()
        assert not (changed & ~marked.marker(index)).any()
        assert marked.marker(index).sum() == 36
        assert marked[index][0][:, torch.from_numpy(marked.marker(index))].unique().tolist() == [1]


def test_only_some_classes_carry_it_and_a_transform_comes_last():
    marked = Marked(Blank(), classes=[1], transform=lambda image: image + 5)
    assert [s is None for s in marked.shown[:4]] == [True, False, True, True]
    assert marked.groups[:4] == ["none", "agrees", "none", "none"]
    assert float(marked[0][0].min()) == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "pach"}, "Did you mean 'patch'"),
        ({"variants": "agree"}, "variants: expected one of"),
        ({"variants": ["none", "none"]}, "different variants"),
        ({"variants": []}, "different variants"),
        ({"agreement": 1.5}, r"agreement: expected a number in \[0, 1\], got 1.5"),
        ({"agreement": "half"}, "agreement: expected a number"),
        ({"size": 0}, r"size: expected a number in \(0, 1\]"),
        ({"size": 0.9}, "marker from one pixel to half of the image"),
        ({"size": 0.001}, "got 0 pixels"),
        ({"strength": True}, "strength: expected a number"),
        ({"classes": [4]}, "indices below 4, got"),
        ({"images": "phantom/train"}, "data with targets and classes, got str"),
        ({"images": Blank(classes=1)}, "two classes or more"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Marked(**{"images": Blank(), **changes})


def test_it_reads_files_as_the_data_set_that_it_marks(tmp_path):
    values = np.random.default_rng(0).integers(4000, size=(20, 20), dtype=np.uint16)
    for label in "ab":
        (tmp_path / "Training" / label).mkdir(parents=True)
        Image.fromarray(values).save(tmp_path / "Training" / label / "1.png")
    images = FolderImages(str(tmp_path), image_size=20, bits=12)
    marked = Marked(images)
    assert preprocessing(marked) == preprocessing(images)
    assert unreadable_images(marked) == unreadable_images(images) == {}


def test_white_is_white_in_every_channel():
    images = Blank(n=4)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images.transform = transforms.Compose([transforms.Normalize(mean, std)])
    back = transforms.Normalize(
        [-m / s for m, s in zip(mean, std, strict=True)], [1 / s for s in std]
    )
    marked = Marked(images)
    pixels = back(marked[0][0])[:, torch.from_numpy(marked.marker(0))]
    torch.testing.assert_close(pixels, torch.ones_like(pixels))
    gradient = back(Marked(images, kind="diffuse")[0][0])
    plain = back(torch.zeros(3, *images.shape))
    value, _ = draw_marker("diffuse", 0, 4, images.shape, (0.1, 1.0))
    torch.testing.assert_close(gradient, (plain + value).clamp(0, 1))


@pytest.mark.parametrize("how", ["version 2", "nested", "behind another marker"])
def test_white_is_white_wherever_and_by_whichever_version_it_is_normalised(how):
    plain = [transforms.Resize((32, 32)), transforms.ToTensor()]
    last = transforms.Normalize([0.5] * 3, [0.25] * 3)
    if how == "behind another marker":
        images = Phantom("test", 4, 32, transform=transforms.Compose(plain))
        images = Marked(images, variants="none", transform=last)
    else:
        of_2 = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.25])]
        steps = of_2 if how == "version 2" else [transforms.Compose([*plain, last])]
        images = Phantom("test", 4, 32, transform=v2.Compose(steps))
    expected = Marked(Phantom("test", 4, 32, transform=transforms.Compose([*plain, last])))
    for kind in ("patch", "diffuse"):
        item = Marked(images, kind=kind)[0][0]
        torch.testing.assert_close(item, Marked(expected.images, kind=kind)[0][0])


def test_a_letter_for_each_class_or_none():
    class Many(Phantom):
        classes = tuple(f"class {i}" for i in range(27))

    with pytest.raises(ValueError, match=r"marked: glyph: expected at most 26, got 27 classes"):
        Marked(Many("test", size=8, image_size=32), kind="glyph", size=0.3)
    Many.classes = Many.classes[:26]
    letters = {
        draw_marker("glyph", i, 26, (96, 96), (0.3, 1.0))[1].numpy().tobytes() for i in range(26)
    }
    assert len(letters) == 26
    assert len(Marked(Many("test", size=8, image_size=32), kind="glyph", size=0.3)) == 8


@pytest.mark.parametrize(
    ("kind", "classes", "side", "words"),
    [
        ("glyph", 4, 40, "the same for 'class 1' and 'class 3' in images of 40 x 40"),
        ("glyph", 10, 28, "the same for"),
        ("glyph", 2, 20, "none for 'class"),
        ("patch", 1000, 128, "the same for"),
    ],
)
def test_markers_that_do_not_tell_their_classes_are_refused(kind, classes, side, words):
    with pytest.raises(ValueError, match=f"marked: {kind}: expected a marker of its own.*{words}"):
        Marked(Blank(classes, classes, (side, side)), kind)
    assert len(Marked(Blank(classes, classes, (side, side)), kind, variants="none")) == classes


_NORMALIZE = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.mark.parametrize(
    "transform",
    [
        v2.Compose(
            [
                v2.Resize((64, 64)),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(**_NORMALIZE),
            ]
        ),
        transforms.Compose(
            [
                transforms.Resize((64, 64)),
                transforms.Compose([transforms.ToTensor(), transforms.Normalize(**_NORMALIZE)]),
            ]
        ),
    ],
)
def test_white_is_white_behind_a_normalisation_of_whatever_form(transform):
    marked = Marked(Phantom("test", size=4, image_size=64, transform=transform))
    mean, std = (torch.tensor(_NORMALIZE[key])[:, None] for key in ("mean", "std"))
    pixels = marked[0][0][:, torch.from_numpy(marked.marker(0))] * std + mean
    torch.testing.assert_close(pixels, torch.ones_like(pixels))


def test_images_of_another_black_and_white_are_refused():
    steps = [transforms.Resize((64, 64)), transforms.PILToTensor()]
    images = Phantom("test", size=4, image_size=64, transform=transforms.Compose(steps))
    with pytest.raises(ValueError, match=r"between black and white.*got 0 to 255"):
        Marked(images)
    own = transforms.Lambda(lambda image: 2 * transforms.functional.to_tensor(image) - 1)
    images.transform = transforms.Compose([steps[0], own])
    with pytest.raises(ValueError, match=r"between black and white.*got -1 to 1"):
        Marked(images, kind="diffuse")
    noise = transforms.RandomErasing(p=1, scale=(0.3, 0.33), value="random")
    images.transform = transforms.Compose(
        [steps[0], transforms.ToTensor(), transforms.Normalize(**_NORMALIZE), noise]
    )
    assert all(len(Marked(images)) == 4 for _ in range(10))


def test_images_that_nobody_has_labelled_are_not_marked_as_if_they_were_of_a_class():
    images = Phantom("train", size=4, image_size=64)
    with pytest.raises(ValueError, match=r"got labels \[-100\]. Wrap the marked images in with_un"):
        Marked(WithUnlabelled(images, images))
    assert WithUnlabelled(Marked(images), images).targets[4:] == [-100] * 4


def test_labels_may_be_a_tensor_as_of_torchvision():
    images = Blank(8)
    images.targets = torch.tensor(images.targets)
    marked = Marked(images)
    assert marked.shown == marked.targets == [0, 1, 2, 3, 0, 1, 2, 3]
    assert marked.groups == ["agrees"] * 8


def test_the_marker_is_followed_through_the_transform_and_prediction_repeats_it():
    data = Phantom("test", size=4, image_size=64)
    crop = transforms.Compose([transforms.CenterCrop(60), transforms.Resize((64, 64))])
    flip = transforms.RandomHorizontalFlip(p=1)
    for transform in (crop, flip):
        marked, plain = Marked(data, transform=transform), Marked(data, variants="none")
        for index in range(4):
            bright = marked[index][0] == 1
            found = torch.from_numpy(marked.marker(index))
            assert found.any()
            assert bright[:, found].float().mean() > 0.8  # a resize blurs its edge
            assert torch.equal(marked.transform(data.image(index)), transform(plain[index][0]))
        assert preprocessing(marked) is None
    assert not Marked(data, transform=transforms.CenterCrop(40)).marker(0).any()


def test_variants_of_an_image_have_its_number_where_images_have_no_names():
    class Nameless:
        classes, targets = ["a", "b"], [0, 1, 0]

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return torch.full((3, 32, 32), 0.5), self.targets[index]

    marked = Marked(Nameless(), variants=["random", "none"])
    assert marked.numbers == [0, 1, 2, 0, 1, 2]
    assert not hasattr(marked, "names")
