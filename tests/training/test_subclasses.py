"""Subclass distillation from YAML: trained on subclasses, reported by classes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import CPU, Stopped, StopsAt, outcome, same

from kd_lrp_plugin.attribution.methods import attribute
from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.data.mnist import Mnist
from kd_lrp_plugin.evaluation import evaluate, predict
from kd_lrp_plugin.evaluation.explain import explain
from kd_lrp_plugin.evaluation.explain_inputs import ExplainOptions, open_run
from kd_lrp_plugin.models.factory import build_model
from kd_lrp_plugin.models.weights import load_weights
from kd_lrp_plugin.relevance.recording import relevance_maps
from kd_lrp_plugin.runs import loading
from kd_lrp_plugin.training.check.dry_run import check
from kd_lrp_plugin.training.trainer import distill
from kd_lrp_plugin.utils.progress import NullProgress

DATA = """
dependencies: [kd_lrp_plugin.torchdistill]
datasets:
  digits/train: &digits_train !import_call
    key: kd_lrp_plugin.torchdistill.mnist
    init: {kwargs: {root: ROOT, part: train, classes: parity, image_size: 32}}
  digits/val: &digits_val !import_call
    key: kd_lrp_plugin.torchdistill.mnist
    init: {kwargs: {root: ROOT, part: validation, classes: parity, image_size: 32}}
  digits/test: &digits_test !import_call
    key: kd_lrp_plugin.torchdistill.mnist
    init: {kwargs: {root: ROOT, split: test, classes: parity, image_size: 32}}
  parity/train: &train_images !import_call
    key: kd_lrp_plugin.torchdistill.subclasses
    init: {kwargs: {images: *digits_train}}
  parity/val: !import_call
    key: kd_lrp_plugin.torchdistill.subclasses
    init: {kwargs: {images: *digits_val}}
  parity/test: !import_call
    key: kd_lrp_plugin.torchdistill.subclasses
    init: {kwargs: {images: *digits_test}}
test:
  test_data_loader:
    dataset_id: parity/test
    sampler: &in_order {class_or_func: !import_get {key: torch.utils.data.SequentialSampler}}
    kwargs: &loading {batch_size: 8, num_workers: 0}
train: &train
  num_epochs: 1
  train_data_loader:
    dataset_id: parity/train
    sampler: {class_or_func: !import_get {key: torch.utils.data.RandomSampler}}
    kwargs: {batch_size: 8, num_workers: 0, drop_last: True}
  val_data_loader: {dataset_id: parity/val, sampler: *in_order, kwargs: *loading}
  optimizer: {key: Adam, kwargs: {lr: 0.001}}
"""
TEACHER = """  model: {forward_proc: forward_batch_only}
  criterion:
    key: WeightedSumLoss
    kwargs:
      sub_terms:
        ce:
          criterion: {key: SubclassCrossEntropyLoss, kwargs: {dataset: *train_images}}
          weight: 1.0
        aux: {criterion: {key: SubclassAuxiliaryLoss, kwargs: {temperature: 1.0}}, weight: 0.5}
models:
  model: {key: timm_model, kwargs: {name: test_resnet, num_classes: 10, timm_kwargs: {in_chans: 1}}}
"""
STUDENT = """  teacher:
    requires_grad: False
    forward_proc: !import_call
      key: kd_lrp_plugin.torchdistill.recorder
      init: {kwargs: {layers: [layer2], method: lrp_zplus}}
  student:
    forward_proc: !import_call
      key: kd_lrp_plugin.torchdistill.recorder
      init: {kwargs: {layers: [layer2], method: lrp_zplus}}
  criterion:
    key: WeightedSumLoss
    kwargs:
      sub_terms:
        ce:
          criterion: {key: SubclassCrossEntropyLoss, kwargs: {dataset: *train_images}}
          weight: 0.5
        kl: {criterion: {key: SubclassKDLoss, kwargs: {distance_weights: True}}, weight: 0.5}
        maps: {criterion: {key: LRPSemanticCosineLoss, kwargs: {}}, weight: 0.1}
models:
  teacher_model:
    key: timm_model
    kwargs: {name: test_resnet, num_classes: 10, timm_kwargs: {in_chans: 1}}
    src_ckpt: CHECKPOINT
  student_model:
    key: timm_model
    kwargs: {name: test_resnet, num_classes: 10, timm_kwargs: {in_chans: 1}}
"""
OF_CLASSES = {
    "CE": """  criterion:
    key: WeightedSumLoss
    kwargs:
      sub_terms:
        ce:
          criterion: {key: CrossEntropyLoss, kwargs: {}}
          criterion_wrapper:
            key: SimpleLossWrapper
            kwargs:
              input: {is_from_teacher: False, module_path: ., io: output}
              target: {uses_label: True}
          weight: 1.0
