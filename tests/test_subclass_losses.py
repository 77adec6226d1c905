"""Losses over subclasses against loops, and classes as sums of their subclasses."""

import math

import pytest
import torch
from reference_losses import kl_divergence, rows, softmax
from torch import Tensor

from kd_lrp_plugin import losses

OWNERS = [0, 1, 0, 2, 1]  # classes 0, 1 and 2, of two, two and one subclass
NAN = float("nan")


def draw(n: int = 4, k: int = 5, seed: int = 0, dtype=torch.float64) -> Tensor:
    return 3 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def class_probabilities(logits: Tensor) -> list[list[float]]:
    """The softmax of the subclasses, added up class by class."""
    found = []
    for row in rows(logits):
        totals = [0.0, 0.0, 0.0]
        for owner, probability in zip(OWNERS, softmax(row, 1.0), strict=True):
            totals[owner] += probability
        found.append(totals)
    return found


class TestFolding:
    def test_probabilities_are_the_sums_over_the_subclasses(self):
        folded = losses.fold_logits(draw(), OWNERS).softmax(1)
        torch.testing.assert_close(folded, torch.tensor(class_probabilities(draw())).double())
        torch.testing.assert_close(folded.sum(1), torch.ones(4).double())

    def test_classes_of_one_subclass_are_their_logits(self):
        assert torch.equal(losses.fold_logits(draw(), range(5)), draw())

    def test_large_logits_stay_finite(self):
        folded = losses.fold_logits(1e4 * draw(dtype=torch.float32), OWNERS)
        assert folded.isfinite().all()

    def test_gradient_is_exact(self):
        logits = draw().requires_grad_()
        assert torch.autograd.gradcheck(lambda z: losses.fold_logits(z, OWNERS), logits)

    def test_labels_are_those_of_the_classes(self):
        targets = torch.arange(8)
        assert losses.fold_targets(targets, OWNERS).tolist() == [*OWNERS, 0, 1, 2]
        soft = draw().softmax(1)
        expected = torch.tensor(class_probabilities(draw())).double()
        torch.testing.assert_close(losses.fold_targets(soft, OWNERS), expected)

    @pytest.mark.parametrize("wrong", [[-1], [8], [0, -1]])
    def test_labels_out_of_range_are_refused(self, wrong):
        with pytest.raises(ValueError, match="expected subclass indices"):
            losses.fold_targets(torch.tensor(wrong), OWNERS)

    def test_soft_labels_of_the_classes_are_refused(self):
        with pytest.raises(ValueError, match=r"expected soft labels \(n, 5\)"):
            losses.fold_targets(torch.full((2, 3), 1 / 3), OWNERS)

    @pytest.mark.parametrize("owners", [[0, 2, 0, 2, 2], [0, 0, -1, 1, 1]])
    def test_a_class_without_a_subclass_is_refused(self, owners):
        with pytest.raises(ValueError, match="subclass_of: expected class indices"):
            losses.fold_logits(draw(), owners)

    def test_logits_of_another_number_are_refused(self):
        with pytest.raises(ValueError, match="one per subclass"):
            losses.fold_logits(draw(k=4), OWNERS)


class TestDivergence:
    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_without_weights_it_is_the_divergence_of_the_outputs(self, temperature):
        student, teacher = draw(seed=1), draw(seed=2)
        found = losses.subclass_kl(student, teacher, temperature)
        assert torch.equal(found, losses.kl_divergence(student, teacher, temperature))

    def test_weights_of_one_change_nothing(self):
        student = draw(seed=1)
        student[:, 2] += 100
        teacher = draw(seed=2)
        teacher[:, 3] += 100  # one step away, for all images
        found = losses.subclass_kl(student, teacher, distance_weights=True)
        assert torch.equal(found, losses.kl_divergence(student, teacher))

    @pytest.mark.parametrize("seed", range(4))
    def test_agrees_with_loops(self, seed):
        student, teacher = draw(8, seed=seed), draw(8, seed=seed + 10)
        expected, weights = 0.0, []
        for s, t in zip(student, teacher, strict=True):
            first, second = s.tolist().index(max(s.tolist())), t.tolist().index(max(t.tolist()))
            weights.append(1.5 if abs(first - second) >= 2 else 1.0)
            expected += weights[-1] * kl_divergence(s[None], t[None]) / 8
        assert {1.0, 1.5} <= set(weights)
        found = losses.subclass_kl(student, teacher, distance_weights=True)
        assert found.item() == pytest.approx(expected, rel=1e-10)

    def test_gradient_is_exact_and_the_students_alone(self):
        student, teacher = draw(seed=1).requires_grad_(), draw(seed=2).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda s: losses.subclass_kl(s, teacher.detach(), 2.0, True), student
        )
        losses.subclass_kl(student, teacher, 2.0, True).backward()
        assert teacher.grad is None

    def test_models_of_different_subclasses_are_refused(self):
        with pytest.raises(ValueError, match="same number of classes"):
            losses.subclass_kl(draw(k=5), draw(k=4))

    @pytest.mark.parametrize("temperature", [0, -1, 1000, NAN])
    def test_a_temperature_out_of_range_is_refused(self, temperature):
        with pytest.raises(ValueError, match="temperature"):
            losses.subclass_kl(draw(), draw(), temperature)


