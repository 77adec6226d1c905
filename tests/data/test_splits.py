"""Tables of groups and splits, as people and pandas write them: understood, or refused by name."""

import csv
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd_lrp_plugin.data.folder import FolderImages
from kd_lrp_plugin.data.leakage.check import check_data
from kd_lrp_plugin.data.splits import read_groups, read_kept, read_table

COLUMNS = ["file", "split", "class", "group", "kept"]
FILES = [f"{label}/{n}.png" for label in ("cat", "dog") for n in range(3)]
ROWS = [[file, "Training", file[:3], n // 2, 1] for n, file in enumerate(FILES)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for n, file in enumerate(FILES):
        (tmp_path / "set" / file).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(n).integers(0, 256, (40, 40), np.uint8)
        Image.fromarray(noise).save(tmp_path / "set" / file)
    return tmp_path / "set"


def write(rows: list, separator: str = ",") -> str:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator, lineterminator="\n").writerows([COLUMNS, *rows])
    return text.getvalue()


def read(root: Path, content: str | bytes) -> list[str]:
    """The files of the split as the data set takes them."""
    table = root.parent / "split.csv"
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    data = FolderImages(str(root), manifest=str(table))
    return [Path(file).relative_to(root).as_posix() for file, _ in data.samples]


class TestUnderstood:
    @pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16"])
    @pytest.mark.parametrize("separator", [",", ";", "\t"])
    @pytest.mark.parametrize("ending", ["\n", "\r\n"])
    def test_a_table_of_any_spreadsheet(self, root, codec, separator, ending):
        text = write(ROWS, separator).replace("\n", ending)
        assert read(root, text.encode(codec)) == FILES

    @pytest.mark.parametrize("yes", ["1", "1.0", "True", "TRUE", "true", " 1 "])
    @pytest.mark.parametrize("no", ["0", "0.0", "False", "FALSE", "false"])
    def test_what_is_kept(self, root, yes, no):
        rows = [[*row[:4], yes if n % 2 else no] for n, row in enumerate(ROWS)]
        assert read(root, write(rows)) == FILES[1::2]

    @pytest.mark.parametrize("kind", [bool, float, int, str])
    def test_what_pandas_writes(self, root, kind):
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame(ROWS, columns=COLUMNS)
        frame["kept"] = frame["kept"].astype(kind)
        frame.loc[2, "group"] = None  # makes floats of the others
        assert read(root, frame.to_csv(index=False)) == FILES
        assert read(root, frame.to_csv()) == FILES

    @pytest.mark.parametrize(
        "spell", ["./{}", "{}", ".//{}", "././{}", " {} "], ids=lambda spell: repr(spell)
    )
    def test_spellings_of_a_path(self, root, spell):
        rows = [[spell.format(row[0]), *row[1:]] for row in ROWS]
        assert read(root, write(rows)) == FILES
        rows = [[row[0].replace("/", "\\"), *row[1:]] for row in ROWS]
        assert read(root, write(rows)) == FILES
        rows = [[row[0].replace("/", "//"), *row[1:]] for row in ROWS]
        assert read(root, write(rows)) == FILES

    def test_names_of_columns_in_capitals(self, root):
        assert read(root, write(ROWS).replace("file,split", "File, SPLIT")) == FILES

    @pytest.mark.parametrize("none", ["", "nan", "NaN", "NA", "None", "<NA>", "null"])
    def test_images_without_a_group_are_groups_of_their_own(self, root, none):
        table = root / "manifest.csv"
        table.write_text("file,group\n" + "".join(f"{file},{none}\n" for file in FILES))
        assert read_groups(table, FILES) == {}
        rows = [[*row[:3], none, 1] for row in ROWS]
        (root.parent / "split.csv").write_text(write(rows))
        parts = [
            FolderImages(
                str(root), manifest=str(root.parent / "split.csv"), part=part, holdout=0.34
            )
            for part in ("train", "validation")
        ]
        assert [part.targets for part in parts] == [[0, 0, 1, 1], [0, 1]]

    def test_a_class_may_be_called_none(self, root):
        rows = [[row[0], "Training", "none", 0, 1] for row in ROWS]
        (root.parent / "split.csv").write_text(write(rows))
        kept = read_kept(str(root.parent / "split.csv"), root, "Training")
        assert {row["class"] for row in kept} == {"none"}

    def test_groups_by_all_spellings(self, root):
        table = root / "manifest.csv"
        spelt = [
            FILES[0],
            f"./{FILES[1]}",
            FILES[2].replace("/", "\\"),
            f"./{FILES[3]}",
            "dog//1.png",
        ]
        table.write_text("file,group\n" + "".join(f"{f},{n}\n" for n, f in enumerate(spelt)))
        expected = {file: str(n) for n, file in enumerate(FILES[:5])}
        assert read_groups(table, FILES) == expected

    def test_the_log_tells_how_many_images_have_no_group(self, root, caplog):
        table = root / "manifest.csv"
        table.write_text(f"file,group\n{FILES[0]},1\n{FILES[3]},2\nelsewhere/1.png,3\n")
        FolderImages(str(root), split="", part="train", holdout=0.34)
        assert "no group of 4 of 6 images" in caplog.text


# What is wrong with a table, its rows after the first six, and a part of what is said.
TWICE = {
    "the same row": ([ROWS[0]], r"each file once, got 'cat/0\.png' in lines 2 and 8"),
    "in two classes": ([[FILES[0], "Training", "dog", 0, 1]], "each file once"),
    "in two splits": ([[FILES[0], "Testing", "cat", 0, 1]], "each file once"),
    "kept and not": ([[FILES[0], "Training", "cat", 0, 0]], "each file once"),
    "as ./": ([[f"./{FILES[0]}", "Training", "cat", 0, 1]], "each file once"),
    "as //": ([["cat//0.png", "Training", "cat", 0, 1]], "each file once"),
    "with backslashes": ([["cat\\0.png", "Training", "cat", 0, 1]], "each file once"),
    "by a link": ([["link.png", "Training", "cat", 0, 1]], "each file once"),
    "by another name": ([["hard.png", "Training", "cat", 0, 1]], "each file once"),
    "through a linked folder": ([["pets/0.png", "Training", "cat", 0, 1]], "each file once"),
}
WRONG = {
    "an unknown word": ([["link.png", "Training", "cat", 0, "maybe"]], r"line 8: kept: .*'maybe'"),
    "2": ([["link.png", "Training", "cat", 0, "2"]], "expected 1 or 0, got '2'"),
    "nothing": ([["link.png", "Training", "cat", 0, ""]], "expected 1 or 0, got ''"),
    "no file": ([["", "Training", "cat", 0, 1]], "line 8: expected a file, got an empty cell"),
    "nan for a file": ([["nan", "Training", "cat", 0, 1]], "expected a file, got an empty cell"),
    "no split": ([["link.png", "", "cat", 0, 1]], "expected a split, got an empty cell"),
    "no class": ([["link.png", "Training", "nan", 0, 1]], "expected a class, got an empty cell"),
    "a short row": ([["link.png", "Training"]], "5 values in each line, got 2 in line 8"),
    "a long row": ([["link.png", "Training", "cat", 0, 1, 1]], "got 6 in line 8"),
    "classes by case": ([["new.png", "Training", "Cat", 0, 1]], r"\['Cat', 'cat'\]"),
    "a path above": ([["../set/new.png", "Training", "cat", 0, 1]], "a path below"),
    "an absolute path": ([["/etc/new.png", "Training", "cat", 0, 1]], "a path below"),
}


@pytest.mark.parametrize("what", [*TWICE, *WRONG])
def test_a_row_that_is_not_right_is_refused_by_its_line(root, what):
    rows, words = (TWICE | WRONG)[what]
    (root / "link.png").symlink_to(root / FILES[0])
    os.link(root / FILES[0], root / "hard.png")
    (root / "pets").symlink_to("cat")
    (root / "new.png").write_bytes((root / FILES[0]).read_bytes())
    with pytest.raises(ValueError, match=words):
        read(root, write([*ROWS, *rows]))
    assert read(root, write(ROWS)) == FILES


class TestRefused:
    @pytest.mark.parametrize("codec", ["latin-1", "cp1252", "cp437", "utf-16-le", "utf-32"])
    def test_other_codecs(self, root, codec):
        rows = [*ROWS[:2], ["cat/\u00e9.png", "Training", "cat", 0, 1]]
        with pytest.raises(ValueError, match=r"split\.csv: expected text in UTF-8, got") as caught:
            read(root, write(rows).encode(codec))
        assert "Save it as CSV in UTF-8" in str(caught.value)
        assert not isinstance(caught.value, UnicodeDecodeError)

    def test_the_line_of_a_byte_is_told(self, tmp_path):
        (tmp_path / "m.csv").write_bytes(b"file,group\na,1\n\xe9,2\n")
        with pytest.raises(ValueError, match=r"got byte b'\\xe9' in line 3"):
            read_table(tmp_path / "m.csv")

    @pytest.mark.parametrize("missing", COLUMNS)
    def test_columns_that_are_missing(self, root, missing):
        keep = [k for k, name in enumerate(COLUMNS) if name != missing]
        text = "\n".join(",".join(str(row[k]) for k in keep) for row in [COLUMNS, *ROWS])
        with pytest.raises(ValueError, match=rf"none of \['{missing}'\]"):
            read(root, text)

    def test_a_column_that_is_there_twice(self, root):
        with pytest.raises(ValueError, match=r"different names, got \['group'\] twice"):
            read(root, write(ROWS).replace("class,", "group,"))

    def test_groups_without_a_column_of_files(self, tmp_path):
        (tmp_path / "m.csv").write_text("path,group\na.png,1\n")
        with pytest.raises(ValueError, match=r"column file beside group, got \['path', 'group'\]"):
            read_groups(tmp_path / "m.csv", ["a.png"])

    @pytest.mark.parametrize(
        "second", ["cat/0.png", "./cat/0.png", "cat//0.png", "cat\\0.png", "0.png"]
    )
    def test_a_file_in_two_groups_under_any_spelling(self, tmp_path, second):
        (tmp_path / "m.csv").write_text(f"file,group\ncat/0.png,1\n{second},2\n")
        with pytest.raises(ValueError, match="one group for a file, got '1' and '2' for"):
            read_groups(tmp_path / "m.csv", ["cat/0.png"])
        (tmp_path / "m.csv").write_text(f"file,group\ncat/0.png,1\n{second},1\n")
        assert read_groups(tmp_path / "m.csv", ["cat/0.png"]) == {"cat/0.png": "1"}

    def test_the_check_of_data_says_so_too(self, root, tmp_path):
        table = tmp_path / "who.csv"
        table.write_bytes(b"file,patient\ncat/0.png,\xe9\n")
        with pytest.raises(ValueError, match=r"who\.csv: expected text in UTF-8"):
            check_data(root, tmp_path / "out", group_by="patient", manifest=table)


def test_damaged_tables_are_read_alike_or_refused_by_name(root):
    """Any byte replaced or cut: the same files, fewer of them by a row, or an error in words."""
    rng, content = np.random.default_rng(0), write(ROWS).encode()
    refused = 0
    for _ in range(150):
        place, byte = int(rng.integers(len(content))), bytes(rng.integers(0, 256, 1, np.uint8))
        damaged = content[:place] + (byte + content[place + 1 :] if rng.random() < 0.7 else b"")
        try:
            assert set(read(root, damaged)) <= set(FILES)
        except (ValueError, FileNotFoundError) as error:
            assert ": expected " in str(error)  # noqa: PT017
            refused += 1
    assert refused > 50


def test_a_group_in_two_splits_is_said(root, tmp_path, caplog):
    rows = [[*row[:3], "p", row[4]] for row in ROWS]
    rows[0][1] = "Testing"
    (tmp_path / "m.csv").write_text(write(rows))
    read_kept(str(tmp_path / "m.csv"), root, "Training")
    assert "1 groups are in more than one split, such as 'p' in Testing and Training" in caplog.text


def test_a_table_that_keeps_nothing_is_refused(root, tmp_path):
    (tmp_path / "m.csv").write_text(write([[*row[:4], 0] for row in ROWS]))
    with pytest.raises(ValueError, match="expected rows that are kept, got none"):
        read_kept(str(tmp_path / "m.csv"), root, "Training")
