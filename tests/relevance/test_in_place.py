"""What a model changes in place between its layers: maps are right, or refused by name."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from reference import LRP, PLAIN, randomize
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torchdistill.models.classification.wide_resnet import wide_resnet

from kd_lrp_plugin.relevance.recording import record, relevance_maps

METHODS = PLAIN + LRP


def autograd_map(
    model: nn.Module, layer: str, images: Tensor, targets: Tensor, pooled: bool = False
) -> Tensor:
    """Activation times gradient by plain autograd, on a copy that no later change reaches."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        kept.append(output)
        return output.clone()

    handle = model.get_submodule(layer).register_forward_hook(keep)
    score = model(images).gather(1, targets[:, None]).sum()
    handle.remove()
    (grad,) = torch.autograd.grad(score, kept[0])
    if pooled:
        grad = grad.mean((2, 3), keepdim=True)
    return (kept[0] * grad).sum(1).detach()


@pytest.mark.parametrize("layer", ["layer1", "layer2.0", "conv1"])
def test_a_wide_resnet_of_torchdistill_equals_autograd(layer):
    torch.manual_seed(0)
    model = wide_resnet(16, 1, 0.0, 4, False, False).double().eval()
    images, targets = torch.randn(2, 3, 16, 16).double(), torch.tensor([1, 3])
    expected = autograd_map(model, layer, images, targets)
    (got,) = relevance_maps(model, images, targets, [layer], signed=True)
    torch.testing.assert_close(got / expected.abs().max(), expected / expected.abs().max())
    (got,) = relevance_maps(model, images, targets, [layer], "lrp_epsilon", signed=True)
    # Without biases LRP-ε is activation times gradient, up to its stabiliser.
    assert (got - expected).abs().max() < 1e-2 * expected.abs().max()
    assert torch.cosine_similarity(got.flatten(), expected.flatten(), 0) > 0.9999


def test_the_wide_resnet_40_1_of_torchdistill_equals_autograd():
    torch.manual_seed(0)
    model = wide_resnet(40, 1, 0.0, 4, False, False).double().eval()
    images, targets = torch.randn(1, 3, 16, 16).double(), torch.tensor([1])
    expected = autograd_map(model, "layer1", images, targets)
    (got,) = relevance_maps(model, images, targets, ["layer1"], signed=True)
    torch.testing.assert_close(got / expected.abs().max(), expected / expected.abs().max())


# Each change out of place (written into a new tensor), then in place.
Change = Callable[[Tensor, Tensor], Tensor]


def replace_channels(y: Tensor, new: Tensor) -> Tensor:
    return torch.cat([new, y[:, 2:]], 1)


def assign(y: Tensor, x: Tensor) -> Tensor:
    y[:, :2] = 2 * y[:, :2]
    return y


def add_to_a_view(y: Tensor, x: Tensor) -> Tensor:
    y.flatten(2)[:, :, 1:].add_(x.flatten(2)[:, :, 1:])
    return y


def multiply_a_view(y: Tensor, x: Tensor) -> Tensor:
    y[:, :2].mul_(x[:, :2])
    return y


def scale_a_view(y: Tensor, x: Tensor) -> Tensor:
    y[:, :2].mul_(x[:, :2].detach())
    return y


def squash_a_view(function: Callable[[Tensor], Tensor]) -> Change:
    def change(y: Tensor, x: Tensor) -> Tensor:
        function(y[:, :2])
        return y

    return change


def mask(y: Tensor) -> Tensor:
    return (torch.arange(y[0].numel()).view_as(y[0]) % 3 == 0)[None].expand_as(y)


CHANGES: dict[str, tuple[Change, Change]] = {
    "add": (lambda y, x: y + x, lambda y, x: y.add_(x)),
    "multiply": (lambda y, x: y * 3, lambda y, x: y.mul_(3)),
    "relu": (lambda y, x: F.relu(y), lambda y, x: F.relu(y, inplace=True)),
    "hardtanh": (lambda y, x: F.hardtanh(y), lambda y, x: F.hardtanh_(y)),
    "assign": (lambda y, x: replace_channels(y, 2 * y[:, :2]), assign),
    "add to a view": (
        lambda y, x: torch.cat(
            [y.flatten(2)[:, :, :1], y.flatten(2)[:, :, 1:] + x.flatten(2)[:, :, 1:]], 2
        ).view_as(y),
        add_to_a_view,
    ),
    "fill": (
        lambda y, x: y.masked_fill(mask(y), 0.0),
        lambda y, x: y.masked_fill_(mask(y), 0.0),
    ),
    "transpose": (lambda y, x: y.transpose(2, 3), lambda y, x: y.transpose_(2, 3)),
    "copy": (lambda y, x: 0 * y + x, lambda y, x: y.copy_(x)),
    "multiply a view": (
        lambda y, x: replace_channels(y, y[:, :2] * x[:, :2]),
        multiply_a_view,
    ),
    "scale a view": (
        lambda y, x: replace_channels(y, y[:, :2] * x[:, :2].detach()),
        scale_a_view,
    ),
    "sigmoid of a view": (
        lambda y, x: replace_channels(y, y[:, :2].sigmoid()),
        squash_a_view(torch.sigmoid_),
    ),
    "clamp a view": (
        lambda y, x: replace_channels(y, y[:, :2].clamp(-0.2, 0.3)),
        squash_a_view(lambda y: y.clamp_(-0.2, 0.3)),
    ),
    "square a flat view": (lambda y, x: y**2, lambda y, x: y.view(-1).square_().view_as(y)),
}
WHERE = ("layer", "convolution", "its input", "norm", "norm and activation", "activation", "gate")


