"""Processes that work for another one, know what it has registered, and end with it."""

import os
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager, suppress

import pytest

from kd_lrp_plugin.utils.registry import Registry, list_registering_modules


@contextmanager
def running(path, code: str, **streams):
    """A script in a session of its own, all of which is gone afterwards."""
    path.write_text(textwrap.dedent(code))
    process = subprocess.Popen([sys.executable, path], start_new_session=True, **streams)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_processes_end_with_the_one_that_is_killed(tmp_path):
    """They hold its output open for as long as they live."""
    code = """
        import sys, time, torch
        from kd_lrp_plugin.utils.workers import workers
        if __name__ == "__main__":
            torch.set_num_threads(1)
            with workers(2) as pool:
                list(pool.map(abs, range(2)))
                print("working", flush=True)
                list(pool.map(time.sleep, [600] * 2))
    """
    with running(tmp_path / "busy.py", code, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"working\n"
        process.kill()
        process.communicate(timeout=60)


@pytest.mark.parametrize("interrupt", [False, True])
def test_a_process_of_any_kind_ends_when_its_input_does(interrupt, tmp_path):
    """And may put its work away before."""
    code = f"""
        import time
        from kd_lrp_plugin.utils.workers import end_with_parent
        end_with_parent(interrupt={interrupt})
        try:
            print("working", flush=True)
            time.sleep(600)
        except KeyboardInterrupt:
            print("put away", flush=True)
    """
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with running(tmp_path / "busy.py", code, **streams) as process:
        assert process.stdout.readline() == b"working\n"
        output, _ = process.communicate(timeout=60)  # closes its input
        assert output == (b"put away\n" if interrupt else b"")
        assert process.returncode == (0 if interrupt else 130)


@pytest.mark.slow
def test_spawned_processes_import_the_modules_that_have_registered(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from kd_lrp_plugin.utils.registry import Registry\n"
        "NUMBERS = Registry('number')\n"
        "NUMBERS.register(7, 'seven')\n"
    )
    code = """
        import sys, torch
        from kd_lrp_plugin.utils.workers import workers
        def imported(name):
            return name in sys.modules
        if __name__ == "__main__":
            import mine
            torch.set_num_threads(4)  # so they are spawned, not forked
            with workers(2) as pool:
                print(list(pool.map(imported, ["mine", "mine"])), flush=True)
    """
    with running(tmp_path / "main.py", code, stdout=subprocess.PIPE) as process:
        assert process.communicate(timeout=120)[0] == b"[True, True]\n"


def test_a_registry_knows_who_has_filled_it():
    Registry("test").register(1, "one")
    assert __name__ in list_registering_modules()
