"""Heads on inner layers: hints through a regressor, and probes."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import two_processes
from preloaded import run as run_preloaded
from safetensors.torch import load_file
from small_runs import CONFIGS, NO_TEACHER, SMALL, Stopped, StopsAt, outcome, same
from torch import Tensor, nn
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT
from torchdistill.models.registry import get_auxiliary_model_wrapper

from kd_lrp_plugin import torchdistill as plugin
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.models.factory import build_model
from kd_lrp_plugin.training.trainer import distill

FITNET = CONFIGS / "phantom_marked/fitnet/test_resnet_from_resnet10t.yaml"
PROBES = CONFIGS / "phantom_marked/probes/test_resnet_from_resnet10t.yaml"


def net(width: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Softplus(), nn.Dropout(0.5)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)),
    ).double()


def probed(width: int, role: str) -> plugin.ModelWithHeads:
    kwargs = {"in_features": width, "num_classes": 3}
    head = {"path": "2", "key": "linear_probe", "kwargs": kwargs}
    wrapper = get_auxiliary_model_wrapper(
        "ModelWithHeads", **{f"{role}_model": net(width)}, heads={"inner": head}
    )
    return wrapper.double()


def outputs(model: plugin.ModelWithHeads, images: Tensor) -> dict:
    """What torchdistill's hooks find."""
    found = {}
    handle = model.heads["inner"].register_forward_hook(
        lambda _, __, output: found.update({"heads.inner": {"output": output}})
    )
    found["."] = {"output": model(images)}
    handle.remove()
    return found


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 6, 6, generator=generator).double(), torch.tensor([0, 1, 2, 2])


def softened(logits: list[float], temperature: float) -> list[float]:
    exponentials = [math.exp(value / temperature) for value in logits]
    return [value / sum(exponentials) for value in exponentials]


def loss_by_hand(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float):
    """Cross entropy of the teacher's probe and divergence of the student's, by loops."""
    labels, divergence = 0.0, 0.0
    for s, t, label in zip(student.tolist(), teacher.tolist(), targets.tolist(), strict=True):
        labels -= math.log(softened(t, 1.0)[label]) / len(targets)
        pairs = zip(softened(s, temperature), softened(t, temperature), strict=True)
        divergence += sum(q * math.log(q / p) for p, q in pairs) / len(targets)
    return labels, temperature**2 * divergence


def logits_by_hand(model: plugin.ModelWithHeads, images: Tensor) -> Tensor:
    linear = model.heads["inner"][2]
    features = model.model[:3](images).detach()
    rows = [
        [
            float((image.mean((1, 2)) * weight).sum() + b)
            for weight, b in zip(*linear.parameters(), strict=True)
        ]
        for image in features
    ]
    return torch.tensor(rows, dtype=torch.float64)


