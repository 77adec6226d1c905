"""Each score against an independent reference: loops, autograd, explicit matrices, in float64."""

import math

import pytest
import reference_losses
import torch
from torch import nn
from torch.nn import functional

from kd_lrp_plugin.losses import resize_maps
from kd_lrp_plugin.metrics.efficiency import count_macs, count_parameters
from kd_lrp_plugin.models.factory import build_model
from kd_lrp_plugin.models.mobilenetv2 import MobileNetV2
from kd_lrp_plugin.selection.scores.observation import Observation, last_map
from kd_lrp_plugin.selection.scores.registry import SCORES, normal_init


class Small(nn.Module):
    """A network whose last map feeds a linear classifier by pooling."""

    def __init__(self, channels: int = 6, classes: int = 3, stride: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(5)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(5, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = nn.ReLU()
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        x = self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))
        return self.fc(self.global_pool(x).flatten(1))


@pytest.fixture
def batch():
    return torch.randn(5, 3, 8, 8).double(), torch.tensor([0, 1, 2, 1, 0])


def observe(model: nn.Module, batch, **kwargs) -> Observation:
    return Observation(model.double(), *batch, layers=("act2",), **kwargs)


def score(name: str, student: Observation, teacher: Observation) -> float:
    return SCORES[name].function(student, teacher)


def features(model: nn.Module, images):
    model.train()
    return model.act2(model.bn2(model.conv2(model.act1(model.bn1(model.conv1(images))))))


@pytest.mark.parametrize("stride", [2, 1])
def test_semantic_and_relation_scores_are_the_losses_of_the_layer(stride, batch):
    """With maps of one size and of two; only the cosine has to make them equal."""
    student, teacher = Small(), Small(7, stride=stride)
    observed = observe(student, batch), observe(teacher, batch)
    images, targets = batch
    cams, relevances, activations = [], [], []
    for model in (student, teacher):
        x = features(model, images).detach().requires_grad_()
        picked = model.fc(x.mean((2, 3))).gather(1, targets[:, None]).sum()
        (gradient,) = torch.autograd.grad(picked, x)
        weights = gradient.mean((2, 3), keepdim=True)
        cams.append((weights * x).sum(1).detach())
        relevances.append((gradient * x).sum(1).clamp(min=0).detach())
        activations.append(x.detach())
    assert (cams[0].shape == cams[1].shape) is (stride == 2)
    resized = relevances[0], resize_maps(relevances[1], (4, 4))
    expected = {
        "gradcam_l2": reference_losses.matrix_l2(*cams),
        "lrp_cosine": reference_losses.semantic_cosine(*resized),
        "relation_l2": reference_losses.matrix_l2(*activations),
        "relation_cosine": reference_losses.matrix_cosine(*activations),
    }
    expected["diswot"] = expected["gradcam_l2"] + expected["relation_l2"]
    expected["diswot_lrp_cosine"] = expected["lrp_cosine"] + expected["relation_cosine"]
    for name, value in expected.items():
        assert score(name, *observed) == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize("train_mode", [True, False])
@pytest.mark.parametrize(("method", "pooled"), [("gradient_activation", False), ("grad_cam", True)])
def test_maps_of_an_inner_layer_are_its_gradients(train_mode, method, pooled, batch, untouched):
    model = Small().double().train()
    model(batch[0])  # statistics of its own, as a trained one has
    observed = Observation(model, *batch, ("act1",), train_mode)
    with untouched(model):
        (found,) = observed.maps(method, signed=True)
    x = model.train(train_mode).act1(model.bn1(model.conv1(batch[0]))).detach().requires_grad_()
    norm = model.bn2
    y = model.conv2(x)
    mean, variance = norm.running_mean, norm.running_var
    if train_mode:  # constants of the batch: no relevance flows through them
        mean, variance = y.mean((0, 2, 3)).detach(), y.var((0, 2, 3), unbiased=False).detach()
    scaled = (y - mean.view(-1, 1, 1)) / (variance + norm.eps).sqrt().view(-1, 1, 1)
    scaled = scaled * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    logits = model.fc(scaled.relu().mean((2, 3)))
    (gradient,) = torch.autograd.grad(logits.gather(1, batch[1][:, None]).sum(), x)
    factors = gradient.mean((2, 3), keepdim=True) if pooled else gradient
    assert torch.allclose(found, (factors * x).sum(1), rtol=1e-9)


