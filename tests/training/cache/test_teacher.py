"""A cached teacher says what it says live: to losses, to student weights, and in whole runs."""

import json
from pathlib import Path
from types import SimpleNamespace

import preloaded
import pytest
import torch
from recorded_batch import LAYERS, batch, io, models
from small_runs import (
    BASELINE,
    CONFIGS,
    CPU,
    KD,
    NO_TEACHER,
    SMALL,
    Stopped,
    StopsAt,
    outcome,
    same,
)
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from kd_lrp_plugin import torchdistill as plugin
from kd_lrp_plugin.cli.main import app
from kd_lrp_plugin.config.build import assemble
from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.relevance.recording import relevance_maps
from kd_lrp_plugin.torchdistill.forward_proc import CachedRecording
from kd_lrp_plugin.training import trainer
from kd_lrp_plugin.training.cache import teacher as teacher_cache
from kd_lrp_plugin.training.cache.spec import check_cache
from kd_lrp_plugin.training.cache.teacher import TeacherCache, _decode, _encode
from kd_lrp_plugin.training.check.dry_run import check
from kd_lrp_plugin.training.experiment import Experiment
from kd_lrp_plugin.utils.progress import NullProgress

MAPS = CONFIGS / "phantom/lrp_relative_l2/test_resnet_from_resnet10t.yaml"
STAGES = CONFIGS / "phantom/lrp_cosine/test_resnet_from_resnet10t-stages.yaml"
MARKED = CONFIGS / "phantom_marked/lrp_relative_l2/test_resnet_from_resnet10t.yaml"
UNLABELLED = CONFIGS / "phantom_marked/lrp_relative_l2/test_resnet_from_resnet10t_unlabelled.yaml"
CLEAN = "+train.teacher.forward_proc.init.kwargs.view=clean"
OWN_RECORDER = (
    "train.student={forward_proc: !import_call {key: kd_lrp_plugin.torchdistill.recorder, "
    "init: {kwargs: {layers: [layer2, layer3], method: gradient_activation}}}}"
)
COMPANIONS = "+train.train_data_loader.dataset_wrapper={key: companions, kwargs: {clean: True}}"
EXACT, FROZEN = "+train.teacher.cache=exact", "+train.teacher.cache=frozen"
TWO_EPOCHS = [*SMALL, *NO_TEACHER, "train.num_epochs=2"]
HALF = 2**-11  # the rounding of float16


def distill(config, overrides, out, progress=None) -> dict:
    with progress or NullProgress():
        trainer.distill(RunSpec(config, overrides, out, 0, "cpu"))
    return outcome(out)


def experiment(*overrides: str, config=MAPS) -> Experiment:
    torch.manual_seed(0)
    assembly = assemble(resolve_config(config, [*SMALL, *NO_TEACHER, *overrides]))
    return Experiment(assembly, CPU)


def opened(folder: Path, *overrides: str, config=MAPS) -> Experiment:
    found = experiment(*overrides, config=config)
    found.cache.open(CPU, folder)
    return found


def problems(*overrides: str, config=MAPS) -> list[str]:
    small = [*SMALL, *NO_TEACHER, *overrides]
    return check(resolve_config(config, small), CPU).problems


# --- answers --------------------------------------------------------------------------------------

LOSSES = {
    "relative": ("LRPRelativeL2Loss", {"signed": True, "target": "contrast"}),
    "cosine": ("LRPSemanticCosineLoss", {}),
    "of the teacher": ("LRPSemanticL2Loss", {"target": "teacher"}),
    "grad-cam": ("GradCAML2Loss", {}),
    "relation": ("RelationL2Loss", {}),
}


