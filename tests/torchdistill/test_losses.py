"""The plug-in, inside torchdistill's own boxes and stock losses."""

import copy

import pytest
import torch
from recorded_batch import LAYERS, batch, get_method, io, models
from torch import Tensor, nn
from torch.utils.data import RandomSampler, SequentialSampler
from torchdistill.core.distillation import get_distillation_box
from torchdistill.datasets.registry import DATASET_DICT
from torchdistill.losses.registry import HIGH_LEVEL_LOSS_DICT, MIDDLE_LEVEL_LOSS_DICT
from torchdistill.models.registry import MODEL_DICT

from kd_lrp_plugin import losses, record
from kd_lrp_plugin import torchdistill as plugin
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.models.factory import build_model

LRP = ("LRPSemanticCosineLoss", "LRPSemanticL2Loss", "LRPRelativeL2Loss")
SEMANTIC = (*LRP, "GradCAML2Loss", "GradCAMCosineLoss")


def test_every_key_is_registered():
    of_the_student = {"RightReasonsLoss", "GroupDROLoss", "SubclassCrossEntropyLoss"}
    assert set(plugin.COMPARISONS) | of_the_student <= set(MIDDLE_LEVEL_LOSS_DICT)
    assert "DisWOTPlusLoss" in HIGH_LEVEL_LOSS_DICT
    assert "timm_model" in MODEL_DICT
    assert {"phantom", "folder_images", "csv_images", "mnist", "marked", "subclasses"} <= set(
        DATASET_DICT
    )


@pytest.mark.parametrize("key", sorted(plugin.COMPARISONS))
def test_a_mid_level_loss_is_the_mean_of_its_distance_over_the_layers(key):
    teacher, student = models()
    images, targets = batch()
    procedure = plugin.recorder(LAYERS, get_method(key))
    value = MIDDLE_LEVEL_LOSS_DICT[key]()(
        io(student, procedure, images), io(teacher, procedure, images), targets
    )
    comparison = plugin.COMPARISONS[key]
    recorded = []
    for model in (student, teacher.eval()):
        with record(model, LAYERS, get_method(key)) as recording:
            logits = model(images)
        if comparison.methods is None:
            recorded.append(recording.activations)
        else:
            recorded.append(recording.maps(logits, targets, signed=comparison.signed))
    expected = sum(comparison.distance(s, t) for s, t in zip(*recorded, strict=True)) / 2
    torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-4, atol=1e-5)
    value.backward()
    assert student.conv1[0].weight.grad.norm() > 0


def test_maps_of_another_size_are_resized_to_the_students():
    teacher, student = models()
    images, targets = batch()
    of_teacher = io(teacher, plugin.recorder(["layer1"], "lrp_zplus"), images)
    of_student = io(student, plugin.recorder(["layer3"], "lrp_zplus"), images)
    assert 0 <= plugin.RecordedLoss("LRPSemanticCosineLoss")(of_student, of_teacher, targets) <= 2


def test_target_teacher_explains_its_first_choice():
    teacher, student = models()
    images, _ = batch()
    procedure = plugin.recorder(LAYERS, "lrp_zplus")
    of_student, of_teacher = io(student, procedure, images), io(teacher, procedure, images)
    choice = of_teacher["."]["output"].argmax(1)
    loss = plugin.RecordedLoss("LRPSemanticCosineLoss", target="teacher")
    by_label = plugin.RecordedLoss("LRPSemanticCosineLoss")
    wrong = (choice + 1) % 4
    torch.testing.assert_close(
        loss(of_student, of_teacher, wrong), by_label(of_student, of_teacher, choice)
    )


def test_target_contrast_explains_the_label_minus_the_mean_of_the_others():
    teacher, student = models()
    images, targets = batch()
    of_student, of_teacher = (io(m, plugin.recorder(LAYERS), images) for m in (student, teacher))
    loss = plugin.RecordedLoss("LRPRelativeL2Loss", target="contrast", signed=True)
    value = loss(of_student, of_teacher, targets).detach()
    maps = []
    for parts in (of_student, of_teacher):
        logits, recording = plugin.recorded(parts, "student")
        per_class = [recording.maps(logits, torch.full((4,), c), signed=True) for c in range(4)]
        maps.append([])
        for layer in range(2):
            stacked = torch.stack([maps_of_class[layer] for maps_of_class in per_class], 1)
            for_label = [
                stacked[i, label] - stacked[i, [c for c in range(4) if c != label]].mean(0)
                for i, label in enumerate(targets.tolist())
            ]
            maps[-1].append(torch.stack(for_label).detach())
    expected = [(s - t).square().sum() / t.square().sum() for s, t in zip(*maps, strict=True)]
    torch.testing.assert_close(value, sum(expected) / 2, rtol=1e-4, atol=1e-5)
    soft = nn.functional.one_hot(targets, 4).float()
    torch.testing.assert_close(loss(of_student, of_teacher, soft).detach(), value)


