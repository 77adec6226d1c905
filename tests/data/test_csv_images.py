"""Images that a table lists: what is taken, and what is refused by name."""

import csv
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kd_lrp_plugin.data.csv_images import CsvImages, identify_csv_images, plain_value
from kd_lrp_plugin.data.transforms import preprocessing
from kd_lrp_plugin.data.validation import unreadable_images

COLUMNS = ["Image Name", "Label", "Votes", "Partition", "Scanner", "Patient"]
GROUPS = {"sure_no": [0, 1], "no": [2, 3], "yes": [4, 5], "sure_yes": [6, 7]}
# Of each part: every count of votes three times, shown by the grey value of the image.
ROWS = [
    [
        f"{part}_{votes}_{n}.png",
        "SSA" if votes > 3 else "HP",
        str(votes),
        part,
        "AB"[n % 2],
        f"{part} {n} {votes // 4}",
    ]
    for part in ("train", "test")
    for votes in range(8)
    for n in range(3)
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The table, and 48 images of 8 × 8 pixels below ``images``."""
    (tmp_path / "images").mkdir()
    for index, row in enumerate(ROWS):
        Image.new("RGB", (8, 8), (index, 2 * index, 3 * index)).save(tmp_path / "images" / row[0])
    return write(tmp_path, ROWS)


def write(root: Path, rows: list[list[str]], columns: list[str] = COLUMNS) -> Path:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *rows])
    (root / "annotations.csv").write_text(text.getvalue())
    return root


def read(root: Path, /, **changed: Any) -> CsvImages:
    arguments: dict[str, Any] = {
        "csv": "annotations.csv",
        "file": "Image Name",
        "label": "Label",
        "root": str(root),
        "folder": "images",
        "split": {"Partition": "train"},
        "image_size": 8,
    }
    return CsvImages(**{**arguments, **changed})


def names(data: CsvImages) -> list[str]:
    return [Path(file).name for file, _ in data.samples]


def changed_rows(index: int, column: str, cell: str) -> list[list[str]]:
    rows = [list(row) for row in ROWS]
    rows[index][COLUMNS.index(column)] = cell
    return rows


class TestTaken:
    def test_the_images_of_a_split_with_class_group_and_subclass(self, root):
        data = read(root, groups="Scanner", subclasses={"column": "Votes", "groups": GROUPS})
        by_name = {row[0]: row for row in ROWS}
        rows = [by_name[name] for name in names(data)]
        assert names(data) == sorted(row[0] for row in ROWS if row[3] == "train")
        assert data.classes == ["HP", "SSA"]
        assert [data.classes[target] for target in data.targets] == [row[1] for row in rows]
        assert data.groups == [row[4] for row in rows]
        assert data.subclasses == list(GROUPS)
        assert data.subclass_targets == [int(row[2]) // 2 for row in rows]
        assert data.subclass_of == [0, 0, 1, 1]
        assert [data.subclass_of[k] for k in data.subclass_targets] == data.targets

    def test_items_are_what_the_loader_and_the_transform_make_of_the_files(self, root):
        data = read(root)
        image, target = data[5]
        number = [row[0] for row in ROWS].index(names(data)[5])
        expected = torch.tensor([number, 2 * number, 3 * number]) / 127.5 - 1
        assert torch.allclose(image, expected[:, None, None].expand(3, 8, 8), atol=1e-6)
        assert target == data.targets[5]
        assert len(data) == 24
        assert preprocessing(data) == {"image_size": 8, "mean": 0.5, "std": 0.5}
        assert unreadable_images(data) == {}

    def test_without_the_columns_there_are_no_such_attributes(self, root):
        data = read(root)
        for name in ("groups", "subclasses", "subclass_targets", "subclass_of"):
            assert not hasattr(data, name)

    def test_of_one_channel_images_are_grey(self, root):
        image, _ = read(root, channels=1)[5]
        number = [row[0] for row in ROWS].index(names(read(root))[5])
        luma = round(number * (0.299 + 2 * 0.587 + 3 * 0.114))
        assert torch.allclose(image, torch.full((1, 8, 8), luma / 127.5 - 1), atol=0.01)

    @pytest.mark.parametrize(
        ("split", "n"),
        [
            (None, 48),
            ({}, 48),
            ({"Partition": ["train", "test"]}, 48),
            ({"Partition": "test", "Scanner": "A"}, 16),
            ({"Votes": [0, "7.0", 4.0]}, 18),
        ],
    )
    def test_several_values_and_columns_of_a_split(self, root, split, n):
        assert len(read(root, split=split)) == n

    @pytest.mark.parametrize("spell", ["{}.0", "{}.", " {} ", "+{}", "{}"])
    def test_numbers_are_compared_as_numbers(self, root, spell):
        write(root, [[*row[:2], spell.format(row[2]), *row[3:]] for row in ROWS])
        groups = {name: [str(v) for v in values] for name, values in GROUPS.items()}
        found = [
            read(root, subclasses={"column": "Votes", "groups": g}).subclass_targets
            for g in (groups, GROUPS)
        ]
        assert found[0] == found[1] == [v // 2 for v in range(8) for _ in range(3)]

    def test_classes_that_are_numbers_are_sorted_as_numbers(self, root):
        write(root, [[*row[:2], str(int(row[2]) * 5), *row[3:]] for row in ROWS])
        assert read(root, label="Votes").classes == [str(5 * v) for v in range(8)]

    def test_the_table_lies_anywhere_and_its_path_names_variables(
        self, root, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("WHERE", str(tmp_path))
        (tmp_path / "annotations.csv").rename(tmp_path / "other.csv")
        assert len(read(root, csv="$WHERE/other.csv")) == 24
        monkeypatch.setenv("KD_LRP_DATA", str(tmp_path.parent))
        assert len(read(root, csv="other.csv", root=None, name=tmp_path.name)) == 24

    def test_columns_that_the_package_spells_in_lower_case(self, root):
        columns = ["File", "CLASS", "Votes", "Split", "Scanner", "Group"]
        write(root, [["none", *ROWS[0][1:]], *ROWS[1:]], columns)
        os.rename(root / "images" / ROWS[0][0], root / "images" / "none")
        data = read(root, file="File", label="CLASS", split={"Split": "train"}, patient="Group")
        assert (len(data), data.classes) == (24, ["HP", "SSA"])

    def test_a_class_may_be_called_none(self, root):
        write(root, [[row[0], row[1].replace("HP", "none"), *row[2:]] for row in ROWS])
        assert read(root).classes == ["SSA", "none"]

    def test_paths_in_any_spelling(self, root):
        spelt = [r"./{}", r".\{}", "{}", ".//{}"]
        write(root, [[spelt[n % 4].format(row[0]), *row[1:]] for n, row in enumerate(ROWS)])
        assert len(read(root)) == 24

    def test_classes_that_do_not_count_are_left_to_other_splits(self, root):
        write(root, changed_rows(-1, "Label", "unsure"))
        assert read(root, classes=["SSA", "HP"]).classes == ["HP", "SSA"]
        with pytest.raises(ValueError, match=r"none of \['unsure'\] in the split"):
            read(root)

    def test_files_that_cannot_be_read_are_left_out_if_asked(self, root, caplog):
        (root / "images" / "train_0_1.png").write_bytes(b"no image")
        data = read(root, skip_corrupt=True, groups="Scanner")
        assert "train_0_1.png" not in names(data)
        assert "1 of 24 images left out" in caplog.text
        assert len(data.groups) == len(data.targets) == len(data) == 23
        assert list(unreadable_images(read(root))) == [str(root / "images" / "train_0_1.png")]

    def test_few_images_of_each_class_keep_their_groups(self, root):
        data = read(root, per_class=2, seed=3, groups="Patient")
        group_of = {row[0]: row[5] for row in ROWS}
        assert np.bincount(data.targets).tolist() == [2, 2]
        assert data.groups == [group_of[name] for name in names(data)]


class TestParts:
    def test_no_patient_is_in_both(self, root):
        fit, held = (
            set(read(root, part=part, holdout=0.34, patient="Patient", groups="Patient").groups)
            for part in ("train", "validation")
        )
        assert fit
        assert held
        assert not fit & held

    def test_natural_groups_may_be_divided(self, root):
        parts = [
            read(root, part=part, holdout=0.34, groups="Scanner")
            for part in ("train", "validation")
        ]
        assert set(parts[0].groups) & set(parts[1].groups)
        both = [name for part in parts for name in names(part)]
        assert sorted(both) == names(read(root))

    def test_a_patient_in_two_splits_is_told(self, root, caplog):
        write(root, changed_rows(-1, "Patient", ROWS[0][5]))
        read(root, patient="Patient")
        assert "1 patients have images in the split and out of it" in caplog.text


SPLITS = {"column": "Votes", "groups": GROUPS}


@pytest.mark.parametrize(
    ("rows", "arguments", "hint"),
    [
        (ROWS, {"label": "Lable"}, r"a column 'Lable', got \['Image Name', 'Label'"),
        (ROWS, {"groups": "Hospital"}, r"csv: expected a column 'Hospital', got \['Im"),
        (ROWS, {"split": {"Partition": "trian"}}, r"'trian', got none.*\['test', 'train'\]"),
        (ROWS, {"split": {"Partition": ["train", "x"]}}, "rows of Partition 'x'"),
        (ROWS, {"split": {"Partition": "train", "Patient": "test 0 0"}}, "an image or more"),
        (ROWS, {"split": "train"}, "For example {Partition: train}"),
        (ROWS, {"split": {"Votes": 0}}, r"none of \['SSA'\] in the split"),
        (ROWS, {"classes": ["HP"]}, r"classes \['HP'\], got also \['SSA'\]"),
        (changed_rows(0, "Label", ""), {}, "line 2: expected a value of 'Label'"),
        (
            changed_rows(0, "Scanner", "NA"),
            {"groups": "Scanner"},
            "an empty cell, as which nan, NA, none and the like count",
        ),
        (changed_rows(0, "Votes", ""), {"subclasses": SPLITS}, "line 2: .*'Votes'"),
        (changed_rows(0, "Patient", " "), {"patient": "Patient"}, "line 2: .*'Patient'"),
        (changed_rows(0, "Image Name", ""), {}, "line 2: .*'Image Name'"),
        (changed_rows(0, "Label", "hp"), {}, "more than case, got .*'HP', 'hp'"),
        (changed_rows(0, "Scanner", "a"), {"groups": "Scanner"}, "more than case"),
        (changed_rows(0, "Patient", ROWS[1][5].upper()), {"patient": "Patient"}, "more than case"),
        (changed_rows(0, "Votes", "8"), {"subclasses": SPLITS}, "value of the subclasses, got '8'"),
        (changed_rows(0, "Label", "SSA"), {"subclasses": SPLITS}, r"'sure_no': .*\['HP', 'SSA'\]"),
        (changed_rows(-1, "Label", "HP"), {"subclasses": SPLITS}, "'sure_yes': .*of one class"),
        (changed_rows(0, "Image Name", f"./{ROWS[1][0]}"), {}, "each file once, .*lines 2 and 3"),
        (changed_rows(0, "Image Name", ROWS[-1][0]), {}, "each file once"),
        (changed_rows(0, "Image Name", "../annotations.csv"), {}, "a path below"),
        (changed_rows(0, "Image Name", "/etc/hosts"), {}, "a path below"),
        ([], {}, "got an empty table"),
        (ROWS, {"part": "valid"}, "Did you mean 'validation'"),
        (ROWS, {"part": "train", "holdout": 2}, "holdout in"),
        (ROWS, {"part": "train", "holdout": 0.01}, "some images held out"),
        (ROWS, {"per_class": 13}, "13 per_class, got a class of 12"),
        (ROWS, {"channels": 2}, "1 or 3 channels, got 2"),
        (ROWS, {"channels": 1, "transform": str}, "transform or channels"),
        (ROWS, {"augment": "yes"}, "True or False"),
        (ROWS, {"bits": 8}, "an integer bits of 9"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(root, rows, arguments, hint):
    arguments = dict(arguments)
    if not rows:
        arguments["split"] = None
    write(root, rows)
    with pytest.raises(ValueError, match=hint):
        read(root, **arguments)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ({**GROUPS, "other": [7]}, "each value once, got '7' in 'sure_yes' and 'other'"),
        ({**GROUPS, "other": ["7.0"]}, "each value once"),
        ({**GROUPS, "other": [9]}, "subclass 'other': .*got no image"),
        ({**GROUPS, "No": [9]}, "more than case"),
        ({"a": [0, 1, 2, 3, 4], "b": [5, 6, 7]}, r"subclass 'a': .*images of \['HP', 'SSA'\]"),
        ({"no": [0, 1, 2]}, "value of the subclasses, got '3'"),
        ({"no": []}, "a list of values"),
        ({"no": 3}, "a list of values"),
        ({"no": [None]}, "a value, got None"),
        ({}, "groups of its values"),
    ],
)
def test_subclasses_that_do_not_fit_are_refused(root, given, hint):
    with pytest.raises(ValueError, match=hint):
        read(root, subclasses={"column": "Votes", "groups": given})


def test_a_key_of_the_subclasses_is_not_passed_over(root):
    with pytest.raises(ValueError, match="a column, and groups of its values"):
        read(root, subclasses={**SPLITS, "order": 1})


def test_files_that_are_not_there_are_counted(root):
    for name in ("train_0_0.png", "train_3_1.png"):
        (root / "images" / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"2 that are not there, such as 'train_0_0\.png'"):
        read(root)
    assert len(read(root, split={"Partition": "test"})) == 24
    with pytest.raises(FileNotFoundError, match=r"neither .*no\.csv nor no\.csv"):
        read(root, csv="no.csv")


def test_one_file_under_two_names_is_refused(root):
    (root / "images" / ROWS[0][0]).unlink()
    (root / "images" / ROWS[0][0]).symlink_to(ROWS[-1][0])
    with pytest.raises(ValueError, match=r"each file once, .*lines 2 and 49"):
        read(root)


def test_numbers_have_one_spelling_and_names_of_digits_keep_theirs():
    same = [4, "4", 4.0, "4.0", "+4", "4."]
    assert {plain_value("v", value) for value in same} == {"4"}
    other = ["007", "7", "0.5", "5", "1_0", "10", "-7", "12345678901234567890"]
    assert len({plain_value("v", value) for value in other}) == len(other)
    assert plain_value("v", "12345678901234567891.0") == "12345678901234567891"


class TestIdentity:
    def found(self, root: Path) -> str:
        return identify_csv_images(root, "annotations.csv", "Image Name", "images")

    def test_table_names_and_sizes_count_and_the_place_does_not(self, root, tmp_path):
        before = self.found(root)
        (root / "images" / "unlisted.png").write_bytes(b"1")
        assert self.found(root) == before
        moved = tmp_path / "moved"
        moved.mkdir()
        for name in ("images", "annotations.csv"):
            (root / name).rename(moved / name)
        assert self.found(moved) == before
        Image.new("L", (90, 90)).save(moved / "images" / ROWS[0][0])
        other = self.found(moved)
        assert other != before
        write(moved, changed_rows(0, "Label", "SSA"))
        assert self.found(moved) != other
