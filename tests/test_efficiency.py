"""Costs against torch's own counter and against published counts."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kd_lrp_plugin.efficiency import count_macs, count_parameters


def macs_by_torch(model: nn.Module, image_size: int) -> float:
    model = copy.deepcopy(model).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, image_size, image_size))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("mobilenetv2_100", {}),
        ("mobilenetv2_100", {"pad_type": "same"}),
        ("resnet18", {}),  # plain batch norms, which thop would count
        ("mobilenetv3_small_100", {}),  # squeeze-and-excite
    ],
)
def test_macs_agree_with_torch(name, kwargs):
    model = timm.create_model(name, **kwargs)
    assert count_macs(model, 224) == pytest.approx(macs_by_torch(model, 224), rel=5e-3)


def test_macs_of_a_grouped_convolution_follow_the_formula():
    model = nn.Conv2d(4, 6, kernel_size=(3, 5), stride=2, groups=2, padding=(1, 2))
    assert count_macs(model, image_size=8, channels=4) == 4 * 4 * 6 * (4 // 2) * 3 * 5


def test_macs_see_the_subclasses_of_convolution_and_linear():
    class Convolution(nn.Conv2d): ...

    class Linear(nn.Linear): ...

    model = nn.Sequential(Convolution(3, 2, 1), nn.Flatten(), Linear(2 * 4 * 4, 5))
    assert count_macs(model, image_size=4) == 4 * 4 * 3 * 2 + 32 * 5


@pytest.mark.parametrize("training", [True, False])
def test_counting_macs_leaves_the_model_as_it_was(training):
    model = timm.create_model("mobilenetv2_035", pad_type="same").train(training)
    model.bn1.eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    count_macs(model, 64)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def test_macs_work_in_double_precision():
    assert count_macs(nn.Conv2d(1, 1, 1).double(), image_size=2, channels=1) == 4


@pytest.mark.parametrize(
    ("name", "parameters", "running"),
    [("mobilenetv2_100", 2_223_872, 34_112), ("mobilenetv2_035", 396_128, 14_080)],
)
def test_counts_of_the_headless_models_are_the_published_ones(name, parameters, running):
    model = timm.create_model(name, num_classes=0)
    assert count_parameters(model) == parameters
    assert count_parameters(model, buffers=True) == parameters + running


def test_shared_parameters_count_once():
    layer = nn.Linear(3, 4)
    assert count_parameters(nn.Sequential(layer, layer)) == 16
