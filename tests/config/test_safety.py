"""What --safe lets through names no code but what is known as harmless, whatever tags make it."""

import importlib
import random
from pathlib import Path

import pytest
from torchdistill.common import main_util

from kd_lrp_plugin.config.build import construct
from kd_lrp_plugin.config.document import parse_document
from kd_lrp_plugin.config.safety import HARMLESS, unsafe_tags

REFUSED = [
    'models: {model: {key: net, repo_or_dir: !abspath "", kwargs: {}}}',
    "models: {model: {key: net, repo_or_dir: !expanduser '~', kwargs: {}}}",
    "models: {model: {key: net, repo_or_dir: !join [a, b], kwargs: {}}}",
    "models: {model: {key: net, repo_or_dir: !import_get {key: torch.tensor}, kwargs: {}}}",
    "dependencies: [!join [evil, mod]]",
    "dependencies: !join [evil, mod]",
    "dependencies: [!join []]",
    "dependencies: {evilmod: kd_lrp_plugin.torchdistill}",
    "dependencies: [{name: evilmod}]",
    "dependencies: [{name: .mod, package: evil}]",
    "dependencies: [[.mod, kd_lrp_plugin.torchdistill]]",
    "dependencies: [!pathjoin [evilmod]]",
    "dependencies: [!abspath kd_lrp_plugin.torchdistill]",
    "train: !import_call {key: !join [os., system], init: {args: [ls]}}",
    "train: !import_get {package: !join [o, s], key: system}",
    "train: !import_get {package: torch, key: !abspath tensor}",
]
TAKEN = [
    "dependencies: [kd_lrp_plugin.torchdistill]",
    "dependencies: kd_lrp_plugin.torchdistill",
    "dependencies:",
    "dependencies: [!join [kd_lrp_plugin, .torchdistill]]",
    "dependencies: [{name: kd_lrp_plugin.torchdistill}]",
    "models: {model: {key: net, repo_or_dir: null, kwargs: {}}}",
    "models: {model: {key: net, repo_or_dir: false, kwargs: {}}}",
    "models: {model: {key: net, src_ckpt: !join [a, b], kwargs: {}}}",
    "train: !import_get {package: torch, key: !join [ten, sor]}",
]


@pytest.mark.parametrize("text", REFUSED)
def test_a_value_that_names_code_is_refused(text):
    (problem, *_) = unsafe_tags(parse_document("my.yaml", text))
    assert problem.startswith("my.yaml:1: expected calls known as harmless, got ")


@pytest.mark.parametrize("text", TAKEN)
def test_what_is_harmless_by_its_value_is_taken(text):
    assert unsafe_tags(parse_document("my.yaml", text)) == []


NAMES = ["evilmod", "torch", "os.system", "kd_lrp_plugin.torchdistill", "torch.tensor", "", "null"]


def draw(rng: random.Random, depth: int) -> str:
    """A piece of YAML of texts, lists, mappings and tags, as flow."""
    kind = rng.randrange(9 if depth else 2)
    if kind < 2:
        return rng.choice([*NAMES, "3", "false", '""', "~"]) or '""'
    parts = [draw(rng, depth - 1) for _ in range(rng.randrange(3))]
    if kind == 2:
        return f"[{', '.join(parts)}]"
    if kind == 3:
        keys = rng.sample(["name", "package", "key", "repo_or_dir", "evilmod"], len(parts))
        return f"{{{', '.join(f'{k}: {p}' for k, p in zip(keys, parts, strict=True))}}}"
    if kind in (4, 5):
        return f"!{rng.choice(['join', 'pathjoin'])} [{', '.join(parts)}]"
    if kind == 6:
        return f"!{rng.choice(['abspath', 'expanduser'])} {rng.choice(NAMES) or chr(34) * 2}"
    package = f"package: {draw(rng, 0)}, " if rng.random() < 0.5 else ""
    tag = "import_get" if kind == 7 else "import_call"
    return f"!{tag} {{{package}key: {draw(rng, depth - 1)}}}"


def test_nothing_that_is_taken_imports_or_loads_what_is_not_harmless(monkeypatch):
    imported: list[str] = []
    real = importlib.import_module

    def watch(name, package=None):
        imported.append(name if package is None else f"{package} {name}")
        return real(name, package)

    monkeypatch.setattr(main_util, "import_module", watch)
    monkeypatch.setitem(HARMLESS, "os", ("getcwd",))  # one that can be called without arguments
    rng, taken = random.Random(0), 0
    for _ in range(1500):
        sections = {"dependencies": draw(rng, 2), "train": draw(rng, 3)}
        hub = draw(rng, 2)
        text = "".join(f"{name}: {value}\n" for name, value in sections.items())
        text += f"models: {{model: {{key: net, repo_or_dir: {hub}}}}}\n"
        try:
            config = parse_document("my.yaml", text)
        except ValueError:
            continue
        if unsafe_tags(config):
            continue
        taken += 1
        imported.clear()
        try:
            content = construct(config)
        except Exception:
            content = {}
        assert set(imported) <= set(HARMLESS), text
        assert not (content.get("models") or {"model": {}})["model"].get("repo_or_dir"), text
    assert taken > 50


def test_a_module_beside_the_config_is_found_but_hides_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [path for path in __import__("sys").path if path])
    (tmp_path / "own").mkdir()
    (tmp_path / "own/beside_the_config.py").write_text("VALUE = 7\n")
    (tmp_path / "own/yaml.py").write_text("raise RuntimeError\n")
    (tmp_path / "in_the_directory.py").write_text("VALUE = 8\n")
    monkeypatch.chdir(tmp_path)
    text = "dependencies: [beside_the_config, in_the_directory, yaml]\n"
    text += "train: !import_get {key: beside_the_config.VALUE}\n"
    Path("own/my.yaml").write_text(text)
    content = construct(parse_document("own/my.yaml", text))
    assert content["train"] == 7
    assert len(unsafe_tags(parse_document("own/my.yaml", text))) == 4
