"""What the recording forward procedure finds in a model's output, and which targets come in."""

import pytest
import torch
from recorded_batch import LAYERS, batch, io, models
from torch import Tensor, nn

from kd_lrp_plugin import torchdistill as plugin


class Named(nn.Module):
    """A model that returns its logits in a dictionary."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        logits = self.model(images)
        return {"aux": logits.flip(1), "logits": logits}


def test_a_model_that_returns_a_dictionary_is_recorded():
    _, student = models()
    images, targets = batch()
    student.eval()
    found = []
    for model, prefix in ((student, ""), (Named(student), "model.")):
        procedure = plugin.recorder([prefix + layer for layer in LAYERS])
        parts = io(model, procedure, images), io(model, procedure, images.flip(3))
        found.append(plugin.RecordedLoss("LRPSemanticCosineLoss")(*parts, targets))
    assert torch.equal(*found)


@pytest.mark.parametrize("targets", [torch.ones(4, 4), torch.zeros(4, 4), torch.eye(4) * 2])
def test_multi_label_targets_are_refused(targets):
    _, student = models()
    images, _ = batch()
    parts = [io(student, plugin.recorder(LAYERS), images) for _ in range(2)]
    with pytest.raises(ValueError, match=r"expected probabilities that sum to one.*multi-label"):
        plugin.RecordedLoss("LRPSemanticCosineLoss")(*parts, targets)
