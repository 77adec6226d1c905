"""Relevance through whole transformers: conservation, derivatives, named models, refusals."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from reference import LRP, PLAIN, randomize
from reference_tokens import randomize_all
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from kd_lrp_plugin.losses import semantic_l2
from kd_lrp_plugin.relevance import rules
from kd_lrp_plugin.relevance.recording import record, relevance_maps

METHODS = PLAIN + LRP
TARGETS = torch.tensor([0, 2])
Untouched = Callable[[nn.Module], AbstractContextManager[None]]


# --- whole nets -----------------------------------------------------------------------------------


def build_vit(name: str = "vit_tiny_patch16_224", **kwargs: object) -> nn.Module:
    settings = {"img_size": 16, "patch_size": 8, "depth": 4, "embed_dim": 24, "num_heads": 2}
    return timm.create_model(name, num_classes=3, **{**settings, **kwargs})


def build_swin(**kwargs: object) -> nn.Module:
    settings = {"img_size": 40, "patch_size": 4, "window_size": 4, "num_heads": (2, 2, 2)}
    settings |= {"embed_dim": 16, "depths": (2, 2, 1), **kwargs}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **settings)


NETS: dict[str, tuple[Callable[[], nn.Module], list[str], int]] = {  # net, layers, size of images
    "vit": (build_vit, [f"blocks.{i}" for i in range(4)], 16),
    "distilled deit": (
        partial(build_vit, "deit_tiny_distilled_patch16_224"),
        [f"blocks.{i}" for i in range(4)],
        16,
    ),
    "swin": (build_swin, ["layers.0.blocks.0", "layers.0", "layers.1.blocks.0", "layers.1"], 40),
}


@pytest.mark.parametrize("method", ["lrp_epsilon", "lrp_zplus", "lrp_gamma", "lrp_composite"])
@pytest.mark.parametrize("name", NETS)
def test_relevance_is_conserved_at_every_layer_without_biases(name, method, monkeypatch):
    monkeypatch.setattr(rules, "EPSILON", 1e-9)
    make, layers, size = NETS[name]
    torch.manual_seed(1)
    net = randomize(make(), 2).eval()
    for key, parameter in net.named_parameters():
        if "bias" in key or "pos_embed" in key:
            parameter.data.zero_()
        elif "token" in key:
            parameter.data.normal_()
    images = torch.randn(2, 3, size, size).double()
    outputs: dict[str, Tensor] = {}  # with the tokens that no map shows
    with record(net, [layer for layer in layers if layer != "blocks.3"], method) as recording:
        for layer in layers:
            net.get_submodule(layer).register_forward_hook(
                lambda _, __, output, layer=layer: outputs.update({layer: output})
            )
        logits = net(images)
    recording.maps(logits, TARGETS)
    score = logits.gather(1, TARGETS[:, None]).squeeze(1)
    with recording._propagation.relevance_pass():
        factors = torch.autograd.grad(score.sum(), list(outputs.values()))
    assert list(outputs) == layers
    for output, factor in zip(outputs.values(), factors, strict=True):
        total = (output * factor).flatten(1).sum(1)
        torch.testing.assert_close(total, score, rtol=1e-4, atol=0)


def list_maps(net: nn.Module, images: Tensor, layers: list[str], method: str) -> list[Tensor]:
    torch.manual_seed(11)  # of dropout and stochastic depth
    with record(net, layers, method) as recording:
        logits = net(images)
    return recording.maps(logits, TARGETS, create_graph=True, signed=True)


def map_loss(maps: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(12)
    return sum(semantic_l2(m, torch.randn(m.shape, generator=generator).double()) for m in maps)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_gradient_of_the_whole_chain_is_exact(name, method, training, monkeypatch):
    # Near a zero of its denominator a stabilised ratio bends: a large stabiliser keeps that away
    # from the finite differences, and leaves the derivative of all the rest to be compared.
    monkeypatch.setattr(rules, "EPSILON", 0.1)
    if name == "vit":
        net = build_vit(
            depth=2, embed_dim=12, init_values=1.0, drop_path_rate=0.2, attn_drop_rate=0.2
        )
        layers, size = ["blocks.0"], 16
    else:
        net = build_swin(img_size=20, window_size=2, embed_dim=4, depths=(2, 1), num_heads=(1, 1))
        layers, size = ["layers.0.blocks.0", "layers.0"], 20
    net = randomize_all(net, 13).train(training)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(14)).double()
    map_loss(list_maps(net, images, layers, method)).backward()
    found = parameters_to_vector(net.parameters()).detach()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
    gradient = torch.cat([grad.flatten() for grad in grads])
    generator = torch.Generator().manual_seed(15)
    ways = F.normalize(torch.randn(4, len(found), generator=generator).double())
    step, numeric = 1e-6, []
    for way in ways:
        sides = []
        for sign in (1, -1):
            vector_to_parameters(found + sign * step * way, net.parameters())
            sides.append(map_loss(list_maps(net, images, layers, method)).item())
        numeric.append((sides[0] - sides[1]) / (2 * step))
    expected = torch.tensor(numeric).double()
    assert expected.norm() > 1e-4
    assert (ways @ gradient - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
def test_the_net_is_left_as_found_after_one_forward_pass(name, method, untouched: Untouched):
    make, _, size = NETS[name]
    net = make().train()
    assert any(getattr(module, "fused_attn", None) for module in net.modules()) or name == "swin"
    images, calls = torch.randn(2, 3, size, size), []
    handle = net.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    with untouched(net), record(net, "auto", method) as recording:
        logits = net(images)
    handle.remove()
    assert len(calls) == 1
    maps = recording.maps(logits, TARGETS, create_graph=True)
    with untouched(deepcopy(net)):
        recording.maps(logits, TARGETS)
    sum(m.square().sum() for m in maps).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_fused_attention_gives_the_maps_of_separate_operations(method):
    net = build_vit().eval()
    images = torch.randn(2, 3, 16, 16)
    apart = deepcopy(net)
    for module in apart.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    first, second = (relevance_maps(n, images, TARGETS, "auto", method) for n in (net, apart))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_under_autocast_maps_are_those_in_float32_of_the_same_features(name, method):
    make, _, size = NETS[name]
    torch.manual_seed(2)
    net, images, kept = make().eval(), torch.randn(2, 3, size, size), []
    with torch.autocast("cpu", torch.bfloat16), record(net, "auto", method) as recording:
        first = net.get_submodule(recording.layers[0])
        handle = first.register_forward_hook(lambda _, __, y: kept.append(y), prepend=True)
        logits = net(images)
        handle.remove()
    maps = recording.maps(logits, TARGETS)
    first.register_forward_hook(lambda *_: kept[0].detach().float())
    expected = relevance_maps(net, images, TARGETS, "auto", method)
    assert {m.dtype for m in (*maps, logits)} == {torch.float32}
    assert all(map(torch.equal, maps, expected))


# --- named models ---------------------------------------------------------------------------------

SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
NAMED: dict[str, tuple[dict, int]] = {  # settings, size of images
    "vit_small_patch16_224": ({"img_size": 16, "patch_size": 8, "depth": 4, "embed_dim": 12}, 16),
    "deit3_small_patch16_224": ({"img_size": 16, "patch_size": 8, "depth": 4, "embed_dim": 12}, 16),
    "swin_s3_tiny_224": ({"img_size": 32, "depths": (1, 1, 2, 1), "embed_dim": 12}, 32),
    "visformer_tiny": ({"img_size": 32, "embed_dim": 32, "depth": (1, 1, 1), "num_heads": 2}, 32),
    "convnext_tiny": (SMALL, 32),
    "convnext_atto": (SMALL, 32),
    "mobilevit_xxs": ({}, 32),
}  # fmt: skip
REFUSED = {  # by LRP, as long as an operation in them has no rule
    "convnextv2_atto": (SMALL, 32, r"at 'stages.*grn|PowBackward|DivBackward|VectorNorm"),
    "swinv2_tiny_window8_256": (
        {"img_size": 32, "window_size": 4, "depths": (1, 1, 1, 1), "embed_dim": 12,
         "num_heads": (1, 1, 1, 1)}, 32, "Backward",
    ),
    "mobilevitv2_050": ({}, 32, "Backward"),
    "beit_base_patch16_224": (
        {"img_size": 16, "patch_size": 8, "depth": 4, "embed_dim": 24, "num_heads": 2}, 16,
        "AddmmBackward",
    ),
}  # fmt: skip


def build_named(name: str, settings: dict) -> nn.Module:
    torch.manual_seed(16)
    heads = {"num_heads": 2} if name.startswith(("vit", "deit")) else {}
    if name.startswith("swin_"):
        heads = {"num_heads": (1, 1, 1, 1), "window_size": (4, 4, 2, 1)}
    return timm.create_model(name, num_classes=3, **heads, **settings).train()


@pytest.mark.parametrize("name", NAMED)
def test_named_models_have_maps_with_finite_gradients_by_every_method(name):
    settings, size = NAMED[name]
    net, images = build_named(name, settings), torch.randn(2, 3, size, size)
    for method in METHODS:
        net.zero_grad()
        with record(net, "auto", method) as recording:
            logits = net(images)
        maps = recording.maps(logits, TARGETS, create_graph=True, signed=True)
        assert len(maps) > 1
        assert all(m.isfinite().all() and m.any() for m in maps)
        (sum(m.square().sum() for m in maps) + F.cross_entropy(logits, TARGETS)).backward()
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        assert len(grads) > len(list(net.parameters())) / 2
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", REFUSED)
def test_named_models_with_operations_of_their_own_are_refused_by_name(name):
    settings, size, words = REFUSED[name]
    net, images = build_named(name, settings), torch.randn(2, 3, size, size)
    with pytest.raises(ValueError, match=words):
        relevance_maps(net, images, TARGETS, "auto", "attn_lrp")


# --- attention that is not timm's -----------------------------------------------------------------


class Mixed(nn.Module):
    """Attention over the positions of a map; ``fused_attn`` marks it as timm's."""

    def __init__(self, way: str = "plain") -> None:
        super().__init__()
        self.layer, self.qkv = nn.Conv2d(3, 4, 3), nn.Linear(4, 12)
        self.attn_drop, self.proj, self.head = nn.Dropout(0.0), nn.Linear(4, 4), nn.Linear(4, 3)
        self.way = way
        if way != "unmarked":
            self.fused_attn = True
        if way == "without proj":
            self.out, self.proj = self.proj, None

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x).flatten(2).mT
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.way == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = q @ k.mT
            if self.way == "scores of features":
                scores = scores + q.mean(-1, keepdim=True)
            y = self.attn_drop(scores.softmax(-1)) @ v
        if self.way == "with a shortcut":
            y = y + v
        if self.way == "read twice":
            return self.head((self.proj(y) + y).mean(1))
        return self.head((self.out if self.proj is None else self.proj)(y).mean(1))


