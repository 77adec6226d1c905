"""What ``kd-lrp check`` and ``distill`` say of wrong configs: where, what, what to do."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import BASELINE, CONFIGS, CPU, KD, LRP, NO_TEACHER, SMALL
from typer.testing import CliRunner

from kd_lrp_plugin.cli.main import app
from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.config.safety import unsafe_tags
from kd_lrp_plugin.data import validation
from kd_lrp_plugin.data.folder import FolderImages
from kd_lrp_plugin.data.validation import unreadable_images
from kd_lrp_plugin.training.check import dry_run
from kd_lrp_plugin.training.check.dry_run import check
from kd_lrp_plugin.training.check.problems import CheckReport
from kd_lrp_plugin.utils.distributed import DistributedContext
from kd_lrp_plugin.utils.progress import NullProgress

FLAT = Path(__file__).resolve().parents[2] / "flat_config.yaml"  # LRP, in one file
WRONG = {
    "a misspelled section": (
        "scheduler:",
        "shceduler:",
        "61  train.shceduler: expected a key that is read, got 'shceduler'. "
        "Did you mean 'scheduler'?",
    ),
    "a section that is not there": (
        "\ntest:\n",
        "\n_test:\n",
        "5  config: expected a section 'test', got None. See torchdistill_configs for examples.",
    ),
    "an unknown tag": (
        "!import_get {key: torch.utils.data.RandomSampler}",
        "!import_gte {key: torch.utils.data.RandomSampler}",
        "43  tag: expected one of ['!abspath', '!access_by_index_or_key', '!call_method', "
        "'!expanduser', '!getattr', '!import_call', '!import_call_method', '!import_get', "
        "'!join', '!pathjoin', '!setattr'], got '!import_gte'. Did you mean '!import_get' or "
        "'!import_call' or '!import_call_method'?",
    ),
    "a name that its module does not have": (
        "torch.utils.data.RandomSampler",
        "torch.utils.data.RandomSamplr",
        "43  name in torch.utils.data: expected one of 48 names such as ['RandomSampler', "
        "'SubsetRandomSampler', 'WeightedRandomSampler'], got 'RandomSamplr'. Did you mean "
        "'RandomSampler' or 'SubsetRandomSampler' or 'WeightedRandomSampler'?",
    ),
    "an unknown keyword of a data set": (
        "split: val, size",
        "splt: val, size",
        "16  phantom: keyword: expected one of ['augment', 'cache', 'channels', 'image_size', "
        "'seed', 'size', 'split', 'transform'], got 'splt'. Did you mean 'split'?",
    ),
    "a data set that is not there": (
        "dataset_id: *test_set",
        "dataset_id: phantom/tset",
        "77  test.test_data_loader.dataset_id: expected one of ['phantom/test', 'phantom/train', "
        "'phantom/val'], got 'phantom/tset'. Did you mean 'phantom/test' or 'phantom/train' or "
        "'phantom/val'?",
    ),
    "an unknown loss": (
        "key: LRPSemanticCosineLoss",
        "key: LRPSemanticCosinLoss",
        "64  train.criterion: DisWOTPlusLoss: semantic: key: expected one of ['GradCAMCosineLoss', "
        "'GradCAML2Loss', 'LRPRelativeL2Loss', 'LRPSemanticCosineLoss', 'LRPSemanticL2Loss', "
        "'RelationCosineLoss', 'RelationL2Loss', 'RightReasonsLoss'], got "
        "'LRPSemanticCosinLoss'. Did you mean 'LRPSemanticCosineLoss' or "
        "'LRPSemanticL2Loss' or 'RelationCosineLoss'?",
    ),
    "weights of another sum": (
        "alpha: 0.4",
        "alpha: 0.5",
        "64  train.criterion: DisWOTPlusLoss: expected weights of at least 0, sum 1, got "
        "{'alpha': 0.5, 'beta': 0.4, 'gamma': 0.1, 'delta': 0.1} with sum 1.1. "
        "Change them so that alpha + beta + gamma + delta = 1.",
    ),
    "a layer that the model does not have": (
        "forward_proc: *recorder",
        "forward_proc: !import_call {key: kd_lrp_plugin.torchdistill.recorder, "
        "init: {kwargs: {layers: [layer2, layer33], method: gradient_activation}}}",
        "57  train.student.forward_proc: layer: expected one of 70 names such as ['layer3', "
        "'layer3.0', 'layer4'], got 'layer33'. Did you mean 'layer3' or 'layer3.0' or 'layer4'?",
    ),
    "a student that nobody records": (
        "forward_proc: *recorder",
        "forward_proc: forward_batch_only",
        "64  train.criterion: LRPSemanticCosineLoss: expected logits of the student with a "
        "recording, got none. Set train.student.forward_proc to !import_call {key: "
        "kd_lrp_plugin.torchdistill.recorder, init: {kwargs: {layers: [...], method: ...}}}.",
    ),
    "too few classes": (
        "{name: test_resnet, num_classes: 4}",
        "{name: test_resnet, num_classes: 3}",
        "31  models.student_model: expected 4 outputs or more, got 3. "
        "Set models.student_model.kwargs.num_classes to 4.",
    ),
    "a teacher that was not trained": (
        "src_ckpt: runs/phantom",
        "src_ckpt: runs/fantom",
        "29  models.teacher_model.src_ckpt: expected a checkpoint, got none at "
        "runs/fantom/ce/resnet10t/0/best.pt. "
        "Make it with: kd-lrp distill torchdistill_configs/phantom/ce/resnet10t.yaml",
    ),
    "an optimizer's keyword": (
        "key: Adam\n    kwargs: {lr: 0.003}",
        "key: SGD\n    kwargs: {lr: 0.003, momentun: 0.9}",
        "60  train.optimizer.kwargs: expected one of ['dampening', 'differentiable', 'foreach', "
        "'fused', 'lr', 'maximize', 'momentum', 'nesterov', 'params', 'weight_decay'], "
        "got 'momentun'. Did you mean 'momentum'?",
    ),
    "a compiled student with hooks": (
        "log_freq: 20",
        "compile: True",
        "57  train.student.forward_proc: compile: expected a student without hooks, got "
        "kd_lrp_recorder(gradient_activation, ['layer2', 'layer3']). "
        "Leave train.compile out: hooks and second derivatives do not compile.",
    ),
    "batches that are larger than the data": (
        "batch_size: &batch_size 32",
        "batch_size: &batch_size 3200",
        "40  train.train_data_loader: batches: expected one or more in an epoch, got none. "
        "Lower batch_size, or set drop_last: False.",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_config_is_told_with_its_place(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    right, wrong, words = WRONG[case]
    text = FLAT.read_text(encoding="utf-8")
    assert text.count(right) == 1
    Path("my.yaml").write_text(text.replace(right, wrong), encoding="utf-8")
    small = [] if case.startswith("batches") else SMALL[:2]
    teacher = [] if case.startswith("a teacher") else NO_TEACHER
    problems = check(resolve_config("my.yaml", small + teacher), CPU).problems
    assert problems == [f"my.yaml:{words}"]


OVERRIDES = {
    "train.precision=bf16": "precision: expected one of ['bfloat16', 'float16', 'float32']",
    "train.monitor=val_acc": "monitor: expected one of ['last', 'val_accuracy', 'val_auc', ",
    "train.monitor=train_loss": "'val_ce', 'val_loss'], got 'train_loss'. Did you mean 'val_loss'?",
    "train.early_stopping=5": "expected a patience >= 1",
    "train.scheduler={key: ReduceLROnPlateau, kwargs: {}}": "Set scheduler.kwargs.mode to max",
    "train.train_data_loader.kwargs.persistent_workers=true": "Leave it out: workers that live",
    "train.early_stopping={patience: 2, min_delta: 1e-3}": "a min_delta >= 0, got '1e-3'",
    "train.stage2={num_epochs: 1}": "train: expected stages ['train.stage1'], got ['train.stage2']",
    "train.optimizer.grad_accum_step=0": "an integer >= 1, got 0",
    "train.scheduler={key: OneCycleLR, kwargs: {max_lr: 0.1, total_steps: 1}}": "Tried to step 2",
    "train.model={forward_proc: forward_batch_only, src_ckpt: x.pt}": "Put it under models",
    "train.num_epochs=0": "expected an integer of 1 or more, got 0",
    "models.model.src_ckpt=evil.pt": "expected a file of plain tensors, got 'evil.pt'",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_wrong_value_is_told_before_any_work(override, tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return (Path.mkdir, (tmp_path / "broken in",))

    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, "evil.pt")
    epochs = ["train.num_epochs=3"] if "OneCycle" in override else []
    problems = check(resolve_config(BASELINE, [*SMALL, *epochs, f"+{override}"]), CPU).problems
    assert OVERRIDES[override] in "\n".join(problems)
    assert not Path("broken in").exists()


def test_all_problems_come_at_once():
    wrong = ["train.num_epochs=0", "train.optimizer.key=Adamm", "models.model.key=timm"]
    problems = check(resolve_config(BASELINE, [*SMALL, *wrong]), CPU).problems
    assert all(any(p.startswith(f"--set {override}  ") for p in problems) for override in wrong)


def test_what_the_driver_does_itself_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("precious.pt").write_text("kept")
    student = (
        "+train.student={requires_grad: True, forward_proc: forward_batch_only, "
        "wrapper: DistributedDataParallel, dst_ckpt: precious.pt}"
    )
    report = check(resolve_config(KD, [*SMALL, *NO_TEACHER, student]), CPU)
    assert report.problems == []
    assert ["not used" in warning for warning in report.warnings] == [True, True]
    assert Path("precious.pt").read_text() == "kept"


def test_a_last_batch_that_a_loss_cannot_take_is_told():
    overrides = [*SMALL, *NO_TEACHER, "datasets.phantom/train.init.kwargs.size=17"]
    overrides.append("train.train_data_loader.kwargs.drop_last=False")
    (problem,) = check(resolve_config(LRP, overrides), CPU).problems
    assert "expected full ones, got a last one of 1. Set drop_last: True." in problem


def test_a_last_batch_that_a_norm_cannot_take_is_told():
    """One image, whose last map has one position."""
    overrides = [*TINY, "datasets.phantom/train.init.kwargs.size=17"]
    overrides.append("train.train_data_loader.kwargs.drop_last=False")
    (problem,) = check(resolve_config(BASELINE, overrides), CPU).problems
    assert "expected full ones, got a last one of 1. Set drop_last: True." in problem


TINY = [*SMALL, "image_size=32"]


class TestEvaluation:
    """Validation and test are tried as the run will take them, or its work would be lost."""

    def problems(self, config: Path, *overrides: str) -> list[str]:
        teacher = [] if config == BASELINE else NO_TEACHER
        return check(resolve_config(config, [*TINY, *teacher, *overrides]), CPU).problems

    def test_images_that_would_not_be_counted_are_refused(self):
        dropped = "test.test_data_loader.kwargs={batch_size: 8, drop_last: true}"
        sizes = [f"datasets.phantom/{split}.init.kwargs.size=9" for split in ("val", "test")]
        found = self.problems(BASELINE, dropped, *sizes)  # one node, by an alias
        for loader, problem in zip(("val_data_loader", "test_data_loader"), found, strict=True):
            assert f"{loader}.kwargs.drop_last: expected False, got True" in problem
            assert "the last images, 1 of 9, would not be counted" in problem
        even = [override.replace("=9", "=8") for override in sizes]
        assert self.problems(BASELINE, dropped, *even) == []

    def test_test_images_of_another_size_are_told(self):
        head = "{name: test_resnet, num_classes: 4, head: flatten_mlp, image_size: 32}"
        larger = "{split: test, size: 8, image_size: 48}"
        (problem,) = self.problems(
            BASELINE,
            f"models.model.kwargs={head}",
            f"datasets.phantom/test.init.kwargs={larger}",
        )
        assert "  test.test_data_loader: " in problem

    def test_a_set_without_images_is_told(self):
        empty = "!import_call {key: torch.utils.data.TensorDataset, init: {args: [%s]}}"
        empty %= "!import_call {key: torch.tensor, init: {args: [[]]}}"
        (problem,) = self.problems(BASELINE, f"datasets.phantom/test={empty}")
        assert "test.test_data_loader: batches: expected one or more" in problem
        assert problem.endswith("got none. Add images.")

    def test_an_image_alone_needs_no_relation_to_others(self):
        alone = "{batch_size: 1}"
        assert self.problems(LRP, f"train.val_data_loader.kwargs={alone}") == []


class TestSteps:
    """What each of two processes would do, as one of them tells."""

    TWO = DistributedContext(torch.device("cpu"), 0, 2)

    def problems(
        self, config: Path, *overrides: str, context: DistributedContext = TWO
    ) -> list[str]:
        teacher = [] if config == BASELINE else NO_TEACHER
        return check(resolve_config(config, [*TINY, *teacher, *overrides]), context).problems

    def test_each_process_needs_a_batch_of_its_share(self):
        assert self.problems(BASELINE, "batch_size=16", context=CPU) == []
        (problem,) = self.problems(BASELINE, "batch_size=16")
        assert "train.train_data_loader: batches: expected one or more" in problem
        assert "none for each of 2 processes" in problem

    def test_a_last_batch_is_that_of_a_share(self):
        sizes = ["datasets.phantom/train.init.kwargs.size=18", "num_workers=0"]
        sizes.append("train.train_data_loader.kwargs={batch_size: 8}")
        assert self.problems(LRP, *sizes, context=CPU) == []  # 18 = 2 * 8 + 2; each has 9 = 8 + 1
        (problem,) = self.problems(LRP, *sizes)
        assert "expected full ones, got a last one of 1. Set drop_last: True." in problem

    @pytest.mark.parametrize("keyword", ["replacement", "rank", "shuffle"])
    def test_keywords_of_a_sampler_are_refused(self, keyword):
        kwargs = f"+train.train_data_loader.sampler.kwargs={{{keyword}: 1}}"
        (problem,) = self.problems(BASELINE, kwargs)
        assert "sampler.kwargs: expected none under torchrun" in problem
        assert f"got ['{keyword}']" in problem

    def test_all_that_is_trained_needs_a_gradient(self):
        relation = "train.criterion.kwargs={alpha: 0, beta: 0, gamma: 0, delta: 1}"
        assert self.problems(LRP, relation, context=CPU) == []
        (problem,) = self.problems(LRP, relation)
        assert "got none for 11, such as ['layer4.0.conv1.weight'," in problem
        assert "Give CE or KL a weight, or freeze them (frozen_modules)." in problem
        frozen = "+train.student.frozen_modules=[layer4, fc]"
        assert self.problems(LRP, relation, frozen) == []

    def test_accumulation_must_end_within_the_run(self):
        steps = "+train.optimizer.grad_accum_step"
        assert self.problems(BASELINE, f"{steps}=2", context=CPU) == []
        (problem,) = self.problems(BASELINE, f"{steps}=3", context=CPU)
        assert "grad_accum_step: expected at most 2, the batches" in problem
        (problem,) = self.problems(BASELINE, f"{steps}=2")
        assert "grad_accum_step: expected at most 1, the batches" in problem


WRONG_TEXT = {
    "a zero byte": (b"train: \0", "expected YAML, got unacceptable character #x0000"),
    "another encoding": ("train: für".encode("latin-1"), "expected text in UTF-8, got other bytes"),
    "a list": (b"- train\n- test\n", "expected a mapping of sections, got a list"),
    "an alias in itself": (
        b"models: {}\ntrain: &all\n  stage1: [*all]\n",
        "expected an alias of what stands elsewhere, got one inside of what it names",
    ),
    "brackets without end": (b"train: " + b"[" * 5000, "expected YAML, got maximum recursion"),
}


@pytest.mark.parametrize("case", WRONG_TEXT)
def test_a_text_that_is_no_config_is_told_with_its_file(case, tmp_path):
    content, words = WRONG_TEXT[case]
    (tmp_path / "my.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"my\.yaml(:2)?: expected") as caught:
        resolve_config(tmp_path / "my.yaml")
    assert words in str(caught.value)


def test_a_key_that_nothing_reads_is_a_warning():
    report = check(resolve_config(BASELINE, [*SMALL, "+train.colour=blue"]), CPU)
    assert report.problems == []
    assert report.warnings == ["--set +train.colour=blue  train.colour: nothing reads it"]


@pytest.mark.parametrize("more", [[], ["+train.early_stopping={patience: 3}"]])
@pytest.mark.parametrize("monitor", ["val_accuracy", "last"])
def test_test_images_that_choose_the_epoch_are_a_warning(monitor, more):
    loader = "train.val_data_loader.dataset_id=phantom/test"
    overrides = [*SMALL, loader, f"+train.monitor={monitor}", *more]
    report = check(resolve_config(BASELINE, overrides), CPU)
    assert report.problems == []
    words = ["test images, which so choose the epoch" in warning for warning in report.warnings]
    assert words == ([] if monitor == "last" and not more else [True])


@pytest.mark.parametrize("mean", [0.5, 0.25])
def test_a_test_set_that_is_prepared_otherwise_is_a_warning(mean):
    transform = (
        "!import_call {key: kd_lrp_plugin.data.transforms.make_transforms, "
        f"init: {{kwargs: {{image_size: 48, mean: {mean}}}}}}}"
    )
    overrides = [*SMALL, f"+datasets.phantom/test.init.kwargs.transform={transform}"]
    report = check(resolve_config(BASELINE, overrides), CPU)
    assert report.problems == []
    words = ["otherwise than the test set does" in warning for warning in report.warnings]
    assert words == ([] if mean == 0.5 else [True])


class TestCommand:
    def test_says_that_nothing_is_wrong(self):
        flags = [word for override in [*SMALL, *NO_TEACHER] for word in ("--set", override)]
        result = CliRunner().invoke(app, ["check", str(LRP), *flags])
        assert result.exit_code == 0, result.output
        assert "no problem found" in result.output

    def test_counts_what_is_wrong(self):
        flags = ["--set", "train.num_epochs=0", "--set", "train.optimizer.key=Adamm"]
        result = CliRunner().invoke(app, ["check", str(BASELINE), *flags])
        assert result.exit_code == 1
        assert "expected an integer of 1 or more, got 0" in result.output
        assert "problems" in result.output


class TestSafe:
    @pytest.mark.parametrize("config", sorted(CONFIGS.rglob("[!_]*.yaml")), ids=lambda p: p.stem)
    def test_every_config_of_ours_is_harmless(self, config):
        assert unsafe_tags(resolve_config(config)) == []

    @pytest.mark.parametrize(
        "node",
        [
            "!import_call {key: os.system, init: {args: [touch ran]}}",
            "!import_get {key: system, package: os}",
            "!!python/object/apply:os.system [touch ran]",
            "!call_method [x, y]",
            "!import_call {key: kd_lrp_plugin.torchdistill.losses}",
            "!import_call {key: torch.tensor, <<: {package: evilmod}}",
        ],
    )
    def test_a_tag_that_could_run_code_is_refused_unrun(self, node, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        text = FLAT.read_text(encoding="utf-8").replace("log_freq: 20", f"log_freq: {node}")
        Path("my.yaml").write_text(text, encoding="utf-8")
        result = CliRunner().invoke(app, ["distill", "my.yaml", "--safe"])
        assert result.exit_code == 1
        assert "my.yaml:38: expected calls known as harmless" in result.output
        assert not Path("ran").exists()

    @pytest.mark.parametrize(
        "text",
        [
            "models: {model: {key: net, <<: {repo_or_dir: hub}, kwargs: {source: local}}}",
            "models: {<<: {model: {key: net, repo_or_dir: hub, kwargs: {source: local}}}}",
            "<<: {dependencies: [evilmod, kd_lrp_plugin.torchdistill]}",
            "models: {model: {key: net, ? !join [repo_or_, dir] : hub}}",
        ],
    )
    def test_keys_that_hide_what_they_bring_are_refused(self, text, tmp_path):
        (tmp_path / "my.yaml").write_text(text, encoding="utf-8")
        found = "\n".join(unsafe_tags(resolve_config(tmp_path / "my.yaml")))
        assert "a merge key" in found or "not plain text" in found

    def test_imports_and_hubs_are_refused(self):
        config = resolve_config(
            BASELINE, ["dependencies=[antigravity]", "+models.model.repo_or_dir=x/y"]
        )
        found = "\n".join(unsafe_tags(config))
        assert "a dependency on 'antigravity'" in found
        assert "repo_or_dir" in found


class TestCorruptImages:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        for split in ("Training", "Testing"):
            for name in ("glioma", "notumor"):
                folder = tmp_path / split / name
                folder.mkdir(parents=True)
                for number in range(8):
                    noise = np.random.default_rng(number).integers(0, 255, (64, 64), np.uint8)
                    Image.fromarray(noise).save(folder / f"{number}.png")
        broken = tmp_path / "Training/glioma"
        content = (broken / "3.png").read_bytes()
        (broken / "3.png").write_bytes(content[: len(content) // 2])
        (broken / "5.png").write_bytes(b"")
        return tmp_path

    def test_are_named_with_their_reason(self, folder):
        found = unreadable_images(FolderImages(root=str(folder), split="Training", image_size=16))
        assert [Path(file).name for file in found] == ["3.png", "5.png"]
        assert "truncated" in found[str(folder / "Training/glioma/3.png")].lower()

    def test_are_left_out_when_asked(self, folder, caplog):
        (folder / "Training/glioma/6.png").unlink()
        (folder / "Training/glioma/6.png").symlink_to("nowhere.png")  # of data not yet fetched
        data = FolderImages(root=str(folder), split="Training", image_size=16, skip_corrupt=True)
        assert len(data) == 13
        assert len(data.targets) == 13
        assert "3 of 16 images left out" in caplog.text
        assert "5.png" in caplog.text

    def test_what_was_read_is_not_read_again_until_it_changes(self, folder, monkeypatch):
        read: list[str] = []
        monkeypatch.setattr(
            validation, "_why_unreadable", lambda file, *_: read.append(file) or None
        )
        data = FolderImages(root=str(folder), split="Testing", image_size=16)
        files = [file for file, _ in data.samples]

        class Notes(NullProgress):
            said = ""

            def note(self, text: str) -> None:
                self.said = text

        with Notes() as notes:
            assert unreadable_images(data) == {}
            assert (sorted(read), notes.said) == (files, "")
            read.clear()
            unreadable_images(data)
            assert read == []
            assert notes.said == "images: of 16 files 16 read before and unchanged, 0 read now"
            os.utime(files[3], ns=(1, 1))
            Path(files[5]).write_bytes(Path(files[5]).read_bytes() + b"more")
            unreadable_images(data)
            assert sorted(read) == [files[3], files[5]]
            assert notes.said == "images: of 16 files 14 read before and unchanged, 2 read now"
            read.clear()
            twelve = FolderImages(root=str(folder), split="Testing", image_size=16, bits=12)
            unreadable_images(twelve)
            assert sorted(read) == files

    def test_a_broken_file_is_never_remembered(self, folder):
        data = FolderImages(root=str(folder), split="Training", image_size=16)
        for _ in range(2):
            assert len(unreadable_images(data)) == 2
        whole = (folder / "Training/glioma/1.png").read_bytes()
        (folder / "Training/glioma/3.png").write_bytes(whole)
        assert [Path(file).name for file in unreadable_images(data)] == ["5.png"]

    def test_a_sample_is_read_and_the_next_goes_on_where_it_ended(self, folder, monkeypatch):
        read: list[str] = []
        why = validation._why_unreadable
        monkeypatch.setattr(
            validation, "_why_unreadable", lambda file, *rest: read.append(file) or why(file, *rest)
        )
        data = FolderImages(root=str(folder), split="Training", image_size=16)
        found: dict[str, str] = {}
        for _ in range(5):
            found |= unreadable_images(data, most=4)
        # The empty one is found each time; the damaged one once the sample comes to it.
        assert [Path(file).name for file in sorted(found)] == ["3.png", "5.png"]
        assert {*read} == {file for file, _ in data.samples}

    def test_without_a_place_for_the_list_all_are_read(self, folder, monkeypatch):
        monkeypatch.setenv("XDG_STATE_HOME", str(folder / "Training/glioma/0.png"))
        data = FolderImages(root=str(folder), split="Training", image_size=16)
        for _ in range(2):
            assert [Path(file).name for file in unreadable_images(data)] == ["3.png", "5.png"]

    def test_all_that_is_evaluated_is_read_and_of_the_rest_a_sample(self, folder, monkeypatch):
        asked = {}
        monkeypatch.setattr(
            dry_run,
            "unreadable_images",
            lambda data, most, name: asked.update({len(data): most}) or {},
        )
        datasets = {"train": range(5), "val": range(3), "test": range(2)}
        stage = {f"{n}_data_loader": {"dataset_id": n} for n in ("train", "val")}
        content = {"datasets": datasets, "train": stage}
        content["test"] = {"test_data_loader": {"dataset_id": "test"}}
        dry_run._check_images(CheckReport(None), content)
        assert asked == {5: dry_run.SAMPLE, 3: None, 2: None}

    def test_stop_a_run_before_it_begins(self, folder):
        overrides = [
            "image_size=32",
            "num_workers=0",
            "batch_size=2",
            "models.model.kwargs.weights=",
        ]
        overrides.append(f"datasets.brain_mri/train.init.kwargs.root={folder}")
        overrides.append("datasets.brain_mri/train.init.kwargs.classes=[glioma, notumor]")
        config = CONFIGS / "brain_mri/ce/mobilenetv2_035.yaml"
        problems = "\n".join(check(resolve_config(config, overrides), CPU).problems)
        assert problems.count("1 of brain_mri/train that cannot be read") == 1
        assert problems.count("1 of brain_mri/val that cannot be read") == 1
        assert "set skip_corrupt: True to leave them out" in problems


def test_a_student_with_auxiliary_heads_is_counted_by_its_logits():
    googlenet = "{key: googlenet, kwargs: {num_classes: 4, init_weights: False}}"
    layers = "train.teacher.forward_proc.init.kwargs.layers=auto"
    overrides = [*SMALL, *NO_TEACHER, f"models.student_model={googlenet}", "image_size=64", layers]
    assert check(resolve_config(LRP, overrides), CPU).problems == []


def test_a_key_of_the_test_that_nothing_reads_is_a_warning():
    report = check(resolve_config(BASELINE, [*SMALL, "+test.colour=blue"]), CPU)
    assert report.problems == []
    assert report.warnings == ["--set +test.colour=blue  test.colour: nothing reads it"]
