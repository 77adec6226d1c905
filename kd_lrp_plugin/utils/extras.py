"""What is installed beside the core, by extra, and what to say where it is not."""

from collections.abc import Iterator
from contextlib import contextmanager

from kd_lrp_plugin.utils.validation import message

# Top-level modules by the extra of pyproject.toml that installs them.
EXTRAS = {
    "cli": (
        "imagehash",
        "jinja2",
        "matplotlib",
        "rich",
        "skimage",
        "sklearn",
        "tensorboard",
        "torchmetrics",
        "typer",
    ),
    "search": ("optuna",),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "mlflow": ("mlflow",),
    "wandb": ("wandb",),
    "cluster": ("distributed",),
}


def explain_missing(error: ImportError) -> str | None:
    """What to install, in one line, if an import has failed without an extra; else None.

    Example:
        >>> explain_missing(ModuleNotFoundError("No module named 'optuna'", name="optuna.trial"))
        "optuna: expected to be installed, got no such module. pip install 'kd-lrp-plugin[search]'"
        >>> explain_missing(ModuleNotFoundError("No module named 'mine'", name="mine"))
    """
    module = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if module in modules:
            fix = f"pip install 'kd-lrp-plugin[{extra}]'"
            return message(module, "to be installed", "no such module", fix)
    return None


@contextmanager
def imports_of_an_extra() -> Iterator[None]:
    """Around imports that an extra installs: a missing one says which extra that is.

    Raises:
        ModuleNotFoundError: with what to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        words = explain_missing(error)
        if words is None or "kd-lrp-plugin[" in str(error):
            raise
        raise ModuleNotFoundError(words, name=error.name) from None
