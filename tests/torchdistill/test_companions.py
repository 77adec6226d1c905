"""What companions add reaches the teacher and the losses, or is missed by name."""

import pytest
import torch
from recorded_batch import LAYERS, batch, models
from torch import nn
from torch.utils.data import DataLoader
from torchdistill.core.interfaces.registry import get_forward_proc_func
from torchdistill.datasets.registry import DATASET_WRAPPER_DICT, get_collate_func

from kd_lrp_plugin import record
from kd_lrp_plugin import torchdistill as plugin
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.data.shortcuts import Marked
from kd_lrp_plugin.torchdistill.high_level import DisWOTPlusLoss
from kd_lrp_plugin.torchdistill.right_reasons import RightReasonsLoss

MASKS = torch.zeros(4, 48, 48, dtype=torch.bool)
MASKS[0, 3:20, 5:31] = True
MASKS[1, 30:44, 10:15] = True
MASKS[3, 0:48, 20:21] = True
KNOWN = torch.tensor([True, True, True, False])  # the third has nothing to show
FOUND = {"mask": MASKS, "mask_known": KNOWN}


def run(model: nn.Module, procedure: str, images: torch.Tensor, supplement: object) -> dict:
    output = get_forward_proc_func(procedure)(model, images, None, supplement)
    return {".": {"output": output}}


def test_the_wrapper_has_its_name_and_refuses_other_keywords():
    assert DATASET_WRAPPER_DICT["companions"] is plugin.companions
    with pytest.raises(ValueError, match=r"companions: keyword: .*Did you mean 'clean'"):
        plugin.companions(Phantom(size=4), cleam=True)


class TestCleanView:
    def test_the_teacher_sees_the_clean_image_and_the_student_the_marked_one(self):
        teacher, student = models()
        images, targets = batch()
        marked = images + torch.linspace(0, 1, 48)
        view = plugin.recorder(LAYERS, view="clean")
        found = {"clean": images}
        of_teacher = run(teacher, view, marked, found)
        of_student = run(student, plugin.recorder(LAYERS), marked, found)
        loss = plugin.RecordedLoss("LRPRelativeL2Loss", signed=True)
        value = loss(of_student, of_teacher, targets).detach()
        maps = []
        for model, seen in ((student, marked), (teacher.eval(), images)):
            with record(model, LAYERS) as recording:
                logits = model(seen)
            maps.append(recording.maps(logits, targets, signed=True))
        torch.testing.assert_close(of_teacher["."]["output"], logits)
        pairs = zip(*maps, strict=True)
        expected = sum((s - t).square().sum() / t.square().sum() for s, t in pairs) / 2
        torch.testing.assert_close(value, expected.detach(), rtol=1e-4, atol=1e-5)

    def test_it_has_a_key_of_its_own(self):
        assert plugin.recorder(LAYERS) != plugin.recorder(LAYERS, view="clean")

    @pytest.mark.parametrize("supplement", [None, {}, FOUND])
    def test_without_a_clean_image_the_wrapper_is_named(self, supplement):
        teacher, _ = models()
        with pytest.raises(ValueError, match=r"view: clean: .*companions, kwargs: {clean: True}"):
            run(teacher, plugin.recorder(LAYERS, view="clean"), batch()[0], supplement)

    def test_a_student_that_is_trained_on_it_is_refused(self):
        _, student = models()
        images, _ = batch()
        with pytest.raises(ValueError, match="expected a frozen teacher, got one that is trained"):
            run(student, plugin.recorder(LAYERS, view="clean"), images, {"clean": images})

    def test_another_view_is_refused(self):
        with pytest.raises(ValueError, match="recorder: view: expected one of"):
            plugin.recorder(LAYERS, view="cleam")


class TestCompanion:
    @pytest.mark.parametrize("procedure", ["forward_with_companions", plugin.recorder(LAYERS)])
    def test_a_loss_finds_it_by_either_procedure(self, procedure):
        _, student = models()
        parts = run(student, procedure, batch()[0], FOUND | {"group_name": ["a"] * 4})
        assert torch.equal(plugin.companion(parts, "mask"), MASKS)
        assert plugin.companion(parts, "group_name") == ["a"] * 4

    def test_the_procedure_changes_nothing_else(self):
        _, student = models()
        images, _ = batch()
        student.eval()
        found = run(student, "forward_with_companions", images, FOUND)["."]["output"]
        assert torch.equal(found, student(images))

    @pytest.mark.parametrize("procedure", ["forward_batch_only", "forward_with_companions"])
    def test_what_is_not_handed_on_names_wrapper_and_procedure(self, procedure):
        _, student = models()
        parts = run(student, procedure, batch()[0], {})
        with pytest.raises(ValueError, match=r"Own: .*'mask_known'.*{mask: True}.*forward_with_"):
            plugin.companion(parts, "mask_known", "Own")


def test_mixup_refuses_images_that_have_companions():
    images = plugin.companions(Marked(Phantom("train", size=4, image_size=48)), clean=True)
    collate = get_collate_func(plugin.mixup(4))
    with pytest.raises(ValueError, match=r"images without companions, got \['clean'\]"):
        next(iter(DataLoader(images, batch_size=4, collate_fn=collate)))


# --- right for the right reasons ------------------------------------------------------------------


