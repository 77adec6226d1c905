"""What a model returns, how it is called and run: which output is the logits, and what cancels."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from reference import LRP, PLAIN, randomize
from timm.layers import BatchNormAct2d, RmsNorm2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from kd_lrp_plugin.relevance import rules
from kd_lrp_plugin.relevance.recording import Recording, find_logits, record, relevance_maps

METHODS = PLAIN + LRP
IMAGES = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(5)).double()
TARGETS = torch.tensor([0, 2])


class Net(nn.Module):
    """A target layer, whatever comes behind it, and what is done with the logits."""

    def __init__(
        self, middle: nn.Module, finish: Callable = lambda logits, features: logits
    ) -> None:
        super().__init__()
        self.layer, self.middle, self.head = nn.Conv2d(3, 4, 3), middle, nn.Linear(4, 3)
        self.finish = finish

    def forward(self, images: Tensor) -> object:
        features = self.middle(self.layer(images))
        return self.finish(self.head(features.mean((2, 3))), features)


def make_net(*args: object) -> nn.Module:
    return randomize(Net(*args), 41).eval()


def get_maps(model: nn.Module, method: str) -> Tensor:
    return relevance_maps(model, IMAGES, TARGETS, ["layer"], method, signed=True)[0]


# --- outputs --------------------------------------------------------------------------------------

Named = namedtuple("Named", ["aux", "logits"])


@dataclass
class Output:
    hidden: Tensor
    logits: Tensor


OUTPUTS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "tuple with a map": lambda y, x: (x, y),
    "list with None": lambda y, x: [None, y],
    "named tuple": lambda y, x: Named(y.flip(1), y),
    "dictionary": lambda y, x: {"aux": y.flip(1), "logits": y},
    "dictionary without the name": lambda y, x: OrderedDict(features=x, out=y),
    "dataclass": lambda y, x: Output(y.flip(1), y),
}
UNCLEAR: dict[str, Callable[[Tensor, Tensor], object]] = {
    "two of one kind": lambda y, x: (y, y.flip(1)),
    "pooled features": lambda y, x: (y, x.mean((2, 3))),
    "no logits": lambda y, x: {"features": x},
    "empty": lambda y, x: (),
    "something else": lambda y, x: "cat",
    "nothing": lambda y, x: None,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OUTPUTS)
def test_logits_are_found_where_it_is_clear_which_they_are(name, method):
    expected = get_maps(make_net(nn.ReLU()), method)
    assert torch.equal(get_maps(make_net(nn.ReLU(), OUTPUTS[name]), method), expected)


@pytest.mark.parametrize("name", UNCLEAR)
def test_outputs_of_which_none_is_clearly_the_logits_are_refused(name):
    with pytest.raises(ValueError, match=r"maps: expected one output that is the logits"):
        get_maps(make_net(nn.ReLU(), UNCLEAR[name]), "gradient_activation")


def test_find_logits_names_what_it_has_found():
    with pytest.raises(ValueError, match=r"tuple of \{0: \(2, 3\), 1: \(2, 5\)\}"):
        find_logits("maps", (torch.zeros(2, 3), torch.zeros(2, 5)))


def test_googlenet_with_auxiliary_heads_in_train_mode():
    torch.manual_seed(1)
    model = torchvision.models.googlenet(num_classes=4, init_weights=False).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images = torch.randn(2, 3, 64, 64)
    with record(model, ["inception4a"]) as recording:
        output = model(images)
    (found,) = recording.maps(output, TARGETS, signed=True)
    (expected,) = recording.maps(output.logits, TARGETS, signed=True)
    assert torch.equal(found, expected)
    assert found.abs().max() > 0


# --- calls ----------------------------------------------------------------------------------------


class ByKeyword(nn.Module):
    def __init__(self, by_keyword: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU()
        self.bare, self.norm_act, self.gate = nn.Conv2d(4, 4, 1), BatchNormAct2d(4), nn.Sigmoid()
        self.by_keyword = by_keyword

    def forward(self, x: Tensor) -> Tensor:
        if not self.by_keyword:
            x = self.norm_act(self.bare(self.act(self.norm(self.conv(x)))))
            return x * self.gate(x)
        x = self.act(input=self.norm(input=self.conv(input=x)))
        x = self.norm_act(x=self.bare(input=x))
        return x * self.gate(input=x)


@pytest.mark.parametrize("method", METHODS)
def test_layers_may_be_called_by_keyword(method):
    maps = [get_maps(make_net(ByKeyword(by_keyword)), method) for by_keyword in (True, False)]
    assert torch.equal(*maps)


@pytest.mark.parametrize("method", METHODS)
def test_a_convolution_of_one_image_without_its_axis(method):
    class OneByOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.conv(image) for image in x])

    net = make_net(OneByOne())
    if method in LRP:
        with pytest.raises(ValueError, match=r"'middle.conv': expected an input \(n, c, h, w\)"):
            get_maps(net, method)
        return
    written = make_net(nn.Sequential(OrderedDict(conv=nn.Conv2d(4, 4, 1))))
    torch.testing.assert_close(get_maps(net, method), get_maps(written, method))


# --- gradient checkpointing -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attribute", "fix"),
    [
        ("grad_checkpointing", r"set_grad_checkpointing\(False\)"),
        ("gradient_checkpointing", r"gradient_checkpointing_disable\(\)"),
        ("memory_efficient", "Set it to False"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_that_an_attribute_switches_is_refused_by_name(method, attribute, fix):
    net = make_net(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))
    setattr(net.middle, attribute, True)
    state = dict(vars(net.middle))
    with pytest.raises(ValueError, match=rf"{attribute} of 'middle' is True\. .*{fix}"):
        get_maps(net, method)
    assert vars(net.middle) == state
    setattr(net.middle, attribute, False)
    assert get_maps(net, method).abs().max() > 0


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_035", "densenet121"])
def test_timm_s_checkpointing_is_refused_by_name_until_it_is_off(name):
    model = timm.create_model(name, num_classes=4).train()
    layer = model.feature_info[2]["module"]
    model.set_grad_checkpointing(True)
    words = r"runs once, got gradient checkpointing: .* is True"
    with pytest.raises(ValueError, match=words), record(model, [layer]):
        pass
    model.set_grad_checkpointing(False)
    with record(model, [layer]) as recording:
        logits = model(torch.randn(2, 3, 32, 32))
    (map_,) = recording.maps(logits, TARGETS, signed=True)
    assert map_.abs().max() > 0


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, inner: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.inner = inner or nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_layers_behind_the_target_layer_are_refused(method, reentrant):
    with pytest.raises(ValueError, match=r"a forward pass that runs once, got .*checkpointing"):
        get_maps(make_net(Checkpointed(reentrant)), method)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_norm_behind_a_checkpointed_convolution_is_refused(method, reentrant):
    """The two are one layer, but the first runs twice, and in the first pass without a graph."""

    class Segments(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.segments = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint_sequential(self.segments, 2, x, use_reentrant=reentrant)

    with pytest.raises(ValueError, match=r"a forward pass that runs once, got .*checkpointing"):
        get_maps(make_net(Segments()), method)


@pytest.mark.parametrize("method", PLAIN)
def test_checkpointed_functions_are_right(method):
    got = get_maps(make_net(Checkpointed(False, lambda x: F.relu(x) * x)), method)

    class Written(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x) * x

    torch.testing.assert_close(got, get_maps(make_net(Written()), method))


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_before_the_target_layer_is_served(method):
    class Before(nn.Module):
        def __init__(self, checkpointed: bool) -> None:
            super().__init__()
            inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU())
            self.before = Checkpointed(False, inner) if checkpointed else inner
            self.net = Net(nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.before(x))

    found = []
    for checkpointed in (True, False):
        model = randomize(Before(checkpointed), 43).eval()
        with record(model, ["net.layer"], method) as recording:
            logits = model(IMAGES)
            (map_,) = recording.maps(logits, TARGETS, create_graph=True, signed=True)
            map_.square().sum().backward()  # runs the part before once more
        found.append((map_, *(p.grad for p in model.parameters() if p.grad is not None)))
    torch.testing.assert_close(*found)


# --- sums that cancel -----------------------------------------------------------------------------


class ByHand(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        return x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()


class ChannelsLast(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class UnitLength(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)


CANCELLING: dict[str, Callable[[], nn.Module]] = {
    "RMSNorm": lambda: ChannelsLast(nn.RMSNorm(4)),
    "RmsNorm2d": lambda: RmsNorm2d(4),
    "by hand": ByHand,
    "unit length": UnitLength,
    "behind a ReLU": lambda: nn.Sequential(nn.ReLU(), RmsNorm2d(4)),
    "behind a projection": lambda: nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), RmsNorm2d(4)),
}
PARTIAL: dict[str, Callable[[], nn.Module]] = {
    "GroupNorm": lambda: nn.GroupNorm(1, 4),
    "behind a biased projection": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), RmsNorm2d(4)),
    "behind an average of positions": lambda: nn.Sequential(nn.AvgPool2d(2), RmsNorm2d(4)),
}


def behind(middle: nn.Module) -> nn.Module:
    """With something not linear behind it, without which the logits would not depend on it."""
    return nn.Sequential(middle, nn.SiLU(), nn.Conv2d(4, 4, 1), nn.SiLU())


@pytest.mark.parametrize("name", CANCELLING)
def test_activation_times_gradient_in_front_of_a_norm_over_channels_is_refused(name):
    net = make_net(behind(CANCELLING[name]()))
    with pytest.raises(ValueError, match=r"gradient_activation at layer 'layer'.*cancel.*grad_cam"):
        get_maps(net, "gradient_activation")
    assert get_maps(net, "grad_cam").abs().max() > 0
    for method in LRP:
        with pytest.raises(ValueError, match="Backward"):
            get_maps(net, method)


@pytest.mark.parametrize("name", PARTIAL)
def test_maps_that_do_not_cancel_at_each_position_are_autograd_s(name):
    net = make_net(behind(PARTIAL[name]()))
    x = net.layer(IMAGES).detach().requires_grad_()
    score = net.head(net.middle(x).mean((2, 3))).gather(1, TARGETS[:, None]).sum()
    expected = (x * torch.autograd.grad(score, x)[0]).sum(1).detach()
    torch.testing.assert_close(get_maps(net, "gradient_activation"), expected)


# --- the stabiliser -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("name", ["efficientnet_b0", "ghostnet_100"])
def test_relevance_is_conserved_at_any_scale_of_the_weights(name, scale):
    torch.manual_seed(4)
    model = timm.create_model(name, num_classes=4).double().eval()
    for module in model.modules():
        for key in ("bias", "running_mean"):
            if getattr(module, key, None) is not None:
                getattr(module, key).data.zero_()
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data.mul_(scale)
    with record(model, "auto", "lrp_epsilon") as recording:
        logits = model(torch.randn(2, 3, 32, 32).double())
    score = logits.detach().gather(1, TARGETS[:, None]).squeeze(1)
    for map_ in recording.maps(logits, TARGETS, signed=True):
        assert ((map_.sum((1, 2)) - score) / score).abs().max() < 1e-4


class TestStabilize:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_it_is_relative_to_each_sample(self, dtype):
        z = torch.randn(3, 4, 5, 5, dtype=dtype)
        z[:, 0, 0, 0] = 0
        sizes = torch.tensor([1.0, 2.0**-60, 2.0**60], dtype=dtype).view(-1, 1, 1, 1)
        one = rules.stabilize(z)
        assert torch.equal(rules.stabilize(z * sizes), one * sizes)
        assert (one[:, 0, 0, 0] > 0).all()
        assert (
            (one - z).abs() <= rules.EPSILON * z.abs().mean((1, 2, 3), keepdim=True) + 1e-6
        ).all()

    def test_zeros_divide_without_nan_to_the_second_derivative(self):
        z = torch.zeros(2, 3, dtype=torch.float32, requires_grad=True)
        ratio = z / rules.stabilize(z)
        (slope,) = torch.autograd.grad(ratio.sum(), z, create_graph=True)
        assert ratio.eq(0).all()
        assert not slope.isnan().any()

    def test_its_derivative_is_that_of_finite_differences(self):
        z = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).double()
        z.mul_(1e-6).requires_grad_()  # within reach of the stabiliser, were it absolute
        z.data[:, 0, 0] = 1.0
        assert torch.autograd.gradcheck(lambda z: z / rules.stabilize(z), z, eps=1e-12, atol=1e-3)


def test_maps_are_looked_at_once_and_again_when_the_graph_is_another(monkeypatch):
    looked: list[int] = []
    check = Recording._check_cancellation

    def count(recording: Recording, *args: list[Tensor]) -> bool:
        looked.append(1)
        return check(recording, *args)

    monkeypatch.setattr(Recording, "_check_cancellation", count)
    net = make_net(nn.ReLU())
    for method, expected in [
        ("gradient_activation", 1),
        ("gradient_activation", 1),
        ("lrp_epsilon", 2),
        ("lrp_epsilon", 2),
    ]:
        get_maps(net, method)
        assert len(looked) == expected
    net.middle = RmsNorm2d(4).double()
    with pytest.raises(ValueError, match="sums over channels that cancel"):
        get_maps(net, "gradient_activation")
