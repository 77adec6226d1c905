"""What is found wrong with a config, and what each of its sections is looked through for."""

import inspect
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import ModuleType
from typing import Any, TypeVar

import yaml
from torch import nn
from torchdistill.common.module_util import get_module

from kd_lrp_plugin.config.build import Assembly
from kd_lrp_plugin.config.document import Document
from kd_lrp_plugin.utils.distributed import DistributedContext
from kd_lrp_plugin.utils.registry import unknown_name
from kd_lrp_plugin.utils.validation import check_known, message

C = TypeVar("C")
T = TypeVar("T")
Check = Callable[["CheckReport", str, Any, C], T]
# Every key that torchdistill or the trainer reads, by kind of section.
_STAGE = (
    "num_epochs train_data_loader val_data_loader teacher student model optimizer scheduler "
    "criterion log_freq pre_epoch_process pre_forward_process post_forward_process "
    "post_epoch_process early_stopping"
)
KEYS = {
    "config": "dependencies datasets models train test",
    "stage": _STAGE,
    "train": f"{_STAGE} monitor precision compile",
    "loader": "dataset_id sampler batch_sampler collate_fn kwargs requires_supp dataset_wrapper",
    "role": "forward_proc requires_grad frozen_modules forward_hook sequential adaptations "
    "auxiliary_model_wrapper wrapper dst_ckpt cache",
    "model": "key kwargs src_ckpt dst_ckpt repo_or_dir experiment quantized",
    "optimizer": "key kwargs max_grad_norm grad_accum_step filters_params module_wise_configs "
    "module_wise_kwargs",
    "scheduler": "key kwargs scheduling_step",
    "criterion": "key kwargs args func2extract_model_loss",
    "WeightedSumLoss": "model_term sub_terms",
    "early_stopping": "patience min_delta",
    "test": "test_data_loader",
}
_TEXT = re.compile(r"[-+]?[\d.]+[eE][-+]?\d+")
_FIX = "YAML reads 1e-3 as text, 1.0e-3 as a number."


@dataclass
class CheckReport:
    """What :func:`kd_lrp_plugin.training.check.dry_run.check` has found.

    Attributes:
        problems: what prevents a run, or makes another run than was meant.
        warnings: keys that nothing reads.
        failed: marks of tags that have failed; what else is wrong with their keys follows from it.
        notes: what should be known before a run, such as what a cache will hold.
        assembly: what was built, as if there had been no check; None if nothing could be.
    """

    config: Document
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    failed: list[yaml.Mark] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    assembly: Assembly | None = None

    def add(self, key_path: str, error: Exception | str, location: str | None = None) -> None:
        """Note a problem at a key."""
        words = " ".join(_describe_error(error).split())  # one line each
        named, separator, rest = words.partition(": expected ")
        if separator and " " not in named:  # what the message names is this key or one below
            if named.split(".")[0] in ("datasets", "models", "train", "test"):
                key_path, words = named, f"expected {rest}"
            elif self.config.holds(f"{key_path}.{named}"):
                key_path, words = f"{key_path}.{named}", f"expected {rest}"
            elif f".{key_path}".endswith(f".{named}"):
                words = f"expected {rest}"
        if key_path and any(self.config.encloses(key_path, mark) for mark in self.failed):
            return
        location = location or self.config.get_location(key_path)
        problem = f"{location}  {key_path}: {words}" if key_path else f"{location}  {words}"
        if problem not in self.problems:
            self.problems.append(problem)

    def warn(self, key_path: str, words: str) -> None:
        """Note a key that is not what somebody may take it for."""
        self.warnings.append(f"{self.config.get_location(key_path)}  {key_path}: {words}")

    @contextmanager
    def at(self, key_path: str) -> Iterator[None]:
        """Note an error inside as a problem at a key, and continue."""
        try:
            yield
        except Exception as error:
            logging.getLogger(__name__).info("%s", key_path, exc_info=error)
            self.add(key_path, error)


