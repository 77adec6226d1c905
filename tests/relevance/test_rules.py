"""Each rule against dense algebra on real timm blocks, and against Captum and zennit."""

from collections.abc import Callable
from functools import partial

import pytest
import reference
import timm
import torch
from captum.attr import LRP as CaptumLRP
from captum.attr._utils import lrp_rules
from reference import Tail, randomize
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models._efficientnet_blocks import (
    DepthwiseSeparableConv,
    InvertedResidual,
    SqueezeExcite,
)
from timm.models.densenet import DenseBlock
from timm.models.resnet import BasicBlock
from timm.models.resnetv2 import DownsampleConv, PreActBottleneck
from timm.models.visformer import Block as VisformerBlock
from torch import Tensor, nn
from zennit.composites import SpecialFirstLayerMapComposite
from zennit.layer import Sum
from zennit.rules import Epsilon, Gamma, Norm, Pass, ZPlus

from kd_lrp_plugin.relevance import linear_maps, rules
from kd_lrp_plugin.relevance.methods import METHODS
from kd_lrp_plugin.relevance.recording import relevance_maps
from kd_lrp_plugin.relevance.rules import RULES

ALL_METHODS = reference.PLAIN + reference.LRP


# --- one layer ----------------------------------------------------------------------------------

RULE_REFERENCES = {
    "gradient": reference.plain,
    "epsilon": reference.epsilon,
    "zplus": reference.zplus,
    "gamma": reference.gamma,
}
GEOMETRIES = {
    "plain": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": (1, 2)},
    "grouped": {"kernel_size": 3, "groups": 2, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": 4, "stride": 2},
    "pointwise": {"kernel_size": 1},
    "oblong": {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 1)},
}


def test_every_rule_and_method_has_a_reference():
    assert RULE_REFERENCES.keys() == RULES.keys()
    assert set(ALL_METHODS) == METHODS.keys()


def test_references_use_the_constants_of_the_package():
    assert (reference.EPSILON, reference.GAMMA) == (rules.EPSILON, rules.GAMMA)


def one_convolution(
    geometry: str,
) -> tuple[nn.Conv2d, linear_maps.LinearMap, Tensor, Tensor, Tensor]:
    layer = randomize(nn.Conv2d(4, 4, **GEOMETRIES[geometry]), seed=1)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    y = layer(x).detach()
    vertical, horizontal = layer.padding
    padding = (horizontal, horizontal, vertical, vertical)
    linear = linear_maps.convolution(x.shape, layer.stride, padding, layer.dilation, layer.groups)
    return layer, linear, x, y, torch.randn_like(y)


