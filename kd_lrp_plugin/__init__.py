"""Explanation-guided knowledge distillation for torchdistill and plain PyTorch loops.

The core needs no torchdistill; its YAML reaches it through ``kd_lrp_plugin.torchdistill``.
"""

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
