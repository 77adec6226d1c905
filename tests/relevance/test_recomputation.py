"""What rules compute again for their derivative, and what they are told of their inputs."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from reference import LRP, randomize
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from kd_lrp_plugin.relevance import linear_maps, rules
from kd_lrp_plugin.relevance.methods import METHODS, Method
from kd_lrp_plugin.relevance.norms import batch_variance
from kd_lrp_plugin.relevance.recomputation import apply_activation_rule, apply_rule
from kd_lrp_plugin.relevance.recording import record, relevance_maps
from kd_lrp_plugin.relevance.rules import RULES, stabilize

IMAGES = torch.randn(3, 3, 6, 7, generator=torch.Generator().manual_seed(5)).double()
TARGETS = torch.tensor([0, 2, 1])


def nonlinear_in_its_transpose(g, x, y, w, layer):
    return layer.transpose(g * (y / stabilize(y)), w).square() * x


TRIED = {name: RULES[name] for name in RULES} | {"of a user": nonlinear_in_its_transpose}


def draw(layer: linear_maps.LinearMap, x: Tensor, weight: Tensor) -> list[Tensor]:
    """Factor, input, output, weight and scale, all of which a derivative is wanted for."""
    y = layer.apply(x, weight)
    tensors = (torch.randn_like(y), x, y + 0.1, weight, torch.rand(len(weight)).double() + 0.5)
    return [tensor.detach().requires_grad_() for tensor in tensors]


CONVOLUTION = linear_maps.convolution((2, 4, 5, 6), (2, 1), (0, 1, 1, 1), (1, 1), 1)
DEPTHWISE = linear_maps.convolution((2, 4, 5, 6), (1, 1), (1, 1, 1, 1), (1, 1), 4)
LAYERS: dict[str, Callable[[], tuple[linear_maps.LinearMap, list[Tensor]]]] = {
    "convolution": lambda: (
        CONVOLUTION,
        draw(CONVOLUTION, torch.randn(2, 4, 5, 6).double(), torch.randn(6, 4, 3, 3).double()),
    ),
    "depthwise": lambda: (
        DEPTHWISE,
        draw(DEPTHWISE, torch.randn(2, 4, 5, 6).double(), torch.randn(4, 1, 3, 3).double()),
    ),
    "tokens": lambda: (
        linear_maps.LINEAR,
        draw(linear_maps.LINEAR, torch.randn(2, 7, 20).double(), torch.randn(5, 20).double()),
    ),
}


@pytest.mark.parametrize("rule", TRIED)
@pytest.mark.parametrize("name", LAYERS)
class TestRule:
    def test_value_and_derivative_are_those_of_the_rule_itself(self, name, rule):
        layer, (g, x, y, w, scale) = LAYERS[name]()
        got = apply_rule(TRIED[rule], layer, g, (x, y, w), scale)
        scaled = w * scale.view(-1, *[1] * (w.ndim - 1))
        expected = TRIED[rule](g, x, y, scaled, layer)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        direction, inputs = torch.randn_like(got), (g, x, y, w, scale)
        pairs = [
            torch.autograd.grad(value, inputs, direction, allow_unused=True)
            for value in (got, expected)
        ]
        for ours, theirs in zip(*pairs, strict=True):
            zeros = torch.zeros(())
            ours, theirs = (zeros if t is None else t for t in (ours, theirs))
            assert ours.isfinite().all()
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)

    def test_nothing_is_kept_but_what_it_reads(self, name, rule):
        layer, (g, x, y, w, scale) = LAYERS[name]()
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            apply_rule(TRIED[rule], layer, g, (x, y, w), scale)
        assert kept
        read = {tensor.data_ptr() for tensor in (g, x, y, w, scale)}
        assert {tensor.data_ptr() for tensor in kept} <= read

    def test_a_second_derivative_is_that_of_the_rule_itself(self, name, rule):
        layer, inputs = LAYERS[name]()
        g, x, y, w, scale = inputs
        scaled = w * scale.view(-1, *[1] * (w.ndim - 1))
        derivatives = []
        for value in (
            apply_rule(TRIED[rule], layer, g, (x, y, w), scale),
            TRIED[rule](g, x, y, scaled, layer),
        ):
            (first,) = torch.autograd.grad(value.square().sum(), w, create_graph=True)
            loss = first.square().sum()
            derivatives.append(torch.autograd.grad(loss, inputs, allow_unused=True))
        for ours, theirs in zip(*derivatives, strict=True):
            zeros = torch.zeros(())
            ours, theirs = (zeros if t is None else t for t in (ours, theirs))
            # Next to a total that is nearly zero, numbers are large and lose digits.
            tolerance = 1e-9 * float(theirs.abs().max().clamp(min=1))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("module", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish])
def test_an_activation_is_computed_again_without_a_change_of_its_input(module, inplace):
    x = (4 * torch.randn(2, 5).double()).requires_grad_()
    g = torch.randn(2, 5).double().requires_grad_()
    before = x.detach().clone()
    got = apply_activation_rule(rules.activation, module(inplace), g, x)
    expected = g * (module()(x) / stabilize(x))
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    pairs = [torch.autograd.grad(value.square().sum(), (g, x)) for value in (got, expected)]
    torch.testing.assert_close(*pairs, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before)


def test_a_share_is_the_ratio_it_says_it_is():
    g, y, z = (torch.randn(3, 2, 4, 4).double().requires_grad_() for _ in range(3))
    torch.testing.assert_close(rules.share(g, y, z), g * (y / stabilize(z)), rtol=0, atol=1e-15)
    assert torch.autograd.gradcheck(rules.share, (g, y, z))
    assert torch.autograd.gradgradcheck(rules.share, (g, y, z))


@pytest.mark.parametrize("shape", [(3, 2, 2, 2), (4, 3)])
def test_the_variance_of_a_batch_can_be_derived_twice(shape):
    x = torch.randn(shape).double().requires_grad_()
    expected = x.transpose(0, 1).flatten(1).var(1, correction=0)
    torch.testing.assert_close(batch_variance(x), expected, rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(batch_variance, x)
    assert torch.autograd.gradgradcheck(batch_variance, x)


# --- a convolution that others read, too ----------------------------------------------------------


class Shared(nn.Module):
    """A convolution read by a norm and by a sum; with ``apart`` they are two of equal weights."""

    def __init__(self, apart: bool, bias: bool) -> None:
        super().__init__()
        self.layer, self.apart = nn.Conv2d(3, 4, 3), apart
        self.conv, self.norm = nn.Conv2d(4, 4, 1, bias=bias), nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 1, bias=bias) if apart else nn.Identity()
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer(images)
        raw = self.conv(x)
        other = self.second(x) if self.apart else raw
        return self.head((self.norm(raw) + 2 * other).mean((2, 3)))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", LRP)
def test_a_convolution_that_a_norm_and_something_else_read(method, bias, frozen):
    together = randomize(Shared(False, bias), 7)
    apart = Shared(True, bias).double()
    apart.load_state_dict(together.state_dict(), strict=False)
    apart.second.load_state_dict(together.conv.state_dict())
    maps = []
    for net in (together, apart):
        net.train().requires_grad_(not frozen)
        with record(net, ["layer"], method) as recording:
            logits = net(IMAGES)
        maps += recording.maps(logits, TARGETS, create_graph=not frozen, signed=True)
    assert maps[0].abs().max() > 1e-3
    torch.testing.assert_close(*maps, rtol=1e-9, atol=1e-12)
    if frozen:
        return
    for loss in (m.square().sum() for m in maps):
        loss.backward()
    torch.testing.assert_close(
        together.conv.weight.grad, apart.conv.weight.grad + apart.second.weight.grad
    )


# --- inputs that cannot be negative ---------------------------------------------------------------


class AfterActivation(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.layer, self.act, self.conv = nn.Conv2d(3, 4, 3), act, nn.Conv2d(4, 5, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(5), nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(self.layer(images))
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


def lower(_: nn.Module, __: tuple, y: Tensor) -> Tensor:
    return y - 0.5


def lower_in_place(_: nn.Module, __: tuple, y: Tensor) -> None:
    y.sub_(0.5)


def lower_unseen_by_autograd(_: nn.Module, __: tuple, y: Tensor) -> None:
    with torch.no_grad():
        y.sub_(0.5)


CHANGES = {"hook": lower, "in place": lower_in_place, "unseen": lower_unseen_by_autograd}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the method "told" has been told of the convolution's input; "asking" is told nothing."""
    told: list[bool] = []

    def listen(g, x, y, w, layer):
        told.extend([layer.is_nonnegative] * (x.ndim == 4))
        return RULES["zplus"](g, x, y, w, layer)

    def ask(g, x, y, w, layer):
        return RULES["zplus"](g, x, y, w, replace(layer, is_nonnegative=False))

    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))
    METHODS.register(Method(listen, listen), "told")
    METHODS.register(Method(ask, ask), "asking")
    return told


