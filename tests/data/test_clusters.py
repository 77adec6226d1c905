"""Clusters are those of least spread, and a table fits the data that it is looked up for."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from small_runs import write_digits

from kd_lrp_plugin.data.clusters import (
    find_clusters,
    look_up,
    name_subclasses,
    read_subclass_table,
    write_table,
)
from kd_lrp_plugin.data.csv_images import CsvImages
from kd_lrp_plugin.data.folder import FolderImages
from kd_lrp_plugin.data.mnist import Mnist
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.data.shortcuts import Marked
from kd_lrp_plugin.data.subclasses import Subclasses


def least_spread(points: np.ndarray, clusters: int) -> list[set[int]]:
    """The best of all divisions, by trying every one."""
    best: tuple[float, list[set[int]]] = (np.inf, [])
    for numbers in itertools.product(range(clusters), repeat=len(points)):
        groups = [{i for i, n in enumerate(numbers) if n == k} for k in range(clusters)]
        if not all(groups):
            continue
        spread = 0.0
        for group in groups:
            members = [points[i] for i in group]
            centre = sum(members) / len(members)
            spread += sum(float(((point - centre) ** 2).sum()) for point in members)
        best = min(best, (spread, groups), key=lambda found: found[0])
    return best[1]


@pytest.mark.parametrize("clusters", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_clusters_are_the_division_of_least_spread(clusters, seed):
    rng = np.random.default_rng(seed)  # three heaps in each class; k-means is exact on heaps
    points = np.array([[0, 0], [9, 0], [2, 5]])[rng.permutation(16) % 3] + rng.normal(size=(16, 2))
    targets = [index % 2 for index in range(16)]
    found = find_clusters(points, targets, ["a", "b"], clusters, seed)
    for label in (0, 1):
        members = [index for index, target in enumerate(targets) if target == label]
        expected = least_spread(points[members], clusters)
        numbers = [found[index] for index in members]
        groups = [{i for i, n in enumerate(numbers) if n == k} for k in range(clusters)]
        assert sorted(map(sorted, groups)) == sorted(map(sorted, expected))
        sizes = [len(group) for group in groups]
        assert sizes == sorted(sizes, reverse=True)


def test_they_are_the_same_each_time_and_leave_the_generator_alone():
    points = np.random.default_rng(3).normal(size=(60, 5)).astype(np.float32)
    targets = [index % 3 for index in range(60)]
    np.random.seed(4)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = find_clusters(points, targets, "abc", 4, seed=1)
    assert first == find_clusters(points, targets, "abc", 4, seed=1)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert {(t, n) for t, n in zip(targets, first, strict=True)} == {
        (t, n) for t in range(3) for n in range(4)
    }


def test_a_class_is_divided_apart_from_the_others():
    points = np.random.default_rng(5).normal(size=(40, 3))
    targets = [0] * 20 + [1] * 20
    together = find_clusters(points, targets, ["a", "b"], 3)
    assert together[:20] == find_clusters(points[:20], targets[:20], ["a"], 3)


class TestRefusedClusters:
    def test_fewer_images_than_clusters(self):
        with pytest.raises(ValueError, match=r"3 images or more of each class, got 1 of 'b'"):
            find_clusters(np.zeros((4, 2)), [0, 0, 0, 1], ["a", "b"], 3)

    def test_a_cluster_that_comes_out_empty(self):
        points = np.array([[0.0], [0.0], [1.0], [1.0]])
        with pytest.raises(ValueError, match="3 clusters of 'a', got an empty one"):
            find_clusters(points, [0] * 4, ["a"], 3)

    def test_features_that_are_not_finite(self):
        with pytest.raises(ValueError, match="finite numbers"):
            find_clusters(np.array([[0.0], [np.nan]]), [0, 0], ["a"], 1)


@pytest.fixture
def images() -> SimpleNamespace:
    return SimpleNamespace(names=["x", "y", "z"], targets=[0, 1, 0], classes=["cat", "dog"])


TABLE = {"x": ("cat", "cat 10"), "y": ("dog", "dog 1"), "z": ("cat", "cat 2")}


class TestTable:
    def test_it_is_read_as_it_was_written(self, tmp_path, monkeypatch):
        table = {"a, b": ("none", "none 1"), "ä": ("NA", "x; y")}
        write_table(tmp_path / "table.csv", table)
        monkeypatch.setenv("TABLES", str(tmp_path))
        assert read_subclass_table("$TABLES/table.csv") == table

    def test_subclasses_are_in_the_order_of_their_classes_and_numbers(self, images):
        names, owners, targets = look_up(images, TABLE | {"further": ("dog", "dog")})
        assert names == ["cat 2", "cat 10", "dog", "dog 1"]
        assert owners == [0, 0, 1, 1]
        assert targets == [1, 3, 0]

    def test_eleven_of_each_class_are_named_as_they_are_sorted(self, images):
        names = name_subclasses(images.classes, 11)
        table = {name: (name.split()[0], name) for name in names} | {
            "x": ("cat", "cat 1"), "y": ("dog", "dog 1"), "z": ("cat", "cat 1")
        }  # fmt: skip
        assert look_up(images, table)[0] == names

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"z": None}, "every image of the data, got none of 1 of 3, such as 'z'"),
            ({"y": ("cat", "cat 2")}, "y: expected class 'dog', got 'cat'"),
            ({"w": ("dog", "cat 2")}, "subclasses of one class each, got 'cat 2' of"),
            ({"w": ("cow", "cow 1")}, r"expected classes \['cat', 'dog'\], got \['cow'\]"),
        ],
    )
    def test_one_that_does_not_fit_is_refused(self, change, words, images):
        table = {name: found for name, found in (TABLE | change).items() if found}
        with pytest.raises(ValueError, match=words):
            look_up(images, table)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("image,class,subclass\nx,cat,cat 1\nx,cat,cat 2\n", "'x' in lines 2 and 3"),
            ("image,class,subclass\nx,cat,\n", "line 2: expected values"),
            ("image,class\nx,cat\n", "expected a column 'subclass'"),
            ("image,class,subclass\n", "a row for each image"),
        ],
    )
    def test_a_file_that_is_no_table_is_refused(self, text, words, tmp_path):
        (tmp_path / "table.csv").write_text(text)
        with pytest.raises(ValueError, match=words):
            read_subclass_table(tmp_path / "table.csv")

    def test_no_file(self, tmp_path, images):
        with pytest.raises(FileNotFoundError, match="kmeans_subclasses"):
            look_up(images, tmp_path / "table.csv")

    def test_data_without_names(self, images):
        del images.names
        with pytest.raises(ValueError, match="names of the images, got SimpleNamespace without"):
            look_up(images, TABLE)


class TestNames:
    def test_of_folders_and_tables_they_are_paths_below_the_folder(self, tmp_path):
        for name in ("Training/a/1.png", "Training/b/2.png"):
            (tmp_path / name).parent.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / name)
        images = FolderImages(str(tmp_path), image_size=8)
        assert images.names == ["Training/a/1.png", "Training/b/2.png"]
        (tmp_path / "t.csv").write_text("file,label\na/1.png,no\nb/2.png,yes\n")
        listed = CsvImages("t.csv", "file", "label", root=str(tmp_path), folder="Training")
        assert listed.names == ["a/1.png", "b/2.png"]
        table = {"a/1.png": ("no", "none seen"), "b/2.png": ("yes", "small")}
        data = Subclasses(listed, table=table)
        assert (data.subclasses, data.targets, data.known) == (["none seen", "small"], [0, 1], True)

    def test_of_the_phantom_and_of_marked_images_they_are_one_for_each_image(self):
        images = Phantom("val", size=5, image_size=48, seed=3)
        assert images.names[:2] == ["val 3 0", "val 3 1"]
        assert Phantom("val", size=9, image_size=48, seed=3).names[:5] == images.names
        assert Marked(images, variants=["random", "none"]).names == images.names * 2

    def test_of_digits_they_are_places_in_the_file(self, tmp_path):
        root = str(write_digits(tmp_path / "mnist"))
        whole = Mnist(root)
        held = Mnist(root, part="validation")
        assert held.names == [f"train {place}" for place in range(34, 40)]
        few, more = (Mnist(root, part="train", size=size, seed=7) for size in (6, 20))
        assert len(few) == len(set(few.names)) == 6
        assert set(few.names) < set(more.names) <= set(whole.names[:34])
        assert few.names != Mnist(root, part="train", size=6).names == whole.names[:6]
        assert few.names != Mnist(root, part="train", size=6, seed=8).names
        for index, name in enumerate(few.names):
            place = int(name.split()[1])
            assert few.targets[index] == whole.targets[place]
            assert (few[index][0] == whole[place][0]).all()

    def test_a_seed_without_a_size_is_refused(self, tmp_path):
        root = str(write_digits(tmp_path / "mnist"))
        with pytest.raises(ValueError, match="a size for what seed draws"):
            Mnist(root, seed=1)
