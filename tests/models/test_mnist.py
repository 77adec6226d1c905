"""The networks of the MNIST source: its counts, and relevance through overlapping max pooling."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torchdistill.models.registry import get_model

import kd_lrp_plugin.torchdistill  # noqa: F401  registers the models
from kd_lrp_plugin.metrics.efficiency import count_macs, count_parameters
from kd_lrp_plugin.relevance.recording import record, relevance_maps

COUNTS = {
    "mnist_cnn": (1_011_466, 10_937_728),
    "mnist_mlp": (1_238_730, 1_237_152),
    "mnist_assistant": (26_155_529, None),
    "mnist_assistant_small": (1_084_130, 1_278_288),
}
LRP = ["lrp_epsilon", "lrp_zplus", "lrp_gamma", "lrp_composite"]


def make(name: str, **kwargs) -> nn.Module:
    return get_model(name, None, **kwargs)


@pytest.mark.parametrize("name", COUNTS)
class TestEveryNetwork:
    def test_has_the_parameters_of_the_source(self, name):
        parameters, macs = COUNTS[name]
        model = make(name)
        assert count_parameters(model) == parameters
        assert macs is None or count_macs(model, 28, 1) == macs

    def test_takes_other_classes_and_channels(self, name):
        model = make(name, num_classes=3, in_chans=2)
        assert model.training
        assert model(torch.zeros(2, 2, 28, 28)).shape == (2, 3)

    def test_refuses_images_that_it_was_not_built_for(self, name):
        with pytest.raises(ValueError, match=r"expected images .*28.* got \(1, 1, 32, 32\)\. Set"):
            make(name)(torch.zeros(1, 1, 32, 32))
        with pytest.raises(ValueError, match=r"channels as in_chans of the model"):
            make(name)(torch.zeros(1, 3, 28, 28))

    def test_refuses_other_keywords_and_no_classes(self, name):
        with pytest.raises(ValueError, match="Did you mean 'num_classes'"):
            make(name, num_class=3)
        with pytest.raises(ValueError, match=f"{name}: num_classes: expected a whole number >= 1"):
            make(name, num_classes=0)
        with pytest.raises(ValueError, match=f"{name}: in_chans"):
            make(name, in_chans=1.0)


def test_the_small_assistant_lies_between_teacher_and_student():
    teacher, student, between = (
        COUNTS[name] for name in ("mnist_cnn", "mnist_mlp", "mnist_assistant_small")
    )
    assert teacher[0] < between[0] < student[0]
    assert teacher[1] > between[1] > student[1]


def test_dropout_is_the_one_asked_for():
    model = make("mnist_cnn", dropout=0.25)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.25, 0.25]
    with pytest.raises(ValueError, match="mnist_cnn: dropout: expected 0 <= p < 1, got 1"):
        make("mnist_cnn", dropout=1)


class TestRecording:
    def test_layers_are_chosen_where_maps_have_two_sizes(self):
        for name, layers in (("mnist_cnn", ["relu2"]), ("mnist_assistant_small", ["relu1"])):
            with record(make(name)) as recording:
                assert recording.layers == layers

    def test_the_large_assistant_needs_layers_by_name(self):
        with pytest.raises(ValueError, match=r"two sizes or more .* Name the layers"):
            record(make("mnist_assistant")).__enter__()
        images, targets = torch.rand(2, 1, 28, 28), torch.tensor([3, 7])
        maps = relevance_maps(make("mnist_assistant").eval(), images, targets, ["conv2", "pool1"])
        assert [tuple(m.shape) for m in maps] == [(2, 23, 23), (2, 25, 25)]

    def test_the_student_has_no_maps_and_says_so(self):
        with pytest.raises(
            ValueError, match=r"a model with maps .* got DigitNetwork, which has no"
        ):
            record(make("mnist_mlp")).__enter__()
        with pytest.raises(ValueError, match=r"'linear1': expected an output \(n, c, h, w\)"):
            relevance_maps(
                make("mnist_mlp"), torch.zeros(1, 1, 28, 28), torch.tensor([0]), "linear1"
            )

    @pytest.mark.parametrize("method", LRP)
    @pytest.mark.parametrize("training", [False, True])
    def test_every_rule_has_a_way_to_each_convolution(self, method, training):
        model = make("mnist_cnn").train(training)
        layers = ["relu1", "pool1", "relu2", "pool2"]
        with record(model, layers, method) as recording:
            logits = model(torch.rand(2, 1, 28, 28))
        maps = recording.maps(logits, torch.tensor([3, 7]), create_graph=True, signed=True)
        assert [tuple(m.shape[1:]) for m in maps] == [(26, 26), (25, 25), (23, 23), (11, 11)]
        sum(m.pow(2).sum() for m in maps).backward()
        for name in ("conv2", "linear1", "linear2"):
            gradient = model.get_submodule(name).weight.grad
            assert gradient.isfinite().all()
            assert (gradient != 0).any()


class Tiny(nn.Sequential):
    """The teacher's layers on 8 x 8 pixels, without biases where relevance is to be conserved."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 3, bias=bias)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2, stride=1)
        self.conv2 = nn.Conv2d(3, 2, 3, bias=bias)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.dropout1 = nn.Dropout(0.5)
        self.linear = nn.Linear(2, 3, bias=bias)
        self.double().eval()
        for parameter in self.parameters():  # enough that is positive for maps that are not zero
            nn.init.normal_(parameter, 0.2, 0.4)