@pytest.mark.parametrize("key", LRP)
@pytest.mark.parametrize("signed", [False, True])
def test_signed_is_a_choice_of_the_losses_of_relevance(key, signed):
    teacher, student = models()
    images, targets = batch()
    parts = [io(model, plugin.recorder(LAYERS), images) for model in (student, teacher)]
    value = MIDDLE_LEVEL_LOSS_DICT[key](signed=signed)(*parts, targets).detach()
    maps = []
    for role in parts:
        logits, recording = plugin.recorded(role, "student")
        maps.append(recording.maps(logits, targets, signed=signed))
    distance = plugin.COMPARISONS[key].distance
    expected = sum(distance(s, t) for s, t in zip(*maps, strict=True)) / 2
    torch.testing.assert_close(value, expected.detach(), rtol=1e-4, atol=1e-5)
    if not signed:
        assert MIDDLE_LEVEL_LOSS_DICT[key]()(*parts, targets) == value


@pytest.mark.parametrize("method", ["gradient_activation", "grad_cam"])
def test_signed_maps_of_a_net_without_biases_sum_to_what_they_explain(method):
    """So a distance between them with sign and size distils logits, position by position."""
    torch.manual_seed(1)
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 5, 3, 2, bias=False), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(5, 8, 3, bias=False), nn.LeakyReLU(0.2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4, bias=False)),
    ).double()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    # Grad-CAM averages a channel's factor, which is exact only where it is constant: at the end.
    layers = ["6"] if method == "grad_cam" else ["0", "1", "2", "5", "6"]
    with record(net, layers, method) as recording:
        logits = net(images)
    labels = torch.tensor([0, 1, 2, 3])
    weights = torch.full((4, 4), -1 / 3, dtype=torch.float64).fill_diagonal_(1)
    own = logits.gather(1, labels[:, None])[:, 0]
    contrast = own - (logits.sum(1) - own) / 3
    for targets, explained in ((labels, own), (weights, contrast)):
        for map_ in recording.maps(logits, targets, signed=True):
            torch.testing.assert_close(map_.sum((1, 2)), explained, rtol=1e-9, atol=1e-12)


def test_a_resized_map_keeps_its_total_where_the_distance_sees_it():
    """A teacher whose maps have twice the size spreads its relevance over four times the pixels."""
    small = torch.rand(4, 3, 3)
    loss = plugin.RecordedLoss("LRPRelativeL2Loss", signed=True)
    large = torch.nn.functional.interpolate(small[:, None], scale_factor=2)[:, 0] / 4
    # 2 x 2 pixels of one value each, brought back to one: antialiasing mixes in the neighbours.
    flat = torch.full((4, 6, 6), 1 / 36)
    assert loss._distance(torch.full((4, 3, 3), 1 / 9), flat) == pytest.approx(0, abs=1e-12)
    assert loss._distance(small, large) < 0.1


