"""A cache on the disk: filled once whatever kills come, and refused where it is damaged."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from kd_lrp_plugin.training.cache import store as module
from kd_lrp_plugin.training.cache.store import CacheStore, Part

ROWS, BATCH = 10, 3
PARTS = [Part("logits", (4,), "float32"), Part("maps 0", (2, 2), "float16")]


def store(folder: Path, identity: str = "one") -> CacheStore:
    return CacheStore(folder, {"of": identity}, PARTS, ROWS)


def values(start: int, stop: int) -> dict[str, np.ndarray]:
    rows = np.arange(start, stop, dtype=np.float32)
    return {
        "logits": rows[:, None] + np.arange(4, dtype=np.float32) / 4,
        "maps 0": (rows[:, None, None] * np.ones((1, 2, 2), np.float32)).astype(np.float16),
    }


def batches(start: int, seen: list[int] | None = None, stop_at: int = ROWS + 1):
    for first in range(start, ROWS, BATCH):
        if first >= stop_at:
            raise KeyboardInterrupt
        if seen is not None:
            seen.append(first)
        yield values(first, min(first + BATCH, ROWS))


def check_content(folder: Path) -> None:
    for name, array in store(folder).open().items():
        np.testing.assert_array_equal(array, values(0, ROWS)[name])


class TestFilling:
    def test_it_holds_what_it_was_given_and_is_not_filled_again(self, tmp_path):
        assert store(tmp_path / "a" / "b").fill(batches)
        check_content(tmp_path / "a" / "b")
        assert not store(tmp_path / "a" / "b").fill(batches)
        assert store(tmp_path).size == ROWS * (4 * 4 + 4 * 2)

    def test_a_killed_one_goes_on_behind_what_was_noted(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "_EVERY", 0.0)
        with pytest.raises(KeyboardInterrupt):
            store(tmp_path).fill(lambda start: batches(start, stop_at=6))
        with pytest.raises(ValueError, match=f"Delete {tmp_path}; the cache is made again"):
            store(tmp_path).open()
        seen: list[int] = []
        assert store(tmp_path).fill(lambda start: batches(start, seen))
        assert seen == [6, 9]
        check_content(tmp_path)

    def test_one_that_was_killed_before_a_note_begins_again(self, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            store(tmp_path).fill(lambda start: batches(start, stop_at=6))
        seen: list[int] = []
        store(tmp_path).fill(lambda start: batches(start, seen))
        assert seen == [0, 3, 6, 9]
        check_content(tmp_path)

    def test_a_note_of_arrays_that_are_gone_does_not_count(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "_EVERY", 0.0)
        with pytest.raises(KeyboardInterrupt):
            store(tmp_path).fill(lambda start: batches(start, stop_at=6))
        (tmp_path / "part_00.npy").unlink()
        with pytest.raises(KeyboardInterrupt):
            store(tmp_path).fill(lambda start: batches(start, stop_at=0))  # before any note
        seen: list[int] = []
        store(tmp_path).fill(lambda start: batches(start, seen))
        assert seen == [0, 3, 6, 9]
        check_content(tmp_path)

    def test_too_few_answers_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="an answer for each image, got 3 of 10 rows"):
            store(tmp_path).fill(lambda start: iter([values(0, 3)]))
        assert not store(tmp_path).complete

    def test_of_two_processes_one_fills_it_and_the_other_waits(self, tmp_path):
        fork = multiprocessing.get_context("fork")
        counts = fork.SimpleQueue()
        processes = [fork.Process(target=fill_slowly, args=(tmp_path, counts)) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(20)
        assert [process.exitcode for process in processes] == [0, 0]
        assert sorted(counts.get() for _ in processes) == [False, True]
        check_content(tmp_path)

    @pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="nothing reserves space here")
    def test_a_full_disk_is_an_error_before_anything_is_written(self, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="Make room if the disk is full"):
            store(tmp_path).fill(batches)
        monkeypatch.undo()
        assert store(tmp_path).fill(batches)
        check_content(tmp_path)


def fill_slowly(folder: Path, counts) -> None:
    def make(start: int):
        for batch in batches(start):
            time.sleep(0.1)
            yield batch

    counts.put(store(folder).fill(make))


class TestDamage:
    @pytest.fixture
    def filled(self, tmp_path) -> Path:
        store(tmp_path).fill(batches)
        return tmp_path

    def test_another_byte_is_found(self, filled):
        file = filled / "part_01.npy"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"part_01\.npy: expected the array .* got other bytes"
        ):
            store(filled).open()

    def test_a_missing_array_is_found(self, filled):
        (filled / "part_00.npy").unlink()
        with pytest.raises(ValueError, match=r"part_00\.npy: expected the array .* got none"):
            store(filled).open()

    @pytest.mark.parametrize("text", ['{"cut', '{"identity": {"of": "other"}}'])
    def test_other_facts_are_refused(self, filled, text):
        (filled / "about.json").write_text(text)
        with pytest.raises(ValueError, match=rf"about\.json: expected .* Delete {filled}"):
            store(filled).open()

    def test_a_cache_of_another_is_refused(self, filled):
        with pytest.raises(ValueError, match="got those of another teacher, or other images"):
            store(filled, "other").open()

    def test_what_is_there_can_be_read_by_people(self, filled):
        about = json.loads((filled / "about.json").read_text())
        assert about["parts"][1] == {"name": "maps 0", "shape": [2, 2], "dtype": "float16"}