class TestProbes:
    def test_the_loss_is_that_of_the_formula(self):
        student, teacher = probed(4, "student").eval(), probed(5, "teacher")
        images, targets = batch()
        loss = MIDDLE_LEVEL_LOSS_DICT["ProbeKLLoss"](probes=["inner"], temperature=2.0)
        value = loss(outputs(student, images), outputs(teacher, images), targets)
        logits = [logits_by_hand(model, images) for model in (student, teacher)]
        assert float(value) == pytest.approx(sum(loss_by_hand(*logits, targets, 2.0)), rel=1e-10)

    def test_several_probes_are_averaged(self):
        images, targets = batch()
        student, teacher = (
            outputs(probed(4, "student"), images),
            outputs(probed(5, "teacher"), images),
        )
        parts = []
        for role in (student, teacher):
            role["heads.other"] = {"output": 2 * role["heads.inner"]["output"]}
        for probes in (["inner"], ["other"], ["inner", "other"]):
            parts.append(float(plugin.ProbeKLLoss(probes)(student, teacher, targets)))
        assert parts[2] == pytest.approx((parts[0] + parts[1]) / 2, rel=1e-12)

    def test_the_gradient_reaches_the_weights_of_the_student(self):
        student, teacher = probed(4, "student").eval(), probed(5, "teacher")
        images, targets = batch()
        plugin.ProbeKLLoss(["inner"])(
            outputs(student, images), outputs(teacher, images), targets
        ).backward()
        kept = logits_by_hand(teacher, images)
        for parameter in (student.model[0].weight, student.heads["inner"][2].weight):
            flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
            for index in range(0, len(flat), max(1, len(flat) // 5)):
                found, before = [], float(flat[index])
                for step in (1e-5, -1e-5):
                    flat[index] = before + step
                    logits = logits_by_hand(student, images)
                    found.append(loss_by_hand(logits, kept, targets, 4.0)[1])
                flat[index] = before
                slope = (found[0] - found[1]) / 2e-5
                assert float(gradient[index]) == pytest.approx(slope, rel=1e-5, abs=1e-9)

    def test_the_teachers_probes_learn_the_labels_and_nothing_of_the_student(self):
        student, teacher = probed(4, "student"), probed(5, "teacher")
        images, targets = batch()
        found = outputs(teacher, images)
        plugin.ProbeKLLoss(["inner"])(outputs(student, images), found, targets).backward()
        weight = teacher.heads["inner"][2].weight
        alone = nn.functional.cross_entropy(
            outputs(teacher, images)["heads.inner"]["output"], targets
        )
        torch.testing.assert_close(weight.grad, torch.autograd.grad(alone, weight)[0])
        assert all(parameter.grad is None for parameter in teacher.model.parameters())

    def test_the_teacher_stays_as_it_is(self, untouched):
        teacher = probed(5, "teacher")
        teacher.eval()
        expected = teacher(batch()[0])
        teacher.train()
        before = copy.deepcopy(teacher.state_dict())
        assert torch.equal(teacher(batch()[0]), expected)  # no dropout, no statistics of the batch
        assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())

    def test_heads_change_nothing_of_the_model(self):
        student = probed(4, "student")
        torch.manual_seed(0)
        plain = student.model(batch()[0])
        torch.manual_seed(0)
        assert torch.equal(student(batch()[0]), plain)
        assert not any(module._forward_hooks for module in student.modules())


class TestErrors:
    def wrapped(self, **head: object) -> None:
        get_auxiliary_model_wrapper("ModelWithHeads", student_model=net(4), heads={"one": head})

    @pytest.mark.parametrize(
        ("head", "words"),
        [
            ({"key": "Conv2d"}, "expected one of .*'path'"),
            ({"path": "2", "key": "Conv2d", "kwarg": {}}, "Did you mean 'kwargs'"),
            ({"path": "layer2", "key": "Conv2d"}, r"heads\.one\.path: expected one of"),
            (
                {"path": "2", "key": "linear_probe", "kwargs": {"in_feature": 4}},
                "Did you mean 'in_features'",
            ),
        ],
    )
    def test_a_wrong_head_is_named(self, head, words):
        with pytest.raises(ValueError, match=words):
            self.wrapped(**head)

    @pytest.mark.parametrize("probes", [[], "layer2"])
    def test_probes_are_a_list(self, probes):
        with pytest.raises(ValueError, match="probes: expected a list of names"):
            plugin.ProbeKLLoss(probes)

    def test_a_probe_that_no_hook_reads_is_named(self):
        images, targets = batch()
        student = outputs(probed(4, "student"), images)
        with pytest.raises(ValueError, match=r"heads\.inner of the teacher.*forward_hook\.output"):
            plugin.ProbeKLLoss(["inner"])(student, {".": student["."]}, targets)


def run(config: Path, out: Path, *overrides: str) -> dict:
    words = [*SMALL, *NO_TEACHER, "train.num_epochs=2", *overrides]
    return distill(RunSpec(str(config), words, out, device="cpu"))


@pytest.mark.parametrize(
    ("config", "terms"), [(FITNET, ("kd", "hint2", "hint3")), (PROBES, ("kd", "probes"))]
)
class TestConfigs:
    @pytest.mark.slow
    def test_resumes_bitwise_and_saves_a_student_without_heads(self, config, terms, tmp_path):
        run(config, tmp_path / "uninterrupted")
        with pytest.raises(Stopped), StopsAt("epoch 2"):
            run(config, tmp_path / "stopped")
        run(config, tmp_path / "stopped")
        first, second = outcome(tmp_path / "uninterrupted"), outcome(tmp_path / "stopped")
        assert same(first, second)
        for line in (tmp_path / "stopped/metrics.jsonl").read_text().splitlines():
            assert all(math.isfinite(json.loads(line)[f"train_{term}"]) for term in terms)
        weights = load_file(tmp_path / "stopped/student.safetensors")
        build_model("test_resnet", 4).load_state_dict(weights, strict=True)
        heads = first["last"]["models"]["student"]
        assert {name for name in heads if name.startswith("heads.")}


@pytest.mark.slow
def test_of_a_teacher_the_probes_alone_are_trained(tmp_path):
    states = []
    for epochs in (1, 2):
        run(PROBES, tmp_path / f"{epochs}", f"train.num_epochs={epochs}")
        states.append(outcome(tmp_path / f"{epochs}")["last"]["models"]["teacher"])
    changed = {name for name, value in states[0].items() if not torch.equal(value, states[1][name])}
    assert changed == {name for name in states[0] if name.startswith("heads.")}


def test_hints_are_shared_among_processes(tmp_path):
    """The regressors, too; the model has no batch norm, so that a batch can be cut."""
    heads = ", ".join(
        f"{name}: {{path: {path}, key: Conv2d, "
        f"kwargs: {{in_channels: {width}, out_channels: {out}, kernel_size: 1}}}}"
        for name, path, width, out in (
            ("layer2", "stages.1", 32, 128),
            ("layer3", "stages.2", 48, 256),
        )
    )
    words = [
        *SMALL,
        *NO_TEACHER,
        "train.optimizer={key: SGD, kwargs: {lr: 1.0}}",
        "train.scheduler=null",
        "models.student_model.kwargs.name=test_convnext",
        f"train.student.auxiliary_model_wrapper.kwargs.heads={{{heads}}}",
    ]
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    two_processes.main(str(FITNET), str(one), *words)
    done = run_preloaded(two_processes.__file__, str(FITNET), str(two), *words, processes=2)
    assert done.returncode == 0, done.stderr
    changes = [torch.load(file, weights_only=True)["change"] for file in (one, two)]
    largest = max(float(value.abs().max()) for value in changes[0].values())
    assert {name for name in changes[0] if name.startswith("heads.")}
    for name, change in changes[0].items():
        assert float((change - changes[1][name]).abs().max()) < 1e-5 * largest
