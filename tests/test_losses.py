"""One contract for every loss, then what only some of them promise."""

import math

import pytest
import torch
from reference_losses import REFERENCE
from torch import Tensor

from kd_lrp_plugin import losses
from kd_lrp_plugin.losses import LOSSES

SIZED = {"semantic_l2", "semantic_relative_l2", "kl_divergence"}  # they see more than directions
DIRECTIONS = sorted(set(LOSSES) - SIZED)
SCALE_FREE = [*DIRECTIONS, "semantic_relative_l2"]  # blind to the scale of both sides
MATRICES = ["correlation_cosine", "correlation_l2", "relation_cosine", "relation_l2"]
SHAPES = {"semantic": (3, 4, 5), "correlation": (3, 4, 5), "relation": (3, 2, 4, 5), "kl": (3, 5)}
HIGHEST = {"semantic_cosine": 2, "correlation_l2": math.sqrt(2), "relation_l2": math.sqrt(2)}


def shape_of(name: str) -> tuple[int, ...]:
    return SHAPES[name.split("_")[0]]


def pair(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A student that asks for its gradient, and a teacher; both signed."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, *shape_of(name), generator=generator, dtype=dtype)
    return student.clone().requires_grad_(), teacher.clone()


def test_every_loss_has_a_reference():
    assert REFERENCE.keys() == LOSSES.keys()


@pytest.mark.parametrize("name", sorted(LOSSES))
class TestLossContract:
    @pytest.mark.parametrize("seed", range(3))
    def test_agrees_with_reference(self, name, seed):
        student, teacher = pair(name, seed)
        assert LOSSES[name](student, teacher).item() == pytest.approx(
            REFERENCE[name](student, teacher), rel=1e-10
        )

    def test_is_a_scalar_of_the_students_type(self, name):
        value = LOSSES[name](*pair(name, dtype=torch.float32))
        assert value.shape == ()
        assert value.dtype == torch.float32

    def test_is_exactly_zero_with_a_finite_gradient_when_equal(self, name):
        student, _ = pair(name, dtype=torch.float32)
        value = LOSSES[name](student, student.detach().clone())
        (gradient,) = torch.autograd.grad(value, student)
        assert value.item() == 0
        assert gradient.abs().max() < 1e-6  # a minimum; rounding of float32 remains

    def test_gradient_is_exact(self, name):
        student, teacher = pair(name)
        assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, teacher), student)

    def test_teacher_gets_no_gradient(self, name):
        student, teacher = pair(name)
        teacher.requires_grad_()
        LOSSES[name](student, teacher).backward()
        assert teacher.grad is None
        assert student.grad.abs().sum() > 0

    def test_order_of_the_samples_does_not_matter(self, name):
        student, teacher = pair(name)
        order = [2, 0, 1]
        assert LOSSES[name](student[order], teacher[order]).item() == pytest.approx(
            LOSSES[name](student, teacher).item(), rel=1e-12
        )

    def test_stays_in_its_range_at_the_extremes(self, name):
        student, _ = pair(name)
        for teacher in (-student.detach(), 1e6 * student.detach(), student.detach().flip(0)):
            assert LOSSES[name](student, teacher).item() >= 0
            if name in DIRECTIONS:
                assert LOSSES[name](student, teacher).item() <= HIGHEST.get(name, 1) + 1e-12

    def test_shape_mismatch_names_both_shapes(self, name):
        student, teacher = pair(name)
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got ") as error:
            LOSSES[name](student, teacher[:2])
        assert str(tuple(student.shape)) in str(error.value)
        assert str(tuple(teacher[:2].shape)) in str(error.value)

    def test_wrong_axes_are_refused(self, name):
        student, teacher = pair(name)
        with pytest.raises(ValueError, match=f"^{name}: expected .* of shape \\(n, "):
            LOSSES[name](student[0], teacher[0])

    def test_an_empty_batch_is_refused(self, name):
        student, teacher = pair(name)
        with pytest.raises(ValueError, match=r"n >= \d"):
            LOSSES[name](student[:0], teacher[:0])

    @pytest.mark.parametrize("zero_side", ["student", "teacher", "both"])
    def test_zeros_give_a_finite_value_and_gradient(self, name, zero_side):
        student, teacher = pair(name, dtype=torch.float32)
        if zero_side != "teacher":
            student = torch.zeros_like(student).requires_grad_()
        if zero_side != "student":
            teacher = torch.zeros_like(teacher)
        value = LOSSES[name](student, teacher)
        (gradient,) = torch.autograd.grad(value, student)
        assert value.isfinite()
        assert gradient.isfinite().all()
        if name in DIRECTIONS and zero_side != "teacher":
            assert gradient.count_nonzero() == 0
        if name in DIRECTIONS and zero_side != "both":
            assert value.item() == pytest.approx(1, abs=1e-6)

    def test_nan_is_not_hidden(self, name):
        student, teacher = pair(name)
        student = student.detach().clone()
        student[0, 0] = torch.nan
        assert LOSSES[name](student, teacher).isnan()


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-3, 1e20])
@pytest.mark.parametrize("name", SCALE_FREE)
def test_scale_does_not_matter_in_float32(name, scale):
    student, teacher = pair(name, dtype=torch.float32)
    expected = LOSSES[name](student, teacher)
    (slope,) = torch.autograd.grad(expected, student)
    small = (student.detach() * scale).requires_grad_()
    value = LOSSES[name](small, teacher * scale)
    (gradient,) = torch.autograd.grad(value, small)
    # 1e-5: a few roundings of float32. The derivative grows as the maps shrink.
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(gradient.double() * scale, slope.double(), atol=1e-5)


