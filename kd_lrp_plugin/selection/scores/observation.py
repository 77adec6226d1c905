"""One network on one batch, and all that a score may ask of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd_lrp_plugin.metrics.efficiency import count_macs, count_parameters
from kd_lrp_plugin.relevance.recording import Recording, record
from kd_lrp_plugin.utils.preserved import preserved
from kd_lrp_plugin.utils.validation import check_targets, message


class Observation:
    """One network on one batch; everything is computed when it is first asked for, and once.

    Args:
        model: a network that ends in logits; it is changed in no way.
        images: the batch.
        targets: class indices.
        layers: where maps and features are taken from; by default the last map before pooling.
        train_mode: normalise by the statistics of the batch, as an untrained network must.
        seed: of what a forward pass draws, such as dropout: it is the same whenever it runs.

    Raises:
        ValueError: for fewer than two images, or targets that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Float[Tensor, "n c h w"],
        targets: Int[Tensor, " n"],
        layers: tuple[str, ...] | None = None,
        train_mode: bool = True,
        seed: int = 0,
    ) -> None:
        if len(images) < 2:
            fix = "Use a larger batch: relations are between images."
            raise ValueError(message("Observation", "two images or more", len(images), fix))
        self.model = model
        # A forward pass of a convolutional network takes half the time in this format.
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.targets = targets
        self.layers = layers or (last_map(model),)
        self.train_mode, self.seed = train_mode, seed
        self._recordings: dict[str, tuple[Recording, Tensor]] = {}
        self._maps: dict[tuple[str, bool], list[Tensor]] = {}

    def _recorded(self, method: str) -> tuple[Recording, Tensor]:
        if method not in self._recordings:
            kept, draws = frozen(self.model, self.train_mode), torch.random.fork_rng([])
            with kept, draws, record(self.model, self.layers, method) as recording:
                torch.manual_seed(self.seed)
                logits = self.model(self.images)
            check_targets("Observation", self.targets, logits)
            self._recordings[method] = recording, logits
        return self._recordings[method]

    def maps(self, method: str, signed: bool) -> list[Float[Tensor, "n h w"]]:
        """Relevance of the label, one map per layer."""
        if (method, signed) not in self._maps:
            recording, logits = self._recorded(method)
            found = recording.maps(logits, self.targets, signed=signed)
            self._maps[method, signed] = [relevance.detach() for relevance in found]
        return self._maps[method, signed]

    @property
    def features(self) -> list[Float[Tensor, "n c h w"]]:
        """Activations, one per layer."""
        return [feature.detach() for feature in self._forward[0].activations]

    @property
    def logits(self) -> Float[Tensor, "n classes"]:
        return self._forward[1].detach()

    @property
    def _forward(self) -> tuple[Recording, Tensor]:
        return self._recorded(next(iter(self._recordings), "grad_cam"))  # any method's will do

    @cached_property
    def parameters(self) -> int:
        return count_parameters(self.model)

    @cached_property
    def macs(self) -> int:
        _, channels, height, width = self.images.shape
        return count_macs(self.model, (height, width), channels)


@contextmanager
def frozen(model: nn.Module, train_mode: bool) -> Iterator[None]:
    """A model frozen in a mode; flags, modes and statistics are put back on exit.

    Without weights to derive for, a forward pass keeps no graph in front of the recorded layers.
    """
    with preserved(model):
        model.train(train_mode).requires_grad_(False)
        yield


def last_map(model: nn.Module) -> str:
    """The layer whose output is the last feature map before pooling, in a model of timm's kind.

    Raises:
        ValueError: if it is not known.
    """
    children = [name for name, _ in model.named_children()]
    if "global_pool" in children[1:]:
        return children[children.index("global_pool") - 1]
    info: Any = getattr(model, "feature_info", None) or []
    last = (info if isinstance(info, list) else info.get_dicts())[-1:]
    if not last or last[0]["module"] not in dict(model.named_modules()):
        fix = "Name the layers."
        raise ValueError(message("layers", "a timm model", type(model).__name__, fix))
    return last[0]["module"]
