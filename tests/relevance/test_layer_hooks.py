"""What a recording leaves in a model, in its copies and in the process: nothing."""

import pickle
from copy import deepcopy

import pytest
import torch
from reference import LRP, PLAIN, randomize
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from kd_lrp_plugin.relevance.graph import is_relevance_function
from kd_lrp_plugin.relevance.recording import record, relevance_maps

METHODS = PLAIN + LRP
IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(5)).double()
TARGETS = torch.tensor([0, 2])


def make_net() -> nn.Sequential:
    layers = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    return randomize(nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3)), 3)


def take_step(net: nn.Module, method: str) -> Tensor:
    with record(net, ["0"], method) as recording:
        logits = net(IMAGES)
    (map_,) = recording.maps(logits, TARGETS, create_graph=True, signed=True)
    map_.square().sum().backward()
    return map_.detach()


def count_hooks(net: nn.Module) -> int:
    everywhere = [
        found for name, found in vars(torch_module).items() if name.startswith("_global_forward_")
    ]
    own = [(*m._forward_hooks, *m._forward_pre_hooks) for m in net.modules()]
    return sum(map(len, [*everywhere, *own]))


def find_relevance_functions(tensor: Tensor) -> list:
    found, stack, seen = [], [tensor.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += [node] if is_relevance_function(node) else []
        stack += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("method", METHODS)
class TestBetweenSteps:
    def test_no_hook_is_left_after_a_step_nor_after_an_error(self, method):
        net = make_net()
        before = count_hooks(net)
        take_step(net, method)
        assert count_hooks(net) == before
        with pytest.raises(RuntimeError, match="shapes cannot be"), record(net, ["0"], method):
            net(IMAGES[:, :, :4, :4])
        assert count_hooks(net) == before

    def test_a_forward_pass_that_is_not_recorded_runs_as_it_would(self, method):
        net = make_net().eval()
        expected = net(IMAGES)
        take_step(net, method)
        logits = net(IMAGES)
        assert torch.equal(logits, expected)
        assert find_relevance_functions(logits) == []
        with record(net, ["0"], method):
            served = net(IMAGES)
        assert find_relevance_functions(served) or method == "grad_cam"

    def test_a_copy_and_a_saved_model_are_models_without_a_recording(self, method):
        net = make_net()
        expected = take_step(net, method)
        copied = deepcopy(net)
        loaded = pickle.loads(pickle.dumps(net))  # as torch.save does with a whole model
        for other in (copied, loaded):
            assert find_relevance_functions(other(IMAGES)) == []
            torch.testing.assert_close(take_step(other, method), expected)

    def test_a_module_that_is_replaced_between_steps_is_served(self, method):
        net = make_net().eval()
        take_step(net, method)
        net[3] = nn.SiLU()
        fresh = make_net().eval()
        fresh[3] = nn.SiLU()
        torch.testing.assert_close(take_step(net, method), take_step(fresh, method))

    def test_another_model_runs_while_one_is_recorded(self, method):
        net, teacher = make_net().eval(), make_net().eval()
        (expected,) = relevance_maps(net, IMAGES, TARGETS, ["0"], method, signed=True)
        with record(net, ["0"], method) as recording:
            logits = net(IMAGES)
            of_teacher = teacher(IMAGES)
        assert find_relevance_functions(of_teacher) == []
        assert torch.equal(recording.maps(logits, TARGETS, signed=True)[0], expected)


@pytest.mark.parametrize("first", ["whole", "part"])
def test_a_model_is_not_recorded_within_a_recording_that_shares_a_layer(first):
    part = make_net()
    whole = nn.Sequential(part, nn.Identity())
    names = {"whole": (whole, "0.0"), "part": (part, "0")}
    (other,) = names.keys() - {first}
    (model, layer), (inner, inner_layer) = names[first], names[other]
    words = "a model that is not being recorded"
    with (
        record(model, [layer]),
        pytest.raises(ValueError, match=words),
        record(inner, [inner_layer]),
    ):
        pass
    with record(inner, [inner_layer]):
        inner(IMAGES)


def test_two_models_are_recorded_at_once():
    nets = [make_net().eval(), randomize(make_net(), 9).eval()]
    expected = [relevance_maps(n, IMAGES, TARGETS, ["0"], "lrp_zplus", signed=True) for n in nets]
    with record(nets[0], ["0"], "lrp_zplus") as one, record(nets[1], ["0"], "lrp_zplus") as two:
        logits = [net(IMAGES) for net in nets]
    for recording, y, (map_,) in zip((one, two), logits, expected, strict=True):
        assert torch.equal(recording.maps(y, TARGETS, signed=True)[0], map_)