WAYS = {
    "unmarked": "(Softmax|Bmm)Backward",
    "fused": "(Softmax|Bmm)Backward",
    "with a shortcut": "one product of two matrices in front, read by nothing else",
    "read twice": "one product of two matrices in front, read by nothing else",
    "scores of features": "one product of two matrices in front, read by nothing else",
    "without proj": "an attention with attn_drop and proj",
}


@pytest.mark.parametrize("way", WAYS)
def test_attention_of_another_form_is_refused_by_attn_lrp(way):
    torch.manual_seed(17)
    with pytest.raises(ValueError, match=f"attn_lrp.*{WAYS[way]}"):
        relevance_maps(Mixed(way), torch.randn(2, 3, 6, 6), TARGETS, ["layer"], "attn_lrp")
    plain = Mixed()
    relevance_maps(plain, torch.randn(2, 3, 6, 6), TARGETS, ["layer"], "attn_lrp")


@pytest.mark.parametrize("layers", [["blocks.0", "blocks.1.attn.norm"], ["blocks.1.attn.norm"]])
def test_a_layer_whose_relevance_is_halved_for_the_product_is_refused_by_attn_lrp(layers):
    net = build_vit(depth=2, class_token=False, global_pool="avg")
    images = torch.randn(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"attn_lrp at 'blocks.1.attn'.*read by nothing else"):
        relevance_maps(net, images, TARGETS, layers, "attn_lrp")
    relevance_maps(net, images, TARGETS, ["blocks.0", "blocks.1.attn.proj"], "attn_lrp")


