"""``kd-lrp init``."""

from pathlib import Path
from typing import Annotated

import typer

from kd_lrp_plugin.cli.console import RichProgress, errors_in_words, say
from kd_lrp_plugin.utils.validation import message


def init(
    folder: Annotated[
        Path,
        typer.Argument(help="Images in FOLDER/CLASS/ or FOLDER/SPLIT/CLASS/, or with a table."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The project, a new folder; default FOLDER_project here.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="A name of timm, or local-dir:FOLDER of timm's.")
    ] = None,
    student: Annotated[str | None, typer.Option(help="The same of the student.")] = None,
    method: Annotated[
        str, typer.Option(help="What the student learns from: lrp_relative_l2, lrp_cosine or kd.")
    ] = "lrp_relative_l2",
    shortcut: Annotated[
        bool,
        typer.Option(
            "--shortcut", help="Keep the relevance term to the end, against a shortcut in the data."
        ),
    ] = False,
    pretrained: Annotated[
        bool,
        typer.Option("--pretrained", help="Begin with timm's weights, from its cache or its hub."),
    ] = False,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=FILE", help="Begin with a file: of teacher or student; repeatable."
        ),
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="CSV that lists the images, where folders do not.")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=NAME",
            help="Of the table, for file, label, split or patient; repeatable. Of class folders "
            "only patient, of FOLDER/manifest.csv.",
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(help="How many the values of 16-bit images have, such as 12; else all."),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A class folder, at any depth; once for each, if they lie deeper."
        ),
    ] = None,
) -> None:
    """From a folder of images to a project: configs, a study, and a README with the commands.

    Looks at classes, splits and sizes, runs the leak check, chooses image size, batch, epochs and
    class weights, and says why. Every config is built and takes a step before the folder appears;
    the commands in its README run as they are. Examples:

        kd-lrp init images

        kd-lrp init images --out project --student test_resnet --method lrp_cosine

        kd-lrp init slides --classes benign --classes tumour

        kd-lrp init mhist --table mhist/annotations.csv --column "label=Majority Vote Label"
    """
    with RichProgress(), errors_in_words("Nothing was written."):
        from kd_lrp_plugin.project.choices import Models
        from kd_lrp_plugin.project.create import Data, create_project, describe_leaks

        made = out if out is not None else Path(f"{folder.resolve().name}_project")
        asked = Models(
            teacher, student, method, shortcut, pretrained, _read_pairs("--weights", weights)
        )
        data = Data(folder, table, _read_pairs("--column", column), bits, classes or ())
        choices, summary = create_project(data, made, asked)
    for reason in choices.reasons:
        say(f"- {reason}")
    say(f"\n{describe_leaks(summary)}")
    say(f"\nwritten: {made}. What comes next is in {made / 'README.md'}")


def _read_pairs(option: str, given: list[str] | None) -> dict[str, str]:
    """Options such as ``label=Diagnosis``, by what stands before the sign."""
    found: dict[str, str] = {}
    for text in given or ():
        role, sign, value = text.partition("=")
        if not sign or not value.strip() or role in found:
            fix = "For example teacher=FILE, or label=NAME."
            raise ValueError(message(option, "ROLE=VALUE, each once", repr(text), fix))
        found[role] = value.strip()
    return found
