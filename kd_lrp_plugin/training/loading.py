"""The loaders of a stage: what they draw, such as augmentation, and how many workers they have."""

import random
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from kd_lrp_plugin.utils.preserved import preserved_generators


class Loading:
    """The loaders for training, validation and test of a stage.

    Args:
        test: the config of the test's loader.

    Attributes:
        workers: of the loaders whose config has no number of them.
    """

    def __init__(self, test: Mapping[str, Any]) -> None:
        self._test, self.workers = test, 0

    def enter(self, loaders: Sequence[DataLoader], stages: Sequence[Mapping[str, Any]]) -> None:
        """Take on the loaders of a stage, in this order.

        Args:
            loaders: for training, validation and test.
            stages: of the config up to this one; it may keep the loaders of the one before.
        """
        self._batches = [SeededBatches(loader) for loader in loaders]
        self._training = loaders[0]
        said = [
            [stage[name] for stage in stages if stage.get(name)][-1]["kwargs"]
            for name in ("train_data_loader", "val_data_loader")
        ]
        pairs = zip(loaders, [*said, self._test["kwargs"]], strict=True)
        self._free = [loader for loader, kwargs in pairs if "num_workers" not in kwargs]
        self.set_workers(self.workers)

    def set_seed(self, seed: int) -> None:
        """What is drawn for each batch from here on."""
        for batches in self._batches:
            batches.seed = seed

    @property
    def is_free(self) -> bool:
        """Whether the config leaves the number of workers for training open."""
        return self._training in self._free

    def set_workers(self, count: int) -> None:
        """Give the loaders whose config has no number of workers so many."""
        self.workers = count
        for loader in self._free:
            loader.num_workers = count
            loader.prefetch_factor = 2 if count else None


class SeededBatches:
    """The batches of a loader, each drawn from generators of its own.

    They are seeded by the epoch's seed and the indices of the batch, so that neither the number
    of workers nor what a worker has loaded before changes an image; and what the training draws
    meanwhile is not changed by images that are loaded in its own process. They are Python's,
    NumPy's and PyTorch's for CPUs.

    Args:
        loader: its data set and collate function are told to draw so; a list as data set, which
            draws nothing, is left as it is (with a collate function of the config it is refused).

    Attributes:
        seed: of the epoch; a loader's workers take it over when they start.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.seed = 0
        self._dataset: Any = loader.dataset
        before = getattr(loader.collate_fn, "__self__", None)  # of the stage before
        kept = isinstance(before, SeededBatches)
        self._collate: Any = before._collate if kept else loader.collate_fn  # type: ignore
        if hasattr(self._dataset, "__dict__"):
            vars(self._dataset)["__getitems__"] = self.items  # PyTorch asks for a batch by it
        loader.collate_fn = self.collate

    def items(self, indices: Sequence[Any]) -> "Items":
        with preserved_generators():
            self._set_seed("items", indices)
            found = Items(self._dataset[index] for index in indices)
        found.indices = indices
        return found

    def collate(self, items: Sequence[Any]) -> Any:
        with preserved_generators():
            self._set_seed("collate", getattr(items, "indices", ()))
            return self._collate(items)

    def _set_seed(self, what: str, indices: Sequence[Any]) -> None:
        key = repr((what, self.seed, [int(index) for index in indices]))
        number = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big")
        random.seed(number)
        np.random.seed(number % 2**32)  # noqa: NPY002
        torch.default_generator.manual_seed(number)


class Items(list):
    """Items of a batch, and the indices that they have in the data set."""

    indices: Sequence[Any] = ()
