"""Relevance through blocks of transformers against dense algebra, and through layer norms."""

from collections.abc import Callable
from functools import partial

import pytest
import reference_tokens
import timm
import torch
import torch.nn.functional as F
from reference import LRP, PLAIN, Node, Walk, relevance
from reference_tokens import randomize_all
from timm.layers import LayerNorm2d, LayerNorm2dFp32, LayerNormFp32
from timm.models.convnext import ConvNeXtBlock
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block as VitBlock
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kd_lrp_plugin.relevance.recording import record, relevance_maps

METHODS = PLAIN + LRP
TARGETS = torch.tensor([0, 2])


# --- one block, against dense algebra -------------------------------------------------------------


class TokenNet(nn.Module):
    """A target layer with maps (n, c, h, w), a block in its layout, a norm, pooling, a head."""

    def __init__(self, block: nn.Module, layout: str, walk_block: Callable) -> None:
        super().__init__()
        self.layer, self.block, self.layout = nn.Identity(), block, layout
        self.walk_block = walk_block
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.layout == "tokens":
            x = torch.cat([self.token.expand(len(x), -1, -1), x.flatten(2).mT], 1)
            return self.head(self.norm(self.block(x))[:, 0])
        if self.layout == "last":
            return self.head(self.norm(self.block(x.permute(0, 2, 3, 1)).flatten(1, 2)).mean(1))
        return self.head(self.norm(self.block(x).flatten(2).mT).mean(1))

    def walk(self, walk: Walk, x: Node) -> Node:
        step = partial(reference_tokens.linearly, walk)
        if self.layout == "tokens":
            n = len(x.value)
            token = walk.add_node(self.token.detach().expand(n, -1, -1))
            x = walk.concat(token, step(lambda m: m.flatten(2).mT, x))
            x = reference_tokens.layer_norm(walk, self.walk_block(walk, self.block, x), self.norm)
            return walk.linear(step(lambda t: t[:, 0], x), self.head)
        if self.layout == "last":
            x = self.walk_block(walk, self.block, step(lambda m: m.permute(0, 2, 3, 1), x))
            x = step(lambda m: m.flatten(1, 2), x)
        else:
            x = step(lambda m: m.flatten(2).mT, self.walk_block(walk, self.block, x))
        x = reference_tokens.layer_norm(walk, x, self.norm)
        return walk.linear(step(lambda t: t.mean(1), x), self.head)


def keep_draws(module: nn.Module, args: tuple, output: Tensor) -> None:
    module.drawn = (output / args[0])[:, :1, :1].detach()


def vit_block() -> nn.Module:
    block = VitBlock(8, 2, mlp_ratio=1.5, qkv_bias=True, init_values=1.0, drop_path=0.4)
    for drop_path in (block.drop_path1, block.drop_path2):
        drop_path.register_forward_hook(keep_draws)
    return block


# name: (block, layout, how the reference walks it)
BLOCKS: dict[str, tuple[Callable[[], nn.Module], str, Callable]] = {
    "vit": (vit_block, "tokens", reference_tokens.vit_block),
    "swin": (
        lambda: SwinTransformerBlock(8, (3, 4), num_heads=2, window_size=2, mlp_ratio=1.5),
        "last",
        reference_tokens.swin_block,
    ),
    "swin shifted and padded": (
        lambda: SwinTransformerBlock(
            8, (3, 4), num_heads=2, window_size=2, shift_size=1, mlp_ratio=1.5
        ),
        "last",
        reference_tokens.swin_block,
    ),
    "convnext": (
        lambda: ConvNeXtBlock(8, kernel_size=3, mlp_ratio=1.5, ls_init_value=1.0),
        "first",
        reference_tokens.convnext_block,
    ),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("method", METHODS)
def test_maps_agree_with_dense_algebra(name, method, training):
    make, *how = BLOCKS[name]
    model = randomize_all(TokenNet(make(), *how), 5).train(training)
    images = torch.randn(2, 8, 3, 4, generator=torch.Generator().manual_seed(6)).double()
    torch.manual_seed(7)  # stochastic depth keeps one branch of one image, and drops another
    with record(model, ["layer"], method) as recording:
        logits = model(images)
    if name == "vit" and training:
        draws = torch.cat([model.block.drop_path1.drawn, model.block.drop_path2.drawn])
        assert {round(float(d), 3) for d in draws} == {0.0, 1.667}
    expected, of_walk = relevance(method, images, TARGETS, model.walk, signed=True)
    torch.testing.assert_close(of_walk, logits.detach(), rtol=1e-10, atol=1e-10)
    (got,) = recording.maps(logits, TARGETS, signed=True)
    scale = expected.abs().max()
    assert scale > 1e-3
    # In relevances, AttnLRP's reference divides by what the package never divides by.
    tolerance = 1e-6 if method == "attn_lrp" else 1e-9
    torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=tolerance)


