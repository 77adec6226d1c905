"""A run that was interrupted ends as one that was not, bit for bit."""

import json
import os
import zlib
from pathlib import Path

import pytest
import torch
from small_runs import (
    BASELINE,
    CONFIGS,
    CPU,
    KD,
    LRP,
    NO_TEACHER,
    SMALL,
    Stopped,
    StopsAt,
    outcome,
    same,
)
from torchdistill.losses.registry import register_mid_level_loss

from kd_lrp_plugin.config.build import assemble
from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.runs import checkpoints, folder
from kd_lrp_plugin.training import trainer
from kd_lrp_plugin.training.experiment import Experiment
from kd_lrp_plugin.utils import files
from kd_lrp_plugin.utils.progress import NullProgress

TWO_STAGES = CONFIGS / "phantom/lrp_cosine/test_resnet_from_resnet10t-stages.yaml"
THREE_EPOCHS = [*SMALL, "train.num_epochs=3"]
RELEVANCE = [*THREE_EPOCHS, *NO_TEACHER, "num_workers=2"]


def distill(out, progress=None, config=BASELINE, overrides=THREE_EPOCHS, seed=0):
    with progress or NullProgress():
        return trainer.distill(RunSpec(config, overrides, out, seed, "cpu"))


def validates_as(monkeypatch, values: list[float]) -> None:
    """Each epoch has the accuracy that is given for it."""
    evaluate = trainer.Trainer._evaluate

    def scripted(self, loader, prefix, what, keep=False):
        found, predictions = evaluate(self, loader, prefix, what, keep)
        if prefix == "val":
            found["val_accuracy"] = values[self.epoch]
        return found, predictions

    monkeypatch.setattr(trainer.Trainer, "_evaluate", scripted)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    """Three epochs in one go."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    distill(folder)
    return outcome(folder)


@pytest.fixture(scope="module")
def with_relevance(tmp_path_factory) -> dict:
    """Three epochs with relevance maps and data-loader workers, in one go."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    distill(folder, None, LRP, RELEVANCE)
    return outcome(folder)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "run"


