"""Layers that do more than their class says: maps are right, or the layer is refused by name."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from reference import LRP, PLAIN, randomize
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.utils.hooks import RemovableHandle

from kd_lrp_plugin.relevance.methods import METHODS as REGISTRY
from kd_lrp_plugin.relevance.methods import Method
from kd_lrp_plugin.relevance.recording import record, relevance_maps
from kd_lrp_plugin.relevance.rules import epsilon, gradient, stabilize

METHODS = PLAIN + LRP


class Chain(nn.Module):
    """A target layer and one layer of each kind behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.SiLU()
        self.bare, self.norm_act = nn.Conv2d(4, 4, 1), BatchNormAct2d(4, act_layer=nn.SiLU)
        self.gate, self.head = nn.Sigmoid(), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(self.layer(images))))
        x = self.norm_act(self.bare(x))
        return self.head((x * self.gate(x.mean((2, 3), keepdim=True))).mean((2, 3)))


LAYERS = ["conv", "norm", "act", "bare", "norm_act", "gate", "head"]
IMAGES = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(5)).double()
TARGETS = torch.tensor([0, 2])


def chain(training: bool = False) -> nn.Module:
    return randomize(Chain(), 31).train(training)


def get_maps(model: nn.Module, method: str) -> Tensor:
    return relevance_maps(model, IMAGES, TARGETS, ["layer"], method, signed=True)[0]


def autograd_map(model: nn.Module, method: str) -> Tensor:
    kept: list[Tensor] = []
    handle = model.layer.register_forward_hook(lambda _, __, y: kept.append(y))
    score = model(IMAGES).gather(1, TARGETS[:, None]).sum()
    handle.remove()
    (grad,) = torch.autograd.grad(score, kept[0])
    if method == "grad_cam":
        grad = grad.mean((2, 3), keepdim=True)
    return (kept[0] * grad).sum(1).detach()


def assert_right_or_refused(model: nn.Module, naming: str, written: nn.Module | None) -> None:
    """Plain gradients are autograd's; LRP is that of the same net ``written`` with modules."""
    for method in PLAIN:
        expected = autograd_map(model, method)
        torch.testing.assert_close(get_maps(model, method), expected, rtol=1e-9, atol=1e-12)
    for method in LRP:
        try:
            got = get_maps(model, method)
        except ValueError as error:
            if naming not in str(error) and "Backward" not in str(error):
                raise
            continue
        assert written is not None, f"{method} is neither refused nor known"
        torch.testing.assert_close(got, get_maps(written, method), rtol=1e-9, atol=1e-12)


# --- forward passes of their own ------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_an_instance_with_its_own_forward(name):
    net = chain()
    layer = net.get_submodule(name)
    plain = layer.forward
    layer.forward = lambda x: plain(x).tanh()
    assert_right_or_refused(net, f"'{name}'", None)


@pytest.mark.parametrize("name", LAYERS)
def test_an_instance_whose_own_forward_is_its_class_s(name):
    net = chain()
    layer = net.get_submodule(name)
    layer.forward = layer.forward
    for method in METHODS:
        assert torch.equal(get_maps(net, method), get_maps(chain(), method))


@pytest.mark.parametrize("name", LAYERS)
def test_a_class_whose_forward_is_its_own(name):
    net = chain()
    layer = net.get_submodule(name)
    kind = type(layer)
    own = type("Own", (kind,), {"forward": lambda self, x: kind.forward(self, x).tanh()})
    layer.__class__ = own
    assert_right_or_refused(net, "Own", None)