@pytest.mark.parametrize("name", DIRECTIONS)
class TestLossesOfDirection:
    def test_entries_below_the_normal_numbers_count_as_zero(self, name):
        student, teacher = pair(name, dtype=torch.float32)
        subnormal = (student.detach() * 1e-40).requires_grad_()
        value = LOSSES[name](subnormal, teacher)
        (gradient,) = torch.autograd.grad(value, subnormal)
        assert value.item() == pytest.approx(1, abs=1e-6)
        assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("name", MATRICES)
class TestLossesBetweenMatrices:
    def test_teacher_may_have_another_size(self, name):
        student, _ = pair(name)
        teacher = torch.randn(3, *[5] * (student.ndim - 1), dtype=torch.float64)
        assert LOSSES[name](student, teacher).item() == pytest.approx(
            REFERENCE[name](student, teacher), rel=1e-10
        )

    def test_one_sample_is_refused(self, name):
        student, teacher = pair(name)
        with pytest.raises(ValueError, match=r"n >= 2, got .* Use a larger batch"):
            LOSSES[name](student[:1], teacher[:1])


@pytest.mark.parametrize("kind", ["correlation", "relation"])
def test_squared_l2_is_twice_the_cosine(kind):
    student, teacher = pair(kind)
    l2, cosine = LOSSES[f"{kind}_l2"], LOSSES[f"{kind}_cosine"]
    assert l2(student, teacher).item() ** 2 == pytest.approx(2 * cosine(student, teacher).item())


def test_semantic_cosine_spans_zero_to_two():
    student, _ = pair("semantic_cosine")
    assert losses.semantic_cosine(student, 3 * student).item() == pytest.approx(0, abs=1e-12)
    assert losses.semantic_cosine(student, -student).item() == pytest.approx(2)


