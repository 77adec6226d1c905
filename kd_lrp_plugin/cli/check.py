"""``kd-lrp check``."""

import typer

from kd_lrp_plugin.cli.console import (
    ConfigFile,
    Device,
    Overrides,
    RichProgress,
    Safe,
    errors,
    errors_in_words,
    say,
)


def check(
    config: ConfigFile,
    overrides: Overrides = None,
    device: Device = None,
    safe: Safe = False,
) -> None:
    """Build everything that a config names, take one step, and say what is wrong.

    Reports every problem with its location in the file. Nothing is written but, for this user,
    which images could be read, so that unchanged ones are not read again; of images that only
    train, up to 2,000 new ones are read at a time. `distill` does the same before it trains; where
    a student chooses itself, `check` tries the first one within the budget, `distill` the one that
    is chosen. Example:

        kd-lrp check my.yaml --set batch_size=64
    """
    with RichProgress(), errors_in_words():
        from kd_lrp_plugin.config.document import resolve_config
        from kd_lrp_plugin.config.safety import unsafe_tags
        from kd_lrp_plugin.selection import select
        from kd_lrp_plugin.training.check import dry_run
        from kd_lrp_plugin.utils.distributed import init_distributed

        read = resolve_config(config, overrides or [])
        problems, warnings, notes = unsafe_tags(read) if safe else [], [], []
        if not problems:
            with init_distributed(device) as context, select.dry_run():
                report = dry_run.check(read, context)
            problems, warnings, notes = report.problems, report.warnings, report.notes
    for warning in warnings:
        say(f"warning: {warning}")
    for problem in problems:
        say(problem, to=errors)
    if problems:
        say(f"{len(problems)} problem{'s' * (len(problems) > 1)}", "red", errors)
        raise typer.Exit(1)
    for note in notes:
        say(note)
    say("models, data, losses and a step of each stage: no problem found")
