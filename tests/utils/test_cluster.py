"""A worker shares folder, locks and versions with who sends it work, or is refused by name."""

import fcntl
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from dask_cluster import dask_workers, keep, power

from kd_lrp_plugin.utils import cluster, files, orders
from kd_lrp_plugin.utils.orders import Order, answer_order, check_order, hold_token, list_versions
from kd_lrp_plugin.utils.workers import (
    BUSY,
    UNWANTED,
    ProcessJob,
    Workforce,
    local_processes,
    run_process,
)


@pytest.fixture
def order(tmp_path):
    with hold_token(tmp_path / "runs") as token:
        yield Order(token, Path.cwd(), list_versions())


class TestOrders:
    def test_a_worker_that_shares_everything_answers_with_a_file(self, order):
        check_order(order)
        answer = answer_order(order)
        assert answer.file.parent == order.token.parent
        assert answer.file.read_text() == answer.file.name
        assert answer.cores >= 1

    def test_another_version_is_named_with_both(self, order):
        other = replace(order, versions={**order.versions, "timm": "0.1", "torch": "1.0"})
        here = f"torch {order.versions['torch']}, timm {order.versions['timm']}"
        with pytest.raises(
            ValueError, match=f"process {os.getpid()}: expected torch 1.0, timm 0.1,"
        ):
            check_order(other)
        with pytest.raises(ValueError, match=f"got {here}.* Start the workers from"):
            check_order(other)

    def test_other_source_is_another_version_and_that_of_a_process_is_what_it_has_loaded(
        self, tmp_path
    ):
        (tmp_path / "utils").mkdir()
        (tmp_path / "utils/cluster.py").write_text("1")
        before = orders.hash_source(tmp_path)
        assert orders.hash_source(tmp_path) == before
        (tmp_path / "losses.py").write_text("")
        assert orders.hash_source(tmp_path) != before
        loaded = orders.hash_source(Path(orders.__file__).parents[1])
        assert list_versions()["kd_lrp_plugin"] == f"with source {loaded}"

    def test_a_sender_that_begins_leaves_the_answers_to_another_one(self, tmp_path):
        with hold_token(tmp_path) as token:
            answer = answer_order(Order(token, tmp_path, list_versions()))
            with hold_token(tmp_path):
                assert answer.file.exists()
        with hold_token(tmp_path):
            assert not answer.file.exists()

    def test_who_looks_at_a_lock_does_not_hold_it(self, order):
        with order.token.with_name("free").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # as another one that looks
            assert not files.is_locked(Path(file.name))
        assert files.is_locked(order.token)

    def test_another_folder_is_named(self, order, tmp_path):
        with pytest.raises(ValueError, match=r"to read .*elsewhere.*Mount .* at the same path"):
            check_order(replace(order, token=tmp_path / "elsewhere" / order.token.name))
        with pytest.raises(ValueError, match=r"expected the folder .*gone, got none"):
            check_order(replace(order, directory=tmp_path / "gone"))

    def test_a_token_of_another_disk_at_the_same_path_is_refused(self, order):
        order.token.write_text("of another machine")
        with pytest.raises(ValueError, match=r"kd_lrp_token-\w+' in it, got 'of another machine'"):
            check_order(order)

    def test_locks_that_only_one_machine_sees_are_refused(self, tmp_path):
        """As on a network file system that is mounted with local locks."""
        token = tmp_path / "token"
        token.write_text("token")
        order = Order(token, tmp_path, list_versions())
        with pytest.raises(
            ValueError, match=r"the lock of .*token to be held, got one that is free"
        ):
            check_order(order)

    def test_a_machine_without_the_gpu_of_the_others_is_refused(self, order, monkeypatch):
        monkeypatch.setattr(orders.torch.cuda, "is_available", lambda: False)
        check_order(replace(order, cuda=False))
        with pytest.raises(ValueError, match=r"expected a GPU, got no GPU"):
            check_order(replace(order, cuda=True))

    def test_a_folder_that_cannot_be_written_is_named(self, order, monkeypatch):
        def full(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(ValueError, match=r"to write into .*runs, got PermissionError"):
            answer_order(order)

    def test_work_is_wanted_until_its_sender_ends_however_it_does(self, tmp_path):
        def hold() -> None:
            with hold_token(tmp_path) as token:
                here.send(token)
                time.sleep(600)

        context = multiprocessing.get_context("fork")
        there, here = context.Pipe(duplex=False)
        process = context.Process(target=hold)
        process.start()
        token = there.recv()
        order = Order(token, tmp_path, {})
        assert order.is_wanted()
        process.kill()
        process.join()
        assert token.exists()
        assert not order.is_wanted()
        with hold_token(tmp_path) as mine:  # the next one tidies up
            assert [file for file in tmp_path.iterdir() if "token" in file.name] == [mine]
        assert not any(tmp_path.iterdir())


class TestProcesses:
    """The part of a worker: it needs no dask."""

    @pytest.fixture
    def job(self, tmp_path):
        code = "import os, sys; print('working', flush=True); sys.exit(7 * bool(os.read(0, 1)))"
        log, lock = tmp_path / "new/0.log", tmp_path / ".lock"
        return ProcessJob(("-c", code), tmp_path, log, lock, {"OMP_NUM_THREADS": "3"})

    def test_one_that_is_wanted_no_longer_is_ended(self, job):
        def wanted() -> bool:
            return not (job.log.exists() and "working" in job.log.read_text())

        assert run_process(job, wanted) == UNWANTED
        assert job.log.read_text() == "working\n"
        assert run_process(replace(job, log=job.log.with_name("1.log")), lambda: False) == UNWANTED
        assert not job.log.with_name("1.log").exists()

    def test_one_whose_lock_is_held_is_not_begun(self, job):
        """As where a worker that is out of reach runs it still."""
        with files.locked(job.lock):
            assert run_process(job, lambda: True) == BUSY
        assert not job.log.exists()

    def test_it_has_the_threads_of_its_job_and_its_exit_code_comes_back(self, job):
        words = ("-c", "import os, sys; sys.exit(int(os.environ['OMP_NUM_THREADS']))")
        with local_processes() as pool:
            assert pool.submit(replace(job, words=words)).result() == 3

    def test_jobs_beside_a_scheduler_are_refused(self):
        with pytest.raises(ValueError, match=r"--jobs: expected none beside --scheduler, got 2"):
            Workforce(2, "tcp://host:8786")


class TestConnecting:
    @pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nothing://here", "127.0.0.1", " "])
    def test_an_address_where_no_scheduler_answers_is_named_soon(self, address, monkeypatch):
        monkeypatch.setattr(cluster, "CONNECT", 0.5)
        with pytest.raises(ConnectionError, match=r"--scheduler.*Start one with `dask scheduler`"):
            cluster.connect(address).__enter__()

    def test_another_version_of_dask_is_named_with_its_end(self):
        def about(distributed: str) -> dict:
            packages, host = {"distributed": distributed}, {"python": "3.11.7.final.0"}
            return {"packages": packages, "host": host}

        class Client:
            def __init__(self, scheduler: str, worker: str) -> None:
                self.found = {"client": about("2"), "scheduler": about(scheduler)}
                self.found["workers"] = {"tcp://one": about("2"), "tcp://two": about(worker)}

            def get_versions(self) -> dict:
                return self.found

        cluster._check_dask(Client("2", "2"), "here")
        words = r"expected Python 3.11, distributed 2, got worker tcp://two with Python 3.11, distr"
        with pytest.raises(ConnectionError, match=words):
            cluster._check_dask(Client("2", "1"), "here")
        with pytest.raises(ConnectionError, match=r"got the scheduler with .* distributed 3"):
            cluster._check_dask(Client("3", "2"), "here")


@pytest.mark.slow
class TestWorkers:
    @pytest.fixture(scope="class")
    @classmethod
    def workers(cls, tmp_path_factory):
        with dask_workers(tmp_path_factory.mktemp("dask")) as found:
            with pytest.raises(ValueError, match=r"expected a worker or more, got none"):
                cluster.open_cluster(found.address, found.folder / "runs").__enter__()
            found.start("--nthreads", "1")
            found.start("--nthreads", "1")
            yield found

    def test_they_begin_once_for_each_sender_and_compute(self, workers, tmp_path):
        for exponent in (2, 3):
            with cluster.cluster_workers(
                workers.address, tmp_path, keep, exponent, tmp_path / str(exponent)
            ) as pool:
                assert list(pool.map(power, range(20))) == [n**exponent for n in range(20)]
            begun = (tmp_path / str(exponent)).read_text().split()
            assert len(begun) == len(set(begun)) <= 2
        assert {file.name for file in tmp_path.iterdir()} == {"2", "3"}

    def test_an_error_of_a_piece_of_work_is_that_of_the_call(self, workers, tmp_path):
        with (
            cluster.cluster_workers(workers.address, tmp_path) as pool,
            pytest.raises(ValueError, match=r"invalid literal"),
        ):
            list(pool.map(int, ["1", "x"]))

    def test_work_of_a_module_that_they_lack_ends_none_of_them(
        self, workers, tmp_path, monkeypatch
    ):
        (tmp_path / "only_here.py").write_text("def double(number):\n    return 2 * number\n")
        monkeypatch.syspath_prepend(tmp_path)
        import only_here

        with cluster.cluster_workers(workers.address, tmp_path / "runs") as pool:
            with pytest.raises(ModuleNotFoundError, match=r"only_here"):
                list(pool.map(only_here.double, range(2)))
            assert list(pool.map(abs, [-1, -2])) == [1, 2]

    def test_one_with_other_code_and_one_with_two_threads_are_refused(self, workers, tmp_path):
        (tmp_path / "kd_lrp_plugin").mkdir()
        (tmp_path / "kd_lrp_plugin/__init__.py").write_text("raise ImportError('of another make')")
        other = workers.start(PYTHONPATH=str(tmp_path))
        try:
            with pytest.raises(
                ValueError, match=r"this version of kd_lrp_plugin, got .*another make"
            ):
                cluster.open_cluster(workers.address, tmp_path / "runs").__enter__()
        finally:
            workers.kill(other)
        both = workers.start("--nthreads", "2")
        try:
            with pytest.raises(ValueError, match=r"workers of one thread each, got {.*: 2}"):
                cluster.cluster_workers(workers.address, tmp_path / "runs").__enter__()
        finally:
            workers.kill(both)
