"""Which runs a study is made of."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_lrp_plugin.attribution.summary import METRICS
from kd_lrp_plugin.config.run_spec import LOGS, RunSpec
from kd_lrp_plugin.studies.primary import Primary
from kd_lrp_plugin.utils.validation import check_known, message

MEASURES = ("val_accuracy", "test_accuracy", "macro_f1", "calibration_error")
COLUMNS = ("configuration", "seed", "state", "folder")  # of the results, beside axes and measures


# What a measure may be called, beside paths into the maps; see check_measure.
OF_RUN = (
    *("test_accuracy", "val_accuracy", "test_auc", "val_auc", "test_loss", "val_loss"),
    *("best_epoch", "epochs", "parameters", "seconds"),
)
OF_EPOCH = (
    *(
        "train_accuracy",
        "train_loss",
        "val_accuracy",
        "val_auc",
        "val_loss",
        "epoch",
        "stage",
        "lr",
    ),
    *("images_per_second", "memory_mb", "seconds"),
)
OF_MODEL = (
    *("n", "accuracy", "accuracy_interval", "balanced_accuracy", "macro_precision"),
    *("macro_f1", "macro_auc"),
    *("log_loss", "calibration_error", "confusion_matrix", "per_class", "cost", "groups"),
    "effective_subclasses",
)
OF_COST = (
    *("parameters", "parameters_and_statistics", "macs", "flops", "flops_keras"),
    *("memory_access_cost", "megabytes", "latency_ms_batch_1", "latency_ms_batch_32"),
    *("images_per_second_batch_1", "images_per_second_batch_32"),
    *("macs_by_torch", "macs_by_thop", "counters_differ_by"),
)
OF_BOTH = (
    *("n", "agreement", "agreement_where_teacher_right", "agreement_where_teacher_wrong"),
    *("kl_divergence", "both_right", "only_student_right", "only_teacher_right", "both_wrong"),
    *("accuracy_difference", "p_value"),
)

_OF_ROLE = "(student|teacher)"
# What has to follow where a name alone is no number: a pattern, and an example.
BELOW = {
    "accuracy_interval": ("[01]", "0"),
    "confusion_matrix": (r"\d+\.\d+", "0.1"),
    "per_class": (r"\d+\.(precision|recall|f1|auc|support)", "0.recall"),
    "cost": (f"({'|'.join(OF_COST)})", "macs"),
    "groups": (
        r"worst_group_accuracy|by_group\..+\.(n|accuracy|accuracy_interval\.[01]|minus_teacher)",
        "by_group.random.accuracy",
    ),
    "relevance": (rf"{_OF_ROLE}\..+\.(mean|chance|n)", "student.border.mean"),
    "replaced": (
        rf"{_OF_ROLE}\..+\.(blur|mean|swap)\.(accuracy_before|accuracy|flips)",
        "student.border.blur.flips",
    ),
    "object_removed": (rf"{_OF_ROLE}\.(accuracy_before|accuracy)", "student.accuracy"),
} | {name: (rf".+\..+\.{name}", f"gradient.layer2.{name}") for name in METRICS}


def check_measure(where: str, measure: str, terms: Iterable[str]) -> None:
    """Raise ValueError for a measure that no finished run of a study can have.

    Args:
        where: the measure stands.
        measure: a path of keys, see :func:`kd_lrp_plugin.studies.results.collect_results`.
        terms: names of the loss terms of all configs, which are measures too.
    """
    names = [name for term in terms for name in (term, f"{term}_zero_maps")]
    of_terms = [f"{part}_{name}" for name in names for part in ("train", "val", "test")]
    roles = ("student", "teacher")
    head, _, rest = measure.partition(".")
    if head in roles and rest.count(".") >= 2 and rest.rpartition(".")[2] in METRICS:
        return  # of the maps: method.layer.metric
    of_audit = ("relevance", "replaced", "object_removed", "most_flips")
    inner = {
        "audit": of_audit,
        "last": (*OF_EPOCH, *of_terms),
        "student_and_teacher": OF_BOTH,
        "cost": OF_COST,
    }
    inner |= dict.fromkeys(roles, (*OF_MODEL, *METRICS))
    if head not in inner:
        check_known(where, head, (*OF_RUN, *OF_MODEL, *of_terms, *inner))
        _check_number(where, "", head, rest)
        return
    if head == "cost":
        check_known(f"{where}: cost.", rest, OF_COST)
        return
    name, _, rest = rest.partition(".")
    check_known(f"{where}: {head}.", name, inner[head])
    if name == "cost":
        check_known(f"{where}: {head}.cost.", rest, OF_COST)
    _check_number(where, f"{head}.", name, rest)


def _check_number(where: str, above: str, name: str, rest: str) -> None:
    """Raise ValueError unless what follows a name leads to a number."""
    pattern, example = BELOW.get(name, ("", ""))
    if not re.fullmatch(pattern, rest):
        path = example if name in METRICS else f"{name}.{example}" if example else name
        got = repr(f"{above}{name}.{rest}".removesuffix("."))
        fix = "Name a number by all keys on the way to it."
        raise ValueError(message(where, f"a number such as {above}{path}", got, fix))


@dataclass(frozen=True)
class StudyOptions:
    """How a study is to be run.

    Attributes:
        overrides: further ones for every run.
        seeds: how many, or which; those of the file if None.
        only: a part of it, see :func:`kd_lrp_plugin.studies.parser.read_plan`.
        root: folder of the runs, which other studies may share.
        out: folder for the results; ``runs/studies/<study>`` if None.
        jobs: runs at the same time on this machine; one if None.
        device: see :func:`kd_lrp_plugin.utils.distributed.init_distributed`.
        safe: refuse tags beyond :data:`kd_lrp_plugin.config.safety.HARMLESS`.
        log: where the epochs are shown, see :class:`kd_lrp_plugin.config.run_spec.RunSpec`.
        scheduler: address of a dask scheduler whose workers do the runs, over folders that all
            machines see at the same path; as many at the same time as they have threads.
    """

    overrides: Sequence[str] = ()
    seeds: int | Sequence[int] | None = None
    only: Sequence[str] = ()
    root: str | Path = "runs"
    out: str | Path | None = None
    jobs: int | None = None
    device: str | None = None
    safe: bool = False
    log: str = LOGS[0]
    scheduler: str | None = None

    def get_folder(self, file: str | Path) -> Path:
        """For the results of the study in ``file``."""
        return Path(self.out) if self.out is not None else Path("runs", "studies", Path(file).stem)


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
        terms: names of the terms of its criteria.
    """

    name: str
    point: Mapping[str, Any]
    seed: int
    config: Path
    overrides: tuple[str, ...]
    folder: Path
    needs: tuple[Path, ...]
    epochs: int
    terms: tuple[str, ...] = ()

    def spec(self, options: StudyOptions) -> RunSpec:
        """What :func:`kd_lrp_plugin.training.trainer.distill` takes."""
        of_all = options.device, options.safe, options.log
        return RunSpec(self.config, self.overrides, self.folder, self.seed, *of_all)

    @property
    def label(self) -> str:
        return ", ".join([self.cell, f"seed {self.seed}"])

    @property
    def cell(self) -> str:
        """Its configuration and point of the grid."""
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
        measures: key paths.
        primary: the comparison that it was registered for, or None.
        prepared: runs that others need, in an order that works.
        runs: the others: by configuration, point of the grid and seed.
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
    primary: Primary | None
    prepared: tuple[StudyRun, ...]
    runs: tuple[StudyRun, ...]

    def trainings(self) -> list[StudyRun]:
        """Every run once, what is prepared first; of those that are the same, the first."""
        found: dict[Path, StudyRun] = {}
        for run in self.prepared + self.runs:
            found.setdefault(run.folder, run)
        return list(found.values())
