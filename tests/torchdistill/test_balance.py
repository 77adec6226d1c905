"""``balance: gradient``: the weights of DisWOTPlusLoss as shares of the gradient."""

import json
import math
from pathlib import Path

import pytest
import torch
import two_processes
from preloaded import run as run_preloaded
from small_runs import LRP, NO_TEACHER, SMALL, Stopped, StopsAt, outcome, same
from torch import Tensor, nn
from torchdistill.core.interfaces.registry import get_forward_proc_func

from kd_lrp_plugin import losses
from kd_lrp_plugin import torchdistill as plugin
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.torchdistill.balance import SMOOTHING, GradientBalance
from kd_lrp_plugin.training.trainer import distill

LAYERS = ["1", "3"]
WEIGHTS = {"ce": 0.25, "kl": 0.25, "semantic": 0.3, "relation": 0.2}
SEMANTIC = {"key": "LRPRelativeL2Loss", "kwargs": {"signed": True}}
BALANCED = (
    "train.criterion.kwargs={alpha: 0.25, beta: 0.25, gamma: 0.5, delta: 0, balance: gradient}"
)


def net(width: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3), nn.Softplus(), nn.Conv2d(width, 4, 3, 2), nn.Softplus()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)),
    ).double()


def nets() -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(1)
    return net(3), net(5).requires_grad_(False).eval()


def images(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 9, 9, generator=generator).double(), torch.tensor([0, 1, 2, 3])


def recorded_batch(student: nn.Module, teacher: nn.Module, batch: Tensor) -> dict:
    procedure = get_forward_proc_func(plugin.recorder(LAYERS))
    found = {"student": procedure(student, batch), "teacher": procedure(teacher, batch)}
    return {role: {".": {"output": logits}} for role, logits in found.items()}


def balanced(**more: object) -> plugin.DisWOTPlusLoss:
    kwargs = {"semantic": SEMANTIC, "balance": "gradient", **more}
    return plugin.DisWOTPlusLoss(*WEIGHTS.values(), **kwargs)


def plain_terms(student: nn.Sequential, teacher: nn.Sequential, seed: int = 0):
    """Values of the four terms and the activations, by plain autograd, without a recording."""
    batch, targets = images(seed)
    kept = {}
    for role, model in (("student", student), ("teacher", teacher)):
        first = model[:2](batch)
        first = first if first.requires_grad else first.detach().requires_grad_()
        second = model[2:4](first)
        logits = model[4:](second)
        own = logits.gather(1, targets[:, None]).sum()
        gradients = torch.autograd.grad(own, (first, second), create_graph=True)
        maps = [(a * g).sum(1) for a, g in zip((first, second), gradients, strict=True)]
        kept[role] = logits, (first, second), maps
    (of_student, features, maps), (of_teacher, teacher_features, teacher_maps) = kept.values()
    distances = [
        (s - t.detach()).square().sum() / t.detach().square().sum()
        for s, t in zip(maps, teacher_maps, strict=True)
    ]
    relations = [
        losses.relation_cosine(s, t) for s, t in zip(features, teacher_features, strict=True)
    ]
    values = {
        "ce": nn.functional.cross_entropy(of_student, targets),
        "kl": losses.kl_divergence(of_student, of_teacher.detach(), 4.0),
        "semantic": sum(distances) / 2,
        "relation": sum(relations) / 2,
    }
    return values, features


def norms_by_hand(student: nn.Sequential, teacher: nn.Sequential, seed: int = 0):
    values, features = plain_terms(student, teacher, seed)
    norms = {}
    for name, value in values.items():
        gradients = torch.autograd.grad(value, features, retain_graph=True)
        norms[name] = math.sqrt(sum(float(entry**2) for g in gradients for entry in g.flatten()))
    return norms


def factors_by_hand(norms: dict[str, float], weights: dict[str, float]) -> dict[str, float]:
    labels = [name for name in ("ce", "kl") if name in weights] or list(weights)
    scale = sum(weights[n] * norms[n] for n in labels) / sum(weights[n] for n in labels)
    return {name: weight * scale / norms[name] for name, weight in weights.items()}


def step_factors(loss: plugin.DisWOTPlusLoss) -> dict[str, float]:
    return {name: float(factor) for name, factor in loss.factors.items()}