def assert_told(net: nn.Module, told: list[bool], expected: bool) -> None:
    maps = [
        relevance_maps(net, IMAGES, TARGETS, ["layer"], method, signed=True)[0]
        for method in ("told", "asking", "lrp_zplus")
    ]
    assert told == [expected]
    assert maps[0].abs().max() > 1e-3
    for got in maps[::2]:
        torch.testing.assert_close(got, maps[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("make", [nn.ReLU, nn.ReLU6])
def test_behind_a_relu_the_input_is_known_not_to_be_negative(make, inplace, told):
    assert_told(randomize(AfterActivation(make(inplace)), 3).eval(), told, True)


@pytest.mark.parametrize("act", [nn.SiLU(), nn.Hardtanh(-1.0, 1.0), nn.LeakyReLU()])
def test_behind_another_activation_nothing_is_known(act, told):
    assert_told(randomize(AfterActivation(act), 3).eval(), told, False)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [nn.ReLU, nn.ReLU6])
def test_a_change_behind_a_relu_ends_what_is_known(make, change, told):
    net = randomize(AfterActivation(make()), 3).eval().requires_grad_(False)
    net.act.register_forward_hook(CHANGES[change])
    assert_told(net, told, False)


def test_the_derivative_behind_a_relu_is_that_of_finite_differences():
    net = randomize(AfterActivation(nn.ReLU6(inplace=True)), 3).train()
    weights = parameters_to_vector(net.parameters()).detach()

    def loss(vector: Tensor) -> Tensor:
        vector_to_parameters(vector, net.parameters())
        with record(net, ["layer"], "lrp_gamma") as recording:
            logits = net(IMAGES)
        (map_,) = recording.maps(logits, TARGETS, create_graph=True, signed=True)
        return map_.square().sum()

    loss(weights).backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
    gradient = parameters_to_vector(grads)
    generator = torch.Generator().manual_seed(9)
    for _ in range(3):
        way = torch.randn(weights.shape, generator=generator, dtype=torch.float64)
        step = 1e-6 * way
        with torch.no_grad():
            numeric = (loss(weights + step) - loss(weights - step)) / 2e-6
        torch.testing.assert_close(gradient @ way, numeric, rtol=1e-5, atol=1e-6)
