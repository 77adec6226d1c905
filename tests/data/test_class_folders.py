"""Class folders with images and masks in sub-folders, or at some depth, as data sets come."""

import csv
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from kd_lrp_plugin.cli.main import app
from kd_lrp_plugin.data.companions import Companions
from kd_lrp_plugin.data.folder import FolderImages
from kd_lrp_plugin.data.layout import ClassFolders
from kd_lrp_plugin.data.leakage.check import check_data
from kd_lrp_plugin.data.leakage.images import list_images

COVID = ["COVID-19", "Non-COVID", "Normal"]
LC = {"colon": ["colon_aca", "colon_n"], "lung": ["lung_aca", "lung_n", "lung_scc"]}
CELLS = sorted(LC["colon"] + LC["lung"])
QU_EX = {"images": "images", "masks": "lung masks"}


def save(file: Path, seed: int) -> None:
    """Smooth noise like no other: no two images are duplicates."""
    file.parent.mkdir(parents=True, exist_ok=True)
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(cells).resize((40, 40), Image.Resampling.BICUBIC).save(file)


@pytest.fixture
def covid(tmp_path: Path) -> Path:
    """The layout of COVID-QU-Ex, with lung masks and, in the training split, infection masks."""
    root, seed = tmp_path / "Lung Segmentation Data", 0
    for split in ("Train", "Val", "Test"):
        for label in COVID:
            for number in range(4):
                seed += 1
                name = f"{label.lower()}_{split}_{number}.png"
                save(root / split / label / "images" / name, seed)
                for masks in ("lung masks", "infection masks")[: 1 + (split == "Train")]:
                    file = root / split / label / masks / name
                    file.parent.mkdir(exist_ok=True)
                    inside = np.zeros((40, 40), np.uint8)
                    inside[: 10 + number, :20] = 255
                    Image.fromarray(inside).save(file)
    return root


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    """The layout of LC25000: two folders of class folders, and no splits."""
    root, seed = tmp_path / "lung_colon_image_set", 1000
    for organ, labels in LC.items():
        for label in labels:
            for number in range(1, 11):
                seed += 1
                save(root / f"{organ}_image_sets" / label / f"{label}{number}.png", seed)
    return root


def names(data: FolderImages) -> list[str]:
    return [Path(path).relative_to(data.folder).as_posix() for path, _ in data.samples]