class TestOptionsOfRelevance:
    @pytest.mark.parametrize("key", sorted(set(plugin.COMPARISONS) - set(LRP)))
    def test_signed_says_nothing_elsewhere_and_is_refused(self, key):
        with pytest.raises(ValueError, match=f"{key}: keyword: expected .*'signed'"):
            MIDDLE_LEVEL_LOSS_DICT[key](signed=True)
        with pytest.raises(ValueError, match=f"{key}: expected no signed"):
            plugin.RecordedLoss(key, signed=True)

    @pytest.mark.parametrize("key", ["RelationCosineLoss", "RelationL2Loss"])
    def test_a_target_says_nothing_of_features_and_is_refused(self, key):
        with pytest.raises(ValueError, match=f"{key}: keyword: expected .*'target'"):
            MIDDLE_LEVEL_LOSS_DICT[key](target="contrast")
        with pytest.raises(ValueError, match=f"{key}: expected no target"):
            plugin.RecordedLoss(key, target="teacher")

    @pytest.mark.parametrize("signed", [1, "True", 0.0])
    def test_signed_is_true_or_false(self, signed):
        with pytest.raises(ValueError, match="signed: expected True or False"):
            MIDDLE_LEVEL_LOSS_DICT["LRPRelativeL2Loss"](signed=signed)

    def test_an_unknown_target_is_named(self):
        with pytest.raises(ValueError, match="Did you mean 'contrast'"):
            MIDDLE_LEVEL_LOSS_DICT["LRPRelativeL2Loss"](target="contrasts")

    def test_contrast_of_labels_outside_the_head_is_refused(self):
        teacher, student = models()
        images, _ = batch()
        parts = [io(model, plugin.recorder(LAYERS), images) for model in (student, teacher)]
        loss = plugin.RecordedLoss("LRPSemanticL2Loss", target="contrast")
        with pytest.raises(ValueError, match=r"labels in \[0, 4\)"):
            loss(*parts, torch.tensor([0, 1, 2, 4]))

    def test_contrast_of_one_output_is_refused(self):
        images, _ = batch()
        nets = [nn.Sequential(nn.Conv2d(3, 2, 3), nn.AvgPool2d(46), nn.Flatten(), nn.Linear(2, 1))]
        parts = [io(net, plugin.recorder(["0"]), images) for net in nets * 2]
        loss = plugin.RecordedLoss("LRPSemanticL2Loss", target="contrast")
        with pytest.raises(ValueError, match=r"two logits or more, got \(4, 1\)"):
            loss(*parts, torch.zeros(4, dtype=torch.long))