class Changed(nn.Module):
    """A target layer and one layer of each kind behind it; at ``where`` the change is made."""

    def __init__(self, where: str, change: Change) -> None:
        super().__init__()
        self.where, self.change = where, change
        self.layer = nn.Conv2d(3, 4, 3)
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.act, self.gate = nn.SiLU(inplace=True), nn.Sigmoid()
        self.conv2, self.norm_act = nn.Conv2d(4, 4, 1), BatchNormAct2d(4, act_layer=nn.SiLU)
        self.head = nn.Linear(4, 3)

    def at(self, where: str, y: Tensor, x: Tensor) -> Tensor:
        return self.change(y, x) if where == self.where else y

    def forward(self, images: Tensor) -> Tensor:
        x = self.at("layer", self.layer(images), images[:, :1, 1:-1, 1:-1])
        other = x * 0.5
        y = self.conv(x)
        x = self.at("its input", x, other)
        y = self.norm(self.at("convolution", y, other))
        y = self.act(self.at("norm", y, other))
        y = self.conv2(self.at("activation", y, other))
        y = self.at("norm and activation", self.norm_act(y), other)
        y = y * self.at("gate", self.gate(y.mean((2, 3), keepdim=True).expand_as(y) + 0), other)
        return self.head((y + x).mean((2, 3)))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_place_is_the_change_out_of_place_or_refused(change, where):
    apart, in_place = CHANGES[change]
    images = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(2)).double()
    targets = torch.tensor([0, 2])
    for method in METHODS:
        maps: list[Tensor | str] = []
        for function in (apart, in_place):
            net = randomize(Changed(where, function), 21).eval()
            try:
                maps += relevance_maps(net, images, targets, ["layer"], method, signed=True)
            except ValueError as error:
                maps.append(str(error))
            if method in PLAIN and function is in_place and where != "layer":
                # Nothing is refused but what autograd refuses, too, and nothing is left out.
                try:
                    expected = autograd_map(net, "layer", images, targets, method == "grad_cam")
                except RuntimeError:
                    continue
                torch.testing.assert_close(maps[-1], expected, rtol=1e-9, atol=1e-12)
        expected, got = maps
        if isinstance(got, str):
            assert "place" in got or "Backward" in got, got
        elif isinstance(expected, Tensor):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
        else:
            # What has no rule is none the more ruled for being in place.
            raise AssertionError(f"{method}: refused out of place ({expected}), not in place")


@pytest.mark.parametrize("method", LRP)
def test_a_source_that_changes_between_convolution_and_norm_is_named(method):
    net = randomize(Changed("its input", lambda y, x: y.add_(x)), 21).eval()
    images, targets = torch.randn(2, 3, 6, 6).double(), torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"layer 'conv'.*in place before 'norm'"):
        relevance_maps(net, images, targets, ["layer"], method)


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_model_that_overwrites_its_target_layer_is_refused(method):
    net = randomize(Changed("layer", lambda y, x: y.add_(x)), 21).eval().requires_grad_(False)
    images, targets = torch.randn(2, 3, 6, 6).double(), torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"record \['layer'\].*in place"):
        relevance_maps(net, images, targets, ["layer"], method)


@pytest.mark.parametrize("method", METHODS)
def test_features_that_the_model_overwrites_are_refused(method):
    net = randomize(Changed("layer", lambda y, x: y.add_(x)), 21).eval()
    with record(net, ["layer"], method) as recording:
        net(torch.randn(2, 3, 6, 6).double())
    with pytest.raises(ValueError, match="in place"):
        _ = recording.activations


@pytest.mark.parametrize("method", METHODS)
def test_an_ordinary_backward_pass_may_follow_a_change_of_what_a_rule_has_kept(method):
    """ReLU keeps its output alone, so that its input may change: so it may with a recording."""

    class Overwriting(Changed):
        def forward(self, images: Tensor) -> Tensor:
            x = self.layer(images)
            raw = self.norm(x)
            y = self.relu(raw)
            raw.zero_()
            return self.head(y.mean((2, 3)))

    net = Overwriting("nowhere", lambda y, x: y)
    net.relu = nn.ReLU()
    net = randomize(net, 3).eval()
    images, targets = torch.randn(2, 3, 6, 6).double(), torch.tensor([0, 2])
    expected = torch.autograd.grad(net(images).sum(), net.layer.weight)
    with record(net, ["layer"], method) as recording:
        logits = net(images)
    got = torch.autograd.grad(logits.sum(), net.layer.weight, retain_graph=True)
    torch.testing.assert_close(got, expected)
    if method in LRP:
        with pytest.raises(ValueError, match=r"'relu'.*in place"):
            recording.maps(logits, targets)
    else:
        assert recording.maps(logits, targets, signed=True)[0].abs().max() > 0
