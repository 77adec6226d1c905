"""What a module of yours can add, each usable from YAML and from the commands.

Name the module in a config's ``dependencies``; it only has to be importable where the command
runs, for example by ``PYTHONPATH=examples/extension``. Registries refuse a name that is taken.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from torchdistill.core.interfaces.registry import (
    get_forward_proc_func,
    register_forward_proc_func,
)
from torchdistill.datasets.registry import register_dataset
from torchdistill.losses.registry import register_mid_level_loss

from kd_lrp_plugin.attribution.methods import ATTRIBUTIONS, Attribution
from kd_lrp_plugin.losses import resize_maps, semantic_cosine
from kd_lrp_plugin.relevance.linear_maps import LinearMap
from kd_lrp_plugin.relevance.methods import METHODS, Method
from kd_lrp_plugin.relevance.rules import RULES
from kd_lrp_plugin.selection.scores.observation import Observation
from kd_lrp_plugin.selection.scores.registry import SCORES, Score
from kd_lrp_plugin.torchdistill import recorded, recorder, register_recorded_loss

# --- a rule, and a method that uses it ------------------------------------------------------------


@RULES.register
def smooth_epsilon(g: Tensor, x: Tensor, y: Tensor, w: Tensor, layer: LinearMap) -> Tensor:
    """LRP-ε with ε a quarter of the outputs' standard deviation (Montavon et al., 2019, 10.2).

    ``x * g`` is the relevance on both sides: ``g`` of the output ``y`` comes in, that of the
    input ``x`` goes out. ``w`` is the weight, ``layer`` the linear map and its transpose.
    """
    epsilon = 0.25 * y.std() + 1e-6
    return layer.transpose(g * (y / (y + torch.where(y < 0, -epsilon, epsilon))), w)


METHODS.register(Method(convolution=smooth_epsilon, linear=smooth_epsilon), "lrp_smooth")


# --- losses: of a distance between maps, and of the recording itself ------------------------------


def manhattan(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum of absolute differences, in shares of the teacher's relevance."""
    return (student - teacher).abs().sum() / teacher.abs().sum().clamp(min=1e-12)


register_recorded_loss("ManhattanLoss", manhattan, kind="relevance", has_size=True)


@register_mid_level_loss
class SparseRelevanceLoss(nn.Module):
    """Share of the pixels that the student's relevance spreads over; needs no teacher."""

    def forward(self, student_io_dict: dict, teacher_io_dict: dict, targets: Tensor) -> Tensor:
        logits, recording = recorded(student_io_dict, "student", "SparseRelevanceLoss")
        maps = recording.maps(logits, targets, create_graph=torch.is_grad_enabled())
        return torch.stack([_spread(m.flatten(1)) for m in maps]).mean()


def _spread(maps: Tensor) -> Tensor:
    # (sum)² / (n · sum of squares) is 1 for an even map and 1/n for a single pixel.
    squares = maps.square().sum(1).clamp(min=1e-12)
    return (maps.sum(1).square() / squares / maps.shape[1]).mean()


# --- a forward procedure --------------------------------------------------------------------------

_RECORD = get_forward_proc_func(recorder(["layer2", "layer3"], "lrp_smooth"))


@register_forward_proc_func
def recorded_blurred(
    model: nn.Module, sample_batch: Tensor, targets: object = None, supp_dict: object = None
) -> Tensor:
    """The teacher explains a blurred copy of the images."""
    return _RECORD(model, functional.avg_pool2d(sample_batch, 3, 1, 1))


# --- a score of untrained students, an attribution, a data set ------------------------------------


def map_distance(student: Observation, teacher: Observation) -> float:
    """Distance of the maps of two untrained networks, averaged over the layers; lower is better."""
    ours, theirs = student.maps("lrp_smooth", False), teacher.maps("lrp_smooth", False)
    pairs = [
        (s, resize_maps(t, (s.shape[-2], s.shape[-1]))) for s, t in zip(ours, theirs, strict=True)
    ]
    return float(sum(semantic_cosine(s, t) for s, t in pairs) / len(pairs))


SCORES.register(Score(map_distance, source="the example"), "map_distance")


def gradient_norm(model: nn.Module, images: Tensor, targets: Tensor, layer: str) -> Tensor:
    """Length of the gradient of the explained logit at each pixel of the input."""
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(images).gather(1, targets[:, None]).sum()
    return torch.autograd.grad(logits, images)[0].norm(dim=1)


ATTRIBUTIONS.register(Attribution(gradient_norm, layered=False), "gradient_norm")


@register_dataset
class Stripes(Dataset):
    """Noisy stripes, lying or standing. ``classes`` and ``targets`` are what the trainer asks."""

    classes = ("lying", "standing")

    def __init__(self, size: int = 32, image_size: int = 32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = [index % 2 for index in range(size)]
        wave = torch.sin(torch.arange(image_size) / 2.0)
        noise = torch.randn(size, 3, image_size, image_size, generator=generator)
        waves = (wave[:, None], wave[None])
        self.images = [0.5 * n + waves[c] for n, c in zip(noise, self.targets, strict=True)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.targets[index]
