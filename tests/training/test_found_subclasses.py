"""Subclasses that k-means finds: a plain teacher, one of its subclasses, and a student of that."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from small_runs import CONFIGS, CPU, Stopped, StopsAt, outcome, same, write_digits

from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.evaluation import evaluate
from kd_lrp_plugin.evaluation.explain import explain
from kd_lrp_plugin.evaluation.explain_inputs import ExplainOptions
from kd_lrp_plugin.runs.provenance import list_files
from kd_lrp_plugin.studies.plan import StudyOptions
from kd_lrp_plugin.studies.runner import run_study
from kd_lrp_plugin.training import trainer
from kd_lrp_plugin.training.check.dry_run import check
from kd_lrp_plugin.utils.progress import NullProgress

PLAIN = CONFIGS / "mnist/ce/mnist_cnn.yaml"
KINDS = CONFIGS / "mnist/subclass_labels/mnist_cnn-kmeans.yaml"
SKD = CONFIGS / "mnist/skd_lrp_cosine/mnist_assistant_small_from_mnist_cnn-kmeans.yaml"
TABLE = "datasets.found/train.init.kwargs.table.init.kwargs"
TWO = [f"{TABLE}.per_class=2"] + [
    f"datasets.found/{part}.init.kwargs.per_class=2" for part in ("val", "test")
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "mnist", train=80, test=20)


def run_config(config: Path, out: Path, overrides, progress=None) -> Path:
    with progress or NullProgress():
        trainer.distill(RunSpec(config, list(overrides), out, device="cpu"))
    return out


@pytest.fixture(scope="module")
def small(root) -> list[str]:
    return ["batch_size=16", "num_workers=0", "train.num_epochs=1", f"root={root}"]


@pytest.fixture(scope="module")
def plain(small, tmp_path_factory) -> Path:
    return run_config(PLAIN, tmp_path_factory.mktemp("plain") / "run", small)


@pytest.fixture(scope="module")
def of_kinds(small, plain) -> list[str]:
    return [*small, *TWO, f"{TABLE}.model.src_ckpt={plain / 'best.pt'}"]


@pytest.fixture(scope="module")
def kinds(of_kinds, tmp_path_factory) -> Path:
    overrides = [*of_kinds, "models.model.kwargs.num_classes=20"]
    return run_config(KINDS, tmp_path_factory.mktemp("kinds") / "run", overrides)


@pytest.fixture(scope="module")
def taught(of_kinds, kinds) -> list[str]:
    """Of a student that sees some of the images."""
    heads = [f"models.{role}_model.kwargs.num_classes=20" for role in ("teacher", "student")]
    few = ["+datasets.mnist/train.init.kwargs.size=48", "+datasets.mnist/train.init.kwargs.seed=1"]
    file = f"models.teacher_model.src_ckpt={kinds / 'best.pt'}"
    return [*of_kinds, *heads, *few, file, "train.num_epochs=3"]


@pytest.fixture(scope="module")
def student(taught, tmp_path_factory) -> Path:
    return run_config(SKD, tmp_path_factory.mktemp("student") / "run", taught)


def read_predictions(run: Path) -> list[dict[str, str]]:
    with (run / "predictions.csv").open() as lines:
        return list(csv.DictReader(lines))


def test_the_clusters_are_found_once(plain, kinds, student):
    (table,) = plain.glob("subclasses-*.csv")
    with table.open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 68  # of 80, without those held out
    assert {row["subclass"] for row in rows} == {f"{d} {n}" for d in range(10) for n in (1, 2)}
    assert all(row["subclass"].split()[0] == row["class"] for row in rows)


def test_what_is_reported_has_classes_and_subclasses(student):
    summary = json.loads((student / "summary.json").read_text())
    assert summary["classes"] == [str(digit) for digit in range(10)]
    assert summary["subclasses"][:3] == ["0 1", "0 2", "1 1"]
    assert "test_subclass_accuracy" not in summary  # of test images nobody knows them
    for row in read_predictions(student):
        assert row["subclass"] == ""
        for role in ("student", "teacher"):
            of_class = [float(row[f"{role}: {digit}"]) for digit in range(10)]
            parts = [
                [float(row[f"{role} subclass: {digit} {number}"]) for number in (1, 2)]
                for digit in range(10)
            ]
            np.testing.assert_allclose(np.sum(parts, axis=1), of_class, atol=1e-6)
            assert np.sum(of_class) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_evaluation_tells_how_many_are_used(student):
    found = evaluate.evaluate(student, 100)
    for role in ("student", "teacher"):
        used = found[role]["subclasses_used"]
        assert list(used) == [str(digit) for digit in range(10)]
        assert all(1 <= number <= 2 for number in used.values())
        assert found[role]["effective_subclasses"] == pytest.approx(np.mean(list(used.values())))


def test_subclasses_that_nobody_knows_are_not_explained(student):
    with pytest.raises(ValueError, match="known subclasses, got 20 that nobody knows"):
        explain([student], ExplainOptions(subclasses=True))


@pytest.mark.parametrize("moment", ["epoch 2", "epoch 3 val", "test"])
def test_a_run_that_was_killed_ends_as_one_that_was_not(moment, taught, student, plain, tmp_path):
    with pytest.raises(Stopped):
        run_config(SKD, tmp_path / "run", taught, StopsAt(moment))
    (table,) = plain.glob("subclasses-*.csv")
    text = table.read_text()
    table.unlink()  # found again, they are the same
    run_config(SKD, tmp_path / "run", taught)
    assert table.read_text() == text
    assert same(outcome(tmp_path / "run"), outcome(student))


def problems(config: Path, overrides: list[str]) -> str:
    return "\n".join(check(resolve_config(config, overrides), CPU).problems)


class TestRefusals:
    def test_nothing_is_wrong_with_the_student(self, taught):
        assert problems(SKD, taught) == ""

    def test_a_teacher_of_other_clusters(self, taught):
        found = problems(SKD, [*taught, f"{TABLE}.seed=1"])
        assert "expected the classes of the data" in found
        assert "0 1 (subclasses-" in found

    def test_a_teacher_of_another_number_of_them(self, taught):
        more = [change.replace("per_class=2", "per_class=3") for change in taught]
        found = problems(SKD, [*more, "models.student_model.kwargs.num_classes=30"])
        assert "models.teacher_model" in found

    def test_a_subclass_accuracy_that_nobody_knows(self, taught):
        assert "train.monitor" in problems(SKD, [*taught, "+train.monitor=val_subclass_accuracy"])

    def test_another_plain_model_is_another_run(self, taught, plain, tmp_path):
        (tmp_path / "best.pt").write_bytes((plain / "best.pt").read_bytes() + b"0")
        before = list_files(resolve_config(SKD, taught))
        other = f"{TABLE}.model.src_ckpt={tmp_path / 'best.pt'}"
        after = list_files(resolve_config(SKD, [*taught, other]))
        assert {k for k in before if before[k] != after[k]} == {"datasets.found/train.table"}


STUDY = """
question: do found subclasses help?
seeds: [0]
set: [batch_size=16, num_workers=0, train.num_epochs=1, "root=ROOT"]
prepare:
  plain: {config: CONFIGS/mnist/ce/mnist_cnn.yaml}
  kinds:
    config: CONFIGS/mnist/subclass_labels/mnist_cnn-kmeans.yaml
    set: &found
      - "datasets.found/train.init.kwargs.table.init.kwargs.model.src_ckpt={plain}"
configurations:
  SKD:
    config: CONFIGS/mnist/skd/mnist_mlp_from_mnist_cnn-kmeans.yaml
    set: [*found, "models.teacher_model.src_ckpt={kinds}"]
measures: [test_accuracy, effective_subclasses]
"""


@pytest.mark.slow
def test_a_study_prepares_the_plain_teacher_and_that_of_its_clusters(root, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.replace("ROOT", str(root)).replace("CONFIGS", str(CONFIGS)))
    options = StudyOptions(root=tmp_path / "runs", out=tmp_path / "out", device="cpu")
    content = run_study(file, options)
    assert content["final"], content["failed"]
    (row,) = content["runs"]
    assert 1 <= row["measures"]["effective_subclasses"] <= 4
    assert len(list((tmp_path / "runs/mnist/ce").rglob("subclasses-*.csv"))) == 1