class TestLosses:
    """Each loss with a cached answer against the same one with the live teacher."""

    def pair(self, name: str, scale: float = 1.0):
        key, kwargs = LOSSES[name]
        teacher, student = models()
        images, targets = batch()
        method = "grad_cam" if key.startswith("GradCAM") else "gradient_activation"
        procedure = plugin.recorder(LAYERS, method)
        live = io(teacher.eval(), procedure, images)
        loss = plugin.RecordedLoss(key, **kwargs)
        logits, recording = plugin.recorded(live, "teacher")
        parts = loss.read_teacher(logits, recording, targets)
        found = {f"a {i}": part.detach() * scale for i, part in enumerate(parts)}
        found = _decode(_encode(found))
        cached = logits.detach().clone()
        answers = {loss.question: [found[f"a {i}"] for i in range(len(parts))]}
        cached._kd_lrp_recording = CachedRecording(recording.layers, recording.method, answers)
        student.eval()
        return loss, student, procedure, (images, targets), live, {".": {"output": cached}}

    @pytest.mark.parametrize("name", LOSSES)
    def test_value_and_gradients_of_student_weights_are_those_of_the_live_teacher(self, name):
        loss, student, procedure, (images, targets), live, cached = self.pair(name)
        found = []
        for teacher in (live, cached):
            student.zero_grad()
            value = loss(io(student, procedure, images), teacher, targets)
            value.backward()
            weights = [p.grad.clone() for p in student.parameters() if p.grad is not None]
            found.append((value.detach(), torch.cat([w.flatten() for w in weights])))
        (value, gradient), (rounded, of_rounded) = found
        assert gradient.norm() > 0
        torch.testing.assert_close(rounded, value, rtol=10 * HALF, atol=1e-7)
        assert (of_rounded - gradient).norm() < 10 * HALF * gradient.norm()

    def test_a_finite_difference_of_student_weights_agrees(self):
        loss, student, procedure, (images, targets), _, cached = self.pair("relative")
        rounded = cached["."]["output"]
        before = rounded._kd_lrp_recording
        logits, student, images = rounded.double(), student.double(), images.double()
        answers = {q: [part.double() for part in parts] for q, parts in before.answers.items()}
        logits._kd_lrp_recording = CachedRecording(before.layers, before.method, answers)

        def value() -> torch.Tensor:
            return loss(io(student, procedure, images), {".": {"output": logits}}, targets)

        weight = student.get_submodule("layer3")[0].conv2.weight
        (gradient,) = torch.autograd.grad(value(), weight)
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()
        step, found = 1e-6 * direction / direction.norm(), []
        for move in (step, -2 * step):
            with torch.no_grad():
                weight += move
            found.append(value().item())
        expected = 2 * (gradient * step).sum().item()
        assert found[0] - found[1] == pytest.approx(expected, rel=1e-4)

    def test_a_loss_that_asks_what_was_not_asked_is_refused(self):
        *_, (images, targets), _, cached = self.pair("relative")
        _, student, procedure, *_ = self.pair("relative")
        other = plugin.RecordedLoss("LRPSemanticL2Loss")
        expected = "LRPSemanticL2Loss: expected a question that the cached teacher was asked "
        with pytest.raises(ValueError, match=expected):
            other(io(student, procedure, images), cached, targets)
        _, recording = plugin.recorded(cached, "teacher")
        with pytest.raises(ValueError, match="or make the loss by register_recorded_loss"):
            recording.maps(None, targets)
        with pytest.raises(ValueError, match="recorded: activations"):
            _ = recording.activations


class TestRounding:
    @pytest.mark.parametrize("scale", [1e-20, 1e-6, 1.0, 1e12])
    def test_it_is_that_of_float16_at_any_scale(self, scale):
        values = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(0)).double() * scale
        found = _decode(_encode({"maps 0": values}))["maps 0"].double()
        largest = values.abs().flatten(1).amax(1)[:, None, None]
        off = (found - values).abs()
        assert bool((off <= HALF * values.abs() + 2**-24 * largest).all())

    def test_zeros_stay_zeros_and_logits_stay_as_they_are(self):
        logits = torch.randn(2, 4) * 1e6
        found = _decode(_encode({"logits": logits, "maps 0": torch.zeros(2, 3, 3)}))
        assert torch.equal(found["logits"], logits)
        assert torch.equal(found["maps 0"], torch.zeros(2, 3, 3))