class Plain(nn.Module):
    """A piecewise-linear network that keeps what its layers make."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, bias=bias)
        self.second = nn.Conv2d(5, 6, 3, bias=bias)
        self.head = nn.Linear(6 * 6 * 6, 4, bias=bias)
        self.made: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        first = self.first(images)
        second = self.second(torch.relu(first))
        logits = self.head(torch.relu(nn.functional.max_pool2d(second, 2)).flatten(1))
        self.made = [second, logits]
        return logits


@pytest.mark.parametrize("bias", [False, True])
def test_signed_maps_share_out_the_logit_but_for_what_biases_add(bias):
    """So that matching them with sign and size is distilling the logits, place by place."""
    torch.manual_seed(0)
    net, images = Plain(bias).double(), torch.rand(3, 3, 16, 16, dtype=torch.float64)
    targets = torch.tensor([0, 3, 1])
    weights = torch.full((3, 4), -1 / 3, dtype=torch.float64)
    weights[range(3), targets] = 1  # the label minus the mean of the others
    for asked, scores in ((targets, None), (weights, weights)):
        with record(net, ["first"]) as recording:
            logits = net(images)
        (maps,) = recording.maps(logits, asked, signed=True)
        if scores is None:
            scores = nn.functional.one_hot(targets, 4).double()
        of_each = (net(images) * scores).sum(1)
        second, last = torch.autograd.grad(of_each.sum(), net.made)
        added = torch.zeros(3, dtype=torch.float64)
        if bias:
            added = (second.sum((2, 3)) * net.second.bias).sum(1) + (last * net.head.bias).sum(1)
            assert (added.abs() > 1e-3).all()
        torch.testing.assert_close(maps.sum((1, 2)) + added, of_each, rtol=1e-10, atol=1e-12)


def test_a_frozen_teacher_does_not_drift_under_stock_losses():
    teacher, student = models()
    data = Phantom("train", size=16, image_size=48)

    key = plugin.recorder(LAYERS)
    loader = {"dataset_id": "phantom", "sampler": {"class_or_func": RandomSampler}}
    path = {"student_module_path": ".", "student_module_io": "output"}
    path |= {"teacher_module_path": ".", "teacher_module_io": "output"}
    config = {
        "num_epochs": 1,
        "train_data_loader": loader | {"kwargs": {"batch_size": 8}},
        "val_data_loader": {
            "dataset_id": "phantom",
            "sampler": {"class_or_func": SequentialSampler},
            "kwargs": {"batch_size": 8},
        },
        "teacher": {"forward_proc": key, "requires_grad": False},
        "student": {"forward_proc": key},
        "optimizer": {"key": "Adam", "kwargs": {"lr": 0.001}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {
                    "kd": {
                        "criterion": {
                            "key": "KDLoss",
                            "kwargs": path | {"temperature": 4.0, "alpha": 0.5},
                        },
                        "weight": 1.0,
                    },
                    "semantic": {
                        "criterion": {"key": "LRPSemanticCosineLoss", "kwargs": {}},
                        "weight": 1.0,
                    },
                }
            },
        },
    }
    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    weights = student.conv1[0].weight.detach().clone()
    box = get_distillation_box(
        teacher, student, {"phantom": data}, config, torch.device("cpu"), None, False, 1
    )
    box.pre_epoch_process(epoch=0)
    for images, targets, supplement in box.train_data_loader:
        box.post_forward_process(loss=box.forward_process(images, targets, supplement))
    after = teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not torch.equal(student.conv1[0].weight, weights)
    assert not any(module._forward_hooks for module in student.modules())


class TestDisWOTPlus:
    def io(self, method: str = "lrp_zplus") -> tuple[dict, torch.Tensor]:
        teacher, student = models()
        images, targets = batch()
        key = plugin.recorder(LAYERS, method)
        return {"student": io(student, key, images), "teacher": io(teacher, key, images)}, targets

    def test_is_the_weighted_sum_of_its_terms(self):
        io_dict, targets = self.io()
        loss = plugin.DisWOTPlusLoss(0.3, 0.3, 0.25, 0.15, temperature=3.0)
        total = loss(io_dict, {}, targets)
        student, teacher = (io_dict[role]["."]["output"] for role in ("student", "teacher"))
        semantic = plugin.RecordedLoss("LRPSemanticCosineLoss")
        relation = plugin.RecordedLoss("RelationCosineLoss")
        parts = io_dict["student"], io_dict["teacher"], targets
        expected = (
            0.3 * nn.functional.cross_entropy(student, targets)
            + 0.3 * losses.kl_divergence(student, teacher, 3.0)
            + 0.25 * semantic(*parts)
            + 0.15 * relation(*parts)
        )
        torch.testing.assert_close(total, expected)
        assert set(loss.terms) == {"ce", "kl", "semantic", "relation"}
        assert not any(value.requires_grad for value in loss.terms.values())

    def test_keeps_its_terms_in_validation_too(self):
        io_dict, targets = self.io()
        loss = plugin.DisWOTPlusLoss()
        trained = loss(io_dict, {}, targets).detach()
        with torch.no_grad():
            validated = loss(io_dict, {}, targets)
        torch.testing.assert_close(validated, trained)
        assert len(loss.terms) == 4

    def test_leaves_out_a_term_of_weight_zero(self):
        io_dict, targets = self.io()
        loss = plugin.DisWOTPlusLoss(0.5, 0.5, 0.0, 0.0)
        loss(io_dict, {}, targets)
        assert set(loss.terms) == {"ce", "kl"}

    @pytest.mark.parametrize("weights", [(0.4, 0.4, 0.1, 0.2), (1.2, -0.2, 0.0, 0.0)])
    def test_refuses_weights_that_are_not_shares_of_one(self, weights):
        with pytest.raises(ValueError, match="sum 1"):
            plugin.DisWOTPlusLoss(*weights)

    def test_names_the_term_that_is_not_finite(self):
        io_dict, targets = self.io()
        io_dict["teacher"]["."]["output"].data[0, 0] = torch.nan
        with pytest.raises(FloatingPointError, match=r"\['kl'\] not finite"):
            plugin.DisWOTPlusLoss()(io_dict, {}, targets)

    def test_names_labels_outside_the_head(self):
        io_dict, _ = self.io()
        with pytest.raises(ValueError, match=r"labels in \[0, 4\)"):
            plugin.DisWOTPlusLoss()(io_dict, {}, torch.tensor([0, 1, 2, 4]))

    def test_names_an_unknown_loss(self):
        with pytest.raises(ValueError, match="Did you mean 'GradCAML2Loss'"):
            plugin.DisWOTPlusLoss(semantic={"key": "GradCamL2Loss"})

    def test_asks_for_a_teacher(self):
        io_dict, targets = self.io()
        with pytest.raises(ValueError, match="teacher_model"):
            plugin.DisWOTPlusLoss()({"student": io_dict["student"], "teacher": {}}, {}, targets)


class TestErrors:
    def test_logits_without_a_recording_name_the_key_to_set(self):
        teacher, student = models()
        images, targets = batch()
        of_student = io(student, plugin.recorder(LAYERS), images)
        with pytest.raises(ValueError, match=r"train\.teacher\.forward_proc"):
            plugin.RecordedLoss("LRPSemanticCosineLoss")(
                of_student, {".": {"output": teacher(images)}}, targets
            )

    @pytest.mark.parametrize("key", SEMANTIC)
    def test_the_wrong_method_is_named(self, key):
        teacher, student = models()
        images, targets = batch()
        other = "lrp_zplus" if key.startswith("GradCAM") else "grad_cam"
        procedure = plugin.recorder(LAYERS, other)
        parts = io(student, procedure, images), io(teacher, procedure, images), targets
        with pytest.raises(ValueError, match=f"{key}.*{other}"):
            plugin.RecordedLoss(key)(*parts)

    @pytest.mark.parametrize("target", ["label", "teacher", "contrast"])
    @pytest.mark.parametrize("loss", ["LRPSemanticCosineLoss", "RightReasonsLoss"])
    def test_a_teacher_of_other_outputs_explains_other_classes(self, loss, target):
        _, student = models()
        teacher = build_model("test_resnet", 7).requires_grad_(False)
        images, targets = batch()
        procedure = plugin.recorder(LAYERS)
        of_student, of_teacher = io(student, procedure, images), io(teacher, procedure, images)
        shown = torch.ones(4, dtype=torch.bool)
        masks = {"mask": shown[:, None, None].expand(4, 48, 48), "mask_known": shown}
        of_student["."]["output"]._kd_lrp_companions = masks
        made = MIDDLE_LEVEL_LOSS_DICT[loss](target=target)
        if loss == "RightReasonsLoss" and target != "teacher":
            assert made(of_student, of_teacher, targets).isfinite()
            return
        words = f"{loss}: expected a teacher with the student's 4 outputs, got 7"
        with pytest.raises(ValueError, match=words):
            made(of_student, of_teacher, targets)

    def test_features_of_a_teacher_of_other_outputs_are_features(self):
        _, student = models()
        teacher = build_model("test_resnet", 7).requires_grad_(False)
        images, targets = batch()
        procedure = plugin.recorder(LAYERS)
        parts = io(student, procedure, images), io(teacher, procedure, images), targets
        assert plugin.RecordedLoss("RelationCosineLoss")(*parts).isfinite()

    def test_a_different_number_of_layers_is_named(self):
        teacher, student = models()
        images, targets = batch()
        parts = (
            io(student, plugin.recorder(LAYERS), images),
            io(teacher, plugin.recorder(["layer2"]), images),
        )
        with pytest.raises(ValueError, match="same number of layers"):
            plugin.RecordedLoss("RelationCosineLoss")(*parts, targets)

    @pytest.mark.parametrize(
        ("call", "near"),
        [
            (lambda: plugin.recorder(layer=["x"]), "layers"),
            (lambda: plugin.recorder(["x"], "lrp_zplos"), "lrp_zplus"),
            (lambda: MIDDLE_LEVEL_LOSS_DICT["GradCAML2Loss"](taget="label"), "target"),
            (lambda: HIGH_LEVEL_LOSS_DICT["DisWOTPlusLoss"](aplha=1.0), "alpha"),
            (lambda: MODEL_DICT["timm_model"](nam="resnet18", num_classes=2), "name"),
            (lambda: DATASET_DICT["phantom"](imagesize=32), "image_size"),
            (lambda: DATASET_DICT["folder_images"](rot="x"), "root"),
            (lambda: DATASET_DICT["csv_images"](scv="x"), "csv"),
            (lambda: DATASET_DICT["mnist"](sise=3), "size"),
        ],
    )
    def test_a_misspelled_word_is_answered_with_the_near_one(self, call, near):
        with pytest.raises(ValueError, match=f"Did you mean .*{near}"):
            call()


def test_zero_maps_are_counted():
    teacher, student = models()
    images, targets = batch()
    with torch.no_grad():
        student.fc.weight.zero_()
    procedure = plugin.recorder(LAYERS)
    of_student, of_teacher = io(student, procedure, images), io(teacher, procedure, images)
    loss = plugin.RecordedLoss("LRPSemanticCosineLoss")
    value = loss(of_student, of_teacher, targets)
    with record(teacher.eval(), LAYERS) as recording:
        logits = teacher(images)
    maps = recording.maps(logits, targets)
    of_the_teacher = sum(int(losses.zero_maps(m).sum()) for m in maps)
    assert float(loss.zero_maps) == 8 + of_the_teacher  # two layers of four images
    assert float(value) == pytest.approx(1.0)
    loss.reset()
    assert loss.zero_maps == 0
