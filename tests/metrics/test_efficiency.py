"""Costs against closed forms, saved files and published counts."""

import json
import time

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from kd_lrp_plugin.metrics.efficiency import (
    cost,
    count_flops,
    count_flops_keras,
    count_macs,
    count_parameters,
    measure_latency,
    megabytes,
    memory_access_cost,
)
from kd_lrp_plugin.models.factory import thesis_student, thesis_teacher

# [T], table 3.6
PUBLISHED_TEACHER_MACS, PUBLISHED_TEACHER_FLOPS = 322_421_548, 644_843_096
PUBLISHED_STUDENT_MACS, PUBLISHED_STUDENT_FLOPS = 306_724_268, 613_448_536


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


def small_net() -> nn.Module:
    """Plain, strided, depthwise, grouped and dilated convolutions; 16 px become 16, 8, 8, 4, 4."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
        nn.Conv2d(8, 12, 1, groups=4),
        nn.Conv2d(12, 6, (3, 5), stride=2, padding=(1, 2), groups=2),
        nn.Conv2d(6, 4, 3, padding=2, dilation=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


# For each convolution of it: H·W of the output, Cin, Cout, K², groups.
CONVOLUTIONS = [(256, 3, 8, 9, 1), (64, 8, 8, 9, 8), (64, 8, 12, 1, 4), (16, 12, 6, 15, 2)]
CONVOLUTIONS += [(16, 6, 4, 9, 1)]


def test_flops_and_macs_follow_the_formula_on_a_small_net():
    macs = sum(hw * cin // groups * cout * k for hw, cin, cout, k, groups in CONVOLUTIONS) + 4 * 5
    assert count_macs(small_net(), 16) == macs
    assert count_flops(small_net(), 16) == 2 * macs


def test_memory_access_cost_follows_the_formula_on_a_small_net():
    assert memory_access_cost(small_net(), 16) == sum(
        hw * (cin + cout) + k * cin // groups * cout for hw, cin, cout, k, groups in CONVOLUTIONS
    )


def test_memory_access_cost_of_a_plain_convolution_is_the_printed_formula():
    model = nn.Conv2d(5, 7, kernel_size=3, stride=2, padding=1)
    assert memory_access_cost(model, 9, channels=5) == 5 * 5 * (5 + 7) + 3 * 3 * 5 * 7


def test_a_convolution_called_twice_costs_twice():
    layer = nn.Conv2d(3, 3, 3, padding=1)
    once, twice = cost(layer, 8, batch_sizes=()), cost(nn.Sequential(layer, layer), 8, 3, ())
    for key in ("macs", "flops", "memory_access_cost"):
        assert twice[key] == 2 * once[key] > 0
    assert twice["megabytes"] == once["megabytes"]


def test_memory_access_sees_the_subclasses_of_convolution():
    # timm's "same" padding comes from a subclass; the outputs have the sizes of the plain ones
    plain, same = (timm.create_model("mobilenetv2_035", pad_type=pad) for pad in ("", "same"))
    assert memory_access_cost(same, 64) == memory_access_cost(plain, 64) > 0


def test_memory_access_sees_convolutions_that_are_functions():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(7, 5, 3, 3))

        def forward(self, images):
            return nn.functional.conv2d(images, self.weight, stride=2, padding=1)

    assert memory_access_cost(Functional(), 9, channels=5) == 5 * 5 * (5 + 7) + 3 * 3 * 5 * 7


def test_memory_access_follows_height_and_width():
    model = nn.Conv2d(5, 7, kernel_size=3, padding=1)
    assert memory_access_cost(model, (4, 6), channels=5) == 24 * (5 + 7) + 3 * 3 * 5 * 7


@pytest.mark.parametrize(
    ("model", "published_macs", "published_flops", "published_megabytes"),
    [
        (thesis_teacher, PUBLISHED_TEACHER_MACS, PUBLISHED_TEACHER_FLOPS, 73),
        (thesis_student, PUBLISHED_STUDENT_MACS, PUBLISHED_STUDENT_FLOPS, 10),
    ],
)
def test_costs_relate_to_the_published_ones(
    model, published_macs, published_flops, published_megabytes
):
    record = cost(model(), 224, batch_sizes=())
    assert record["counters_differ_by"] == 0
    assert round(record["megabytes"]) == published_megabytes
    assert published_flops == 2 * published_macs
    # The published counts hold more than convolutions and linear layers; 2.2 % was measured.
    assert 0.021 < 1 - record["macs"] / published_macs < 0.023


def test_teacher_and_student_differ_as_published_but_for_the_pooling():
    # Half a MAC for each of the 1280·7·7 values that the student pools, which is no MAC to us.
    pooling = 1280 * 7 * 7 // 2
    ours = count_macs(thesis_teacher(), 224) - count_macs(thesis_student(), 224)
    assert ours == (1280 * 7 * 7 - 1280) * 256
    assert ours - pooling == PUBLISHED_TEACHER_MACS - PUBLISHED_STUDENT_MACS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_megabytes_are_those_of_a_saved_file(tmp_path, dtype):
    model = timm.create_model("mobilenetv2_035").to(dtype)
    model.register_buffer("not_saved", torch.zeros(1000), persistent=False)
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert megabytes(model) == (len(content) - header) / 1e6


def test_shared_weights_are_saved_once():
    layer = nn.Linear(3, 4)
    assert megabytes(nn.Sequential(layer, layer)) == megabytes(layer) == 16 * 4 / 1e6


def sleeper(calls: list) -> nn.Module:
    """Takes 20 ms, but 200 ms the first time; notes batch, mode and gradient of each call."""

    class Sleeper(nn.Module):
        def forward(self, images):
            time.sleep(0.02 if calls else 0.2)
            calls.append((len(images), self.training, torch.is_grad_enabled()))
            return images

    return Sleeper()


def test_latency_is_that_of_a_batch_after_the_warm_up():
    calls = []
    seconds = measure_latency(sleeper(calls), image_size=2, batch_size=5, seconds=0.2)
    assert 0.02 <= seconds < 0.1
    assert set(calls) == {(5, False, False)}
    assert len(calls) >= 2 + 3


def test_a_slow_model_is_still_measured_three_times():
    calls = []
    measure_latency(sleeper(calls), image_size=2, seconds=0)
    assert len(calls) == 2 + 3


@pytest.mark.parametrize("measure", [measure_latency, lambda m, s, n: cost(m, s, batch_sizes=[n])])
def test_an_empty_batch_is_refused(measure):
    with pytest.raises(ValueError, match=r"expected batch sizes of 1 or more, got \[0\]\. Give"):
        measure(nn.Conv2d(3, 1, 1), 4, 0)


def test_cost_is_one_flat_record_that_json_keeps():
    record = cost(small_net(), 16)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert all(type(value) in (int, float) for value in record.values())
    assert list(record) == [
        "parameters",
        "parameters_and_statistics",
        "macs",
        "flops",
        "flops_keras",
        "memory_access_cost",
        "megabytes",
        "latency_ms_batch_1",
        "images_per_second_batch_1",
        "latency_ms_batch_32",
        "images_per_second_batch_32",
        "macs_by_thop",
        "counters_differ_by",
    ]
    for n in (1, 32):
        per_second = 1000 * n / record[f"latency_ms_batch_{n}"]
        assert record[f"images_per_second_batch_{n}"] == pytest.approx(per_second)


def test_cost_holds_the_figures_of_the_single_functions():
    model = small_net()
    record = cost(model, 16, batch_sizes=())
    assert record == {
        "parameters": count_parameters(model),
        "parameters_and_statistics": count_parameters(model) + 16,
        "macs": count_macs(model, 16),
        "flops": 2 * count_macs(model, 16),
        "flops_keras": count_flops_keras(model, 16),
        "memory_access_cost": memory_access_cost(model, 16),
        "megabytes": megabytes(model),
        "macs_by_thop": count_flops(model, 16) // 2,
        "counters_differ_by": 0.0,
    }


def test_a_model_without_parameters_costs_nothing():
    record = cost(nn.ReLU(), 8, batch_sizes=[1])
    assert record.pop("latency_ms_batch_1") > 0
    assert record.pop("images_per_second_batch_1") > 0
    assert set(record.values()) == {0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cost_works_in_the_models_dtype(dtype):
    expected = cost(small_net(), 16, batch_sizes=())
    record = cost(small_net().to(dtype), 16, batch_sizes=())
    assert record.pop("megabytes") != expected.pop("megabytes")
    assert record == expected


class DrawsInEvaluation(nn.Module):
    def forward(self, features):
        return nn.functional.dropout(features, training=True)


def get_state(model: nn.Module) -> list:
    """Everything that measuring could change, as comparable values."""
    tensors = [
        (name, id(t), t.requires_grad, t.dtype, t.tolist(), None if t.grad is None else id(t.grad))
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    ]
    modules = [
        (module.training, sorted(vars(module)), len(module._forward_hooks), list(module._buffers))
        for module in model.modules()
    ]
    return [tensors, modules, torch.get_rng_state().tolist(), torch.is_grad_enabled()]


def in_training() -> nn.Module:
    model = small_net()
    model(torch.rand(2, 3, 16, 16)).sum().backward()  # with gradients
    model[1].eval()
    return model


def frozen() -> nn.Module:
    return small_net().requires_grad_(False).eval()


def born_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return small_net().eval()


def hooked() -> nn.Module:
    model = small_net()
    model[3].register_forward_hook(lambda module, args, output: output + 1)
    return model


@pytest.mark.parametrize(
    "measure",
    [
        count_macs,
        count_flops,
        count_flops_keras,
        memory_access_cost,
        lambda model, size: measure_latency(model, size, seconds=0.01),
        lambda model, size: cost(model, size, batch_sizes=(1, 2)),
    ],
    ids=["macs", "flops", "flops_keras", "memory_access", "latency", "cost"],
)
@pytest.mark.parametrize("build", [in_training, frozen, born_in_inference_mode, hooked])
def test_measuring_leaves_the_model_and_the_random_state_as_they_were(build, measure):
    model = nn.Sequential(*build(), DrawsInEvaluation())
    before = get_state(model)
    measure(model, 16)
    assert get_state(model) == before


def test_no_state_changes_when_the_model_fails():
    model = small_net()
    before = get_state(model)
    with pytest.raises(RuntimeError, match="channels"):
        cost(model, 16, channels=4)
    assert get_state(model) == before


def test_costs_are_those_of_the_whole_model_inside_inference_mode():
    with torch.inference_mode():
        inside = cost(small_net(), 16, batch_sizes=())
    assert inside == cost(small_net(), 16, batch_sizes=())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cost_on_a_gpu_is_that_on_the_cpu_but_for_time():
    state = torch.cuda.get_rng_state()
    on_gpu = cost(nn.Sequential(small_net(), DrawsInEvaluation()).cuda(), 16, batch_sizes=(1,))
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert on_gpu.pop("latency_ms_batch_1") > 0
    assert on_gpu.pop("images_per_second_batch_1") > 0
    assert on_gpu == cost(small_net(), 16, batch_sizes=())
