"""Runs of the trainer that take a second: what its tests share."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from kd_lrp_plugin.utils.distributed import DistributedContext
from kd_lrp_plugin.utils.progress import NullProgress

CONFIGS = Path(__file__).resolve().parent.parent / "torchdistill_configs"
BASELINE = CONFIGS / "phantom/ce/test_resnet.yaml"
KD = CONFIGS / "phantom/kd/test_resnet_from_resnet10t.yaml"
LRP = CONFIGS / "phantom/lrp_cosine/test_resnet_from_resnet10t.yaml"
NO_TEACHER = ["models.teacher_model.src_ckpt=null"]  # it keeps its random weights
SMALL = ["image_size=48", "batch_size=8", "num_workers=0", "train.num_epochs=1"] + [
    f"datasets.phantom/{split}.init.kwargs.size={size}"
    for split, size in {"train": 16, "val": 9, "test": 8}.items()  # 9: a last batch of one
]
CPU = DistributedContext(torch.device("cpu"))


def idx(values: np.ndarray) -> bytes:
    """What an unpacked IDX file of these bytes holds."""
    header = b"\0\0\x08" + bytes([values.ndim])
    return header + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()


def write_digits(folder: Path, train: int = 40, test: int = 12) -> Path:
    """IDX files of noise under the names of MNIST, each digit in turn."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        (folder / f"{name}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


class Stopped(RuntimeError):
    """Raised by :class:`StopsAt`."""


class StopsAt(NullProgress):
    """Ends a run in the middle of a pass, as a kill would.

    Args:
        what: such as "epoch 2", "epoch 2 val" or "test".
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def track(self, items, what, total):
        for index, item in enumerate(items):
            if what == self.what and index == total // 2:
                raise Stopped(what)
            yield item


def outcome(folder: str | Path) -> dict[str, Any]:
    """Weights and metrics of a finished run, without its times."""
    timed = ("seconds", "images_per_second", "memory_mb")
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
    summary = json.loads((Path(folder) / "summary.json").read_text())
    return {
        "weights": load_file(Path(folder) / "student.safetensors"),
        "best": torch.load(Path(folder) / "best.pt", weights_only=True),
        "last": torch.load(Path(folder) / "last.pt", weights_only=True)["experiment"],
        "metrics": [{k: v for k, v in line.items() if k not in timed} for line in lines],
        "summary": {k: v for k, v in summary.items() if k not in timed},
        "predictions": (Path(folder) / "predictions.csv").read_text(),
    }


def same(a: Any, b: Any) -> bool:
    """Whether two outcomes are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
