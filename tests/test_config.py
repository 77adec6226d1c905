"""Overrides on the text of a config, before torchdistill reads any tag."""

import textwrap
from pathlib import Path

import pytest
import yaml

from kd_lrp_plugin.config import only_sections, resolve_config

SHIPPED = Path(__file__).resolve().parent.parent / "torchdistill_configs"
TEXT = """
    size: &size 64
    data:
      &train phantom/train: !import_call
        key: some.place
        init: {kwargs: {image_size: *size, split: train}}
    loaders:
      train: {dataset_id: *train, kwargs: &kwargs {batch_size: 32, workers: 2}}
      test: {kwargs: *kwargs}
    taps: [blocks.2, blocks.4]
    stages:
      - {lr: 0.1}
      - {lr: 0.01}
    note: "tägliche Übung"
    nothing:
"""


class Reader(yaml.FullLoader):
    """Reads a tag as the pair of its name and content, and calls nothing."""


Reader.add_multi_constructor(
    "!", lambda loader, name, node: (name, loader.construct_mapping(node, deep=True))
)


def read(text: str) -> dict:
    return yaml.load(text, Loader=Reader)


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(textwrap.dedent(TEXT), encoding="utf-8")
    return path


def resolved(config: Path, *overrides: str) -> dict:
    return read(resolve_config(config, overrides))


def kwargs_of_data(config: dict) -> dict:
    tag, entry = config["data"]["phantom/train"]
    assert tag == "import_call"
    return entry["init"]["kwargs"]


def test_without_overrides_nothing_changes(config):
    assert resolved(config) == read(config.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted(SHIPPED.rglob("*.yaml")), ids=lambda path: path.stem)
def test_resolved_text_of_a_shipped_config_reads_the_same_with_its_tags(path, tmp_path):
    text = resolve_config(path)
    assert read(text) == read(path.read_text(encoding="utf-8"))
    again = tmp_path / "config.yaml"
    again.write_text(text, encoding="utf-8")
    assert resolve_config(again) == text


@pytest.mark.parametrize(
    ("value", "read_as"),
    [
        ("8", 8),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("", None),
        ("'8'", "8"),
        ("[1, two]", [1, "two"]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
        ("a=b", "a=b"),
    ],
)
def test_a_value_is_read_as_yaml(config, value, read_as):
    assert resolved(config, f"note={value}")["note"] == read_as


def test_a_key_below_a_tag_changes_and_its_tag_stays(config):
    changed = resolved(config, "data.phantom/train.init.kwargs.split=val")
    assert kwargs_of_data(changed) == {"image_size": 64, "split": "val"}


def test_a_value_may_carry_a_tag(config):
    assert resolved(config, "note=!import_get {key: a.b}")["note"] == ("import_get", {"key": "a.b"})


def test_a_number_picks_a_list_item(config):
    changed = resolved(config, "taps.1=blocks.5", "stages.0.lr=1.0")
    assert changed["taps"] == ["blocks.2", "blocks.5"]
    assert changed["stages"] == [{"lr": 1.0}, {"lr": 0.01}]


def test_an_anchored_value_changes_wherever_it_is_used(config):
    changed = resolved(config, "size=32")
    assert changed["size"] == kwargs_of_data(changed)["image_size"] == 32


def test_an_alias_changes_its_anchor_too(config):
    changed = resolved(config, "loaders.test.kwargs.batch_size=4")
    assert changed["loaders"]["train"]["kwargs"] == {"batch_size": 4, "workers": 2}
    changed = resolved(config, "loaders.test.kwargs={batch_size: 4}")
    assert changed["loaders"]["train"]["kwargs"] == {"batch_size": 4}


def test_an_anchored_key_still_names_what_was_replaced(config):
    changed = resolved(config, "data.phantom/train=5")
    assert changed["data"] == {changed["loaders"]["train"]["dataset_id"]: 5}


def test_overrides_apply_in_their_order(config):
    assert resolved(config, "size=1", "size=2")["size"] == 2


def test_a_plus_adds_a_key_or_replaces_one(config):
    changed = resolved(config, "+stages.0.momentum=0.9", "+size=16")
    assert changed["stages"][0] == {"lr": 0.1, "momentum": 0.9}
    assert changed["size"] == 16


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("sise=3", "size"),
        ("loaders.tain.kwargs=3", "train"),
        ("loaders.train.kwargs.batchsize=3", "batch_size"),
        ("+loader.train.new=3", "loaders"),
    ],
)
def test_an_unknown_key_is_answered_with_the_near_one(config, override, near):
    with pytest.raises(ValueError, match=rf"--set .*Did you mean .*'{near}'"):
        resolve_config(config, [override])


@pytest.mark.parametrize("override", ["taps.2=x", "+taps.2=x", "taps.first=x"])
def test_a_list_item_that_is_not_there_is_refused(config, override):
    with pytest.raises(ValueError, match=r"expected one of \['0', '1'\]"):
        resolve_config(config, [override])


def test_a_key_below_a_plain_value_is_refused(config):
    with pytest.raises(ValueError, match=r"--set size\.side: expected keys on the way, got '64'"):
        resolve_config(config, ["size.side=3"])


def test_an_override_without_a_value_is_refused(config):
    with pytest.raises(ValueError, match=r"--set: expected key=value, got 'size'"):
        resolve_config(config, ["size"])


def test_a_value_that_is_not_yaml_names_its_override(config):
    with pytest.raises(ValueError, match="--set note: expected YAML"):
        resolve_config(config, ["note={a: "])


def test_text_that_is_not_yaml_names_file_and_line(config):
    config.write_text("a: 1\nb: [1, 2\nc: 3\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.yaml: expected YAML, got (.|\n)*line 3"):
        resolve_config(config)


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="config: expected a file, got none at"):
        resolve_config(tmp_path / name)


def test_only_the_sections_asked_for_remain_with_their_aliases(config):
    text = only_sections(resolve_config(config), ("loaders", "data"))
    kept = read(text)
    assert set(kept) == {"loaders", "data"}
    assert kwargs_of_data(kept)["image_size"] == 64
    assert kept["loaders"]["train"]["dataset_id"] == "phantom/train"
