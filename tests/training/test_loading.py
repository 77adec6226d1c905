"""Batches are the same whoever loads them, and workers are as many as pay."""

import json
import random

import numpy as np
import pytest
import torch
from small_runs import CPU, KD, NO_TEACHER, SMALL, outcome, same
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import v2
from typer.testing import CliRunner

from kd_lrp_plugin.cli.main import app
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.training import profile, trainer, workers
from kd_lrp_plugin.training.loading import SeededBatches
from kd_lrp_plugin.training.trainer import distill
from kd_lrp_plugin.utils.progress import NullProgress

AUGMENTED = [*SMALL, *NO_TEACHER, "+datasets.phantom/train.init.kwargs.augment=True"]
OPEN = [
    f"{loader}.kwargs={{batch_size: 8}}"
    for loader in (
        "train.train_data_loader",
        "train.val_data_loader",
        "test.test_data_loader",
    )
]


class Draws(Dataset):
    """Items that are what was drawn for them, from each generator."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        numbers = [random.random(), np.random.random(), torch.rand(()).item()]  # noqa: NPY002
        return torch.tensor([index, *numbers], dtype=torch.float64)


def collate(items: list[torch.Tensor]) -> torch.Tensor:
    mixed = torch.stack(items)
    return torch.cat([mixed, torch.full((len(items), 1), np.random.random())], 1)  # noqa: NPY002


def load(seed: int, count: int, shuffle: bool = True) -> torch.Tensor:
    loader = DataLoader(Draws(), 4, shuffle, num_workers=count, collate_fn=collate)
    SeededBatches(loader).seed = seed
    torch.manual_seed(0)  # of the order alone
    return torch.cat(list(loader))


class TestDraws:
    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_are_the_same_with_any_number_of_workers(self, count):
        assert torch.equal(load(1, count), load(1, 0))

    def test_differ_between_items_batches_and_epochs(self):
        first, second = load(1, 0), load(2, 0)
        assert len(first[:, 1:4].unique()) == 36
        assert len(first[:, 4].unique()) == 3  # one for each batch
        assert not torch.isin(second[:, 1:], first[:, 1:]).any()

    def test_leave_those_of_the_training_alone(self):
        torch.manual_seed(0)
        before = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1]]  # noqa: NPY002
        loader = DataLoader(Draws(), 4, collate_fn=collate)
        SeededBatches(loader)
        batches = iter(loader)
        torch.set_rng_state(before[0])  # an iterator draws a seed when it begins
        next(batches)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002

    def test_of_a_loader_that_is_taken_over_follow_the_new_seed(self):
        loader = DataLoader(Draws(), 4, collate_fn=collate)
        SeededBatches(loader).seed = 7
        SeededBatches(loader).seed = 1
        assert torch.equal(torch.cat(list(loader)), load(1, 0, shuffle=False))

    def test_of_one_image_twice_in_an_epoch_differ(self):
        loader = DataLoader(Draws(), 2, sampler=[3, 3, 3, 5], collate_fn=collate)
        SeededBatches(loader)
        assert len(torch.cat(list(loader))[:, 1].unique()) == 4


@pytest.mark.slow
def test_an_augmented_run_ends_with_the_same_bits_with_any_number_of_workers(tmp_path):
    plain = [override for override in AUGMENTED if not override.startswith("num_workers")]
    for count in (0, 2):
        overrides = [*plain, f"num_workers={count}", "train.num_epochs=2"]
        distill(RunSpec(KD, overrides, tmp_path / str(count), device="cpu"))
    assert same(outcome(tmp_path / "0"), outcome(tmp_path / "2"))


def build(tmp_path, overrides: list[str]):
    spec = RunSpec(KD, overrides, tmp_path / "run", device="cpu")
    return trainer.build_checked(spec, spec.read(), CPU)


class TestWorkers:
    def test_a_number_that_is_said_is_kept(self, tmp_path):
        experiment = build(tmp_path, AUGMENTED)
        assert workers.choose_workers(experiment) is None
        assert experiment.box.train_data_loader.num_workers == 0

    def test_a_run_that_loads_for_a_moment_has_none(self, tmp_path):
        experiment = build(tmp_path, [*AUGMENTED, *OPEN])
        found = workers.choose_workers(experiment)
        assert found["chosen"] == 0
        assert set(found) == {"chosen", "seconds_to_load_all_epochs"}

    def test_the_best_by_measurement_is_taken_in_all_loaders_and_noted(self, tmp_path, monkeypatch):
        monkeypatch.setattr(workers, "BRIEF", 0.0)
        monkeypatch.setattr(workers, "list_counts", lambda: [0, 1, 2])
        seen = []

        def time_epoch(experiment, count):
            experiment.loading.set_workers(count)
            seen.append(experiment.box.train_data_loader.num_workers)
            return [9.0, 5.0, 4.95][count]

        monkeypatch.setattr(workers, "_time_epoch", time_epoch)
        out = tmp_path / "run"
        distill(RunSpec(KD, [*AUGMENTED, *OPEN], out, device="cpu"))
        assert seen == [0, 1, 2]
        (session,) = json.loads((out / "environment.json").read_text())["sessions"]
        assert session["workers"]["chosen"] == 1
        assert session["workers"]["seconds_of_an_epoch"] == {"0": 9.0, "1": 5.0, "2": 4.95}

    def test_measuring_changes_neither_models_nor_generators(self, tmp_path, monkeypatch):
        experiment = build(tmp_path, [*AUGMENTED, *OPEN])
        monkeypatch.setattr(workers, "BRIEF", 0.0)
        monkeypatch.setattr(workers, "list_counts", lambda: [0, 1])
        state = {k: v.clone() for k, v in experiment.student.state_dict().items()}
        generators = torch.get_rng_state(), random.getstate()
        found = workers.choose_workers(experiment)
        assert set(found["seconds_of_an_epoch"]) == {"0", "1"}
        assert all(seconds > 0 for seconds in found["seconds_of_an_epoch"].values())
        assert torch.equal(torch.get_rng_state(), generators[0])
        assert random.getstate() == generators[1]
        assert same(dict(experiment.student.state_dict()), state)
        loaders = experiment.box.train_data_loader, experiment.val_loader, experiment.test_loader
        assert {loader.num_workers for loader in loaders} == {found["chosen"]}

    @pytest.mark.parametrize("error", [RuntimeError, OSError, ValueError])
    def test_a_number_with_which_loading_fails_is_not_taken(self, error, tmp_path, monkeypatch):
        experiment = build(tmp_path, [*AUGMENTED, *OPEN])
        monkeypatch.setattr(workers, "BRIEF", 0.0)
        monkeypatch.setattr(workers, "list_counts", lambda: [0, 1, 2, 4])
        notes = []
        monkeypatch.setattr(NullProgress, "note", lambda _, text: notes.append(text))
        data = type(experiment.box.train_data_loader.dataset)
        draw = data.__getitem__

        def fail(self, index):
            if getattr(experiment.box.train_data_loader, "num_workers", 0) == 2:
                raise error("no room")
            return draw(self, index)

        monkeypatch.setattr(data, "__getitem__", fail)
        found = workers.choose_workers(experiment)
        assert set(found["seconds_of_an_epoch"]) == {"0", "1"}
        assert experiment.box.train_data_loader.num_workers == found["chosen"] < 2
        assert notes[0].startswith("num_workers: below 2, with which: ")
        assert "no room" in notes[0]

    def test_without_any_that_loads_the_error_is_told_and_loaders_are_as_they_were(
        self, tmp_path, monkeypatch
    ):
        experiment = build(tmp_path, [*AUGMENTED, *OPEN])
        monkeypatch.setattr(workers, "BRIEF", 0.0)

        def fail(experiment, count):
            experiment.loading.set_workers(3)
            raise RuntimeError("nothing loads")

        monkeypatch.setattr(workers, "_time_epoch", fail)
        with pytest.raises(RuntimeError, match="nothing loads"):
            workers.choose_workers(experiment)
        assert experiment.box.train_data_loader.num_workers == 0

    def test_a_cached_teacher_takes_no_time(self, tmp_path, monkeypatch):
        experiment = build(tmp_path, [*AUGMENTED, *OPEN, "+train.teacher.cache=exact"])
        monkeypatch.setattr(workers, "BRIEF", 0.0)
        monkeypatch.setattr(workers, "list_counts", lambda: [0])

        def refuse(*_):
            raise AssertionError("the teacher was run")

        experiment.original_teacher.register_forward_pre_hook(refuse)
        assert set(workers.choose_workers(experiment)["seconds_of_an_epoch"]) == {"0"}

    def test_counts_are_none_powers_of_two_and_all_processors(self, monkeypatch):
        monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: range(6), raising=False)
        assert workers.list_counts() == [0, 1, 2, 4, 6]


class TestProfile:
    def test_parts_add_up_and_waiting_is_found(self, tmp_path, monkeypatch):
        experiment = build(tmp_path, AUGMENTED)
        loader = experiment.box.train_data_loader
        draw = type(loader.dataset).__getitem__

        def slow(self, index):
            profile.time.sleep(0.02)
            return draw(self, index)

        monkeypatch.setattr(type(loader.dataset), "__getitem__", slow)
        found = profile.profile_epoch(experiment)
        assert (found["steps"], found["warm_up"], found["images"]) == (1, 1, 8)
        assert set(found["seconds"]) == {*profile.PARTS, *profile.LOADING}
        assert all(seconds > 0 for seconds in found["seconds"].values())
        assert found["seconds"]["wait for data"] > 8 * 0.02
        assert found["seconds"]["decode"] > 8 * 0.02 > found["seconds"]["transform"]
        whole = sum(found["seconds"][part] for part in profile.PARTS)
        assert found["from_memory"] < whole - 8 * 0.02
        shares = [row["share"] for row in profile.list_rows(found)][:6]
        assert sum(float(share[:-1]) for share in shares) == pytest.approx(100, abs=0.5)
        assert loader.collate_fn.__self__._dataset is loader.dataset

    @pytest.mark.parametrize("version", [transforms, v2], ids=["version 1", "version 2"])
    def test_the_time_of_a_transform_is_not_that_of_reading(self, version, tmp_path):
        experiment = build(tmp_path, AUGMENTED)
        call, forward = transforms.Compose.__call__, v2.Compose.forward
        slow = version.Lambda(lambda image: profile.time.sleep(0.02) or image)
        outer = version.Compose([version.Compose([slow]), transforms.ToTensor()])
        experiment.box.train_data_loader.dataset.org_dataset.transform = outer
        seconds = profile.profile_epoch(experiment)["seconds"]
        assert 2 * 8 * 0.02 > seconds["transform"] > 8 * 0.02 > seconds["decode"]
        assert (transforms.Compose.__call__, v2.Compose.forward) == (call, forward)

    def test_images_of_a_last_batch_that_is_smaller_are_counted_as_they_are(self, tmp_path):
        few = "datasets.phantom/train.init.kwargs.size=11"
        whole = "+train.train_data_loader.kwargs.drop_last=False"
        found = profile.profile_epoch(build(tmp_path, [*AUGMENTED, few, whole]))
        assert (found["steps"], found["warm_up"], found["images"]) == (1, 1, 3)

    def test_the_command_prints_the_table_and_writes_nothing(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(profile, "MOST_BYTES", 1)  # one batch is kept all the same
        sets = [part for override in AUGMENTED for part in ("--set", override)]
        done = CliRunner().invoke(app, ["distill", str(KD), *sets, "--device", "cpu", "--profile"])
        assert done.exit_code == 0, done.output
        for part in (*profile.PARTS, *profile.LOADING, "1 steps (8 images) after 1"):
            assert part in done.output
        assert "The training waited for data" in done.output
        assert list(tmp_path.iterdir()) == []

    def test_an_epoch_of_one_batch_is_refused(self, tmp_path):
        experiment = build(tmp_path, [*AUGMENTED, "batch_size=16"])
        with pytest.raises(ValueError, match="two batches or more, got 1 in an epoch"):
            profile.profile_epoch(experiment)

    def test_a_cached_teacher_which_no_step_would_ask_is_refused(self, tmp_path):
        experiment = build(tmp_path, [*AUGMENTED, "+train.teacher.cache=exact"])
        before = {k: v.clone() for k, v in experiment.student.state_dict().items()}
        with pytest.raises(ValueError, match=r"Add --set train\.teacher\.cache=null"):
            profile.profile_epoch(experiment)
        assert same(dict(experiment.student.state_dict()), before)
