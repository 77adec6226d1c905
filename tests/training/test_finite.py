"""Weights that are no numbers are found before they are kept; threads stay what they were."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from small_runs import BASELINE, CPU, SMALL, Stopped, StopsAt
from torch import nn

from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.training import trainer
from kd_lrp_plugin.training.experiment import Experiment
from kd_lrp_plugin.training.meter import Meter
from kd_lrp_plugin.utils.progress import NullProgress

TINY = [*SMALL, "image_size=32", "train.num_epochs=3"]


def distill(out, progress=None):
    with progress or NullProgress():
        return trainer.distill(RunSpec(BASELINE, TINY, out, device="cpu"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["a weight", "a statistic"])
def test_an_epoch_whose_last_step_breaks_the_weights_is_not_kept(
    part, value, tmp_path, monkeypatch
):
    """As a step at too high a rate would; the loss before it was finite."""
    train = trainer.Trainer._train_batches

    def broken(self, number):
        metrics = train(self, number)
        if number == 2:
            model = self.experiment.student
            tensors = list(model.parameters() if part == "a weight" else model.buffers())
            next(t for t in tensors if t.is_floating_point()).data.fill_(value)
        return metrics

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_train_batches", broken)
        with pytest.raises(FloatingPointError, match=r"epoch 2: expected finite weights") as caught:
            distill(tmp_path / "run")
    assert "the checkpoint of epoch 1 stays" in str(caught.value)
    assert not (tmp_path / "run/summary.json").exists()
    kept = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert len(kept["records"]) == 1
    assert all(torch.isfinite(v).all() for v in kept["experiment"]["models"]["original"].values())
    distill(tmp_path / "run")  # without the fault, as if there had been none
    distill(tmp_path / "uninterrupted")
    one, other = (
        load_file(tmp_path / name / "student.safetensors") for name in ("run", "uninterrupted")
    )
    assert all(torch.equal(one[key], other[key]) for key in other)


@pytest.mark.parametrize("both", [False, True])
def test_a_checkpoint_of_weights_that_are_none_blocks_no_folder(both, tmp_path, caplog):
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        distill(out, StopsAt("epoch 3"))
    for name in ("last.pt", "previous.pt") if both else ("last.pt",):
        state = torch.load(out / name, weights_only=True)
        next(iter(state["experiment"]["models"]["original"].values())).fill_(math.nan)
        torch.save(state, out / name)
    distill(out)
    distill(tmp_path / "uninterrupted")
    assert "nan or inf in" in caplog.text
    assert (out / "last.pt.damaged").exists()
    one, other = (
        load_file(path / "student.safetensors") for path in (out, tmp_path / "uninterrupted")
    )
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_logits_that_are_no_numbers_have_no_accuracy():
    meter, logits = Meter(nn.CrossEntropyLoss()), torch.tensor([[0.0, math.nan]])
    with pytest.raises(FloatingPointError, match="expected finite logits"):
        meter.count(logits, torch.tensor([0]))


def test_several_classes_at_once_have_no_accuracy():
    meter, logits = Meter(nn.CrossEntropyLoss()), torch.eye(3)
    with pytest.raises(ValueError, match=r"sum to one per image.*multi-label"):
        meter.count(logits, torch.tensor([[1.0, 1, 0], [0, 1, 1], [0, 0, 0]]))
    with pytest.raises(ValueError, match=r"class weights of shape \(3, 3\)"):
        meter.count(logits, torch.tensor([[1.0], [0], [1]]))
    meter.count(logits, torch.tensor([[0.7, 0.3, 0], [0.2, 0.8, 0], [0.6, 0, 0.4]]))
    assert meter.summary("val", CPU) == {"val_accuracy": pytest.approx(2 / 3)}


def test_a_run_resumes_with_the_threads_that_it_began_with(tmp_path, monkeypatch):
    seen: list[int] = []
    begin = Experiment.begin_epoch

    def watch(self):
        seen.append(torch.get_num_threads())
        begin(self)

    class Notes(StopsAt):
        def note(self, text):
            seen.append(text)

    monkeypatch.setattr(Experiment, "begin_epoch", watch)
    with pytest.raises(Stopped):
        distill(tmp_path, StopsAt("epoch 2"))
    seen.clear()
    torch.set_num_threads(2)
    try:
        distill(tmp_path, Notes("never"))
        assert torch.get_num_threads() == 2  # the caller's are given back
    finally:
        torch.set_num_threads(1)
    assert [n for n in seen if isinstance(n, int)][-2:] == [1, 1]
    assert any("resumes with 1 threads, as it began, not with 2" in str(n) for n in seen)
    sessions = json.loads((tmp_path / "environment.json").read_text())["sessions"]
    assert [session["threads"] for session in sessions] == [1, 1]


def test_a_clock_that_steps_back_makes_no_negative_time(tmp_path, monkeypatch):
    times = iter(range(10**6, 0, -1000))
    monkeypatch.setattr(trainer.time, "time", lambda: next(times))
    trainer.distill(RunSpec(BASELINE, [*TINY, "train.num_epochs=1"], tmp_path, device="cpu"))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["seconds"] >= 0
    assert json.loads(line)["images_per_second"] > 0
