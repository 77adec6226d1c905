"""A dask scheduler in this process, and workers in others: what the tests of clusters share."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import distributed

from kd_lrp_plugin.models.mobilenetv2 import MobileNetV2
from kd_lrp_plugin.selection.candidates import Candidate


class Workers:
    """Workers of one scheduler, each a process without a nanny.

    Args:
        cluster: of which the scheduler is.
        folder: for what they write.
    """

    def __init__(self, cluster: distributed.LocalCluster, folder: Path) -> None:
        self.address = cluster.scheduler_address
        self._cluster, self.folder = cluster, folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        """One more, which the scheduler knows on return."""
        before = len(self._cluster.scheduler.workers)
        command = [sys.executable, "-m", "distributed.cli.dask_worker", self.address, "--no-nanny"]
        command += ["--no-dashboard", "--local-directory", str(self.folder), *words]
        log = (self.folder / f"worker-{len(self.processes)}.log").open("wb")
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        env = {**os.environ, "PYTHONPATH": path, **environment}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=self.folder)
        self.processes.append(process)
        end = time.monotonic() + 300
        while len(self._cluster.scheduler.workers) <= before:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(Path(log.name).read_text())
            time.sleep(0.05)
        return process

    def kill(self, process: "subprocess.Popen[bytes]") -> None:
        """Kill one, which the scheduler has noticed on return."""
        before = len(self._cluster.scheduler.workers)
        process.kill()
        process.wait()
        while len(self._cluster.scheduler.workers) >= before:
            time.sleep(0.05)

    def end(self) -> None:
        """Kill all that are left."""
        for process in self.processes:
            process.kill()
            process.wait()


@contextmanager
def dask_workers(folder: Path) -> Iterator[Workers]:
    """A scheduler on the loopback, whose workers are started one by one."""
    with distributed.LocalCluster(
        n_workers=0, dashboard_address=None, host="127.0.0.1", silence_logs=50
    ) as cluster:
        found = Workers(cluster, folder)
        try:
            yield found
        finally:
            found.end()


# --- what workers do, in a module that they can import --------------------------------------------

KEPT: list[int] = []


def keep(exponent: int, file: Path) -> None:
    KEPT[:] = [exponent]
    with file.open("a") as lines:
        lines.write(f"{os.getpid()}\n")


def power(number: int) -> int:
    return number ** KEPT[0]


def make_plain_candidate(student: MobileNetV2) -> Candidate:
    return Candidate(str(student), partial(student.build, 4))