def test_the_reference_formula_is_that_of_its_matrices(batch):
    """Channel Gram matrices of the classifier's gradient by autograd, made and normalised."""
    images, targets = batch
    models = [normal_init(Small()), normal_init(Small())]
    observed = [observe(model, batch) for model in models]
    grams, relations = [], []
    for model in models:
        x = features(model, images)
        loss = functional.cross_entropy(model.fc(x.mean((2, 3))), targets)
        (gradient,) = torch.autograd.grad(loss, model.fc.weight)
        outer = gradient[:, :, None] * gradient[:, None, :]
        grams.append(functional.normalize(outer, dim=2))
        flat = x.detach().flatten(1)
        relations.append(functional.normalize(flat @ flat.T))
    classes, channels = 3, 6
    semantic = (grams[0] - grams[1]).square().sum() / (classes * channels)
    relation = (relations[0] - relations[1]).square().sum() / 25
    assert score("reference_semantic", *observed) == pytest.approx(float(semantic), rel=1e-9)
    assert score("reference_relation", *observed) == pytest.approx(float(relation), rel=1e-9)
    total = float(semantic + relation)
    assert score("diswot_reference", *observed) == pytest.approx(total, rel=1e-9)


def test_the_reference_formula_holds_where_gradients_vanish(batch):
    """A saturated softmax leaves rows that the code's normalisation cannot stretch to length 1."""
    images, targets = batch
    models = [normal_init(Small(classes=5)), normal_init(Small(classes=5))]
    for model in models:
        with torch.no_grad():
            model.fc.weight.mul_(10)
            model.fc.bias[3:] = -50.0  # classes that no image has, and no softmax sees
    grams = []
    for model in models:
        x = features(model.double(), images)
        loss = functional.cross_entropy(model.fc(x.mean((2, 3))), targets)
        (gradient,) = torch.autograd.grad(loss, model.fc.weight)
        grams.append(functional.normalize(gradient[:, :, None] * gradient[:, None, :], dim=2))
    lengths = torch.stack(grams).norm(dim=3)
    assert ((lengths > 0) & (lengths < 0.99)).any()
    expected = (grams[0] - grams[1]).square().sum() / 30
    observed = [observe(model, batch) for model in models]
    assert score("reference_semantic", *observed) == pytest.approx(float(expected), rel=1e-9)
    unit = [gram / gram.norm(dim=2, keepdim=True) for gram in grams]
    relation = score("reference_relation", *observed)
    exact = float((unit[0] - unit[1]).square().sum() / 30) + relation
    assert score("reference_exact", *observed) == pytest.approx(exact, rel=1e-6)
    with torch.no_grad():
        for model in models:
            model.fc.bias[3:] = -1e4  # in no precision does any of this gradient remain
    observed = [observe(model, batch) for model in models]
    assert (observed[0].logits.softmax(1)[:, 3:] == 0).all()
    assert score("reference_exact", *observed) == pytest.approx(exact, rel=1e-6)


def test_the_reference_formula_names_channels_that_it_cannot_compare(batch):
    observed = observe(Small(6), batch), observe(Small(7), batch)
    with pytest.raises(ValueError, match=r"of one shape, got \(3, 6\) and \(3, 7\)"):
        score("reference_semantic", *observed)


def test_nwot_counts_rectifiers_that_agree(batch):
    model = Small()
    found = score("nwot", observe(model, batch), observe(model, batch))
    x = model.train().bn1(model.conv1(batch[0]))
    codes = torch.cat([(v > 0).flatten(1) for v in (x, model.bn2(model.conv2(x.relu())))], 1)
    kernel = torch.zeros(5, 5).double()
    for i in range(5):
        for j in range(5):
            kernel[i, j] = (codes[i] == codes[j]).sum()
    assert found == pytest.approx(-float(torch.logdet(kernel)), rel=1e-9)


