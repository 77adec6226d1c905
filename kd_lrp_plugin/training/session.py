"""Under which circumstances a session of a run works: command, versions, commits and device."""

import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import kd_lrp_plugin
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.utils.distributed import DistributedContext


def measure_memory(context: DistributedContext) -> float:
    """The peak so far, in 10^6 bytes: of the GPU where there is one, else of the process."""
    if context.device.type == "cuda":
        return torch.cuda.max_memory_allocated(context.device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def describe_session(spec: RunSpec, context: DistributedContext) -> dict[str, Any]:
    """Command, versions, commits and device of a session of a run."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("torchvision", "timm", "captum", "torchdistill")},
        "kd_lrp_plugin": kd_lrp_plugin.__version__,  # also of a checkout that is only on the path
    }
    cuda = context.device.type == "cuda"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "config": str(spec.config),
        "module_folder": str(Path(spec.config).resolve().parent),
        "overrides": list(spec.overrides),
        "versions": versions,
        "commit": _commit(Path(__file__).parent),
        "commit_of_config": _commit(Path(spec.config).resolve().parent),
        "device": torch.cuda.get_device_name(context.device) if cuda else str(context.device),
        "processes": context.world_size,
        "threads": torch.get_num_threads(),
    }


def _commit(folder: Path) -> str | None:
    """The commit that is checked out there, marked if files differ from it; None without git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
