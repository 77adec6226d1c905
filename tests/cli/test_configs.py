"""The example configs come with the wheel, are listed and copied, and overwrite nothing."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from small_runs import CONFIGS
from typer.testing import CliRunner

from kd_lrp_plugin.cli.configs import find_configs, read_question
from kd_lrp_plugin.cli.main import app

ROOT = CONFIGS.parent
FILES = {
    file.relative_to(CONFIGS).with_suffix("").as_posix(): file
    for file in CONFIGS.rglob("[!_]*.yaml")
}


def call(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["configs", *map(str, words)])
    return result.exit_code, result.output


def test_lists_every_config_with_its_question():
    assert find_configs() == FILES
    code, out = call()
    assert code == 0
    for name, file in FILES.items():
        first = file.read_text(encoding="utf-8").splitlines()[0]
        assert first == f"# Question: {read_question(file)}"
        (line,) = [line for line in out.splitlines() if line.startswith(f"| {name} ")]
        assert read_question(file).replace("|", r"\|") in line


def test_copies_a_folder_as_it_is_named_and_a_second_time_says_so(tmp_path):
    code, out = call("phantom/kd", "studies/phantom.yaml", "--to", tmp_path)
    assert code == 0
    copied = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()]
    wanted = [f"{n}.yaml" for n in FILES if n.startswith("phantom/kd/")]
    wanted += ["studies/phantom.yaml", "phantom/_base.yaml", "phantom/_taught.yaml"]
    assert sorted(copied) == sorted(wanted)
    for name in wanted:
        assert (tmp_path / name).read_bytes() == (CONFIGS / name).read_bytes()
        assert f"written: {tmp_path / name}" in out
    code, out = call("phantom/kd", "--to", tmp_path)
    assert code == 0
    assert "is there already" in out
    assert "written" not in out


def test_overwrites_nothing_and_then_copies_nothing(tmp_path):
    own = tmp_path / "phantom/kd/test_resnet_from_resnet10t.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("my own\n")
    code, out = call("phantom", "--to", tmp_path)
    assert code == 1
    assert f"{own}, which differs" in out.replace("\n", "")
    assert own.read_text() == "my own\n"
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [own]


@pytest.mark.parametrize("name", ["phantom/kdd", "../setup", "nothing", ""])
def test_an_unknown_name_is_refused_with_the_nearest(name, tmp_path):
    code, out = call(name, "--to", tmp_path)
    assert code == 1
    assert f"got {name!r}" in out
    assert not list(tmp_path.iterdir())


def test_the_wheel_holds_them_where_the_command_looks(tmp_path):
    """Built without a network, by the setuptools that is there, and read as it is installed."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if names.returncode:
        pytest.skip("needs a checkout")
    for name in names.stdout.splitlines():
        if not name.startswith(("tests/", "examples/")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "-w", tmp_path, source], check=True, capture_output=True, cwd=tmp_path
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {f"kd_lrp_plugin/configs/{name}.yaml" for name in FILES} <= set(held)
    modules = [p.relative_to(ROOT).as_posix() for p in Path(ROOT, "kd_lrp_plugin").rglob("*.py")]
    assert {*modules, "kd_lrp_plugin/report/page.html", "kd_lrp_plugin/py.typed"} <= set(held)
    ran = subprocess.run(
        [sys.executable, "-m", "kd_lrp_plugin", "configs", "phantom/ce", "--to", "copied"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "copied/phantom/ce/resnet10t.yaml").is_file()


class TestBases:
    @pytest.fixture
    def configs(self, tmp_path, monkeypatch) -> Path:
        folder = tmp_path / "shipped"
        for name, text in {
            "_base.yaml": "size: &size 3\n",
            "one/_base.yaml": "_base_: ../_base.yaml\nmore: *size\n",
            "one/kd/a.yaml": "# Question: why?\n_base_: ../_base.yaml\nlast: [*size]\n",
        }.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        found = {"one/kd/a": folder / "one/kd/a.yaml"}
        monkeypatch.setattr("kd_lrp_plugin.cli.configs.find_configs", lambda: found)
        return folder

    def test_they_are_copied_too(self, configs, tmp_path):
        code, out = call("one/kd/a", "--to", tmp_path / "own")
        assert code == 0
        for file in configs.rglob("*.yaml"):
            copied = tmp_path / "own" / file.relative_to(configs)
            assert copied.read_bytes() == file.read_bytes()
            assert f"written: {copied}" in out.replace("\n", "")

    def test_a_config_is_written_out_whole(self, configs, tmp_path):
        file, flat = configs / "one/kd/a.yaml", tmp_path / "flat.yaml"
        code, out = call("--resolve", file, "--set", "size=4")
        assert code == 0
        assert yaml.safe_load(out) == {"size": 4, "more": 4, "last": [4]}
        assert call("--resolve", file, "--to", flat)[0] == 0
        assert yaml.safe_load(flat.read_text()) == {"size": 3, "more": 3, "last": [3]}
        code, out = call("--resolve", file, "--set", "size=4", "--to", flat)
        assert code == 1
        assert "which differs" in out.replace("\n", "")

    @pytest.mark.parametrize("words", [["one", "--resolve", "a.yaml"], ["one", "--set", "a=1"]])
    def test_what_does_not_go_together_is_refused(self, configs, words):
        code, out = call(*words)
        assert code == 1
        assert "configs: expected" in out
