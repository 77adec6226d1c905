"""What the README shows runs, and the files, commands and options that it names are there."""

import re
import shlex
from functools import cache
from pathlib import Path

import preloaded
import pytest
from PIL import Image
from typer.testing import CliRunner

from kd_lrp_plugin.cli.main import app
from kd_lrp_plugin.config.document import parse_document

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "torchdistill_configs/README.md", "examples/README.md"]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Added to each command of a block that opens with ```sh run: the same in seconds.
SHORT = {
    "distill": "--device cpu --set image_size=32 --set batch_size=4 --set num_workers=0"
    " --set train.num_epochs=1",
    "explain": "--device cpu",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def split(text: str) -> list[str]:
    """The command lines of a block, without comments; continued lines are one."""
    lines = [re.sub(r"\s+#.*|^#.*", "", x) for x in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.strip()]


def commands(page: str) -> list[str]:
    """Those of shell blocks, and those among words in code type that begin as one does."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fenced = re.findall(r"^```sh[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`((?:OMP_NUM_THREADS|kd-lrp|make|pip|python|torchrun)[ =][^`]*)`", prose)
    return [*(line for block in fenced for line in split(block)), *inline]


@cache
def help_of(command: str) -> str:
    """The help of ``kd-lrp COMMAND``; fails where there is no such command."""
    environment = {"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}
    shown = CliRunner().invoke(app, [command, "--help"], env=environment)
    assert shown.exit_code == 0, shown.output
    return shown.output


def check_options(words: list[str], known: str) -> None:
    options = {word.strip("[]").split("=")[0] for word in words if word.strip("[").startswith("--")}
    for option in options:
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", known), option


def check_files(words: list[str]) -> None:
    """Paths into this repository, which begin with one of its folders, lead to something."""
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").replace("/", "").split()
    for word in words:
        first, *rest = word.strip("[]").split("/")
        if first in ignored:
            continue  # what commands before this one have made
        if rest and (ROOT / first).is_dir() and not re.search(r"[A-Z*{<]{2}|\.\.\.", word):
            assert (ROOT / word).exists(), word


CHECKED = [(page, line) for page in PAGES for line in commands(page)]


@pytest.mark.parametrize(("page", "line"), CHECKED, ids=[line for _, line in CHECKED])
def test_a_command_is_one_that_can_be_given(page, line):
    words = shlex.split(line)
    while words and re.match(r"[A-Z_]+=|export$", words[0]):
        words = words[1:]
    if not words:
        return  # sets a variable only
    check_files(words)
    program, *rest = words
    if program == "torchrun":
        module = rest.index("-m")
        assert rest[module + 1] == "kd_lrp_plugin.cli"
        program, rest = "kd-lrp", rest[module + 2 :]
    elif program == "python" and rest[:1] == ["-m"]:
        assert rest[1] in ("kd_lrp_plugin", "kd_lrp_plugin.cli", "venv"), line
        program, rest = ("kd-lrp", rest[2:]) if rest[1] != "venv" else ("cd", [])
    if program == "kd-lrp":
        if rest and not rest[0].startswith("-"):
            check_options(rest[1:], help_of(rest[0]))
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in rest:
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    elif program == "python":
        script = (ROOT / rest[0]).read_text(encoding="utf-8")
        check_options(rest[1:], script)
    elif program == "pip":
        about = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        extras = about.split("[project.optional-dependencies]")[1].split("\n[")[0]
        asked = re.findall(r"(?:^|[ '\"])(?:\.|kd-lrp-plugin)\[([\w,]+)\]", line)
        for extra in (name for found in asked for name in found.split(",")):
            assert re.search(rf"^{extra} = \[", extras, re.MULTILINE), extra
    else:
        assert program in ("cd", "git", "source"), f"{program}: teach this test the command"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Somebody's folder of images, of two classes, and nothing else."""
    for number in range(16):
        file = tmp_path / "images" / ("cat", "dog")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (15 * number, 90, 255 - 15 * number)).save(file)
    return tmp_path


@pytest.mark.parametrize("block", blocks("sh run"))
def test_a_block_to_be_run_runs(block, folder):
    """In order, in one folder: ``images/cat``, ``images/dog``, and what the lines before left."""
    for line in split(block):
        program, command, *words = shlex.split(line)
        assert program == "kd-lrp", f"{line}: only kd-lrp is run here"
        extra = SHORT.get(command, "").split()
        ran = preloaded.run("-m", "kd_lrp_plugin.cli", command, *words, *extra, cwd=folder)
        assert ran.returncode == 0, f"{line}\n{ran.stdout}\n{ran.stderr}"


def test_the_lines_of_python_run():
    for block in blocks("python"):
        scope: dict = {}
        exec(block, scope)
        student = scope["student"]
        assert all(p.grad is not None for p in student.conv_stem.parameters())


def test_the_lines_of_yaml_are_yaml():
    for block in blocks("yaml"):
        # An alias to something above the lines that are shown is their context, not their fault.
        assert parse_document("README.md", re.sub(r"\*(\w+)", r"\1", block)).values


def test_the_lines_to_add_are_those_of_the_config_it_links():
    link = re.search(r"\[the whole file\]\((.*?)\)", README)
    assert link is not None
    config = (ROOT / link.group(1)).read_text(encoding="utf-8")
    marked = [line.replace("# +", "").split() for line in config.splitlines() if "# +" in line]
    (diff,) = blocks("diff")
    added = [line[1:].split() for line in diff.splitlines() if line.startswith("+")]
    assert added == marked


@pytest.mark.parametrize("page", [*PAGES, "examples/results/README.md"])
def test_links_lead_to_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target
