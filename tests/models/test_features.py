"""Features are what timm calls them, and the model is as it was."""

import pytest
import torch
from torch import nn

from kd_lrp_plugin.models.factory import build_model
from kd_lrp_plugin.models.features import read_features
from kd_lrp_plugin.models.mnist import mnist_cnn


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv2_035", "test_vit"])
def test_they_are_what_timm_gives_before_its_classifier(name):
    torch.manual_seed(0)
    model = build_model(name, 3).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    images = torch.rand(5, 3, 160, 160)
    found = read_features(model, [images[:2], images[2:]])
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    model.eval()
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(found, expected)


def test_of_several_linear_layers_the_last_counts():
    model = mnist_cnn().eval()
    images = torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        expected = nn.Sequential(*list(model)[:-1])(images)
    assert torch.equal(read_features(model, [images]), expected)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(1, 2, 28), nn.Flatten()),
        nn.Sequential(nn.Flatten(), nn.Linear(784, 2), nn.ReLU()),
    ],
)
def test_a_model_that_does_not_end_in_a_linear_layer_is_refused(model):
    torch.manual_seed(0)
    for parameter in model.parameters():  # below zero, where a ReLU shows
        nn.init.uniform_(parameter, -1, 0)
    with pytest.raises(ValueError, match="a last linear layer, got Sequential"):
        read_features(model, [torch.rand(8, 1, 28, 28)])
    assert not any(module._forward_hooks for module in model.modules())
