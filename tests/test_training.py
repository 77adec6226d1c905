"""The driver: from a shipped config, cut small, to a run folder."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from kd_lrp_plugin import training
from kd_lrp_plugin.config import resolve_config
from kd_lrp_plugin.data import Phantom
from kd_lrp_plugin.students import build_model, load_weights

CONFIGS = Path(__file__).resolve().parent.parent / "torchdistill_configs"
TEACHER = Path("torchdistill_configs/phantom/ce/resnet10t.yaml")
BASELINE = Path("torchdistill_configs/phantom/ce/test_resnet.yaml")
KD = Path("torchdistill_configs/phantom/kd/test_resnet_from_resnet10t.yaml")
LRP = Path("torchdistill_configs/phantom/lrp_cosine/test_resnet_from_resnet10t.yaml")
# Nine images in batches of four: the last batch of validation and test is one image.
TINY = ["image_size=32", "batch_size=4", "num_workers=0", "train.num_epochs=1"]
TINY += ["datasets.phantom/train.init.kwargs.size=12"]
TINY += [f"datasets.phantom/{split}.init.kwargs.size=9" for split in ("val", "test")]
CHECKPOINT = "models.teacher_model.src_ckpt"
CLASSES = ["glioma", "meningioma", "notumor", "pituitary"]


def distill(config: Path, *overrides: str, **kwargs: Any) -> dict:
    return training.distill(config, [*TINY, *overrides], device="cpu", **kwargs)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with copies of the configs, a teacher and a student trained with it."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(CONFIGS, folder / "torchdistill_configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        distill(TEACHER)
        distill(LRP, "train.num_epochs=2", seed=3)
    return folder


@pytest.fixture
def here(place, monkeypatch) -> Path:
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def student_run(here) -> Path:
    return here / "runs/phantom/lrp_cosine/test_resnet_from_resnet10t/3"


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "best.pt", weights_only=True)["model"]


class TestRunFolder:
    @pytest.mark.parametrize("run", ["ce/resnet10t/0", "lrp_cosine/test_resnet_from_resnet10t/3"])
    def test_holds_config_metrics_curves_weights_and_summary(self, here, run):
        files = {file.name for file in (here / "runs/phantom" / run).iterdir()}
        events = {file for file in files if file.startswith("events.out.tfevents")}
        assert len(events) == 1
        expected = {"config.yaml", "metrics.jsonl", "curves.png", "best.pt", "summary.json"}
        assert files - events == expected

    def test_is_the_only_thing_left_beside_it(self, student_run):
        assert [path.name for path in student_run.parent.iterdir()] == ["3"]

    def test_config_is_the_one_that_ran(self, student_run):
        text = (student_run / "config.yaml").read_text(encoding="utf-8")
        assert text == resolve_config(LRP, [*TINY, "train.num_epochs=2"])

    def test_summary_agrees_with_the_epochs(self, student_run):
        summary, epochs = summary_of(student_run), metrics_of(student_run)
        assert [epoch["epoch"] for epoch in epochs] == [1, 2]
        best = max(epochs, key=lambda epoch: (epoch["val_accuracy"], -epoch["val_loss"]))
        assert summary["best_epoch"] == best["epoch"]
        assert summary["val_accuracy"] == best["val_accuracy"]
        assert summary["epochs"] == 2
        assert summary["seed"] == 3
        assert summary["overrides"] == [*TINY, "train.num_epochs=2"]
        assert summary["classes"] == CLASSES
        assert summary["preprocessing"] == {"image_size": 32, "mean": 0.5, "std": 0.5}
        saved = torch.load(student_run / "best.pt", weights_only=True)
        assert saved["epoch"] == best["epoch"]
        assert saved["best_value"] == best["val_accuracy"]
        assert saved["classes"] == CLASSES

    def test_test_accuracy_is_that_of_the_saved_weights(self, student_run):
        model, summary = training.load_run(student_run)
        data = Phantom("test", size=9, image_size=32)
        images = torch.stack([data[index][0] for index in range(9)])
        with torch.no_grad():
            hits = model(images).argmax(1) == torch.tensor(data.targets)
        assert summary["test_accuracy"] == pytest.approx(hits.float().mean().item())

    @pytest.mark.parametrize("part", ["train", "val"])
    def test_every_term_is_logged_and_they_sum_to_the_loss(self, student_run, part):
        weights = {"ce": 0.4, "kl": 0.4, "semantic": 0.1, "relation": 0.1}
        for epoch in metrics_of(student_run):
            total = sum(weight * epoch[f"{part}_{name}"] for name, weight in weights.items())
            assert epoch[f"{part}_loss"] == pytest.approx(total, rel=1e-4)
            assert epoch[f"{part}_semantic_zero_maps"] >= 0
            assert f"{part}_relation_zero_maps" not in epoch

    def test_a_last_batch_of_one_image_counts_in_the_accuracy(self, student_run):
        summary, epochs = summary_of(student_run), metrics_of(student_run)
        for accuracy in [summary["test_accuracy"], *(e["val_accuracy"] for e in epochs)]:
            assert accuracy * 9 == pytest.approx(round(accuracy * 9), abs=1e-4)
        assert all(torch.isfinite(torch.tensor(e["val_relation"])) for e in epochs)

    def test_weights_load_into_a_new_model(self, student_run):
        model = build_model("test_resnet", 4)
        assert load_weights(model, student_run / "best.pt") == []
        state = weights_of(student_run)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_default_folder_follows_the_configs_path():
    folder = training.default_run_folder(LRP, 5)
    assert folder == Path("runs/phantom/lrp_cosine/test_resnet_from_resnet10t/5")


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(here, tmp_path):
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        distill(BASELINE, out=tmp_path / name, seed=seed)
    a, b, c = (weights_of(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["conv1.0.weight"], c["conv1.0.weight"])
    timeless = [
        [{k: v for k, v in e.items() if k != "images_per_second"} for e in metrics_of(tmp_path / n)]
        for n in "ab"
    ]
    assert timeless[0] == timeless[1]


# --- runs that do not begin -------------------------------------------------------------------


@pytest.mark.parametrize("taken", ["run", "run.partial"])
def test_a_folder_that_is_there_is_refused_and_left_alone(here, tmp_path, taken):
    (tmp_path / taken).mkdir()
    (tmp_path / taken / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=rf"run folder: expected a new one, got .*{taken},"):
        distill(BASELINE, out=tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == [taken]
    assert (tmp_path / taken / "mine.txt").read_text() == "mine"


def test_a_missing_teacher_is_answered_with_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = r"Make it with: kd-lrp distill torchdistill_configs/phantom/ce/resnet10t\.yaml"
    with pytest.raises(FileNotFoundError, match=command):
        distill(CONFIGS.parent / LRP)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "override", "words"),
    [
        (LRP, "train.criterion.key=DisWOTPlusLos", "Did you mean 'DisWOTPlusLoss'"),
        (LRP, "train.criterion.kwargs.semantic.key=LRPCosineLoss", "LRPSemanticCosineLoss"),
        (LRP, "train.criterion.kwargs={aplha: 1.0}", "Did you mean 'alpha'"),
        (LRP, "train.criterion.kwargs.alpha=0.5", "sum 1"),
        (KD, "train.criterion.kwargs.sub_terms.kd.criterion.key=KDLos", "'kd'.*'KDLoss'"),
        (LRP, "train.teacher.forward_proc.init.kwargs={layer: [layer2]}", "'layers'"),
        (BASELINE, "models.model.kwargs={nam: test_resnet, num_classes: 4}", "'name'"),
        (BASELINE, "models.model.kwargs.name=test_resnt", "'test_resnet'"),
        (BASELINE, "datasets.phantom/val.init.kwargs={siz: 9}", "'size'"),
        (BASELINE, "test.test_data_loader.dataset_id=phantom/tset", "'phantom/test'"),
        (BASELINE, "models.model.kwargs.num_classes=3", "kwargs.num_classes to 4"),
        (KD, "models.student_model.kwargs.num_classes=2", "student_model.kwargs.num_classes to 4"),
        (BASELINE, "train=null", "a section 'train'"),
        (BASELINE, "test={}", "a section 'test'"),
    ],
)
def test_a_config_that_cannot_run_is_refused_before_anything_is_made(
    here, tmp_path, config, override, words
):
    with pytest.raises(ValueError, match=words):
        distill(config, override, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "- 1\n", "models: {}\n"])
def test_a_file_that_is_no_config_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match="config: expected a section 'datasets'"):
        training.distill(tmp_path / "config.yaml", out=tmp_path / "run")


def folder_of(root: Path, split: str, classes: Iterable[str]) -> str:
    """Override that puts a folder of images in the place of a split of the phantom."""
    for name in classes:
        (root / split / name).mkdir(parents=True)
        for number in range(3):
            Image.new("L", (32, 32), 40 * number).save(root / split / name / f"{number}.png")
    kwargs = f"{{root: {root}, split: {split}, image_size: 32}}"
    init = f"{{key: kd_lrp_plugin.torchdistill.folder_images, init: {{kwargs: {kwargs}}}}}"
    return f"datasets.phantom/{split}=!import_call {init}"


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_sets_that_disagree_on_the_classes_are_refused(here, tmp_path, split):
    other = folder_of(tmp_path / "data", split, ["glioma", "meningioma", "pituitary", "zebra"])
    with pytest.raises(ValueError, match="sets with the same classes.*zebra"):
        distill(BASELINE, other, out=tmp_path / "run")
    assert not (tmp_path / "run.partial").exists()


def test_folders_train_as_the_phantom_does(here, tmp_path):
    names = ["cat", "dog"]
    sets = [folder_of(tmp_path / "data", split, names) for split in ("train", "val", "test")]
    summary = distill(BASELINE, *sets, out=tmp_path / "run")
    assert summary["classes"] == names


def test_a_checkpoint_of_other_classes_is_refused(here, tmp_path):
    saved = torch.load(here / "runs/phantom/ce/resnet10t/0/best.pt", weights_only=True)
    saved["classes"] = saved["classes"][::-1]
    torch.save(saved, tmp_path / "teacher.pt")
    with pytest.raises(ValueError, match=r"teacher .*teacher\.pt: expected the classes of the da"):
        distill(KD, f"{CHECKPOINT}={tmp_path / 'teacher.pt'}", out=tmp_path / "run")
    assert not (tmp_path / "run.partial").exists()


def test_a_checkpoint_of_another_model_is_refused(here, tmp_path):
    torch.save(build_model("test_resnet", 4).state_dict(), tmp_path / "teacher.pt")
    with pytest.raises(ValueError, match=r"models\.teacher_model\.src_ckpt: expected the weights"):
        distill(KD, f"{CHECKPOINT}={tmp_path / 'teacher.pt'}", out=tmp_path / "run")


# --- runs that break --------------------------------------------------------------------------


class StopAt(training.Silence):
    """Stops a run like Ctrl-C as soon as the pass named ``what`` has given a batch."""

    def __init__(self, what: str) -> None:
        self.what = what

    def track(self, batches: DataLoader, what: str) -> Iterator:
        for batch in batches:
            yield batch
            if what == self.what:
                raise KeyboardInterrupt


@pytest.mark.parametrize("what", ["epoch 1", "epoch 1 val"])
def test_a_run_that_breaks_before_its_first_epoch_leaves_nothing(here, tmp_path, what):
    with pytest.raises(KeyboardInterrupt):
        distill(BASELINE, out=tmp_path / "run", show=StopAt(what))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("what", "finished"), [("epoch 2", 1), ("epoch 2 val", 1), ("test", 2)])
def test_a_run_that_breaks_later_leaves_what_was_finished(here, tmp_path, what, finished):
    with pytest.raises(KeyboardInterrupt):
        distill(BASELINE, "train.num_epochs=2", out=tmp_path / "run", show=StopAt(what))
    assert [path.name for path in tmp_path.iterdir()] == ["run.partial"]
    partial = tmp_path / "run.partial"
    assert [epoch["epoch"] for epoch in metrics_of(partial)] == list(range(1, finished + 1))
    assert load_weights(build_model("test_resnet", 4), partial / "best.pt") == []
    assert not (partial / "summary.json").exists()
    with pytest.raises(FileNotFoundError, match="a finished run"):
        training.load_run(partial)


def run_of(config: Path, *overrides: str) -> Any:
    text = resolve_config(config, [*TINY, *overrides])
    return training._Run(training._load_config(text), torch.device("cpu"))


@pytest.mark.parametrize(("config", "term"), [(KD, "kd"), (LRP, "kl")])
def test_a_loss_that_is_not_finite_stops_before_the_step_and_is_named(
    here, tmp_path, config, term
):
    run = run_of(config)
    run.box.teacher_model.fc.bias.data[0] = torch.nan  # spoils logits, and no relevance map
    before = {name: value.clone() for name, value in run.student.named_parameters()}
    with pytest.raises(FloatingPointError, match=rf"\['{term}'\] not finite"):
        run.train(tmp_path, training.Silence())
    assert all(torch.equal(value, before[k]) for k, value in run.student.named_parameters())


def test_a_loss_that_is_not_finite_leaves_no_folder(here, tmp_path):
    teacher = torch.load(here / "runs/phantom/ce/resnet10t/0/best.pt", weights_only=True)
    teacher["model"]["fc.bias"][0] = torch.nan
    torch.save(teacher, tmp_path / "teacher.pt")
    with pytest.raises(FloatingPointError, match="'kd'"):
        distill(KD, f"{CHECKPOINT}={tmp_path / 'teacher.pt'}", out=tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.pt"]


@pytest.mark.parametrize("config", [KD, LRP])
def test_the_teacher_stays_as_it_is_in_evaluation_mode(here, tmp_path, config):
    run = run_of(config)
    teacher, modes = run.box.teacher_model, []
    teacher.train()
    teacher.bn1.register_forward_hook(lambda module, *_: modes.append(module.training))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    run.train(tmp_path, training.Silence())
    assert modes
    assert not any(modes)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


# --- finished runs ----------------------------------------------------------------------------


@pytest.fixture
def save_image(tmp_path) -> Callable[[int], Path]:
    def save(index: int) -> Path:
        file = tmp_path / f"{index}.png"
        Phantom("test", size=9, image_size=32).image(index).save(file)
        return file

    return save


class TestPredict:
    def test_gives_each_image_the_probabilities_of_the_student(self, student_run, save_image):
        files = [save_image(0), save_image(1)]
        records = training.predict(student_run, files)
        model, _ = training.load_run(student_run)
        data = Phantom("test", size=9, image_size=32)
        for index, (file, record) in enumerate(zip(files, records, strict=True)):
            with torch.no_grad():
                expected = model(data[index][0][None])[0].softmax(0)
            assert record["file"] == str(file)
            assert list(record["all"]) == CLASSES
            assert list(record["all"].values()) == pytest.approx(expected.tolist(), abs=1e-6)
            assert record["class"] == CLASSES[int(expected.argmax())]
            assert record["probability"] == max(record["all"].values())

    def test_takes_images_of_any_size_and_mode(self, student_run, tmp_path):
        Image.new("L", (100, 60)).save(tmp_path / "grey.png")
        (record,) = training.predict(student_run, [tmp_path / "grey.png"])
        assert sum(record["all"].values()) == pytest.approx(1, abs=1e-5)

    def test_refuses_a_file_that_is_no_image(self, student_run, tmp_path):
        (tmp_path / "note.txt").write_text("no image")
        with pytest.raises(ValueError, match=r"predict .*note\.txt: expected an image"):
            training.predict(student_run, [tmp_path / "note.txt"])

    def test_names_an_image_that_is_not_there(self, student_run, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"expected an image, got none at .*absent"):
            training.predict(student_run, [tmp_path / "absent.png"])

    def test_refuses_a_folder_without_a_run(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="run: expected a finished run, got none at"):
            training.predict(tmp_path, [])


def test_a_loaded_run_is_in_evaluation_mode_and_needs_no_data_or_teacher(
    student_run, tmp_path, monkeypatch
):
    shutil.copytree(student_run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    model, summary = training.load_run("run")
    assert not any(module.training for module in model.modules())
    assert summary == summary_of(student_run)


def test_a_run_that_started_from_weights_loads_without_them(here, tmp_path):
    torch.save(build_model("test_resnet", 4).state_dict(), tmp_path / "start.pt")
    distill(BASELINE, f"+models.model.kwargs.weights={tmp_path / 'start.pt'}", out=tmp_path / "run")
    (tmp_path / "start.pt").unlink()
    model, _ = training.load_run(tmp_path / "run")
    state = weights_of(tmp_path / "run")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