class TestImagesAndMasksInSubFolders:
    @pytest.mark.parametrize("split", ["Train", "Val", "Test"])
    def test_images_are_those_of_their_sub_folder_alone(self, covid, split):
        data = FolderImages(str(covid), split, image_size=16, **QU_EX)
        assert data.classes == COVID
        assert data.targets == [0] * 4 + [1] * 4 + [2] * 4
        assert all(Path(name).parts[2] == "images" for name in names(data))

    def test_the_mask_is_the_one_asked_for(self, covid):
        for masks in ("lung masks", "infection masks"):
            data = FolderImages(str(covid), "Train", images="images", masks=masks)
            assert [int(data.mask(i).sum()) for i in range(4)] == [200, 220, 240, 260]
        Image.new("L", (40, 40)).save(covid / "Train/COVID-19/infection masks/covid-19_Train_0.png")
        assert not data.mask(0).any()
        assert FolderImages(str(covid), "Train", **QU_EX).mask(0).any()

    def test_a_mask_may_end_as_its_image_does_or_in_png(self, covid):
        for folder in ("images", "lung masks"):
            file = covid / "Test/Normal" / folder / "normal_Test_1.png"
            Image.open(file).save(file.with_suffix(".bmp"))
            file.unlink()
        data = FolderImages(str(covid), "Test", **QU_EX)
        index = names(data).index("Test/Normal/images/normal_Test_1.bmp")
        assert int(data.mask(index).sum()) == 220
        mask = covid / "Test/Normal/lung masks/normal_Test_1.bmp"
        Image.open(mask).save(mask.with_suffix(".png"))
        mask.unlink()
        assert int(data.mask(index).sum()) == 220

    def test_masks_that_are_missing_are_counted(self, covid, caplog):
        with caplog.at_level(logging.WARNING):
            FolderImages(str(covid), "Test", **QU_EX)
        assert caplog.text == ""  # of nothing that was asked for it is said that it is left out
        (covid / "Test/Normal/lung masks/normal_Test_0.png").unlink()
        (covid / "Test/COVID-19/lung masks/covid-19_Test_3.png").unlink()
        data = FolderImages(str(covid), "Test", **QU_EX)
        assert "2 of 12 images of" in caplog.text
        assert "have no mask in 'lung masks'" in caplog.text
        assert [data.mask(index) is None for index in range(12)].count(True) == 2

    def test_masks_that_no_image_has_are_refused(self, covid, tmp_path):
        hint = r"masks: expected a mask or more in folders 'lungs', got none of 12 images"
        for call in (
            lambda: FolderImages(str(covid), "Val", images="images", masks="lungs"),
            lambda: check_data(
                covid, tmp_path / "out", folders=ClassFolders((), "images", "lungs")
            ),
        ):
            with pytest.raises(ValueError, match=hint.replace("12", r"\d+")):
                call()

    def test_without_the_names_both_ways_out_are_told(self, covid):
        words = r"'images'.*name the sub-folder of the images by images; or list .* in classes"
        for call in (lambda: FolderImages(str(covid), "Train"), lambda: list_images(covid)):
            with pytest.raises(ValueError, match=words):
                call()

    def test_one_class_alone_with_several_sub_folders_is_refused(self, tmp_path):
        for file in ("cat/1.png", "cat/2.png", "dog/left/3.png", "dog/right/4.png"):
            save(tmp_path / "Training" / file, len(file))
        words = r"in one sub-folder, got images of 'dog' in \['left', 'right'\]"
        with pytest.raises(ValueError, match=words):
            FolderImages(str(tmp_path))
        assert len(FolderImages(str(tmp_path), classes=["cat", "dog"])) == 4

    def test_masks_beside_their_images_are_no_images_whatever_they_are_of(self, tmp_path):
        for label in ("cat", "dog"):
            for n in range(3):
                save(tmp_path / "Training" / label / f"{n}.png", n)
                save(tmp_path / "Training" / label / "lung masks" / f"{n}.png", 9)
        data = FolderImages(str(tmp_path), masks="lung masks")
        assert len(data) == len(FolderImages(str(tmp_path))) == 6
        assert all(data.mask(index).any() for index in range(6))

    def test_a_sub_folder_that_a_class_lacks_is_named(self, covid):
        (covid / "Train/Normal/images").rename(covid / "Train/Normal/Images")
        words = r"a sub-folder 'images' .* got none in \['Normal'\], which hold \['Images'.*Correct"
        with pytest.raises(ValueError, match=words):
            FolderImages(str(covid), "Train", images="images")

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"images": "a/b"}, "images: expected the name of a sub-folder, got 'a/b'"),
            ({"masks": 3}, "masks: expected the name of a sub-folder, got 3"),
            ({"images": "x", "masks": "x"}, "masks: expected another folder than images"),
        ],
    )
    def test_names_that_are_none_are_refused(self, covid, given, words):
        with pytest.raises(ValueError, match=words):
            FolderImages(str(covid), "Train", **given)

    def test_companions_have_the_masks(self, covid):
        (covid / "Train/COVID-19/lung masks/covid-19_Train_0.png").unlink()
        data = FolderImages(str(covid), "Train", image_size=40, **QU_EX)
        found = [Companions(data, mask=True)[index][2] for index in (0, 1)]
        assert [bool(one["mask_known"]) for one in found] == [False, True]
        assert [int(one["mask"].sum()) for one in found] == [0, 220]


class TestCheckOfData:
    def test_reads_the_splits_and_writes_a_table_that_training_reads(self, covid, tmp_path):
        (covid / "Val/Normal/lung masks/normal_Val_2.png").unlink()
        words = ["--images", "images", "--masks", "lung masks", "--out", str(tmp_path / "out")]
        shown = CliRunner().invoke(app, ["check-data", str(covid), *words])
        assert shown.exit_code == 0, shown.output
        assert "1 of the 36 images have no mask in 'lung masks'." in shown.output
        again = CliRunner().invoke(app, ["check-data", str(covid), *words])
        assert again.output == shown.output
        table = str(tmp_path / "out/clean_split.csv")
        for split in ("Train", "Val", "Test"):
            data = FolderImages(str(covid), split, manifest=table, **QU_EX)
            assert names(data) == names(FolderImages(str(covid), split, **QU_EX))
            assert data.mask(0).any()
        with pytest.raises(ValueError, match=r"lie in a folder 'pictures', got 12 that do not"):
            FolderImages(str(covid), "Train", manifest=table, images="pictures")
        fewer = CliRunner().invoke(app, ["check-data", str(covid), *words[:2], *words[4:]])
        assert fewer.exit_code == 1
        assert "other options" in fewer.output

    def test_one_folder_without_splits(self, covid):
        images, ignored = list_images(covid / "Train", ClassFolders(images="images"))
        assert {(image.split, image.label) for image in images} == {("", label) for label in COVID}
        assert len(images) == 12
        assert ignored["Normal/lung masks"] == "outside of the folder 'images'"


