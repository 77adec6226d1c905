"""``kd-lrp configs``, and where the example configs lie."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from kd_lrp_plugin.cli.console import Overrides, errors_in_words, say
from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.config.inheritance import list_bases
from kd_lrp_plugin.plots import tables
from kd_lrp_plugin.utils.files import put
from kd_lrp_plugin.utils.registry import unknown_name
from kd_lrp_plugin.utils.validation import message


def find_configs() -> dict[str, Path]:
    """The example configs and studies, by their path without ending, such as ``phantom/ce/...``.

    A wheel holds them inside the package; a checkout, an editable install too, beside it.

    Raises:
        FileNotFoundError: if they are in neither folder.
    """
    package = Path(__file__).resolve().parents[1]
    folders = [package / "configs", package.parent / "torchdistill_configs"]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        fix = "Install the package again."
        raise FileNotFoundError(message("configs", "the example configs", "none", fix))
    # What begins with an underscore is no config, but what several of them begin with.
    files = sorted(file for file in folder.rglob("*.yaml") if not file.name.startswith("_"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def read_question(file: Path) -> str:
    """What the first lines of a config say that it answers."""
    head = file.read_text(encoding="utf-8")[:2000]
    found = re.search(r"^# Question: (.+)$", head, re.MULTILINE)
    return found.group(1) if found else ""


def complete_config(incomplete: str) -> list[str]:
    found = find_configs()
    folders = {"/".join(name.split("/")[:n]) for name in found for n in (1, 2)}
    return sorted(name for name in {*found, *folders} if name.startswith(incomplete))


def configs(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="A config, or a folder of them such as phantom or phantom/kd; default: all.",
            autocompletion=complete_config,
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder to copy them to, as they are named; with --resolve a file."
        ),
    ] = None,
    resolve: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write this config out whole, with what it begins with."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """List the example configs and studies with their questions; copy them with --to.

    A file that is there already is never overwritten; what a config begins with (_base_) is copied,
    too. The commands that the configs quote work where they are copied to torchdistill_configs.
    With --resolve one config, yours or an example, becomes one flat file, such as torchdistill's
    own scripts read; its tags are not run. Examples:

        kd-lrp configs

        kd-lrp configs phantom/kd --to .

        kd-lrp configs phantom studies/phantom --to torchdistill_configs

        kd-lrp configs --resolve my.yaml --set batch_size=64 --to flat.yaml
    """
    with errors_in_words():
        if resolve is not None:
            if names:
                fix = "Leave one of them out."
                got = f"--resolve and {names}"
                raise ValueError(message("configs", "names, or --resolve", got, fix))
            text = resolve_config(resolve, overrides or ()).text
            if to is None:
                typer.echo(text, nl=False)
            else:
                _copy({to: text.encode()})
            return
        if overrides:
            fix = "Give --resolve FILE, or change the copy by hand."
            raise ValueError(message("configs", "no --set without --resolve", overrides, fix))
        found = find_configs()
        chosen = dict(found) if not names else {}
        for name in names or ():
            asked = name.strip("/").removesuffix(".yaml")
            below = {n: f for n, f in found.items() if n == asked or n.startswith(f"{asked}/")}
            if not below:
                folders = {"/".join(n.split("/")[:k]) for n in found for k in (1, 2)}
                raise ValueError(unknown_name("configs", name, sorted({*found, *folders})))
            chosen |= below
        if to is None:
            rows = [{"config": n, "question": read_question(f)} for n, f in chosen.items()]
            say(tables.table(rows))
            return
        files = {f"{name}.yaml": file for name, file in chosen.items()}
        for name, file in list(files.items()):
            for base in list_bases(file):
                files[os.path.normpath(Path(name).parent / os.path.relpath(base, file.parent))] = (
                    base
                )
        _copy({to / name: file.read_bytes() for name, file in files.items()})


def _copy(copies: Mapping[Path, bytes]) -> None:
    """Write files, none of which may be there with another content."""
    for target, content in copies.items():
        if target.exists() and (not target.is_file() or target.read_bytes() != content):
            fix = "Choose another --to, or move it away. Nothing was copied."
            got = f"{target}, which differs"
            raise FileExistsError(message("configs --to", "no file of this name", got, fix))
    for target, content in copies.items():
        if target.exists():
            say(f"is there already: {target}")
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        put(target, lambda draft, content=content: draft.write_bytes(content))  # type: ignore[misc]
        say(f"written: {target}")
