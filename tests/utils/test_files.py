"""Files of ours: written as a whole, read intact or named, held by one process at a time."""

import errno
import fcntl
import json
import multiprocessing
import os

import pytest

from kd_lrp_plugin.utils import files

CONTENT = {"classes": ["a", "Ü"], "n": 12, "rows": [{"mean": 0.5}, None]}
KINDS = {"classes": list, "n": int, "rows": list}


class TestWriting:
    def test_a_file_is_whole_or_as_before(self, tmp_path):
        file = tmp_path / "a.json"
        files.write_json(file, CONTENT)

        def fails(draft):
            draft.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.raises(OSError, match="Make room"):
            files.put(file, fails)
        assert files.read_json(file, "") == CONTENT
        assert os.listdir(tmp_path) == ["a.json"]

    def test_a_stop_leaves_no_draft(self, tmp_path):
        def stopped(draft):
            draft.write_text("half")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            files.put(tmp_path / "a", stopped)
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("links", [True, False])
    def test_the_first_of_two_stays(self, tmp_path, monkeypatch, links):
        if not links:

            def no_link(*_):
                raise OSError(errno.EPERM, "Operation not permitted")

            monkeypatch.setattr(os, "link", no_link)
        for content in (1, 2):
            files.write_json_once(tmp_path / "a.json", content)
        assert files.read_json(tmp_path / "a.json", "") == 1
        assert os.listdir(tmp_path) == ["a.json"]


class TestReading:
    def test_json_cut_anywhere_is_named_with_its_repair(self, tmp_path):
        file = tmp_path / "a.json"
        files.write_json(file, CONTENT)
        intact = file.read_bytes()
        for length in range(len(intact)):
            file.write_bytes(intact[:length])
            with pytest.raises(ValueError, match=r"a\.json: expected .* Make it again\.$"):
                files.read_json(file, "Make it again.", **KINDS)

    def test_json_with_other_bytes_is_named_or_has_its_keys(self, tmp_path):
        file = tmp_path / "a.json"
        files.write_json(file, CONTENT)
        intact = file.read_bytes()
        for index in range(len(intact)):
            for byte in (0, 0xFF, intact[index] ^ 4, ord('"'), ord("[")):
                file.write_bytes(intact[:index] + bytes([byte]) + intact[index + 1 :])
                try:
                    found = files.read_json(file, "Make it again.", **KINDS)
                except ValueError as error:
                    words = str(error)
                else:
                    assert {k: type(v) for k, v in found.items() if k in KINDS} == KINDS
                    continue
                assert words.startswith(f"{file}: expected ")
                assert words.endswith("Make it again.")

    def test_a_csv_cut_inside_a_row_is_named(self, tmp_path):
        file = tmp_path / "a.csv"
        text = files.to_csv(["image", "p"], [["a, b", 0.25], ['"c"', 0.5], ["two\nlines", 1]])
        intact = text.encode()
        file.write_bytes(intact)
        rows = files.read_csv(file, "")
        assert rows[1:] == [["a, b", "0.25"], ['"c"', "0.5"], ["two\nlines", "1"]]
        ends = {len(part.encode()) for part in (text[:8], text[:20], text[:32])}
        assert all(intact[end - 1 : end] == b"\n" for end in ends)
        for length in set(range(len(intact))) - ends:
            file.write_bytes(intact[:length])
            with pytest.raises(ValueError, match=r"a\.csv: expected .* Make it again\.$"):
                files.read_csv(file, "Make it again.")

    def test_a_deep_nest_is_no_traceback(self, tmp_path):
        file = tmp_path / "a.json"
        file.write_text("[" * 100_000)
        with pytest.raises(ValueError, match="intact JSON"):
            files.read_json(file, "")


class TestHashes:
    def test_it_is_sha256_of_the_bytes(self, tmp_path):
        import hashlib

        file = tmp_path / "a"
        for content in (b"", b"abc", bytes(3 << 20)):
            file.write_bytes(content)
            expected = hashlib.sha256(content).hexdigest()[:16]
            assert files.hash_file(file) == files.hash_contents(content) == expected

    def test_values_count_in_their_order(self):
        assert files.hash_contents([1, 2]) != files.hash_contents([2, 1])


def _try_lock(file, answer) -> None:
    try:
        with files.locked(file):
            answer.put("free")
    except BlockingIOError as error:
        answer.put(str(error))


class TestLock:
    def ask(self, file) -> str:
        context = multiprocessing.get_context("spawn")
        answer = context.Queue()
        process = context.Process(target=_try_lock, args=(file, answer))
        process.start()
        try:
            return answer.get(timeout=60)
        finally:
            process.join()

    def test_one_process_at_a_time(self, tmp_path):
        file = tmp_path / ".lock"
        with files.locked(file):
            assert "another process holds" in self.ask(file)
        assert self.ask(file) == "free"

    @pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
    def test_a_file_system_without_locks_is_named_and_nobody_enters(
        self, tmp_path, monkeypatch, code
    ):
        def none(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", none)
        entered = False
        with (
            pytest.raises(OSError, match=errno.errorcode[code]) as error,
            files.locked(tmp_path / ".lock"),
        ):
            entered = True
        assert not entered
        assert "local disk" in str(error.value)
        assert not isinstance(error.value, BlockingIOError)

    def test_a_lock_that_was_deleted_meanwhile_is_none(self, tmp_path, monkeypatch):
        """Who waits with an old file in hand must not enter beside who locks the new one."""
        file, flock, first = tmp_path / ".lock", fcntl.flock, []

        def deletes(handle, how):
            flock(handle, how)
            if not first:
                first.append(handle)
                file.unlink()

        monkeypatch.setattr(fcntl, "flock", deletes)
        with files.locked(file):
            assert file.exists()
            monkeypatch.undo()
            assert "another process holds" in self.ask(file)


def test_json_is_for_people_too(tmp_path):
    files.write_json(tmp_path / "a.json", CONTENT)
    assert "Ü" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == CONTENT
