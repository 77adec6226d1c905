"""OFA-595: the published counts, its table, an independent forward pass, and relevance."""

import csv
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchdistill.models.registry import get_model

import kd_lrp_plugin.torchdistill
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.metrics.efficiency import count_macs, count_parameters
from kd_lrp_plugin.models.ofa import STAGES, ofa_595
from kd_lrp_plugin.relevance.methods import METHODS
from kd_lrp_plugin.relevance.recording import record, relevance_maps

LAYERS = ["blocks.2", "blocks.4"]


def make(**kwargs) -> nn.Module:
    return get_model("ofa_595", None, **{"num_classes": 3, **kwargs})


class TestPublishedCounts:
    def test_parameters_at_1000_classes(self):
        assert count_parameters(ofa_595(1000)) == 9_135_928

    @pytest.mark.parametrize(("side", "macs"), [(236, 595_189_032), (224, 512_861_680)])
    def test_multiply_accumulates(self, side, macs):
        assert count_macs(ofa_595(1000), side, 3) == macs

    def test_the_columns_of_the_published_table(self):
        """Every row beside the modules that the network has in its place."""
        file = Path(os.environ.get("KD_LRP_DATA", ""), "ofa595.csv")
        if not file.is_file():
            pytest.skip("needs ofa595.csv in the folder that KD_LRP_DATA names")
        stem, *rows, head_conv, head_fc, classifier = csv.DictReader(file.open(encoding="utf-8"))
        model = ofa_595(1000)
        blocks = [block for stage in model.blocks[:6] for block in stage]
        assert len(blocks) == len(rows) == 20
        for row, block in zip(rows, blocks, strict=True):
            assert describe_block(block) == {
                "kernel": int(row["kernel"]),
                "stride": int(row["stride"]),
                "in_ch": int(row["in_ch"]),
                "mid_ch": int(row["mid_ch"]),
                "out_ch": int(row["out_ch"]),
                "act": row["act"],
                "se_mid_ch": int(row["se_mid_ch"] or 0),
                "skip": row["skip"] == "yes",
            }
        for row, layer in [
            (stem, model.conv_stem),
            (head_conv, model.blocks[6][0].conv),
            (head_fc, model.conv_head),
        ]:
            assert (layer.in_channels, layer.out_channels) == (
                int(row["in_ch"]),
                int(row["out_ch"]),
            )
            assert (layer.kernel_size[0], layer.stride[0]) == (
                int(row["kernel"]),
                int(row["stride"] or 1),
            )
            assert layer.bias is None
        assert model.classifier.weight.shape == (int(classifier["out_ch"]), 1536)


def describe_block(block: nn.Module) -> dict:
    depthwise = block.conv_dw
    project = block.conv_pwl if hasattr(block, "conv_pwl") else block.conv_pw
    first = block.conv_pw if hasattr(block, "conv_pwl") else depthwise
    act = block.bn2.act if hasattr(block, "conv_pwl") else block.bn1.act
    gated = hasattr(block.se, "conv_reduce")
    return {
        "kernel": depthwise.kernel_size[0],
        "stride": depthwise.stride[0],
        "in_ch": first.in_channels,
        "mid_ch": depthwise.out_channels,
        "out_ch": project.out_channels,
        "act": type(act).__name__.lower(),
        "se_mid_ch": block.se.conv_reduce.out_channels if gated else 0,
        "skip": block.has_skip,
    }


def swish(x: Tensor) -> Tensor:
    return x * (x + 3).clamp(0, 6) / 6


