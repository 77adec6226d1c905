"""Which files a run was made with: distinguished by content, known again wherever they lie."""

import json
from pathlib import Path

import pytest
from PIL import Image

from kd_lrp_plugin.config.document import parse_document
from kd_lrp_plugin.data.folder import identify_images
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.runs.provenance import list_files

CONFIG = """
datasets:
  a: !import_call
    key: kd_lrp_plugin.torchdistill.folder_images
    init: {kwargs: {root: ROOT, split: Training}}
models:
  model: {key: timm_model, src_ckpt: ROOT/teacher.pt, kwargs: {weights: $DATA/w.pt}}
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    return filled(tmp_path / "data")


def filled(root: Path) -> Path:
    for name in "ab":
        (root / "Training" / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(root / "Training" / name / "1.png")
    (root / "teacher.pt").write_bytes(b"teacher")
    (root / "w.pt").write_bytes(b"weights")
    return root


def found(root: Path) -> dict:
    text = CONFIG.replace("ROOT/", f"{root}/").replace("ROOT,", f"{root},")
    return list_files(parse_document("my.yaml", text))


class TestFiles:
    def test_they_are_known_again_elsewhere(self, root, tmp_path, monkeypatch):
        before = found(root)
        assert None not in before.values()
        monkeypatch.setenv("DATA", str(tmp_path / "moved"))
        assert found(filled(tmp_path / "moved")) == before

    @pytest.mark.parametrize(
        ("change", "key_path"),
        [
            (lambda root: (root / "teacher.pt").write_bytes(b"another"), "models.model.src_ckpt"),
            (lambda root: (root / "w.pt").write_bytes(b"weight?"), "models.model.weights"),
            (lambda root: (root / "Training/a/2.png").write_bytes(b"image"), "datasets.a"),
            (lambda root: (root / "manifest.csv").write_text("file,group\n"), "datasets.a"),
        ],
    )
    def test_another_content_is_another_file(self, root, change, key_path):
        before = found(root)
        change(root)
        after = found(root)
        assert {key for key in before if before[key] != after[key]} == {key_path}

    def test_other_files_in_the_folder_do_not_count(self, root):
        before = found(root)
        (root / "Training/a/notes.txt").write_text("x")
        assert found(root) == before

    def test_what_is_not_there_is_not_known(self, tmp_path):
        assert found(tmp_path / "nowhere") == {
            **{"datasets.a": None, "models.model.src_ckpt": None, "models.model.weights": None}
        }

    @pytest.mark.parametrize("text", ["datasets: 3\nmodels: [1]", "models: {a: 1, b: {kwargs: 2}}"])
    def test_a_config_need_not_be_right(self, text):
        assert set(list_files(parse_document("my.yaml", text)).values()) <= {"none"}


class TestFolder:
    """A run that has begun with its teacher in one folder resumes with it in another."""

    CONFIG = "models:\n  teacher_model:\n    src_ckpt: %s\n"

    @pytest.fixture
    def run(self, tmp_path) -> RunFolder:
        run = RunFolder(tmp_path / "run")
        with run.claimed(self.CONFIG % "runs/t.pt", self.about("one")):
            (run / "last.pt").touch()
        return run

    def about(self, teacher: str | None) -> dict:
        return {"seed": 0, "files": {"models.teacher_model.src_ckpt": teacher}}

    def test_the_same_file_elsewhere(self, run):
        with run.claimed(self.CONFIG % "/moved/runs/t.pt", self.about("one")):
            assert "/moved/runs/t.pt" in (run / "config.yaml").read_text()

    @pytest.mark.parametrize("key", ["root", "weights", "manifest"])
    def test_another_path_of_what_may_not_be_known_by_content(self, run, key):
        config = self.CONFIG % "runs/t.pt"
        (run / "config.yaml").write_text(f"{config}{key}: one\n")
        with (
            pytest.raises(FileExistsError, match=f"was '{key}: one'; now '{key}: two'"),
            run.claimed(f"{config}{key}: two\n", self.about("one")),
        ):
            pass

    @pytest.mark.parametrize("now", ["two", "none"])
    def test_another_file_at_the_same_place(self, run, now):
        words = f"src_ckpt 'one', now '{now}'"
        with (
            pytest.raises(FileExistsError, match=words),
            run.claimed(self.CONFIG % "runs/t.pt", self.about(now)),
        ):
            pass

    def test_what_was_not_noted_counts_as_the_same_at_the_same_place_only(self, run):
        (run / "environment.json").write_text(json.dumps({"seed": 0, "sessions": []}))
        with run.claimed(self.CONFIG % "runs/t.pt", self.about("two")):
            pass
        with (
            pytest.raises(FileExistsError, match=r"was 'src_ckpt: runs/t\.pt'; now"),
            run.claimed(self.CONFIG % "/moved/runs/t.pt", self.about("two")),
        ):
            pass


class TestImages:
    """Other images are other files, wherever a path leads and however it is written."""

    def test_behind_links_to_folders(self, root, tmp_path):
        (root / "Training" / "b").rename(tmp_path / "elsewhere")
        (root / "Training" / "b").symlink_to(tmp_path / "elsewhere")
        before = found(root)
        assert before["datasets.a"] is not None
        Image.new("L", (9, 9)).save(tmp_path / "elsewhere" / "1.png")
        assert found(root) != before

    def test_links_that_lead_back_are_not_followed(self, root):
        before = found(root)
        (root / "Training" / "a" / "up").symlink_to("..")
        assert found(root) == before

    @pytest.mark.parametrize(
        "tag",
        ["!join [%s, '']", "!pathjoin [%s, .]", "!abspath '%s'", "!expanduser '%s'", "*at"],
    )
    def test_below_a_root_made_by_a_tag(self, root, tag):
        written = tag.replace("%s", str(root))
        config = CONFIG.replace("root: ROOT", f"root: {written}").replace("ROOT", str(root))
        text = f"at: &at {root}\n{config}"
        before = list_files(parse_document("", text))
        assert before["datasets.a"] == found(root)["datasets.a"]
        Image.new("L", (9, 9)).save(root / "Training" / "b" / "1.png")
        assert list_files(parse_document("", text)) != before

    def test_of_a_data_set_are_those_of_its_config(self, root):
        assert identify_images(root, "Training") == found(root)["datasets.a"]


class TestOtherSets:
    """Tables with their images, and digits, are known by content like class folders."""

    CONFIG = """
