"""What a config says of a cached teacher, and where such a teacher cannot be."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchdistill.datasets.registry import get_dataset_wrapper, register_dataset_wrapper

from kd_lrp_plugin.data.shortcuts import Marked
from kd_lrp_plugin.data.validation import check_integer
from kd_lrp_plugin.data.views import FollowedViews, KeyedViews, list_layers
from kd_lrp_plugin.utils.validation import check_known, message

KINDS = ("exact", "frozen")
_WRAPPER = "kd_lrp_teacher_views"
_WRAPPERS = ("companions",)  # which add what does not depend on anything but the image
_LEFT_OUT = (
    "forward_hook",
    "sequential",
    "adaptations",
    "auxiliary_model_wrapper",
    "frozen_modules",
)
_FIX = "Such as exact, frozen, or {kind: exact, views: 4}."


@dataclass(frozen=True)
class CacheSpec:
    """``train.teacher.cache``.

    ===========  =================================================================================
    ``exact``    student and teacher see one and the same view of an image. Of a random transform
                 there are ``views`` of each image, one for each epoch in turn, so that training
                 sees fewer augmentations than without a cache
    ``frozen``   the teacher sees the plain image only; its maps are moved as the student's view
                 is, by flips exactly, by rotations and crops approximately
    ===========  =================================================================================

    Attributes:
        where: its key path in the config, for messages.
        kind: one of :data:`KINDS`.
        views: of each image, for ``exact``; 1 where the transform draws nothing.
        seed: of the views, for ``exact``; not the run's, so that the runs of a study share them.
        folder: where caches lie; None for ``teacher_cache`` beside the teacher's checkpoint, or, of
            a teacher without one, in the run folder.

    Reference:
        ``frozen``: "frozen explanations" of Parchami-Araghi et al., e2KD, ECCV 2024.
        Deviation: the logits, too, are those of the plain image.
    """

    where: str
    kind: str
    views: int = 4
    seed: int = 0
    folder: str | None = None

    @classmethod
    def read(cls, where: str, value: Any) -> "CacheSpec":
        """What a config says there.

        Raises:
            ValueError: for an unknown kind or key, or a value out of range.
        """
        said = {"kind": value} if isinstance(value, str) else value
        if not isinstance(said, Mapping) or "kind" not in said:
            raise ValueError(message(where, "a kind of cache", repr(value), _FIX))
        for key in said:
            check_known(f"{where}: key", key, ("kind", "views", "seed", "folder"))
        check_known(f"{where}: kind", said["kind"], KINDS)
        if said["kind"] == "frozen" and (odd := sorted({"views", "seed"} & set(said))):
            expected = "no choice of views, of which frozen has as many as there are epochs"
            raise ValueError(message(where, expected, odd, "Leave it out, or take kind: exact."))
        check_integer(where, "views", said.get("views", 4))
        check_integer(where, "seed", said.get("seed", 0), least=0)
        folder = said.get("folder")
        if folder is not None and not (isinstance(folder, str) and folder):
            raise ValueError(message(f"{where}: folder", "a path", repr(folder), ""))
        if folder is not None and "$" in (expanded := os.path.expandvars(folder)):
            fix = "Set them, or write the path out."
            raise ValueError(message(f"{where}: folder", "variables that are set", expanded, fix))
        return cls(where, **said)


def get_cache(stage: Mapping[str, Any]) -> Any:
    """What a stage says of its teacher's cache; None for none."""
    teacher = stage.get("teacher")
    return teacher.get("cache") if isinstance(teacher, Mapping) else None


def wrap_images(key_path: str, stage: dict[str, Any]) -> None:
    """Let the training images of a stage whose teacher is cached bring along what it needs.

    torchdistill's data set wrappers are the place for it; those that it has itself keep no outputs.
    """
    if (said := get_cache(stage)) is None:
        return
    loader = stage["train_data_loader"]
    kwargs = {
        "spec": CacheSpec.read(f"{key_path}.teacher.cache", said),
        "inner": loader.get("dataset_wrapper"),
    }
    wrapper = {"key": _WRAPPER, "kwargs": kwargs}
    stage["train_data_loader"] = {**loader, "dataset_wrapper": wrapper}


@register_dataset_wrapper(key=_WRAPPER)
def make_views(
    images: Any, spec: CacheSpec, inner: Mapping[str, Any] | None
) -> KeyedViews | FollowedViews:
    """The training images of a cached teacher; see :func:`wrap_images`."""

    def wrap(images: Any) -> Any:
        if not inner:
            return images
        make = get_dataset_wrapper(inner["key"])
        return make(images, *(inner.get("args") or ()), **(inner.get("kwargs") or {}))

    if spec.kind == "frozen":
        return FollowedViews(spec.where, images, wrap)
    return KeyedViews(spec.where, wrap(images), spec.views, spec.seed)


def check_cache(
    key_path: str,
    stages: Mapping[str, Mapping[str, Any]],
    datasets: Mapping[str, Any],
) -> None:
    """Raise ``ValueError`` where the teacher of a stage cannot be cached.

    Args:
        key_path: of the stage.
        stages: all of them by key path, in order.
        datasets: of the config.
    """
    where, stage = "cache", stages[key_path]  # who reports it says at which key
    spec = CacheSpec.read(where, get_cache(stage))
    teacher, loader = stage["teacher"], stage.get("train_data_loader") or {}
    if teacher.get("requires_grad", True):
        fix = "Set requires_grad: False, or leave cache out."
        raise ValueError(message(where, "a frozen teacher", "one that is trained", fix))
    if used := [key for key in _LEFT_OUT if teacher.get(key)]:
        fix = "Leave cache out: it holds logits, and what recorders have recorded."
        raise ValueError(message(where, "a teacher as it is", used, fix))
    if loader.get("collate_fn"):
        fix = "Leave it out: the teacher's answer to a mixed image is nowhere."
        raise ValueError(message(where, "images one by one", loader["collate_fn"], fix))
    wrapper = (loader.get("dataset_wrapper") or {}).get("key")
    if wrapper and wrapper not in _WRAPPERS:
        expected = f"no dataset_wrapper but {', '.join(_WRAPPERS)}"
        raise ValueError(message(where, expected, wrapper, "Leave one of them out."))
    names = list(stages)
    after = stages.get(names[names.index(key_path) + 1]) if key_path != names[-1] else None
    lacking = [s for s in (stage, after) if s is not None and not s.get("train_data_loader")]
    if lacking:
        fix = "Give it one: images with views of their own cannot be those of another stage."
        at = f"none in {key_path if lacking[0] is stage else names[names.index(key_path) + 1]}"
        raise ValueError(message(where, "a train_data_loader, also of the next stage", at, fix))
    if spec.kind == "frozen" and ", clean)" not in str(teacher.get("forward_proc")):
        for layer in list_layers(datasets.get(str(loader.get("dataset_id")))):
            if isinstance(layer, Marked) and any(shown is not None for shown in layer.shown):
                fix = "Take cache: exact, or view: clean of the teacher's recorder."
                expected = "images without markers, which stay where an image is flipped"
                raise ValueError(message(where, expected, "marked ones", fix))