class TestFactors:
    def test_are_those_of_the_formula(self):
        student, teacher = nets()
        loss = balanced()
        loss(recorded_batch(student, teacher, images()[0]), {}, images()[1])
        norms = norms_by_hand(student, teacher)
        assert step_factors(loss) == pytest.approx(factors_by_hand(norms, WEIGHTS), rel=1e-5)

    def test_give_each_gradient_its_share_and_keep_that_of_the_labels(self):
        student, teacher = nets()
        loss = balanced()
        loss(recorded_batch(student, teacher, images()[0]), {}, images()[1])
        norms = norms_by_hand(student, teacher)
        sizes = {name: factor * norms[name] for name, factor in step_factors(loss).items()}
        total = sum(sizes.values())
        assert {n: s / total for n, s in sizes.items()} == pytest.approx(WEIGHTS, rel=1e-5)
        unbalanced = sum(WEIGHTS[name] * norms[name] for name in ("ce", "kl"))
        assert sizes["ce"] + sizes["kl"] == pytest.approx(unbalanced, rel=1e-5)

    def test_are_smoothed_over_the_batches(self):
        student, teacher = nets()
        loss = balanced()
        average: dict[str, float] = {}
        for seed in range(3):
            batch, targets = images(seed)
            loss(recorded_batch(student, teacher, batch), {}, targets)
            for name, norm in norms_by_hand(student, teacher, seed).items():
                average[name] = SMOOTHING * average.get(name, norm) + (1 - SMOOTHING) * norm
        expected = factors_by_hand(average, WEIGHTS)
        assert step_factors(loss) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("name", ["semantic", "relation"])
    def test_take_no_notice_of_the_scale_of_a_distance(self, name, monkeypatch):
        keys = {"semantic": "LRPRelativeL2Loss", "relation": "RelationCosineLoss"}
        comparison = plugin.COMPARISONS[keys[name]]
        steps = []
        for scale in (1, 1000):
            student, teacher = nets()
            loss = balanced()
            term, _ = loss.term_dict[name]
            scaled = plugin.Comparison(
                lambda s, t, scale=scale: scale * comparison.distance(s, t),
                comparison.kind,
                comparison.has_size,
            )
            monkeypatch.setattr(term, "comparison", scaled)
            optimiser = torch.optim.SGD(student.parameters(), lr=1.0)
            for seed in range(2):
                batch, targets = images(seed)
                optimiser.zero_grad()
                loss(recorded_batch(student, teacher, batch), {}, targets).backward()
                optimiser.step()
            steps.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
        torch.testing.assert_close(steps[0], steps[1], rtol=1e-5, atol=1e-7)

    def test_a_term_alone_has_its_weight(self):
        student, teacher = nets()
        parts, targets = recorded_batch(student, teacher, images()[0]), images()[1]
        for weights in ((1.0, 0, 0, 0), (0, 0, 1.0, 0)):
            loss = plugin.DisWOTPlusLoss(*weights, semantic=SEMANTIC, balance="gradient")
            plain = plugin.DisWOTPlusLoss(*weights, semantic=SEMANTIC)
            torch.testing.assert_close(loss(parts, {}, targets), plain(parts, {}, targets))

    def test_without_terms_of_labels_all_are_the_reference(self):
        student, teacher = nets()
        loss = plugin.DisWOTPlusLoss(0, 0, 0.6, 0.4, semantic=SEMANTIC, balance="gradient")
        loss(recorded_batch(student, teacher, images()[0]), {}, images()[1])
        norms = norms_by_hand(student, teacher)
        expected = factors_by_hand(norms, {"semantic": 0.6, "relation": 0.4})
        assert step_factors(loss) == pytest.approx(expected, rel=1e-5)

    def test_a_weight_that_a_schedule_has_lowered_is_a_lower_share(self):
        student, teacher = nets()
        loss = balanced()
        parts, targets = recorded_batch(student, teacher, images()[0]), images()[1]
        norms = norms_by_hand(student, teacher)
        for share in (0.0, 0.15, 0.3):
            loss.term_dict["semantic"] = loss.term_dict["semantic"][0], share
            loss(parts, {}, targets)
            weights = {n: w for n, w in (WEIGHTS | {"semantic": share}).items() if w > 0}
            assert step_factors(loss) == pytest.approx(factors_by_hand(norms, weights), rel=1e-5)