datasets:
  table: !import_call
    key: kd_lrp_plugin.torchdistill.csv_images
    init: {kwargs: {root: ROOT, csv: t.csv, folder: Training, file: name, label: kind}}
  digits: !import_call
    key: kd_lrp_plugin.torchdistill.mnist
    init: {kwargs: {root: ROOT, split: test}}
"""

    @pytest.fixture
    def root(self, root) -> Path:
        (root / "t.csv").write_text("name,kind\na/1.png,a\nb/1.png,b\n")
        for kind in ("images-idx3", "labels-idx1"):
            (root / f"t10k-{kind}-ubyte").write_bytes(kind.encode())
        return root

    def found(self, root: Path) -> dict:
        return list_files(parse_document("", self.CONFIG.replace("ROOT", str(root))))

    def test_they_are_known_again_elsewhere(self, root, tmp_path):
        before = self.found(root)
        assert None not in before.values()
        assert len(before) == 2
        assert self.found(root.rename(tmp_path / "moved")) == before

    @pytest.mark.parametrize(
        ("file", "key_path"),
        [
            ("t.csv", "datasets.table"),
            ("Training/b/1.png", "datasets.table"),
            ("t10k-labels-idx1-ubyte", "datasets.digits"),
        ],
    )
    def test_another_content_is_another_set(self, root, file, key_path):
        before = self.found(root)
        (root / file).write_bytes((root / file).read_bytes() + b"\n")
        after = self.found(root)
        assert {key for key in before if before[key] != after[key]} == {key_path}

    def test_what_is_not_there_or_not_right_is_not_known(self, root, tmp_path):
        assert set(self.found(tmp_path / "nowhere").values()) == {None}
        text = self.CONFIG.replace("ROOT", str(root)).replace("csv: t.csv, ", "")
        assert list_files(parse_document("", text))["datasets.table"] is None
