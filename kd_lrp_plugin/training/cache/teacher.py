"""A frozen teacher that is asked once about each view of each image."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from kd_lrp_plugin import __version__
from kd_lrp_plugin.data.following import move_maps
from kd_lrp_plugin.data.identity import identify_items
from kd_lrp_plugin.data.views import CELLS, ROW, FollowedViews, KeyedViews, name_size
from kd_lrp_plugin.runs.folder import CACHES
from kd_lrp_plugin.torchdistill.forward_proc import CachedRecording, recorded
from kd_lrp_plugin.torchdistill.mid_level import RecordedLoss
from kd_lrp_plugin.training.cache.spec import CacheSpec, get_cache
from kd_lrp_plugin.training.cache.store import CacheStore, Part
from kd_lrp_plugin.utils.distributed import DistributedContext
from kd_lrp_plugin.utils.files import hash_contents
from kd_lrp_plugin.utils.preserved import preserved_generators
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import message

FORMAT = 1  # of the caches: goes up when what they hold changes
LOGITS = "logits"
_BATCH = 32  # where the loader of the training does not say
_TRIALS = 4  # answers that are compared with what the teacher says now
_TOLERANCE = {torch.float32: 0.02}  # of the largest value of an answer
_LOW_TOLERANCE = 0.1  # under autocast


@dataclass
class Live:
    """The teacher itself, and what a stage asks of it.

    Attributes:
        procedure: its forward procedure.
        model: the teacher, frozen.
        losses: of recordings.
        name: of the procedure.
        device: where it computes.
        precision: of autocast; float32 for none.
    """

    procedure: Any
    model: nn.Module
    losses: Sequence[RecordedLoss]
    name: str
    device: torch.device
    precision: torch.dtype

    @property
    def questions(self) -> dict[str, RecordedLoss]:
        """In an order that is not the config's, so that two of them share a cache."""
        return {loss.question: loss for loss in sorted(self.losses, key=lambda loss: loss.question)}

    @torch.no_grad()
    def ask(
        self, where: str, images: Tensor, targets: Tensor, companions: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], Any]:
        """Logits, and by question and layer what the losses want; and the recording, if any.

        Raises:
            ValueError: for a teacher that does not return finite logits (n, classes).
        """
        self.model.eval()
        low = self.precision != torch.float32
        images, targets = images.to(self.device), targets.to(self.device)
        with torch.autocast(self.device.type, self.precision, enabled=low):
            logits = self.procedure(self.model, images, targets, companions)
            if not isinstance(logits, Tensor) or logits.shape[:1] != images.shape[:1]:
                got = f"{type(logits).__name__} {tuple(getattr(logits, 'shape', ()))}"
                expected, fix = "logits (n, classes) of the teacher", "Leave cache out."
                raise ValueError(message(where, expected, got, fix))
            found = {LOGITS: logits.detach()}
            recording = getattr(logits, "_kd_lrp_recording", None)
            for question, loss in self.questions.items():
                output = {".": {"output": logits}}
                _, recording = recorded(output, "teacher", loss.key)
                parts = loss.read_teacher(logits, recording, targets)
                names = (f"{question} {number}" for number in range(len(parts)))
                found |= {n: part.detach() for n, part in zip(names, parts, strict=True)}
        for name, value in found.items():
            if not bool(value.isfinite().all()):
                fix = "Look into the teacher's checkpoint."
                raise ValueError(message(where, f"finite {name} of the teacher", "others", fix))
        return found, recording


