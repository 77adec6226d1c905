"""k-means of a model's features, found once and kept beside its checkpoint."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from kd_lrp_plugin.data.clusters import find_clusters
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.data.shortcuts import Marked
from kd_lrp_plugin.data.subclasses import Subclasses
from kd_lrp_plugin.models.factory import build_model
from kd_lrp_plugin.selection.select import dry_run
from kd_lrp_plugin.torchdistill import clusters, kmeans_subclasses


@pytest.fixture(scope="module")
def images() -> Phantom:
    return Phantom("train", size=40, image_size=48)


@pytest.fixture
def entry(tmp_path) -> dict:
    torch.manual_seed(0)
    model = build_model("test_resnet", 4)
    torch.save({"model": model.state_dict()}, tmp_path / "best.pt")
    kwargs = {"name": "test_resnet", "num_classes": 4}
    return {"key": "timm_model", "kwargs": kwargs, "src_ckpt": str(tmp_path / "best.pt")}


def compute(images: Phantom, per_class: int) -> list[int]:
    """The clusters of the entry's features, by timm's own way to them."""
    torch.manual_seed(0)
    model = build_model("test_resnet", 4).eval()
    batch = torch.stack([image for image, _ in images])
    with torch.no_grad():
        features = model.forward_head(model.forward_features(batch), pre_logits=True)
    return find_clusters(features.numpy(), images.targets, images.classes, per_class)


def test_they_are_the_clusters_of_the_features(images, entry):
    table = kmeans_subclasses(images, entry, 3)
    assert list(table) == images.names
    for name, label, number in zip(images.names, images.targets, compute(images, 3), strict=True):
        of_class = images.classes[label]
        assert table[name] == (of_class, f"{of_class} {number + 1}")


def test_they_are_found_once_and_nothing_is_drawn(images, entry, tmp_path, monkeypatch):
    state = torch.get_rng_state()
    first = kmeans_subclasses(images, entry, 2, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    (file,) = tmp_path.glob("subclasses-*.csv")
    monkeypatch.delattr(clusters, "read_features")
    again = kmeans_subclasses(images, entry, 2, seed=5)
    assert (again, again.source) == (first, file.stem)
    file.unlink()
    monkeypatch.undo()
    assert kmeans_subclasses(images, entry, 2, seed=5) == first


def test_whatever_they_depend_on_makes_them_others(images, entry, tmp_path):
    other = {**entry, "src_ckpt": str(tmp_path / "other.pt")}
    torch.save({"model": build_model("test_resnet", 4).state_dict()}, tmp_path / "other.pt")
    larger = Phantom("train", size=40, image_size=64)
    calls = [(images, entry, 2, 0), (images, entry, 3, 0), (images, entry, 2, 1)]
    calls += [(images, other, 2, 0), (larger, entry, 2, 0), (Phantom(size=44), entry, 2, 0)]
    assert len({kmeans_subclasses(*call).source for call in calls}) == len(calls)


def test_few_of_the_images_have_the_subclasses_of_all(images, entry):
    table = kmeans_subclasses(images, entry, 3)
    few = Subclasses(Phantom("train", size=8, image_size=48, augment=True), table=table)
    whole = Subclasses(images, table=table)
    assert few.subclasses == whole.subclasses == Subclasses(images, per_class=3).subclasses
    assert few.subclass_of == whole.subclass_of
    assert few.targets == whole.targets[:8]
    assert few.source == table.source
    marked = Subclasses(Marked(images), table=table)
    assert marked.targets == whole.targets
    with pytest.raises(ValueError, match="every image of the data"):
        Subclasses(Phantom("val", size=8), table=table)


def test_a_dry_run_finds_nothing_and_writes_nothing(images, entry, tmp_path):
    with dry_run():
        found = kmeans_subclasses(images, entry, 3)
    assert not list(tmp_path.glob("subclasses-*"))
    assert set(found.values()) == set(kmeans_subclasses(images, entry, 3).values())
    with dry_run():
        assert kmeans_subclasses(images, entry, 3) == kmeans_subclasses(images, entry, 3)


class TestRefusals:
    def test_augmented_images(self, entry):
        with pytest.raises(ValueError, match=r"no augmentation.*without augment"):
            kmeans_subclasses(Phantom("train", size=16, augment=True), entry, 2)

    def test_a_model_that_is_not_trained(self, images, entry):
        for model in ({**entry, "src_ckpt": None}, "resnet"):
            with pytest.raises(ValueError, match="an entry with a src_ckpt"):
                kmeans_subclasses(images, model, 2)
        missing = {**entry, "src_ckpt": "gone.pt", "_made_by": "kd-lrp distill plain.yaml"}
        with pytest.raises(FileNotFoundError, match=r"kmeans_subclasses: model.*plain\.yaml"):
            kmeans_subclasses(images, missing, 2)

    def test_images_without_names(self, entry):
        part = torch.utils.data.Subset(Phantom("train", size=4), [0, 1])
        with pytest.raises(ValueError, match="names of the images, got Subset"):
            kmeans_subclasses(part, entry, 2)

    def test_images_of_one_name(self, images, entry):
        with pytest.raises(ValueError, match=r"different names.*one variant of marked"):
            kmeans_subclasses(Marked(images, variants=["random", "none"]), entry, 2)

    @pytest.mark.parametrize("dry", [False, True])
    def test_more_clusters_than_images(self, dry, images, entry):
        words = r"11 images or more of each class, got 10 of"
        with dry_run() if dry else nullcontext(), pytest.raises(ValueError, match=words):
            kmeans_subclasses(images, entry, 11)

    @pytest.mark.parametrize("keywords", [{"per_class": 0}, {"per_class": 2, "seed": -1}])
    def test_numbers_that_are_none(self, keywords, images, entry):
        with pytest.raises(ValueError, match=r"kmeans_subclasses.*integer"):
            kmeans_subclasses(images, entry, **keywords)

    def test_a_misspelled_keyword(self, images, entry):
        with pytest.raises(ValueError, match="kmeans_subclasses: keyword"):
            kmeans_subclasses(images, entry, clusters=2)


def test_a_checkpoint_with_weights_that_are_broken_is_refused(images, entry, tmp_path):
    content = torch.load(tmp_path / "best.pt", weights_only=True)
    next(iter(content["model"].values())).fill_(np.nan)
    torch.save(content, tmp_path / "best.pt")
    with pytest.raises(ValueError, match="features of finite numbers"):
        kmeans_subclasses(images, entry, 2)