class TestStops:
    @pytest.mark.parametrize("moment", ["epoch 2", "epoch 2 val", "test"])
    def test_in_a_pass(self, moment, out, uninterrupted):
        with pytest.raises(Stopped):
            distill(out, StopsAt(moment))
        assert not (out / "summary.json").exists()
        distill(out)
        assert same(outcome(out), uninterrupted)

    def test_in_the_test_with_a_teacher(self, tmp_path):
        """Its batch statistics must not be those of the test images, though no epoch begins."""
        overrides = [*THREE_EPOCHS, *NO_TEACHER]
        distill(tmp_path / "uninterrupted", None, KD, overrides)
        with pytest.raises(Stopped):
            distill(tmp_path / "parts", StopsAt("test"), KD, overrides)
        distill(tmp_path / "parts", None, KD, overrides)
        assert same(outcome(tmp_path / "parts"), outcome(tmp_path / "uninterrupted"))

    @pytest.mark.slow
    def test_in_every_epoch_with_relevance_and_workers(self, out, with_relevance):
        for moment in ("epoch 1 val", "epoch 2", "epoch 3 val"):
            with pytest.raises(Stopped):
                distill(out, StopsAt(moment), LRP, RELEVANCE)
        distill(out, None, LRP, RELEVANCE)
        assert same(outcome(out), with_relevance)

    @pytest.mark.parametrize(
        ("name", "time"),
        [("last.pt", 2), ("best.pt", 1), ("metrics.jsonl", 2), ("summary.json", 1)],
    )
    def test_when_the_disk_is_full(self, name, time, out, uninterrupted, monkeypatch):
        draft, calls = files.write_draft, []

        def full(file, make):
            def half(path):
                make(path)
                os.truncate(path, path.stat().st_size // 2)
                raise OSError(28, "No space left on device")

            calls.append(file.name.removesuffix(files.DRAFT))
            fails = calls[-1] == name and calls.count(name) == time
            return draft(file, half if fails else make)

        monkeypatch.setattr(files, "write_draft", full)
        with pytest.raises(OSError, match="Make room if the disk is full"):
            distill(out)
        monkeypatch.undo()
        assert not list(out.glob(f"*{files.DRAFT}"))
        distill(out)
        assert same(outcome(out), uninterrupted)

    @pytest.mark.parametrize("kept", ["last.pt gone", "best.pt behind", "metrics.jsonl behind"])
    def test_between_two_files(self, kept, out, uninterrupted, tmp_path):
        """The states that a kill between two renames leaves behind."""
        with pytest.raises(Stopped):
            distill(out, StopsAt("epoch 2"))
        old = {name: (out / name).read_bytes() for name in ("best.pt", "metrics.jsonl")}
        with pytest.raises(Stopped):
            distill(out, StopsAt("epoch 3"))
        if kept == "last.pt gone":
            (out / "last.pt").replace(out / f"last.pt{files.DRAFT}")
        else:
            name = kept.split()[0]
            (out / name).write_bytes(old[name])
        distill(out)
        assert same(outcome(out), uninterrupted)


def test_the_last_line_of_the_metrics_comes_back(out, uninterrupted):
    with pytest.raises(Stopped):
        distill(out, StopsAt("test"))
    lines = (out / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    distill(out)
    assert same(outcome(out), uninterrupted)


def test_patience_is_counted_the_same_after_a_fall_back(tmp_path, monkeypatch):
    """A best.pt that is ahead of the checkpoint used must not pass for an older one."""
    validates_as(monkeypatch, [0.5, 0.4, 0.6, 0.3, 0.2, 0.1])
    overrides = [*SMALL, "train.num_epochs=6", "+train.early_stopping={patience: 2}"]
    distill(tmp_path / "uninterrupted", None, BASELINE, overrides)
    with pytest.raises(Stopped):
        distill(tmp_path / "parts", StopsAt("epoch 4"), BASELINE, overrides)
    (tmp_path / "parts/last.pt").write_bytes(b"")
    distill(tmp_path / "parts", None, BASELINE, overrides)
    assert len(outcome(tmp_path / "uninterrupted")["metrics"]) == 5
    assert same(outcome(tmp_path / "parts"), outcome(tmp_path / "uninterrupted"))


class TestDamage:
    @pytest.mark.parametrize("damage", ["a flipped bit", "half of it", "nothing in it"])
    def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
        self, damage, out, uninterrupted, caplog
    ):
        with pytest.raises(Stopped):
            distill(out, StopsAt("epoch 3"))
        file = out / "last.pt"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        end = {"a flipped bit": len(content), "half of it": len(content) // 2, "nothing in it": 0}
        file.write_bytes(content[: end[damage]])
        distill(out)
        assert "the checkpoint before it is used" in caplog.text
        assert (out / "last.pt.damaged").is_file()
        assert same(outcome(out), uninterrupted)

    @pytest.mark.parametrize("moment", ["epoch 3", "test"])
    def test_best_weights_that_are_damaged_or_gone_are_made_again(
        self, moment, tmp_path, monkeypatch
    ):
        """Those of the first epoch, so that no later one can stand in for them."""
        validates_as(monkeypatch, [0.9, 0.1, 0.2])
        distill(tmp_path / "uninterrupted")
        with pytest.raises(Stopped):
            distill(tmp_path / "parts", StopsAt(moment))
        if moment == "test":
            (tmp_path / "parts/best.pt").unlink()
        else:
            (tmp_path / "parts/best.pt").write_bytes(b"")
        distill(tmp_path / "parts")
        assert outcome(tmp_path / "parts")["summary"]["best_epoch"] == 1
        assert same(outcome(tmp_path / "parts"), outcome(tmp_path / "uninterrupted"))

    @pytest.mark.parametrize("error", [zlib.error("incorrect data check"), OSError(22, "Invalid")])
    def test_a_checkpoint_that_cannot_be_read_is_a_damaged_one(self, error, tmp_path, monkeypatch):
        torch.save({}, tmp_path / "last.pt")

        def broken(*_):
            raise error

        monkeypatch.setattr("zipfile.ZipFile.testzip", broken)
        with pytest.raises(ValueError, match="an intact checkpoint of plain tensors"):
            checkpoints.read_checkpoint(tmp_path / "last.pt")

    def test_without_a_whole_checkpoint_nothing_is_trained_on(self, out):
        with pytest.raises(Stopped):
            distill(out, StopsAt("epoch 2"))
        (out / "last.pt").write_bytes(b"")
        (out / "previous.pt").unlink(missing_ok=True)
        before = sorted(file.name for file in out.iterdir())
        for _ in range(2):
            with pytest.raises(ValueError, match=r"(?s)an intact checkpoint.*Put one back"):
                distill(out)
        assert sorted(file.name for file in out.iterdir()) == before

    def test_a_checkpoint_that_is_not_plain_tensors_is_not_opened(self, out, tmp_path):
        class Evil:
            def __reduce__(self):
                return (os.mkdir, (str(tmp_path / "broken in"),))

        with pytest.raises(Stopped):
            distill(out, StopsAt("epoch 2"))
        torch.save({"experiment": Evil()}, out / "last.pt")
        with pytest.raises(ValueError, match="an intact checkpoint"):
            distill(out)
        assert not (tmp_path / "broken in").exists()
        with pytest.raises(ValueError, match="plain tensors, got other objects"):
            checkpoints.read_checkpoint(out / "last.pt")


SGD = (
    "train.optimizer={key: SGD, kwargs: {lr: 0.05, momentum: 0.9, nesterov: true}, "
    "grad_accum_step: 3, max_grad_norm: 1.0}"
)
STAGES = """train={
  stage1: {num_epochs: 2, train_data_loader: &t {dataset_id: phantom/train, sampler:
      {class_or_func: !import_get {key: torch.utils.data.RandomSampler}, kwargs: {}},
      kwargs: {batch_size: 8, num_workers: 0}},
    val_data_loader: &v {dataset_id: phantom/val, sampler:
      {class_or_func: !import_get {key: torch.utils.data.SequentialSampler}, kwargs: {}},
      kwargs: {batch_size: 8, num_workers: 0}},
    teacher: &r {forward_proc: forward_batch_only, requires_grad: false},
    student: {forward_proc: forward_batch_only, requires_grad: true,
      frozen_modules: [conv1, bn1, layer1, layer2]},
    optimizer: {key: SGD, kwargs: {lr: 0.05, momentum: 0.9}},
    criterion: {key: DisWOTPlusLoss, kwargs: {alpha: 0.5, beta: 0.5, gamma: 0, delta: 0}}},
  stage2: {num_epochs: 2, teacher: *r,
    student: {forward_proc: forward_batch_only, requires_grad: true, frozen_modules: []},
    optimizer: {key: AdamW, kwargs: {lr: 0.001}},
    criterion: {key: DisWOTPlusLoss, kwargs: {alpha: 0.9, beta: 0.1, gamma: 0, delta: 0}},
    scheduler: {key: CosineAnnealingLR, kwargs: {T_max: 2}}}}""".replace("\n", " ")


class Drifting(torch.nn.Module):
    """A loss with a state of its own, as some of torchdistill's have."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, student_io_dict, teacher_io_dict, targets):
        value = student_io_dict["."]["output"].square().mean()
        if torch.is_grad_enabled():
            self.mean.mul_(0.5).add_(value.detach())
        return value * self.mean


register_mid_level_loss(Drifting, key="Drifting")
VARIANTS = {
    "a loss that remembers": (
        BASELINE,
        ["train.criterion={key: WeightedSumLoss, kwargs: {sub_terms: {own: "
         "{criterion: {key: Drifting, kwargs: {}}, weight: 1.0}}}}"],
    ),
    "accumulation that reaches across epochs": (BASELINE, [SGD]),
    "a scheduler that steps within epochs": (
        BASELINE,
        ["train.scheduler={key: OneCycleLR, kwargs: {max_lr: 0.01, total_steps: 6}, "
         "scheduling_step: 1}"],
    ),
    "a scheduler that sees the metric": (
        BASELINE,
        ["train.scheduler={key: ReduceLROnPlateau, kwargs: {mode: max, patience: 0, "
         "threshold: 0.5}}"],
    ),
    "early stopping": (
        BASELINE, ["train.num_epochs=9", "+train.early_stopping={patience: 2, min_delta: 0.9}"]
    ),
    "the lowest loss as the best": (BASELINE, ["+train.monitor=val_loss"]),
    "bfloat16": (LRP, [*NO_TEACHER, "+train.precision=bfloat16"]),
    "float16": (BASELINE, ["+train.precision=float16"]),
    "stages": (KD, [*NO_TEACHER, STAGES]),
    "a stage that keeps an optimizer whose step is not complete": (
        KD,
        [*NO_TEACHER, *(STAGES.replace("momentum: 0.9}}", "momentum: 0.9}, grad_accum_step: 3}", 1)
         .replace(", layer1, layer2]", "]").replace("modules: []", "modules: [conv1, bn1]")
         .replace(" optimizer: {key: AdamW, kwargs: {lr: 0.001}},", "").splitlines())],
    ),
}  # fmt: skip


LONG = {
    "float16",
    "bfloat16",
    "early stopping",
    "a stage that keeps an optimizer whose step is not complete",
}


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in VARIANTS],
)
def test_whatever_is_trained_goes_on_as_if_nothing_had_been(variant, tmp_path):
    config, changes = VARIANTS[variant]
    overrides = [*THREE_EPOCHS, *changes]
    if any(change.startswith("train={") for change in changes):  # what it had is gone
        gone = ("batch_size", "num_workers", "train.num_epochs")
        overrides = [s for s in overrides if s.split("=")[0] not in gone]
    distill(tmp_path / "uninterrupted", None, config, overrides)
    for moment in ("epoch 2", "epoch 3"):
        with pytest.raises(Stopped):
            distill(tmp_path / "parts", StopsAt(moment), config, overrides)
    distill(tmp_path / "parts", None, config, overrides)
    assert same(outcome(tmp_path / "parts"), outcome(tmp_path / "uninterrupted"))


class TestRefusals:
    def test_a_seed_below_zero(self, out):
        with pytest.raises(ValueError, match="seed: expected a number of 0 or more, got -1"):
            distill(out, seed=-1)
        assert not out.exists()

    def test_a_checkpoint_of_another_version(self, out):
        with pytest.raises(Stopped):
            distill(out, StopsAt("epoch 2"))
        state = torch.load(out / "last.pt", weights_only=True)
        torch.save(state | {"format": 0}, out / "last.pt")
        with pytest.raises(ValueError, match=r"expected format 2, got format 0\. Finish the run"):
            distill(out)


class TestFolder:
    def test_a_finished_run_is_not_trained_again(self, out):
        summary = distill(out, overrides=[*SMALL], config=BASELINE)
        before = {file.name: file.stat().st_mtime_ns for file in out.glob("[!.]*")}
        assert distill(out, StopsAt("epoch 1"), BASELINE, [*SMALL]) == summary
        assert {file.name: file.stat().st_mtime_ns for file in out.glob("[!.]*")} == before

    @pytest.mark.parametrize(
        ("overrides", "seed", "words"),
        [
            ([*SMALL, "train.num_epochs=2"], 0, "was 'num_epochs: 1'.*now 'num_epochs: 2'"),
            (SMALL, 1, "seed 0, now 1"),
        ],
    )
    def test_another_run_is_refused_with_what_differs(self, overrides, seed, words, out):
        distill(out, config=BASELINE, overrides=SMALL)
        with pytest.raises(FileExistsError, match=words):
            distill(out, None, BASELINE, overrides, seed)

    def test_a_folder_of_other_things_is_refused_and_kept(self, out):
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
        with pytest.raises(FileExistsError, match=r"thesis\.tex"):
            distill(out, config=BASELINE, overrides=SMALL)
        assert (out / "thesis.tex").read_text() == "years of work"

    def test_a_draft_of_somebody_else_is_kept(self, out):
        out.mkdir()
        (out / "novel.draft").write_text("years of work")
        with pytest.raises(FileExistsError, match=r"novel\.draft"):
            distill(out, config=BASELINE, overrides=SMALL)
        assert (out / "novel.draft").read_text() == "years of work"

    def test_two_processes_do_not_share_a_folder(self, out):
        with (
            folder.RunFolder(out).claimed("a: 1", {}),
            pytest.raises(BlockingIOError, match="another process is running"),
        ):
            distill(out, config=BASELINE, overrides=SMALL)

    def test_sessions_are_noted(self, out):
        with pytest.raises(Stopped):
            distill(out, StopsAt("test"), BASELINE, SMALL)
        distill(out, config=BASELINE, overrides=SMALL)
        about = json.loads((out / "environment.json").read_text())
        assert about["seed"] == 0
        assert [s["device"] for s in about["sessions"]] == ["cpu", "cpu"]
        assert about["sessions"][0]["versions"]["torch"] == torch.__version__
        assert "commit" in about["sessions"][0]


def test_a_stage_keeps_the_validation_of_the_last_one_that_names_it():
    size = [part for part in SMALL if "num_epochs" not in part]

    def build() -> Experiment:
        assembly = assemble(resolve_config(TWO_STAGES, [*size, *NO_TEACHER]))
        train = assembly.content["train"]
        train["stage1"]["num_epochs"] = train["stage2"]["num_epochs"] = 1
        loaders = ("train_data_loader", "val_data_loader")
        train["stage3"] = {k: v for k, v in train["stage2"].items() if k not in loaders}
        loader = train["stage2"]["val_data_loader"]
        kwargs = {**loader["kwargs"], "batch_size": 3}
        train["stage2"]["val_data_loader"] = {**loader, "kwargs": kwargs}
        return Experiment(assembly, CPU)

    trained, resumed = build(), build()
    trained.go_to_stage(2)
    for experiment in (trained, resumed):
        experiment.go_to_stage(3)
    assert trained.stage == resumed.stage == 3
    assert trained.val_loader.batch_size == resumed.val_loader.batch_size == 3