def _describe_error(error: Exception | str) -> str:
    if isinstance(error, KeyError):
        text = str(error.args[0]) if error.args else ""
        return text if ": expected " in text else f"expected a key {text!r}, got none."
    if isinstance(error, AttributeError) and isinstance(error.obj, ModuleType):
        return unknown_name(f"name in {error.obj.__name__}", error.name, dir(error.obj))
    if isinstance(error, str | ValueError | OSError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def check_keys(report: CheckReport, kind: str, key_path: str, section: Any) -> None:
    """A key that looks like a misspelling is a problem; one that nothing reads, a warning."""
    known = KEYS[kind].split()
    if not isinstance(section, Mapping):
        return
    for key in section:
        name = str(key)
        if name in known or name.startswith("_") or (kind == "train" and name[:5] == "stage"):
            continue
        where = f"{key_path}.{name}".lstrip(".")
        near = [k for k in get_close_matches(name, known, cutoff=0.75) if k not in section]
        if near:
            fix = f"Did you mean {near[0]!r}?"
            report.add(where, message(where, "a key that is read", repr(name), fix))
        elif kind != "config":
            report.warn(where, "nothing reads it")
        elif not report.config.shares(name):  # at the top, people keep their anchors
            if name in KEYS["train"].split():
                fix = f"Did you mean 'train.{name}'?"
                report.add(where, message(where, "a key that is read", repr(name), fix))
            else:
                report.warn(where, "nothing reads it")


def section(kind: str, expected: str, fix: str) -> Callable[[Check[C, T]], Check[C, T | None]]:
    """For a check of one kind of section: it gets mappings only, and may raise what it finds.

    Args:
        kind: one of :data:`KEYS`, which are checked before.
        expected: what a section is that is none, in the message.
        fix: the end of that message.

    Returns:
        A decorator. The check takes the report, the section's key path, the section, and what
        it needs of the rest; it returns None where something was wrong.
    """

    def decorate(body: Check[C, T]) -> Check[C, T | None]:
        def check(report: CheckReport, key_path: str, section: Any, rest: C) -> T | None:
            with report.at(key_path):
                if not isinstance(section, Mapping):
                    raise ValueError(message(kind, expected, section, fix))
                check_keys(report, kind, key_path, section)
                return body(report, key_path, section, rest)
            return None

        return check

    return decorate


def check_mapping(where: str, value: Any, fix: str) -> None:
    """Raise ``ValueError`` for anything but a mapping."""
    if not isinstance(value, Mapping):
        raise ValueError(message(where, "a mapping", repr(value), fix))


def check_keywords(where: str, function: Callable[..., object], kwargs: Any) -> None:
    """Raise ``ValueError`` for what a function cannot be given, as far as its signature says so.

    Args:
        where: key of the keywords, in the message.
        function: or class; where it takes any keyword, only numbers are checked.
        kwargs: its keywords, as they were read.
    """
    check_mapping(where, kwargs, "Write {} for none.")
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in kwargs if not takes_any else ():
        check_known(where, key, parameters)
    check_scalars(where, function, kwargs)


def check_scalars(where: str, function: Callable[..., object], kwargs: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for a number, truth value or text where a function takes another.

    What it takes is known by a keyword's default, else by its annotation; nothing is said of the
    others. Python takes True for 1, and a loss at a learning rate of .inf is none.
    """
    parameters = inspect.signature(function).parameters
    for key, value in kwargs.items():
        kind = _get_kind(parameters[key]) if key in parameters else None
        is_bool, is_text = isinstance(value, bool), isinstance(value, str)
        if kind == "bool" and (is_text or isinstance(value, int | float)) and not is_bool:
            raise ValueError(message(f"{where}.{key}", "True or False", repr(value), ""))
        if kind == "number" and (is_text or is_bool):
            fix = _FIX if is_text else ""
            raise ValueError(message(f"{where}.{key}", "a number", repr(value), fix))
    check_numbers(where, kwargs)


def _get_kind(parameter: inspect.Parameter) -> str | None:
    """What a keyword takes, "bool" or "number"; None where that is not clear."""
    default = parameter.default
    if isinstance(default, bool | int | float):
        return "bool" if isinstance(default, bool) else "number"
    said = parameter.annotation
    words = {getattr(said, "__name__", ""), *re.findall(r"\w+", str(said))}
    if default not in (None, inspect.Parameter.empty) or words & {"str", "Any"}:
        return None
    numbers = words & {"int", "float"}
    return "bool" if "bool" in words and not numbers else "number" if numbers else None


def is_number(value: Any) -> bool:
    """Whether it is a number that one can reckon with: not True, .inf or .nan."""
    return type(value) in (int, float) and math.isfinite(value)


def check_numbers(where: str, value: Any) -> None:
    """Raise ``ValueError`` for text that was meant as a number, or .inf or .nan, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(message(where, "a finite number", value, ""))
    if isinstance(value, str) and _TEXT.fullmatch(value):
        raise ValueError(message(where, "a number", repr(value), _FIX))
    parts = enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in value.items() if isinstance(value, Mapping) else parts:
        check_numbers(f"{where}.{key}", part)


@dataclass(frozen=True)
class ConfigParts:
    """What the check of a section looks up in the parts.

    Attributes:
        train: the section.
        datasets: by name.
        roles: the models by role, None for one that cannot be built.
        context: how many processes share the training images.
    """

    train: Mapping[str, Any]
    datasets: Mapping[str, Any]
    roles: Mapping[str, nn.Module | None]
    context: DistributedContext

    @property
    def trained(self) -> str:
        return "student" if "student" in self.roles else "model"


def check_path(where: str, path: Any, model: nn.Module) -> None:
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    if path in modules:
        return
    if path == ".":
        hooked = where.startswith("forward_hook")
        fix = "Leave it out: without a hook, too, '.' is what the model returns." if hooked else ""
        raise ValueError(message(where, "parts of the model", "'.'", fix))
    found = get_module(model, path) if isinstance(path, str) else None  # a parameter, or layer.-1
    if not isinstance(found, nn.Module | nn.Parameter):
        raise ValueError(unknown_name(where, path, modules))
