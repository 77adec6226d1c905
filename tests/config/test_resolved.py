"""What each example config says once it is written out whole; run as a script to note it down.

A change to a base changes every config that begins with it: here one sees which.
"""

import hashlib
import json
from pathlib import Path

import yaml
from small_runs import CONFIGS

from kd_lrp_plugin.config.document import resolve_config

NOTED = Path(__file__).with_name("resolved.json")


def digest(file: Path) -> str:
    """Of all values and tags, in whatever order and with whatever aliases they are written."""

    def plain(node: yaml.Node) -> list:
        if isinstance(node, yaml.MappingNode):
            return [node.tag, sorted([key.value, plain(value)] for key, value in node.value)]
        if isinstance(node, yaml.SequenceNode):
            return [node.tag, [plain(value) for value in node.value]]
        return [node.tag, node.value]

    text = json.dumps(plain(resolve_config(file).root))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digests() -> dict[str, str]:
    files = sorted(CONFIGS.glob("*/*/*.yaml"))
    return {file.relative_to(CONFIGS).as_posix(): digest(file) for file in files}


def test_every_config_resolves_to_what_was_noted():
    noted, found = json.loads(NOTED.read_text()), digests()
    changed = [name for name in sorted({*noted, *found}) if noted.get(name) != found.get(name)]
    assert changed == [], "if that is meant: PYTHONPATH=tests python tests/config/test_resolved.py"


def test_a_config_with_bases_says_what_it_said_in_one_file():
    config = CONFIGS / "phantom/lrp_cosine/test_resnet_from_resnet10t.yaml"
    assert "_base_" in config.read_text()
    assert digest(config) == digest(CONFIGS.parent / "tests/flat_config.yaml")


def test_the_digest_sees_values_and_not_their_form(tmp_path):
    forms = {
        "flow": "a: &x 1\nb: {c: *x, d: [2]}\n",
        "block": "b:\n  d:\n  - 2\n  c: 1\na: 1\n",
        "other value": "a: 1\nb: {c: 1, d: [3]}\n",
        "other tag": "a: 1\nb: !x {c: 1, d: [2]}\n",
    }
    found = []
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        found.append(digest(tmp_path / name))
    assert found[0] == found[1]
    assert len(set(found)) == 3


if __name__ == "__main__":
    NOTED.write_text(json.dumps(digests(), indent=1) + "\n")
