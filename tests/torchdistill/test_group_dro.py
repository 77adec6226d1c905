"""Group DRO against loops over images and groups, and what it refuses."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT

from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.data.shortcuts import Marked
from kd_lrp_plugin.torchdistill import GroupDROLoss

NAMES = ["a", "b", "c"]
DATA = SimpleNamespace(groups=["c", "a", "b", "a"])


def parts(logits: Tensor, names: list[str]) -> dict:
    logits._kd_lrp_companions = {"group_name": names}
    return {".": {"output": logits}}


def batches(n: int) -> list[tuple[Tensor, Tensor, list[str]]]:
    """The second batch has no image of group c, the third none but of b."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for turn in range(n):
        names = [["a", "c", "b", "c", "a"], ["a", "b", "b", "a", "b"], ["b"] * 5][turn % 3]
        logits = 3 * torch.randn(5, 4, generator=generator, dtype=torch.float64)
        made.append((logits, torch.randint(4, (5,), generator=generator), names))
    return made


def cross_entropy(logits: list[float], label: int) -> float:
    return math.log(sum(math.exp(logit) for logit in logits)) - logits[label]


def step(q: dict[str, float], batch: tuple, step_size: float) -> tuple[dict[str, float], float]:
    """Algorithm 1 of the paper for one batch: the weights after it, and the loss by them."""
    logits, labels, names = batch
    values = [
        cross_entropy(row, k) for row, k in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    means = {}
    for group in NAMES:
        of_group = [value for value, name in zip(values, names, strict=True) if name == group]
        if of_group:
            means[group] = sum(of_group) / len(of_group)
    raised = {group: q[group] * math.exp(step_size * means.get(group, 0.0)) for group in NAMES}
    q = {group: raised[group] / sum(raised.values()) for group in NAMES}
    return q, sum(q[group] * mean for group, mean in means.items())


def test_weights_and_losses_are_those_of_the_algorithm():
    loss = GroupDROLoss(DATA, step_size=0.3).double()
    q = dict.fromkeys(NAMES, 1 / 3)
    for batch in batches(7):
        logits, labels, names = batch
        value = loss(parts(logits, names), {}, labels)
        q, expected = step(q, batch, 0.3)
        assert float(value) == pytest.approx(expected, rel=1e-6)
        assert loss.log_weights.exp().tolist() == pytest.approx(list(q.values()), rel=1e-6)
    assert max(q.values()) > 0.4


def test_its_gradient_takes_the_weights_as_given():
    (logits, labels, names), *_ = batches(1)
    logits.requires_grad_()
    loss = GroupDROLoss(DATA, step_size=0.5).double()
    loss(parts(logits, names), {}, labels).backward()
    q = loss.log_weights.exp()
    counts = [names.count(name) for name in NAMES]
    for row, (label, name) in enumerate(zip(labels.tolist(), names, strict=True)):
        group = NAMES.index(name)
        expected = logits[row].detach().softmax(0)
        expected[label] -= 1
        torch.testing.assert_close(logits.grad[row], expected * q[group] / counts[group])


def test_validation_leaves_the_weights_as_they_are():
    loss = GroupDROLoss(DATA, step_size=0.5).double()
    (logits, labels, names), *_ = batches(1)
    before = loss.log_weights.clone()
    with torch.no_grad():
        value = loss(parts(logits, names), {}, labels)
    assert torch.equal(loss.log_weights, before)
    _, expected = step(dict.fromkeys(NAMES, 1 / 3), (logits, labels, names), 0.0)
    assert float(value) == pytest.approx(expected, rel=1e-6)


def test_the_weights_are_in_its_state():
    one, other = GroupDROLoss(DATA, 0.5), GroupDROLoss(DATA, 0.5)
    for logits, labels, names in batches(3):
        one(parts(logits, names), {}, labels)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.log_weights, other.log_weights)
    assert len(set(other.log_weights.tolist())) == 3


def test_a_group_that_falls_far_behind_is_not_lost():
    """Its weight is below what float32 can hold, but comes back as its loss grows."""
    loss = GroupDROLoss(SimpleNamespace(groups=["a", "b"]), step_size=100.0)
    easy, hard = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 9.0]])
    labels = torch.tensor([0, 0])
    for turn in range(20):
        order = [easy, hard] if turn < 10 else [hard, easy]
        loss(parts(torch.cat(order), ["a", "b"]), {}, labels)
    assert loss.log_weights.exp().tolist() == pytest.approx([0.5, 0.5], rel=1e-2)


@pytest.mark.parametrize(
    ("dataset", "step_size", "words"),
    [
        (Marked(Phantom(size=8)), 0.01, r"two groups or more, got \['agrees'\]. Lower agreement"),
        (Phantom(size=8), 0.01, "two groups or more, got Phantom without any"),
        (DATA, 0, "step_size: expected a number above 0"),
        (DATA, "0.1", "step_size: expected a number above 0"),
        (DATA, math.inf, "step_size: expected a number above 0"),
        (DATA, True, "step_size: expected a number above 0"),
    ],
)
def test_what_it_cannot_weigh_is_refused(dataset, step_size, words):
    with pytest.raises(ValueError, match=words):
        GroupDROLoss(dataset, step_size)


def test_several_processes_are_refused(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="GroupDROLoss: expected one process, got 2"):
        GroupDROLoss(DATA)


def test_a_group_that_training_lacks_is_named():
    logits, labels, _ = batches(1)[0]
    with pytest.raises(
        ValueError, match=r"group of the training images: expected one of.*'random'"
    ):
        GroupDROLoss(DATA)(parts(logits, ["a"] * 4 + ["random"]), {}, labels)


def test_images_without_groups_name_the_wrapper():
    logits, labels, _ = batches(1)[0]
    with pytest.raises(ValueError, match=r"{group: True}.*forward_with_companions"):
        GroupDROLoss(DATA)({".": {"output": logits}}, {}, labels)


def test_its_key_refuses_other_keywords():
    with pytest.raises(ValueError, match=r"GroupDROLoss: keyword: .*'step_size'"):
        MIDDLE_LEVEL_LOSS_DICT["GroupDROLoss"](dataset=DATA, stepsize=1.0)