def reference(model: nn.Module, images: Tensor) -> Tensor:
    """The network written out from its table, with the weights of the model, in evaluation mode."""
    state = model.state_dict()

    def convolve(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        weight = state[f"{conv}.weight"]
        groups = x.shape[1] // weight.shape[1]
        side = weight.shape[-1]
        x = functional.conv2d(x, weight, None, stride, side // 2, groups=groups)
        mean, var, scale, shift = (
            state[f"{norm}.{name}"][:, None, None]
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = swish(convolve(images, "conv_stem", "bn1", 2))
    for number, (channels, first, activation, gated, blocks) in enumerate(STAGES):
        act = {"re": torch.relu, "hs": swish}[activation]
        for index, (_, expansion) in enumerate(blocks):
            at, before = f"blocks.{number}.{index}", x
            stride = first if index == 0 else 1
            if expansion > 1:
                x = act(convolve(x, f"{at}.conv_pw", f"{at}.bn1"))
                assert x.shape[1] == expansion * before.shape[1]
            names = ("conv_dw", "bn2") if expansion > 1 else ("conv_dw", "bn1")
            x = act(convolve(x, *(f"{at}.{name}" for name in names), stride))
            if gated:
                pooled = x.mean((2, 3), keepdim=True)
                for name, last in (("conv_reduce", torch.relu), ("conv_expand", None)):
                    weight, bias = state[f"{at}.se.{name}.weight"], state[f"{at}.se.{name}.bias"]
                    pooled = functional.conv2d(pooled, weight, bias)
                    pooled = last(pooled) if last else (pooled + 3).clamp(0, 6) / 6
                x = x * pooled
            names = ("conv_pwl", "bn3") if expansion > 1 else ("conv_pw", "bn2")
            x = convolve(x, *(f"{at}.{name}" for name in names))
            if stride == 1 and before.shape[1] == channels:
                x = x + before
    x = swish(convolve(x, "blocks.6.0.conv", "blocks.6.0.bn1")).mean((2, 3))
    x = swish(x @ state["conv_head.weight"].flatten(1).T)
    return x @ state["classifier.weight"].T + state["classifier.bias"]


def test_the_forward_pass_is_that_of_the_table_written_out():
    model = ofa_595(5).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    nn.init.normal_(model.classifier.weight)
    images = torch.randn(2, 3, 76, 76, dtype=torch.float64)
    with torch.no_grad():
        expected = reference(model, images)
        assert float(expected.std()) > 1e-3
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-12)


class TestHeads:
    @pytest.mark.parametrize("head", ["linear", "mlp", "flatten_mlp"])
    def test_fits_and_has_the_outputs_asked_for(self, head):
        model = make(head=head, hidden=[8, 4], image_size=64, in_chans=1)
        assert model.training
        assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 3)

    def test_without_classifier_there_are_1536_features(self):
        assert make(num_classes=0)(torch.zeros(2, 3, 64, 64)).shape == (2, 1536)

    def test_dropout_acts_in_training_only(self):
        features = torch.ones(1, 1152, 2, 2)
        for dropout, same in ((0.9, False), (0.0, True)):
            model = make(dropout=dropout)
            first, second = model.forward_head(features), model.forward_head(features)
            assert torch.equal(first, second) == same

    def test_linear_starts_undecided(self):
        loss = functional.cross_entropy(
            make(num_classes=4)(torch.randn(8, 3, 64, 64)), torch.arange(8) % 4
        )
        assert abs(float(loss) - 1.386) < 0.3


class TestBadArguments:
    @pytest.mark.parametrize(
        ("arguments", "hint"),
        [
            ({"num_class": 3}, "Did you mean 'num_classes'"),
            ({"head": "flaten_mlp"}, "ofa_595: head: .*Did you mean 'flatten_mlp'"),
            ({"num_classes": -1}, r"num_classes: expected a whole number >= 0, got -1"),
            (
                {"num_classes": 0, "head": "mlp"},
                r"num_classes: expected a whole number >= 1, got 0",
            ),
            ({"num_classes": 3.0}, r"num_classes: expected a whole number"),
            ({"in_chans": 0}, r"ofa_595: in_chans: expected a whole number >= 1, got 0"),
            ({"dropout": 1}, r"ofa_595: dropout: expected 0 <= p < 1, got 1. Use 0.2"),
        ],
    )
    def test_are_refused_by_name(self, arguments, hint):
        with pytest.raises(ValueError, match=hint):
            make(**arguments)


class TestWeights:
    def test_of_a_local_file_come_back_with_another_head_left(self, tmp_path):
        file = tmp_path / "weights.pth"
        source = make(num_classes=3).eval()
        torch.save(source.state_dict(), file)
        same, other = make(weights=file).eval(), make(num_classes=4, weights=file)
        images = torch.rand(1, 3, 64, 64)
        assert torch.equal(same(images), source(images))
        assert torch.equal(other.conv_head.weight, source.conv_head.weight)
        assert other.classifier.weight.shape == (4, 1536)

    def test_of_another_network_or_nowhere_are_refused(self, tmp_path):
        file = tmp_path / "weights.pth"
        torch.save({"conv_stem.weight": torch.zeros(16, 3, 3, 3)}, file)
        with pytest.raises(ValueError, match="ofa_595: expected the weights of this model"):
            make(weights=file)
        with pytest.raises(FileNotFoundError, match="ofa_595: expected a weights file"):
            make(weights=tmp_path / "nowhere.pth")


class TestRelevance:
    def test_layers_are_chosen_where_maps_have_several_sizes(self):
        with record(make()) as recording:
            assert recording.layers == ["blocks.0", "blocks.1", "blocks.2", "blocks.4"]

    @pytest.mark.parametrize("method", ["lrp_epsilon", "lrp_gamma"])
    def test_is_conserved_without_biases(self, method):
        model = make().double().eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
        images, targets = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.tensor([0, 2])
        maps = relevance_maps(model, images, targets, LAYERS, method, signed=True)
        logits = model(images).gather(1, targets[:, None]).squeeze(1)
        for found in maps:
            torch.testing.assert_close(found.sum((1, 2)), logits, rtol=2e-2, atol=0)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("training", [False, True])
    def test_reaches_the_weights_that_make_the_maps(self, method, training):
        model = make().train(training)
        with record(model, LAYERS, method) as recording:
            logits = model(torch.rand(2, 3, 64, 64))
        maps = recording.maps(logits, torch.tensor([0, 2]), create_graph=True, signed=True)
        assert [tuple(m.shape[1:]) for m in maps] == [(8, 8), (4, 4)]
        sum(m.pow(2).sum() for m in maps).backward()
        for name in ("blocks.5.0.conv_pw", "blocks.5.1.se.conv_expand", "conv_head"):
            gradient = model.get_submodule(name).weight.grad
            assert gradient.isfinite().all()
            assert (gradient != 0).any()

    @pytest.mark.parametrize("method", ["gradient_activation", "lrp_gamma"])
    @pytest.mark.parametrize("training", [False, True])
    def test_its_derivative_is_that_of_finite_differences(self, method, training):
        model = make(dropout=0.0).double().train(training)
        images, targets = torch.randn(3, 3, 64, 64, dtype=torch.float64), torch.tensor([0, 2, 1])

        def loss(create_graph: bool = False) -> Tensor:
            (maps,) = relevance_maps(model, images, targets, ["blocks.4"], method, create_graph)
            return 1e6 * maps.pow(2).sum()

        loss(create_graph=True).backward()
        for name in ("blocks.2.0.conv_dw", "blocks.5.1.se.conv_expand", "blocks.5.2.conv_pwl"):
            weight = model.get_submodule(name).weight
            index = int(weight.grad.abs().argmax())  # where the loss hears most of it
            flat, step, values = weight.data.view(-1), 1e-6, []
            found = flat[index].item()
            for sign in (1, -1):
                flat[index] = found + sign * step
                values.append(float(loss()))
            flat[index] = found
            expected = (values[0] - values[1]) / (2 * step)
            assert float(weight.grad.view(-1)[index]) == pytest.approx(expected, rel=1e-4), name


@pytest.mark.parametrize("score", ["parameters", "diswot"])
def test_is_a_candidate_of_a_selection(tmp_path, score):
    entries = [
        {"key": "ofa_595", "kwargs": {"num_classes": 4, "head": head}} for head in ("linear", "mlp")
    ]
    model = kd_lrp_plugin.torchdistill.diswot_student(
        num_classes=4,
        candidates=entries,
        teacher={"key": "timm_model", "kwargs": {"name": "resnet10t", "num_classes": 4}},
        data=Phantom(size=8, image_size=64),
        score=score,
        batch_size=4,
        budget=["params=10M"],
        record=tmp_path / "choice.json",
    )
    assert model.chosen in entries
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 4)
