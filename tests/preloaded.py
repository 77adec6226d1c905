"""Programs that tests start, forked from one process that has imported what is slow to import.

A Python that imports torch, timm and the rest is ready after five seconds; a fork of one that has
them is ready at once. The process is started by the first :func:`run` of a test process, has one
thread, imports nothing of this package and nothing of torchdistill, and ends with the tests.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from functools import cache
from pathlib import Path
from typing import Any

SLOW = (
    "captum.attr",
    "jaxtyping",
    "matplotlib.figure",
    "numpy",
    "PIL.Image",
    "scipy.stats",
    "skimage.metrics",
    "sklearn.metrics",
    "timm",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "torchmetrics",
    "torchvision",
)


def run(
    *words: Any,
    cwd: Path | None = None,
    processes: int | None = None,
    offline: bool = False,
) -> subprocess.CompletedProcess[str]:
    """What ``python WORD...`` does.

    Args:
        words: as Python takes them: a script or ``-m`` and a module, and arguments.
        cwd: working directory; default: the caller's.
        processes: start so many by torchrun's agent; default: one, without it.
        offline: whatever connects, fails; and a last line of output says whether torchdistill
            was imported.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "words": [str(word) for word in words],
            "cwd": str(cwd or Path.cwd()),
            "environment": {**os.environ, "OMP_NUM_THREADS": "1"},
            "files": [os.devnull, f"{folder}/out", f"{folder}/err"],
            "processes": processes,
            "offline": offline,
        }
        server = _server()
        print(json.dumps(job), file=server.stdin, flush=True)
        code = json.loads(server.stdout.readline())
        out, err = (Path(file).read_text(encoding="utf-8") for file in job["files"][1:])
    return subprocess.CompletedProcess(job["words"], code, out, err)


@cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, __file__]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(started.terminate)
    return started


def _serve() -> None:
    """Fork for each job, and answer with its exit code."""
    for name in SLOW:
        importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        process = os.fork()
        if process == 0:
            os._exit(_exit_code(job))
        _, status = os.waitpid(process, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


def _exit_code(job: dict[str, Any]) -> int:
    """Run the job and end as Python does, but for the second that tearing down modules takes."""
    code: Any = 1
    try:
        _begin(job)
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _begin(job: dict[str, Any]) -> None:
    os.setsid()
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    for number, file in enumerate(job["files"]):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    if job["offline"]:
        socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = _refuse
    if job["processes"] is None:
        _program(job["words"])
    else:
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=job["processes"],
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.05,
            start_method="fork",
        )
        elastic_launch(config, _program)(job["words"])
    if job["offline"]:
        print("torchdistill" in sys.modules)


def _program(words: list[str]) -> None:
    module = words[0] == "-m"
    sys.argv = words[1:] if module else list(words)
    sys.path[0] = os.getcwd() if module else str(Path(sys.argv[0]).resolve().parent)
    if module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def _refuse(*_: Any) -> None:
    raise OSError("tests are offline")


if __name__ == "__main__":
    _serve()
