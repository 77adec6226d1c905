"""Figures about predictions against loops over single images."""

import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from kd_lrp_plugin.metrics.agreement import compare_predictions
from kd_lrp_plugin.metrics.classification import classification_metrics

NAMES = ["glioma", "meningioma", "notumor", "pituitary", "other"]


def predictions(n: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that know something of the labels, and the labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, n)
    logits = generator.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels]
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True), labels


def first_largest(row: list[float]) -> int:
    return row.index(max(row))


def share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def class_by_loops(rows: list[list[float]], labels: list[int], k: int) -> dict[str, Any]:
    """Figures of one class: by counting images, and pairs of images for the AUC."""
    said = [first_largest(row) for row in rows]
    hits = sum(s == k and y == k for s, y in zip(said, labels, strict=True))
    support, claims = labels.count(k), said.count(k)
    inside = [row[k] for row, y in zip(rows, labels, strict=True) if y == k]
    outside = [row[k] for row, y in zip(rows, labels, strict=True) if y != k]
    won = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in inside for b in outside)
    return {
        "precision": share(hits, claims),
        "recall": share(hits, support),
        "f1": 2 * hits / (support + claims) if support else None,
        "auc": won / (len(inside) * len(outside)) if inside and outside else None,
        "support": support,
    }


def calibration_by_loops(rows: list[list[float]], labels: list[int]) -> float:
    bins: dict[int, list[float]] = {}
    for row, label in zip(rows, labels, strict=True):
        gap = (first_largest(row) == label) - max(row)
        bins.setdefault(min(int(15 * max(row)), 14), []).append(gap)
    return sum(abs(sum(gaps)) for gaps in bins.values()) / len(rows)


