"""Checkpoints, read without running code and checked against their checksums."""

import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from kd_lrp_plugin.utils.validation import message


def read_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint, read without running code and checked against its checksums.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, or holds more than tensors, numbers, text and containers.
    """
    try:
        with zipfile.ZipFile(file) as archive:  # torch.load itself compares no checksums
            broken = archive.testzip()
        if broken is None:
            return torch.load(file, map_location="cpu", weights_only=True)
        got = f"one with a wrong checksum in {broken}"
    except FileNotFoundError:
        raise
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, EOFError) as error:
        got = f"{type(error).__name__}: {error}"
    except pickle.UnpicklingError as error:
        got = f"other objects: {str(error).splitlines()[0]}"
    raise ValueError(message(str(file), "an intact checkpoint of plain tensors", got, ""))