def test_a_fused_attention_of_pytorch_can_be_trained_through_by_gradients():
    torch.manual_seed(18)
    net = Mixed("fused")
    images, maps = torch.randn(2, 3, 6, 6), []
    for way in ("fused", "plain"):
        net.way = way
        scale = 1.0 if way == "fused" else 0.5  # of the queries, 4 to the power of -1/2
        net.qkv.weight.data[:4] *= scale
        net.qkv.bias.data[:4] *= scale
        with record(net, ["layer"]) as recording:
            logits = net(images)
        assert torch.backends.cuda.flash_sdp_enabled()  # also of a CPU, and on again
        maps += recording.maps(logits, TARGETS, create_graph=True, signed=True)
        maps[-1].square().sum().backward()
    torch.testing.assert_close(*maps)


def test_a_kernel_that_the_net_chooses_is_refused():
    class Chosen(Mixed):
        def forward(self, x: Tensor) -> Tensor:
            kinds = torch.nn.attention.SDPBackend
            with torch.nn.attention.sdpa_kernel(kinds.FLASH_ATTENTION):
                return super().forward(x)

    with pytest.raises(ValueError, match="attention as separate operations, got ScaledDotProduct"):
        relevance_maps(Chosen("fused"), torch.randn(2, 3, 6, 6), TARGETS, ["layer"])


def test_a_class_that_is_marked_is_left_as_found(untouched: Untouched):
    class Marked(Mixed):
        fused_attn = True

    net = Marked("unmarked")
    with untouched(net):
        relevance_maps(net, torch.randn(2, 3, 6, 6), TARGETS, ["layer"], "attn_lrp")
    Marked.fused_attn = False
    assert not net.fused_attn


def test_a_softmax_gate_has_no_rule_in_attn_lrp():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax(1), nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ValueError, match=r"attn_lrp.*SoftmaxBackward"):
        relevance_maps(net, torch.randn(2, 3, 6, 6), TARGETS, ["0"], "attn_lrp")
