"""A config before its tags are read: keys that are given twice, and where a wrong key is meant."""

import pytest
from small_runs import CONFIGS
from torchdistill.common.yaml_util import load_yaml_file

from kd_lrp_plugin.config.document import parse_document, resolve_config

ALL = sorted(p for p in CONFIGS.rglob("[!_]*.yaml") if p.parent.name not in ("studies",))


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        ("train: {a: 1}\ntest: {}\ntrain: {}\n", 1, 3),
        ("train:\n  lr: 1\n  'lr': 2\n", 2, 3),
        ("train:\n  yes: 1\n  true: 2\n", 2, 3),
        ("train:\n  1: 1\n  1.0: 2\n", 2, 3),
        ("train:\n  - [{deep: {x: 1,\n  x: 2}}]\n", 2, 3),
        ("a: &a {x: 1}\nb: &b {y: 1}\nc:\n  <<: *a\n  <<: *b\n", 4, 5),
    ],
)
def test_a_key_given_twice_is_refused_with_both_locations(text, first, second):
    with pytest.raises(ValueError, match="each key once in a mapping") as caught:
        parse_document("my.yaml", text)
    assert f"at my.yaml:{first} and my.yaml:{second}." in str(caught.value)


def test_an_override_with_a_key_twice_is_refused():
    with pytest.raises(ValueError, match="each key once"):
        resolve_config(ALL[0], ["train={a: 1, a: 2}"])


@pytest.mark.parametrize("text", ["a: {x: 1}\nb: {x: 1}\n", "a: &a {x: 1}\nb: {<<: *a, x: 2}\n"])
def test_a_key_in_two_mappings_is_none_given_twice(text):
    assert parse_document("my.yaml", text).values["b"]["x"] in (1, 2)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("!join [a, 1, .5]", "a10.5"),
        ("!join []", ""),
        ("!pathjoin [a, b]", "a/b"),
        ("!pathjoin []", None),
        ("!join [a, !pathjoin [b, c]]", "ab/c"),
        ("!pathjoin [runs, !join [a, b], best.pt]", "runs/ab/best.pt"),
        ("!join [a, !env X]", None),
        ("!join [a, [!pathjoin [b, !env X]]]", None),
        ("!expanduser data", "data"),
        ("!expanduser [data]", None),
        ("!join a", None),
    ],
)
def test_text_is_made_as_torchdistill_makes_it_or_is_not_known(text, value, tmp_path):
    assert parse_document("my.yaml", f"a: {text}").values["a"] == value
    if value is not None:
        (tmp_path / "my.yaml").write_text(f"a: {text}")
        assert load_yaml_file(tmp_path / "my.yaml")["a"] == value


def test_values_do_not_change_the_text():
    document = parse_document("my.yaml", "a: &a {x: 1}\nb: {<<: *a, y: 2}\n")
    before = document.text
    assert document.values["b"] == {"x": 1, "y": 2}
    assert document.text == before


@pytest.mark.parametrize("config", ALL, ids=lambda p: "-".join(p.parts[-3:]))
def test_a_key_that_stands_further_down_is_suggested_with_its_path(config):
    with pytest.raises(ValueError, match="--set num_epochs") as caught:
        resolve_config(config, ["num_epochs=2"])
    staged = "stage1" in resolve_config(config).values["train"]
    below = "train.stage1.num_epochs" if staged else "train.num_epochs"
    assert f"'{below}'" in str(caught.value)
    assert "num_workers" not in str(caught.value)
