"""Images kept in memory: the same bits, read once, shared with workers, and refused by name."""

import pickle
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import idx
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import v2

from kd_lrp_plugin.data import memory as memory_module
from kd_lrp_plugin.data.csv_images import CsvImages
from kd_lrp_plugin.data.folder import FolderImages
from kd_lrp_plugin.data.memory import PixelMemory, get_memory
from kd_lrp_plugin.data.mnist import Mnist
from kd_lrp_plugin.data.transforms import make_transforms, preprocessing
from kd_lrp_plugin.data.views import CELLS, FollowedViews
from kd_lrp_plugin.utils.progress import NullProgress

SIZES = ((64, 48), (48, 64), (40, 40), (100, 30))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Images of several sizes, in folders and in a table, and digits."""
    rng = np.random.default_rng(0)
    lines = ["file,class"]
    for number in range(8):
        label = "ab"[number % 2]
        file = tmp_path / "Training" / label / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        width, height = SIZES[number % 4]
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(file)
        lines.append(f"Training/{label}/{number}.png,{label}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(
        idx(rng.integers(0, 256, (8, 28, 28), np.uint8))
    )
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(8, dtype=np.uint8)))
    return tmp_path


def folder(root: Path, **options):
    return FolderImages(str(root), image_size=24, **options)


def table(root: Path, **options):
    return CsvImages("table.csv", "file", "class", str(root), image_size=24, **options)


def digits(root: Path, **options):
    return Mnist(str(root), image_size=24, **options)


def augmented(size: int = 24) -> transforms.Compose:
    return make_transforms(size, augment=True)


def draw(data, seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [data[index][0] for index in range(len(data))]


@pytest.mark.parametrize("make", [folder, table, digits])
class TestItems:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_are_bit_for_bit_those_without_it_in_every_epoch(self, root, make, channels):
        plain, kept = make(root, channels=channels), make(root, channels=channels, cache="memory")
        for epoch in range(3):
            assert all(map(torch.equal, draw(kept, epoch), draw(plain, epoch)))
        assert [target for _, target in kept] == plain.targets

    def test_are_kept_behind_steps_of_either_version(self, root, make):
        first = [v2.Grayscale(3), v2.Resize(30), v2.CenterCrop(24)]
        last = [v2.RandomRotation(20), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        plain = make(root, transform=v2.Compose([*first, *last]))
        kept = make(root, transform=v2.Compose([*first, *last]), cache="memory")
        for epoch in range(2):
            assert all(map(torch.equal, draw(kept, epoch), draw(plain, epoch)))
        assert kept._memory.bytes == 8 * 24 * 24 * 3

    def test_are_augmented_anew_in_every_epoch(self, root, make):
        plain = make(root, transform=augmented())
        kept = make(root, transform=augmented(), cache="memory")
        epochs = [draw(kept, epoch) for epoch in range(3)]
        assert not torch.equal(epochs[0][0], epochs[1][0])
        for epoch, items in enumerate(epochs):
            assert all(map(torch.equal, items, draw(plain, epoch)))

    def test_without_their_transform_are_the_images_as_they_are_read(self, root, make):
        plain, kept = make(root), make(root, cache="memory")
        draw(kept, 0)
        for data in (plain, kept):
            data.transform = None  # as a wrapper does that takes it over
        for (a, _), (b, _) in zip(kept, plain, strict=True):
            assert np.array_equal(np.asarray(a), np.asarray(b))

    def test_a_random_step_before_the_resize_is_refused(self, root, make):
        steps = [transforms.RandomHorizontalFlip(), transforms.Resize((24, 24))]
        words = "begins with Resize.*got RandomHorizontalFlip before any Resize"
        with pytest.raises(ValueError, match=words):
            make(root, transform=transforms.Compose(steps), cache="memory")

    def test_another_cache_is_refused(self, root, make):
        with pytest.raises(ValueError, match=r"cache: expected one of .*'memory'.* got 'disk'"):
            make(root, cache="disk")


def test_each_file_is_read_once(root):
    data, read = folder(root, cache="memory"), []
    load = data.loader
    data.loader = lambda file: read.append(file) or load(file)
    for epoch in range(3):
        draw(data, epoch)
    assert sorted(read) == sorted(file for file, _ in data.samples)


def test_each_file_is_read_once_where_maps_follow_the_images(root):
    plain, kept = (folder(root, transform=augmented(), cache=c) for c in (None, "memory"))
    read, load = [], kept.loader
    kept.loader = lambda file: read.append(file) or load(file)
    views = [FollowedViews("mine", images) for images in (plain, kept)]
    views.append(deepcopy(views[1]))
    for each in views:
        each.sizes = [(4, 4)]
    for index in [*range(8), *range(8)]:
        found = []
        for each in views:
            torch.manual_seed(index)
            found.append((each[index][0], each[index][2][CELLS]["4x4"], each.ask(index)[0]))
        assert all(all(map(torch.equal, found[0], other)) for other in found[1:])
    assert sorted(read) == sorted(file for file, _ in kept.samples)


def test_what_workers_have_read_the_next_epoch_finds(root):
    data = folder(root, cache="memory")
    plain = torch.stack(draw(folder(root), 0))
    loader = DataLoader(data, 3, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(torch.cat([images for images, _ in loader]), plain)
    for file, _ in data.samples:
        Path(file).unlink()
    assert torch.equal(torch.cat([images for images, _ in loader]), plain)
    assert torch.equal(torch.stack(draw(deepcopy(data), 0)), plain)  # as a check copies it


def test_workers_that_are_not_forked_are_refused_by_name(root):
    with pytest.raises(ValueError, match=r"workers that are forked.*multiprocessing_context: fork"):
        pickle.dumps(folder(root, cache="memory"))


def test_the_transform_of_prediction_is_known_as_without_it(root):
    assert preprocessing(folder(root, cache="memory")) == preprocessing(folder(root))


def test_a_cut_of_one_size_is_kept_and_sides_that_differ_are_refused(root):
    cut = [transforms.Resize(30), transforms.CenterCrop(24), transforms.ToTensor()]
    kept = folder(root, transform=transforms.Compose(cut), cache="memory")
    plain = folder(root, transform=transforms.Compose(cut))
    for epoch in range(2):
        assert all(map(torch.equal, draw(kept, epoch), draw(plain, epoch)))
    words = r"images of one size, got sizes such as \(40, 30\) and \(30, 40\)"
    with pytest.raises(ValueError, match=words):
        folder(root, transform=transforms.Compose(cut[:1] + cut[2:]), cache="memory")


class TestRoom:
    def test_what_it_takes_is_said(self):
        class Notes(NullProgress):
            def note(self, text: str) -> None:
                self.said = text

        with Notes() as notes:
            kept = PixelMemory("mine", [str(n) for n in range(1000)], make_transforms(96))
        assert kept.bytes == 1000 * 96 * 96 * 3
        words = "1,000 images of 96 x 96 x 3 bytes are kept in memory, 0.03 GiB"
        assert notes.said == f"mine: {words}"

    def test_more_than_half_of_the_memory_is_refused_all_together(self, monkeypatch):
        monkeypatch.setattr(memory_module, "_ALIVE", memory_module.WeakSet())
        monkeypatch.setattr(memory_module, "get_memory", lambda: 2 * 25 * 24 * 24 * 3)
        ten, five = ([str(n) for n in range(count)] for count in (10, 5))
        kept = [PixelMemory("mine", ten, make_transforms(24)) for _ in range(2)]
        words = r"mine cache: expected at most .*50% of the memory"
        with pytest.raises(ValueError, match=words):
            PixelMemory("mine", ten, make_transforms(24))
        PixelMemory("mine", five, make_transforms(24))
        kept.pop()
        PixelMemory("mine", ten, make_transforms(24))

    def test_processes_each_have_their_own(self, monkeypatch):
        monkeypatch.setattr(memory_module, "_ALIVE", memory_module.WeakSet())
        monkeypatch.setattr(memory_module, "get_memory", lambda: 2 * 25 * 24 * 24 * 3)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        with pytest.raises(ValueError, match="in 3 processes"):
            PixelMemory("mine", [str(n) for n in range(10)], make_transforms(24))

    def test_a_limit_of_the_process_counts(self, tmp_path, monkeypatch):
        whole, limit = get_memory(), tmp_path / "memory.max"
        monkeypatch.setattr(memory_module, "_LIMITS", tmp_path)
        limit.write_text("1024\n")
        assert get_memory() == 1024 < whole
        limit.write_text("max\n")
        assert get_memory() >= whole

    @pytest.mark.parametrize(
        ("line", "file"),
        [
            ("0::/slurm/job_7/step_0", "slurm/job_7/memory.max"),
            ("0::/slurm/job_7", "slurm/job_7/memory.max"),
            ("4:cpu,memory:/user/7", "memory/user/7/memory.limit_in_bytes"),
        ],
    )
    def test_so_does_one_of_a_group_around_it(self, line, file, tmp_path, monkeypatch):
        (tmp_path / "groups").write_text(f"9:pids:/other\n{line}\n")
        monkeypatch.setattr(memory_module, "_GROUPS", tmp_path / "groups")
        monkeypatch.setattr(memory_module, "_LIMITS", tmp_path)
        limit = tmp_path / file
        limit.parent.mkdir(parents=True)
        whole = get_memory()
        limit.write_text("1024\n")
        assert get_memory() == 1024 < whole