def reference(maps: list[torch.Tensor]) -> float:
    """Means of shares, pixel by pixel: of the first two images, whose masks are known and seen."""
    layers = []
    for per_layer in maps:
        shares = []
        for index in (0, 1):
            relevance = per_layer[index].double().tolist()
            step = 48 // len(relevance)
            outside = total = 0.0
            for i, row in enumerate(relevance):
                for j, value in enumerate(row):
                    cell = MASKS[index, i * step : (i + 1) * step, j * step : (j + 1) * step]
                    outside += (1 - int(cell.sum()) / step**2) * value**2
                    total += value**2
            shares.append(outside / total)
        layers.append(sum(shares) / 2)
    return sum(layers) / len(layers)


class TestRightReasons:
    @pytest.mark.parametrize("method", ["gradient_activation", "lrp_zplus", "grad_cam"])
    @pytest.mark.parametrize("target", ["label", "contrast", "teacher"])
    def test_is_the_share_outside_by_loops(self, method, target):
        teacher, student = models()
        images, targets = batch()
        parts = run(student, plugin.recorder(LAYERS, method), images, FOUND)
        of_teacher = run(teacher.eval(), "forward_batch_only", images, FOUND)
        value = RightReasonsLoss(target)(parts, of_teacher, targets)
        logits, recording = plugin.recorded(parts, "student")
        weights = {
            "label": targets,
            "contrast": torch.full((4, 4), -1 / 3).fill_diagonal_(1.0),
            "teacher": of_teacher["."]["output"].argmax(1),
        }[target]
        expected = reference(recording.maps(logits, weights, signed=True))
        assert float(value.detach()) == pytest.approx(expected, rel=1e-4)
        assert 0 < expected < 1

    def test_validation_gives_the_same_without_a_graph_and_every_nth_is_for_training(self):
        _, student = models()
        images, targets = batch()
        parts = run(student, plugin.recorder(LAYERS), images, FOUND)
        loss = RightReasonsLoss(every=2)
        values = [loss(parts, {}, targets) for _ in range(3)]
        assert [bool(value) for value in values] == [True, False, True]
        with torch.no_grad():
            for _ in range(3):
                found = loss(parts, {}, targets)
                assert loss.computed
                torch.testing.assert_close(found, values[0].detach())
        assert not found.requires_grad
        loss.reset()
        assert bool(loss(parts, {}, targets))

    def test_a_batch_without_a_mask_counts_as_zero_with_a_backward_pass(self):
        _, student = models()
        images, targets = batch()
        nothing = {"mask": MASKS, "mask_known": torch.tensor([False, False, True, False])}
        parts = run(student, plugin.recorder(LAYERS), images, nothing)
        loss = RightReasonsLoss()
        value = loss(parts, {}, targets)
        assert (float(value.detach()), loss.computed) == (0, False)
        (gradient,) = torch.autograd.grad(value, parts["."]["output"])
        assert not gradient.any()

    def test_its_derivative_is_that_of_finite_differences_over_the_weights(self):
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Conv2d(3, 4, 3, 2, 1), nn.Softplus(), nn.Conv2d(4, 5, 3, 2, 1), nn.Softplus()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)),
        ).double()
        images, targets = batch()
        procedure = plugin.recorder(["0", "2"])
        criterion = DisWOTPlusLoss(0.2, 0, 0.8, 0, semantic={"key": "RightReasonsLoss"})

        def value() -> torch.Tensor:
            parts = {"student": run(net, procedure, images.double(), FOUND), "teacher": {}}
            return criterion(parts, {}, targets)

        value().backward()
        assert set(criterion.terms) == {"ce", "semantic"}
        for weight in (net[0].weight, net[2].weight, net[6].weight):
            for index in (0, weight.numel() // 2, weight.numel() - 1):
                with torch.no_grad():
                    flat, kept, found = weight.view(-1), float(weight.view(-1)[index]), []
                    for step in (1e-5, -1e-5):
                        flat[index] = kept + step
                        found.append(float(value()))
                    flat[index] = kept
                numeric = (found[0] - found[1]) / 2e-5
                exact = float(weight.grad.view(-1)[index])
                assert exact == pytest.approx(numeric, rel=1e-5, abs=1e-9)
                assert exact != 0

    def test_a_map_without_relevance_is_counted_once_for_each_layer(self):
        _, student = models()
        images, targets = batch()
        nn.init.zeros_(student.fc.weight)
        parts = run(student, plugin.recorder(LAYERS), images, FOUND)
        loss = RightReasonsLoss()
        assert float(loss(parts, {}, targets).detach()) == 1
        assert float(loss.zero_maps) == 4  # two images, two layers

    @pytest.mark.parametrize(
        ("keywords", "words"),
        [
            ({"target": "lable"}, "RightReasonsLoss: target: expected one of"),
            ({"every": 0}, "every: expected an integer of 1 or more"),
        ],
    )
    def test_refuses_what_it_does_not_know(self, keywords, words):
        with pytest.raises(ValueError, match=words):
            RightReasonsLoss(**keywords)

    def test_a_teacher_is_missed_by_name(self):
        _, student = models()
        images, targets = batch()
        parts = run(student, plugin.recorder(LAYERS), images, FOUND)
        with pytest.raises(ValueError, match=r"teacher model, got none. Give models.teacher_model"):
            RightReasonsLoss("teacher")(parts, {}, targets)

    def test_labels_outside_of_the_head_are_named(self):
        _, student = models()
        parts = run(student, plugin.recorder(LAYERS), batch()[0], FOUND)
        with pytest.raises(ValueError, match=r"RightReasonsLoss: expected labels in \[0, 4\)"):
            RightReasonsLoss()(parts, {}, torch.tensor([0, 1, 2, 4]))
