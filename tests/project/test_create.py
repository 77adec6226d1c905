"""A project appears whole, says what was chosen, is the same each time, and its commands run."""

import json
import re
import shlex
import shutil
from pathlib import Path

import preloaded
import pytest
from typer.testing import CliRunner

from kd_lrp_plugin.cli.main import app
from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.project import create
from kd_lrp_plugin.project.choices import Models, from_project, name_from_project
from kd_lrp_plugin.project.create import Data, create_project
from kd_lrp_plugin.studies.parser import read_plan
from kd_lrp_plugin.torchdistill import class_weights, folder_images

SMALL = ("test_resnet", "test_efficientnet")
NAMES = ("glioma", "notumor")


def draw(root: Path, per_class: dict[str, int], seed: int = 0) -> list[Path]:
    """Grey phantoms of 48 px in a folder per class."""
    data = Phantom("train", size=4 * max(per_class.values()), image_size=48, seed=seed)
    left, files = dict(per_class), []
    for index, target in enumerate(data.targets):
        name = data.classes[target]
        if left.get(name, 0) > 0:
            left[name] -= 1
            file = root / name / f"{seed}_{index:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            data.image(index).convert("L").save(file)
            files.append(file)
    return files


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """``images``, one class nested, and of them ``project``; its configs have been tried."""
    folder = tmp_path_factory.mktemp("init")
    draw(folder / "images", dict.fromkeys(NAMES, 8))
    inner = folder / "images/glioma/2021"
    (folder / "images/glioma").rename(folder / "moved")
    inner.parent.mkdir()
    (folder / "moved").rename(inner)
    create_project(Data(folder / "images"), folder / "project", Models(*SMALL))
    return folder


