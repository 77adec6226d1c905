"""Maps from a recorded forward pass: exact derivatives, known facts, clean models, refusals."""

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

from kd_lrp_plugin.losses import correlation_l2, relation_cosine, semantic_cosine, semantic_l2
from kd_lrp_plugin.relevance import record, relevance_maps

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
    return timm.create_model(name, num_classes=4, **SETTINGS[name], **extra)


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

TAPS = ["silu", "middle"]


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
    with record(net, TAPS, method) as recording:
        logits = net(images)
    maps = recording.maps(logits, targets, signed=True)
    positive = map_losses([m.relu() for m in maps], signed=False)
    return torch.stack([positive, map_losses(maps, signed=True)]).detach()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_of_the_whole_chain_is_exact_for_every_weight(method, training):
    net, images, targets = small_net()
    net.train(training)
    # y / stab(y) bends within 1e-6 of zero: its third derivative would show beyond 1e-3.
    assert distance_from_kinks(deepcopy(net), images) > 1e-3
    analytic = []
    for signed in (False, True):
        net.zero_grad()
        with record(net, TAPS, method) as recording:
            logits = net(images)
        maps = recording.maps(logits, targets, create_graph=True, signed=signed)
        map_losses(maps, signed).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
        analytic.append(torch.cat([grad.flatten() for grad in grads]))
    numeric = []
    step = 1e-7  # a small z+ denominator makes the third derivative large: the error falls as step²
    for parameter in net.parameters():
        weights = parameter.data.view(-1)
        for i in range(len(weights)):
            found = weights[i].item()
            weights[i] = found + step
            above = both_losses(net, images, targets, method)
            weights[i] = found - step
            below = both_losses(net, images, targets, method)
            weights[i] = found
            numeric.append((above - below) / (2 * step))
    expected = torch.stack(numeric, 1)
    for got, wanted in zip(analytic, expected, strict=True):
        assert wanted.norm() > 1e-3
        assert (got - wanted).norm() / wanted.norm() < 1e-6