# --- layer norms ----------------------------------------------------------------------------------


class NormNet(nn.Module):
    """A target layer, a norm on its maps, something that is not linear, pooling, a head."""

    def __init__(self, norm: nn.Module, last: bool) -> None:
        super().__init__()
        self.layer, self.norm, self.last = nn.Conv2d(3, 4, 3), norm, last
        self.act, self.head = nn.SiLU(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.last else self.norm(x)
        return self.head(self.act(x).mean((2, 3)))


# name: (norm, whether it is on the last axis of (n, h, w, c), its axes on (n, c, h, w))
NORMS: dict[str, tuple[Callable[[], nn.Module], bool, tuple[int, ...]]] = {
    "LayerNorm": (lambda: nn.LayerNorm(4), True, (1,)),
    "of timm": (lambda: timm.layers.LayerNorm(4), True, (1,)),
    "in float32": (lambda: LayerNormFp32(4), True, (1,)),
    "for maps": (lambda: LayerNorm2d(4), False, (1,)),
    "for maps in float32": (lambda: LayerNorm2dFp32(4), False, (1,)),
    "without weights": (lambda: nn.LayerNorm(4, elementwise_affine=False), True, (1,)),
    "of positions, too": (lambda: nn.LayerNorm([4, 5, 5]), False, (1, 2, 3)),
    "of a row": (lambda: nn.LayerNorm(5), False, (3,)),
}


@pytest.mark.parametrize("method", ["gradient_activation", "lrp_epsilon", "lrp_zplus", "attn_lrp"])
@pytest.mark.parametrize("name", NORMS)
def test_the_deviation_of_a_layer_norm_is_a_constant(name, method):
    make, last, axes = NORMS[name]
    net = randomize_all(NormNet(make(), last), 9)
    images = torch.randn(2, 3, 7, 7).double()
    if "float32" in name:
        net, images = net.float(), images.float()
    layer = net.layer(images).detach()
    deviation = (layer.var(axes, correction=0, keepdim=True) + net.norm.eps).sqrt()

    def normalise(x: Tensor) -> Tensor:
        y = (x - x.mean(axes, keepdim=True)) / deviation
        if net.norm.weight is None:
            return y
        weight, bias = net.norm.weight.detach(), net.norm.bias.detach()
        if axes == (1,):
            weight, bias = weight[:, None, None], bias[:, None, None]
        return y * weight + bias

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return normalise(x)

    (got,) = relevance_maps(net, images, TARGETS, ["layer"], method, signed=True)
    if method == "gradient_activation":
        x = layer.clone().requires_grad_()
        score = net.head(net.act(normalise(x)).mean((2, 3))).gather(1, TARGETS[:, None]).sum()
        expected = (x * torch.autograd.grad(score, x)[0]).sum(1).detach()
    else:  # the net with the deviation written out as a number
        written = NormNet(Constant(), False).to(images.dtype)
        written.load_state_dict(net.state_dict(), strict=False)
        (expected,) = relevance_maps(written, images, TARGETS, ["layer"], method, signed=True)
    torch.testing.assert_close(got / expected.abs().max(), expected / expected.abs().max())


def test_grad_cam_keeps_the_plain_gradient_of_a_layer_norm():
    net = randomize_all(NormNet(LayerNorm2d(4), False), 9)
    images = torch.randn(2, 3, 7, 7).double()
    x = net.layer(images).detach().requires_grad_()
    score = net.head(net.act(net.norm(x)).mean((2, 3))).gather(1, TARGETS[:, None]).sum()
    (grad,) = torch.autograd.grad(score, x)
    expected = (x * grad.mean((2, 3), keepdim=True)).sum(1).detach()
    (got,) = relevance_maps(net, images, TARGETS, ["layer"], "grad_cam", signed=True)
    torch.testing.assert_close(got, expected)


class Fused(nn.Module):
    """An attention of its own that insists on an operation without a second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT[:, None].contiguous()
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            mixed = F.scaled_dot_product_attention(tokens, tokens, tokens)
        return mixed[:, 0].mT.unflatten(2, (4, 4))


@pytest.mark.parametrize("method", ["grad_cam", "gradient_activation", "lrp_epsilon", "attn_lrp"])
def test_a_fused_attention_that_cannot_be_taken_apart_is_refused_by_name(method):
    layers = [nn.Conv2d(3, 8, 3), Fused(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    net, images = nn.Sequential(*layers), torch.randn(2, 3, 6, 6)
    with pytest.raises(ValueError, match=r"attention as separate operations.*ScaledDotProduct"):
        relevance_maps(net, images, torch.tensor([0, 2]), ["0"], method)