""",
    "DisWOTPlusLoss": """  criterion:
    key: DisWOTPlusLoss
    kwargs: {alpha: 1.0, beta: 0.0, gamma: 0.0, delta: 0.0}
""",
}
OF = np.array([0, 1] * 5)  # the parity of each digit


def idx(values: np.ndarray) -> bytes:
    header = b"\0\0\x08" + bytes([values.ndim])
    return header + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder, random = tmp_path_factory.mktemp("digits"), np.random.default_rng(0)
    for split, n in {"train": 40, "t10k": 20}.items():
        labels = random.permutation(np.arange(n, dtype=np.uint8) % 10)
        images = random.integers(0, 256, (n, 28, 28), np.uint8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


@pytest.fixture(scope="module")
def configs(root) -> dict[str, Path]:
    """Of a teacher, and of a student that a run of it teaches."""
    texts = {"teacher": DATA + TEACHER, "student": DATA + STUDENT}
    for name, text in texts.items():
        file = root / f"{name}.yaml"
        checkpoint = root / "runs/teacher/best.pt"
        file.write_text(text.replace("ROOT", str(root)).replace("CHECKPOINT", str(checkpoint)))
    return {name: root / f"{name}.yaml" for name in texts}


def run_config(config: Path, out: Path, overrides=(), progress=None) -> Path:
    with progress or NullProgress():
        distill(RunSpec(config, list(overrides), out, device="cpu"))
    return out


@pytest.fixture(scope="module")
def teacher(configs) -> Path:
    return run_config(configs["teacher"], configs["teacher"].parent / "runs/teacher")


@pytest.fixture(scope="module")
def student(configs, teacher) -> Path:
    overrides = ["train.num_epochs=3"]
    return run_config(configs["student"], teacher.parent / "student", overrides)


def raw_probabilities(run: Path, images: torch.Tensor) -> np.ndarray:
    """Of the subclasses, by the weights alone."""
    model = build_model("test_resnet", 10, timm_kwargs={"in_chans": 1})
    load_weights(model, run / "best.pt", strict=True)
    with torch.no_grad():
        return model.eval()(images).softmax(1).numpy()


@pytest.fixture(scope="module")
def tested(root) -> tuple[torch.Tensor, np.ndarray]:
    """The test images, and their digits."""
    data = Mnist(str(root), split="test", image_size=32)
    return torch.stack([image for image, _ in data]), np.array(data.targets)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_what_is_reported_is_of_the_classes(role, request, tested):
    run = request.getfixturevalue(role)
    images, digits = tested
    of_subclasses = raw_probabilities(run, images)
    even = of_subclasses[:, ::2].sum(1)
    with (run / "predictions.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["label"] for row in rows] == [["even", "odd"][digit % 2] for digit in digits]
    found = [float(row["student: even"]) for row in rows]
    np.testing.assert_allclose(found, even, atol=1e-6)
    np.testing.assert_allclose(even + [float(row["student: odd"]) for row in rows], 1, atol=1e-6)
    summary = json.loads((run / "summary.json").read_text())
    right = (even < 0.5) == OF[digits]
    assert summary["test_accuracy"] == pytest.approx(right.mean())
    exact = of_subclasses.argmax(1) == digits
    assert summary["test_subclass_accuracy"] == pytest.approx(exact.mean())
    assert summary["classes"] == ["even", "odd"]
    assert summary["subclasses"] == [str(digit) for digit in range(10)]
    assert summary["subclass_of"] == OF.tolist()


def test_the_teachers_predictions_are_of_the_classes_too(student, teacher, tested):
    with (student / "predictions.csv").open() as lines:
        found = [float(row["teacher: odd"]) for row in csv.DictReader(lines)]
    expected = raw_probabilities(teacher, tested[0])[:, 1::2].sum(1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_evaluation_is_of_the_classes(student, tested):
    found = evaluate.evaluate(student, 100)
    for role in ("student", "teacher"):
        assert [row["class"] for row in found[role]["per_class"]] == ["even", "odd"]
        assert np.sum(found[role]["confusion_matrix"]) == len(tested[1])
    summary = json.loads((student / "summary.json").read_text())
    assert found["student"]["accuracy"] == pytest.approx(summary["test_accuracy"])


def test_prediction_is_of_the_classes_without_the_data(student, tested, tmp_path):
    picture = Image.fromarray(np.arange(784, dtype=np.uint8).reshape(28, 28))
    picture.save(tmp_path / "one.png")
    (record,) = predict.predict(student, [tmp_path / "one.png"])
    prepared = loading.load_transform(student)(picture)[None]
    raw = raw_probabilities(student, prepared)[0]
    expected = {"even": raw[::2].sum(), "odd": raw[1::2].sum()}
    assert record["all"] == pytest.approx(expected, abs=1e-6)
    assert record["class"] == max(expected, key=expected.__getitem__)
    assert list(record["subclasses"].values()) == pytest.approx(raw.tolist(), abs=1e-6)
    assert record["subclass"] == str(raw.argmax())


def test_predictions_of_subclasses_stand_beside_those_of_classes(student, teacher, tested):
    images, digits = tested
    with (student / "predictions.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["subclass"] for row in rows] == [str(digit) for digit in digits]
    for role, run in (("student", student), ("teacher", teacher)):
        found = [[float(row[f"{role} subclass: {digit}"]) for digit in range(10)] for row in rows]
        np.testing.assert_allclose(found, raw_probabilities(run, images), atol=1e-6)


class TestExplanations:
    def test_every_method_explains_a_class(self, student, tmp_path):
        methods = ["gradient_activation", "lrp_zplus", "score_cam"]
        explain([student], ExplainOptions(methods=methods, n=2, samples=2, out=tmp_path / "out"))
        assert list((tmp_path / "out").iterdir())

    def test_a_subclass_is_explained_by_its_own_logit(self, student, tested, tmp_path):
        before = {file.name: file.read_bytes() for file in student.glob("explanations*")}
        options = ExplainOptions(methods=["lrp_zplus"], n=2, samples=4, subclasses=True)
        (row,) = [row for row in explain([student], options) if row["model"] == "student"]
        assert {f.name for f in student.glob("explanations*")} - set(before) == {
            "explanations-subclasses.json",
            "explanations-subclasses.png",
        }
        assert all((student / name).read_bytes() == data for name, data in before.items())
        content = json.loads((student / "explanations-subclasses.json").read_text())
        assert content["explained"] == "the true subclass"
        run = open_run(student, "run", options)
        assert run.labels.tolist() == tested[1].tolist()
        assert run.class_name(7) == "7"
        images, labels = tested[0][:3], torch.tensor(tested[1][:3])
        plain = build_model("test_resnet", 10, timm_kwargs={"in_chans": 1}).eval()
        load_weights(plain, student / "best.pt", strict=True)
        found = attribute(run.models["student"], images, labels, "lrp_zplus", row["layer"])
        (expected,) = relevance_maps(plain, images, labels, [row["layer"]], "lrp_zplus")
        torch.testing.assert_close(found, expected.detach())

    def test_the_gradient_is_that_of_the_log_sum_exp(self, student, tested):
        model = loading.load_models(student, ("student",))["student"]
        plain = build_model("test_resnet", 10, timm_kwargs={"in_chans": 1}).eval()
        load_weights(plain, student / "best.pt", strict=True)
        images = tested[0][:4].requires_grad_()
        raw, folded = plain(images), model(images)
        for label in (0, 1):
            expected = raw[:, label == OF].exp().sum(1).log()
            torch.testing.assert_close(folded[:, label], expected)
            (found,) = torch.autograd.grad(folded[:, label].sum(), images, retain_graph=True)
            (wanted,) = torch.autograd.grad(expected.sum(), images, retain_graph=True)
            torch.testing.assert_close(found, wanted)

    def test_subclasses_that_are_ruled_out_leave_it_finite(self):
        logits = torch.tensor([[500.0, 0.0, -500.0]], requires_grad=True)
        folded = loading._report_classes((0, 1, 1), torch.nn.Identity(), (), logits)
        folded.sum().backward()
        assert folded.tolist() == [[500.0, 0.0]]
        assert logits.grad.tolist() == [[1.0, 1.0, 0.0]]

    def test_maps_are_those_of_the_weighted_subclasses(self, student, tested):
        model = loading.load_models(student, ("student",))["student"]
        images, labels = tested[0][:3], torch.tensor([0, 1, 1])
        found = attribute(model, images, labels, "lrp_zplus", "layer2")
        plain = build_model("test_resnet", 10, timm_kwargs={"in_chans": 1}).eval()
        load_weights(plain, student / "best.pt", strict=True)
        raw = plain(images).softmax(1).detach()
        shares = raw * (torch.tensor(OF) == labels[:, None])
        shares = shares / shares.sum(1, keepdim=True)
        (expected,) = relevance_maps(plain, images, shares, ["layer2"], "lrp_zplus")
        torch.testing.assert_close(found, expected.detach())


@pytest.mark.parametrize("moment", ["epoch 2", "epoch 3 val", "test"])
def test_a_run_that_was_killed_ends_as_one_that_was_not(moment, student, configs, tmp_path):
    overrides = ["train.num_epochs=3"]
    with pytest.raises(Stopped):
        run_config(configs["student"], tmp_path / "run", overrides, StopsAt(moment))
    run_config(configs["student"], tmp_path / "run", overrides)
    assert same(outcome(tmp_path / "run"), outcome(student))


def test_subclasses_that_nobody_knows_are_found_in_training(configs, tested, tmp_path):
    plain = [f"datasets.digits/{part}.init.kwargs.classes=digits" for part in ("train", "val")]
    plain += ["datasets.digits/test.init.kwargs.classes=digits"]
    two = [f"+datasets.parity/{p}.init.kwargs.per_class=2" for p in ("train", "val", "test")]
    overrides = [*plain, *two, "models.model.kwargs.num_classes=20"]
    run = run_config(configs["teacher"], tmp_path / "run", overrides)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["classes"] == [str(digit) for digit in range(10)]
    assert summary["subclasses"][:3] == ["0 1", "0 2", "1 1"]
    assert "test_subclass_accuracy" not in summary
    model, _ = loading.load_run(run)
    with torch.no_grad():
        right = (model(tested[0]).argmax(1).numpy() == tested[1]).mean()
    assert summary["test_accuracy"] == pytest.approx(right)


def problems(config: Path, *overrides: str) -> str:
    return "\n".join(check(resolve_config(config, list(overrides)), CPU).problems)


@pytest.mark.usefixtures("teacher")
class TestRefusals:
    def test_nothing_is_wrong_with_the_configs(self, configs):
        assert problems(configs["teacher"], "+train.monitor=val_subclass_accuracy") == ""
        assert problems(configs["student"], "+train.monitor=val_kl") == ""

    def test_a_monitor_that_does_not_exist(self, configs):
        found = problems(configs["student"], "+train.monitor=val_subclas_accuracy")
        assert "Did you mean 'val_subclass_accuracy'" in found

    @pytest.mark.parametrize("outputs", [2, 9, 11])
    def test_a_head_of_another_number(self, outputs, configs):
        found = problems(configs["student"], f"models.student_model.kwargs.num_classes={outputs}")
        assert "expected 10 outputs, one per subclass" in found
        assert "Set models.student_model.kwargs.num_classes to 10" in found

    def test_a_teacher_of_other_subclasses(self, configs, tmp_path):
        file = configs["teacher"].parent / "runs/teacher/best.pt"
        content = torch.load(file, weights_only=True)
        content["classes"] = [f"{digit} apart" for digit in range(10)]
        torch.save(content, tmp_path / "other.pt")
        found = problems(
            configs["student"], f"models.teacher_model.src_ckpt={tmp_path / 'other.pt'}"
        )
        assert "models.teacher_model.src_ckpt" in found
        assert "expected the classes of the data" in found

    def test_a_test_set_that_is_labelled_by_classes(self, configs):
        found = problems(configs["student"], "test.test_data_loader.dataset_id=digits/test")
        assert "expected labels by the same subclasses" in found

    def test_a_loss_of_data_that_are_labelled_by_classes(self, configs, tmp_path):
        text = configs["teacher"].read_text()
        changed = tmp_path / "changed.yaml"
        changed.write_text(text.replace("{dataset: *train_images}", "{dataset: *digits_train}"))
        assert "expected images labelled by subclass, got Mnist" in problems(changed)

    @pytest.mark.parametrize("criterion", ["CE", "DisWOTPlusLoss"])
    def test_a_loss_of_classes_where_no_subclass_is_known(self, criterion, configs, tmp_path):
        text = configs["teacher"].read_text().replace("classes: parity", "classes: digits")
        for part in ("train", "val", "test"):
            text = text.replace(f"*digits_{part}}}", f"*digits_{part}, per_class: 2}}")
        head, _, rest = text.replace("num_classes: 10", "num_classes: 20").partition("  criterion:")
        models = rest[rest.index("models:") :]
        (tmp_path / "of_classes.yaml").write_text(head + OF_CLASSES[criterion] + models)
        found = problems(tmp_path / "of_classes.yaml")
        assert "train.criterion" in found
        assert "out of bounds" in found or "take a loss of subclasses" in found

    def test_images_without_subclasses(self, configs):
        found = problems(configs["teacher"], "datasets.digits/train.init.kwargs.classes=digits")
        assert "expected known subclasses, got Mnist without" in found
