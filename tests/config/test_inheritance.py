"""Configs that begin with others: what is merged, what is replaced, where each value stands."""

from pathlib import Path

import pytest
import yaml

from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.config.inheritance import list_bases

BASE = """
size: &size 64
datasets:
  &train_set images/train: &train !import_call
    key: make
    init: {kwargs: {size: *size, split: train}}
train:
  epochs: &epochs 8
  loader: {dataset_id: *train_set, sizes: [1, 2]}
  scheduler: {key: OneCycleLR, kwargs: {total_steps: *epochs, size: *size}}
"""


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    write("_base.yaml", BASE)
    return write


def read(file: Path, *overrides: str) -> dict:
    """Values, tags unread; from the text as a run keeps it, so that this is flat."""
    text = resolve_config(file, overrides).text
    assert "_base_" not in text
    flat = file.with_name("flat.yaml")
    flat.write_text(text)
    return resolve_config(flat).values


def test_without_changes_it_is_the_base(write):
    alone = read(write("a.yaml", "_base_: _base.yaml"))
    assert alone == resolve_config(write("b.yaml", BASE)).values


def test_mappings_are_merged_and_all_else_is_replaced(write):
    found = read(
        write(
            "method/a.yaml",
            """
_base_: ../_base.yaml
models: {student: small}
train:
  loader: {sizes: [3]}
  scheduler: {kwargs: {pct_start: 0.1}}
datasets: {images/train: {init: {kwargs: {split: val}}}}
""",
        )
    )
    assert found["models"] == {"student": "small"}
    assert found["train"]["loader"] == {"dataset_id": "images/train", "sizes": [3]}
    kwargs = found["train"]["scheduler"]["kwargs"]
    assert kwargs == {"total_steps": 8, "size": 64, "pct_start": 0.1}
    assert found["datasets"]["images/train"] == {
        "key": "make",
        "init": {"kwargs": {"size": 64, "split": "val"}},
    }


def test_a_tag_stays_where_a_mapping_is_merged_into_it(write):
    file = write("a.yaml", "_base_: _base.yaml\ndatasets: {images/train: {key: other}}")
    assert "!import_call" in resolve_config(file).text


def test_what_is_changed_changes_wherever_it_is_used(write):
    file = write("a.yaml", "_base_: _base.yaml\nsize: 96\ntrain: {epochs: 3}")
    for overrides, size, epochs in (((), 96, 3), (("size=48", "train.epochs=5"), 48, 5)):
        found = read(file, *overrides)
        assert found["size"] == size
        assert found["datasets"]["images/train"]["init"]["kwargs"]["size"] == size
        assert found["train"]["scheduler"]["kwargs"] == {"total_steps": epochs, "size": size}


def test_the_name_of_a_data_set_stays_when_another_is_used(write):
    file = write(
        "a.yaml",
        """
_base_: _base.yaml
datasets: {marked: !import_call {key: mark, init: {kwargs: {images: *train}}}}
train: {loader: {dataset_id: marked}}
""",
    )
    found = read(file, "datasets.images/train.init.kwargs.split=few")
    assert list(found["datasets"]) == ["images/train", "marked"]
    assert found["train"]["loader"]["dataset_id"] == "marked"
    images = found["datasets"]["marked"]["init"]["kwargs"]["images"]
    assert images == found["datasets"]["images/train"]
    assert images["init"]["kwargs"]["split"] == "few"


def test_aliases_name_anchors_of_the_base_in_the_childs_own_values(write):
    file = write("a.yaml", "_base_: _base.yaml\nsize: &mine 32\nother: [*size, *mine, *epochs]")
    assert read(file)["other"] == [32, 32, 8]
    assert read(file, "size=7")["other"] == [7, 7, 8]


def test_replace_takes_the_place_of_a_mapping(write):
    file = write(
        "a.yaml",
        "_base_: _base.yaml\ntrain: {scheduler: !replace {key: StepLR}}\nb: !replace {c: 1}",
    )
    assert read(file)["train"]["scheduler"] == {"key": "StepLR"}
    assert read(file)["b"] == {"c": 1}


def test_bases_have_bases_and_later_ones_of_a_list_win(write):
    write("middle.yaml", "_base_: _base.yaml\nsize: 1\nmiddle: True")
    write("other.yaml", "size: 2\nmore: &more [4]")
    file = write("a.yaml", "_base_: [middle.yaml, other.yaml]\nlast: *more")
    found = read(file)
    assert (found["size"], found["middle"], found["last"]) == (2, True, [4])
    assert found["train"]["scheduler"]["kwargs"]["size"] == 2
    names = [path.name for path in list_bases(file)]
    assert names == ["_base.yaml", "middle.yaml", "other.yaml"]


def test_each_value_stands_where_it_is_written(write):
    config = resolve_config(write("of/a.yaml", "_base_: ../_base.yaml\ntrain:\n  epochs: 3"))
    assert config.get_location("train.epochs").endswith("a.yaml:3")
    base = str(Path(config.path).parents[1] / "_base.yaml")
    assert config.get_location("train.loader.sizes") == f"{base}:9"


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("_base_: nowhere.yaml", FileNotFoundError, r"a.yaml:1: _base_: .* none at .*nowhere.yaml"),
        ("_base_: a.yaml", ValueError, "a circle: .*a.yaml -> .*a.yaml"),
        ("_base_: {a: 1}", ValueError, "a.yaml:1: _base_: expected a path or paths"),
        ("_base_: []", ValueError, "a path or paths"),
        ("_base_: 3", ValueError, "a path or paths"),
        ("_base_: _base.yaml\na: *nothing", ValueError, "undefined alias 'nothing'"),
        ("_base_: _base.yaml\na: !replace 3", ValueError, "a.yaml:2: !replace: expected a mapping"),
        ("_base_: list.yaml", ValueError, "list.yaml: expected a mapping of sections"),
        ("_base_: _base.yaml\na: 1\na: 2", ValueError, "each key once"),
    ],
)
def test_mistakes_are_named(write, text, error, match):
    write("list.yaml", "[1]")
    with pytest.raises(error, match=match):
        resolve_config(write("a.yaml", text))


def test_a_circle_of_several_files_is_named(write):
    write("b.yaml", "_base_: a.yaml")
    with pytest.raises(ValueError, match=r"a circle: .*a.yaml -> .*b.yaml -> .*a.yaml"):
        resolve_config(write("a.yaml", "_base_: b.yaml"))


def test_text_that_only_mentions_a_base_has_none(write):
    file = write("a.yaml", "note: no _base_ here")
    assert yaml.safe_load(resolve_config(file).text) == {"note": "no _base_ here"}
