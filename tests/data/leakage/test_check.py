"""Planted copies are found and nothing else, and the clean split keeps what it promises."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageChops, ImageFilter, ImageOps
from scipy.ndimage import gaussian_filter
from typer.testing import CliRunner

from kd_lrp_plugin.cli.main import app
from kd_lrp_plugin.data.folder import FolderImages
from kd_lrp_plugin.data.leakage import duplicates as duplicates_module
from kd_lrp_plugin.data.leakage import images as images_module
from kd_lrp_plugin.data.leakage.check import COLUMNS, check_data
from kd_lrp_plugin.data.leakage.duplicates import KINDS, find_duplicates
from kd_lrp_plugin.data.leakage.images import Fingerprint, claimed, fingerprint, list_images
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.utils.progress import NullProgress

MRI = Path(os.environ.get("KD_LRP_DATA", "")) / "brain_mri"
needs_mri = pytest.mark.skipif(
    not (MRI / "Training").is_dir(), reason="KD_LRP_DATA names no folder with brain_mri"
)


def brighter(image: Image.Image) -> Image.Image:
    return image.point(lambda grey: min(255, round(1.15 * grey + 8)))


def shifted(image: Image.Image) -> Image.Image:
    return ImageChops.offset(image, 1, 0)


# How a copy is made, with which ending it is saved, the kind and whether it is mirrored.
WAYS: dict[str, tuple[Callable[[Image.Image], Image.Image], str, str, bool]] = {
    "same": (lambda image: image, ".png", "exact", False),
    "in another format": (lambda image: image.convert("RGB"), ".bmp", "exact", False),
    "as a poor JPEG": (lambda image: image, ".jpg", "thumbnail", False),
    "mirrored": (ImageOps.mirror, ".png", "thumbnail", True),
    "mirrored, poor": (ImageOps.mirror, ".jpg", "thumbnail", True),
    "brighter": (brighter, ".png", "thumbnail", False),
    "shifted by a pixel": (shifted, ".png", "thumbnail", False),
    "smaller": (lambda image: image.resize((160, 160)), ".png", "thumbnail", False),
}


def save(image: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **({"quality": 40} if file.suffix == ".jpg" else {}))


def plant(root: Path, originals: list[Image.Image]) -> dict[tuple[str, str], tuple[str, bool]]:
    """Save the originals in Training, and of every other a copy in Testing, each way in turn."""
    pairs = {}
    for number, image in enumerate(originals):
        label = ("cat", "dog")[number // 2 % 2]
        file = f"Training/{label}/{number:03}.png"
        save(image, root / file)
        if number % 2 == 0:
            change, ending, kind, mirrored = list(WAYS.values())[number // 2 % len(WAYS)]
            copy = f"Testing/{label}/copy_{number:03}{ending}"
            save(change(image), root / copy)
            pairs[(copy, file)] = (kind, mirrored)
        else:
            save(ImageOps.flip(image), root / f"Testing/{label}/other_{number:03}.png")
    return pairs


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def pairs_of(out: Path) -> dict[tuple[str, str], tuple[str, bool]]:
    return {
        (row["file_a"], row["file_b"]): (row["kind"], row["mirrored"] == "1")
        for row in rows_of(out / "pairs.csv")
    }


def drawing(seed: int, size: int = 64) -> Image.Image:
    """An image like no other: smooth noise."""
    grey = np.random.default_rng(seed).integers(0, 256, (size, size), np.uint8)
    blurred = Image.fromarray(grey).filter(ImageFilter.GaussianBlur(3))
    return ImageOps.autocontrast(blurred)


def draw_set(root: Path, files: dict[str, int]) -> Path:
    """A drawing for each file; the same number, the same drawing."""
    for file, seed in files.items():
        save(drawing(seed), root / file)
    return root


def clean(out: Path) -> dict[str, str]:
    """Split of each kept file."""
    return {r["file"]: r["split"] for r in rows_of(out / "clean_split.csv") if r["kept"] == "1"}


def why(out: Path) -> dict[str, str]:
    return {r["file"]: r["why"] for r in rows_of(out / "clean_split.csv") if r["kept"] == "0"}


@pytest.fixture(scope="module")
def leaky(tmp_path_factory) -> tuple[Path, Path, dict[tuple[str, str], tuple[str, bool]]]:
    """Root, answer and planted pairs of a leaky set of phantoms."""
    folder = tmp_path_factory.mktemp("leaky")
    phantom = Phantom(size=32, image_size=224)
    pairs = plant(folder / "set", [phantom.image(i).convert("L") for i in range(32)])
    check_data(folder / "set", folder / "out")
    return folder / "set", folder / "out", pairs


class TestDuplicates:
    def test_every_planted_copy_is_found_and_nothing_else(self, leaky):
        _, out, planted = leaky
        assert {kind for kind, _ in planted.values()} == {"exact", "thumbnail"}
        assert pairs_of(out) == planted

    def test_pairs_have_the_promised_columns_and_the_worst_come_first(self, leaky):
        _, out, planted = leaky
        rows = rows_of(out / "pairs.csv")
        assert tuple(rows[0]) == COLUMNS
        assert [row["cross_split"] for row in rows] == ["1"] * len(planted)
        likeness = [float(row["similarity"]) for row in rows]
        assert likeness == sorted(likeness, reverse=True)
        assert {row["similarity"] for row in rows if row["kind"] == "exact"} == {"1.00000"}

    @pytest.mark.parametrize("block", [7, 1024])
    def test_the_pairs_are_those_of_a_brute_force_search(self, tmp_path, monkeypatch, block):
        """Drawings mixed with others, so that they are alike to all degrees around the limits."""
        rng = np.random.default_rng(3)
        images = []
        for number, share in enumerate(rng.uniform(0.05, 0.3, 24)):
            mixed = Image.blend(drawing(number % 3), drawing(100 + number), share)
            images.append(ImageOps.mirror(mixed) if number % 2 else mixed)
        images.append(images[5])
        for number, image in enumerate(images):
            image.save(tmp_path / f"{number}.png")
        monkeypatch.setattr(duplicates_module, "_BLOCK", block)
        found = find_duplicates([fingerprint(tmp_path / f"{n}.png") for n in range(len(images))])
        got = {
            (a, b): (KINDS[kind], bool(mirrored), float(similarity))
            for a, b, kind, similarity, mirrored in zip(*found, strict=True)
        }
        expected = {}
        for a, b in combinations(range(len(images)), 2):
            if (kind := duplicate_by_definition(images[a], images[b])) is not None:
                expected[a, b] = kind
        assert {kind for kind, _, _ in expected.values()} == set(KINDS)
        assert {mirrored for _, mirrored, _ in expected.values()} == {True, False}
        assert {pair: value[:2] for pair, value in got.items()} == {
            pair: value[:2] for pair, value in expected.items()
        }
        for pair, value in expected.items():
            assert got[pair][2] == pytest.approx(value[2], abs=1e-5)  # float32 against float64

    @pytest.mark.parametrize("smooth", [0.0, 0.8, 2.0, 6.0])
    def test_no_pair_is_passed_over_that_a_full_comparison_finds(self, smooth):
        """Noise, whose contrast is in what the bound does not see, and smooth images alike."""
        rng = np.random.default_rng(0)
        base = gaussian_filter(rng.normal(size=(20, 56, 56)), (0, smooth, smooth))
        mixed = base[rng.integers(20, size=300)]
        mixed = np.where(rng.random((300, 1, 1)) < 0.5, mixed, mixed[:, :, ::-1])
        other = gaussian_filter(rng.normal(size=mixed.shape), (0, smooth, smooth))
        mixed = mixed + rng.uniform(0, 0.4, (300, 1, 1)) * other
        low, high = mixed.min(), mixed.max()
        thumbnails = np.round(255 * (mixed - low) / (high - low)).astype(np.uint8)
        prints = [
            Fingerprint(digest=str(n), thumbnail=one.tobytes()) for n, one in enumerate(thumbnails)
        ]
        found = find_duplicates(prints)  # of equal hashes: all at 0.95 or more are pairs
        plain = np.corrcoef(thumbnails.reshape(300, -1).astype(float))
        turned = np.corrcoef(
            thumbnails.reshape(300, -1).astype(float),
            thumbnails[:, :, ::-1].reshape(300, -1).astype(float),
        )[:300, 300:]
        expected = np.argwhere(np.triu(np.maximum(plain, turned) >= 0.95, 1))
        assert 300 < len(expected) < 30_000
        assert np.array_equal(np.stack([found.a, found.b], 1), expected)
        likeness = np.maximum(plain, turned)[found.a, found.b]
        assert np.allclose(found.similarity, likeness, atol=1e-5)  # float32 against float64
        assert np.array_equal(found.mirrored, turned[found.a, found.b] > plain[found.a, found.b])

    def test_most_pairs_of_images_that_differ_are_passed_over(self, monkeypatch):
        compared, correlate = [], duplicates_module._correlate

        def watch(thumbnails, a, b, mirrored):
            compared.append(len(a))
            return correlate(thumbnails, a, b, mirrored)

        monkeypatch.setattr(duplicates_module, "_correlate", watch)
        phantom = Phantom(size=200, image_size=64)
        images = [phantom.image(i).convert("L").resize((56, 56)) for i in range(200)]
        prints = [Fingerprint(digest=str(n), thumbnail=i.tobytes()) for n, i in enumerate(images)]
        assert len(find_duplicates(prints).a) == 0
        assert sum(compared) < 0.01 * 200 * 199

    def test_images_of_one_even_colour_are_duplicates_of_their_copies_only(self, tmp_path):
        for number, (grey, size) in enumerate([(0, 64), (0, 64), (9, 64), (0, 48)]):
            Image.new("L", (size, size), grey).save(tmp_path / f"{number}.png")
        found = find_duplicates([fingerprint(tmp_path / f"{n}.png") for n in range(4)])
        assert (found.a.tolist(), found.b.tolist(), found.kind.tolist()) == ([0], [1], [0])

    def test_a_set_whose_images_are_all_alike_is_refused(self, tmp_path, monkeypatch):
        root = draw_set(tmp_path / "set", {f"cat/{n}.png": 1 for n in range(6)})
        monkeypatch.setattr(duplicates_module, "MANY", 10)
        with pytest.raises(ValueError, match="more than 10 pairs that look the same among 6"):
            check_data(root, tmp_path / "out")

    def test_copies_do_not_count_as_looking_alike_too(self, tmp_path, monkeypatch):
        for number in range(5):
            drawing(1).save(tmp_path / f"{number}.png")
        monkeypatch.setattr(duplicates_module, "MANY", 10)
        assert len(find_duplicates([fingerprint(tmp_path / f"{n}.png") for n in range(5)]).a) == 10


def duplicate_by_definition(a: Image.Image, b: Image.Image) -> tuple[str, bool, float] | None:
    if a.tobytes() == b.tobytes():
        return "exact", False, 1.0
    candidates = []
    for mirrored in (False, True):
        turned = ImageOps.mirror(b) if mirrored else b
        small = [
            np.asarray(i.resize((56, 56), Image.Resampling.BILINEAR), float) for i in (a, turned)
        ]
        similarity = np.corrcoef(small[0].ravel(), small[1].ravel())[0, 1]
        bits = imagehash.phash(a) - imagehash.phash(turned)
        if mirrored:
            bits = min(bits, imagehash.phash(ImageOps.mirror(a)) - imagehash.phash(b))
        if similarity >= 0.98:
            candidates.append(("thumbnail", mirrored, similarity))
        elif similarity >= 0.95 and bits <= 2:
            candidates.append(("hash", mirrored, similarity))
    return max(candidates, key=lambda found: found[2], default=None)


class TestCleanSplit:
    def test_no_duplicates_are_left_and_the_test_set_is_whole(self, leaky, tmp_path):
        root, out, planted = leaky
        kept = clean(out)
        assert not [pair for pair in planted if set(pair) <= set(kept)]
        assert all(f"{pair[0]}" in kept for pair in planted)
        assert len(kept) == 64 - len(planted)
        lean = tmp_path / "lean"
        for file in kept:
            save(Image.open(root / file), lean / Path(file).with_suffix(".png"))
        assert check_data(lean, tmp_path / "out")["pairs"] == {
            place: dict.fromkeys(KINDS, 0) for place in ("within", "across")
        }

    def test_one_of_a_set_is_kept_the_largest_or_the_first_by_name(self, tmp_path):
        files = {
            "train/cat/a.png": 1,
            "train/cat/b.png": 1,
            "train/cat/c.png": 2,
            "val/cat/d.png": 3,
        }
        root = draw_set(tmp_path / "set", files)
        save(drawing(2).resize((128, 128)), root / "train/cat/large.png")
        check_data(root, tmp_path / "out")
        assert set(clean(tmp_path / "out")) == {
            *("train/cat/a.png", "train/cat/large.png", "val/cat/d.png")
        }
        assert why(tmp_path / "out")["train/cat/b.png"] == "duplicate: train/cat/a.png is kept"

    def test_training_gives_way_to_validation_and_both_to_test(self, tmp_path):
        files = {f"{split}/cat/{split}.png": 1 for split in ("training", "validation", "test")}
        files |= {"training/cat/x.png": 2, "validation/cat/x.png": 2, "test/cat/y.png": 3}
        found = check_data(draw_set(tmp_path / "set", files), tmp_path / "out")
        assert set(clean(tmp_path / "out")) == {
            *("test/cat/test.png", "validation/cat/x.png", "test/cat/y.png")
        }
        assert [(s, leak["duplicate"], leak["against"]) for s, leak in found["leaks"].items()] == [
            ("validation", 2, ["training"]),
            ("test", 1, ["training", "validation"]),
        ]

    def test_the_most_frequent_class_decides_and_a_tie_keeps_none(self, tmp_path):
        files = {"Training/cat/1.png": 1, "Training/cat/2.png": 1, "Testing/dog/3.png": 1}
        files |= {"Training/cat/4.png": 2, "Testing/dog/5.png": 2, "Testing/dog/6.png": 6}
        found = check_data(draw_set(tmp_path / "set", files), tmp_path / "out")
        assert clean(tmp_path / "out") == {
            "Training/cat/1.png": "Training",
            "Testing/dog/6.png": "Testing",
        }
        assert found["pairs_of_two_classes"] == 3
        assert found["left_out"] == {"class in doubt": 3, "duplicate": 1}
        assert "3 pairs of duplicates are of two classes" in found["summary"]

    @pytest.mark.parametrize("layout", ["splits", "classes"])
    def test_a_patient_is_never_in_two_splits_nor_are_duplicates(self, tmp_path, layout):
        rng = np.random.default_rng(0)
        files, patients = {}, {}
        for number in range(60):
            split = ("Training/", "Testing/")[number % 3 == 0] if layout == "splits" else ""
            file = f"{split}{('cat', 'dog')[number % 2]}/{number:02}.png"
            files[file] = number if number < 56 else number - 40
            patients[file] = f"patient {rng.integers(25)}"
        root = draw_set(tmp_path / "set", files)
        with (tmp_path / "who.csv").open("w", newline="") as lines:
            csv.writer(lines).writerows([("file", "patient"), *patients.items()])
        out = tmp_path / "out"
        found = check_data(root, out, group_by="patient", manifest=tmp_path / "who.csv")
        kept = clean(out)
        homes: dict[str, set[str]] = {}
        for file, split in kept.items():
            homes.setdefault(patients[file], set()).add(split)
            assert layout == "classes" or file.startswith(split)
        assert len({files[file] for file in kept}) == len(kept)
        assert {len(splits) for splits in homes.values()} == {1}
        assert set(kept.values()) == {"Training", "Testing"}
        assert found["groups"]["given"] == len(set(patients.values()))
        assert ("lie in several splits" in found["summary"]) == (layout == "splits")

    def test_a_split_is_proposed_where_there_is_none(self, tmp_path):
        files = {
            f"{label}/{n:02}.png": 100 * k + n for k, label in enumerate("ab") for n in range(40)
        }
        root = draw_set(tmp_path / "set", files | {"a/copy.png": 7})
        found = check_data(root, tmp_path / "out", test_share=0.25)
        assert found["clean"] == {"Testing": {"a": 10, "b": 10}, "Training": {"a": 30, "b": 30}}
        assert found["duplicates_apart_at_random"] == pytest.approx(2 * 0.8 / 81)
        assert "in a random fifth as test set, about 2.0 % would" in found["summary"]
        train, test = (
            FolderImages(str(root), s, manifest=str(tmp_path / "out" / "clean_split.csv"))
            for s in ("Training", "Testing")
        )
        assert (len(train), len(test), test.classes) == (60, 20, ["a", "b"])

    def test_a_class_that_cannot_be_cut_is_said_to_be_missing(self, tmp_path):
        files = {f"{k}/{n:02}.png": 50 * (k == "b") + n for k in "ab" for n in range(40)}
        root = draw_set(tmp_path / "set", files)
        with (root / "manifest.csv").open("w", newline="") as lines:
            rows = [(file, "one" if file[0] == "b" else file) for file in files]
            csv.writer(lines).writerows([("file", "patient"), *rows])
        found = check_data(root, tmp_path / "out", group_by="patient")
        assert found["clean"]["Testing"] == {"a": 8}
        assert "clean_split.csv has no b in Testing" in found["summary"]

    def test_a_proposed_split_of_too_few_images_is_said_to_have_no_test_images(self, tmp_path):
        root = draw_set(
            tmp_path / "set", {f"{k}/{n}.png": 10 * (k == "b") + n for k in "ab" for n in (1, 2)}
        )
        found = check_data(root, tmp_path / "out", test_share=0.1)
        assert [*found["clean"]] == ["Training"]
        assert "clean_split.csv has no a and no b in Testing" in found["summary"]

    def test_the_manifest_beside_the_images_is_used_and_files_it_lacks_are_counted(self, tmp_path):
        files = {
            f"{s}/cat/{n}.png": n + 10 * (s == "Testing")
            for s in ("Training", "Testing")
            for n in range(3)
        }
        root = draw_set(tmp_path / "set", files)
        (root / "manifest.csv").write_text(
            "file,split,class,patient\n0.png,Training,cat,p\n0.png,Testing,cat,p\n2.png,Testing,cat,\n"
        )
        found = check_data(root, tmp_path / "out", group_by="patient")
        assert found["groups"] == {"given": 1, "divided": 1, "images_without": 4}
        assert why(tmp_path / "out") == {"Training/cat/0.png": "group: it reaches Testing"}


class TestFiles:
    def test_faulty_and_unusual_files_are_named_with_the_reason(self, tmp_path):
        root = draw_set(tmp_path, {f"train/cat/{n:02}.png": n for n in range(40)})
        where = root / "train" / "cat"
        (where / "text.jpg").write_text("no image")
        (where / "empty.jpg").touch()
        drawing(50).save(where / "whole.jpg")
        (where / "half.jpg").write_bytes((where / "whole.jpg").read_bytes()[:700])
        (where / "whole.jpg").unlink()
        (where / "gone.png").symlink_to(where / "nowhere.png")
        drawing(51).save(where / "liar.jpg", format="PNG")
        drawing(52).convert("P").save(where / "palette.png")
        Image.fromarray(16 * np.arange(64**2, dtype=np.uint16).reshape(64, 64)).save(
            where / "deep.png"
        )
        Image.new("L", (64, 64), 7).save(where / "even.png")
        drawing(53).resize((64, 8)).save(where / "thin.png")
        (where / "notes.txt").write_text("x")
        drawing(54).save(where / "photo.gif")
        drawing(55).save(root / "train" / "stray.png")
        found = check_data(root, tmp_path.parent / f"{tmp_path.name}_out")
        unread = {Path(file).name: reason for file, reason in found["unreadable"].items()}
        anomalies = {Path(file).name: reason for file, reason in found["anomalies"].items()}
        assert unread.keys() == {"text.jpg", "empty.jpg", "half.jpg", "gone.png"}
        assert unread["text.jpg"] == "not an image"
        assert unread["empty.jpg"] == "an empty file"
        assert unread["gone.png"] == "no such file"
        assert "truncated" in unread["half.jpg"]
        assert anomalies.keys() == {"liar.jpg", "palette.png", "deep.png", "even.png", "thin.png"}
        assert anomalies["liar.jpg"] == "PNG, but named .jpg"
        assert anomalies["palette.png"].startswith("mode P")
        assert anomalies["deep.png"].startswith("mode I;16: [0, 65,535] is read as [0, 255]")
        assert anomalies["even.png"] == "of one even colour"
        assert anomalies["thin.png"] == "64 x 8 pixels; 64x8, unlike the 64x64 of most"
        assert found["ignored"] == {
            "train/cat/notes.txt": "not an image",
            "train/cat/photo.gif": "an image (GIF) that data sets leave unread for its ending",
            "train/stray.png": "an image in no class folder",
        }
        assert found["left_out"] == {"unreadable": 4}
        assert found["splits"] == {"train": {"cat": 49}}
        assert found["sizes"] == {"64x64": 44, "64x8": 1}
        assert "4 image files cannot be read" in found["summary"]

    def test_a_file_that_could_not_be_read_is_read_again(self, tmp_path, monkeypatch):
        root, out = (
            draw_set(tmp_path / "set", {f"cat/{n}.png": n for n in range(4)}),
            tmp_path / "o",
        )

        def fails(file: Path, bits: int | None):
            found = fingerprint(file)
            return found._replace(unreadable="OSError: busy") if file.stem == "3" else found

        with monkeypatch.context() as patch:
            patch.setattr(images_module, "fingerprint", fails)
            assert list(check_data(root, out)["unreadable"]) == ["cat/3.png"]
        assert check_data(root, out)["unreadable"] == {}

    def test_masks_and_hidden_folders_are_no_split(self, tmp_path):
        files = [
            "Training/cat/1.png",
            "Testing/cat/2.png",
            "masks/Training/cat/1.png",
            ".git/a/b.png",
        ]
        images, ignored = list_images(draw_set(tmp_path, dict.fromkeys(files, 1)))
        assert [image.split for image in images] == ["Testing", "Training"]
        assert ignored == {".git": "hidden", "masks": "the masks of the images"}

    def test_folders_below_a_class_belong_to_it(self, tmp_path):
        files = ["cat/1.png", "cat/2.png", "cat/more/3.png"]
        images, _ = list_images(draw_set(tmp_path, dict.fromkeys(files, 1)))
        assert {(image.split, image.label) for image in images} == {("", "cat")}
        assert len(images) == 3

    def test_the_images_and_their_folder_stay_as_they_were(self, leaky):
        root, _, planted = leaky
        assert len([file for file in root.rglob("*") if file.is_file()]) == 64
        assert all((root / file).is_file() for pair in planted for file in pair)


class Killed(NullProgress):
    """Stops the work after some images, as Ctrl-C does."""

    def __init__(self, after: int) -> None:
        self.after = after

    def track(self, items, what, total):
        for number, item in enumerate(items):
            if what == "reading images" and number == self.after:
                raise KeyboardInterrupt
            yield item


class Listener(NullProgress):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.tracked: dict[str, int] = {}
        self.notes: list[str] = []

    def track(self, items, what, total):
        self.tracked[what] = total
        return items

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The files that are read, in any order."""
    names: list[str] = []

    def watched(file: Path, bits: int | None) -> images_module.Fingerprint:
        names.append(file.name)
        return fingerprint(file, bits)

    monkeypatch.setattr(images_module, "fingerprint", watched)
    return names