@pytest.mark.parametrize("of_the_instance", [True, False])
def test_a_convolution_that_changes_its_weights(of_the_instance):
    def standardised(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return nn.Conv2d._conv_forward(self, x, weight - weight.mean((1, 2, 3), True), bias)

    net = chain()
    if of_the_instance:
        net.conv._conv_forward = standardised.__get__(net.conv)
    else:
        net.conv.__class__ = type("Own", (nn.Conv2d,), {"_conv_forward": standardised})
    assert_right_or_refused(net, "'conv'", None)


class Clone(torch.autograd.Function):
    """Named like an operation of PyTorch that is linear."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


def test_a_function_named_like_a_linear_operation_is_refused():
    class Cube(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Clone.apply(x)

    net = chain()
    net.act = Cube()
    assert_right_or_refused(net, "CloneBackward of a function of its own", None)


def test_an_adapter_beside_a_layer_is_served():
    """As LoRA does it with modules: the layer's output, and that of two small ones."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Conv2d) -> None:
            super().__init__()
            self.base, self.down, self.up = base, nn.Conv2d(4, 2, 3), nn.Conv2d(2, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 0.5 * self.up(self.down(x))

    net = Chain()
    net.conv = Adapted(net.conv)
    net = randomize(net, 31).eval()
    assert_right_or_refused(net, "conv", net)
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if name.endswith(("bias", "running_mean")):
                tensor.zero_()
    score = net(IMAGES).gather(1, TARGETS[:, None]).squeeze(1).detach()
    for method in ("lrp_epsilon", "lrp_gamma"):  # of a net without biases they sum to the logit
        torch.testing.assert_close(get_maps(net, method).sum((1, 2)), score, rtol=1e-4, atol=0)


# --- hooks of the user ----------------------------------------------------------------------------


class Then(nn.Module):
    """A layer, with what a hook does written out before or behind it."""

    def __init__(self, before: Callable, layer: nn.Module, behind: Callable) -> None:
        super().__init__()
        self.before, self.inner, self.behind = before, layer, behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.inner(self.before(x)))


def same(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize("when", ["before", "inside", "in front"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_hook_that_changes_the_output(name, when):
    net = chain()
    written = deepcopy(net)
    setattr(written, name, Then(same, written.get_submodule(name), lambda y: 2 * y))
    layer = net.get_submodule(name)
    if when == "before":
        layer.register_forward_hook(lambda _, __, y: 2 * y)
        assert_right_or_refused(net, name, written)
        return

    def register() -> RemovableHandle:
        return layer.register_forward_hook(lambda _, __, y: 2 * y, prepend=when == "in front")

    assert_right_or_refused_inside(net, name, written, register)


def assert_right_or_refused_inside(
    net: nn.Module, name: str, written: nn.Module, register: Callable[[], RemovableHandle]
) -> None:
    """The same for a hook that comes when the recording has begun."""
    for method in METHODS:
        try:
            with record(net, ["layer"], method) as recording:
                handle = register()
                logits = net(IMAGES)
        except ValueError as error:
            if f"'{name}" not in str(error):
                raise
        else:
            (got,) = recording.maps(logits, TARGETS, signed=True)
            torch.testing.assert_close(got, get_maps(written, method), rtol=1e-9, atol=1e-12)
        finally:
            handle.remove()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_hook_that_changes_the_input(name, inside):
    net = chain()
    written = deepcopy(net)
    setattr(written, name, Then(lambda x: 2 * x, written.get_submodule(name), same))
    layer = net.get_submodule(name)
    if not inside:
        layer.register_forward_pre_hook(lambda _, args: (2 * args[0],))
        assert_right_or_refused(net, name, written)
        return
    assert_right_or_refused_inside(
        net, name, written, lambda: layer.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    )


@pytest.mark.parametrize("method", PLAIN)
def test_a_hook_on_the_gradient_between_convolution_and_norm(method):
    net = chain()
    net.conv.register_forward_hook(lambda _, __, y: y.register_hook(lambda g: -g) and None)
    expected = autograd_map(net, method)
    torch.testing.assert_close(get_maps(net, method), expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(expected, autograd_map(chain(), method))


# --- weights that are computed --------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


COMPUTED: dict[str, Callable[[nn.Module], object]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "weight norm, old": old_weight_norm,
    "spectral norm, old": old_spectral_norm,
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.3),
}


def frozen_copy(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The net with the weights that its layers computed in their latest call, as parameters."""
    copy = chain(model.training)
    for name, weight in weights.items():
        copy.get_submodule(name).weight.data.copy_(weight)
    return copy


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("how", COMPUTED)
def test_computed_weights_are_those_of_the_call_and_their_buffers_stay(how, training):
    torch.manual_seed(7)
    net = chain(training)
    names = ["conv", "bare", "head"] + (["norm"] if how == "own" else [])
    for name in names:
        COMPUTED[how](net.get_submodule(name))
    for method in METHODS:
        once = deepcopy(net) if "old" not in how and how != "pruned" else None
        before = {name: buffer.clone() for name, buffer in net.named_buffers()}
        with record(net, ["layer"], method) as recording:
            logits = net(IMAGES)
        maps = recording.maps(logits, TARGETS, create_graph=True, signed=True)
        maps[0].square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
        if once is not None:
            once(IMAGES)  # one forward pass moves the buffers by as much as one recorded
            for (name, buffer), moved in zip(net.named_buffers(), once.buffers(), strict=True):
                torch.testing.assert_close(buffer, moved, msg=name)
        for name, buffer in net.named_buffers():
            buffer.copy_(before[name])
        weights = latest_weights(net, names)
        torch.testing.assert_close(
            maps[0].detach(), get_maps(frozen_copy(net, weights), method), rtol=1e-7, atol=1e-9
        )


@torch.no_grad()
def latest_weights(net: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """The weights with which the next call computes; it moves no buffer."""
    before = {key: buffer.clone() for key, buffer in net.named_buffers()}
    with parametrize.cached():
        net(IMAGES)
        weights = {name: net.get_submodule(name).weight.clone() for name in names}
    for key, buffer in net.named_buffers():
        buffer.copy_(before[key])
    return weights


# --- rules and methods of the user ----------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(REGISTRY, "_entries", dict(REGISTRY._entries))
    return REGISTRY


def test_a_method_of_the_user_is_used_by_name(registry):
    def as_epsilon(g, x, y, w, layer):
        return layer.transpose(g * (y / stabilize(y)), w)

    registry.register(Method(as_epsilon, as_epsilon), "lrp_mine")
    torch.testing.assert_close(get_maps(chain(), "lrp_mine"), get_maps(chain(), "lrp_epsilon"))


@pytest.mark.parametrize("rules", [(gradient, epsilon), (epsilon, gradient)])
def test_a_method_of_which_one_rule_is_the_gradient_is_checked_as_lrp(registry, rules):
    registry.register(Method(*rules), "mixed")
    assert get_maps(chain(), "mixed").abs().max() > 0
    net = chain()
    net.act.forward = lambda x: x * x
    with pytest.raises(ValueError, match="MulBackward"):
        get_maps(net, "mixed")
