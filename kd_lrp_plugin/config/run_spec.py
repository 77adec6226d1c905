"""What one run is, where and how it is made: one value for all that train, check or plan."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kd_lrp_plugin.config.document import Document, resolve_config
from kd_lrp_plugin.config.safety import unsafe_tags
from kd_lrp_plugin.utils.validation import check_known, message

LOGS = ("tensorboard", "mlflow", "wandb")


@dataclass(frozen=True)
class RunSpec:
    """One run.

    Attributes:
        config: a torchdistill YAML file.
        overrides: see :func:`kd_lrp_plugin.config.document.resolve_config`.
        out: the run folder (:mod:`kd_lrp_plugin.runs.folder`), :attr:`folder` if None.
        seed: of every random number generator, again in each epoch.
        device: see :func:`kd_lrp_plugin.utils.distributed.init_distributed`.
        safe: refuse tags beyond :data:`kd_lrp_plugin.config.safety.HARMLESS`.
        log: where the epochs are shown, beside the run folder: one of :data:`LOGS`.

    Raises:
        ValueError: for a seed that is no integer of 0 or more, or an unknown log.

    Example:
        >>> RunSpec("configs/phantom/kd/small.yaml", seed=3).folder.as_posix()
        'runs/phantom/kd/small/3'
    """

    config: str | Path
    overrides: Sequence[str] = ()
    out: str | Path | None = None
    seed: int = 0
    device: str | None = None
    safe: bool = False
    log: str = LOGS[0]

    def __post_init__(self) -> None:
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(message("seed", "a number of 0 or more", self.seed, ""))
        check_known("log", self.log, LOGS)
        object.__setattr__(self, "overrides", tuple(self.overrides))  # a list could be changed

    @property
    def folder(self) -> Path:
        """``out``, or ``runs/<dataset>/<method>/<config>/<seed>`` from the config's path."""
        if self.out is not None:
            return Path(self.out)
        config = Path(self.config).resolve()
        parts = config.parent.parent.name, config.parent.name, config.stem, str(self.seed)
        return Path("runs", *parts)

    def read(self) -> Document:
        """The config with its overrides.

        Raises:
            FileNotFoundError: if there is no config.
            ValueError: if it cannot be read, or an override names no key.
        """
        return resolve_config(self.config, self.overrides)

    def list_unsafe(self, config: Document) -> list[str]:
        """What of the config must not be run, if the run must be safe."""
        return unsafe_tags(config) if self.safe else []

    def to_json(self) -> dict[str, Any]:
        """The arguments of this class, for another process."""
        paths = {"config": str(self.config), "out": None if self.out is None else str(self.out)}
        return {**asdict(self), **paths, "overrides": list(self.overrides)}
