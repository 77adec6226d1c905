"""Multiply-accumulates against closed forms: whatever computes them, and whatever shape it has."""

import copy
import warnings
from types import MethodType

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from kd_lrp_plugin.metrics.counting import (
    count_flops,
    count_flops_keras,
    count_macs,
    count_macs_by_thop,
    explain_counters,
)
from kd_lrp_plugin.metrics.efficiency import cost
from kd_lrp_plugin.models import mnist


class Applied(nn.Module):
    """A model whose forward pass is a function of the images and some modules."""

    def __init__(self, forward, *modules: nn.Module, **parameters: torch.Tensor) -> None:
        super().__init__()
        self.apply_to = forward
        self.parts = nn.ModuleList(modules)
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, images):
        return self.apply_to(self, images)


def tokens(images):
    """(1, channels, h, w) as a sequence (1, h·w, channels)."""
    return images.flatten(2).mT


class TestConvolution:
    @pytest.mark.parametrize("size", [64, 224])
    @pytest.mark.parametrize(
        ("name", "kwargs"),
        [
            ("mobilenetv2_100", {}),
            ("mobilenetv2_100", {"pad_type": "same"}),
            ("resnet18", {}),  # plain batch norms, which thop would count
            ("mobilenetv3_small_100", {}),  # squeeze-and-excite
        ],
    )
    def test_networks_cost_what_thop_counts(self, name, kwargs, size):
        model = timm.create_model(name, num_classes=4, **kwargs)
        assert count_macs(model, size) == count_macs_by_thop(model, size)

    def test_mobilenet_with_same_padding_costs_what_is_published(self):
        model = timm.create_model("mobilenetv2_100", num_classes=4, pad_type="same")
        assert round(count_macs(model, 224) / 1e6, 1) == 299.5

    def test_a_grouped_one_follows_the_formula(self):
        model = nn.Conv2d(4, 6, kernel_size=(3, 5), stride=2, groups=2, padding=(1, 2))
        assert count_macs(model, image_size=8, channels=4) == 4 * 4 * 6 * (4 // 2) * 3 * 5

    def test_a_transposed_one_counts_for_each_input(self):
        model = nn.ConvTranspose2d(4, 6, kernel_size=3, stride=2, groups=2)
        assert count_macs(model, image_size=5, channels=4) == 5 * 5 * 4 * 3 * 9

    def test_subclasses_count(self):
        class Convolution(nn.Conv2d): ...

        class Linear(nn.Linear): ...

        model = nn.Sequential(Convolution(3, 2, 1), nn.Flatten(), Linear(2 * 4 * 4, 5))
        assert count_macs(model, image_size=4) == 4 * 4 * 3 * 2 + 32 * 5

    def test_a_function_counts(self):
        model = Applied(lambda m, x: functional.conv2d(x, m.weight), weight=torch.randn(8, 3, 3, 3))
        assert count_macs(model, 10) == 8 * 8 * 8 * 3 * 9

    def test_kernels_mixed_for_each_image_count_with_their_mixing(self):
        """CondConv: routing over experts, and the convolution of their mixture."""
        experts = timm.layers.CondConv2d(3, 8, 3, padding=1, num_experts=4)
        routing = nn.Linear(3, 4)
        model = Applied(
            lambda m, x: m.parts[0](x, m.parts[1](x.mean((2, 3))).sigmoid()), experts, routing
        )
        assert count_macs(model, 10) == 3 * 4 + 4 * 8 * 3 * 9 + 10 * 10 * 8 * 3 * 9
        network = timm.create_model("efficientnet_cc_b0_4e", num_classes=4)
        assert round(count_macs(network, 224) / 1e6) == 395

    def test_a_deformable_one_counts_beside_its_offsets(self):
        offsets = nn.Conv2d(3, 18, 3, padding=1)
        deformable = torchvision.ops.DeformConv2d(3, 8, 3, padding=1)
        model = Applied(lambda m, x: m.parts[1](x, m.parts[0](x)), offsets, deformable)
        assert count_macs(model, 10) == 100 * 27 * (18 + 8)

    @pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 2), (torch.bfloat16, 3)])
    def test_counts_in_any_precision(self, dtype, size):
        assert count_macs(nn.Conv2d(1, 1, 1).to(dtype), size, channels=1) == size**2