def mean_of_known(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


class TestClassificationMetrics:
    @pytest.mark.parametrize("classes", [2, 3, 5])
    @pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
    def test_agrees_with_loops(self, classes, kind):
        values, labels = predictions(120, classes, seed=classes)
        got = classification_metrics(kind(values), kind(labels), NAMES[:classes])
        rows, truth = values.tolist(), labels.tolist()
        each = [class_by_loops(rows, truth, k) for k in range(classes)]
        said = [first_largest(row) for row in rows]
        pairs = list(zip(truth, said, strict=True))
        for name, record, expected in zip(NAMES, got["per_class"], each, strict=False):
            assert record.pop("class") == name
            assert record == pytest.approx(expected)
        assert got["n"] == 120
        assert got["accuracy"] == pytest.approx(sum(t == s for t, s in pairs) / 120)
        for figure, part in (("balanced_accuracy", "recall"), ("macro_f1", "f1")):
            assert got[figure] == pytest.approx(sum(one[part] for one in each) / classes)
        assert got["macro_auc"] == pytest.approx(sum(one["auc"] for one in each) / classes)
        losses = [-math.log(row[label]) for row, label in zip(rows, truth, strict=True)]
        assert got["log_loss"] == pytest.approx(sum(losses) / 120)
        expected = calibration_by_loops(rows, truth)
        assert got["calibration_error"] == pytest.approx(expected, abs=1e-6)  # float32 inside
        expected = [[pairs.count((t, s)) for s in range(classes)] for t in range(classes)]
        assert got["confusion_matrix"] == expected

    def test_a_class_without_images_is_none_and_outside_of_every_mean(self):
        values, labels = predictions(90, 4)
        labels[labels == 2] = 0  # still predicted
        got = classification_metrics(values, labels, NAMES[:4])
        each = [class_by_loops(values.tolist(), labels.tolist(), k) for k in range(4)]
        absent = got["per_class"][2]
        assert [absent[part] for part in ("recall", "f1", "auc", "support")] == [None] * 3 + [0]
        assert absent["precision"] == 0
        means = {"balanced_accuracy": "recall", "macro_f1": "f1", "macro_auc": "auc"}
        for figure, part in means.items():
            assert got[figure] == pytest.approx(mean_of_known([one[part] for one in each]))

    def test_a_class_that_is_never_predicted_has_no_precision_and_f1_of_zero(self):
        values = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
        got = classification_metrics(values, np.array([0, 0, 1]), ["no", "yes"])
        expected = {"precision": None, "recall": 0, "f1": 0, "auc": 1, "support": 1}
        assert got["per_class"][1] == {"class": "yes", **expected}
        assert got["macro_f1"] == pytest.approx((2 * 2 / (2 + 3) + 0) / 2)

    def test_further_outputs_are_named_by_number_and_change_no_mean(self):
        values, labels = predictions(80, 4)
        wide = np.hstack([values, np.zeros((80, 2))])
        names = NAMES[:4]
        narrow = classification_metrics(values, labels, names)
        got = classification_metrics(wide, labels, names)
        assert [record["class"] for record in got["per_class"]] == [*names, "4", "5"]
        assert np.shape(got["confusion_matrix"]) == (6, 6)
        for figure in set(got) - {"per_class", "confusion_matrix"}:
            assert got[figure] == pytest.approx(narrow[figure]), figure

    def test_a_confidence_of_exactly_one_lies_in_the_last_bin(self):
        values = np.array([[1.0, 0.0], [0.05, 0.95]])
        got = classification_metrics(values, np.array([1, 1]), ["no", "yes"])
        expected = abs(1 / 2 - (1 + 0.95) / 2)  # bins of their own would give (1 + 0.05) / 2
        assert got["calibration_error"] == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize(
        ("values", "labels", "classes"),
        [
            ([[1.0, 0.0]], [1], 2),  # one image, a probability of zero for its class
            ([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], [0, 0], 3),  # one class alone
            ([[0.5, 0.5], [0.5, 0.5]], [0, 1], 2),
            ([[0.0, 0.0, 1.0]], [0], 2),  # an output without a class
        ],
    )
    def test_never_gives_nan_and_warns_of_nothing(self, values, labels, classes):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = classification_metrics(np.array(values), np.array(labels), NAMES[:classes])
        json.dumps(got, allow_nan=False)

    def test_takes_single_precision_that_carries_gradient(self):
        values, labels = predictions(30, 3)
        single = torch.tensor(values, dtype=torch.float32, requires_grad=True)
        got = classification_metrics(single, torch.tensor(labels), NAMES[:3])
        exact = classification_metrics(values, labels, NAMES[:3])
        assert got["log_loss"] == pytest.approx(exact["log_loss"], rel=1e-5)


class TestTheIntervalOfTheAccuracy:
    def test_agrees_with_images_drawn_one_by_one(self):
        values, labels = predictions(60, 3)
        got = classification_metrics(values, labels, NAMES[:3], resamples=20000)
        right = values.argmax(1) == labels
        drawn = np.random.default_rng(1).integers(0, 60, (20000, 60))
        expected = np.quantile(right[drawn].mean(1), [0.025, 0.975])
        # The accuracy of a resample is a multiple of 1/60, so quantiles are, up to one step.
        np.testing.assert_allclose(got["accuracy_interval"], expected, atol=1.01 / 60)

    def test_contains_the_accuracy_and_narrows_as_images_are_added(self):
        widths = []
        for n in (20, 200, 2000):
            got = classification_metrics(*predictions(n, 3), NAMES[:3])
            low, high = got["accuracy_interval"]
            assert low < got["accuracy"] < high
            widths.append(high - low)
        assert widths[0] > 2 * widths[1] > 4 * widths[2]  # about sqrt(10) each

    def test_covers_the_true_accuracy_about_as_often_as_it_says(self):
        truth, hits = 0.8, 0
        for seed in range(200):
            right = np.random.default_rng(seed).random(400) < truth
            values = np.where(right[:, None], [0.9, 0.1], [0.1, 0.9])
            labels = np.zeros(400, int)
            options = {"resamples": 500, "seed": seed, "confidence": 0.9}
            low, high = classification_metrics(values, labels, ["a", "b"], **options)[
                "accuracy_interval"
            ]
            hits += low <= truth <= high
        assert 0.83 <= hits / 200 <= 0.97  # 0.9 and three standard errors

    def test_depends_on_the_seed_and_on_nothing_else(self):
        data = (*predictions(500, 3), NAMES[:3])
        np.random.seed(1)  # noqa: NPY002 - the global state must not matter
        one = classification_metrics(*data, resamples=50)
        assert classification_metrics(*data, resamples=50) == one
        other = classification_metrics(*data, resamples=50, seed=1)
        assert other["accuracy_interval"] != one["accuracy_interval"]

    def test_several_rows_of_an_image_count_as_one(self):
        values, labels = predictions(60, 3)
        often = np.tile(values, (3, 1)), np.tile(labels, 3)
        once = classification_metrics(values, labels, NAMES[:3], resamples=20000)
        names = [*map(str, range(60))] * 3
        got = classification_metrics(*often, NAMES[:3], resamples=20000, images=names)
        assert (got["n"], got["accuracy"]) == (180, once["accuracy"])
        expected = once["accuracy_interval"]
        np.testing.assert_allclose(got["accuracy_interval"], expected, atol=1.01 / 60)
        low, high = classification_metrics(*often, NAMES[:3])["accuracy_interval"]
        assert high - low < 0.7 * (expected[1] - expected[0])  # as if each were another image

    def test_rows_of_one_image_are_drawn_together(self):
        """Against resampling by loops, with images of one row, two and three."""
        values, labels = predictions(90, 3)
        owners = [0] * 3 + [1] * 2 + [*range(2, 87)]
        got = classification_metrics(values, labels, NAMES[:3], resamples=4000, images=owners)
        rows = [np.flatnonzero(np.array(owners) == image) for image in range(87)]
        right, draw, found = values.argmax(1) == labels, np.random.default_rng(1), []
        for _ in range(4000):
            drawn = np.concatenate([rows[image] for image in draw.integers(87, size=87)])
            found.append(right[drawn].mean())
        expected = np.quantile(found, [0.025, 0.975])
        np.testing.assert_allclose(got["accuracy_interval"], expected, atol=0.02)
        with pytest.raises(ValueError, match="expected 90 images, one per row, got 89"):
            classification_metrics(values, labels, NAMES[:3], images=owners[1:])

    def test_widens_with_the_confidence(self):
        data = (*predictions(500, 3), NAMES[:3])
        intervals = [
            classification_metrics(*data, confidence=c)["accuracy_interval"] for c in (0.5, 0.99)
        ]
        assert intervals[1][0] < intervals[0][0] < intervals[0][1] < intervals[1][1]


GOOD = np.array([[0.9, 0.1], [0.2, 0.8]])


class TestWhatClassificationRefuses:
    @pytest.mark.parametrize(
        ("values", "labels", "words"),
        [
            (np.empty((0, 2)), np.empty(0, int), r"n >= 1 and outputs >= 2, got \(0, 2\)"),
            (np.array([0.9, 0.2]), np.array([0, 1]), r"outputs >= 2, got \(2,\)"),
            (np.ones((2, 1)), np.array([0, 0]), r"outputs >= 2, got \(2, 1\)"),
            (GOOD, np.array([0, 1, 1]), r"\(2, 2\), \(3,\) and 2 classes"),
            (GOOD, np.array([[0], [1]]), r"labels \(n,\), got \(2, 1\)"),
            (GOOD, np.array([0, 2]), r"labels in \[0, 2\), got \[2\]"),
            (GOOD, np.array([-1, 0]), r"labels in \[0, 2\), got \[-1\]"),
            (np.array([[0.9, 0.1], [0.2, 0.81]]), np.array([0, 1]), "sums to 1.01.*softmax"),
            (np.array([[1.5, -0.5]]), np.array([0]), "least entry -0.5"),
            (np.array([[math.nan, 0.5], [0.5, 0.5]]), np.array([0, 1]), "got 1 rows"),
            (np.array([[math.inf, 0.5]]), np.array([0]), "finite"),
        ],
    )
    def test_input_that_does_not_fit(self, values, labels, words):
        with pytest.raises(ValueError, match=f"^classification_metrics: expected .*{words}"):
            classification_metrics(values, labels, ["no", "yes"])

    def test_more_classes_than_outputs(self):
        with pytest.raises(ValueError, match="and 3 classes"):
            classification_metrics(GOOD, np.array([0, 1]), NAMES[:3])

    def test_labels_of_an_output_without_a_class(self):
        values = np.array([[0.2, 0.2, 0.6]])
        with pytest.raises(ValueError, match=r"labels in \[0, 2\), got \[2\]"):
            classification_metrics(values, np.array([2]), NAMES[:2])

    @pytest.mark.parametrize("labels", [np.array([0.0, 1.0]), np.array([False, True])])
    def test_labels_that_are_no_integers(self, labels):
        with pytest.raises(TypeError, match="integer labels"):
            classification_metrics(GOOD, labels, ["no", "yes"])

    @pytest.mark.parametrize("options", [{"resamples": 0}, {"confidence": 95}])
    def test_an_interval_that_cannot_be(self, options):
        with pytest.raises(ValueError, match="resamples >= 1"):
            classification_metrics(GOOD, np.array([0, 1]), ["no", "yes"], **options)

    def test_but_not_rows_rounded_to_four_digits(self):
        values, labels = predictions(50, 5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rounded = classification_metrics(values.round(4), labels, NAMES)
        exact = classification_metrics(values, labels, NAMES)
        assert rounded["log_loss"] == pytest.approx(exact["log_loss"], rel=1e-3)


def mcnemar_by_sums(one: int, other: int) -> float:
    """Twice the smaller tail of a fair coin, tossed once per image that only one gets right."""
    n = one + other
    tail = sum(math.comb(n, k) for k in range(min(one, other) + 1)) / 2**n
    return min(1.0, 2 * tail)


class TestComparePredictions:
    @pytest.mark.parametrize("classes", [2, 4])
    def test_agrees_with_loops(self, classes):
        teacher, labels = predictions(150, classes)
        student = 0.6 * teacher + 0.4 * predictions(150, classes, seed=5)[0]
        got = compare_predictions(student, torch.tensor(teacher), labels)
        images = [
            (first_largest(s), first_largest(t), y)
            for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True)
        ]
        counts = {
            "both_right": sum(s == t == y for s, t, y in images),
            "only_student_right": sum(s == y != t for s, t, y in images),
            "only_teacher_right": sum(t == y != s for s, t, y in images),
            "both_wrong": sum(s != y != t for s, t, y in images),
        }
        assert {key: got[key] for key in counts} == counts
        assert sum(counts.values()) == got["n"] == 150
        taught = [s == t for s, t, y in images if t == y]
        astray = [s == t for s, t, y in images if t != y]
        assert got["agreement"] == pytest.approx((sum(taught) + sum(astray)) / 150)
        assert got["agreement_where_teacher_right"] == pytest.approx(sum(taught) / len(taught))
        assert got["agreement_where_teacher_wrong"] == pytest.approx(sum(astray) / len(astray))
        divergence = sum(
            t * math.log(t / s)
            for row, ours in zip(teacher.tolist(), student.tolist(), strict=True)
            for t, s in zip(row, ours, strict=True)
        )
        assert got["kl_divergence"] == pytest.approx(divergence / 150)
        one, other = counts["only_student_right"], counts["only_teacher_right"]
        assert one != other
        assert got["p_value"] == pytest.approx(mcnemar_by_sums(one, other))
        assert got["accuracy_difference"] == pytest.approx((one - other) / 150)

    def test_of_a_model_with_itself_finds_no_difference(self):
        values, labels = predictions(40, 3)
        got = compare_predictions(values, values, labels)
        assert [got["agreement"], got["kl_divergence"], got["p_value"]] == [1, 0, 1]

    def test_agreement_with_a_teacher_that_is_never_wrong_or_never_right(self):
        for label, right, wrong in ((0, 1.0, None), (1, None, 1.0)):
            got = compare_predictions(GOOD[:1], GOOD[:1], np.array([label]))
            assert got["agreement_where_teacher_right"] == right
            assert got["agreement_where_teacher_wrong"] == wrong

    def test_a_probability_of_zero_gives_a_large_but_finite_divergence(self):
        sure, other = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
        got = compare_predictions(sure, other, np.array([0]))
        assert got["kl_divergence"] == pytest.approx(-math.log(2.0**-52), rel=1e-6)
        json.dumps(got, allow_nan=False)

    def test_several_rows_of_an_image_are_one_vote(self):
        student, teacher = np.array([[0.9, 0.1]] * 6 + [[0.2, 0.8]]), np.full((7, 2), [0.4, 0.6])
        labels = np.zeros(7, int)
        labels[6] = 1
        once = compare_predictions(student, teacher, labels)
        assert once["p_value"] == pytest.approx(2 * 0.5**6)  # six of six
        got = compare_predictions(student, teacher, labels, ["a", "a", "a", "b", "b", "b", "c"])
        assert got["p_value"] == pytest.approx(2 * 0.5**2)  # a and b, of two
        assert {**got, "p_value": 0} == {**once, "p_value": 0}
        with pytest.raises(ValueError, match="expected 7 images, one per row, got 1"):
            compare_predictions(student, teacher, labels, ["a"])

    def test_refuses_models_of_different_images_and_labels_out_of_range(self):
        labels = np.array([0, 1])
        with pytest.raises(ValueError, match="same images"):
            compare_predictions(GOOD, GOOD[:1], labels)
        with pytest.raises(ValueError, match="same images"):
            compare_predictions(GOOD, GOOD, labels[:1])
        with pytest.raises(ValueError, match=r"^compare_predictions: expected labels in \[0, 2\)"):
            compare_predictions(GOOD, GOOD, labels + 1)
