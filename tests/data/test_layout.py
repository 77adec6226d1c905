"""Which files are images of which class: the same for training and for the check of data."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from kd_lrp_plugin.data.folder import FolderImages, identify_images
from kd_lrp_plugin.data.layout import ClassFolders, read_layout
from kd_lrp_plugin.data.leakage.check import check_data
from kd_lrp_plugin.data.leakage.images import list_images
from kd_lrp_plugin.data.validation import unreadable_images


def make(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (40, 40), len(file)).save(root / file)
    return root


PLAIN = [f"Training/{label}/{n}.png" for label in ("cat", "dog") for n in (1, 2)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make(tmp_path / "set", *PLAIN)


def seen(root: Path) -> list[str]:
    """The images of split Training, as the data set has them and as the check of data has them."""
    data = FolderImages(str(root))
    files = [Path(file).relative_to(root).as_posix() for file, _ in data.samples]
    labels = [data.classes[label] for _, label in data.samples]
    images, _ = list_images(root)
    checked = [(image.file, image.label) for image in images if image.split == "Training"]
    assert sorted(zip(files, labels, strict=True)) == sorted(checked)
    return files


# What may lie in a folder of images without belonging to them.
ASIDE = {
    "a notebook's copies": "Training/.ipynb_checkpoints/1-checkpoint.png",
    "a notebook's copies in a class": "Training/cat/.ipynb_checkpoints/1-checkpoint.png",
    "a Mac's archive": "Training/__MACOSX/cat/1.png",
    "a Mac's companion file": "Training/cat/._1.png",
    "a hidden class": "Training/.cow/1.png",
    "a disk station's previews": "Training/cat/@eaDir/1.png",
    "masks beside the classes": "Training/masks/1.png",
    "a mask for each class": "Training/cat_mask/1.png",
    "masks below the class": "Training/cat/Masks/1_mask.png",
    "a mask beside its image": "Training/cat/1_mask.png",
    "a second mask beside its image": "Training/dog/2-segmentation_1.png",
    "an image in no class": "Training/stray.png",
}


@pytest.mark.parametrize("what", ASIDE)
def test_what_does_not_belong_is_left_out_with_a_word(root, what, caplog):
    make(root, ASIDE[what])
    assert seen(root) == PLAIN
    assert "1 files or folders of" in caplog.text
    _, ignored = list_images(root)
    assert any(ASIDE[what].startswith(file) for file in ignored)


def test_other_files_are_no_matter(root, caplog):
    for name in ("Thumbs.db", "desktop.ini", "notes.txt", ".DS_Store"):
        (root / "Training" / "cat" / name).write_text("x")
    assert seen(root) == PLAIN
    assert caplog.text == ""


@pytest.mark.parametrize("target", ["..", "../..", "../../..", "."])
def test_links_that_lead_back_are_not_followed(root, target, caplog):
    make(root, "Testing/cat/9.png")
    (root / "Training" / "cat" / "again").symlink_to(target)
    assert seen(root) == PLAIN
    assert "cat/again (a link to a folder that holds it)" in caplog.text
    assert identify_images(root, "Training") is not None


def test_what_is_no_file_is_left_out_and_not_waited_for(root, caplog, monkeypatch):
    os.mkfifo(root / "Training" / "cat" / "7.png")
    monkeypatch.chdir(root / "Training" / "dog")  # paths of sockets are short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("8.png")
        assert seen(root) == PLAIN
    assert "7.png (a FIFO, no file)" in caplog.text
    assert "8.png (a socket, no file)" in caplog.text


def test_links_to_folders_and_files_are_followed(root, tmp_path):
    make(tmp_path / "elsewhere", "1.png", "deep/2.png")
    (root / "Training" / "cow").symlink_to(tmp_path / "elsewhere")
    (root / "Training" / "dog" / "link.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    assert set(seen(root)) - set(PLAIN) == {
        *("Training/cow/1.png", "Training/cow/deep/2.png", "Training/dog/link.png")
    }


# Folders that are no data set, and a part of what is said.
PROBLEMS = {
    "names that differ in case": (["Training/Cat/3.png"], r"\['Cat', 'cat'\]"),
    "names that differ in a blank": (["Training/cat /3.png"], r"\['cat', 'cat '\]"),
    "names that look alike": (
        ["Training/\u00e9/3.png", "Training/e\u0301/3.png"],
        "differ in more than case",
    ),
    "a folder around the classes": (
        ["Training/Training/cat/3.png", "Training/Training/dog/3.png"],
        "holds folders named like classes",
    ),
}


@pytest.mark.parametrize("what", PROBLEMS)
def test_what_cannot_be_told_is_refused_by_both(root, what):
    files, words = PROBLEMS[what]
    make(root, *files)
    with pytest.raises(ValueError, match=words):
        FolderImages(str(root))
    with pytest.raises(ValueError, match=words):
        list_images(root)


def test_classes_nested_one_level_deeper_are_refused(tmp_path):
    for top in ("Training", "Testing"):
        make(tmp_path, *(f"{top}/data/{label}/{n}.png" for label in "ab" for n in range(2)))
    words = r"got \['data'\], which hold folders \['a', 'b'\]"
    for call in (lambda: FolderImages(str(tmp_path)), lambda: list_images(tmp_path)):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(ValueError, match=r"\['Testing', 'Training'\]"):
        FolderImages(str(tmp_path), split="")
    assert FolderImages(str(tmp_path), split="Training/data").classes == ["a", "b"]
    # Where they are classes all the same, as magnifications below diagnoses are.
    named = FolderImages(str(tmp_path), split="", classes=["Training", "Testing"])
    assert named.classes == ["Testing", "Training"]


def test_a_class_folder_in_a_folder_of_its_name_is_that_class(tmp_path):
    data = FolderImages(str(make(tmp_path, "Training/cat/cat/1.png", "Training/dog/dog/1.png")))
    assert (data.classes, len(data)) == (["cat", "dog"], 2)


def test_folders_of_patients_below_classes_are_no_classes_where_these_are_named(tmp_path):
    files = ["Training/cat/p1/1.png", "Training/cat/p2/1.png", "Training/dog/p3/1.png"]
    root = make(tmp_path, *files)
    data = FolderImages(str(root), classes=["cat", "dog"])
    assert (data.classes, len(data)) == (["cat", "dog"], 3)
    images, _ = list_images(root, ClassFolders(classes=("cat", "dog")))
    assert [image.label for image in images] == ["cat", "cat", "dog"]
    words = (
        r"in one sub-folder, got images of 'cat' in \['p1', 'p2'\].* by images; or .* in classes"
    )
    for call in (lambda: FolderImages(str(root)), lambda: list_images(root)):
        with pytest.raises(ValueError, match=words):
            call()


def test_classes_called_like_masks_are_classes(tmp_path):
    files = [f"Training/{name}/{name}_{n}.png" for name in ("mask", "no_mask") for n in (1, 2)]
    data = FolderImages(str(make(tmp_path / "a", *files)))
    assert (data.classes, len(data)) == (["mask", "no_mask"], 4)
    files = [f"Training/{name}/{n}.png" for name in ("mask", "face") for n in (1, 2)]
    root = str(make(tmp_path / "b", *files))
    assert FolderImages(root).classes == ["face"]
    assert FolderImages(root, classes=["face", "mask"]).classes == ["face", "mask"]


def test_an_empty_class_is_refused_for_training_and_named_by_the_check(root):
    (root / "Training" / "cow").mkdir()
    with pytest.raises(ValueError, match=r"none in \['cow'\]"):
        FolderImages(str(root))
    assert list_images(root)[1] == {"Training/cow": "a class folder without images"}
    (root / "Empty").mkdir()
    with pytest.raises(ValueError, match="no folder with images"):
        FolderImages(str(root), split="Empty")


def test_a_folder_in_two_classes_is_refused(root):
    (root / "Training" / "cow").symlink_to("dog")
    for call in (lambda: FolderImages(str(root)), lambda: list_images(root)):
        with pytest.raises(ValueError, match=r"one in \['cow', 'dog'\]"):
            call()


def test_names_that_are_not_utf8_are_refused_before_any_work(root, tmp_path):
    image = (root / PLAIN[0]).read_bytes()
    Path(os.fsdecode(os.fsencode(root / "Training" / "cat") + b"/n\xff.png")).write_bytes(image)
    with pytest.raises(ValueError, match=r"names in UTF-8, got 'cat/n\\udcff\.png'. Rename it"):
        FolderImages(str(root))
    with pytest.raises(ValueError, match="names in UTF-8"):
        check_data(root, tmp_path / "out")


def test_images_come_in_the_order_of_torchvision(tmp_path):
    names = ["b.png", "k/z.png", "k/b/1.PNG", "k-1/2.jpg", "c.jpeg", "B.png", "a.png"]
    root = make(tmp_path, *(f"Training/{k}/{name}" for k in ("x", "a-", "a") for name in names))
    data = FolderImages(str(root), classes=["x", "a-", "a"])
    assert data.samples == ImageFolder(str(root / "Training")).samples


def test_random_trees_are_read_alike_by_training_and_the_check_of_data(tmp_path):
    """Folders and files of all the names above, in any place."""
    rng = np.random.default_rng(0)
    folders = ["cat", "dog", "p1", "p2", "masks", ".git", "__MACOSX", "cat_mask"]
    names = ["1.png", "2.png", "1_mask.png", "notes.txt", "._1.png", "3.JPG", "Thumbs.db"]
    read = 0
    for trial in range(60):
        root = make(tmp_path / str(trial), "Training/cat/9.png", "Training/dog/9.png")
        for _ in range(rng.integers(1, 8)):
            parts = rng.choice(folders, rng.integers(1, 4))
            file = root.joinpath("Training", *parts, str(rng.choice(names)))
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix.lower() in (".png", ".jpg"):
                Image.new("L", (4, 4)).save(file, format="PNG")
            else:
                file.touch()
        layout = read_layout(root / "Training")
        assert not any(part.startswith((".", "__MACOSX")) for p in layout.images for part in p)
        if layout.problems:
            for call in (lambda r=root: FolderImages(str(r)), lambda r=root: list_images(r)):
                with pytest.raises(ValueError, match="expected"):
                    call()
        elif not layout.empty:
            read += bool(seen(root))
    assert read >= 15


def test_a_link_to_itself_is_one_unreadable_file(root):
    (root / "Training/cat/self.png").symlink_to("self.png")
    (root / "Training/.self").symlink_to(".self")
    dataset = FolderImages(str(root), image_size=9)
    (why,) = unreadable_images(dataset).values()
    assert "symbolic links" in why
    found = check_data(root, root.parent / "out")
    assert list(found["unreadable"]) == ["Training/cat/self.png"]


@pytest.mark.parametrize("ending", ["gif", "jp2", "tga", "GIF"])
def test_images_of_other_endings_are_named(root, ending, caplog):
    (root / f"Training/cat/1.{ending}").write_bytes(b"")
    assert len(FolderImages(str(root), image_size=9)) == 4
    assert f"cat/1.{ending} (an image ({ending.upper()})" in caplog.text


def test_an_empty_class_may_have_any_name(root):
    os.mkdir(os.fsencode(root / "Training") + b"/b\xff")
    found = check_data(root, root.parent / "out")
    assert found["ignored"] == {"Training/'b\\udcff'": "a class folder without images"}
    with pytest.raises(ValueError, match="one or more in each class folder"):
        FolderImages(str(root), image_size=9)


@pytest.mark.parametrize("name", ["labels", "cat_labels", "contours"])
def test_folders_of_labels_are_masks(root, name):
    make(root, *(f"Training/{name}/{n}.png" for n in (1, 2)))
    assert FolderImages(str(root), image_size=9).classes == ["cat", "dog"]


@pytest.mark.parametrize("flag", ["augment", "skip_corrupt"])
@pytest.mark.parametrize("value", ["no", 1, 0.0, None])
def test_a_switch_is_true_or_false(root, flag, value):
    with pytest.raises(ValueError, match=f"{flag}: expected True or False, got {value!r}"):
        FolderImages(str(root), image_size=9, **{flag: value})