class TestOutput:
    def test_a_second_call_reads_only_what_is_new_and_says_the_same(self, tmp_path, read):
        root = draw_set(tmp_path / "set", {f"cat/{n}.png": n % 8 for n in range(10)})
        first = check_data(root, tmp_path / "out")
        before = {
            f.name: f.read_bytes() for f in (tmp_path / "out").iterdir() if f.suffix != ".sqlite"
        }
        read.clear()
        listener = Listener()
        with listener:
            assert check_data(root, tmp_path / "out") == first
        assert (read, listener.tracked) == ([], {"reading images": 0})
        for name in ("pairs.csv", "pairs.png"):
            (tmp_path / "out" / name).unlink()
            assert check_data(root, tmp_path / "out") == first
        after = {
            f.name: f.read_bytes() for f in (tmp_path / "out").iterdir() if f.suffix != ".sqlite"
        }
        assert before == after
        save(drawing(99), root / "cat/3.png")
        save(drawing(98), root / "cat/new.png")
        check_data(root, tmp_path / "out")
        assert sorted(read) == ["3.png", "new.png"]

    def test_after_a_stop_the_work_resumes_from_what_was_read(self, tmp_path, read):
        root = draw_set(tmp_path / "set", {f"cat/{n:02}.png": n for n in range(30)})
        with pytest.raises(KeyboardInterrupt), Killed(after=25):
            check_data(root, tmp_path / "out")
        assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["fingerprints.sqlite"]
        read.clear()
        check_data(root, tmp_path / "out")
        assert sorted(read) == [f"{n:02}.png" for n in range(25, 30)]

    def test_pictures_are_gone_when_there_are_no_pairs_any_more(self, tmp_path):
        root = draw_set(tmp_path / "set", {"cat/1.png": 1, "cat/2.png": 1, "cat/3.png": 3})
        out = tmp_path / "out"
        check_data(root, out)
        with Image.open(out / "pairs.png") as picture:
            assert min(picture.size) > 200
        listener = Listener()
        save(drawing(2), root / "cat/2.png")
        with listener:
            check_data(root, out)
        assert not (out / "pairs.png").exists()
        assert "clean_split.csv changes" in listener.notes[0]

    def test_a_folder_with_anything_else_is_refused(self, tmp_path):
        root = draw_set(tmp_path / "set", {f"cat/{n}.png": n for n in range(5)})
        run = tmp_path / "run"
        run.mkdir()
        (run / "summary.json").write_text("{}")
        with pytest.raises(FileExistsError, match=r"run, which holds \['summary.json'\]"):
            check_data(root, run)
        assert (run / "summary.json").read_text() == "{}"
        check_data(root, tmp_path / "out")
        with pytest.raises(FileExistsError, match="which was made with other options"):
            check_data(root, tmp_path / "out", test_share=0.3)
        with pytest.raises(ValueError, match="expected a folder outside"):
            check_data(root, root / "out")

    def test_a_folder_that_another_process_holds_is_refused(self, tmp_path):
        with (
            claimed(tmp_path / "out", {}, []),
            pytest.raises(BlockingIOError, match="which another process holds"),
            claimed(tmp_path / "out", {}, []),
        ):
            pass

    def test_a_damaged_database_is_named(self, tmp_path):
        root = draw_set(tmp_path / "set", {"cat/1.png": 1})
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "fingerprints.sqlite").write_bytes(b"nonsense" * 500)
        with pytest.raises(OSError, match=r"fingerprints.sqlite.*delete the file if it is damaged"):
            check_data(root, tmp_path / "out")

    @pytest.mark.parametrize(
        ("arguments", "hint"),
        [
            ({"test_share": 1.0}, r"test_share in \(0, 1\), got 1.0"),
            ({"group_by": "patient"}, "manifest .*expected a CSV file, got none"),
            ({"group_by": "patient", "manifest": "other.csv"}, "name some of the 1 images"),
        ],
    )
    def test_what_cannot_be_done_is_refused_before_any_work(self, tmp_path, arguments, hint):
        root = draw_set(tmp_path / "set", {"cat/1.png": 1})
        (tmp_path / "other.csv").write_text("file,person\n1.png,x\n")
        if "manifest" in arguments:
            arguments = arguments | {"manifest": tmp_path / arguments["manifest"]}
        with pytest.raises((ValueError, FileNotFoundError), match=hint):
            check_data(root, tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists()

    def test_a_folder_without_images_is_refused_with_the_two_layouts(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"ROOT/<split>/<class>/ or ROOT/<class>/"):
            check_data(tmp_path, tmp_path.parent / "out")


def test_the_command_prints_tables_and_a_summary_in_words(leaky, tmp_path):
    root, _, planted = leaky
    out = tmp_path / "out"
    shown = CliRunner().invoke(app, ["check-data", str(root), "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    words = " ".join(shown.output.split())
    assert f"LEAK: {len(planted)} of the 32 images of Testing (50.0 %) have a duplicate" in words
    assert (
        "a model that is right on 80 % of new images, and remembers old ones, shows 90.0 %" in words
    )
    assert "4 of them the same pixel for pixel" in words
    assert "| across | 4 | 12 | 0 |" in words
    assert json.loads((out / "summary.json").read_text())["summary"].split("\n")[0] in shown.output
    refused = CliRunner().invoke(app, ["check-data", str(tmp_path / "no"), "--out", str(out)])
    assert refused.exit_code == 1


@needs_mri
class TestRealImages:
    def test_copies_of_slices_are_found_whatever_was_done_to_them(self, tmp_path):
        files = sorted(MRI.glob("Training/*/*.jpg"))[::34]
        planted = plant(tmp_path / "set", [Image.open(file).convert("L") for file in files])
        check_data(tmp_path / "set", tmp_path / "out")
        found = pairs_of(tmp_path / "out")
        assert set(planted.items()) <= set(found.items())
        assert len(found.keys() - planted) <= 1  # slices that look alike

    def test_the_clean_set_has_next_to_no_duplicates_across_splits(self, tmp_path):
        for split in ("Training", "Testing"):
            shutil.copytree(MRI / split / "notumor", tmp_path / "set" / split / "notumor")
        found = check_data(tmp_path / "set", tmp_path / "out")
        assert found["images"] == 262
        assert found["leaks"]["Testing"]["exact"] == 0
        assert found["leaks"]["Testing"]["duplicate"] == 3  # the same slice, treated otherwise


@pytest.mark.parametrize("name", ["clean_split.csv", "pairs.csv"])
def test_a_table_that_has_changed_is_no_answer(name, tmp_path):
    root = draw_set(tmp_path / "set", {f"cat/{n}.png": n for n in range(6)})
    check_data(root, tmp_path / "out")
    file = tmp_path / "out" / name
    intact = file.read_bytes()
    file.write_bytes(intact[:-3])
    with pytest.raises(ValueError, match=f"{name}: expected the table .* other bytes"):
        check_data(root, tmp_path / "out")
    assert file.read_bytes() == intact[:-3]
    file.unlink()
    check_data(root, tmp_path / "out")
    assert file.read_bytes() == intact
