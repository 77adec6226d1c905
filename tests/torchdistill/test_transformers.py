"""A transformer beside a CNN in torchdistill's losses, as teacher and as student."""

import pytest
import timm
import torch
from recorded_batch import batch, io
from torch import nn
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT

from kd_lrp_plugin import torchdistill as plugin
from kd_lrp_plugin.losses import resize_maps
from kd_lrp_plugin.relevance.recording import relevance_maps


def vit() -> nn.Module:
    settings = {"img_size": 48, "patch_size": 8, "depth": 4, "embed_dim": 12, "num_heads": 2}
    return timm.create_model("deit_tiny_distilled_patch16_224", num_classes=4, **settings)


def swin() -> nn.Module:
    settings = {"img_size": 48, "window_size": 3, "embed_dim": 8, "depths": (1, 2), "patch_size": 4}
    name = "swin_tiny_patch4_window7_224"
    return timm.create_model(name, num_classes=4, num_heads=(1, 1), **settings)


def resnet() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=4)


PAIRS = {  # teacher, its layer, student, its layer
    "transformer teaches CNN": (vit, "blocks.2", resnet, "layer2"),
    "CNN teaches transformer": (resnet, "layer2", vit, "blocks.2"),
    "Swin teaches DeiT": (swin, "layers.0", vit, "blocks.1"),
}


@pytest.mark.parametrize(
    ("key", "method"),
    [
        ("LRPSemanticCosineLoss", "attn_lrp"),
        ("LRPRelativeL2Loss", "gradient_activation"),
        ("GradCAMCosineLoss", "grad_cam"),
        ("RelationCosineLoss", "lrp_zplus"),
    ],
)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_loss_between_architectures_reaches_the_weights_of_the_student(pair, key, method):
    torch.manual_seed(5)
    make_teacher, taught, make_student, learning = PAIRS[pair]
    teacher, student = make_teacher().requires_grad_(False), make_student()
    images, targets = batch()
    of_student = io(student, plugin.recorder([learning], method), images)
    of_teacher = io(teacher, plugin.recorder([taught], method), images)
    loss = MIDDLE_LEVEL_LOSS_DICT[key]()(of_student, of_teacher, targets)
    loss.backward()
    assert next(student.parameters()).grad is not None
    if key == "LRPSemanticCosineLoss":
        maps = [
            relevance_maps(model, images, targets, [layer], method)[0]
            for model, layer in ((student, learning), (teacher, taught))
        ]
        resized = resize_maps(maps[1], maps[0].shape[1:])
        cosines = torch.cosine_similarity(maps[0].flatten(1), resized.flatten(1))
        torch.testing.assert_close(loss.detach(), 1 - cosines.mean(), rtol=1e-4, atol=1e-5)