def loop_pooling(features: Tensor, relevance: Tensor, stride: int) -> Tensor:
    """Relevance (c, h, w) behind max pooling of 2 x 2, handed to the winner of each window."""
    given = torch.zeros_like(features)
    for c, i, j in product(*map(range, relevance.shape)):
        window = features[c, i * stride : i * stride + 2, j * stride : j * stride + 2]
        row, column = divmod(int(window.argmax()), 2)
        given[c, i * stride + row, j * stride + column] += relevance[c, i, j]
    return given


class TestOverlappingMaxPooling:
    def test_each_window_hands_its_relevance_to_its_winner(self):
        """lrp_zplus at the first convolution, against loops over windows and connections."""
        model = Tiny(bias=False)
        x = torch.rand(1, 1, 8, 8, dtype=torch.float64)
        target = int(model(x).argmax())
        got = relevance_maps(model, x, torch.tensor([target]), ["relu1"], "lrp_zplus", signed=True)
        with torch.no_grad():
            steps = {"input": x}
            for name, layer in model.named_children():
                steps[name] = layer(steps[list(steps)[-1]])
            value = {name: tensor[0] for name, tensor in steps.items()}
            share = value["flatten"] * model.linear.weight[target].clamp(min=0)
            relevance = share / share.sum() * value["linear"][target]
            relevance = loop_pooling(value["relu2"], relevance.view_as(value["pool2"]), 2)
            weight = model.conv2.weight.clamp(min=0)
            below = torch.zeros_like(value["pool1"])
            for o, i, j in product(*map(range, relevance.shape)):
                z = value["pool1"][:, i : i + 3, j : j + 3] * weight[o]
                if z.sum() > 0:
                    below[:, i : i + 3, j : j + 3] += z / z.sum() * relevance[o, i, j]
            expected = loop_pooling(value["relu1"], below, 1).sum(0)
        assert (expected > 0).sum() > 5
        torch.testing.assert_close(got[0][0], expected, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("method", LRP)
    def test_relevance_is_conserved_without_biases(self, method):
        model = Tiny(bias=False)
        x = torch.rand(4, 1, 8, 8, dtype=torch.float64)
        targets = model(x).argmax(1)
        before, behind = relevance_maps(model, x, targets, ["relu1", "pool1"], method, signed=True)
        assert (behind != 0).any()
        torch.testing.assert_close(before.sum((1, 2)), behind.sum((1, 2)))

    @pytest.mark.parametrize("method", ["grad_cam", "gradient_activation", *LRP])
    def test_the_gradient_of_a_loss_on_maps_is_that_of_finite_differences(self, method):
        model = Tiny()
        x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
        targets, goal = torch.tensor([0, 2]), torch.rand(2, 6, 6, dtype=torch.float64)

        def loss(create_graph: bool = False) -> Tensor:
            (maps,) = relevance_maps(model, x, targets, ["relu1"], method, create_graph, True)
            return (maps - goal).pow(2).sum()

        loss(create_graph=True).backward()
        for name, parameter in model.named_parameters():
            for index in range(0, parameter.numel(), max(1, parameter.numel() // 4)):
                flat = parameter.data.view(-1)
                found, step, values = flat[index].item(), 1e-6, []
                for sign in (1, -1):
                    flat[index] = found + sign * step
                    values.append(float(loss()))
                flat[index] = found
                expected = (values[0] - values[1]) / (2 * step)
                got = 0.0 if parameter.grad is None else float(parameter.grad.view(-1)[index])
                assert got == pytest.approx(expected, rel=1e-4, abs=1e-6), name