class TestAnswers:
    def test_they_are_those_of_a_teacher_in_double_precision(self, tmp_path):
        found = opened(tmp_path, EXACT)
        cache = found.cache
        cache.views.epoch = 2
        items = [cache.views[index] for index in (3, 0, 11)]
        images, rows = (
            torch.stack([i[0] for i in items]),
            torch.tensor([i[2]["teacher_row"] for i in items]),
        )
        labels = torch.tensor([item[1] for item in items])
        logits = cache.forward(None, images, labels, {"teacher_row": rows})
        teacher = found.original_teacher.double().eval()
        expected = teacher(images.double())
        torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-5)
        weights = torch.full((3, 4), -1 / 3).double()
        weights[range(3), labels] = 1.0
        arguments = (["layer2", "layer3"], "gradient_activation")
        maps = relevance_maps(teacher, images.double(), weights, *arguments, signed=True)
        (answers,) = logits._kd_lrp_recording.answers.values()
        for mine, reference in zip(answers, maps, strict=True):
            largest = float(reference.abs().max())
            torch.testing.assert_close(mine.double(), reference, rtol=1e-3, atol=1e-3 * largest)

    def test_the_teacher_is_asked_in_no_step_and_has_no_hooks(self, tmp_path):
        found = opened(tmp_path, EXACT)
        found.begin_epoch()

        def refuse(*_):
            raise AssertionError("the teacher was run")

        found.original_teacher.register_forward_pre_hook(refuse)
        images, targets, companions = next(iter(found.box.train_data_loader))
        loss = found.training_loss(images, targets, companions)
        loss.backward()
        assert torch.isfinite(loss)
        with pytest.raises(AssertionError, match="the teacher was run"):
            found.loss(images, targets, {})

    def test_another_answer_than_now_is_refused(self, tmp_path, monkeypatch):
        found = opened(tmp_path, EXACT)
        identity = found.cache._identify()
        changed = experiment(EXACT)
        with torch.no_grad():
            next(changed.original_teacher.parameters()).mul_(1.5)
        monkeypatch.setattr(TeacherCache, "_identify", lambda _: identity)
        with pytest.raises(ValueError, match=r"that the teacher has now, got others, off by"):
            changed.cache.open(CPU, tmp_path)

    def test_teacher_images_and_question_each_have_a_cache_of_their_own(self, tmp_path):
        size = "datasets.phantom/train.init.kwargs.size=12"
        target = "train.criterion.kwargs.semantic.kwargs.target=label"
        seed = "+train.teacher.cache={kind: exact, seed: 1}"
        for overrides in ([EXACT], [FROZEN], [EXACT, size], [EXACT, target], [seed]):
            opened(tmp_path, *overrides)
        other = experiment(EXACT)
        with torch.no_grad():
            next(other.original_teacher.parameters()).mul_(1.5)
        other.cache.open(CPU, tmp_path)
        assert len(list((tmp_path / "teacher_cache").iterdir())) == 6
        again = opened(tmp_path, EXACT)
        assert again.cache.describe()["made"] is False
        assert len(list((tmp_path / "teacher_cache").iterdir())) == 6

    def test_losses_in_another_order_share_a_cache(self, tmp_path):
        relation = "+train.criterion.kwargs.relation={key: RelationL2Loss, kwargs: {}}"
        shares = ["train.criterion.kwargs.delta=0.5", "train.criterion.kwargs.gamma=0.47"]
        opened(tmp_path, EXACT, relation, *shares)
        other = experiment(EXACT, relation, *shares)
        other.cache.live.losses = other.cache.live.losses[::-1]
        assert len(other.cache.live.questions) == 2
        other.cache.open(CPU, tmp_path)
        assert other.cache.describe()["made"] is False

    def test_workers_that_fill_it_start_as_those_of_the_training(self, monkeypatch):
        said = []

        def load(rows, size, num_workers, multiprocessing_context):
            said.append((num_workers, multiprocessing_context))
            return DataLoader(rows, size)

        monkeypatch.setattr(teacher_cache, "DataLoader", load)
        cache = experiment(EXACT).cache
        for count, way in ((2, "spawn"), (0, None)):
            told = {"num_workers": count, "multiprocessing_context": way}
            cache._loader = SimpleNamespace(batch_size=8, **told)
            next(cache._answer(0))
        assert said == [(2, "spawn"), (0, None)]


