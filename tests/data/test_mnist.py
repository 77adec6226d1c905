"""The digits as their files have them, and files that are damaged or missing refused by name."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import idx

from kd_lrp_plugin.data.mnist import Mnist, identify_digits, read_idx

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 28, 28), np.uint8)
LABELS = RNG.integers(0, 10, 40, np.uint8)
LABELS[:10] = range(10)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Training files packed, under the name of a part of them; test files as they are."""
    (tmp_path / "train20k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(IMAGES)))
    (tmp_path / "train20k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS)))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(IMAGES[:7]))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(LABELS[:7]))
    return tmp_path


def test_images_and_labels_are_those_of_the_files(root):
    train, test = Mnist(str(root)), Mnist(str(root), split="test")
    assert train.targets == LABELS.tolist()
    assert test.targets == LABELS[:7].tolist()
    assert train.classes == [str(digit) for digit in range(10)]
    image, label = train[3]
    assert torch.allclose(image, torch.from_numpy(IMAGES[3] / np.float32(127.5) - 1)[None])
    assert label == LABELS[3]
    assert np.array_equal(np.asarray(train.image(3))[..., 1], IMAGES[3])
    assert not hasattr(train, "subclasses")


def test_channels_and_size_of_the_images(root):
    three = Mnist(str(root), channels=3)[0][0]
    assert torch.equal(three[0], three[2])
    assert torch.equal(three[:1], Mnist(str(root))[0][0])
    assert Mnist(str(root), image_size=32)[0][0].shape == (1, 32, 32)
    assert Mnist(str(root), transform=lambda image: image)[0][0].mode == "RGB"


def test_by_parity_the_digits_are_subclasses(root):
    data = Mnist(str(root), classes="parity")
    assert data.classes == ["even", "odd"]
    assert data.targets == [int(digit) % 2 for digit in LABELS]
    assert data.subclasses == Mnist(str(root)).classes
    assert data.subclass_targets == LABELS.tolist()
    assert data.subclass_of == [0, 1] * 5
    assert [data.subclass_of[k] for k in data.subclass_targets] == data.targets


def test_the_first_images_and_parts(root):
    assert Mnist(str(root), size=5).targets == LABELS[:5].tolist()
    parts = [Mnist(str(root), part=part, holdout=0.25) for part in ("train", "validation")]
    assert [part.targets for part in parts] == [LABELS[:30].tolist(), LABELS[30:].tolist()]
    few = Mnist(str(root), part="validation", holdout=0.25, size=2)
    assert torch.equal(few[1][0], Mnist(str(root))[31][0])


def test_the_folder_comes_from_the_environment(root, monkeypatch):
    monkeypatch.setenv("KD_LRP_DATA", str(root.parent))
    assert len(Mnist(name=root.name)) == 40
    monkeypatch.delenv("KD_LRP_DATA")
    with pytest.raises(FileNotFoundError, match=r"'mnist'.*Set root in YAML, or KD_LRP_DATA"):
        Mnist()


LABEL_FILE = "train20k-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (gzip.compress(idx(LABELS), mtime=0)[:-9], "a whole gzip file"),
        (b"\x1f\x8b\x08\0" + b"\xff" * 20, "a whole gzip file"),
        (b"", "magic number 00000801, got an empty file"),
        (idx(IMAGES), "magic number 00000801, got 00000803"),
        (idx(LABELS)[:-1], r"48 bytes for \[40\] values, got 47 bytes"),
        (idx(LABELS) + b"\0", "got 49 bytes"),
        (idx(LABELS)[:6], "bytes for"),
        (idx(LABELS[:39]), "40 images and 39 labels"),
        (idx(LABELS + np.uint8(1)), "digits, got 10"),
    ],
)
def test_damaged_files_are_refused(root, content, hint):
    (root / LABEL_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=hint):
        Mnist(str(root))


def test_header_beyond_all_memory_is_refused(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"\0\0\x08\x03" + b"\xff" * 12)
    with pytest.raises(ValueError, match="expected 79,228,162,458,924,105,385,300,197,391 bytes"):
        read_idx(file, 3)


def test_files_that_are_missing_or_could_be_meant_both_are_named(root):
    (root / "train-labels-idx1-ubyte").write_bytes(idx(LABELS))
    with pytest.raises(ValueError, match=r"one train\*-labels.*'train-labels-idx1-ubyte'"):
        Mnist(str(root))
    (root / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k\*-images\*idx3-ubyte or .*none in"):
        Mnist(str(root), split="test")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"split": "tset"}, "Did you mean 'test'"),
        ({"classes": "odd"}, "'digits', 'parity'"),
        ({"part": "valid"}, "Did you mean 'validation'"),
        ({"holdout": 1}, "holdout in"),
        ({"part": "validation", "holdout": 0.001}, "images in both parts"),
        ({"size": 41}, "expected 41 images, got 40 in all"),
        ({"size": 0}, "an integer size of 1"),
        ({"channels": 4}, "1 or 3 channels"),
    ],
)
def test_bad_arguments_are_refused_by_name(root, arguments, hint):
    with pytest.raises(ValueError, match=hint):
        Mnist(str(root), **arguments)


def test_files_are_identified_by_their_bytes(root):
    before = identify_digits(root, "train")
    (root / "t10k-labels-idx1-ubyte").write_bytes(idx(LABELS[:8]))
    assert identify_digits(root, "train") == before
    (root / LABEL_FILE).write_bytes(gzip.compress(idx(LABELS[::-1])))
    assert identify_digits(root, "train") != before


def test_the_published_digits_look_like_digits():
    """A nearest mean tells 82 % of the published test digits apart (chance: 10 %)."""
    folder = Path(os.environ.get("KD_LRP_DATA", "")) / "mnist"
    if not os.environ.get("KD_LRP_DATA") or not folder.is_dir():
        pytest.skip("KD_LRP_DATA names no folder with mnist")
    train, test = Mnist(split="train", size=2000), Mnist(split="test", size=500)
    pixels, seen = (
        torch.stack([data[i][0].flatten() for i in range(len(data))]) for data in (train, test)
    )
    labels = torch.tensor(train.targets)
    means = torch.stack([pixels[labels == digit].mean(0) for digit in range(10)])
    found = torch.cdist(seen, means).argmin(1)
    assert (found == torch.tensor(test.targets)).float().mean() > 0.7
    assert test.targets[:10] == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
