"""What a user's own module registers: methods, losses of a distance, access to recordings."""

import pytest
import torch
from recorded_batch import LAYERS, batch, io, models
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT

from kd_lrp_plugin import METHODS
from kd_lrp_plugin import torchdistill as plugin
from kd_lrp_plugin.relevance.methods import Method
from kd_lrp_plugin.relevance.rules import epsilon, gradient
from kd_lrp_plugin.utils.registry import Registry


@pytest.fixture(autouse=True)
def own_registries(monkeypatch):
    """What a test registers is gone after it."""
    for registry in (METHODS, plugin.COMPARISONS):
        assert isinstance(registry, Registry)
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    before = dict(MIDDLE_LEVEL_LOSS_DICT)
    yield
    MIDDLE_LEVEL_LOSS_DICT.clear()
    MIDDLE_LEVEL_LOSS_DICT.update(before)


def parts(method: str) -> tuple[dict, dict, torch.Tensor]:
    teacher, student = models()
    images, targets = batch()
    key = plugin.recorder(LAYERS, method)
    return io(student, key, images), io(teacher, key, images), targets


@pytest.mark.parametrize("key", ["LRPSemanticCosineLoss", "LRPSemanticL2Loss", "LRPRelativeL2Loss"])
def test_a_method_registered_later_is_taken_by_the_losses_of_relevance(key):
    METHODS.register(Method(epsilon, epsilon), "mine")
    own = plugin.RecordedLoss(key)(*parts("mine"))
    torch.testing.assert_close(own, plugin.RecordedLoss(key)(*parts("lrp_epsilon")))


@pytest.mark.parametrize("key", ["GradCAML2Loss", "GradCAMCosineLoss"])
def test_a_pooled_method_is_taken_by_the_losses_of_grad_cam_alone(key):
    METHODS.register(Method(gradient, gradient, pooled=True), "mine")
    own = plugin.RecordedLoss(key)(*parts("mine"))
    torch.testing.assert_close(own, plugin.RecordedLoss(key)(*parts("grad_cam")))
    with pytest.raises(ValueError, match="LRPSemanticL2Loss: expected the student recorded with"):
        plugin.RecordedLoss("LRPSemanticL2Loss")(*parts("mine"))


def manhattan(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (student - teacher).abs().mean()


class TestOwnLoss:
    @pytest.mark.parametrize(
        ("kind", "method"),
        [("relevance", "lrp_zplus"), ("grad_cam", "grad_cam"), ("features", "lrp_zplus")],
    )
    def test_it_is_the_mean_of_its_distance_over_the_layers(self, kind, method):
        plugin.register_recorded_loss("ManhattanLoss", manhattan, kind)
        student, teacher, targets = parts(method)
        value = MIDDLE_LEVEL_LOSS_DICT["ManhattanLoss"]()(student, teacher, targets)
        sides = []
        for role in ("student", "teacher"):
            logits, recording = plugin.recorded(
                {"student": student, "teacher": teacher}[role], role
            )
            signed = kind == "grad_cam"
            maps = recording.maps(logits, targets, signed=signed)
            sides.append(recording.activations if kind == "features" else maps)
        expected = sum(manhattan(s, t) for s, t in zip(*sides, strict=True)) / len(LAYERS)
        torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-4, atol=1e-6)

    def test_it_is_a_term_of_the_weighted_sum(self):
        plugin.register_recorded_loss("ManhattanLoss", manhattan)
        semantic = {"key": "ManhattanLoss", "kwargs": {"signed": True, "target": "contrast"}}
        loss = plugin.DisWOTPlusLoss(0.4, 0.4, 0.2, 0.0, semantic=semantic)
        student, teacher, targets = parts("lrp_gamma")
        loss({"student": student, "teacher": teacher}, {}, targets).backward()
        assert loss.terms["semantic"] > 0

    @pytest.mark.parametrize("taken", ["LRPSemanticL2Loss", "KDLoss", "ATLoss"])
    def test_a_taken_name_is_refused(self, taken):
        before = MIDDLE_LEVEL_LOSS_DICT[taken]
        with pytest.raises(ValueError, match="Choose another name"):
            plugin.register_recorded_loss(taken, manhattan)
        assert MIDDLE_LEVEL_LOSS_DICT[taken] is before

    def test_an_unknown_kind_is_named(self):
        with pytest.raises(ValueError, match="Did you mean 'features'"):
            plugin.register_recorded_loss("ManhattanLoss", manhattan, "feature")


class TestRecorded:
    def test_a_loss_of_ones_own_reaches_maps_and_features_and_their_gradient(self):
        student, _, targets = parts("gradient_activation")
        logits, recording = plugin.recorded(student, "student")
        assert logits is student["."]["output"]
        assert len(recording.activations) == len(LAYERS)
        teacher, model = models()
        images, _ = batch()
        logits, recording = plugin.recorded(io(model, plugin.recorder(LAYERS), images), "student")
        (maps, _) = recording.maps(logits, targets, create_graph=True)
        maps.square().mean().backward()
        assert model.conv1[0].weight.grad.norm() > 0
        assert teacher.conv1[0].weight.grad is None

    def test_its_errors_name_the_loss_and_the_key_to_set(self):
        teacher, _ = models()
        images, _ = batch()
        with pytest.raises(ValueError, match=r"^MyLoss: .*train\.teacher\.forward_proc"):
            plugin.recorded({".": {"output": teacher(images)}}, "teacher", "MyLoss")
        with pytest.raises(ValueError, match=r"^recorded: expected a student model, got none"):
            plugin.recorded({}, "student")