def copy_without(folder: Path, to: Path) -> None:
    """Images and project, without what commands have left."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("runs", "page.html"))


class TestProject:
    def test_nothing_lies_beside_it(self, made):
        assert sorted(path.name for path in made.iterdir()) == ["images", "project"]

    def test_what_was_chosen_is_written(self, made):
        values = resolve_config(made / "project/student.yaml").values
        assert values["root"] == "../images"
        assert values["classes"] == list(NAMES)
        assert values["num_classes"] == 2
        assert values["image_size"] == 64
        assert values["models"]["teacher_model"]["src_ckpt"] == "runs/teacher/best.pt"
        readme = (made / "project/README.md").read_text()
        assert "64 is the smallest of 64, 96" in readme
        assert "three equal channels" in readme
        assert "There are 2 classes: glioma, notumor. Folders in theirs, such as 2021" in readme
        assert "Classes are not weighed" in readme
        assert f"{values['batch_size']} images" in readme
        assert f"There are {values['train']['num_epochs']} epochs" in readme

    def test_splits_share_no_image_and_hold_every_class(self, made):
        entries = resolve_config(made / "project/data.yaml").values["datasets"]
        seen: list[str] = []
        for entry in entries.values():
            kwargs = {**entry["init"]["kwargs"], "root": str(made / "images")}
            data = folder_images(
                **{**kwargs, "manifest": str(made / "project" / kwargs["manifest"])}
            )
            assert set(data.targets) == {0, 1}
            seen += [file for file, _ in data.samples]
        assert len(seen) == len(set(seen)) == 16

    def test_the_number_of_classes_is_written_once(self, made):
        texts = {file.name: file.read_text() for file in (made / "project").glob("*.yaml")}
        assert [name for name, text in texts.items() if re.search(r"num_classes: .*\d", text)] == [
            "data.yaml"
        ]

    def test_a_second_init_writes_the_same(self, made, tmp_path):
        shutil.copytree(made / "images", tmp_path / "images")
        create_project(Data(tmp_path / "images"), tmp_path / "project", Models(*SMALL))
        files = sorted(made.glob("project/*.yaml"))
        assert len(files) == 6
        for file in [*files, made / "project/checked/clean_split.csv"]:
            again = tmp_path / file.relative_to(made)
            assert again.read_bytes() == file.read_bytes(), file

    def test_an_existing_one_is_left_as_it_is(self, made):
        before = {f: f.read_bytes() for f in (made / "project").rglob("*") if f.is_file()}
        with pytest.raises(FileExistsError, match=r"a new folder, got .*project, which is there"):
            create_project(Data(made / "images"), made / "project", Models(*SMALL))
        assert before == {f: f.read_bytes() for f in before}


@pytest.mark.slow
class TestCommands:
    def test_those_of_the_readme_run_as_written(self, made, tmp_path):
        copy_without(made, tmp_path / "copy")
        project = tmp_path / "copy/project"
        text = (project / "README.md").read_text()
        (block,) = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        lines = block.splitlines()
        assert [line.split()[1] for line in lines] == [
            *("distill", "select", "distill", "evaluate", "explain", "study", "report")
        ]
        for line in lines:
            _, command, *words = shlex.split(line)
            short = ["--set", "train.num_epochs=1"] if command in ("distill", "study") else []
            ran = preloaded.run("-m", "kd_lrp_plugin.cli", command, *words, *short, cwd=project)
            assert ran.returncode == 0, f"{line}\n{ran.stdout}\n{ran.stderr}"
        page = (project / "page.html").read_text()
        assert "Not evaluated" not in page
        assert "No metrics of maps were computed of teacher, student" not in page
        study = json.loads((project / "runs/studies/study/study.json").read_text())
        assert study["final"]


class TestTable:
    def test_leaks_imbalance_and_splits_of_a_table(self, tmp_path, monkeypatch):
        root = tmp_path / "set"
        files = draw(root / "all", {"glioma": 12, "notumor": 5})
        first = next(file for file in files if file.parent.name == "glioma")
        copy = first.with_name("copy.png")
        shutil.copy(first, copy)  # of a training image, in the test set
        tests = [copy, *draw(root / "all", dict.fromkeys(NAMES, 3), seed=1)]
        word = {"glioma": "yes", "notumor": "no"}
        rows = [
            f"{file.relative_to(root / 'all')},{word[file.parent.name]},{part}"
            for part, group in (("train", files), ("test", tests))
            for file in group
        ]
        (root / "labels.csv").write_text("\n".join(["file,label,split", *rows]) + "\n")
        out = tmp_path / "out"
        models = Models("test_resnet", "test_resnet", method="kd")
        choices, summary = create_project(Data(root), out, models)
        assert summary["leaks"]["test"]["duplicate"] == 1
        assert choices.counts == {"train": {"no": 5, "yes": 11}, "test": {"no": 3, "yes": 4}}
        assert choices.is_weighed
        assert any(reason.startswith("LEAK: 1 images") for reason in choices.reasons)
        assert not (out / "kd.yaml").exists()
        assert "class_weights: !import_call" in (out / "data.yaml").read_text()
        data = folder_images(str(root), "train", manifest=str(out / "checked/clean_split.csv"))
        assert class_weights(data) == pytest.approx([16 / 10, 16 / 22])
        monkeypatch.chdir(out)
        with pytest.raises(FileNotFoundError, match=r"Make it with: kd-lrp distill teacher\.yaml"):
            read_plan("study.yaml")  # the teacher comes first
        file = Path("runs/teacher/best.pt")
        file.parent.mkdir(parents=True)
        file.touch()
        assert {run.name for run in read_plan("study.yaml").runs} == {"CE", "KD"}


class TestRefusals:
    @pytest.fixture
    def images(self, tmp_path) -> Path:
        draw(tmp_path / "images", dict.fromkeys(NAMES, 4))
        return tmp_path / "images"

    def test_what_fails_leaves_nothing(self, images, tmp_path):
        with pytest.raises(ValueError, match=r"expected one of .*'test_resnet'"):
            create_project(Data(images), tmp_path / "out", Models("test_resnett"))
        assert [path.name for path in tmp_path.iterdir()] == ["images"]

    def test_out_inside_the_images_is_refused(self, images):
        with pytest.raises(ValueError, match="a folder outside"):
            create_project(Data(images), images / "out", Models(*SMALL))

    def test_an_out_that_no_folder_can_become_is_refused_before_anything_is_read(
        self, images, tmp_path, monkeypatch
    ):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        (tmp_path / "dangling").symlink_to("nowhere")
        monkeypatch.setattr(create, "list_folder", None)
        for name in ("link", "dangling"):
            with pytest.raises(FileExistsError, match=f"expected a new folder, got .*{name}"):
                create_project(Data(images), tmp_path / name, Models(*SMALL))
        monkeypatch.chdir(tmp_path / "real")
        for out in (Path(), Path("../real")):
            with pytest.raises(ValueError, match="got the one you are in"):
                create_project(Data(images), out, Models(*SMALL))

    def test_images_that_cannot_be_read_are_no_images(self, images, tmp_path):
        for file in (images / "glioma").glob("*.png"):
            file.write_bytes(b"no image")
        words = r"images of each class.*got none of \['glioma'\].*glioma/.*\.png: not an image"
        with pytest.raises(ValueError, match=words):
            create_project(Data(images), tmp_path / "out", Models(*SMALL))
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("options", "hint"),
        [
            ({"method": "lrp"}, "init: method: expected one of"),
            ({"method": "kd", "shortcut": True}, "got --shortcut with kd"),
            ({"weights": {"pupil": "x.pt"}}, "init: weights: expected one of"),
            ({"pretrained": True, "weights": {"teacher": "x.pt"}}, "one kind of weights"),
        ],
    )
    def test_options_that_do_not_fit(self, options, hint):
        with pytest.raises(ValueError, match=hint):
            Models(**options)

    def test_the_command_says_it_in_words(self, tmp_path):
        (tmp_path / "images").mkdir()
        shown = CliRunner().invoke(app, ["init", str(tmp_path / "images")])
        assert shown.exit_code == 1
        assert "expected images (.png, ...), got none" in " ".join(shown.output.split())


class TestPaths:
    def test_are_seen_from_the_project(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert from_project("w.pt", Path("projects/mine")) == "../../w.pt"
        assert from_project("$KD_LRP_DATA/w.pt", Path("mine")) == "$KD_LRP_DATA/w.pt"
        assert name_from_project("local-dir:net", Path("mine")) == "local-dir:../net"
        assert name_from_project("resnet10t", Path("mine")) == "resnet10t"
