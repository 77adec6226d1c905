"""Outputs in three layouts read as maps, and outputs that have no positions refused by name."""

from collections.abc import Sequence

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models.nest import Nest
from torch import Tensor, nn

from kd_lrp_plugin.attribution.methods import attribute
from kd_lrp_plugin.losses import relation_cosine, resize_maps, semantic_cosine
from kd_lrp_plugin.relevance.layouts import find_layout
from kd_lrp_plugin.relevance.recording import record, relevance_maps
from kd_lrp_plugin.relevance.target_layers import choose_layers

TARGETS = torch.tensor([0, 2])


def build(name: str = "vit_tiny_patch16_224", **kwargs: object) -> nn.Module:
    torch.manual_seed(3)
    settings = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 12, "num_heads": 2}
    return timm.create_model(name, num_classes=3, **{**settings, **kwargs}).eval()


def build_swin(**kwargs: object) -> nn.Module:
    torch.manual_seed(3)
    settings = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (2, 1)}
    settings |= {"num_heads": (2, 2), "patch_size": 4, **kwargs}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **settings).eval()


def images(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(4))


def heard(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    """What the layer gives, without a recording."""
    kept: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _, __, y: kept.append(y))
    model(x)
    handle.remove()
    return kept[0]


# --- the three layouts ----------------------------------------------------------------------------

TOKENS = {  # how to build the net, and how many tokens stand in front of the patches
    "class token": (build, 1),
    "class and registers": (lambda: build(reg_tokens=3), 4),
    "class and distillation": (lambda: build("deit_tiny_distilled_patch16_224"), 2),
    "none": (lambda: build(class_token=False, global_pool="avg"), 0),
    "embedding without class": (lambda: build("deit3_small_patch16_224"), 1),
    "not square": (lambda: build(img_size=(32, 16)), 1),
    "of the image's size": (lambda: build(dynamic_img_size=True), 1),
}


@pytest.mark.parametrize("kind", TOKENS)
def test_tokens_become_maps_and_stay_in_the_graph(kind):
    make, prefix = TOKENS[kind]
    model = make()
    size = {"not square": (32, 16), "of the image's size": (24, 40)}.get(kind, (32, 32))
    x = images(*size)
    rows, columns = size[0] // 8, size[1] // 8
    raw = heard(model, "blocks.0", x)
    with record(model, ["blocks.0"]) as recording:
        logits = model(x)
    (features,) = recording.activations
    assert features.shape == (2, 12, rows, columns)
    for row in range(rows):
        for column in range(columns):
            token = raw[:, prefix + row * columns + column]
            torch.testing.assert_close(features[:, :, row, column], token)
    torch.testing.assert_close(logits, model(x))  # whose attention is the fused one
    assert torch.autograd.grad(logits.sum(), features, retain_graph=True)[0].abs().max() > 0
    (map_,) = recording.maps(logits, TARGETS)
    assert map_.shape == (2, rows, columns)


def test_channels_last_become_maps_and_stay_in_the_graph():
    model, x = build_swin(), images()
    raw = heard(model, "layers.0", x)
    with record(model, ["layers.0"]) as recording:
        logits = model(x)
    (features,) = recording.activations
    assert torch.equal(features, raw.permute(0, 3, 1, 2))
    assert torch.equal(logits, model(x))
    assert torch.autograd.grad(logits.sum(), features, retain_graph=True)[0].abs().max() > 0
    assert recording.maps(logits, TARGETS)[0].shape == (2, 8, 8)


@pytest.mark.parametrize("make", [build, build_swin], ids=["tokens", "channels last"])
def test_grad_cam_is_that_of_autograd(make):
    model, x = make(), images()
    layer = "blocks.0" if make is build else "layers.0"
    kept: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _, __, y: kept.append(y))
    score = model(x).gather(1, TARGETS[:, None]).sum()
    handle.remove()
    (raw,) = kept
    (grad,) = torch.autograd.grad(score, raw)
    if make is build:  # 16 patches behind a class token
        raw, grad = raw[:, 1:], grad[:, 1:]
        expected = (raw * grad.mean(1, keepdim=True)).sum(2).reshape(2, 4, 4)
    else:
        expected = (raw * grad.mean((1, 2), keepdim=True)).sum(3)
    (got,) = relevance_maps(model, x, TARGETS, [layer], "grad_cam", signed=True)
    torch.testing.assert_close(got, expected.detach())


@pytest.mark.parametrize("make", [build, build_swin], ids=["tokens", "channels last"])
@pytest.mark.parametrize("method", ["gradient_activation", "lrp_epsilon", "attn_lrp"])
def test_a_frozen_teacher_gives_the_same_maps(make, method):
    model, x = make(), images()
    layers = ["blocks.0"] if make is build else ["layers.0.blocks.0", "layers.0"]
    expected = relevance_maps(model, x, TARGETS, layers, method)
    teacher = model.requires_grad_(False)
    with torch.no_grad():
        with record(teacher, layers, method) as recording:
            logits = teacher(x)
        assert recording.activations[0].grad_fn is None
        torch.testing.assert_close(recording.maps(logits, TARGETS), expected)


