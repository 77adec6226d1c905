"""Which runs a study is made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_lrp_plugin.config.run_spec import RunSpec

MEASURES = ("val_accuracy", "test_accuracy", "macro_f1", "calibration_error")
COLUMNS = ("configuration", "seed", "state", "folder")  # of the results, beside axes and measures


@dataclass(frozen=True)
class StudyRun:
    """One training of a study.

    Attributes:
        name: of its configuration, or of what it prepares.
        point: its value on each axis of the grid that it is crossed with.
        seed: of the run.
        config: file.
        overrides: all of them, filled in.
        folder: known by what the run is.
        needs: folders of prepared runs that come first.
        epochs: planned.
    """

    name: str
    point: Mapping[str, Any]
    seed: int
    config: Path
    overrides: tuple[str, ...]
    folder: Path
    needs: tuple[Path, ...]
    epochs: int

    def spec(self, device: str | None = None, safe: bool = False) -> RunSpec:
        """What :func:`kd_lrp_plugin.training.trainer.distill` takes."""
        return RunSpec(self.config, self.overrides, self.folder, self.seed, device, safe)

    @property
    def label(self) -> str:
        return ", ".join([self.cell, f"seed {self.seed}"])

    @property
    def cell(self) -> str:
        """Its configuration and place in the grid."""
        return ", ".join([self.name, *(f"{axis} {value}" for axis, value in self.point.items())])


@dataclass(frozen=True)
class Plan:
    """A study as read.

    Attributes:
        file: of the study.
        root: folder of the runs.
        question: what it asks.
        seeds: of every configuration.
        overrides: from the command line.
        only: from there too, see :func:`read_plan`.
        axes: of the grid, with their values.
        compare_to: the configuration that others are paired with, or None.
        measures: dotted paths.
        prepared: runs that others need, in an order that works.
        runs: the others: by configuration, place in the grid and seed.
    """

    file: Path
    root: Path
    question: str
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]
    only: tuple[str, ...]
    axes: Mapping[str, tuple[Any, ...]]
    compare_to: str | None
    measures: tuple[str, ...]
    prepared: tuple[StudyRun, ...]
    runs: tuple[StudyRun, ...]

    def trainings(self) -> list[StudyRun]:
        """Every run once, what is prepared first; of those that are the same, the first."""
        found: dict[Path, StudyRun] = {}
        for run in self.prepared + self.runs:
            found.setdefault(run.folder, run)
        return list(found.values())