# --- runs -----------------------------------------------------------------------------------------


class TestRuns:
    @pytest.mark.parametrize(
        "config", [MAPS, pytest.param(KD, marks=pytest.mark.slow)], ids=["maps", "kd"]
    )
    def test_exact_trains_as_the_live_teacher_does_on_the_same_views(
        self, config, tmp_path, monkeypatch
    ):
        def run(name: str) -> dict:
            words = [part for word in (*TWO_EPOCHS, EXACT) for part in ("--set", word)]
            out = tmp_path / name
            call = ["distill", str(config), *words, "--out", str(out), "--device", "cpu"]
            shown = CliRunner().invoke(app, call)
            assert shown.exit_code == 0, shown.output
            assert "teacher cache: exact, 4 views of 16 images, " in shown.output
            return outcome(out)

        def ask(self, model, images, targets=None, companions=None):
            return self.live.procedure(model, images, targets, companions)

        cached = run("cached")
        monkeypatch.setattr(TeacherCache, "forward", ask)
        for mine, theirs in zip(cached["metrics"], run("live")["metrics"], strict=True):
            for name, value in theirs.items():
                assert mine[name] == pytest.approx(value, rel=2e-2, abs=1e-4), name

    def test_without_augmentation_it_is_the_run_that_it_is_without_a_cache(self, tmp_path):
        still = [*TWO_EPOCHS, "datasets.phantom/train.init.kwargs.augment=False"]
        without = distill(KD, still, tmp_path / "without")
        cached = distill(KD, [*still, EXACT], tmp_path / "cached")
        assert cached["summary"]["teacher_caches"][0]["views"] == 1
        for name, value in without["weights"].items():
            torch.testing.assert_close(cached["weights"][name], value, rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["exact", "frozen"])
    def test_a_killed_run_ends_as_if_it_had_not_been(self, kind, tmp_path):
        shared = f"+train.teacher.cache={{kind: {kind}, folder: {tmp_path / 'shared'}}}"
        whole = distill(MAPS, [*TWO_EPOCHS, shared], tmp_path / "whole")
        with pytest.raises(Stopped):
            distill(MAPS, [*TWO_EPOCHS, shared], tmp_path / "killed", StopsAt("epoch 2"))
        assert same(distill(MAPS, [*TWO_EPOCHS, shared], tmp_path / "killed"), whole)

    def test_a_killed_filling_goes_on(self, tmp_path):
        overrides = [*SMALL, *NO_TEACHER, EXACT]
        with pytest.raises(Stopped):
            distill(MAPS, overrides, tmp_path / "run", StopsAt("asking teacher"))
        assert (tmp_path / "run/teacher_cache").is_dir()
        (about,) = distill(MAPS, overrides, tmp_path / "run")["summary"]["teacher_caches"]
        assert Path(about["folder"]).parent == tmp_path / "run/teacher_cache"

    def test_the_record_says_what_was_used(self, tmp_path):
        class Hears(NullProgress):
            def __init__(self):
                self.notes: list[str] = []

            def note(self, text):
                self.notes.append(text)

        hears = Hears()
        run = distill(MAPS, [*SMALL, *NO_TEACHER, FROZEN], tmp_path / "run", hears)
        (about,) = run["summary"]["teacher_caches"]
        folder = Path(about["folder"])
        assert folder.parent == tmp_path / "run/teacher_cache"
        arrays = sum(file.stat().st_size - 128 for file in folder.glob("*.npy"))
        assert about["bytes"] == arrays
        assert (about["kind"], about["images"], about["dtype"]) == ("frozen", 16, "float16")
        (session,) = json.loads((tmp_path / "run/environment.json").read_text())["sessions"]
        assert session["teacher_caches"] == [{**about, "made": True}]
        (note,) = [note for note in hears.notes if note.startswith("teacher cache")]
        assert note.startswith("teacher cache: frozen, the plain view of 16 images, ")

    def test_it_lies_beside_the_teachers_checkpoint(self, tmp_path):
        file = tmp_path / "teacher" / "best.pt"
        file.parent.mkdir()
        torch.save(experiment().original_teacher.state_dict(), file)
        found = experiment(EXACT, f"models.teacher_model.src_ckpt={file}")
        assert found.beside_teacher == file.parent
        found.cache.open(CPU, found.beside_teacher)
        assert Path(found.cache.describe()["folder"]).parent == file.parent / "teacher_cache"

    def test_a_checkpoint_below_home_has_it_there_too(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        torch.save(experiment().original_teacher.state_dict(), tmp_path / "best.pt")
        found = experiment(EXACT, "models.teacher_model.src_ckpt=~/best.pt")
        assert found.beside_teacher == tmp_path

    def test_stages_have_caches_of_their_own(self, tmp_path):
        stages = ["+train.stage1.teacher.cache=exact", "+train.stage2.teacher.cache=frozen"]
        epochs = ["train.stage1.num_epochs=1", "train.stage2.num_epochs=1"]
        run = distill(STAGES, [*SMALL[:3], *SMALL[4:], *NO_TEACHER, *stages, *epochs], tmp_path)
        assert [about["kind"] for about in run["summary"]["teacher_caches"]] == ["exact", "frozen"]

    def test_a_stage_that_takes_over_its_images_is_refused(self):
        cached = {"teacher": {"requires_grad": False, "cache": "exact"}}
        stages = {"train.stage1": cached | {"train_data_loader": {"dataset_id": "a"}}}
        check_cache("train.stage1", stages, {})
        stages["train.stage2"] = {"teacher": {"requires_grad": False}}
        with pytest.raises(ValueError, match=r"also of the next stage, got none in train\.stage2"):
            check_cache("train.stage1", stages, {})

    @pytest.mark.parametrize("override", ["+train.precision=bfloat16", "balance"])
    def test_precision_and_balance_go_with_it(self, override, tmp_path):
        balance = "+train.criterion.kwargs.balance=gradient"
        override = balance if override == "balance" else override
        run = distill(MAPS, [*SMALL, *NO_TEACHER, EXACT, override], tmp_path / "run")
        assert run["metrics"][0]["train_semantic"] > 0

    @pytest.mark.parametrize("kind", [FROZEN, pytest.param(EXACT, marks=pytest.mark.slow)])
    def test_images_without_a_label_have_the_teachers_prediction(self, kind, tmp_path):
        few = [
            "datasets.unlabelled.init.kwargs.size=16",
            "train.train_data_loader.sampler.kwargs.num_samples=16",
            "+datasets.phantom_marked/train.init.kwargs.variants=none",
        ]
        run = distill(UNLABELLED, [*SMALL, *NO_TEACHER, *few, kind], tmp_path / "run")
        assert run["summary"]["teacher_caches"][0]["images"] == 32

    def test_a_clean_view_is_what_is_cached(self, tmp_path):
        found = opened(tmp_path, EXACT, CLEAN, OWN_RECORDER, COMPANIONS, config=MARKED)
        image, label, companions = found.cache.views[2]
        rows = torch.tensor([companions["teacher_row"]])
        logits = found.cache.forward(
            None, image[None], torch.tensor([label]), {"teacher_row": rows}
        )
        teacher = found.original_teacher.eval()
        torch.testing.assert_close(logits, teacher(companions["clean"][None]), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(logits, teacher(image[None]), rtol=1e-3)

    def test_another_process_reads_what_the_first_has_made(self, tmp_path):
        first = opened(tmp_path, EXACT)
        second = experiment(EXACT)
        told = SimpleNamespace(rank=1, run_on_rank_zero=lambda work: first.cache._identify())
        second.cache.open(told, tmp_path)
        assert second.cache.describe()["folder"] == first.cache.describe()["folder"]

    @pytest.mark.slow
    def test_two_processes_train_with_one_cache(self, tmp_path):
        words = [part for word in (*SMALL, *NO_TEACHER, EXACT) for part in ("--set", word)]
        ran = preloaded.run(
            *("-m", "kd_lrp_plugin.cli", "distill", MAPS, "--out", tmp_path / "run"),
            *("--device", "cpu", *words),
            processes=2,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        summary = json.loads((tmp_path / "run/summary.json").read_text())
        assert summary["teacher_caches"][0]["views"] == 4
        assert ran.stdout.count("teacher cache: exact") == 1


# --- what is refused ------------------------------------------------------------------------------

REFUSED = {
    "a kind": (["+train.teacher.cache=exakt"], "Did you mean 'exact'?"),
    "a key": (["+train.teacher.cache={kind: exact, view: 2}"], "Did you mean 'views'?"),
    "no kind": (["+train.teacher.cache={views: 2}"], "expected a kind of cache"),
    "a number": (["+train.teacher.cache={kind: exact, views: 0}"], "an integer views of 1"),
    "a folder that no variable names": (
        ["+train.teacher.cache={kind: exact, folder: $KD_LRP_NOWHERE/caches}"],
        "expected variables that are set, got $KD_LRP_NOWHERE/caches",
    ),
    "views of frozen": (["+train.teacher.cache={kind: frozen, views: 2}"], "no choice of views"),
    "of the student": (["+train.student.cache=exact"], "none but the teacher's"),
    "a trained teacher": ([EXACT, "train.teacher.requires_grad=True"], "a frozen teacher"),
    "hooks": ([EXACT, "+train.teacher.forward_hook={output: [layer2]}"], "['forward_hook']"),
    "a data set wrapper": (
        [EXACT, "+train.train_data_loader.dataset_wrapper={key: SSKDDatasetWrapper}"],
        "no dataset_wrapper but companions",
    ),
    "mixup": (
        [
            EXACT,
            "+train.train_data_loader.collate_fn=!import_call {key: "
            "kd_lrp_plugin.torchdistill.mixup, init: {kwargs: {num_classes: 4}}}",
        ],
        "images one by one",
    ),
    "an unknown step": (
        [
            FROZEN,
            "datasets.phantom/train.init.kwargs.augment=False",
            "+datasets.phantom/train.init.kwargs.transform=!import_call {key: "
            "torchvision.transforms.ElasticTransform, init: {kwargs: {}}}",
        ],
        "train.teacher.cache: expected steps that a map can follow, got ElasticTransform",
    ),
}


class TestRefusals:
    @pytest.mark.parametrize("case", REFUSED)
    def test_a_teacher_that_cannot_be_cached_is_refused_by_name(self, case):
        overrides, words = REFUSED[case]
        found = problems(*overrides)
        assert words in found[0]
        assert ".cache" in found[0]

    def test_markers_do_not_move_as_maps_would(self):
        assert "images without markers" in problems(FROZEN, config=MARKED)[0]
        assert problems(EXACT, config=MARKED) == []

    @pytest.mark.parametrize("kind", [EXACT, FROZEN])
    def test_a_check_says_what_the_cache_will_be_and_writes_nothing(
        self, kind, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        report = check(resolve_config(MAPS, [*SMALL, *NO_TEACHER, kind]), CPU)
        assert report.problems == []
        assert len(report.notes) == 1
        assert "images, 0.0 MB in float16" in report.notes[0]
        assert not list(tmp_path.iterdir())

    def test_a_config_without_a_teacher_has_nothing_to_cache(self):
        teacher = "+train.teacher={requires_grad: False, forward_proc: forward_batch_only, %s}"
        for said, words in {
            "cache: exact": "cache: expected a teacher, got none",
            "cache: null": "",
        }.items():
            found = check(resolve_config(BASELINE, [*SMALL, teacher % said]), CPU).problems
            assert (words in found[0]) if words else not found

    def test_the_command_says_it_too(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        words = [part for word in (*SMALL, *NO_TEACHER, EXACT) for part in ("--set", word)]
        shown = CliRunner().invoke(app, ["check", str(MAPS), *words, "--device", "cpu"])
        assert shown.exit_code == 0, shown.output
        assert "teacher cache: exact, 4 views of 16 images, 0.0 MB in float16\n" in shown.output
