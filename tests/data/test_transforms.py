"""Transforms written down as a policy, and built from it again."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as t
from torchvision.transforms import InterpolationMode

from kd_lrp_plugin.data.transforms import build_transform, describe_transform, make_transforms

NEAREST = InterpolationMode.NEAREST
SAYABLE = {
    "ours": (make_transforms(24), (3, 24, 24)),
    "ours, grey": (make_transforms(24, channels=1), (1, 24, 24)),
    "a tensor alone": (t.ToTensor(), (3, 37, 53)),
    "sides": (t.Compose([t.Resize((20, 30)), t.ToTensor()]), (3, 20, 30)),
    "shorter side": (t.Compose([t.Resize(20), t.CenterCrop(16), t.ToTensor()]), (3, 16, 16)),
    "shorter side in a list": (
        t.Compose([t.Resize([20], NEAREST), t.CenterCrop((8, 12)), t.ToTensor()]),
        (3, 8, 12),
    ),
    "grey in three": (t.Compose([t.Grayscale(3), t.Resize((9, 9)), t.ToTensor()]), (3, 9, 9)),
    "by channel": (
        t.Compose([t.CenterCrop(60), t.ToTensor(), t.Normalize([0.1, 0.2, 0.3], [1, 2, 3])]),
        (3, 60, 60),
    ),
}


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8))


@pytest.mark.parametrize("name", SAYABLE)
def test_what_is_written_down_prepares_alike_bit_for_bit(name, picture):
    transform, shape = SAYABLE[name]
    policy = json.loads(json.dumps(describe_transform("test", transform, shape)))
    assert torch.equal(build_transform(policy)(picture), transform(picture))
    assert tuple(build_transform(policy)(picture).shape) == shape


UNSAYABLE = {
    "Pad": t.Compose([t.Pad(2), t.ToTensor()]),
    "RandomHorizontalFlip": t.Compose([t.RandomHorizontalFlip(), t.ToTensor()]),
    "Resize": t.Compose([t.CenterCrop(9), t.Resize(9), t.ToTensor()]),
    "max_size=30": t.Compose([t.Resize(20, max_size=30), t.ToTensor()]),
    "num_output_channels=1": t.Compose([t.Grayscale(1), t.ToTensor()]),
    "Normalize": t.Compose([t.ToTensor(), t.Normalize([0.5], [0.5])]),
    "CenterCrop": t.Compose([t.CenterCrop(9)]),
    "ToTensor": t.Compose([t.ToTensor(), t.ToTensor()]),
    "function": lambda image: image,
}


@pytest.mark.parametrize("name", UNSAYABLE)
def test_what_cannot_be_written_down_is_named(name):
    with pytest.raises(ValueError, match=rf"test: expected a transform [\s\S]*{name}"):
        describe_transform("test", UNSAYABLE[name], (3, 9, 9))


def test_an_image_that_comes_out_in_another_size_is_refused(picture):
    policy = describe_transform("test", t.Compose([t.Resize(20), t.ToTensor()]), (3, 20, 20))
    square = Image.new("RGB", (50, 50))
    assert build_transform(policy)(square).shape == (3, 20, 20)
    with pytest.raises(ValueError, match="comes out as 20 x 20 pixels, got 20 x 28"):
        build_transform(policy)(picture)
