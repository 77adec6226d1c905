"""Maps from a recorded forward pass: exact derivatives, known facts, clean models, refusals."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from copy import deepcopy
from functools import cache

import pytest
import timm
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam, LayerGradientXActivation
from reference import LRP, PLAIN, randomize
from timm.layers import StdConv2d
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from kd_lrp_plugin.losses import correlation_l2, relation_cosine, semantic_cosine, semantic_l2
from kd_lrp_plugin.relevance import rules
from kd_lrp_plugin.relevance.recording import record, relevance_maps

METHODS = PLAIN + LRP
Untouched = Callable[[nn.Module], AbstractContextManager[None]]


# --- models ---------------------------------------------------------------------------------------

SETTINGS: dict[str, dict] = {
    "mobilenetv2_035": {},
    "mobilenetv2_100": {"pad_type": "same"},
    "resnetv2_50": {},
    "vgg19": {"mlp_ratio": 1 / 64},  # narrows the head only, which is most of the weights
    "densenet121": {},
    "mobilenetv3_small_100": {},
    "visformer_small": {},
    "resnet18": {},
}


def build(name: str, size: int) -> nn.Module:
    """A randomly initialised timm model with four classes."""
    torch.manual_seed(1)
    extra = {"img_size": size} if name == "visformer_small" else {}
    model = timm.create_model(name, num_classes=4, **SETTINGS[name], **extra)
    if not hasattr(model, "feature_info"):  # timm before 1.0.31 does not tell those of Visformer
        stages = {"stage1": 8, "stage2": 16, "stage3": 32}
        model.feature_info = [{"module": name, "reduction": side} for name, side in stages.items()]
    return model


def batch(size: int, n: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, 3, size, size, generator=generator), torch.tensor([1, 3, 0, 2])[:n]


@cache
def calibrated(name: str) -> nn.Module:
    """float64, eval mode, running statistics of a real batch: activations of ordinary size."""
    model = build(name, 64).double().train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model(batch(64, 4)[0].double())
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


class SmallNet(nn.Module):
    """221 weights and one of everything: SiLU, depthwise, squeeze-and-excite, ReLU6,
    residual, pre-activation norm, a convolution without norm, groups, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(4)
        self.silu = nn.SiLU(inplace=True)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(4)
        self.relu6 = nn.ReLU6(inplace=True)
        self.squeeze = SqueezeExcite(4, rd_channels=2, act_layer=nn.ReLU)
        self.pointwise = nn.Conv2d(4, 4, 1, bias=False)
        self.pointwise_norm = nn.BatchNorm2d(4)
        self.middle = nn.Identity()
        self.before = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.bare = nn.Conv2d(4, 4, 1)
        self.hardswish = nn.Hardswish(inplace=True)
        self.grouped = nn.Conv2d(4, 4, (3, 1), padding=(1, 0), groups=2, bias=False)
        self.grouped_norm = nn.BatchNorm2d(4)
        self.gelu = nn.GELU()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.silu(self.stem_norm(self.stem(x)))
        y = self.squeeze(self.relu6(self.depthwise_norm(self.depthwise(x))))
        x = self.middle(x + self.pointwise_norm(self.pointwise(y)))
        y = self.hardswish(self.bare(self.relu(self.before(x))))
        y = self.gelu(self.grouped_norm(self.grouped(y)))
        return self.head(torch.cat([x, y], 1).mean((2, 3)))


def small_net(seed: int = 176) -> tuple[nn.Module, Tensor, Tensor]:
    """The net with random weights, some scales negative, and a batch for it.

    Of 1,500 seeds this one keeps farthest from every kink, and every denominator farthest from
    zero, in both modes.
    """
    net = randomize(SmallNet(), seed)
    scales = torch.cat([m.weight for m in net.modules() if isinstance(m, nn.BatchNorm2d)])
    assert (scales < 0).any()
    assert (scales > 0).any()
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(8)).double()
    return net, images, torch.tensor([0, 2, 1])


