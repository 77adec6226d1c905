"""Data sets labelled by subclass, and what they leave as it was."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from kd_lrp_plugin.data.clusters import FoundSubclasses
from kd_lrp_plugin.data.companions import Companions
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.data.shortcuts import Marked
from kd_lrp_plugin.data.subclasses import Subclasses, share_subclasses
from kd_lrp_plugin.data.unlabelled import WithUnlabelled
from kd_lrp_plugin.torchdistill import SubclassCrossEntropyLoss, class_weights


class Known(Phantom):
    """The phantom, whose third class is divided in two that take turns."""

    def __init__(self, size: int = 10) -> None:
        super().__init__("train", size=size, image_size=48)
        self.subclasses = ["a", "b", "c even", "c odd", "d"]
        self.subclass_of = [0, 1, 2, 2, 3]
        self.subclass_targets = [
            {0: 0, 1: 1, 2: 2 + index // 4 % 2, 3: 4}[label]
            for index, label in enumerate(self.targets)
        ]


def test_labels_are_subclasses_and_classes_stay():
    images = Known()
    data = Subclasses(images)
    assert data.targets == images.subclass_targets
    assert data.class_targets == images.targets
    assert data.classes == list(images.classes)
    assert [data.subclass_of[label] for label in data.targets] == images.targets
    assert len(data) == len(images)
    for index in range(len(data)):
        image, label = data[index]
        assert torch.equal(image, images[index][0])
        assert label == images.subclass_targets[index]


def test_unknown_subclasses_are_numbered_within_their_class():
    data = Subclasses(Phantom("train", size=5, image_size=48), per_class=3)
    assert data.subclasses[2:4] == [f"{data.classes[0]} 3", f"{data.classes[1]} 1"]
    assert data.subclass_of == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert data.targets == [12 + label for label in data.class_targets]


def test_everything_else_is_that_of_the_images():
    data = Subclasses(Known())
    assert data.transform is data.images.transform
    assert (data.mask(0) == data.images.mask(0)).all()
    assert not hasattr(data, "groups")
    with pytest.raises(AttributeError):
        data.transform = None  # the images would still be transformed


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))]
)
def test_copies_are_the_same(again):
    data = Subclasses(Known())
    other = again(data)
    assert other.targets == data.targets
    assert torch.equal(other[1][0], data[1][0])


def test_workers_read_it():
    loader = DataLoader(Subclasses(Known()), batch_size=5, num_workers=1)
    assert [label for _, labels in loader for label in labels.tolist()] == Known().subclass_targets


def test_companions_stand_around_it():
    image, label, found = Companions(Subclasses(Known()), mask=True)[3]
    assert label == Known().subclass_targets[3]
    assert found["mask"].shape == image.shape[1:]
    marked = Marked(Phantom("train", size=4, image_size=48), transform=lambda t: t.flip(-1))
    apart = Companions(marked, mask=True)[0][2]["mask"]
    _, _, around = Companions(Subclasses(marked, per_class=2), mask=True)[0]
    assert torch.equal(around["mask"], apart)


def test_known_subclasses_pass_through_markers():
    images = Known()
    marked = Marked(images, variants=["random", "none"])
    data = Subclasses(marked)
    assert data.subclasses == images.subclasses
    assert data.subclass_of == images.subclass_of
    assert data.targets == images.subclass_targets * 2
    assert data.groups == ["random"] * len(images) + ["none"] * len(images)
    image, label, found = Companions(data, clean=True, group=True)[3]
    assert torch.equal(image, marked[3][0])
    assert torch.equal(found["clean"], images[3][0])
    assert (label, found["group_name"]) == (images.subclass_targets[3], "random")
    assert SubclassCrossEntropyLoss(data).subclass_of == images.subclass_of
    assert not hasattr(Marked(Phantom("train", size=4)), "subclasses")


def test_images_whose_label_is_no_class_are_refused():
    images = Phantom("train", size=4, image_size=48)
    for others in (WithUnlabelled(images, images), Subclasses(images, per_class=2)):
        with pytest.raises(ValueError, match="subclasses: images: expected a class for each"):
            Subclasses(others, per_class=2)
    with pytest.raises(ValueError, match="with_unlabelled: images: expected labels of classes"):
        WithUnlabelled(Subclasses(images, per_class=2), images)


def test_those_of_a_table_are_known():
    images = Phantom("train", size=8, image_size=48)
    names = [
        f"{images.classes[label]} {1 + index // 4}" for index, label in enumerate(images.targets)
    ]
    pairs = zip(images.targets, names, strict=True)
    of_image = [(images.classes[label], name) for label, name in pairs]
    table = dict(zip(images.names, of_image, strict=True))
    data = Subclasses(images, table=table)
    assert [data.subclasses[label] for label in data.targets] == names
    assert data.known
    unknown = Subclasses(Phantom("val", size=4), per_class=2)
    assert share_subclasses(train=data, val=unknown) == (data.subclasses, data.subclass_of)
    same = Subclasses(images, per_class=2)
    with pytest.raises(ValueError, match=r"known where they are trained, got \{'train': 'unk"):
        share_subclasses(train=same, val=data)
    other = FoundSubclasses(table)
    other.source = "subclasses-1"
    with pytest.raises(ValueError, match="'val': 'found as subclasses-1'"):
        share_subclasses(train=data, val=Subclasses(images, table=other), test=same)
    with pytest.raises(ValueError, match="got both of them: per_class, table"):
        Subclasses(images, per_class=2, table=table)


def test_class_weights_are_those_of_the_subclasses():
    data = Subclasses(Known(16))
    counts = [data.targets.count(label) for label in range(5)]
    assert class_weights(data) == pytest.approx([16 / (5 * count) for count in counts])
    with pytest.raises(ValueError, match="nobody knows"):
        class_weights(Subclasses(Phantom("train", size=4), per_class=2))


class TestRefusals:
    def test_images_without_subclasses(self):
        with pytest.raises(ValueError, match=r"known subclasses, got Phantom without.*per_class"):
            Subclasses(Phantom("train", size=4))

    def test_both_kinds(self):
        with pytest.raises(ValueError, match="got both of them: known subclasses, per_class"):
            Subclasses(Known(), per_class=2)

    def test_a_part_of_a_data_set(self):
        with pytest.raises(ValueError, match="data with targets and classes, got Subset"):
            Subclasses(Subset(Known(), [0]))

    @pytest.mark.parametrize("per_class", [0, -1, True, 2.0])
    def test_a_number_that_is_none(self, per_class):
        with pytest.raises(ValueError, match="integer per_class"):
            Subclasses(Phantom("train", size=4), per_class)

    def test_a_class_without_a_subclass(self):
        images = SimpleNamespace(
            classes=["a", "b"], targets=[0], subclasses=["x"], subclass_of=[0], subclass_targets=[0]
        )
        with pytest.raises(ValueError, match=r"none of \['b'\]"):
            Subclasses(images)

    def test_two_of_one_name(self):
        images = SimpleNamespace(
            classes=["a"], targets=[0], subclasses=["x", "x"], subclass_of=[0, 0]
        )
        images.subclass_targets = [0]
        with pytest.raises(ValueError, match="different names"):
            Subclasses(images)

    def test_markers_around_them(self):
        with pytest.raises(ValueError, match="labels of classes, got of subclasses"):
            Marked(Subclasses(Known()))

    def test_data_sets_of_different_labels(self):
        known, plain = Subclasses(Known()), Phantom("val", size=4)
        unknown = Subclasses(plain, per_class=2)
        assert share_subclasses(train=known, val=known) == (known.subclasses, known.subclass_of)
        assert share_subclasses(train=plain, val=plain) == ([], [])
        for others in ((known, plain), (plain, known), (known, unknown)):
            with pytest.raises(ValueError, match="labels by the same subclasses"):
                share_subclasses(train=others[0], val=others[1])
        with pytest.raises(ValueError, match="a Subset of subclasses"):
            share_subclasses(train=Subset(known, [0, 1]))