# --- which layout it is ---------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, *layers: nn.Module, output_fmt: str | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if output_fmt:
            self.output_fmt = output_fmt


SHAPES = {  # layer, its output, the images: whether the channels are last
    "square maps": (Block(), (2, 5, 8, 8), (32, 32), False),
    "square maps, channels last": (Block(), (2, 8, 8, 5), (32, 32), True),
    "of an oblong image": (Block(), (2, 5, 8, 4), (32, 16), False),
    "of an oblong image, last": (Block(), (2, 8, 4, 5), (32, 16), True),
    "of valid convolutions": (Block(), (2, 5, 22, 14), (48, 32), False),
    "a cube of convolutions": (Block(nn.Conv2d(1, 1, 1)), (2, 8, 8, 8), (32, 32), False),
    "a cube of linear layers": (Block(nn.Linear(1, 1)), (2, 8, 8, 8), (32, 32), True),
    "a cube of both": (Block(nn.Linear(1, 1), nn.Conv2d(1, 1, 1)), (2, 8, 8, 8), (32, 32), False),
    "a cube by timm's word": (
        Block(nn.Linear(1, 1), nn.Conv2d(1, 1, 1), output_fmt="NHWC"), (2, 8, 8, 8), (32, 32), True,
    ),
    "a cube of a norm for maps": (LayerNorm2d(1), (2, 8, 8, 8), (32, 32), False),
    "a convolution of another aspect": (nn.Conv2d(1, 1, 1), (2, 5, 8, 4), (32, 32), False),
    "convolutions of another aspect": (Block(nn.Conv2d(1, 1, 1)), (2, 8, 8, 4), (32, 32), False),
    "an embedding by timm's word": (
        Block(nn.Conv2d(1, 1, 1), output_fmt="NHWC"), (2, 8, 8, 5), (32, 32), True,
    ),
    "without a known image": (Block(nn.Linear(1, 1)), (2, 8, 8, 5), None, True),
    "of one row": (Block(), (2, 5, 1, 1), (32, 32), False),
}  # fmt: skip


@pytest.mark.parametrize("kind", SHAPES)
def test_where_the_channels_are_is_found(kind):
    layer, shape, size, last = SHAPES[kind]
    model = nn.ModuleDict({"layer": layer})
    image_shape = None if size is None else (2, 3, *size)
    layout = find_layout(model, "layer", torch.zeros(shape), image_shape)
    assert (layout.channels_last, layout.grid) == (last, None)


def refusal(
    model: nn.Module, layer: str, image_shape: Sequence[int] | None, output: object
) -> pytest.ExceptionInfo:
    with pytest.raises(ValueError, match=f"layer '{layer}'") as error:
        find_layout(model, layer, output, image_shape)
    return error


def test_tokens_in_four_axes_are_refused():
    model = nn.ModuleDict({"layer": Block(nn.Linear(1, 1))})
    error = refusal(model, "layer", (2, 3, 32, 32), torch.zeros(2, 4, 16, 5))
    assert error.match(r"\(4, 16, 5\), of which no two axes are those of \(32, 32\)")


@pytest.mark.parametrize("output", [torch.zeros(2, 5), (torch.zeros(2, 5, 4, 4),), None])
def test_what_is_no_map_is_refused(output):
    error = refusal(nn.ModuleDict({"layer": Block()}), "layer", None, output)
    assert error.match(r"\(n, c, h, w\), \(n, h, w, c\), or of tokens \(n, l, c\)")


class TestRefusedLayers:
    def refuse(self, model: nn.Module, layer: str, words: str) -> None:
        for method in ("gradient_activation", "lrp_epsilon", "attn_lrp"):
            with pytest.raises(ValueError, match=f"layer '{layer}'.*{words}"):
                relevance_maps(model, images(), TARGETS, [layer], method)

    def test_pooled_tokens(self):
        self.refuse(build(), "fc_norm", r"got \(2, 12\)")

    def test_dropped_tokens(self):
        model = build(patch_drop_rate=0.5).train()
        self.refuse(model, "blocks.0", r"4 x 4 tokens of patches behind 1 others, got 9")

    def test_tokens_without_a_grid(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(2), nn.AvgPool1d(16), nn.Flatten())
        self.refuse(model, "1", "no timm patch_embed around it that has a grid")

    @pytest.mark.parametrize("layer", ["attn", "attn.qkv", "attn.proj", "norm1"])
    def test_inside_a_window(self, layer):
        model = build_swin(depths=(2, 1))
        if layer == "norm1":  # in front of the windows: a map
            (map_,) = relevance_maps(model, images(), TARGETS, ["layers.0.blocks.1.norm1"])
            assert map_.shape == (2, 8, 8)
            return
        name = f"layers.0.blocks.1.{layer}"
        self.refuse(model, name, "one map per image, got 8 for 2 images, as inside the windows")

    def test_inside_the_patches_of_mobilevit(self):
        model = timm.create_model("mobilevit_xxs", num_classes=3).eval()
        self.refuse(model, "stages.2.1.transformer.0", "one map per image")

    def test_inside_the_blocks_of_nest(self):
        settings = {"patch_size": 4, "embed_dims": (4, 4, 8), "num_heads": (1, 1, 1)}
        model = Nest(img_size=64, num_classes=3, depths=(1, 1, 1), **settings).eval()
        x = images(64, 64)
        (map_,) = relevance_maps(model, x, TARGETS, ["levels.0"])
        assert map_.shape == (2, 16, 16)
        # As many positions in a block as there are blocks, and as rows and columns in a map.
        assert heard(model, "levels.0.transformer_encoder", x).shape == (2, 16, 16, 4)
        with pytest.raises(ValueError, match=r"'levels\.0\.transformer_encoder'.*what cuts maps"):
            relevance_maps(model, x, TARGETS, ["levels.0.transformer_encoder"])

    @pytest.mark.parametrize("layer", ["attn.attn_drop", "attn.q_norm"])
    def test_weights_and_heads_of_an_attention(self, layer):
        self.refuse(build(), f"blocks.0.{layer}", "inside an attention")