@pytest.mark.parametrize("name", sorted(RULES))
class TestRuleContract:
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_agrees_with_dense_algebra_on_a_convolution(self, name, geometry):
        layer, linear, x, y, g = one_convolution(geometry)
        matrix, _ = reference.convolution_matrix(layer, 5, 6)
        shift = layer.bias.detach().repeat_interleave(y[0, 0].numel())
        rule = RULE_REFERENCES[name]
        expected = [rule(matrix, shift, x[i].flatten(), g[i].flatten()) for i in range(2)]
        got = RULES[name](g, x, y, layer.weight.detach(), linear)
        torch.testing.assert_close(got.flatten(1), torch.stack(expected), rtol=1e-9, atol=1e-9)

    def test_agrees_with_dense_algebra_on_a_linear_layer(self, name):
        layer = randomize(nn.Linear(7, 5), seed=2)
        x, g = torch.randn(2, 7).double(), torch.randn(2, 5).double()
        weight, shift = layer.weight.detach(), layer.bias.detach()
        expected = [RULE_REFERENCES[name](weight, shift, x[i], g[i]) for i in range(2)]
        got = RULES[name](g, x, layer(x).detach(), weight, linear_maps.LINEAR)
        torch.testing.assert_close(got, torch.stack(expected), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("geometry", ["strided", "grouped", "depthwise", "pointwise"])
    def test_derivative_is_exact(self, name, geometry):
        layer, linear, x, _, g = one_convolution(geometry)
        bias = layer.bias.detach()

        def factor(g: Tensor, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
            y = linear.apply(x, w) + bias[:, None, None]
            return RULES[name](g, x, y, w, linear)

        inputs = [t.detach().requires_grad_() for t in (g, x, layer.weight, bias)]
        assert torch.autograd.gradcheck(factor, inputs, fast_mode=True)


# --- real blocks --------------------------------------------------------------------------------


def _dense_block(channels: int) -> nn.Module:
    return DenseBlock(2, num_input_features=channels, bn_size=2, growth_rate=4)


def _preactivation(stride: int, project: bool) -> nn.Module:
    return PreActBottleneck(
        8,
        8,
        bottle_ratio=1.0,
        stride=stride,
        conv_layer=create_conv2d,
        norm_layer=BatchNormAct2d,
        proj_layer=DownsampleConv if project else None,
    )


def _shortcut(stride: int) -> nn.Module | None:
    if stride == 1:
        return None
    return nn.Sequential(nn.Conv2d(8, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8))


def _squeeze(gate: type[nn.Module]) -> Callable[..., nn.Module]:
    return partial(SqueezeExcite, rd_channels=4, gate_layer=gate)


def _inverted(**kwargs: object) -> nn.Module:
    settings = {"exp_ratio": 2.0, "act_layer": nn.ReLU6} | kwargs
    return InvertedResidual(8, 8, **settings)


# name: (block, output channels, how the reference walks it)
BLOCKS: dict[str, tuple[Callable[[], nn.Module], int, Callable]] = {
    "mobilenetv2 stem": (
        lambda: nn.Sequential(
            create_conv2d(8, 8, 3, stride=2, padding="same"),
            BatchNormAct2d(8, act_layer=nn.ReLU6),
        ),
        8,
        reference.stem,
    ),
    "mobilenetv2 inverted residual": (lambda: _inverted(), 8, reference.inverted_residual),
    "mobilenetv2 stride 2": (lambda: _inverted(stride=2), 8, reference.inverted_residual),
    "mobilenetv2 stride 2 pad same": (
        lambda: _inverted(stride=2, pad_type="same"),
        8,
        reference.inverted_residual,
    ),
    "mobilenetv2 stride 1 pad same, 5x5": (
        lambda: _inverted(pad_type="same", dw_kernel_size=5),
        8,
        reference.inverted_residual,
    ),
    "mobilenetv2 depthwise separable": (
        lambda: DepthwiseSeparableConv(8, 8, act_layer=nn.ReLU6),
        8,
        reference.depthwise_separable,
    ),
    "mobilenetv3 with hard gate": (
        lambda: _inverted(act_layer=nn.Hardswish, se_layer=_squeeze(nn.Hardsigmoid), stride=2),
        8,
        reference.inverted_residual,
    ),
    "efficientnet with squeeze and excite": (
        lambda: _inverted(act_layer=nn.SiLU, se_layer=_squeeze(nn.Sigmoid)),
        8,
        reference.inverted_residual,
    ),
    "efficientnet depthwise separable": (
        lambda: DepthwiseSeparableConv(
            8, 8, act_layer=nn.SiLU, se_layer=_squeeze(nn.Sigmoid), pad_type="same", stride=2
        ),
        8,
        reference.depthwise_separable,
    ),
    "resnet basic": (lambda: BasicBlock(8, 8), 8, reference.basic_residual),
    "resnet basic with downsampling": (
        lambda: BasicBlock(8, 8, stride=2, downsample=_shortcut(2)),
        8,
        reference.basic_residual,
    ),
    "resnetv2 bottleneck": (
        lambda: _preactivation(1, False),
        8,
        reference.preactivation_bottleneck,
    ),
    "resnetv2 bottleneck with downsampling": (
        lambda: _preactivation(2, True),
        8,
        reference.preactivation_bottleneck,
    ),
    "densenet block": (lambda: _dense_block(8), 16, reference.dense_block),
    "visformer convolution block": (
        lambda: VisformerBlock(
            8, 2, mlp_ratio=2.0, group=2, attn_disabled=True, spatial_conv=True,
            norm_layer=nn.BatchNorm2d,
        ),
        8,
        reference.visformer_block,
    ),
    "visformer attention block": (
        lambda: VisformerBlock(8, 2, mlp_ratio=2.0, norm_layer=nn.BatchNorm2d),
        8,
        reference.visformer_block,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tails() -> Callable[[str], tuple[nn.Module, Tensor, Tensor, Callable]]:
    def build(name: str) -> tuple[nn.Module, Tensor, Tensor, Callable]:
        make, channels, walk_block = BLOCKS[name]
        model = randomize(Tail(make(), channels), seed=3)
        images = torch.randn(3, 8, 5, 4, generator=torch.Generator().manual_seed(4)).double()

        def tail(walk: reference.Walk, x: reference.Node) -> reference.Node:
            return walk.linear(walk.mean(walk_block(walk, model.block, x)), model.head)

        return model, images, torch.tensor([0, 2, 1]), tail

    return build


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("block", BLOCKS)
class TestBlocks:
    def test_reference_computes_the_logits_of_the_block(self, block, training, tails):
        model, images, targets, tail = tails(block)
        model.train(training)
        _, logits = reference.relevance("lrp_zplus", images, targets, tail, training)
        torch.testing.assert_close(logits, model(images).detach(), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("method", ALL_METHODS)
    def test_maps_agree_with_dense_algebra(self, block, training, method, tails):
        model, images, targets, tail = tails(block)
        model.train(training)
        expected, _ = reference.relevance(method, images, targets, tail, training, signed=True)
        (signed,) = relevance_maps(model, images, targets, ["layer"], method=method, signed=True)
        (positive,) = relevance_maps(model, images, targets, ["layer"], method=method)
        scale = expected.abs().max()
        assert scale > 1e-6, "an empty map compares nothing"
        torch.testing.assert_close(signed / scale, expected / scale, rtol=0, atol=1e-9)
        torch.testing.assert_close(positive, signed.clamp(min=0), rtol=0, atol=0)


def test_reference_is_autograd_for_plain_gradients(tails):
    for block in BLOCKS:
        model, images, targets, tail = tails(block)
        model.eval()
        x = images.clone().requires_grad_()
        score = model(x).gather(1, targets[:, None]).sum()
        (grad,) = torch.autograd.grad(score, x)
        got, _ = reference.relevance("gradient_activation", images, targets, tail, signed=True)
        torch.testing.assert_close(got, (x * grad).sum(1).detach(), rtol=1e-7, atol=1e-8)


# --- other people's LRP, on nets where it is right ------------------------------------------------


class Chain(nn.Module):
    """A convolutional net of modules only, without batch norm: a target layer, then ``layers``."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=bias),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, groups=2, bias=bias),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 10, bias=bias),
            nn.ReLU(),
            nn.Linear(10, 4, bias=bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.layer(x))


@pytest.fixture
def chain(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor]:
    """Net, activations and the classes of the largest logits (positive, as Captum's γ needs).

    Everything is of order 100: the three libraries stabilise at different places, which shows
    where an output is not large against the stabiliser.
    """
    model = randomize(Chain(bias=request.param), seed=5).eval()
    images = 100 * torch.rand(3, 3, 9, 9).double()
    for layer in model.layers:
        if getattr(layer, "bias", None) is not None:
            layer.bias.data.mul_(100)
    logits = model(images)
    targets = logits.argmax(1)
    assert (logits.amax(1) > 5).all()
    return model, images, targets


def zennit_maps(
    method: str, tail: nn.Module, x: Tensor, targets: Tensor, stabilizer: float = 1e-6
) -> Tensor:
    """Signed maps at the input ``x`` of ``tail``."""
    convolution, linear = ZENNIT[method]
    layer_map = [
        (nn.ReLU | nn.ReLU6, Pass()),
        (Sum | nn.AvgPool2d | nn.AdaptiveAvgPool2d, Norm(stabilizer)),
        (nn.Conv2d, convolution(stabilizer)),
        (nn.Linear, linear(stabilizer)),
    ]
    composite = SpecialFirstLayerMapComposite(layer_map, [])
    x = x.detach().clone().requires_grad_()
    with composite.context(tail) as modified:
        logits = modified(x)
        one_hot = nn.functional.one_hot(targets, logits.shape[1])
        (relevance,) = torch.autograd.grad(logits, x, (one_hot * logits).detach())
    return relevance.sum(1)


def _zplus(stabilizer: float) -> ZPlus:
    return ZPlus(stabilizer, zero_params="bias")


def _gamma(stabilizer: float) -> Gamma:
    return Gamma(reference.GAMMA, stabilizer)


ZENNIT = {
    "lrp_epsilon": (Epsilon, Epsilon),
    "lrp_zplus": (_zplus, _zplus),
    "lrp_gamma": (_gamma, _gamma),
    "lrp_composite": (_zplus, Epsilon),
}
# zennit gives a bias its share of γ; ours does not. So γ is compared without biases.
WITH_ZENNIT = [
    pytest.param(bias, method, id=f"{method}-{'biased' if bias else 'bias-free'}")
    for method in ZENNIT
    for bias in (True, False)
    if not (bias and method == "lrp_gamma")
]


def assert_maps_close(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Largest difference relative to the largest value of each map."""
    scale = expected.abs().amax((1, 2), keepdim=True)
    assert (scale > 0).all()
    assert ((got - expected) / scale).abs().max() < tolerance


@pytest.mark.parametrize(("chain", "method"), WITH_ZENNIT, indirect=["chain"])
def test_maps_agree_with_zennit_on_a_plain_chain(chain, method):
    model, images, targets = chain
    expected = zennit_maps(method, model.layers, images, targets)
    (got,) = relevance_maps(model, images, targets, ["layer"], method=method, signed=True)
    assert_maps_close(got, expected)


@pytest.mark.parametrize(("chain", "method"), WITH_ZENNIT, indirect=["chain"])
def test_reference_agrees_with_zennit_on_a_plain_chain(chain, method):
    model, images, targets = chain
    expected = zennit_maps(method, model.layers, images, targets)

    def tail(walk: reference.Walk, x: reference.Node) -> reference.Node:
        return reference.sequential(walk, model.layers, x)

    got, _ = reference.relevance(method, images, targets, tail, signed=True)
    assert_maps_close(got, expected)


CAPTUM = {
    "lrp_epsilon": (True, lrp_rules.EpsilonRule, lrp_rules.EpsilonRule),
    "lrp_zplus": (False, lrp_rules.Alpha1_Beta0_Rule, lrp_rules.Alpha1_Beta0_Rule),
    "lrp_gamma": (False, lrp_rules.GammaRule, lrp_rules.GammaRule),
    "lrp_composite": (False, lrp_rules.Alpha1_Beta0_Rule, lrp_rules.EpsilonRule),
}


@pytest.mark.parametrize(
    ("chain", "method"),
    [(biased, method) for method, (biased, _, _) in CAPTUM.items()],
    indirect=["chain"],
    ids=list(CAPTUM),
)
def test_maps_agree_with_captum_on_a_plain_chain(chain, method):
    model, images, targets = chain
    (got,) = relevance_maps(model, images, targets, ["layer"], method=method, signed=True)
    _, convolution, linear = CAPTUM[method]
    for layer in model.layers:
        if isinstance(layer, nn.Conv2d):
            layer.rule = convolution()
        elif isinstance(layer, nn.Linear):
            layer.rule = linear()
        elif isinstance(layer, nn.Flatten | nn.AvgPool2d):
            layer.rule = lrp_rules.EpsilonRule()
    inputs = images.clone().requires_grad_()
    expected = CaptumLRP(model.layers).attribute(inputs, target=targets).detach().sum(1)
    assert_maps_close(got, expected)


def fold(convolution: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """A convolution with the batch norm (eval mode) behind it multiplied in."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    folded = nn.Conv2d(
        convolution.in_channels,
        convolution.out_channels,
        convolution.kernel_size,
        convolution.stride,
        convolution.padding,
        groups=convolution.groups,
        dtype=torch.float64,
    )
    with torch.no_grad():
        folded.weight.copy_(convolution.weight * scale[:, None, None, None])
        folded.bias.copy_(norm.bias - norm.running_mean * scale)
    return folded


class Residual(nn.Module):
    """``layers(x) + x`` through zennit's Sum, which it has a rule for."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.sum = nn.Sequential(*layers), Sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.sum(torch.stack([self.layers(x), x], -1))


def without_biases(model: nn.Module) -> None:
    """Zero every bias, batch-norm shift and running mean."""
    for module in model.modules():
        for name in ("bias", "running_mean"):
            if getattr(module, name, None) is not None:
                getattr(module, name).data.zero_()


def folded_tail(model: nn.Module, first_stage: int) -> nn.Module:
    """mobilenetv2 behind ``blocks.{first_stage - 1}``, its batch norms folded by hand."""
    tail: list[nn.Module] = []
    for stage in model.blocks[first_stage:]:
        for block in stage:
            layers = [fold(block.conv_pw, block.bn1), nn.ReLU6()]
            layers += [fold(block.conv_dw, block.bn2), nn.ReLU6()]
            layers += [fold(block.conv_pwl, block.bn3)]
            tail += [Residual(*layers)] if block.has_skip else layers
    tail += [fold(model.conv_head, model.bn2), nn.ReLU6()]
    tail += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.classifier]
    return nn.Sequential(*tail).eval()


@pytest.mark.parametrize("method", ZENNIT)
def test_maps_agree_with_zennit_on_a_folded_mobilenetv2(method, monkeypatch):
    # The stabilisers sit at different places; some outputs of a whole network are so small that
    # this alone is 3e-3 of an ε map. Smaller ones leave the rules to compare.
    monkeypatch.setattr(rules, "EPSILON", 1e-10)
    model = randomize(timm.create_model("mobilenetv2_035", num_classes=4), seed=6).eval()
    if method == "lrp_gamma":
        without_biases(model)
    images = torch.randn(2, 3, 64, 64).double()
    targets = torch.tensor([1, 3])
    with torch.no_grad():
        activations = model.blocks[:3](model.bn1(model.conv_stem(images)))
        tail = folded_tail(model, first_stage=3)
        torch.testing.assert_close(tail(activations), model(images), rtol=1e-9, atol=1e-9)
    expected = zennit_maps(method, tail, activations, targets, stabilizer=1e-10)
    (got,) = relevance_maps(model, images, targets, ["blocks.2"], method=method, signed=True)
    assert_maps_close(got, expected)
