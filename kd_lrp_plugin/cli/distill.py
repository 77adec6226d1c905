"""``kd-lrp distill``."""

from pathlib import Path
from typing import Annotated

import typer

from kd_lrp_plugin.cli.console import (
    ConfigFile,
    Device,
    Log,
    Overrides,
    RichProgress,
    Safe,
    errors_in_words,
    say,
)
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.plots import tables


def distill(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder; default runs/DATASET/METHOD/CONFIG/SEED."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every random number generator.")] = 0,
    device: Device = None,
    safe: Safe = False,
    log: Log = "tensorboard",
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Train a few steps, and print where their time goes."),
    ] = False,
) -> None:
    """Train the student of a config, with its teacher if it has one, and test it.

    A config without a teacher trains that model alone: this is how teachers and baselines are
    made. A run that was stopped or killed resumes when the same command is run again. With
    `--profile` there is no run: a few steps are trained, and nothing is written. Examples:

        kd-lrp distill torchdistill_configs/phantom/ce/resnet10t.yaml

        kd-lrp distill my.yaml --set train.num_epochs=2 --set train.optimizer.kwargs.lr=0.001

        kd-lrp distill my.yaml --profile

        torchrun --nproc_per_node=2 -m kd_lrp_plugin.cli distill my.yaml
    """
    with errors_in_words():
        spec = RunSpec(config, overrides or (), out, seed, device, safe, log)
    if profile:
        _show_profile(spec)
        return
    folder = spec.folder
    last = f"Finished epochs are kept in {folder}; the same command resumes after the last of them."
    with RichProgress(), errors_in_words(last):
        from kd_lrp_plugin.training import trainer

        summary = trainer.distill(spec)
    say(
        f"test accuracy {summary['test_accuracy']:.4f} with the weights of epoch "
        f"{summary['best_epoch']} (validation {summary['val_accuracy']:.4f}); written to {folder}"
    )


def _show_profile(spec: RunSpec) -> None:
    with RichProgress(), errors_in_words():
        from kd_lrp_plugin.training import profile, trainer
        from kd_lrp_plugin.utils.distributed import init_distributed

        config = spec.read()
        with init_distributed(spec.device) as context:
            found = profile.profile_epoch(trainer.build_checked(spec, config, context), spec.seed)
    say(tables.table(profile.list_rows(found), digits=1))
    say(profile.describe_profile(found))
