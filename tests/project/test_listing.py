"""Images in class folders, splits and tables are found as they are meant, or refused by name."""

from pathlib import Path

import pytest

from kd_lrp_plugin.project.listing import check_counts, list_folder, name_splits

PNG = b"\x89PNG\r\n\x1a\n"  # listing opens no image


def fill(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(PNG)
    return root


def several(*folders: str, n: int = 3) -> list[str]:
    return [f"{folder}/{i}.png" for folder in folders for i in range(n)]


def write_table(root: Path, header: str, *rows: str, name: str = "labels.csv") -> Path:
    (root / name).write_text("\n".join([header, *rows]) + "\n")
    return root / name


def labels_of(listing) -> dict[str, tuple[str, str]]:
    return {image.file: (image.split, image.label) for image in listing.images}


class TestClassFolders:
    def test_without_splits(self, tmp_path):
        found = list_folder(fill(tmp_path, *several("cat", "dog")))
        assert labels_of(found)["cat/0.png"] == ("", "cat")
        assert len(found.images) == 6

    def test_folders_in_a_class_folder_are_of_the_class(self, tmp_path):
        files = ["cat/2021/0.png", "cat/1.png", "dog/a/b/0.png", "dog/1.png"]
        found = list_folder(fill(tmp_path, *files))
        assert {label for _, label in labels_of(found).values()} == {"cat", "dog"}
        assert {split for split, _ in labels_of(found).values()} == {""}

    def test_even_if_all_images_lie_deeper(self, tmp_path):
        found = list_folder(fill(tmp_path, "cat/2021/0.png", "dog/2021/0.png"))
        assert labels_of(found)["dog/2021/0.png"] == ("", "dog")

    def test_of_which_the_inner_folders_are_known(self, tmp_path):
        files = ["lung/a/0.png", "lung/b/x/0.png", "colon/1.png", "colon/c/0.png"]
        assert list_folder(fill(tmp_path, *files)).inner_folders == ["a", "b", "c"]

    def test_named_ones_at_any_depth(self, tmp_path):
        files = [f"{path}/{i}.png" for path in ("lung/aca", "lung/n", "x/y/scc") for i in range(3)]
        found = list_folder(fill(tmp_path, *files), classes=["aca", "n", "scc"])
        assert labels_of(found)["x/y/scc/0.png"] == ("", "scc")
        assert {label for _, label in labels_of(found).values()} == {"aca", "n", "scc"}
        assert found.inner_folders == []
        assert found.layout == "in a folder per class"

    def test_named_ones_below_splits(self, tmp_path):
        folders = [f"{split}/lung/{label}" for split in ("train", "test") for label in ("a", "b")]
        found = list_folder(fill(tmp_path, *several(*folders)), classes=["a", "b"])
        assert labels_of(found)["test/lung/b/2.png"] == ("test", "b")
        assert found.layout == "in splits, each with a folder per class"
        check_counts(found)

    def test_a_name_that_is_no_folder_or_too_few_of_them_are_refused(self, tmp_path):
        fill(tmp_path, *several("lung/aca", "lung/n", "colon/scc"))
        with pytest.raises(ValueError, match=r"expected classes \['ab', 'aca', 'n', 'scc'\], got"):
            list_folder(tmp_path, classes=["ab", "n", "aca", "scc"])
        with pytest.raises(ValueError, match=r"expected classes \['aca', 'n'\], got"):
            list_folder(tmp_path, classes=["n", "aca"])
        with pytest.raises(ValueError, match="expected folders or a table"):
            list_folder(tmp_path, tmp_path / "t.csv", classes=["n", "aca"])

    def test_with_splits(self, tmp_path):
        folders = [f"{split}/{label}" for split in ("train", "test") for label in ("cat", "dog")]
        found = list_folder(fill(tmp_path, *several(*folders)))
        assert labels_of(found)["test/dog/2.png"] == ("test", "dog")
        check_counts(found)

    def test_groups_of_a_manifest_are_read_unasked(self, tmp_path):
        fill(tmp_path, *several("cat", "dog"))
        rows = [f"{file},p{i // 2}" for i, file in enumerate(several("cat", "dog"))]
        write_table(tmp_path, "file,group", *rows, name="manifest.csv")
        found = list_folder(tmp_path)
        assert found.patients["cat/1.png"] == "p0"
        assert found.columns == {"patient": "group"}

    def test_a_patient_column_without_a_manifest_is_refused(self, tmp_path):
        fill(tmp_path, *several("cat", "dog"))
        with pytest.raises(FileNotFoundError, match=r"expected a table, got no .*manifest\.csv"):
            list_folder(tmp_path, columns={"patient": "id"})

    def test_a_table_beside_them_that_says_nothing_of_classes_is_named(self, tmp_path):
        fill(tmp_path, *several("cat", "dog"))
        write_table(tmp_path, "file,age", "cat/0.png,3", name="ages.csv")
        assert "ages.csv" in list_folder(tmp_path).ignored

    def test_a_table_beside_them_with_other_classes_is_refused(self, tmp_path):
        fill(tmp_path, *several("part_1", "part_2"))
        write_table(tmp_path, "image,dx", "0.png,mel", "1.png,nv")
        with pytest.raises(ValueError, match=r"one word on the classes, got folders \['part_1'"):
            list_folder(tmp_path)


class TestRefusals:
    def test_no_folder_and_no_image(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="a folder of images, got none at"):
            list_folder(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match=r"expected images \(\.png"):
            list_folder(tmp_path)

    @pytest.mark.parametrize(
        ("files", "hint"),
        [
            (several("cat"), r"two classes or more, got folders \['cat'\]"),
            (["0.png", "1.png"], "two classes or more, got images in no folder"),
            (several("train", "test"), r"two classes or more, got folders \['test', 'train'\]"),
            (
                several("train/cat", "train/dog", "cat", "dog"),
                r"splits or classes, got splits \['train'\] beside \['cat', 'dog'\]",
            ),
            (
                [*several("train/cat", "train/dog", "test/cat", "test/dog"), "train/9.png"],
                r"no image beside the classes of a split, got 1, such as train/9\.png",
            ),
            (
                several("cat/Train", "cat/Val", "dog/Train", "dog/Val"),
                r"splits above the classes, got \['Train', 'Val'\] in the folders of classes",
            ),
        ],
    )
    def test_what_is_no_data_set(self, tmp_path, files, hint):
        with pytest.raises(ValueError, match=hint):
            list_folder(fill(tmp_path, *files))

    @pytest.mark.parametrize(
        ("files", "hint"),
        [
            (several("a", "b", n=1), "3 images or more to a class, got 1 of 'a'"),
            (several("train/a", "train/b", "test/a", "test/b", n=1), "2 images or more"),
            (several("train/a", "train/b", "test/a"), r"got none of \['b'\] in 'test'"),
            (several("train/a", "test/a"), "two classes or more, got one, 'a'"),
            (several("train/a", "train/b"), r"one for test.*got \['train'\]"),
            (
                several(*(f"{s}/{c}" for s in ("train", "test", "eval") for c in "ab")),
                r"got \['eval', 'test', 'train'\]",
            ),
        ],
    )
    def test_too_little_or_too_many_splits(self, tmp_path, files, hint):
        with pytest.raises(ValueError, match=hint):
            check_counts(list_folder(fill(tmp_path, *files)))


class TestSplitNames:
    def test_validation_stands_in_for_a_test_set(self):
        found = name_splits(Path("x"), ["train", "val"])
        assert found == {"train": "train", "val": None, "test": "val"}

    def test_three_of_them(self):
        found = name_splits(Path("x"), ["Training", "Validation", "Testing"])
        assert found == {"train": "Training", "val": "Validation", "test": "Testing"}


class TestTables:
    HEADER = "Image Name,Majority Vote Label,Number of Annotators,Partition"

    def test_columns_are_known_by_their_words(self, tmp_path):
        fill(tmp_path, *(f"images/{i}.png" for i in range(5)))
        rows = ["0.png,HP,1,train", "1.png,SSA,2,train", "2.png,HP,3,test", "3.png,SSA,4,test"]
        write_table(tmp_path, self.HEADER, *rows)
        found = list_folder(tmp_path)
        assert labels_of(found)["images/3.png"] == ("test", "SSA")
        assert found.columns == {
            "file": "Image Name",
            "label": "Majority Vote Label",
            "split": "Partition",
        }
        assert found.ignored == {"images/4.png": "an image that the table leaves out"}

    def test_numbers_are_one_spelling_and_patients_are_read(self, tmp_path):
        fill(tmp_path, "0.png", "1.png")
        write_table(tmp_path, "file,class,patient", "0.png,1,p", "1.png,1.0,")
        found = list_folder(tmp_path)
        assert {label for _, label in labels_of(found).values()} == {"1"}
        assert found.patients == {"0.png": "p"}

    def test_columns_may_be_named(self, tmp_path):
        fill(tmp_path, "0.png")
        table = write_table(tmp_path, "a,b", "0.png,x")
        found = list_folder(tmp_path, table, {"file": "a", "label": "b"})
        assert labels_of(found) == {"0.png": ("", "x")}

    @pytest.mark.parametrize(
        ("header", "rows", "columns", "hint"),
        [
            ("a,label", ["0.png,x"], {}, r"one column of the file, got \['a', 'label'\]"),
            (
                "file,label one,label two",
                ["0.png,x,y"],
                {},
                r"one column of the label, got \['label one', 'label two'\]. .*--column label",
            ),
            ("file,label", ["0.png,"], {}, "line 2: expected a label, got an empty cell"),
            ("file,label", ["/a/0.png,x"], {}, r"a path below .*, got '/a/0\.png'\. Give"),
            ("file,label", [], {}, "a row for each image, got an empty table"),
            ("file,label", ["0.png,x", "./0.png,y"], {}, "each file once"),
            ("file,label", ["0.png,x,y"], {}, "2 values in each line"),
            ("file,label", ["0.png,x"], {"label": "lable"}, "a column 'lable'"),
            ("file,label", ["0.png,x"], {"labels": "label"}, "column: expected one of"),
            ("file,label,split", ["0.png,x,3"], {}, r"got '3' in column 'split'"),
            ("image label,x", ["0.png,x"], {}, "a column for each of them"),
        ],
    )
    def test_what_cannot_be_told_is_refused(self, tmp_path, header, rows, columns, hint):
        fill(tmp_path, "0.png")
        write_table(tmp_path, header, *rows)
        with pytest.raises(ValueError, match=hint):
            list_folder(tmp_path, None, columns)

    def test_files_that_are_not_there_are_refused(self, tmp_path):
        fill(tmp_path, "images/0.png")
        write_table(tmp_path, "file,label", "0.png,x", "1.png,y")
        with pytest.raises(FileNotFoundError, match=r"got 1 of 2 that are not there, such as '1"):
            list_folder(tmp_path)

    def test_a_table_that_is_no_text_is_refused(self, tmp_path):
        fill(tmp_path, "0.png")
        (tmp_path / "labels.csv").write_bytes(b"file,label\n\xff\xfe,x\n")
        with pytest.raises(ValueError, match="expected text in UTF-8"):
            list_folder(tmp_path)

    def test_two_tables_are_refused(self, tmp_path):
        fill(tmp_path, "0.png")
        for name in ("a.csv", "b.csv"):
            write_table(tmp_path, "file,label", "0.png,x", name=name)
        with pytest.raises(ValueError, match=r"one table, got \['a.csv', 'b.csv'\]"):
            list_folder(tmp_path)