class TestClassFoldersAtAnyDepth:
    def test_are_found_by_their_names(self, cells):
        data = FolderImages(str(cells), "", image_size=16, classes=CELLS[::-1])
        assert data.classes == CELLS
        assert np.bincount(data.targets).tolist() == [10] * 5
        files, targets = zip(*data.samples, strict=True)
        assert [Path(file).parent.name for file in files] == [CELLS[target] for target in targets]

    def test_without_their_names_the_ways_out_are_told(self, cells):
        words = r"\['colon_aca', 'colon_n'\].*list the class folders, which may lie deeper, in clas"
        with pytest.raises(ValueError, match=words):
            FolderImages(str(cells), "")
        with pytest.raises(ValueError, match=r"splits that share a class, got .*in classes"):
            list_images(cells)

    def test_a_class_that_is_not_named_or_not_there_is_told(self, cells):
        for wrong in (CELLS[1:], [*CELLS, "lung_lcc"]):
            for call in (
                lambda wrong=wrong: FolderImages(str(cells), "", classes=wrong),
                lambda wrong=wrong: list_images(cells, ClassFolders(tuple(wrong))),
            ):
                with pytest.raises(ValueError, match=r"expected classes \["):
                    call()

    def test_a_split_is_proposed_that_no_group_of_a_table_crosses(self, cells, tmp_path):
        """Tiles that were made of one original are a group, though they do not look alike."""
        table = tmp_path / "originals.csv"
        with table.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "original"])
            for label in CELLS:
                writer.writerows([f"{label}{n}.png", f"{label} {n % 5}"] for n in range(1, 11))
        words = [word for label in CELLS for word in ("--classes", label)]
        words += ["--group-by", "original", "--manifest", str(table), "--test-share", "0.4"]
        shown = CliRunner().invoke(
            app, ["check-data", str(cells), "--out", str(tmp_path / "out"), *words]
        )
        assert shown.exit_code == 0, shown.output
        manifest = str(tmp_path / "out/clean_split.csv")
        kept = {
            (split, part): names(FolderImages(str(cells), split, part, 0.34, manifest=manifest))
            for split, part in (("Training", "train"), ("Training", "validation"))
        }
        kept["Testing", "all"] = names(FolderImages(str(cells), "Testing", manifest=manifest))
        assert sum(map(len, kept.values())) == 50

        def originals(files: list[str]) -> set[str]:
            stems = [Path(file).stem for file in files]
            return {
                f"{s.rstrip('0123456789')} {int(s.lstrip('abcdefghijklmnopqrstuvwxyz_')) % 5}"
                for s in stems
            }

        found = [originals(files) for files in kept.values()]
        assert all(found)
        assert sum(map(len, found)) == len(set().union(*found)) == 25

    def test_splits_above_them_stay_splits(self, cells, tmp_path):
        root = tmp_path / "cut"
        for split in ("Training", "Testing"):
            (root / split).mkdir(parents=True)
            for organ in LC:
                (root / split / f"{organ}_image_sets").symlink_to(cells / f"{organ}_image_sets")
        images, _ = list_images(root, ClassFolders(tuple(CELLS)))
        assert {image.split for image in images} == {"Training", "Testing"}
        assert len(FolderImages(str(root), "Testing", classes=CELLS)) == 50

    def test_a_class_in_two_of_the_upper_folders_is_one(self, tmp_path):
        for file in ("north/cat/1.png", "south/cat/2.png", "south/dog/3.png"):
            save(tmp_path / file, len(file))
        data = FolderImages(str(tmp_path), "", classes=["cat", "dog"])
        assert data.targets == [0, 0, 1]

    def test_sub_folders_of_images_below_them(self, cells):
        for label in cells.glob("*/*"):
            inner = label / "images"
            inner.mkdir()
            for file in label.glob("*.png"):
                file.rename(inner / file.name)
            save(label / "thumbnails/small.png", 5)
        folders = ClassFolders(tuple(CELLS), "images")
        data = FolderImages(str(cells), "", classes=CELLS, images="images")
        assert len(data) == len(list_images(cells, folders)[0]) == 50
        assert np.bincount(data.targets).tolist() == [10] * 5
