"""What a selection keeps in files: whole, or named with the repair; locks that outlive nobody."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from kd_lrp_plugin.models.mobilenetv2 import MobileNetV2
from kd_lrp_plugin.selection.cache import ScoreCache
from kd_lrp_plugin.selection.candidates import Candidate, ScoringSetup, Teacher
from kd_lrp_plugin.selection.search import JournalLock, SearchTask, search
from kd_lrp_plugin.selection.select import load_choice, read_choice, save_choice
from kd_lrp_plugin.selection.spaces import Space
from kd_lrp_plugin.selection.spec import SelectionSpec

SPACE = Space({"width": (0.25, 0.35), "depth": (0.5,), "head": ("linear", "mlp")})
TEACHER = Teacher(partial(MobileNetV2(0.25, 0.5).build, 4), trained=False)
CANDIDATE = Candidate("a", TEACHER.build)


def plain(student: MobileNetV2) -> Candidate:
    return Candidate(str(student), partial(student.build, 4))


def batches() -> list:
    return [(torch.ones(4, 3, 16, 16), torch.arange(4))]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def setup() -> ScoringSetup:
    return ScoringSetup(TEACHER, batches(), ["parameters"])


def choice() -> SelectionSpec:
    return SelectionSpec(4, "choice.json", None, {"key": "timm_model"}, ["test_resnet"])


class TestChoice:
    RECORD: tuple = ({"candidate": "test_resnet", "entry": {"key": "timm_model", "kwargs": {}}},)

    @pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.6, 0.9, 0.99])
    def test_cut_short_is_named_with_the_repair(self, share):
        save_choice(choice(), self.RECORD)
        content = Path("choice.json").read_bytes()
        Path("choice.json").write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=r"choice.json: expected .* computes none of them"):
            load_choice(choice())

    @pytest.mark.parametrize("text", ["[]", "7", "null", "{}", '{"entry": 3}', "\xff\x00"])
    def test_of_other_content_is_named_with_the_repair(self, text):
        Path("choice.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=r"choice.json: expected .* Delete this file"):
            load_choice(choice())

    @pytest.mark.parametrize("key", ["candidate", "entry", "question", "ranking"])
    def test_with_a_value_of_another_kind_is_named(self, key):
        save_choice(choice(), self.RECORD)
        content = json.loads(Path("choice.json").read_text())
        Path("choice.json").write_text(json.dumps({**content, key: 3}))
        with pytest.raises(ValueError, match=f"choice.json: expected {key!r} of type"):
            read_choice(Path("choice.json"))


class TestScores:
    def rows(self, file: Path, setup: ScoringSetup) -> list[int]:
        cache = ScoreCache(file, setup)
        return [seed for seed in range(4) if cache.row(CANDIDATE, seed)]

    def write(self, file: Path, setup: ScoringSetup) -> list[bytes]:
        cache = ScoreCache(file, setup)
        for seed in range(4):
            row = {"seed": seed, "scores": {"parameters": [-1.5 - seed]}, "problems": {}}
            cache.add(CANDIDATE, {"candidate": "a", **row})
        return file.read_bytes().splitlines(keepends=True)

    @pytest.mark.parametrize(
        "damage",
        [
            *(b"", b"\x00\x00\x00", b"\xff\xfe", b"5", b"[]", b"{}", b'{"setting": 3}'),
            *(b'"text"', b"null", b'{"of": []', b'{"setting": "a", "of": 1, "seed": 0}'),
        ],
    )
    def test_that_are_damaged_are_left_out_and_the_others_used(self, damage, setup, caplog):
        file = Path("scores.jsonl")
        lines = self.write(file, setup)
        lines[2] = damage + b"\n"
        file.write_bytes(b"".join(lines))
        with caplog.at_level(logging.WARNING):
            assert self.rows(file, setup) == [0, 1, 3]
        assert ("scores.jsonl: 1 lines are damaged" in caplog.text) is bool(damage)

    def test_cut_anywhere_keep_what_is_whole(self, setup):
        """And what is added afterwards is read again, whatever was in front of it."""
        file = Path("scores.jsonl")
        content = b"".join(self.write(file, setup))
        for end in range(0, len(content) + 1, 7):
            file.write_bytes(content[:end])
            whole = content[:end].count(b"\n")
            kept = self.rows(file, setup)
            assert kept[:whole] == list(range(whole))
            assert len(kept) <= whole + 1  # the last may lack its end of line only
            row = {"seed": 9, "scores": {"parameters": [-1.0]}, "problems": {}}
            ScoreCache(file, setup).add(CANDIDATE, {"candidate": "a", **row})
            assert ScoreCache(file, setup).row(CANDIDATE, 9)

    @pytest.mark.parametrize("values", ['"a"', "[true, {}]", '["0.1"]', "[NaN]", "3"])
    def test_of_another_kind_are_damaged(self, values, setup):
        file = Path("scores.jsonl")
        lines = [line.decode() for line in self.write(file, setup)]
        lines[1] = lines[1].replace("[-2.5]", values)
        file.write_text("".join(lines))
        assert self.rows(file, setup) == [0, 2, 3]


def look(folder: str | Path, trials: int = 4):
    setup = ScoringSetup(TEACHER, batches(), ["parameters"])
    return search(SearchTask(SPACE, plain, setup, trials), Path(folder))


class TestJournal:
    def test_is_searched_alike_each_time(self):
        assert look("one", 12) == look("two", 12)

    @pytest.mark.parametrize("line", ["5", "nonsense", '{"op_code": 99}', '{"op_code": 4}'])
    def test_that_is_damaged_is_named_with_the_repair(self, line):
        before = look("chosen")
        file = Path("chosen/study.journal")
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join([*lines[:-1], f"{line}\n", lines[-1]]))
        with pytest.raises(ValueError, match=r"study.journal: expected an intact journal.*Delete"):
            look("chosen")
        file.unlink()
        scored = Path("chosen/scores.jsonl").read_bytes()
        assert look("chosen") == before
        assert Path("chosen/scores.jsonl").read_bytes() == scored

    @pytest.mark.parametrize("target", ["study.journal", "chosen/study.journal", "elsewhere:7"])
    @pytest.mark.parametrize("absolute", [False, True])
    def test_is_not_held_by_what_others_have_left(self, folder, target, absolute):
        """Links that a killed process, of this host or another, made for the journal."""
        Path("chosen").mkdir()
        for name in ("study.journal.lock", "study.journal.held", "study.journal.held.lock"):
            if name.endswith(".lock"):
                Path("chosen", name).symlink_to(folder / target if absolute else target)
            else:
                Path("chosen", name).write_text("another-host 1234")
        assert len(look("chosen").rows) > 0

    @pytest.mark.parametrize("relative", [True, pytest.param(False, marks=pytest.mark.slow)])
    def test_is_let_go_by_a_killed_search(self, relative, folder):
        """It is killed while it holds the lock, and given again by the same words."""
        code = """
            import sys, time
            from pathlib import Path
            from kd_lrp_plugin.selection.search import JournalLock
            Path(sys.argv[1]).parent.mkdir()
            JournalLock(Path(sys.argv[1])).acquire()
            print("held", flush=True)
            time.sleep(600)
        """
        file = Path("chosen/study.journal") if relative else folder / "chosen/study.journal"
        words = [sys.executable, "-c", textwrap.dedent(code), str(file)]
        holder = subprocess.Popen(words, stdout=subprocess.PIPE)
        try:
            assert holder.stdout.readline() == b"held\n"
        finally:
            os.kill(holder.pid, signal.SIGKILL)
            holder.communicate()
        assert len(look(file.parent).rows) > 0

    def test_is_held_by_one_at_a_time(self):
        one, other = JournalLock(Path("journal")), JournalLock(Path("journal"))
        one.acquire()
        script = "import fcntl, sys; fcntl.flock(open('journal.held'), 6)"  # exclusive, at once
        assert subprocess.run([sys.executable, "-c", script], stderr=subprocess.DEVNULL).returncode
        one.release()
        other.acquire()
        other.release()

    def test_is_held_by_a_file_where_the_system_has_no_locks(self, monkeypatch):
        def refuse(*_):
            raise OSError(38, "not implemented")

        monkeypatch.setattr("kd_lrp_plugin.selection.search.fcntl.flock", refuse)
        lock = JournalLock(Path("journal"))
        lock.acquire()
        assert Path("journal.held.lock").exists()
        lock.release()
        assert not Path("journal.held.lock").exists()
        stale = JournalLock(Path("journal"))
        stale.grace_period = 0.2
        Path("journal.held.lock").touch()
        begun = time.monotonic()
        stale.acquire()
        assert time.monotonic() - begun > 0.1
        stale.release()


def test_scores_of_images_that_are_not_square_are_kept_apart(setup):
    wide = ScoringSetup(TEACHER, [(torch.randn(4, 3, 16, 64), torch.arange(4))], ["parameters"])
    assert wide.image_size == (16, 64)
    assert ScoreCache(Path("a"), wide).setting != ScoreCache(Path("a"), setup).setting