def test_synflow_is_the_flow_through_positive_weights(batch):
    model = Small()
    found = score("synflow", observe(model, batch), observe(model, batch))
    # Through a linear chain of L weighted layers all of the output flows through each of them,
    # but for what a bias adds on the way.
    positive = Small().double().eval()
    positive.load_state_dict({k: v.abs() for k, v in model.state_dict().items()})
    output = positive(torch.ones(1, 3, 8, 8).double()).sum()
    output.backward()
    flow = sum((p * p.grad).sum() for p in positive.parameters())
    assert found == pytest.approx(-math.log(float(flow)), rel=1e-9)


def test_bn_log_variance_adds_up_what_the_norms_see(batch):
    model = normal_init(Small())
    torch.manual_seed(3)
    found = score("bn_log_variance", observe(model, batch), observe(model, batch))
    torch.manual_seed(3)
    first = model.train().conv1(torch.randn_like(batch[0]))
    second = model.conv2(model.bn1(first).relu())
    total = 0.0
    for x in (first, second):
        channels = [float(x[:, c].var(unbiased=False)) for c in range(x.shape[1])]
        total += 0.5 * math.log(sum(channels) / len(channels))
    assert found == pytest.approx(-total, rel=1e-9)


def test_size_and_cost_are_counts(batch):
    model = Small()
    observed = observe(model, batch)
    assert score("parameters", observed, observed) == -count_parameters(model)
    assert score("macs", observed, observed) == -count_macs(model, 8)
    wide = torch.randn(2, 3, 4, 16).double(), torch.tensor([0, 1])
    assert observe(model, wide).macs == count_macs(model, (4, 16)) == observed.macs


@pytest.mark.parametrize("name", SCORES)
def test_a_score_leaves_the_networks_as_they_are(name, batch, untouched):
    student, teacher = Small(), Small()
    observed = [observe(model, batch) for model in (student, teacher)]
    with untouched(student), untouched(teacher):
        score(name, *observed)


@pytest.mark.parametrize("name", [n for n in SCORES if SCORES[n].sees_teacher])
def test_a_student_that_is_the_teacher_has_no_distance(name, batch):
    model = Small()
    value = score(name, observe(model, batch), observe(model, batch))
    assert value == pytest.approx(0, abs=1e-6)


def test_the_teacher_runs_once_for_all_candidates(batch):
    teacher = Small()
    runs = []
    teacher.register_forward_hook(lambda *_: runs.append(1))
    observed = observe(teacher, batch)
    for _ in range(4):
        score("diswot", observe(Small(), batch), observed)
    assert len(runs) == 1


class TestObservation:
    @pytest.mark.parametrize(
        ("model", "layer"),
        [
            (build_model("test_resnet", 4), "layer4"),
            (MobileNetV2(width=0.35).build(4), "bn2"),
            (MobileNetV2(width=0.35, head="flatten_mlp").build(4, 32), "bn2"),
            (Small(), "act2"),
        ],
    )
    def test_finds_the_last_map(self, model, layer):
        assert last_map(model) == layer

    def test_draws_the_same_whenever_it_runs(self, batch):
        model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Dropout(), nn.Flatten(), nn.LazyLinear(3))
        model.double()(batch[0])

        def logits(seed: int) -> torch.Tensor:
            return Observation(model, *batch, ("0",), seed=seed).logits

        assert torch.equal(logits(1), logits(1))
        assert not torch.equal(logits(1), logits(2))

    def test_asks_for_layers_it_cannot_find(self):
        with pytest.raises(ValueError, match="Name the layers"):
            last_map(nn.Sequential(nn.Conv2d(3, 3, 1)))

    def test_needs_two_images(self, batch):
        with pytest.raises(ValueError, match="two images or more, got 1"):
            observe(Small(), (batch[0][:1], batch[1][:1]))

    def test_refuses_other_numbers_of_layers(self, batch):
        student = Observation(Small().double(), *batch, layers=("act1", "act2"))
        with pytest.raises(ValueError, match="2 of the student, 1 of the teacher"):
            score("relation_cosine", student, observe(Small(), batch))