def test_a_last_block_of_which_the_class_token_alone_is_read_is_refused():
    for method in ("grad_cam", "gradient_activation", "lrp_epsilon", "attn_lrp"):
        with pytest.raises(ValueError, match=r"'blocks.1'.*relevance of the patches.*class tokens"):
            relevance_maps(build(), images(), torch.tensor([0, 0]), ["blocks.1"], method)
    nothing = torch.zeros(2, 3)
    assert relevance_maps(build(), images(), nothing, ["blocks.1"])[0].eq(0).all()
    pooled = build(class_token=False, global_pool="avg")
    assert relevance_maps(pooled, images(), TARGETS, ["blocks.1"], signed=True)[0].any()


# --- auto -----------------------------------------------------------------------------------------

QUARTERS = {12: [2, 5, 8], 8: [1, 3, 5], 6: [1, 2, 4], 4: [0, 1, 2], 2: [0]}


@pytest.mark.parametrize("depth", QUARTERS)
def test_auto_takes_the_quarters_of_an_isotropic_net(depth):
    assert choose_layers(build(depth=depth)) == [f"blocks.{i}" for i in QUARTERS[depth]]


def test_auto_takes_the_stages_of_a_pyramid():
    assert choose_layers(build_swin(depths=(1, 1, 1), num_heads=(1, 1, 1))) == [
        "layers.0",
        "layers.1",
    ]


def test_stages_that_are_no_modules_are_not_taken():
    model = timm.create_model("test_resnet", num_classes=3)
    expected = choose_layers(timm.create_model("test_resnet", num_classes=3))
    for entry in model.feature_info:
        entry["module"] = f"stages.{entry['module']}"
    assert choose_layers(model) == expected


# --- across architectures -------------------------------------------------------------------------

PAIRS = {
    "transformer teaches CNN": (build, lambda: timm.create_model("test_resnet", num_classes=3)),
    "CNN teaches transformer": (lambda: timm.create_model("test_resnet", num_classes=3), build),
    "Swin teaches ViT": (build_swin, build),
}


@pytest.mark.parametrize("method", ["gradient_activation", "lrp_zplus", "attn_lrp"])
@pytest.mark.parametrize("pair", PAIRS)
def test_maps_and_features_of_one_architecture_teach_another(pair, method):
    teacher, student = (make() for make in PAIRS[pair])
    student.train()
    found = []
    for model in (teacher.eval().requires_grad_(False), student):
        layer = choose_layers(model)[-1]
        with record(model, [layer], method) as recording:
            logits = model(images())
        found.append((recording.maps(logits, TARGETS, create_graph=model is student), recording))
    ((of_teacher,), taught), ((of_student,), learning) = found
    resized = resize_maps(of_teacher, of_student.shape[1:])
    loss = semantic_cosine(of_student, resized)
    loss = loss + relation_cosine(learning.activations[0], taught.activations[0])
    loss.backward()
    weight = next(p for p in student.parameters() if p.ndim == 4)
    assert weight.grad.isfinite().all()
    assert weight.grad.abs().max() > 0


@pytest.mark.parametrize("make", [build, build_swin], ids=["tokens", "channels last"])
def test_score_cam_asks_with_each_channel_of_the_maps(make):
    model, x = make(), images()
    layer = "blocks.0" if make is build else "layers.0"
    raw = heard(model, layer, x).detach()
    channels = raw[:, 1:].mT.reshape(2, 12, 4, 4) if make is build else raw.permute(0, 3, 1, 2)
    expected = []
    for image, target, of_image in zip(x, TARGETS, channels, strict=True):
        scores = []
        for channel in of_image:
            large = F.interpolate(channel[None, None], (32, 32), mode="bilinear")[0, 0]
            mask = (large - large.min()) / (large.max() - large.min())
            scores.append(model((image * mask)[None])[0, target])
        weights = torch.stack(scores).softmax(0)
        expected.append((weights[:, None, None] * of_image).sum(0).relu().detach())
    got = attribute(model, x, TARGETS, "score_cam", layer)
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-4, atol=1e-5)
