"""``kd-lrp select``."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kd_lrp_plugin.cli.console import ConfigFile, Overrides, RichProgress, errors_in_words, say
from kd_lrp_plugin.config.document import Document, resolve_config
from kd_lrp_plugin.plots import tables
from kd_lrp_plugin.utils.files import read_json, write_text
from kd_lrp_plugin.utils.validation import message

if TYPE_CHECKING:
    from kd_lrp_plugin.selection import spec


def select(
    config: ConfigFile,
    overrides: Overrides = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="QUANTITY=VALUE",
            help="Such as params=2.5M, macs=300M or latency=20ms; repeatable. "
            "Instead of the config's, for a look: the choice on record stays.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes to share the work.", min=1)] = 1,
) -> None:
    """Rank the untrained students of a config whose student_model.key is diswot_student.

    Prints a table, and writes it beside the record of the choice, with a figure. What is scored
    stays scored: the command goes on after a kill. With `search: N` in the config, it searches a
    space instead of ranking all of it. With --budget, record, table and figure are those of a
    look, RECORD.look.json, .md and .png. `distill` then trains the choice. Example:

        kd-lrp select torchdistill_configs/phantom/diswot/chosen_from_resnet10t.yaml --jobs 2
    """
    with RichProgress(), errors_in_words():
        from kd_lrp_plugin.plots import figures
        from kd_lrp_plugin.selection import ranking
        from kd_lrp_plugin.selection import select as selecting
        from kd_lrp_plugin.torchdistill.models import make_builder

        question = _question_of(resolve_config(config, overrides or []))
        file = question.file
        if budget is not None:
            question, file = replace(question, budget=budget), file.with_suffix(".look.json")
        elif file.exists():
            selecting.load_choice(question)  # that of another question is refused
        records = selecting.select(question, make_builder, jobs, latency=True)
        if budget is not None or not file.exists():
            selecting.save_choice(question, records, file)
        text = "\n".join([tables.table(_in_units(records)), *_failures(records)])
        text += f"\n\n{ranking.summarise_ranking(records)}\n"
        write_text(file.with_suffix(".md"), text)
        figure = figures.selection_figure(records, f"{question.score}: lower is better")
        figure.savefig(file.with_suffix(".png"))
    say(f"{text}\nbest by {question.score}: {records[0]['candidate']}")
    if budget is None:
        chosen = read_json(file, "Rename it to select again.", candidate=str)["candidate"]
        say(f"recorded in {file}: {chosen}; delete it to choose anew")
    else:
        say(f"a look, in {file}: the choice of the config's own budget is left as it is")
    say(f"written: {file.with_suffix('.md')}, {file.with_suffix('.png')}")


def _question_of(config: Document) -> "spec.SelectionSpec":
    from kd_lrp_plugin.config.build import construct
    from kd_lrp_plugin.selection import spec

    content = construct(config.only("dependencies", "datasets", "models"))
    entry = (content.get("models") or {}).get("student_model") or {}
    if entry.get("key") != "diswot_student":
        where = f"{config.path}: models.student_model.key"
        fix = "See torchdistill_configs/phantom/diswot."
        raise ValueError(message(where, "'diswot_student'", repr(entry.get("key")), fix))
    return spec.spec_from_kwargs(**(entry.get("kwargs") or {}))


def _in_units(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    from kd_lrp_plugin.selection.select import LISTED

    rows = []
    hidden = ("latency", "problem", "front", "entry")
    for record in records[:LISTED]:
        row = {k: v for k, v in record.items() if k not in hidden}
        for count in ("parameters", "macs"):
            row[count] = None if record[count] is None else int(record[count])
        if "latency" in record:
            row["ms"] = None if record["latency"] is None else 1e3 * record["latency"]
        row["front"] = "*" if record["front"] else ""
        rows.append(row)
    return rows


def _failures(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why some have no score, as a list below the table."""
    failed = [record for record in records if record["score"] is None]
    lines = [f"- {r['candidate']}: {' '.join(str(r['problem']).split())}" for r in failed]
    return ["", "Left out, for want of a score:", "", *lines] if lines else []
