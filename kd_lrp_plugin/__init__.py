"""Explanation-guided knowledge distillation for torchdistill and plain PyTorch loops.

The core needs no torchdistill; its YAML reaches it through ``kd_lrp_plugin.torchdistill``.

Names are imported when they are asked for (PEP 562), so that the command line can show its help
without PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_lrp_plugin.losses import (
        LOSSES,
        correlation_cosine,
        correlation_l2,
        kl_divergence,
        relation_cosine,
        relation_l2,
        resize_maps,
        semantic_cosine,
        semantic_l2,
        semantic_relative_l2,
        zero_maps,
    )
    from kd_lrp_plugin.models.factory import build_model, thesis_student, thesis_teacher
    from kd_lrp_plugin.models.weights import load_weights
    from kd_lrp_plugin.relevance.methods import METHODS
    from kd_lrp_plugin.relevance.recording import Recording, record, relevance_maps
    from kd_lrp_plugin.relevance.rules import RULES

__version__ = "0.1.0"

__all__ = [
    "LOSSES",
    "METHODS",
    "RULES",
    "Recording",
    "build_model",
    "correlation_cosine",
    "correlation_l2",
    "kl_divergence",
    "load_weights",
    "record",
    "relation_cosine",
    "relation_l2",
    "relevance_maps",
    "resize_maps",
    "semantic_cosine",
    "semantic_l2",
    "semantic_relative_l2",
    "thesis_student",
    "thesis_teacher",
    "zero_maps",
]

# Where the names of __all__ are that are not among the losses, as type checkers read it above.
_MODULES = {
    "METHODS": "relevance.methods",
    "RULES": "relevance.rules",
    "Recording": "relevance.recording",
    "build_model": "models.factory",
    "load_weights": "models.weights",
    "record": "relevance.recording",
    "relevance_maps": "relevance.recording",
    "thesis_student": "models.factory",
    "thesis_teacher": "models.factory",
}
_SUBMODULES = ("losses", "models", "relevance", "utils")  # attributes without an import of theirs


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'losses')}")
        value = getattr(module, name)
        globals()[name] = value  # the next time Python finds it by itself
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
