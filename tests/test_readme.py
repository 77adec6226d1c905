"""What the README shows runs, and the files that it names are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_lines_of_python_run():
    for block in blocks("python"):
        scope: dict = {}
        exec(block, scope)
        student = scope["student"]
        assert all(p.grad is not None for p in student.conv_stem.parameters())


def test_the_lines_to_add_are_those_of_the_config_it_links():
    link = re.search(r"\(the whole file\)|\[the whole file\]\((.*?)\)", README)
    assert link is not None
    config = (ROOT / link.group(1)).read_text(encoding="utf-8")
    marked = [line.replace("# +", "").split() for line in config.splitlines() if "# +" in line]
    (diff,) = blocks("diff")
    added = [line[1:].split() for line in diff.splitlines() if line.startswith("+")]
    assert added == marked


@pytest.mark.parametrize("page", ["README.md", "torchdistill_configs/README.md"])
def test_links_lead_to_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target


def test_make_targets_it_names_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