class TestSharing:
    def test_a_module_counts_once_for_each_call(self):
        """Two parents with the same layer, which each calls once, and a third name for it."""
        layer = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        model = nn.Sequential(nn.Sequential(layer), nn.Sequential(layer))
        model[0].add_module("alias", nn.ModuleDict({"unused": layer}))
        model[0].forward = MethodType(lambda self, x: self[0](x), model[0])
        assert count_macs(model, 8) == 2 * 64 * 81 == 10_368

    def test_coat_counts_its_shared_encodings_as_often_as_it_calls_them(self):
        model = timm.create_model("coat_lite_tiny")
        assert round(count_macs(model, 224) / 1e9, 3) == 1.589


def weight_normed(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older way, by a hook
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        weight_normed,
        nn.utils.spectral_norm,
    ],
)
@pytest.mark.parametrize("trained", [False, True])
def test_a_layer_whose_weight_is_made_costs_what_the_layer_costs(change, trained, untouched):
    model = nn.Sequential(change(nn.Conv2d(3, 5, 3, padding=1)), nn.Flatten(), nn.Linear(160, 27))
    macs = 32 * 5 * 27 + 160 * 27
    if trained:
        model(torch.randn(2, 3, 4, 8)).sum().backward()
    with untouched(model):
        record = cost(model, (4, 8), batch_sizes=())
    assert record["macs"] == record["macs_by_thop"] == macs
    assert model(torch.randn(2, 3, 4, 8)).shape == (2, 27)  # still parametrized, still works
    model(torch.randn(1, 3, 4, 8)).sum().backward()


class TestAttention:
    @pytest.mark.slow
    def test_of_torchvision_is_counted_in_its_fast_path(self):
        model = torchvision.models.vit_b_16()
        assert count_macs(model, 224) == 17_563_828_224

    def test_of_timm_is_counted_in_its_fused_kernel(self):
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
        record = cost(model, 224, batch_sizes=())
        length, width, depth = 14 * 14 + 1, 192, 12
        products = depth * 2 * length * length * width  # queries by keys, weights by values
        assert record["macs"] - record["macs_by_thop"] == products
        assert record["counters_differ_by"] == products / record["macs"]

    @pytest.mark.parametrize("need_weights", [False, True])
    def test_of_torch_is_counted_in_every_mode(self, need_weights):
        layer = nn.MultiheadAttention(16, 2, batch_first=True)

        def attend(model, images):
            x = tokens(images)
            return model.parts[0](x, x, x, need_weights=need_weights)[0]

        model = Applied(attend, layer)
        assert count_macs(model, (2, 3), channels=16) == 4 * 6 * 16 * 16 + 2 * 6 * 6 * 16

    def test_of_an_encoder_is_counted_with_its_layers(self):
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        model = Applied(lambda m, x: m.parts[0](tokens(x)), nn.TransformerEncoder(layer, 2))
        each = 4 * 6 * 16 * 16 + 2 * 6 * 6 * 16 + 2 * 6 * 16 * 32
        assert count_macs(model, (2, 3), channels=16) == 2 * each

    def test_of_a_kernel_that_the_model_asks_for_is_counted(self):
        def attend(_, images):
            x = tokens(images)[:, None].contiguous()
            with nn.attention.sdpa_kernel(nn.attention.SDPBackend.FLASH_ATTENTION):
                return functional.scaled_dot_product_attention(x, x, x)

        assert count_macs(Applied(attend), (2, 3), channels=16) == 2 * 6 * 6 * 16

    def test_keeps_torchs_fast_path_as_it_was(self):
        for enabled in (True, False):
            torch.backends.mha.set_fastpath_enabled(enabled)
            try:
                with pytest.raises(RuntimeError):
                    count_macs(nn.Conv2d(3, 1, 1), 4, channels=2)
                assert torch.backends.mha.get_fastpath_enabled() is enabled
            finally:
                torch.backends.mha.set_fastpath_enabled(True)