class TeacherCache:
    """Answers of a frozen teacher in a stage: logits, and what its losses compare.

    It takes the place of the box's forward procedure for the teacher. A batch whose images tell
    their rows gets the answers of these; any other, as in validation, gets the teacher itself.
    Until :meth:`open` is called, as in a check, the teacher is asked on the spot, and its answer
    rounded as it would be in the cache.

    Logits are kept in float32, as they were. Maps and features are kept in float16 with the largest
    size of each image's beside them, so that their values are off by up to 2^-11 of themselves
    (smaller ones, below 2^-14 of the largest, by up to 2^-25 of it), whatever their scale. Of
    losses that relate samples, the features themselves are kept, since batches differ.

    Args:
        spec: of the config.
        box: torchdistill's, in its stage; changed.
        live: what the box would ask.

    Raises:
        ValueError: for losses of recordings of a teacher without a recorder, from :meth:`prepare`.
    """

    def __init__(self, spec: CacheSpec, box: Any, live: Live) -> None:
        self.spec, self.live = spec, live
        self.views: KeyedViews | FollowedViews = box.train_data_loader.dataset
        self._loader = box.train_data_loader
        self._layers: list[str] = []
        self._method = ""
        self._dtype = torch.float32
        self._parts: list[Part] = []
        self._store: CacheStore | None = None
        self._arrays: dict[str, np.ndarray] | None = None
        self._made = False
        box.teacher_forward_proc = self.forward

    # --- asking -------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Ask about two images, to know what an answer looks like."""
        if self._parts:
            return
        with preserved_generators():
            found, recording = self._ask(range(min(2, self.views.rows)))
        if recording is not None:
            self._layers, self._method = recording.layers, recording.method
        self._dtype = found[LOGITS].dtype
        maps = [value for value in found.values() if value.ndim > 2]
        if isinstance(self.views, FollowedViews):
            self.views.sizes = sorted({(m.shape[-2], m.shape[-1]) for m in maps})
        encoded = {name: value.cpu().numpy() for name, value in _encode(found).items()}
        self._parts = [Part(n, value.shape[1:], str(value.dtype)) for n, value in encoded.items()]

    def _ask(self, rows: Sequence[int]) -> tuple[dict[str, Tensor], Any]:
        batch = default_collate([self.views.ask(row) for row in rows])
        return self.live.ask(self.spec.where, *batch)

    def forward(
        self, model: nn.Module, images: Tensor, targets: Any = None, companions: Any = None
    ) -> Any:
        """What the box calls: the answers to the images of a batch."""
        if not isinstance(companions, Mapping) or ROW not in companions:
            return self.live.procedure(model, images, targets, companions)
        self.prepare()
        rows = companions[ROW].cpu().numpy()
        if self._arrays is not None:
            encoded = {n: torch.from_numpy(np.asarray(a[rows])) for n, a in self._arrays.items()}
            encoded = {n: value.to(images.device) for n, value in encoded.items()}
        elif isinstance(self.views, FollowedViews):
            encoded = _encode(self._ask(rows)[0])
        else:
            encoded = _encode(self.live.ask(self.spec.where, images, targets, companions)[0])
        found = _decode(encoded)
        if CELLS in companions:
            cells = companions[CELLS]
            for name, value in found.items():
                if value.ndim > 2:
                    size = name_size((value.shape[-2], value.shape[-1]))
                    found[name] = move_maps(value, cells[size])
        logits: Any = found[LOGITS].to(self._dtype)
        if self._method:
            numbers = range(len(self._layers))
            answers = {q: [found[f"{q} {i}"] for i in numbers] for q in self.live.questions}
            logits._kd_lrp_recording = CachedRecording(self._layers, self._method, answers)
        logits._kd_lrp_companions = companions
        return logits

    # --- the cache ----------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        return self._arrays is not None

    def open(self, context: DistributedContext, beside: Path) -> None:
        """Find the cache or make it; from now on the teacher is not asked about training images.

        Args:
            context: of its processes the first makes it, and compares some answers with what the
                teacher says now.
            beside: where the folder ``teacher_cache`` is, unless the config names another.

        Raises:
            OSError: if it cannot be written.
            ValueError: if it is damaged, or the teacher says something else now.
        """
        with preserved_generators():
            self.prepare()
            said = self.spec.folder
            where = Path(os.path.expandvars(said)).expanduser() if said else beside / CACHES

            store = self._choose(where, context.run_on_rank_zero(self._identify))
            while context.rank > 0 and not store.complete:
                time.sleep(0.2)  # torchrun ends this process if the first fails
            if context.rank == 0:
                self._made = store.fill(self._answer)
            arrays = store.open()
            context.run_on_rank_zero(lambda: self._compare(arrays))
            self._arrays = arrays

    def _choose(self, where: Path, identity: Mapping[str, Any]) -> CacheStore:
        folder = where / hash_contents(identity)
        self._store = CacheStore(folder, identity, self._parts, self.views.rows)
        return self._store

    def _identify(self) -> dict[str, Any]:
        live, views = self.live, self.views
        state = [
            part
            for name, value in live.model.state_dict().items()
            for part in (name, str(value.dtype), value.cpu().contiguous().numpy().tobytes())
        ]
        return {
            "format": FORMAT,
            "version": __version__,
            "teacher": hash_contents(str(live.model), *state),
            "forward_proc": live.name,
            "layers": self._layers,
            "method": self._method,
            "questions": sorted(live.questions),
            "precision": str(live.precision),
            "images": identify_items(views.asked, views.ask, views.rows),
            "kind": self.spec.kind,
            "views": views.views,
            "seed": self.spec.seed,
        }

    def _answer(self, start: int) -> Iterator[dict[str, np.ndarray]]:
        """The answers to all rows from one on, batch by batch."""
        size, workers = self._loader.batch_size or _BATCH, self._loader.num_workers
        way = self._loader.multiprocessing_context if workers else None
        rows = _Rows(self.views, start)
        loader = DataLoader(rows, size, num_workers=workers, multiprocessing_context=way)
        for batch in current_progress().track(loader, "asking teacher", len(loader)):
            found, _ = self.live.ask(self.spec.where, *batch)
            yield {name: value.cpu().numpy() for name, value in _encode(found).items()}

    def _compare(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Raise ``ValueError`` where some answers are not those of the teacher as it is."""
        rows = np.unique(np.linspace(0, self.views.rows - 1, _TRIALS).astype(int))
        kept = _decode({n: torch.from_numpy(np.asarray(a[rows])) for n, a in arrays.items()})
        now = self._ask(rows.tolist())[0]
        tolerance = _TOLERANCE.get(self.live.precision, _LOW_TOLERANCE)
        for name, value in now.items():
            value = value.cpu().float()
            off = (kept[name] - value).abs().flatten(1).amax(1)
            if bool((off > tolerance * value.abs().flatten(1).amax(1)).any()):
                assert self._store is not None
                got = f"others, off by up to {float(off.max()):.2g}"
                fix = f"Delete {self._store.folder}; the cache is made again."
                expected = f"the {name} that the teacher has now"
                raise ValueError(message(str(self._store.folder), expected, got, fix))

    # --- telling ------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What the record of a run says of it."""
        store = self._store or CacheStore(Path(), {}, self._parts, self.views.rows)
        about = {"kind": self.spec.kind, "images": len(self.views), "views": self.views.views}
        about |= {"dtype": "float16", "logits_dtype": "float32", "bytes": store.size}
        if self._store is not None:
            about |= {"folder": str(store.folder), "made": self._made}
        return about

    def __str__(self) -> str:
        about = self.describe()
        views = f"{about['views']} view{'s' * (about['views'] > 1)} of "
        what = views if self.spec.kind == "exact" else "the plain view of "
        size = f"{about['bytes'] / 1e6:.1f} MB in float16"
        end = ""
        if "folder" in about:
            end = f", {'made' if about['made'] else 'found'} in {about['folder']}"
        return f"teacher cache: {about['kind']}, {what}{about['images']} images, {size}{end}"


def cache_teacher(
    key_path: str,
    stage: Mapping[str, Any],
    box: Any,
    losses: Iterable[nn.Module],
    device: torch.device,
    precision: torch.dtype,
) -> TeacherCache | None:
    """The cache that a stage asks for, in its box; None where it asks for none.

    Args:
        key_path: of the stage.
        stage: its section of the config.
        box: torchdistill's, in that stage; changed.
        losses: the criterion and its terms.
        device: where the teacher computes.
        precision: of autocast; float32 for none.
    """
    if (said := get_cache(stage)) is None:
        return None
    spec = CacheSpec.read(f"{key_path}.teacher.cache", said)
    parts = [part for loss in losses for part in loss.modules()]
    recorded_losses = [part for part in parts if isinstance(part, RecordedLoss)]
    name = str(stage["teacher"].get("forward_proc"))
    of_teacher = (box.teacher_forward_proc, box.teacher_model)
    return TeacherCache(spec, box, Live(*of_teacher, recorded_losses, name, device, precision))


class _Rows(Dataset):
    """What the teacher is asked from a row on."""

    def __init__(self, views: KeyedViews | FollowedViews, start: int) -> None:
        self.views, self.start = views, start

    def __len__(self) -> int:
        return self.views.rows - self.start

    def __getitem__(self, index: int) -> tuple:
        return self.views.ask(self.start + index)


def _scale_of(name: str) -> str:
    return f"{name} scale"


def _encode(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits in float32; the rest in float16, as shares of the largest size of each row."""
    encoded: dict[str, Tensor] = {}
    for name, value in found.items():
        if name == LOGITS:
            encoded[name] = value.float()
            continue
        value = value.float()
        scale = value.abs().flatten(1).amax(1)
        each = torch.where(scale > 0, scale, 1).reshape(-1, *[1] * (value.ndim - 1))
        encoded[name], encoded[_scale_of(name)] = (value / each).half(), scale
    return encoded


def _decode(encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in encoded.items():
        if (scale := encoded.get(_scale_of(name))) is not None:
            value = value.float() * scale.reshape(-1, *[1] * (value.ndim - 1))
        if not name.endswith(_scale_of("")):
            found[name] = value
    return found
