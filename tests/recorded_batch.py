"""One batch, and two networks recorded on it: what the tests of the losses share."""

import torch
from torch import nn

from kd_lrp_plugin.models.factory import build_model

LAYERS = ["layer2", "layer3"]


def models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    return build_model("test_resnet", 4).requires_grad_(False), build_model("test_resnet", 4)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(4, 3, 48, 48, generator=generator), torch.tensor([0, 1, 2, 3])


def io(model: nn.Module, key: str, images: torch.Tensor) -> dict:
    from torchdistill.core.interfaces.registry import get_forward_proc_func

    return {".": {"output": get_forward_proc_func(key)(model, images)}}


def get_method(key: str) -> str:
    return "grad_cam" if key.startswith("GradCAM") else "gradient_activation"
