"""What TAB offers. Names stand here as constants: the registries would import PyTorch first."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.config.nodes import walk_pairs

METHODS = (
    "grad_cam",
    "gradient_activation",
    "lrp_epsilon",
    "lrp_zplus",
    "lrp_gamma",
    "lrp_composite",
    "attn_lrp",
)
ATTRIBUTIONS = (*METHODS, "lime", "rise", "score_cam")
SCORES = (
    "diswot",
    "diswot_lrp_cosine",
    "diswot_reference",
    "reference_semantic",
    "reference_relation",
    "reference_exact",
    "gradcam_l2",
    "relation_l2",
    "lrp_cosine",
    "relation_cosine",
    "parameters",
    "macs",
    "nwot",
    "synflow",
    "bn_log_variance",
)
ROLES = ("student", "teacher")
FORMATS = ("onnx", "timm", "pt2")
_VALUES = {"method": METHODS, "score": SCORES}  # by the last key of an override


def complete_attribution(incomplete: str) -> list[str]:
    return [name for name in ATTRIBUTIONS if name.startswith(incomplete)]


def complete_role(incomplete: str) -> list[str]:
    return [name for name in ROLES if name.startswith(incomplete)]


def complete_format(incomplete: str) -> list[str]:
    return [name for name in FORMATS if name.startswith(incomplete)]


def complete_override(ctx: typer.Context, incomplete: str) -> list[str]:
    """Keys of the config that is given, then names where the key takes one."""
    key, separator, _ = incomplete.partition("=")
    if separator:
        values = _VALUES.get(key.rpartition(".")[2], ())
        found = [f"{key}={value}" for value in values]
    else:
        # Where the option is still without a value, nothing before it has been parsed.
        given = [ctx.params.get("config"), *ctx.args]
        found = [f"{key}=" for config in given if config for key in _list_keys(config)]
    return [text for text in found if text.startswith(incomplete)]


def _list_keys(config: str | Path) -> Iterator[str]:
    pending: list[tuple[str, Any]] = []
    try:
        pending.append(("", resolve_config(config).root))
    except (ValueError, OSError):  # TAB says nothing of a wrong file; the command will
        return
    while pending:
        above, node = pending.pop()
        for key, (_, child) in walk_pairs(node).items():
            path = f"{above}.{key}" if above else key
            if walk_pairs(child):
                pending.append((path, child))
            else:
                yield path