class TestProducts:
    @pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
    def test_of_recurrent_layers_count_for_each_step(self, kind, gates):
        layer = kind(5, 7, num_layers=2, bidirectional=True, batch_first=True)
        model = Applied(lambda m, x: m.parts[0](tokens(x))[0], layer)
        macs = 6 * 2 * gates * (7 * (5 + 7) + 7 * (14 + 7))
        assert count_macs(model, (2, 3), channels=5) == macs

    def test_of_vectors_and_batches_count(self):
        def multiply(model, images):
            x = images.flatten()
            batch = images[0]
            products = torch.addmv(model.bias, model.weight, x) + model.weight @ x + x.dot(x)
            return products.sum() + torch.addbmm(torch.zeros(4, 4), batch, batch).sum()

        model = Applied(multiply, weight=torch.randn(5, 48), bias=torch.randn(5))
        assert count_macs(model, 4) == 2 * 5 * 48 + 48 + 3 * 4 * 4 * 4

    def test_of_two_inputs_count(self):
        model = Applied(lambda m, x: m.parts[0](x, x), nn.Bilinear(4, 4, 6))
        assert count_macs(model, 4) == 3 * 4 * 4 * 4 * 6

    def test_of_einsum_count(self):
        model = Applied(lambda m, x: torch.einsum("nchw,cd->ndhw", x, m.w), w=torch.randn(3, 7))
        assert count_macs(model, 4) == 4 * 4 * 3 * 7


class TestImageSize:
    def test_is_a_side_or_height_and_width(self):
        model = nn.Conv2d(3, 8, 3, padding=1)
        assert count_macs(model, (5, 20)) == count_macs(model, 10) == 21_600

    def test_that_is_not_square_costs_what_it_holds(self):
        model = timm.create_model("mobilenetv2_100", num_classes=4)
        square, wide = count_macs(model, 128), count_macs(model, (32, 128))
        assert wide - 1280 * 4 == (square - 1280 * 4) / 4
        assert cost(model, (32, 128), batch_sizes=())["macs"] == wide


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_the_model_as_it_was(training):
    model = timm.create_model("mobilenetv2_035", pad_type="same").train(training)
    model.bn1.eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    count_macs(model, 64)
    count_macs_by_thop(model, 64)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def test_a_forward_that_holds_the_original_leaves_it_as_it_was(untouched):
    """Adapters patch instances; a copy of such a model still runs the original."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
    model.forward = lambda images: model[1](model[0](images) + 1)
    with untouched(model):
        assert count_macs(model, 10) == 21_600


def test_a_model_that_keeps_what_it_computed_is_counted():
    """What belongs to a graph cannot be copied; hooks and models keep it as they like."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))
    model.kept = []
    model[0].register_forward_hook(lambda module, _, output: model.kept.append(output))
    model(torch.randn(2, 3, 10, 10))
    model.last = model.kept[0]
    assert count_flops(model, 10) == 2 * 21_600


class TestComparison:
    def test_says_where_the_counters_differ(self):
        record = cost(nn.ConvTranspose2d(3, 2, 2), 4, batch_sizes=())
        assert record["macs_by_thop"] == 0 < record["macs"]
        assert record["counters_differ_by"] == 1
        assert "100 % apart" in explain_counters("student", record)

    def test_is_silent_where_they_agree(self):
        record = cost(nn.Conv2d(3, 2, 2), 4, batch_sizes=())
        assert explain_counters("student", record) is None

    def test_does_without_thop_where_that_fails(self, monkeypatch):
        monkeypatch.setattr("thop.profile", lambda *_, **__: 1 / 0)
        record = cost(nn.Conv2d(3, 2, 1), 4, batch_sizes=())
        assert record["macs"] == 4 * 4 * 3 * 2
        assert record["macs_by_thop"] is record["counters_differ_by"] is None
        assert explain_counters("a", record) == "a: 96 MACs; thop cannot count it"