def test_a_zero_map_counts_as_one_and_leaves_the_other_samples_alone():
    student, teacher = pair("semantic_cosine")
    rest = losses.semantic_cosine(student[1:], teacher[1:])
    (slope,) = torch.autograd.grad(rest, student)
    student = student.detach().clone()
    student[0] = 0
    student.requires_grad_()
    value = losses.semantic_cosine(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.item() == pytest.approx((1 + 2 * rest.item()) / 3)
    assert gradient[0].count_nonzero() == 0
    assert torch.allclose(gradient[1:], slope[1:] * 2 / 3)


class TestRelativeL2:
    def test_it_sees_sign_and_size_unlike_the_cosine(self):
        student, _ = pair("semantic_relative_l2")
        for factor in (-1, 0, 0.5, 1, 3):
            value = losses.semantic_relative_l2(factor * student, student)
            assert value.item() == pytest.approx((factor - 1) ** 2)

    def test_the_batch_is_the_unit_so_that_a_zero_map_of_the_teacher_is_compared_too(self):
        student, teacher = pair("semantic_relative_l2")
        teacher[0] = 0
        value = losses.semantic_relative_l2(student, teacher)
        (gradient,) = torch.autograd.grad(value, student)
        expected = ((student - teacher) ** 2).sum() / (teacher**2).sum()
        assert value.item() == pytest.approx(expected.item(), rel=1e-12)
        assert gradient[0].abs().min() > 0

    @pytest.mark.parametrize("entry", [0.0, 1e-40])
    def test_without_any_relevance_of_the_teacher_it_is_one_without_gradient(self, entry):
        student, teacher = pair("semantic_relative_l2", dtype=torch.float32)
        value = losses.semantic_relative_l2(student, torch.full_like(teacher, entry))
        (gradient,) = torch.autograd.grad(value, student)
        assert value.item() == 1
        assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("name", ["semantic_cosine", "semantic_l2", "semantic_relative_l2"])
def test_maps_of_another_size_are_refused_with_the_way_out(name):
    student, teacher = pair(name)
    with pytest.raises(ValueError, match=r"\(3, 4, 5\).*\(3, 2, 5\).*Use losses.resize_maps"):
        LOSSES[name](student, teacher[:, :2])


@pytest.mark.parametrize("temperature", [0.5, 1, 3, 16])
def test_kl_divergence_agrees_with_reference_at_every_temperature(temperature):
    student, teacher = pair("kl_divergence")
    assert losses.kl_divergence(student, teacher, temperature).item() == pytest.approx(
        REFERENCE["kl_divergence"](student, teacher, temperature), rel=1e-10
    )


@pytest.mark.parametrize("temperature", [math.inf, 1e30, 101, 1e-3])
def test_kl_divergence_refuses_a_temperature_at_which_float32_tells_nothing(temperature):
    with pytest.raises(ValueError, match=r"expected a temperature from 0.01 to 100, got"):
        losses.kl_divergence(*pair("kl_divergence"), temperature)


@pytest.mark.parametrize("temperature", [0, -1, math.nan])
def test_kl_divergence_refuses_a_temperature_that_is_not_positive(temperature):
    with pytest.raises(ValueError, match="expected a temperature above 0, got"):
        losses.kl_divergence(*pair("kl_divergence"), temperature)


@pytest.mark.parametrize("temperature", [0.01, 100])
def test_kl_divergence_is_right_in_float32_at_the_ends_of_its_range(temperature):
    student, teacher = pair("kl_divergence")
    single = losses.kl_divergence(student.float(), teacher.float(), temperature).item()
    expected = REFERENCE["kl_divergence"](student / 1, teacher, temperature)
    assert single == pytest.approx(expected, rel=2e-2)  # at 100, 1e-7 of rounding in 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("temperature", "scale"), [(0.01, 1), (4, 1e4), (100, 1)])
def test_kl_divergence_of_half_precision_loses_nothing_but_the_logits(temperature, scale, dtype):
    student, teacher = ((scale * logits).to(dtype) for logits in pair("kl_divergence"))
    value = losses.kl_divergence(student, teacher, temperature)
    assert value.dtype == torch.float32
    expected = losses.kl_divergence(student.double(), teacher.double(), temperature)
    torch.testing.assert_close(value.double(), expected, rtol=1e-2, atol=0)


def test_kl_divergence_refuses_a_single_output():
    with pytest.raises(ValueError, match="kl_divergence: expected logits of two classes or more"):
        losses.kl_divergence(torch.randn(3, 1), torch.randn(3, 1))


class TestKLDivergenceOfClassesThatAreRuledOut:
    def test_one_that_both_rule_out_adds_nothing(self):
        student, teacher = pair("kl_divergence")
        masked = torch.tensor([0.0, 0.0, -math.inf, 0.0, 0.0])
        keep = [0, 1, 3, 4]
        expected = losses.kl_divergence(student[:, keep], teacher[:, keep])
        (slope,) = torch.autograd.grad(expected, student)
        value = losses.kl_divergence(student + masked, teacher + masked)
        (gradient,) = torch.autograd.grad(value, student)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient, slope)

    def test_one_that_the_teacher_alone_rules_out_is_the_limit(self):
        student, teacher = pair("kl_divergence")
        nearly, never = teacher.clone(), teacher.clone()
        nearly[:, 2], never[:, 2] = -200.0, -math.inf
        value = losses.kl_divergence(student, never)
        torch.testing.assert_close(value, losses.kl_divergence(student, nearly))
        (gradient,) = torch.autograd.grad(value, student)
        assert gradient.isfinite().all()

    def test_one_that_the_student_alone_rules_out_is_infinitely_far(self):
        student, teacher = pair("kl_divergence")
        masked = torch.tensor([0.0, 0.0, -math.inf, 0.0, 0.0])
        assert losses.kl_divergence(student + masked, teacher).item() == math.inf


def test_zero_maps_finds_exactly_the_maps_without_direction():
    maps = torch.zeros(4, 3, 3)
    maps[1, 2, 2] = -1e-30
    maps[2, 0, 0] = 1e-40  # not a normal number in float32
    maps[3] = 1
    assert losses.zero_maps(maps).tolist() == [True, False, True, False]


class TestResizeMaps:
    def test_a_map_that_fits_is_returned_as_it_is(self):
        maps = torch.rand(2, 4, 5)
        assert losses.resize_maps(maps, (4, 5)) is maps

    @pytest.mark.parametrize("size", [(3, 2), (14, 20), (3, 20)])
    def test_size_is_as_asked_and_constants_stay(self, size):
        maps = torch.full((2, 7, 7), -3.0)
        assert torch.allclose(losses.resize_maps(maps, size), torch.full((2, *size), -3.0))

    def test_every_pixel_counts_when_shrinking(self):
        maps = torch.zeros(1, 15, 14, requires_grad=True)
        losses.resize_maps(maps, (4, 3)).sum().backward()
        assert (maps.grad > 0).all()

    def test_enlarging_interpolates_between_pixel_centres(self):
        enlarged = losses.resize_maps(torch.tensor([[[0.0, 1.0]]]), (1, 4))
        assert torch.allclose(enlarged, torch.tensor([[[0.0, 0.25, 0.75, 1.0]]]))

    @pytest.mark.parametrize("size", [(2, 3), (6, 7)])
    def test_gradient_is_exact(self, size):
        maps = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda m: losses.resize_maps(m, size), maps)

    @pytest.mark.parametrize("size", [(0, 3), (4,), (4, 4, 4)])
    def test_a_wrong_size_is_refused(self, size):
        with pytest.raises(ValueError, match="expected a size of two positive numbers"):
            losses.resize_maps(torch.rand(2, 4, 5), size)

    def test_features_are_refused(self):
        with pytest.raises(ValueError, match=r"resize_maps: expected maps of shape \(n, h, w\)"):
            losses.resize_maps(torch.rand(2, 3, 4, 5), (2, 2))