class TestStep:
    def test_the_gradient_is_the_sum_of_factors_times_gradients(self):
        """Finite differences of the four terms against the student's weights, factors constant."""
        student, teacher = nets()
        loss = balanced()
        batch, targets = images()
        loss(recorded_batch(student, teacher, batch), {}, targets).backward()
        factors = step_factors(loss)
        for parameter in student.parameters():
            flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
            for index in range(0, len(flat), max(1, len(flat) // 4)):
                found, kept = [], float(flat[index])
                for step in (1e-5, -1e-5):
                    flat[index] = kept + step
                    values, _ = plain_terms(student, teacher)
                    found.append(sum(factors[n] * float(v.detach()) for n, v in values.items()))
                flat[index] = kept
                slope = (found[0] - found[1]) / 2e-5
                assert float(gradient[index]) == pytest.approx(slope, rel=1e-5, abs=1e-8)

    def test_each_term_costs_one_backward_pass(self, monkeypatch):
        student, teacher = nets()
        parts, targets = recorded_batch(student, teacher, images()[0]), images()[1]
        passes, inside = [], []
        grad = torch.autograd.grad

        def count(*args, **kwargs):
            if not inside:  # else of a layer's own, within a pass
                passes.append(args)
            inside.append(args)
            try:
                return grad(*args, **kwargs)
            finally:
                inside.pop()

        monkeypatch.setattr(torch.autograd, "grad", count)
        for loss, more in ((balanced(balance=None), 0), (balanced(), 4)):
            passes.clear()
            loss(parts, {}, targets)
            assert len(passes) == 2 + more  # maps of student and teacher

    def test_validation_uses_the_latest_factors_and_changes_nothing(self):
        student, teacher = nets()
        loss = balanced()
        loss(recorded_batch(student, teacher, images()[0]), {}, images()[1])
        factors, norms = step_factors(loss), loss.balance.norms.clone()
        batch, targets = images(1)
        with torch.no_grad():
            total = loss(recorded_batch(student, teacher, batch), {}, targets)
        assert step_factors(loss) == factors
        assert torch.equal(loss.balance.norms, norms)
        values, _ = plain_terms(student, teacher, 1)
        expected = sum(factors[name] * float(value.detach()) for name, value in values.items())
        assert float(total) == pytest.approx(expected, rel=1e-6)

    def test_before_the_first_step_the_factors_are_the_weights(self):
        student, teacher = nets()
        loss = balanced()
        with torch.no_grad():
            loss(recorded_batch(student, teacher, images()[0]), {}, images()[1])
        assert step_factors(loss) == pytest.approx(WEIGHTS)

    def test_a_batch_without_the_term_leaves_its_norm(self):
        student, teacher = nets()
        loss = balanced(semantic={**SEMANTIC, "kwargs": {"signed": True, "every": 2}})
        found = []
        for seed in range(3):
            batch, targets = images(seed)
            loss(recorded_batch(student, teacher, batch), {}, targets)
            found.append(dict(zip(loss.balance.terms, loss.balance.norms.tolist(), strict=True)))
        assert found[0]["semantic"] == found[1]["semantic"] != found[2]["semantic"]
        assert found[0]["kl"] != found[1]["kl"] != found[2]["kl"]

    def test_a_gradient_of_zero_changes_no_factor(self):
        """The student is the teacher: its maps, relations and soft labels leave nothing to do."""
        _, teacher = nets()
        student = net(5)
        student.load_state_dict(teacher.state_dict())
        loss = plugin.DisWOTPlusLoss(0.5, 0, 0.5, 0, semantic=SEMANTIC, balance="gradient")
        batch, targets = images()
        total = loss(recorded_batch(student, teacher, batch), {}, targets)
        total.backward()
        assert step_factors(loss) == pytest.approx({"ce": 0.5, "semantic": 0.5})
        assert all(torch.isfinite(p.grad).all() for p in student.parameters())
        student[0].weight.data += 0.1
        loss(recorded_batch(student, teacher, batch), {}, targets)
        of_ce, of_semantic = loss.balance.norms.tolist()
        assert of_semantic > 0
        student.load_state_dict(teacher.state_dict())
        loss(recorded_batch(student, teacher, batch), {}, targets)
        assert loss.balance.norms[1] == of_semantic
        assert loss.balance.norms[0] != of_ce

    def test_under_autocast_the_factors_are_those_of_float32(self):
        found = {}
        for kind in (torch.float32, torch.bfloat16, torch.float16):
            student, teacher = (model.float() for model in nets())
            loss = balanced()
            with torch.autocast("cpu", kind, enabled=kind != torch.float32):
                parts = recorded_batch(student, teacher, images()[0].float())
                (loss(parts, {}, images()[1]) * 2.0**10).backward()
            found[kind] = step_factors(loss)
        for kind in (torch.bfloat16, torch.float16):
            assert found[kind] == pytest.approx(found[torch.float32], rel=0.05)


class TestErrors:
    def test_an_unknown_balance_is_named(self):
        with pytest.raises(ValueError, match=r"balance: expected .*'gradients'. Did you mean"):
            plugin.DisWOTPlusLoss(balance="gradients")

    def test_a_student_without_a_recorder_is_named(self):
        student, teacher = nets()
        batch, targets = images()
        parts = {"student": {".": {"output": student(batch)}}}
        parts["teacher"] = {".": {"output": teacher(batch)}}
        loss = plugin.DisWOTPlusLoss(0.5, 0.5, 0, 0, balance="gradient")
        with pytest.raises(ValueError, match=r"balance: .*train\.student\.forward_proc"):
            loss(parts, {}, targets)

    def test_a_gradient_that_is_not_finite_is_named(self):
        activation = torch.zeros(2, requires_grad=True)
        values = {"ce": activation.sum(), "semantic": activation.sqrt().sum()}
        balance = GradientBalance(["ce", "semantic"], ["ce"])
        with pytest.raises(FloatingPointError, match=r"\['semantic'\] with a gradient"):
            balance.update(values, [activation])
        assert not balance.norms.any()


def run(out: Path, *overrides: str) -> None:
    distill(RunSpec(str(LRP), [*SMALL, *NO_TEACHER, BALANCED, *overrides], out, device="cpu"))


class TestTrainer:
    @pytest.mark.slow
    def test_resumes_bitwise_and_logs_the_factors(self, tmp_path):
        epochs = ["train.num_epochs=2"]
        run(tmp_path / "uninterrupted", *epochs)
        with pytest.raises(Stopped), StopsAt("epoch 2"):
            run(tmp_path / "stopped", *epochs)
        run(tmp_path / "stopped", *epochs)
        first, second = outcome(tmp_path / "uninterrupted"), outcome(tmp_path / "stopped")
        assert same(first, second)
        assert first["last"]["losses"][""]["balance.norms"].all()
        lines = [json.loads(line) for line in (tmp_path / "stopped/metrics.jsonl").open()]
        assert all(line["train_semantic_factor"] > 0 for line in lines)
        assert not any("val_semantic_factor" in line for line in lines)

    @pytest.mark.parametrize("precision", ["float16", "bfloat16"])
    def test_trains_in_half_precision(self, precision, tmp_path):
        run(tmp_path / "run", f"+train.precision={precision}")
        (line,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
        assert all(math.isfinite(line[f"train_{name}_factor"]) for name in ("ce", "semantic"))

    def test_refuses_to_monitor_a_loss_that_means_another_thing_each_epoch(self, tmp_path):
        with pytest.raises(ValueError, match=r"train\.monitor: .*got val_loss. Monitor a term"):
            run(tmp_path / "run", "+train.monitor=val_loss")

    def test_two_processes_take_the_step_of_one_with_twice_the_batch(self, tmp_path):
        """Of terms that are means over the images, to whose norms no process is alone."""
        layers = "{layers: [stages.1], method: gradient_activation}"
        recorder = "!import_call {key: kd_lrp_plugin.torchdistill.recorder, init: {kwargs: %s}}"
        words = [
            *SMALL,
            *NO_TEACHER,
            "models.student_model.kwargs.name=test_convnext",
            "train.optimizer={key: SGD, kwargs: {lr: 1.0}}",
            f"train.student={{forward_proc: {recorder % layers}}}",
            f"train.teacher.forward_proc={recorder % layers.replace('stages.1', 'layer2')}",
            "train.criterion={key: DisWOTPlusLoss, kwargs: {alpha: 0.3, beta: 0.7, gamma: 0, "
            "delta: 0, balance: gradient}}",
        ]
        changes = []
        for processes in (1, 2):
            file = tmp_path / f"{processes}.pt"
            if processes == 1:
                two_processes.main(str(LRP), str(file), *words)
            else:
                done = run_preloaded(
                    two_processes.__file__, str(LRP), str(file), *words, processes=2
                )
                assert done.returncode == 0, done.stderr
            changes.append(torch.load(file, weights_only=True))
        one, two = (found["change"] for found in changes)
        largest = max(float(value.abs().max()) for value in one.values())
        assert max(float((one[n] - two[n]).abs().max()) for n in one) < 1e-5 * largest
        for name in ("ce", "kl"):
            key = f"train_{name}_factor"
            assert changes[0]["means"][key] == pytest.approx(changes[1]["means"][key], rel=1e-5)