class TestKerasConvention:
    @pytest.mark.parametrize(
        ("build", "published"),
        [
            (mnist.mnist_cnn, 22_042_058),
            (mnist.mnist_mlp, 2_475_882),
            (mnist.mnist_assistant, 71_993_897),
        ],
    )
    def test_gives_the_figures_of_the_source_on_digits(self, build, published):
        assert count_flops_keras(build(), 28, 1) == published

    def test_gives_its_figure_of_mobilenet_under_a_head_on_its_softmax(self):
        network = timm.create_model("mobilenetv2_100")
        model = nn.Sequential(network, nn.Softmax(1), nn.Linear(1000, 2))
        products = 2 * count_macs(network, 224)
        assert products == 2 * 300_774_272
        parts = 1_000 + 62_720 + 216_384  # biases, inputs of the pooling, shortcuts
        assert count_flops_keras(network, 224) == products + parts
        assert count_flops_keras(model, 224) == products + parts + 5_000 + 4_002 == 601_837_650

    def test_every_layer_follows_its_formula(self):
        """By hand, from 9 x 9: a grouped and strided convolution, a shortcut, pooling, a head."""
        model = Applied(
            lambda m, x: m.parts[4](m.parts[3](m.parts[2](shortcut(m, x)).mean((2, 3)))),
            nn.Conv2d(4, 6, (3, 5), stride=2, groups=2, padding=(1, 2)),
            nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6()),
            nn.MaxPool2d((3, 2), stride=1),
            nn.Linear(6, 3, bias=False),
            nn.Softmax(1),
        )

        def shortcut(m, x):
            y = m.parts[0](x)
            return y + m.parts[1](y)

        first = 5 * 5 * 6 * (2 * 2 * 15 + 1)
        second = 5 * 5 * 6 * 2 * 6
        shortcuts, pooled, averaged = 5 * 5 * 6, 3 * 4 * 6 * 3 * 2, 3 * 4 * 6
        expected = first + second + shortcuts + pooled + averaged + 2 * 6 * 3 + 5 * 3
        assert count_flops_keras(model, 9, channels=4) == expected

    @pytest.mark.parametrize(
        "layer",
        [
            nn.SiLU(),
            nn.Hardtanh(),
            nn.AvgPool2d(2),
            nn.AdaptiveAvgPool2d(2),
            nn.AdaptiveMaxPool2d(1),
            nn.ConvTranspose2d(3, 3, 2),
            nn.GroupNorm(1, 3),
            nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192)),
            Applied(lambda _, x: x + 1),
            Applied(lambda _, x: x + x.mean((2, 3), keepdim=True)),
            Applied(lambda _, x: torch.add(x, x, alpha=2)),
            Applied(lambda _, x: x.mean(1)),
            Applied(lambda _, x: x.mean()),
            Applied(lambda _, x: x * x),
            Applied(lambda m, x: m.parts[0](*[tokens(x)] * 3)[0], nn.MultiheadAttention(3, 1)),
        ],
        ids=lambda layer: type(layer).__name__,
    )
    def test_has_no_figure_for_what_it_does_not_know(self, layer):
        assert count_flops_keras(layer, 8) is None
        record = cost(layer, 8, batch_sizes=())
        assert record["flops_keras"] is None
        assert record["flops"] == 2 * record["macs"]

    @pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "efficientnet_b0", "densenet121"])
    def test_has_no_figure_for_networks_with_such_layers(self, name):
        assert count_flops_keras(timm.create_model(name), 224) is None