def distance_from_kinks(net: nn.Module, images: Tensor) -> float:
    """How far the values at which an activation or a stabiliser bends are from there."""
    kinks = {name: (0.0,) for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    kinks |= {"head": (0.0,), "squeeze.conv_reduce": (0.0,), "bare": (0.0, 3.0, -3.0)}
    kinks["depthwise_norm"] = (0.0, 6.0)
    distances: list[float] = []
    handles = [
        net.get_submodule(name).register_forward_hook(
            lambda _, __, y, at=at: distances.extend((y - z).abs().min().item() for z in at)
        )
        for name, at in kinks.items()
    ]
    net(images)
    for handle in handles:
        handle.remove()
    return min(distances)


# --- exact derivatives ----------------------------------------------------------------------------

TARGET_LAYERS = ["silu", "middle"]


def map_losses(maps: list[Tensor], signed: bool) -> Tensor:
    """A loss of each kind on the maps, against fixed random teacher maps."""
    generator = torch.Generator().manual_seed(9)
    total = maps[0].new_zeros(())
    for relevance in maps:
        teacher = torch.randn(relevance.shape, generator=generator).double()
        if signed:
            total = total + correlation_l2(relevance, teacher) + semantic_l2(relevance, teacher)
        else:
            total = total + semantic_cosine(relevance, teacher.relu())
    return total


def both_losses(net: nn.Module, images: Tensor, targets: Tensor, method: str) -> Tensor:
    """[on positive maps, on signed maps], without derivatives."""
    with record(net, TARGET_LAYERS, method) as recording:
        logits = net(images)
    maps = recording.maps(logits, targets, signed=True)
    positive = map_losses([m.relu() for m in maps], signed=False)
    return torch.stack([positive, map_losses(maps, signed=True)]).detach()


def directions(net: nn.Module) -> Tensor:
    """One weight of each tensor, and three of all weights at once, each of length 1."""
    generator = torch.Generator().manual_seed(10)
    sizes = [parameter.numel() for parameter in net.parameters()]
    weights = torch.eye(sum(sizes)).double()
    starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    picked = [int(torch.randint(size, (), generator=generator)) for size in sizes]
    dense = torch.randn(3, sum(sizes), generator=generator).double()
    return torch.cat([weights[starts + torch.tensor(picked)], F.normalize(dense)])


@pytest.mark.parametrize("along", ["some", pytest.param("every weight", marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_of_the_whole_chain_is_exact_for_every_weight(method, training, along):
    net, images, targets = small_net()
    net.train(training)
    # y / stab(y) bends within 1e-6 of zero: its third derivative would show beyond 1e-3.
    assert distance_from_kinks(deepcopy(net), images) > 1e-3
    analytic = []
    for signed in (False, True):
        net.zero_grad()
        with record(net, TARGET_LAYERS, method) as recording:
            logits = net(images)
        maps = recording.maps(logits, targets, create_graph=True, signed=signed)
        map_losses(maps, signed).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
        analytic.append(torch.cat([grad.flatten() for grad in grads]))
    found = parameters_to_vector(net.parameters()).detach()
    ways = directions(net) if along == "some" else torch.eye(len(found)).double()
    numeric = []
    step = 1e-7  # a small z+ denominator makes the third derivative large: the error falls as step²
    for way in ways:
        vector_to_parameters(found + step * way, net.parameters())
        above = both_losses(net, images, targets, method)
        vector_to_parameters(found - step * way, net.parameters())
        below = both_losses(net, images, targets, method)
        numeric.append((above - below) / (2 * step))
    expected = torch.stack(numeric, 1)
    for gradient, wanted in zip(analytic, expected, strict=True):
        assert wanted.norm() > 1e-3
        assert (ways @ gradient - wanted).norm() / wanted.norm() < 1e-6


# --- facts ----------------------------------------------------------------------------------------


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.cosine_similarity(a.flatten(1), b.flatten(1))


@pytest.mark.parametrize(
    ("name", "last", "earlier"),
    [("mobilenetv2_100", "bn2", "blocks.3"), ("resnetv2_50", "norm", "stages.1")],
)
def test_grad_cam_is_activation_times_gradient_at_the_last_map_only(name, last, earlier):
    model, (images, targets) = calibrated(name), batch(64)
    images = images.double()
    cam = relevance_maps(model, images, targets, [last, earlier], "grad_cam", signed=True)
    product = relevance_maps(
        model, images, targets, [last, earlier], "gradient_activation", signed=True
    )
    assert (cosines(cam[0], product[0]) > 0.9999).all()
    assert (cosines(cam[1], product[1]) < 0.98).all()


@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv2_035",
        pytest.param("resnetv2_50", marks=pytest.mark.slow),
        pytest.param("vgg19", marks=pytest.mark.slow),
        "visformer_small",
    ],
)
def test_gradient_methods_equal_captum_with_its_own_forward(name):
    model, (images, targets) = calibrated(name), batch(64)
    images = images.double()
    layers = [entry["module"] for entry in model.feature_info][1:3]
    cams = relevance_maps(model, images, targets, layers, "grad_cam", signed=True)
    products = relevance_maps(model, images, targets, layers, "gradient_activation", signed=True)
    # ReLUs behind the layer overwrite its output in place, and Captum reads it afterwards.
    plain = deepcopy(model)
    for module in plain.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    for layer, cam, product in zip(layers, cams, products, strict=True):
        module = plain.get_submodule(layer)
        expected = LayerGradCam(plain, module).attribute(images, target=targets).squeeze(1)
        torch.testing.assert_close(cam / expected.abs().max(), expected / expected.abs().max())
        expected = LayerGradientXActivation(plain, module).attribute(images, target=targets).sum(1)
        torch.testing.assert_close(product / expected.abs().max(), expected / expected.abs().max())


CONSERVING = [(name, "lrp_epsilon") for name in SETTINGS]
CONSERVING += [(name, "lrp_zplus") for name in ("mobilenetv2_035", "densenet121")]


@pytest.mark.parametrize(("name", "method"), CONSERVING)
def test_relevance_is_conserved_at_every_tap_without_biases(name, method, monkeypatch):
    # A stabiliser keeps eps / |y| of the relevance of each y. With 1e-6 that is up to 4e-4 of the
    # small logits of untrained networks (mobilenetv2_100, vgg19), and ten times less with 1e-7.
    monkeypatch.setattr(rules, "EPSILON", 1e-8)
    model = deepcopy(calibrated(name))
    for module in model.modules():
        for key in ("bias", "running_mean"):
            if getattr(module, key, None) is not None:
                getattr(module, key).data.zero_()
    for key, parameter in model.named_parameters():
        if "pos_embed" in key:
            parameter.data.zero_()
    images, targets = batch(64)
    with record(model, "auto", method) as recording:
        logits = model(images.double())
    score = logits.detach().gather(1, targets[:, None]).squeeze(1)
    assert score.abs().min() > 1e-3
    for relevance in recording.maps(logits, targets, signed=True):
        assert relevance.abs().max() > 0
        torch.testing.assert_close(relevance.sum((1, 2)), score, rtol=1e-5, atol=0)


def naive_total(model: nn.Module, layer: str, images: Tensor, targets: Tensor) -> float:
    """Batch total of activation times gradient, the gradient by plain autograd."""
    kept: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _, __, y: kept.append(y))
    score = model(images).gather(1, targets[:, None]).sum()
    handle.remove()
    (grad,) = torch.autograd.grad(score, kept[0])
    return (kept[0] * grad).sum().item()


def test_plain_gradients_through_batch_statistics_sum_to_nothing_but_relevance_does_not():
    model, (images, targets) = deepcopy(calibrated("mobilenetv2_035")).train(), batch(64, 4)
    images = images.double()
    # blocks.2 feeds a convolution with batch norm and nothing else.
    (ours,) = relevance_maps(model, images, targets, ["blocks.2"], signed=True)
    assert abs(naive_total(model, "blocks.2", images, targets)) < 1e-4 * ours.abs().sum()
    assert ours.sum().abs() > 1e-2 * ours.abs().sum()


@pytest.mark.parametrize("method", METHODS)
def test_images_of_a_batch_do_not_mix_in_eval_mode(method):
    net, images, targets = small_net()
    net.eval()
    before = relevance_maps(net, images, targets, TARGET_LAYERS, method)
    images[0] = torch.randn_like(images[0])
    after = relevance_maps(net, images, targets, TARGET_LAYERS, method)
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(old[1:], new[1:], rtol=1e-10, atol=1e-12)
        assert not torch.allclose(old[0], new[0])


@pytest.mark.parametrize("method", METHODS)
def test_in_train_mode_no_relevance_flows_through_batch_statistics(method):
    """Only image 0 has a target, so only image 0 has relevance, whatever the norms share."""
    net, images, targets = small_net()
    weights = F.one_hot(targets, 3).double() * torch.tensor([1.0, 0.0, 0.0])[:, None]
    for relevance in relevance_maps(
        net.train(), images, weights, TARGET_LAYERS, method, signed=True
    ):
        assert relevance[0].abs().max() > 0
        assert relevance[1:].abs().max() == 0


# --- targets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_one_hot_weights_are_class_indices(method):
    net, images, targets = small_net()
    by_index = relevance_maps(net, images, targets, TARGET_LAYERS, method)
    by_weight = relevance_maps(net, images, F.one_hot(targets, 3).double(), TARGET_LAYERS, method)
    for a, b in zip(by_index, by_weight, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_soft_weights_give_the_weighted_sum_of_signed_maps(method):
    net, images, _ = small_net()
    net.eval()
    weights = torch.rand(3, 3).double()
    mixed = relevance_maps(net, images, weights, TARGET_LAYERS, method, signed=True)
    expected = [torch.zeros_like(m) for m in mixed]
    for c in range(3):
        maps = relevance_maps(net, images, torch.full((3,), c), TARGET_LAYERS, method, signed=True)
        for total, part in zip(expected, maps, strict=True):
            total += weights[:, c, None, None] * part
    for a, b in zip(mixed, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


# --- one forward, any number of maps --------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_layers_costs_one_forward_pass(method):
    net, images, targets = small_net()
    calls: list[str] = []
    for name, module in net.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    with record(net, [*TARGET_LAYERS, "grouped_norm"], method) as recording:
        logits = net(images)
    recording.maps(logits, targets, create_graph=True)
    recording.maps(logits, targets)
    assert sorted(calls) == sorted(set(calls))


@pytest.mark.parametrize("method", METHODS)
def test_maps_can_be_taken_again_after_the_context_and_after_a_backward_pass(method):
    net, images, targets = small_net()
    with record(net, TARGET_LAYERS, method) as recording:
        logits = net(images)
        inside = recording.maps(logits, targets, create_graph=True)
    first = recording.maps(logits, targets, create_graph=True)
    (map_losses(first, signed=False) + logits.sum()).backward(retain_graph=True)
    second = recording.maps(logits, targets)
    for a, b, c in zip(inside, first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(a, c, rtol=0, atol=0)
        assert a.requires_grad
        assert not c.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_maps_do_not_depend_on_which_other_layers_are_tapped(method):
    net, images, targets = small_net()
    alone = relevance_maps(net, images, targets, ["silu"], method, signed=True)[0]
    for others in (["middle"], ["grouped_norm", "squeeze", "relu"], ["stem_norm"]):
        maps = relevance_maps(net, images, targets, [*others, "silu"], method, signed=True)
        torch.testing.assert_close(maps[-1], alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_tapping_a_convolution_before_its_norm_changes_no_other_map_or_is_refused(method):
    net, images, targets = small_net()
    alone = relevance_maps(net, images, targets, ["silu"], method, signed=True)[0]
    both = right_or_refused(
        lambda: relevance_maps(net, images, targets, ["silu", "pointwise"], method, signed=True)[0],
        naming="pointwise",
    )
    if both is not None:
        torch.testing.assert_close(both, alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("method", METHODS)
def test_recording_changes_neither_logits_nor_gradients_nor_running_statistics(method, training):
    net, images, targets = small_net()
    net.train(training)
    plain = deepcopy(net)
    F.cross_entropy(plain(images), targets).backward()
    with record(net, TARGET_LAYERS, method) as recording:
        logits = net(images)
    recording.maps(logits, targets, create_graph=True)
    F.cross_entropy(logits, targets).backward()
    torch.testing.assert_close(logits, deepcopy(net)(images), rtol=1e-9, atol=1e-9)
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-10)
    for a, b in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_teacher_under_no_grad_gives_the_same_maps_and_keeps_no_early_graph(method):
    net, images, targets = small_net()
    net.eval()
    expected = relevance_maps(net, images, targets, ["middle"], method)
    teacher = deepcopy(net).requires_grad_(False)
    with torch.no_grad():
        with record(teacher, ["middle"], method) as recording:
            logits = teacher(images)
        assert recording.activations[0].grad_fn is None
        got = recording.maps(logits, targets)
    torch.testing.assert_close(got, expected)
    assert not got[0].requires_grad
    for a, b in zip(teacher.buffers(), net.buffers(), strict=True):
        assert torch.equal(a, b)


def test_activations_are_the_features_and_carry_gradient():
    net, images, _ = small_net()
    net.eval()
    with record(net, TARGET_LAYERS) as recording:
        net(images)
    assert recording.layers == TARGET_LAYERS
    assert recording.method == "gradient_activation"
    features = recording.activations
    torch.testing.assert_close(features[0], net.silu(net.stem_norm(net.stem(images))))
    relation_cosine(features[1], torch.randn_like(features[1])).backward()
    assert net.stem.weight.grad.abs().max() > 0


def test_a_shared_activation_serves_two_places():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
            self.act = nn.ReLU(inplace=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.head(self.c(self.act(self.b(self.act(x)))).mean((2, 3)))

    shared = randomize(Shared(), 11)
    apart = nn.Sequential(
        shared.a, shared.b, nn.ReLU(), shared.c, nn.AdaptiveAvgPool2d(1), nn.Flatten(), shared.head
    )
    apart.insert(1, nn.ReLU())
    images, targets = torch.randn(2, 4, 5, 5).double(), torch.tensor([0, 1])
    for method in METHODS:
        got = relevance_maps(shared, images, targets, ["a"], method, signed=True)
        expected = relevance_maps(apart, images, targets, ["0"], method, signed=True)
        torch.testing.assert_close(got, expected)


# --- the model is left as found -------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["mobilenetv2_035", "mobilenetv3_small_100", "visformer_small"])
def test_relevance_maps_leave_the_model_as_found(name, training, untouched: Untouched):
    model, (images, targets) = build(name, 32).train(training), batch(32)
    layer = model.feature_info[0]["module"]
    for method in METHODS:
        with untouched(model):
            relevance_maps(model, images, targets, [layer], method)


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("broken on purpose")


@pytest.mark.parametrize("method", ["gradient_activation", "lrp_zplus"])
def test_an_exception_in_the_forward_pass_leaves_the_model_as_found(method, untouched: Untouched):
    net, images, targets = small_net()
    net.gelu = Broken()
    with untouched(net), pytest.raises(RuntimeError, match="on purpose"):
        relevance_maps(net.train(), images, targets, TARGET_LAYERS, method)


def test_an_exception_in_maps_leaves_the_model_as_found(untouched: Untouched):
    net, images, _ = small_net()
    with untouched(net), pytest.raises(ValueError, match="labels"):
        relevance_maps(net.train(), images, torch.tensor([0, 1, 3]), TARGET_LAYERS, "lrp_zplus")


# --- every listed model ---------------------------------------------------------------------------


def list_map_sides(model: nn.Module, size: int) -> Iterator[int]:
    """Side of the map at each reduction but the last."""
    reductions = sorted({entry["reduction"] for entry in model.feature_info})
    return iter([size // reduction for reduction in reductions[:-1]])


# A backward pass through the backward pass takes seconds here: the fast run has two methods each,
# one of plain gradients and one of rules.
LARGE = ("resnetv2_50", "vgg19", "densenet121", "visformer_small")
LISTED = [
    pytest.param(
        name,
        method,
        marks=[pytest.mark.slow]
        if name in LARGE and method not in ("gradient_activation", "lrp_composite")
        else [],
    )
    for name in SETTINGS
    for method in METHODS
]


@pytest.mark.parametrize(("name", "method"), LISTED)
def test_maps_and_their_gradients_are_finite_on_every_listed_model(name, method):
    size = 32
    model, (images, targets) = build(name, size), batch(size)
    for training in (False, True):
        model.train(training).zero_grad()
        with record(model, "auto", method) as recording:
            logits = model(images)
        maps = recording.maps(logits, targets, create_graph=True, signed=True)
        sides = [2 * (side,) for side in list_map_sides(model, size)]
        assert [tuple(m.shape) for m in maps] == [(2, *side) for side in sides]
        assert all(m.isfinite().all() for m in maps)
        assert all(m.abs().max() > 0 for m in maps)
        loss = sum(semantic_cosine(m, torch.rand_like(m)) for m in maps)
        (loss + F.cross_entropy(logits, targets)).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(grads) > len(list(model.parameters())) / 2
        assert all(grad.isfinite().all() for grad in grads)


# --- right or refused -----------------------------------------------------------------------------


class Net(nn.Module):
    """conv (the target layer), whatever ``middle`` does to its output, pooling, a linear head."""

    def __init__(self, middle: Callable[[nn.Module, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.middle = middle
        for name, module in modules.items():
            self.add_module(name, module)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self, self.conv(x)).mean((2, 3)))


def net_maps(
    middle: Callable[[nn.Module, Tensor], Tensor],
    method: str,
    training: bool = False,
    **modules: nn.Module,
) -> Tensor:
    net = randomize(Net(middle, **modules), 12).train(training)
    images = torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(13)).double()
    return relevance_maps(net, images, torch.tensor([0, 2, 1]), ["conv"], method, signed=True)[0]


def right_or_refused(compute: Callable[[], Tensor], naming: str) -> Tensor | None:
    """What ``compute`` gives, or nothing if it refuses with a message that says ``naming``."""
    try:
        return compute()
    except ValueError as error:
        if naming.lower() not in str(error).lower():
            raise
        return None


class TestUnknownNames:
    def test_a_misspelt_method_is_answered_with_near_matches(self):
        with pytest.raises(ValueError, match=r"lrp_epsilom.*'lrp_epsilon'"):
            relevance_maps(*small_net(), TARGET_LAYERS, method="lrp_epsilom")

    def test_a_misspelt_layer_is_answered_with_near_matches(self):
        with pytest.raises(ValueError, match=r"midle.*'middle'"):
            relevance_maps(*small_net(), ["midle"])

    def test_no_layers_are_refused(self):
        with pytest.raises(ValueError, match="at least one layer"):
            relevance_maps(*small_net(), [])

    def test_a_layer_named_twice_is_refused(self):
        with pytest.raises(ValueError, match="middle"):
            relevance_maps(*small_net(), ["middle", "middle"])


class TestTargets:
    def test_labels_outside_the_head_are_refused(self):
        net, images, _ = small_net()
        with pytest.raises(ValueError, match="num_classes"):
            relevance_maps(net, images, torch.tensor([0, 1, 3]), TARGET_LAYERS)
        with pytest.raises(ValueError, match="num_classes"):
            relevance_maps(net, images, torch.tensor([0, -1, 2]), TARGET_LAYERS)

    @pytest.mark.parametrize(
        "targets", [torch.tensor([0, 1]), torch.zeros(3, 1).long(), torch.rand(3), torch.rand(3, 4)]
    )
    def test_targets_of_a_wrong_shape_are_refused(self, targets):
        net, images, _ = small_net()
        with pytest.raises(ValueError, match="expected class"):
            relevance_maps(net, images, targets, TARGET_LAYERS)


@pytest.mark.parametrize("method", ["gradient_activation", "lrp_epsilon"])
class TestRecordingsThatCannotWork:
    def test_a_layer_without_a_map_is_refused(self, method):
        with pytest.raises(ValueError, match=r"head.*\(n, c, h, w\)"):
            relevance_maps(*small_net(), ["head"], method)

    def test_a_layer_that_runs_twice_is_refused(self, method):
        images, targets = torch.randn(1, 3, 5, 5), torch.tensor([0])
        net = Net(lambda net, x: net.act(net.act(x) + 1), act=nn.ReLU())
        with pytest.raises(ValueError, match=r"'act'.*second"):
            relevance_maps(net, images, targets, ["act"], method)

    def test_a_layer_that_never_runs_is_refused(self, method):
        net = Net(lambda net, x: x, unused=nn.ReLU())
        with pytest.raises(ValueError, match="unused"):
            relevance_maps(net, torch.randn(1, 3, 5, 5), torch.tensor([0]), ["unused"], method)

    def test_a_layer_that_the_logits_do_not_depend_on_is_refused(self, method):
        def aside(net: nn.Module, x: Tensor) -> Tensor:
            net.aside(x)
            return x

        net = Net(aside, aside=nn.ReLU())
        with pytest.raises(ValueError, match="'aside'"):
            relevance_maps(net, torch.randn(1, 3, 5, 5), torch.tensor([0]), ["aside"], method)

    def test_logits_of_another_forward_pass_are_refused(self, method):
        net, images, targets = small_net()
        with record(net, TARGET_LAYERS, method) as recording:
            earlier = net(images)
            net(images)
        outside = net(images)
        for logits in (earlier, outside, outside.detach()):
            with pytest.raises(ValueError, match="logits"):
                recording.maps(logits, targets)

    def test_maps_without_a_forward_pass_are_refused(self, method):
        net, images, targets = small_net()
        with record(net, TARGET_LAYERS, method) as recording:
            pass
        with pytest.raises(ValueError, match="forward pass"):
            recording.maps(net(images), targets)

    def test_a_forward_pass_without_gradients_inside_the_context_is_refused(self, method):
        net, images, targets = small_net()
        with record(net, TARGET_LAYERS, method) as recording, torch.no_grad():
            logits = net(images)
        with pytest.raises(ValueError, match="gradients"):
            recording.maps(logits, targets)

    def test_inference_mode_is_refused(self, method):
        net, images, targets = small_net()
        with torch.inference_mode(), pytest.raises(ValueError, match="inference"):
            relevance_maps(net, images, targets, TARGET_LAYERS, method)

    def test_logits_that_are_a_map_are_refused(self, method):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        with pytest.raises(ValueError, match=r"logits \(n, classes\)"):
            relevance_maps(net, torch.randn(1, 3, 5, 5), torch.tensor([0]), ["0"], method)

    def test_data_parallel_is_refused(self, method):
        net, images, targets = small_net()
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            relevance_maps(nn.DataParallel(net), images, targets, TARGET_LAYERS, method)


class TestDistributed:
    @pytest.fixture(autouse=True)
    def one_process(self, tmp_path) -> Iterator[None]:
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()

    def test_a_static_graph_is_refused(self):
        net, images, targets = small_net()
        parallel = nn.parallel.DistributedDataParallel(net, static_graph=True)
        with pytest.raises(ValueError, match="static_graph"):
            relevance_maps(parallel, images, targets, TARGET_LAYERS)

    @pytest.mark.parametrize("method", METHODS)
    def test_maps_and_gradients_equal_those_without_a_wrapper(self, method):
        net, images, targets = small_net()
        plain = deepcopy(net)
        parallel = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
        for model in (plain, parallel):
            with record(model, TARGET_LAYERS, method) as recording:
                logits = model(images)
            maps = recording.maps(logits, targets, create_graph=True)
            (map_losses(maps, signed=False) + F.cross_entropy(logits, targets)).backward()
        for a, b in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


FUNCTIONS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "relu": (lambda _, x: F.relu(x), "ReluBackward"),
    "relu in place": (lambda _, x: F.relu_(x + 0), "ReluBackward"),
    "gelu": (lambda _, x: F.gelu(x), "GeluBackward"),
    "hardtanh": (lambda _, x: F.hardtanh(x), "HardtanhBackward"),
    "square": (lambda _, x: x * x, "MulBackward"),
    "power": (lambda _, x: x.pow(3), "PowBackward"),
    "own gate": (lambda _, x: x * x.mean((2, 3), keepdim=True).sigmoid(), "SigmoidBackward"),
    "normalisation": (lambda _, x: x / x.norm(), "NormBackward"),
    "softmax": (lambda _, x: x.softmax(1), "SoftmaxBackward"),
    "functional convolution": (
        lambda net, x: F.conv2d(x, net.conv.weight[:, :1].expand(-1, 4, -1, -1), padding=1),
        "ConvolutionBackward",
    ),
    "group norm": (lambda net, x: net.norm(x), "NativeGroupNormBackward"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_without_a_rule_is_refused_by_name_in_lrp_only(name):
    function, operation = FUNCTIONS[name]
    modules = {"norm": nn.GroupNorm(2, 4)} if name == "group norm" else {}
    for method in LRP:
        with pytest.raises(ValueError, match=f"(?s){method}.*{operation}"):
            net_maps(function, method, **modules)
    for method in PLAIN:
        assert net_maps(function, method, **modules).abs().max() > 0


GATES: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], bool]] = {
    "factor": (lambda net, x: x + x * net.gate(x), True),
    "complement": (lambda net, x: x + x * (1 - net.gate(x)), True),
    "two factors": (lambda net, x: x + x * (net.gate(x) * net.gate(-x)), True),
    "scaled factor": (lambda net, x: x + x * (net.gate(x) * scale(net)), True),
    "activation": (lambda net, x: x + net.gate(x), False),
    "two activations": (lambda net, x: x + net.gate(x) * net.gate(-x), False),
    "scaled activation": (lambda net, x: x + net.gate(x) * scale(net), False),
    "activation of a layer": (lambda net, x: x + net.after(net.gate(x)), False),
}


def scale(net: nn.Module) -> Tensor:
    return net.conv.bias[:, None, None]


@pytest.mark.parametrize("name", GATES)
def test_a_sigmoid_is_a_factor_or_refused(name):
    """As an activation it would keep for itself what relevance reaches it."""
    function, is_factor = GATES[name]
    modules = {"gate": nn.Sigmoid(), "after": nn.Conv2d(4, 4, 1)}
    for method in LRP:
        if is_factor:
            assert net_maps(function, method, **modules).abs().max() > 0
            continue
        with pytest.raises(ValueError, match=rf"{method}.*factor of features, .*'gate'"):
            net_maps(function, method, **modules)
    for method in PLAIN:
        assert net_maps(function, method, **modules).abs().max() > 0


def test_functions_that_are_linear_need_no_rule():
    def linear(net: nn.Module, x: Tensor) -> Tensor:
        x = F.pad(x[:, :, :-1], (1, 1)) * net.head.bias[0] - 2 * x.roll(1, 2).mean()
        return torch.cat([x.flip(1)[:, :2], F.avg_pool2d(x, 1)[:, 2:]], 1)

    net = randomize(Net(linear), 12)
    images, targets = torch.randn(2, 3, 5, 5).double(), torch.tensor([0, 2])
    x = net.conv(images).detach().requires_grad_()
    score = net.head(linear(net, x).mean((2, 3))).gather(1, targets[:, None]).sum()
    (grad,) = torch.autograd.grad(score, x)
    (got,) = relevance_maps(net, images, targets, ["conv"], "lrp_epsilon", signed=True)
    expected = (x * grad).sum(1).detach()
    assert_close = torch.testing.assert_close
    assert_close(got / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-4)


def test_weight_standardisation_is_refused_in_lrp_only():
    for method in LRP:
        with pytest.raises(ValueError, match=r"'standardised'.*StdConv2d"):
            net_maps(lambda net, x: net.standardised(x), method, standardised=StdConv2d(4, 4, 1))
    for method in PLAIN:
        got = net_maps(lambda net, x: net.standardised(x), method, standardised=StdConv2d(4, 4, 1))
        assert got.abs().max() > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_convolution_whose_output_also_skips_its_norm_is_right_or_refused(method):
    """Written with the convolution twice, each with its own reader, it must be the same."""

    def once(net: nn.Module, x: Tensor) -> Tensor:
        y = net.second(net.relu(x))
        return net.norm(y) + y

    def twice(net: nn.Module, x: Tensor) -> Tensor:
        x = net.relu(x)
        return net.norm(net.second(x)) + net.plain(x)

    second, norm, relu = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
    net = randomize(Net(once, second=second, norm=norm, relu=relu), 12).eval()
    separate = deepcopy(net)
    separate.middle = twice
    separate.plain = deepcopy(separate.second)
    images, targets = torch.randn(2, 3, 5, 5).double(), torch.tensor([0, 2])
    got = right_or_refused(
        lambda: relevance_maps(net, images, targets, ["conv"], method, signed=True)[0], "second"
    )
    if got is not None:
        (expected,) = relevance_maps(separate, images, targets, ["conv"], method, signed=True)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", ["add in place", "relu in place", "assign"])
def test_a_tap_that_the_model_overwrites_is_right_or_refused(method, change):
    def overwrite(net: nn.Module, x: Tensor) -> Tensor:
        x = net.layer(x)
        if change == "add in place":
            x += 1
        elif change == "relu in place":
            x = net.relu(x)
        else:
            x[:, 0] = x[:, 0] * 2
        return x

    def apart(net: nn.Module, x: Tensor) -> Tensor:
        return overwrite(net, x).clone() if change == "relu in place" else copied(net, x)

    def copied(net: nn.Module, x: Tensor) -> Tensor:
        x = net.layer(x)
        if change == "add in place":
            return x + 1
        return torch.cat([x[:, :1] * 2, x[:, 1:]], 1)

    images, targets = torch.randn(2, 3, 5, 5).double(), torch.tensor([0, 2])
    modules = {"layer": nn.BatchNorm2d(4), "relu": nn.ReLU(inplace=True)}
    net = randomize(Net(overwrite, **modules), 12).eval()
    expected = randomize(Net(apart, layer=nn.BatchNorm2d(4), relu=nn.ReLU()), 12).eval()
    got = right_or_refused(
        lambda: relevance_maps(net, images, targets, ["layer"], method, signed=True)[0], "in place"
    )
    if got is not None:
        (wanted,) = relevance_maps(expected, images, targets, ["layer"], method, signed=True)
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("method", METHODS)
def test_batch_norm_in_the_head_does_not_mix_images_or_is_refused(method):
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = (
                nn.Conv2d(3, 4, 3),
                nn.BatchNorm1d(4),
                nn.Linear(4, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.conv(x).mean((2, 3))))

    torch.manual_seed(14)
    net = Head().double().train()
    images, weights = torch.randn(4, 3, 6, 6).double(), torch.zeros(4, 3).double()
    weights[0, 1] = 1.0
    got = right_or_refused(
        lambda: relevance_maps(net, images, weights, ["conv"], method, signed=True)[0], "norm"
    )
    if got is not None:
        assert got[0].abs().max() > 0
        assert got[1:].abs().max() == 0


class OwnForward(nn.BatchNorm2d):
    """A batch norm with something of its own behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_norm_with_its_own_forward_is_right_or_refused(method):
    def norm(net: nn.Module, x: Tensor) -> Tensor:
        return net.norm(x)

    def apart(net: nn.Module, x: Tensor) -> Tensor:
        return net.silu(net.norm(x))

    got = right_or_refused(lambda: net_maps(norm, method, norm=OwnForward(4)), "OwnForward")
    if got is not None:
        expected = net_maps(apart, method, norm=nn.BatchNorm2d(4), silu=nn.SiLU())
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("outer", METHODS)
def test_recording_a_model_that_is_being_recorded_is_right_or_refused(outer):
    net, images, targets = small_net()
    expected = relevance_maps(net, images, targets, TARGET_LAYERS, outer, signed=True)[0]

    def nested() -> Tensor:
        with (
            record(net, TARGET_LAYERS, outer) as recording,
            record(net, TARGET_LAYERS, "lrp_zplus"),
        ):
            logits = net(images)
        return recording.maps(logits, targets, signed=True)[0]

    got = right_or_refused(nested, naming="record")
    if got is not None:
        # Taps of the inner recording stand behind a stabilised identity at most.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_a_step_outlives_it(method):
    student = build("mobilenetv2_035", 64)
    teacher = build("mobilenetv2_035", 64).eval().requires_grad_(False)
    images, targets = batch(64)
    left = []
    for model in (student, teacher):
        with record(model, ["blocks.2", "blocks.4"], method) as recording:
            logits = model(images)
        logits.recording = recording  # as torchdistill's forward procedure does
        maps = recording.maps(logits, targets, create_graph=model is student)
        if model is student:
            sum(m.square().mean() for m in maps).backward()
        left += [weakref.ref(tensor) for tensor in (*recording.activations, *maps, logits)]
    del recording, logits, maps
    assert [reference() for reference in left] == [None] * len(left)


def test_the_input_of_a_frozen_model_keeps_its_gradient():
    model = build("mobilenetv2_035", 64).eval().requires_grad_(False)
    images, targets = batch(64)
    images.requires_grad_()
    (expected,) = torch.autograd.grad(model(images).sum(), images)
    with record(model, ["blocks.2"]) as recording:
        logits = model(images)
    recording.maps(logits, targets)
    (got,) = torch.autograd.grad(logits.sum(), images)
    torch.testing.assert_close(got, expected)


# --- autocast -------------------------------------------------------------------------------------


def autocast(dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast("cpu", dtype)


def heard_dtypes(module: nn.Module) -> list[torch.dtype]:
    dtypes: list[torch.dtype] = []
    module.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    return dtypes


def head_and_tail(seed: int = 3) -> tuple[nn.Module, nn.Module]:
    """A net with a layer in the middle, and what follows the layer, with the same weights."""
    torch.manual_seed(seed)
    stem, norm = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
    tail = [nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.SiLU()]
    tail += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
    head = nn.Sequential(stem, norm, nn.ReLU())
    return nn.Sequential(head, *tail), nn.Sequential(nn.Identity(), *tail)


class TestAutocast:
    @pytest.mark.parametrize("method", METHODS)
    def test_behind_the_tap_everything_is_float32_to_the_last_bit(self, method):
        net, tail = head_and_tail()
        images, targets = batch(24, 4)
        with autocast(), record(net, ["0"], method) as recording:
            logits = net(images)
            (inside,) = recording.maps(logits, targets, create_graph=True)
        (map_,) = recording.maps(logits, targets, create_graph=True)
        assert torch.equal(inside, map_)
        weights = list(tail.parameters())
        of_weights = torch.autograd.grad(map_.square().mean(), weights, materialize_grads=True)
        (layer,) = recording.activations
        assert {layer.dtype, logits.dtype, map_.dtype} == {torch.float32}
        assert torch.equal(layer, layer.bfloat16().float())  # up to there it was low precision

        with record(tail, ["0"], method) as recording:
            expected_logits = tail(layer.detach())
        (expected,) = recording.maps(expected_logits, targets, create_graph=True)
        assert torch.equal(logits, expected_logits)
        assert torch.equal(map_, expected)
        expected_of_weights = torch.autograd.grad(
            expected.square().mean(), weights, materialize_grads=True
        )
        assert all(map(torch.equal, of_weights, expected_of_weights))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("method", METHODS)
    def test_gradients_reach_the_part_in_low_precision(self, method, dtype):
        net, _ = head_and_tail()
        images, targets = batch(24, 4)
        with autocast(dtype):
            with record(net, ["0"], method) as recording:
                logits = net(images)
            low = net[0](images)
        (map_,) = recording.maps(logits, targets, create_graph=True)
        loss = semantic_cosine(map_, map_.detach().flip(0))
        weight = net[0][0].weight
        (of_weight,) = torch.autograd.grad(loss, weight, retain_graph=True)
        (of_tap,) = torch.autograd.grad(loss, recording.activations)
        (expected,) = torch.autograd.grad(low, weight, of_tap.to(dtype))
        assert low.dtype == dtype
        assert expected.norm() > 0
        assert torch.equal(of_weight, expected)

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
    )
    def test_maps_and_gradients_of_a_smooth_net_are_those_in_float32(self, dtype, tolerance):
        # Without kinks and poles the error is a few times that of the features, once rounded.
        net, _ = head_and_tail()
        net[0][2], net[3] = nn.Softplus(), nn.Softplus()
        images, targets = batch(24, 4)
        found = []
        for enabled in (False, True):
            with torch.autocast("cpu", dtype, enabled=enabled), record(net, ["0"]) as recording:
                logits = net(images)
            (map_,) = recording.maps(logits, targets, create_graph=True, signed=True)
            # Scaled, as by a GradScaler: small gradients vanish in float16.
            loss = 2**12 * semantic_l2(map_, torch.zeros_like(map_))
            found.append((map_, *torch.autograd.grad(loss, [net[0][0].weight, net[1].weight])))
        for full, low in zip(*found, strict=True):
            assert (low - full).norm() < 4 * tolerance * full.norm()

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("name", ["mobilenetv2_035", "mobilenetv3_small_100", "resnet18"])
    def test_maps_of_real_models_are_those_in_float32_of_the_same_features(self, name, method):
        # With the features before rounding, maps of random weights differ as much as under
        # noise of the same size in the image, up to 100 % in norm: deep ReLU nets are like that.
        model = build(name, 64)
        images, targets = batch(64)
        with autocast(), record(model, "auto", method) as recording:
            logits = model(images)
        maps = recording.maps(logits, targets)
        features = recording.activations[0].detach()
        first = model.get_submodule(recording.layers[0])
        first.register_forward_hook(lambda *_: features)
        expected = relevance_maps(model, images, targets, "auto", method)
        assert {m.dtype for m in maps} == {torch.float32}
        assert all(map(torch.equal, maps, expected))

    @pytest.mark.parametrize("method", METHODS)
    def test_a_branch_around_the_tap_goes_on_in_float32_too(self, method):
        class Branched(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer, self.main = nn.Tanh(), nn.Conv2d(3, 4, 3)
                self.stem, self.around = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 3)
                self.head = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                x = self.stem(x)
                y = self.main(self.layer(x))
                return self.head((y + self.around(x)).mean((2, 3)))

        net = Branched()
        stem, around = heard_dtypes(net.stem), heard_dtypes(net.around)
        images, targets = batch(16)
        expected = relevance_maps(net, images, targets, ["layer"], method, signed=True)[0]
        with autocast():
            map_ = relevance_maps(net, images, targets, ["layer"], method, signed=True)[0]
        assert stem == [torch.float32, torch.bfloat16]
        assert around == [torch.float32, torch.float32]
        assert (map_ - expected).norm() < 0.05 * expected.norm()

    def test_a_second_model_begins_in_low_precision_again(self):
        models = [head_and_tail(seed)[0] for seed in (3, 4)]
        stems = [heard_dtypes(model[0][0]) for model in models]
        heads = [heard_dtypes(model[-1]) for model in models]
        with autocast():
            for model in models:
                with record(model, ["0"]):
                    model(batch(24)[0])
                    model(batch(24)[0])
                assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert stems == [[torch.bfloat16] * 2] * 2
        assert heads == [[torch.float32] * 2] * 2

    def test_its_state_is_restored_by_an_exception_in_the_forward_pass(self):
        net, _ = head_and_tail()
        net[-1] = nn.Linear(5, 4)  # of the wrong size
        with autocast(), record(net, ["0"]):
            with pytest.raises(RuntimeError, match="shapes"):
                net(batch(24)[0])
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16

    def test_its_state_is_restored_as_the_context_closes(self):
        net, _ = head_and_tail()
        with autocast():
            with record(net, ["0"]):
                net[0](batch(24)[0])  # the model's own forward pass, which would end, never begins
                assert torch.get_autocast_dtype("cpu") == torch.float32
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16

    def test_a_region_of_the_models_own_keeps_its_state(self):
        net, _ = head_and_tail()

        class Inner(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net

            def forward(self, x: Tensor) -> Tensor:
                with autocast(torch.float16):
                    return self.net(x)

        model = Inner()
        with autocast():
            (map_,) = relevance_maps(model, *batch(24), ["net.0"])
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert map_.dtype == torch.float32

    def test_float64_stays_float64(self):
        net, _ = head_and_tail()
        images, targets = batch(24)
        with autocast():
            (map_,) = relevance_maps(net.double(), images.double(), targets, ["0"])
        assert map_.dtype == torch.float64


@pytest.mark.parametrize("way", ["wrapped", "in place", "a part", "wrapped in a wrapper"])
def test_a_compiled_model_is_refused(way):
    net, _ = head_and_tail()
    if way.startswith("wrapped"):
        net = torch.compile(net)
    else:
        (net if way == "in place" else net[0]).compile()
    if way == "wrapped in a wrapper":
        net = nn.Sequential(net)
    with pytest.raises(ValueError, match=r"expected a model as written.*compiled"):
        relevance_maps(net, *batch(24), ["0"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_refused(dtype):
    net, _ = head_and_tail()
    net[1].to(dtype)
    with pytest.raises(
        ValueError, match=r"weights in float32, got '1.weight'.*autocast|'3.weight'"
    ):
        relevance_maps(net, *batch(24), ["0"])
