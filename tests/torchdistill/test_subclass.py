"""Losses of subclasses inside torchdistill, and their derivative to the student's weights."""

import pytest
import torch
from torch import nn
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT, get_high_level_loss

from kd_lrp_plugin import losses, record
from kd_lrp_plugin import torchdistill as plugin
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.data.subclasses import Subclasses

KEYS = ("SubclassKDLoss", "SubclassCrossEntropyLoss", "SubclassAuxiliaryLoss")


@pytest.fixture(scope="module")
def data() -> Subclasses:
    """Four classes of two subclasses each."""
    return Subclasses(Phantom("train", size=4), per_class=2)


class Net(nn.Module):
    def __init__(self, seed: int, outputs: int = 8) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Softplus(), nn.Conv2d(4, 6, 3))
        self.head = nn.Linear(6, outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images).mean((2, 3)))


def make_criterion(data: Subclasses) -> nn.Module:
    terms = {
        "kl": {"key": "SubclassKDLoss", "kwargs": {"temperature": 2.0, "distance_weights": True}},
        "ce": {"key": "SubclassCrossEntropyLoss", "kwargs": {"dataset": data}},
        "aux": {"key": "SubclassAuxiliaryLoss", "kwargs": {"temperature": 0.5}},
        "maps": {"key": "LRPSemanticCosineLoss", "kwargs": {"target": "class", "dataset": data}},
    }
    sub_terms = {name: {"criterion": entry, "weight": 0.7} for name, entry in terms.items()}
    return get_high_level_loss({"key": "WeightedSumLoss", "kwargs": {"sub_terms": sub_terms}})


def compute(criterion: nn.Module, student: nn.Module, teacher: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(4, 1, 9, 9, generator=generator, dtype=torch.float64)
    targets = torch.tensor([0, 11, 7, 8])  # two of which no more than the class is known
    parts = {}
    for role, model in {"student": student, "teacher": teacher}.items():
        with record(model, ["body.2"]) as recording:
            output = model(images)
        output._kd_lrp_recording = recording
        parts[role] = {".": {"output": output}}
    return criterion(parts, {}, targets)


def test_the_whole_loss_has_the_derivative_that_finite_differences_find(data):
    student, teacher = Net(1).double(), Net(2).double().requires_grad_(False).eval()
    criterion = make_criterion(data)
    compute(criterion, student, teacher).backward()
    for parameter in student.parameters():
        flat = parameter.data.view(-1)
        for index in range(0, len(flat), max(1, len(flat) // 4)):
            values, before = [], flat[index].item()
            for step in (1e-5, -1e-5):
                flat[index] = before + step
                values.append(compute(criterion, student, teacher).item())
            flat[index] = before
            found = parameter.grad.view(-1)[index].item()
            assert found == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-8)


def test_each_term_is_its_function(data):
    student, teacher = torch.randn(2, 5, 8)
    parts = ({".": {"output": student}}, {".": {"output": teacher}})
    targets = torch.tensor([0, 11, 7, 8, 3])
    made = {key: MIDDLE_LEVEL_LOSS_DICT[key] for key in KEYS}
    assert torch.equal(
        made["SubclassKDLoss"](temperature=3.0, distance_weights=True)(*parts, targets),
        losses.subclass_kl(student, teacher, 3.0, True),
    )
    assert torch.equal(
        made["SubclassKDLoss"]()(*parts, targets), losses.kl_divergence(student, teacher)
    )
    assert torch.equal(
        made["SubclassCrossEntropyLoss"](dataset=data)(parts[0], {}, targets),
        losses.subclass_cross_entropy(student, targets, [0, 0, 1, 1, 2, 2, 3, 3]),
    )
    assert torch.equal(
        made["SubclassAuxiliaryLoss"](temperature=2.0)(parts[0], {}, targets),
        losses.subclass_auxiliary(student, 2.0),
    )


@pytest.mark.parametrize("targets", [[0, 11, 7, 8], [1, 7, 6, 0]])  # of one and the same classes
def test_the_map_of_a_class_is_the_sum_of_its_subclasses(data, targets):
    model = Net(1).double()
    images = torch.randn(4, 1, 9, 9, dtype=torch.float64)
    loss = plugin.RecordedLoss("LRPSemanticL2Loss", "class", signed=True, dataset=data)
    parts = {}
    for role, net in {"student": model, "teacher": Net(2).double()}.items():
        with record(net, ["body.2"]) as recording:
            output = net(images)
        output._kd_lrp_recording = recording
        parts[role] = {".": {"output": output}}
        parts[f"{role} maps"] = sum(
            recording.maps(output, 2 * torch.tensor([0, 3, 3, 0]) + number, signed=True)[0]
            for number in (0, 1)
        )
    found = loss(parts["student"], parts["teacher"], torch.tensor(targets))
    expected = (parts["student maps"] - parts["teacher maps"]).square().sum() / 4
    torch.testing.assert_close(found, expected)


def test_soft_labels_explain_a_mixture_of_classes(data):
    loss = plugin.RecordedLoss("LRPSemanticL2Loss", "class", dataset=data)
    soft = torch.tensor([[0.5, 0.1, 0.0, 0.0, 0.0, 0.0, 0.4, 0.0]])
    expected = torch.tensor([[0.6, 0.6, 0.0, 0.0, 0.0, 0.0, 0.4, 0.4]])
    torch.testing.assert_close(loss._mark_subclasses(soft), expected)


def test_autocast_does_not_round_the_products():
    logits = torch.randn(6, 8)
    loss, parts = plugin.SubclassAuxiliaryLoss(), {".": {"output": logits}}
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(parts, {}, torch.zeros(6))
    assert torch.equal(found, losses.subclass_auxiliary(logits))


class TestRefusals:
    def test_data_that_are_labelled_by_classes(self):
        with pytest.raises(ValueError, match="images labelled by subclass, got Phantom"):
            plugin.SubclassCrossEntropyLoss(Phantom("train", size=4))

    def test_a_map_of_a_class_without_subclasses(self, data):
        key = "LRPSemanticCosineLoss"
        for kwargs in (
            {"target": "class"},
            {"target": "class", "dataset": Phantom("train", size=4)},
            {"target": "label", "dataset": data},
            {"dataset": Phantom("train", size=4)},
        ):
            with pytest.raises(ValueError, match=f"{key}: expected target: class and a dataset"):
                MIDDLE_LEVEL_LOSS_DICT[key](**kwargs)
        with pytest.raises(ValueError, match="no target"):
            plugin.RecordedLoss("RelationL2Loss", "class", dataset=data)

    def test_no_teacher(self):
        with pytest.raises(ValueError, match="a teacher model"):
            plugin.SubclassKDLoss()({".": {"output": torch.zeros(2, 8)}}, {}, torch.zeros(2))

    def test_a_teacher_of_other_subclasses(self):
        parts = [{".": {"output": torch.zeros(2, n)}} for n in (8, 6)]
        with pytest.raises(ValueError, match="same number of classes"):
            plugin.SubclassKDLoss()(*parts, torch.zeros(2))

    def test_a_switch_that_is_text(self):
        with pytest.raises(ValueError, match="distance_weights: expected True or False"):
            plugin.SubclassKDLoss(distance_weights="yes")

    @pytest.mark.parametrize("key", KEYS)
    def test_a_misspelled_keyword(self, key):
        with pytest.raises(ValueError, match=f"{key}: keyword"):
            MIDDLE_LEVEL_LOSS_DICT[key](temperatur=1.0)