class TestCrossEntropy:
    def test_agrees_with_loops(self):
        logits, targets = draw(6), [4, 7, 0, 5, 3, 6]
        expected = 0.0
        for row, classes, target in zip(
            rows(logits), class_probabilities(logits), targets, strict=True
        ):
            known = target < 5
            expected -= math.log(softmax(row, 1.0)[target] if known else classes[target - 5]) / 6
        found = losses.subclass_cross_entropy(logits, torch.tensor(targets), OWNERS)
        assert found.item() == pytest.approx(expected, rel=1e-10)

    def test_gradient_is_exact(self):
        logits, targets = draw(6).requires_grad_(), torch.tensor([4, 7, 0, 5, 3, 6])
        assert torch.autograd.gradcheck(
            lambda z: losses.subclass_cross_entropy(z, targets, OWNERS), logits
        )

    def test_soft_labels_are_those_of_the_subclasses(self):
        logits, targets = draw(4), draw(4, seed=3).softmax(1)
        pairs = zip(targets.tolist(), rows(logits), strict=True)
        expected = -sum(
            p * math.log(q) for t, row in pairs for p, q in zip(t, softmax(row, 1.0), strict=True)
        )
        found = losses.subclass_cross_entropy(logits, targets, OWNERS)
        assert found.item() == pytest.approx(expected / 4, rel=1e-10)

    def test_half_precision_loses_nothing_but_the_logits(self):
        logits, targets = draw().half(), torch.tensor([4, 7, 0, 5])
        found = losses.subclass_cross_entropy(logits, targets, OWNERS)
        expected = losses.subclass_cross_entropy(logits.double(), targets, OWNERS)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)

    def test_fewer_labels_than_images_are_refused(self):
        with pytest.raises(ValueError, match="a target for each image"):
            losses.subclass_cross_entropy(draw(), torch.tensor([0]), OWNERS)


class TestAuxiliary:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_agrees_with_loops(self, temperature):
        logits = draw()
        units = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows(logits)]
        expected = 0.0
        for one in units:
            products = [sum(a * b for a, b in zip(one, other, strict=True)) for other in units]
            expected += math.log(sum(math.exp(p / temperature) for p in products))
        expected = expected / 4 - 1 / temperature - math.log(4)
        found = losses.subclass_auxiliary(logits, temperature)
        assert found.item() == pytest.approx(expected, rel=1e-10)
        assert -2 / temperature <= found.item() < 0

    @pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
    def test_is_zero_for_parallel_logits_and_never_above(self, temperature):
        for seed in range(20):
            lengths = torch.rand(6, 1, generator=torch.Generator().manual_seed(seed)) + 0.1
            parallel = draw(1, seed=seed, dtype=torch.float32) * lengths
            found = losses.subclass_auxiliary(parallel, temperature).item()
            assert -3e-7 / temperature <= found <= 0

    def test_gradient_is_exact(self):
        logits = draw().requires_grad_()
        assert torch.autograd.gradcheck(lambda z: losses.subclass_auxiliary(z, 0.7), logits)

    def test_zero_logits_have_no_direction(self):
        logits = torch.zeros(3, 5, requires_grad=True)
        found = losses.subclass_auxiliary(logits, 0.01)
        found.backward()
        assert found.item() == pytest.approx(-100)
        assert logits.grad.tolist() == torch.zeros(3, 5).tolist()

    def test_a_single_image_is_refused(self):
        with pytest.raises(ValueError, match="drop_last"):
            losses.subclass_auxiliary(draw(1))

    @pytest.mark.parametrize("temperature", [0, -1, 1000, NAN])
    def test_a_temperature_out_of_range_is_refused(self, temperature):
        with pytest.raises(ValueError, match="temperature from"):
            losses.subclass_auxiliary(draw(), temperature)
