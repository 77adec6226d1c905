"""``kd-lrp select``."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kd_lrp_plugin.cli.console import (
    ConfigFile,
    Overrides,
    RichProgress,
    Safe,
    Scheduler,
    errors_in_words,
    say,
)
from kd_lrp_plugin.config.document import Document, resolve_config
from kd_lrp_plugin.plots import tables
from kd_lrp_plugin.utils.files import write_text
from kd_lrp_plugin.utils.validation import message

if TYPE_CHECKING:
    from kd_lrp_plugin.selection.spec import SelectionSpec


def select(
    config: ConfigFile,
    overrides: Overrides = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="QUANTITY=VALUE",
            help="Such as params=2.5M, params=1M..2.5M, macs=300M, latency=20ms; repeatable. "
            "Instead of the config's, for a preview: the recorded selection stays.",
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Processes to share the work; default 1.", min=1)
    ] = None,
    scheduler: Scheduler = None,
    safe: Safe = False,
) -> None:
    """Rank the untrained students of a config whose student_model.key is diswot_student.

    Prints a table, and writes it beside the record of the choice, with a figure. What is scored
    stays scored: after a kill, the command resumes. With `search: N` in the config, it searches a
    space instead of ranking all of it. With --budget, record, table and figure are those of a
    preview, RECORD.preview.json, .md and .png. `distill` then trains the choice. Example:

        kd-lrp select torchdistill_configs/phantom/diswot/chosen_from_resnet10t.yaml --jobs 2
    """
    with RichProgress(), errors_in_words():
        from kd_lrp_plugin.plots import figures
        from kd_lrp_plugin.selection import ranking
        from kd_lrp_plugin.selection.select import Selection, load_choice, read_choice, save_choice
        from kd_lrp_plugin.torchdistill.models import make_builder

        spec = _read_spec(resolve_config(config, overrides or []), safe)
        file = spec.file
        if budget is not None:
            spec, file = replace(spec, budget=budget), file.with_suffix(".preview.json")
        elif file.exists():
            load_choice(spec)  # that of another selection is refused
        records = Selection(spec, make_builder).rank(jobs, latency=True, scheduler=scheduler)
        if budget is not None:
            save_choice(spec, records, file)
        elif not file.exists():
            save_choice(spec, records)
        text = "\n".join([tables.table(_in_units(records)), *_failures(records)])
        words = [ranking.summarise_ranking(records), ranking.summarise_counters(records)]
        text += "".join(f"\n\n{word}" for word in words if word) + "\n"
        write_text(file.with_suffix(".md"), text)
        figure = figures.selection_figure(records, f"{spec.score}: lower is better")
        figure.savefig(file.with_suffix(".png"))
    say(f"{text}\nbest by {spec.score}: {records[0]['candidate']}")
    if budget is None:
        chosen = read_choice(file)["candidate"]
        say(f"recorded in {file}: {chosen}; delete it to choose again")
    else:
        say(f"a preview, in {file}: the choice of the config's own budget is left as it is")
    say(f"written: {file.with_suffix('.md')}, {file.with_suffix('.png')}")


def _read_spec(config: Document, safe: bool) -> "SelectionSpec":
    from kd_lrp_plugin.config.build import construct
    from kd_lrp_plugin.config.safety import unsafe_tags
    from kd_lrp_plugin.selection.spec import SelectionSpec

    if safe and (problems := unsafe_tags(config)):
        raise ValueError("\n".join(problems))
    content = construct(config.only("dependencies", "datasets", "models"))
    entry = (content.get("models") or {}).get("student_model") or {}
    if entry.get("key") != "diswot_student":
        where = f"{config.path}: models.student_model.key"
        fix = "See torchdistill_configs/phantom/diswot."
        raise ValueError(message(where, "'diswot_student'", repr(entry.get("key")), fix))
    return SelectionSpec.from_kwargs(**(entry.get("kwargs") or {}))


def _in_units(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    from kd_lrp_plugin.selection.ranking import CHECK
    from kd_lrp_plugin.selection.select import LISTED

    rows = []
    hidden = ("latency", "problem", "front", "entry", CHECK)
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
    return ["", "Left out, without a score:", "", *lines] if lines else []
