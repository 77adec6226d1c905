"""What a config can ask of the trainer: stages, schedules, precision, stopping, mixing, weights."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_runs import BASELINE, CONFIGS, CPU, KD, LRP, NO_TEACHER, SMALL
from torchdistill.core.interfaces.post_forward_proc import default_post_forward_process

from kd_lrp_plugin.config.build import assemble
from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.training import trainer
from kd_lrp_plugin.training.box import scaled_step
from kd_lrp_plugin.training.experiment import Experiment

STAGES = CONFIGS / "phantom/lrp_cosine/test_resnet_from_resnet10t-stages.yaml"
MANY = [s for s in SMALL if "num_epochs" not in s]


def build_run(config: Path, overrides: list[str], out: Path) -> trainer.Trainer:
    out.mkdir(exist_ok=True)
    experiment = Experiment(assemble(resolve_config(config, overrides)), CPU)
    return trainer.Trainer(experiment, RunFolder(out), 0)


def metrics(config: Path, overrides: list[str], out: Path) -> list[dict]:
    trainer.distill(RunSpec(config, overrides, out, device="cpu"))
    return [json.loads(line) for line in (out / "metrics.jsonl").open()]


class TestStages:
    def test_a_frozen_backbone_stays_as_it_is_to_the_last_statistic(self, tmp_path):
        run = build_run(STAGES, [*MANY, *NO_TEACHER], tmp_path / "run")
        before = {k: v.clone() for k, v in run.experiment.student.state_dict().items()}
        run._train_epoch()
        run._train_epoch()
        changed = self.changed(run, before)
        assert changed == {"fc.weight", "fc.bias"}
        assert run.experiment.stage == 2
        run._train_epoch()
        untouched = {name for name in before if name not in self.changed(run, before)}
        assert untouched == set()

    def test_a_frozen_part_of_a_trained_teacher_keeps_its_statistics(self, tmp_path):
        options = "requires_grad: true, frozen_modules: [conv1, bn1, layer1]"
        teacher = f"train.teacher={{forward_proc: forward_batch_only, {options}}}"
        run = build_run(KD, [*MANY, *NO_TEACHER, teacher], tmp_path / "run")
        run.experiment.begin_epoch()
        norms = {
            name: module.training
            for name, module in run.experiment.teacher.named_modules()
            if isinstance(module, torch.nn.BatchNorm2d)
        }
        frozen = ("conv1", "bn1", "layer1")
        assert norms == {name: not name.startswith(frozen) for name in norms}
        assert len({*norms.values()}) == 2

    def changed(self, run, before) -> set[str]:
        after = run.experiment.student.state_dict()
        return {name for name in before if not torch.equal(before[name], after[name])}

    def test_terms_set_in_when_their_schedule_says(self, tmp_path):
        records = metrics(STAGES, [*MANY, *NO_TEACHER], tmp_path / "run")
        assert [record["stage"] for record in records] == [1, 1, *[2] * (len(records) - 2)]
        assert ["train_semantic" in record for record in records[:5]] == [False] * 3 + [True] * 2
        of = {r["epoch"]: r for r in records}
        for epoch, weight in {4: 0.05, 5: 0.1}.items():
            r = of[epoch]
            parts = 0.4 * (r["val_ce"] + r["val_kl"])
            parts += weight * (r["val_semantic"] + r["val_relation"])
            # The last validation image stands alone and has no loss: all means are over eight.
            assert r["val_loss"] == pytest.approx(parts, rel=1e-5)

    @pytest.mark.slow
    def test_early_stopping_ends_a_stage_not_the_training(self, tmp_path):
        overrides = [*MANY, *NO_TEACHER, "+train.stage1.early_stopping={patience: 1, min_delta: 1}"]
        overrides += ["train.stage1.num_epochs=9", "train.stage2.num_epochs=1"]
        overrides.append("train.stage2.scheduler.kwargs.T_max=1")
        overrides.append("train.stage2.pre_epoch_process.init.kwargs.terms={}")
        records = metrics(STAGES, overrides, tmp_path / "run")
        assert [record["stage"] for record in records] == [1, 1, 2]


class TestStopping:
    def test_training_ends_after_the_epochs_of_patience_without_a_gain(self, tmp_path):
        stopping = "+train.early_stopping={patience: 2, min_delta: 0.9}"
        overrides = [*MANY, "train.num_epochs=9", stopping]
        assert len(metrics(BASELINE, overrides, tmp_path / "run")) == 3

    def test_a_run_that_keeps_its_last_epoch_ends_by_accuracy(self, tmp_path):
        options = ["+train.monitor=last", "+train.early_stopping={patience: 2, min_delta: 0.05}"]
        run = build_run(BASELINE, [*SMALL, *options], tmp_path / "run")
        stalls = []
        for epoch, accuracy in enumerate([0.3, 0.4, 0.44, 0.42], start=1):
            run.records.append({"epoch": epoch, "stage": 1, "val_accuracy": accuracy})
            stalls.append(run._stalls())
        assert stalls == [False, False, False, True]

    def test_a_scheduler_sees_the_metric(self, tmp_path):
        plateau = (
            "train.scheduler={key: ReduceLROnPlateau, kwargs: "
            "{mode: max, patience: 0, threshold: 9, factor: 0.5}}"
        )
        overrides = [*MANY, "train.num_epochs=3", plateau]
        rates = [record["lr"] for record in metrics(BASELINE, overrides, tmp_path / "run")]
        assert rates == [rates[0], rates[0], rates[0] / 2]

    def test_the_monitored_metric_chooses_the_best_epoch(self, tmp_path):
        overrides = [*MANY, "train.num_epochs=4", "+train.monitor=val_loss"]
        records = metrics(BASELINE, overrides, tmp_path / "run")
        summary = json.loads((tmp_path / "run/summary.json").read_text())
        best = min(records, key=lambda record: record["val_loss"])
        assert summary["best_epoch"] == best["epoch"]
        assert summary["val_loss"] == best["val_loss"]


class TestBestEpoch:
    def choose(self, overrides: list[str], values: list[dict], out: Path) -> int:
        run = build_run(LRP, [*SMALL, *NO_TEACHER, "image_size=32", *overrides], out / "run")
        for epoch, metrics in enumerate(values, start=1):
            run._keep_best({"epoch": epoch, **metrics})
            run.records.append(metrics)
        return run.best["epoch"]

    def test_of_equal_ones_the_lower_loss_is_taken_where_it_is_one_measure(self, tmp_path):
        values = [{"val_accuracy": 0.5, "val_loss": loss} for loss in (0.3, 0.1, 0.2)]
        schedule = (
            "+train.pre_epoch_process=!import_call {key: kd_lrp_plugin.torchdistill."
            "weight_schedule, init: {kwargs: {terms: {semantic: {until: 2}}}}}"
        )
        assert self.choose([], values, tmp_path) == 2
        assert self.choose([schedule], values, tmp_path) == 1

    def test_a_loss_that_is_no_number_is_the_worst(self, tmp_path):
        values = [{"val_accuracy": 0.5, "val_loss": loss} for loss in (float("nan"), 0.2, 0.3)]
        assert self.choose(["+train.monitor=val_loss"], values, tmp_path) == 2
        assert self.choose([], values, tmp_path) == 2


class TestPrecision:
    @pytest.mark.parametrize("precision", ["bfloat16", "float16"])
    def test_a_step_in_low_precision_is_near_the_full_one(self, precision, tmp_path):
        losses = {}
        for kind in ("float32", precision):
            torch.manual_seed(0)
            run = build_run(LRP, [*SMALL, *NO_TEACHER, f"+train.precision={kind}"], tmp_path / kind)
            run.experiment.begin_epoch()
            losses[kind] = run._train_batches(1)
            weights = run.experiment.student.state_dict().values()
            assert all(w.isfinite().all() for w in weights if w.is_floating_point())
            assert {w.dtype for w in weights} <= {torch.float32, torch.int64}
        for term in ("train_ce", "train_kl", "train_semantic", "train_relation"):
            assert losses[precision][term] == pytest.approx(losses["float32"][term], rel=0.15)

    @pytest.mark.parametrize("config", [BASELINE, LRP, STAGES])
    def test_float16_scales_the_loss_of_one_stage_and_of_several(self, config, tmp_path):
        overrides = [
            *MANY,
            *(NO_TEACHER if config != BASELINE else ()),
            "+train.precision=float16",
        ]
        run = build_run(config, overrides, tmp_path / "run")
        assert run.experiment.box.post_forward_process.__func__ is scaled_step

    def test_a_float16_step_is_the_float32_step_once_unscaled(self, tmp_path):
        """A power of two as the scale changes no digit of the gradient."""
        small = [*SMALL, "train.optimizer={key: SGD, kwargs: {lr: 1.0}, max_grad_norm: 0.1}"]
        changes = {}
        for name in ("plain", "scaled"):
            torch.manual_seed(0)
            run = build_run(BASELINE, small, tmp_path / name)
            box = run.experiment.box
            if name == "scaled":
                box.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
                box.post_forward_process = lambda loss, box=box: scaled_step(box, loss)
            before = {k: p.detach().clone() for k, p in run.experiment.student.named_parameters()}
            run.experiment.begin_epoch()
            images, targets, supplement = next(iter(box.train_data_loader))
            box.post_forward_process(loss=run.experiment.loss(images, targets, supplement))
            after = dict(run.experiment.student.named_parameters())
            changes[name] = {k: after[k].detach() - value for k, value in before.items()}
        for name, change in changes["plain"].items():
            torch.testing.assert_close(changes["scaled"][name], change, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("steps", [1, 4])
    def test_a_float16_step_has_the_schedule_of_a_float32_step(self, steps):
        rates = {}
        for process in (default_post_forward_process, scaled_step):
            weight = torch.nn.Parameter(torch.ones(1))
            optimizer = torch.optim.SGD([weight], lr=1.0)
            box = SimpleNamespace(
                stage_grad_count=0, grad_accum_step=steps, max_grad_norm=1.0, accelerator=None,
                grad_scaler=torch.amp.GradScaler("cpu"), optimizer=optimizer, scheduling_step=2,
                lr_scheduler=torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
            )  # fmt: skip
            rates[process] = []
            for _ in range(12):
                process(box, (weight * 2).sum())
                rates[process].append(optimizer.param_groups[0]["lr"])
        assert rates[scaled_step] == rates[default_post_forward_process]
        assert len({*rates[scaled_step]}) == 3

    @pytest.mark.slow
    def test_a_compiled_student_learns_the_same(self, tmp_path):
        values = {}
        for name, extra in {"plain": [], "compiled": ["+train.compile={backend: eager}"]}.items():
            trainer.distill(
                RunSpec(KD, [*SMALL, *NO_TEACHER, *extra], tmp_path / name, device="cpu")
            )
            values[name] = (tmp_path / name / "student.safetensors").read_bytes()
        assert values["plain"] == values["compiled"]


class TestRecipes:
    def test_accumulation_takes_the_step_of_the_whole_batch(self, tmp_path):
        """A batch can be cut: the model has no batch norm, and nothing is drawn for images."""
        changes = []
        for size, steps in ((16, 1), (8, 2), (4, 4)):
            optimizer = f"{{key: SGD, kwargs: {{lr: 1.0}}, grad_accum_step: {steps}}}"
            overrides = [*SMALL, "models.model.kwargs.name=test_convnext", f"batch_size={size}"]
            overrides.append(f"train.optimizer={optimizer}")
            overrides.append("datasets.phantom/train.init.kwargs.augment=False")
            torch.manual_seed(0)
            run = build_run(BASELINE, overrides, tmp_path / str(size))
            before = [p.detach().clone() for p in run.experiment.student.parameters()]
            torch.manual_seed(1)
            run.experiment.begin_epoch()
            run._train_batches(1)
            after = run.experiment.student.parameters()
            change = [a.detach() - b for a, b in zip(after, before, strict=True)]
            changes.append(torch.cat([c.flatten() for c in change]))
        for change in changes[1:]:
            difference = (change - changes[0]).abs().max() / changes[0].abs().max()
            assert difference < 1e-5

    @pytest.mark.slow
    def test_mixup_class_weights_and_smoothing_train_together(self, tmp_path):
        mixup = "{key: kd_lrp_plugin.torchdistill.mixup, init: {kwargs: {num_classes: 4}}}"
        criterion = (
            "train.criterion={key: DisWOTPlusLoss, kwargs: {alpha: 0.6, beta: 0.4, gamma: 0, "
            "delta: 0, label_smoothing: 0.1, class_weights: [1, 2, 1, 0.5]}}"
        )
        overrides = [*SMALL, *NO_TEACHER, "num_workers=2", criterion]
        overrides.append(f"+train.train_data_loader.collate_fn=!import_call {mixup}")
        (record,) = metrics(KD, overrides, tmp_path / "a")
        (again,) = metrics(KD, overrides, tmp_path / "b")
        assert record["train_ce"] == again["train_ce"]
        assert 0 <= record["train_accuracy"] <= 1

    def test_relevance_on_every_second_batch_is_half_of_the_work(self, tmp_path):
        kwargs = "train.criterion.kwargs.semantic.kwargs"
        run = build_run(LRP, [*SMALL, *NO_TEACHER, f"{kwargs}={{every: 2}}"], tmp_path / "run")
        made = []
        term, _ = run.experiment.box.criterion.term_dict["semantic"]
        term.register_forward_hook(lambda term, *_: made.append(term.computed))
        run._train_epoch()
        assert made == [True, False, True]  # two batches of training, one of validation


class TestModelsOfAllKinds:
    def test_a_stage_may_compare_features(self, tmp_path):
        """FitNet's first stage: a part of the student, which gives no logits to count."""
        hint = (
            "{key: WeightedSumLoss, kwargs: {sub_terms: {hint: {weight: 1.0, criterion: "
            "{key: MSELoss, kwargs: {}}, criterion_wrapper: {key: SimpleLossWrapper, kwargs: "
            "{input: {is_from_teacher: False, module_path: bn1, io: output, uses_label: False}, "
            "target: {is_from_teacher: False, module_path: bn1, io: output, "
            "uses_label: False}}}}}}}"
        )
        student = (
            "{sequential: [conv1, bn1, maxpool], forward_proc: forward_batch_only, "
            "requires_grad: True, forward_hook: {input: [], output: [bn1]}}"
        )
        overrides = [*MANY, *NO_TEACHER, "train.stage1.num_epochs=1", "train.stage2.num_epochs=1"]
        overrides += [f"train.stage1.student={student}", f"train.stage1.criterion={hint}"]
        overrides += ["train.stage2.scheduler.kwargs.T_max=1"]
        overrides += ["train.stage2.pre_epoch_process.init.kwargs.terms={}"]
        first, second = metrics(STAGES, overrides, tmp_path / "run")
        assert "train_accuracy" not in first
        assert 0 <= first["val_accuracy"] <= 1
        assert "train_accuracy" in second

    def test_features_of_a_teacher_are_not_its_predictions(self, tmp_path):
        features = "sequential: [conv1, bn1, act1, maxpool, layer1, layer2, layer3, global_pool]"
        ends = ("input: {is_from_teacher: False", "target: {is_from_teacher: True")
        both = ", ".join(f"{end}, module_path: ., io: output}}" for end in ends)
        overrides = [
            "models.teacher_model={key: timm_model, kwargs: {name: test_resnet, num_classes: 4}}",
            f"train.teacher={{forward_proc: forward_batch_only, requires_grad: False, {features}}}",
            f"train.student={{forward_proc: forward_batch_only, {features}}}",
            "train.criterion={key: WeightedSumLoss, kwargs: {sub_terms: {hint: {weight: 1.0, "
            "criterion: {key: MSELoss, kwargs: {}}, criterion_wrapper: {key: SimpleLossWrapper, "
            f"kwargs: {{{both}}}}}}}}}}}}}",
        ]
        run = build_run(KD, [*SMALL, "image_size=32", *overrides], tmp_path / "run")
        experiment = run.experiment
        _, rows = run._evaluate(experiment.test_loader, "test", "test", keep=True)
        images = torch.stack([image for image, _ in experiment.parts.test])
        for role in ("student", "teacher"):
            original = getattr(experiment, f"original{'_teacher' * (role == 'teacher')}")
            expected = original.eval()(images).softmax(1)
            found = torch.tensor([row[role] for row in rows])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)  # batches of 8

    def test_arguments_that_cannot_be_written_down_do_not_stop_the_end(self, tmp_path):
        act = "+models.model.kwargs.timm_kwargs={act_layer: !import_get {key: torch.nn.SiLU}}"
        summary = trainer.distill(RunSpec(BASELINE, [*SMALL, act], tmp_path / "run", device="cpu"))
        assert summary["timm"] is None

    def test_weights_that_are_shared_are_saved(self, tmp_path):
        from torchdistill.models.registry import register_model

        def tied() -> torch.nn.Module:
            first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
            second.weight = first.weight
            pool = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
            return torch.nn.Sequential(torch.nn.Conv2d(3, 1, 3), pool, first, second)

        register_model(tied, key="tied")
        model = "models.model={key: tied, kwargs: {}}"
        trainer.distill(RunSpec(BASELINE, [*SMALL, model], tmp_path / "run", device="cpu"))
        assert (tmp_path / "run/student.safetensors").is_file()

    def test_single_images_have_a_loss_where_it_needs_no_others(self, tmp_path):
        alone = ["train.val_data_loader.kwargs={batch_size: 1}", "+train.monitor=val_loss"]
        (record,) = metrics(BASELINE, [*SMALL, *alone], tmp_path / "run")
        assert record["val_loss"] == record["val_ce"] > 0
