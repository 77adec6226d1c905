"""What a YAML can switch on here: sparing steps, schedules, imbalance, mixup, autocast."""

import pickle

import numpy as np
import pytest
import torch
from recorded_batch import LAYERS, batch, get_method, io, models
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Subset, TensorDataset
from torchdistill.common import yaml_util
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.training import get_training_box
from torchdistill.datasets.registry import get_collate_func
from torchdistill.losses.high_level import WeightedSumLoss
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT

from kd_lrp_plugin import losses
from kd_lrp_plugin import torchdistill as plugin
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.relevance import recording
from kd_lrp_plugin.torchdistill import class_weights, mixup, weight_schedule

COMPARISONS = sorted(plugin.COMPARISONS)


def recorded(method: str = "lrp_zplus") -> tuple[dict, dict, Tensor]:
    teacher, student = models()
    images, targets = batch()
    key = plugin.recorder(LAYERS, method)
    return io(student, key, images), io(teacher, key, images), targets


def io_dict(method: str = "lrp_zplus") -> tuple[dict, Tensor]:
    student, teacher, targets = recorded(method)
    return {"student": student, "teacher": teacher}, targets


# --- every n-th step ------------------------------------------------------------------------------


class TestEvery:
    @pytest.mark.parametrize("key", COMPARISONS)
    def test_the_first_of_n_batches_is_compared_and_the_others_count_as_zero(self, key):
        parts = recorded(get_method(key))
        loss = MIDDLE_LEVEL_LOSS_DICT[key](every=3)
        full = float(plugin.RecordedLoss(key)(*parts).detach())
        values, computed = [], []
        for _ in range(7):
            values.append(float(loss(*parts).detach()))
            computed.append(loss.computed)
        assert computed == [True, False, False, True, False, False, True]
        assert values == pytest.approx([full, 0, 0, full, 0, 0, full])
        assert full > 0

    def test_counting_begins_again_with_each_epoch(self):
        parts = recorded()
        loss = plugin.RecordedLoss("LRPSemanticCosineLoss", every=2)
        loss(*parts)
        loss.reset()
        loss(*parts)
        assert loss.computed

    def test_validation_compares_every_batch_and_is_not_counted(self):
        parts = recorded()
        loss = plugin.RecordedLoss("LRPSemanticCosineLoss", every=2)
        loss(*parts)
        with torch.no_grad():
            for _ in range(3):
                assert loss(*parts) > 0
                assert loss.computed
        loss(*parts)
        assert not loss.computed

    def test_a_batch_that_is_left_out_makes_no_maps_and_has_a_backward_pass(self, monkeypatch):
        parts = recorded()
        loss = plugin.RecordedLoss("LRPSemanticCosineLoss", every=2)
        loss(*parts)
        monkeypatch.delattr(recording.Recording, "maps")
        (of_logits,) = torch.autograd.grad(loss(*parts), parts[0]["."]["output"])
        assert not of_logits.any()

    def test_the_sum_leaves_the_term_out_of_its_terms(self):
        parts, targets = io_dict()
        loss = plugin.DisWOTPlusLoss(
            semantic={"key": "LRPSemanticCosineLoss", "kwargs": {"every": 2}}
        )
        first = loss(parts, {}, targets)
        terms = loss.terms
        second = loss(parts, {}, targets)
        assert set(terms) - set(loss.terms) == {"semantic"}
        torch.testing.assert_close(first - second, 0.1 * terms["semantic"])

    @pytest.mark.parametrize("every", [0, -1, 1.5, True])
    def test_refuses_what_is_no_count(self, every):
        with pytest.raises(ValueError, match=r"every: expected an integer of 1 or more"):
            MIDDLE_LEVEL_LOSS_DICT["RelationL2Loss"](every=every)


# --- weight schedules -----------------------------------------------------------------------------

TERM = {"criterion": {"key": "CrossEntropyLoss", "kwargs": {}}}
TERM["criterion_wrapper"] = {
    "key": "SimpleLossWrapper",
    "kwargs": {
        "input": {"is_from_teacher": False, "module_path": ".", "io": "output"},
        "target": {"uses_label": True},
    },
}


def stage(criterion: dict, **more: object) -> dict:
    loader = {"dataset_id": "phantom", "sampler": {"class_or_func": RandomSampler}}
    plain = {"forward_proc": "forward_batch_only"}
    return {
        "num_epochs": 2,
        "teacher": plain | {"requires_grad": False},
        "student": plain,
        "model": plain,
        "train_data_loader": loader | {"kwargs": {"batch_size": 4}},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.01}},
        "criterion": criterion,
        **more,
    }


def distillation_box(config: dict):
    teacher, student = models()
    data = {"phantom": Phantom("train", size=8, image_size=48)}
    return get_distillation_box(teacher, student, data, config, torch.device("cpu"), None, False, 1)


def weights_in(box) -> dict[str, float]:
    return {name: weight for name, (_, weight) in box.criterion.term_dict.items()}


class TestWeightSchedule:
    def test_terms_set_in_late_and_warm_up_to_their_final_weight(self):
        key = weight_schedule(
            terms={"semantic": {"after": 2, "warm_up": 4}, "relation": {"after": 3}}
        )
        box = distillation_box(stage({"key": "DisWOTPlusLoss"}, pre_epoch_process=key))
        semantic, relation = [], []
        for epoch in range(8):
            box.pre_epoch_process(epoch=epoch)
            weights = weights_in(box)
            semantic.append(weights["semantic"])
            relation.append(weights["relation"])
            assert (weights["ce"], weights["kl"]) == (0.4, 0.4)
        assert semantic == pytest.approx([0, 0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
        assert relation == pytest.approx([0, 0, 0, 0.1, 0.1, 0.1, 0.1, 0.1])
        assert sum(weights.values()) == pytest.approx(1)

    def test_a_fading_term_leaves_its_weight_to_those_that_last(self):
        weights = {"alpha": 0.02, "beta": 0.04, "gamma": 0.8, "delta": 0.14}
        key = weight_schedule(terms={"semantic": {"until": 5}, "relation": {"until": 2}})
        config = stage({"key": "DisWOTPlusLoss", "kwargs": weights}, pre_epoch_process=key)
        box = distillation_box(config)
        for epoch in range(8):
            box.pre_epoch_process(epoch=epoch)
            found = weights_in(box)
            semantic = [0.8, 0.64, 0.48, 0.32, 0.16, 0, 0, 0][epoch]
            relation = [0.14, 0.07, 0, 0, 0, 0, 0, 0][epoch]
            assert found["semantic"] == pytest.approx(semantic)
            assert found["relation"] == pytest.approx(relation)
            rest = 1 - semantic - relation
            assert [found["ce"], found["kl"]] == pytest.approx([rest / 3, 2 * rest / 3])

    def test_a_share_is_of_all_epochs(self):
        key = weight_schedule(terms={"semantic": {"until": 0.5}})
        config = stage({"key": "DisWOTPlusLoss"}, pre_epoch_process=key)
        box = distillation_box(config)
        box.num_epochs = 8
        found = []
        for epoch in range(6):
            box.pre_epoch_process(epoch=epoch)
            found.append(weights_in(box)["semantic"])
        assert found == pytest.approx([0.1, 0.075, 0.05, 0.025, 0, 0])

    def test_a_term_cannot_fade_into_nothing(self):
        key = weight_schedule(terms={"semantic": {"until": 4}})
        only = {"alpha": 0.0, "beta": 0.0, "gamma": 1.0, "delta": 0.0}
        box = distillation_box(
            stage({"key": "DisWOTPlusLoss", "kwargs": only}, pre_epoch_process=key)
        )
        with pytest.raises(ValueError, match=r"a term without until, with a weight"):
            box.pre_epoch_process(epoch=1)

    def test_a_resumed_run_needs_no_state(self):
        key = weight_schedule(terms={"semantic": {"after": 1, "warm_up": 5}})
        config = stage({"key": "DisWOTPlusLoss"}, pre_epoch_process=key)
        through, resumed = distillation_box(config), distillation_box(config)
        for epoch in range(4):
            through.pre_epoch_process(epoch=epoch)
        resumed.pre_epoch_process(epoch=3)
        assert weights_in(through) == weights_in(resumed)

    def test_the_stages_of_a_training_share_one_count(self):
        key = weight_schedule(terms={"semantic": {"warm_up": 4}})
        stages = {
            name: stage({"key": "DisWOTPlusLoss"}, pre_epoch_process=key)
            for name in ("stage1", "stage2")
        }
        box = distillation_box(stages)
        found = []
        for _ in range(4):
            box.pre_epoch_process(epoch=box.current_epoch)
            found.append((box.stage_number, weights_in(box)["semantic"]))
            box.post_epoch_process()
        assert found == [(1, 0.025), (1, 0.05), (2, pytest.approx(0.075)), (2, 0.1)]

    @pytest.mark.parametrize("with_teacher", [True, False])
    def test_stock_losses_and_trainings_without_a_teacher_take_it_too(self, with_teacher):
        key = weight_schedule(terms={"late": {"after": 1}})
        terms = {"ce": TERM | {"weight": 1.0}, "late": TERM | {"weight": 0.5}}
        criterion = {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}}
        config = stage(criterion, pre_epoch_process=key)
        if with_teacher:
            box = distillation_box(config)
            model = box.student_model
        else:
            data = {"phantom": Phantom("train", size=8, image_size=48)}
            model = models()[1]
            box = get_training_box(model, data, config, torch.device("cpu"), None, False, 1)
        assert isinstance(box.criterion, WeightedSumLoss)
        model.eval()
        found = []
        for epoch in range(2):
            box.pre_epoch_process(epoch=epoch)
            found.append(weights_in(box)["late"])
        assert found == [0, 0.5]
        assert model.training  # as by torchdistill's default

    def test_a_term_that_weighs_nothing_yet_is_not_computed(self):
        key = weight_schedule(terms={"semantic": {"after": 1}})
        box = distillation_box(stage({"key": "DisWOTPlusLoss"}, pre_epoch_process=key))
        parts, targets = io_dict()
        terms = []
        for epoch in range(2):
            box.pre_epoch_process(epoch=epoch)
            box.criterion(parts, {}, targets)
            terms.append(set(box.criterion.terms))
        assert terms[1] - terms[0] == {"semantic"}
        assert terms[0] == {"ce", "kl", "relation"}

    @pytest.mark.parametrize("after", [1, 4])
    def test_a_term_that_never_sets_in_is_said_once(self, after, caplog):
        key = weight_schedule(terms={"semantic": {"after": after}})
        box = distillation_box(stage({"key": "DisWOTPlusLoss"}, pre_epoch_process=key))
        assert box.num_epochs == 2
        for epoch in range(2):
            box.pre_epoch_process(epoch=epoch)
        said = [record.getMessage() for record in caplog.records]
        words = "weight_schedule: semantic sets in with epoch 4, and there are 2: it never"
        assert [text.startswith(words) for text in said] == [True] * (after == 4)

    def test_an_epoch_without_any_term_is_named(self):
        key = weight_schedule(terms={"semantic": {"after": 1}})
        only = {"alpha": 0.0, "beta": 0.0, "gamma": 1.0, "delta": 0.0}
        box = distillation_box(
            stage({"key": "DisWOTPlusLoss", "kwargs": only}, pre_epoch_process=key)
        )
        box.pre_epoch_process(epoch=0)
        parts, targets = io_dict()
        with pytest.raises(ValueError, match=r"a term in this epoch, got none"):
            box.criterion(parts, {}, targets)

    @pytest.mark.parametrize(
        ("terms", "words"),
        [
            ({"semantic": {"afer": 5}}, "Did you mean 'after'"),
            ({"semantic": {"after": -1}}, "after: expected an integer >= 0, got -1"),
            ({"semantic": {"warm_up": 0.5}}, "warm_up: expected an integer >= 0, got 0.5"),
            ({"semantic": None}, "expected a mapping, got None"),
            ({"semantic": {"until": 0}}, "until: expected an integer >= 1, or a share .*, got 0"),
            ({"semantic": {"until": 4, "after": 1}}, "semantic: expected until alone"),
        ],
    )
    def test_a_wrong_schedule_is_named(self, terms, words):
        with pytest.raises(ValueError, match=words):
            weight_schedule(terms=terms)

    def test_a_term_that_the_criterion_does_not_have_is_named(self):
        key = weight_schedule(terms={"semantics": {"after": 1}})
        box = distillation_box(stage({"key": "DisWOTPlusLoss"}, pre_epoch_process=key))
        with pytest.raises(ValueError, match=r"'ce'.*Did you mean 'semantic'"):
            box.pre_epoch_process(epoch=0)

    def test_a_loop_that_gives_no_epoch_is_told_so(self):
        key = weight_schedule(terms={"semantic": {}})
        box = distillation_box(stage({"key": "DisWOTPlusLoss"}, pre_epoch_process=key))
        with pytest.raises(ValueError, match=r"pre_epoch_process\(epoch=epoch\)"):
            box.pre_epoch_process()


# --- label smoothing and class weights ------------------------------------------------------------


class Labelled:
    def __init__(self, targets: list[int], classes: list[str] | None = None) -> None:
        self.targets = targets
        if classes:
            self.classes = classes


class TestCrossEntropy:
    def value(self, targets: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        parts, _ = io_dict()
        loss = plugin.DisWOTPlusLoss(1.0, 0.0, 0.0, 0.0, **options)
        return loss(parts, {}, targets), parts["student"]["."]["output"]

    def test_smoothing_and_weights_are_those_of_the_formula(self):
        targets, weights = torch.tensor([0, 0, 1, 3]), [1, 2.0, 3.0, 4.0]
        value, logits = self.value(targets, label_smoothing=0.2, class_weights=weights)
        weight = torch.tensor(weights)
        smooth = 0.8 * nn.functional.one_hot(targets, 4) + 0.05
        each = -(smooth * weight * logits.log_softmax(1)).sum(1)
        torch.testing.assert_close(value, each.sum() / weight[targets].sum())

    def test_soft_targets_of_one_class_are_that_class(self):
        targets = torch.tensor([0, 0, 1, 3])
        soft, _ = self.value(nn.functional.one_hot(targets, 4).float())
        torch.testing.assert_close(soft, self.value(targets)[0])

    def test_weights_move_with_the_loss_and_are_no_part_of_its_state(self):
        loss = plugin.DisWOTPlusLoss(class_weights=torch.ones(4))
        term, _ = loss.term_dict["ce"]
        assert term.to("meta").weights.is_meta
        assert not term.state_dict()

    @pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, float("nan")], [1.0, -1.0], [[1.0]]])
    def test_refuses_weights_that_are_not_positive(self, weights):
        with pytest.raises(ValueError, match="class_weights: expected a positive weight"):
            plugin.DisWOTPlusLoss(class_weights=weights)

    def test_refuses_another_number_of_weights_than_outputs(self):
        with pytest.raises(ValueError, match=r"expected 4 class_weights.*got 3"):
            self.value(torch.tensor([0, 0, 1, 3]), class_weights=[1.0, 1.0, 1.0])

    @pytest.mark.parametrize("smoothing", [-0.1, 1.0])
    def test_refuses_smoothing_that_is_no_share(self, smoothing):
        with pytest.raises(ValueError, match=r"label_smoothing: expected a number in \[0, 1\)"):
            plugin.DisWOTPlusLoss(label_smoothing=smoothing)


class TestClassWeights:
    def test_are_the_inverse_of_the_frequency(self):
        weights = class_weights(dataset=Labelled([0, 0, 0, 1, 1, 2]))
        assert weights == pytest.approx([6 / 9, 6 / 6, 6 / 3])

    def test_of_a_balanced_set_are_one(self):
        assert class_weights(Phantom("train", size=8)) == pytest.approx([1.0] * 4)

    def test_an_absent_class_is_named(self):
        with pytest.raises(ValueError, match=r"got none of \['b', 'd'\]"):
            class_weights(Labelled([0, 2, 2], ["a", "b", "c", "d"]))

    def test_a_set_without_targets_is_named(self):
        with pytest.raises(ValueError, match="Subset without any"):
            class_weights(Subset(Phantom("train", size=8), [0, 1]))

    def test_a_yaml_hands_over_the_set_itself_by_its_alias(self, tmp_path):
        file = tmp_path / "config.yaml"
        file.write_text("""
            datasets:
              &train_set phantom/train: &train_images !import_call
                key: kd_lrp_plugin.torchdistill.phantom
                init: {kwargs: {split: train, size: 8}}
            train:
              dataset_id: *train_set
              same: *train_images
              criterion:
                class_weights: !import_call
                  key: kd_lrp_plugin.torchdistill.class_weights
                  init: {kwargs: {dataset: *train_images}}
        """)
        content = yaml_util.load_yaml_file(str(file))
        assert content["train"]["same"] is content["datasets"]["phantom/train"]
        assert content["train"]["criterion"]["class_weights"] == pytest.approx([1.0] * 4)


# --- mixup ----------------------------------------------------------------------------------------


def mixed_loader(workers: int = 0, n: int = 8, **options: object) -> DataLoader:
    images = torch.arange(n).float().view(n, 1, 1, 1).expand(n, 3, 4, 4)
    samples = [(image, i % 4, {}) for i, image in enumerate(images)]
    collate = get_collate_func(mixup(**({"num_classes": 4} | options)))
    return DataLoader(samples, batch_size=2, num_workers=workers, collate_fn=collate)


def shares(loader: DataLoader, seed: int = 1) -> list[float]:
    """How much of the first image is in the first of each batch, after seeding."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  timm draws from it
    return [float(targets.max()) for _, targets, _ in loader]


class TestMixup:
    def test_targets_are_mixed_as_the_images_are(self):
        np.random.seed(0)  # noqa: NPY002
        for place, (images, targets, supplement) in enumerate(mixed_loader()):
            share = targets[0, (2 * place) % 4]
            values = torch.tensor([2.0 * place, 2.0 * place + 1])
            expected = torch.stack([share, 1 - share]) @ values
            torch.testing.assert_close(images[0], expected.expand(3, 4, 4))
            torch.testing.assert_close(targets.sum(1), torch.ones(2))
            assert 0 < share < 1
            assert supplement == {}

    def test_without_a_supplement_a_batch_is_a_pair(self):
        collate = get_collate_func(mixup(2))
        assert len(collate([(torch.zeros(3, 4, 4), 0), (torch.zeros(3, 4, 4), 1)])) == 2

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_seed_repeats_it(self, workers):
        loader = mixed_loader(workers)
        first = shares(loader)
        assert first == shares(loader)
        assert first != shares(loader, seed=2)
        assert len(set(first)) == 4  # workers differ from each other

    def test_it_can_be_sent_to_a_worker_that_is_not_forked(self):
        images, targets = pickle.loads(pickle.dumps(get_collate_func(mixup(4, prob=0.0))))(
            [(torch.zeros(3, 4, 4), 3)] * 2
        )
        assert torch.equal(targets, torch.tensor([[0.0, 0.0, 0.0, 1.0]] * 2))
        assert images.shape == (2, 3, 4, 4)

    def test_other_settings_have_another_key(self):
        assert (
            len({mixup(4), mixup(3), mixup(4, 0.2), mixup(4, 0.0, 1.0), mixup(4, mode="elem")}) == 5
        )

    def test_every_loss_takes_its_targets(self):
        np.random.seed(0)  # noqa: NPY002
        teacher, student = models()
        data = TensorDataset(*batch())
        images, targets = next(
            iter(DataLoader(data, batch_size=4, collate_fn=get_collate_func(mixup(4))))
        )
        for key in COMPARISONS:
            procedure = plugin.recorder(LAYERS, get_method(key))
            parts = {"student": io(student, procedure, images)}
            parts["teacher"] = io(teacher, procedure, images)
            role = "relation" if key.startswith("Relation") else "semantic"
            loss = plugin.DisWOTPlusLoss(
                0.4,
                0.4,
                *((0.0, 0.2) if role == "relation" else (0.2, 0.0)),
                **{role: {"key": key}},
            )
            loss(parts, {}, targets).backward()
            logits = parts["student"]["."]["output"]
            expected = -(targets * logits.log_softmax(1)).sum(1).mean()
            torch.testing.assert_close(loss.terms["ce"], expected.detach())
            assert role in loss.terms

    def test_an_odd_batch_names_the_way_out(self):
        with pytest.raises(ValueError, match=r"even size, got 1.*drop_last: True"):
            list(mixed_loader(n=7))

    def test_labels_outside_are_named(self):
        with pytest.raises(ValueError, match=r"labels in \[0, 3\), got \[2, 3\]"):
            list(mixed_loader(num_classes=3))

    @pytest.mark.parametrize("alphas", [(0.0, 0.0), (-1.0, 1.0)])
    def test_refuses_alphas_that_mix_nothing(self, alphas):
        with pytest.raises(ValueError, match="an alpha above 0"):
            mixup(4, *alphas)

    def test_an_unknown_mode_is_named(self):
        with pytest.raises(ValueError, match="Did you mean 'batch'"):
            mixup(4, mode="bach")


# --- mixed precision and several processes --------------------------------------------------------


@pytest.mark.parametrize("key", COMPARISONS)
def test_under_autocast_maps_and_distances_are_float32(key):
    teacher, student = models()
    images, targets = batch()
    procedure = plugin.recorder(LAYERS, get_method(key))
    loss = plugin.RecordedLoss(key)
    with torch.autocast("cpu", torch.bfloat16):
        parts = io(student, procedure, images), io(teacher, procedure, images), targets
        inside = loss(*parts)
    outside = loss(*parts)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    inside.backward()
    of_stem = student.conv1[0].weight.grad
    assert of_stem.dtype == torch.float32
    assert of_stem.norm() > 0


def test_under_autocast_the_sum_is_float32_with_and_without_a_recording():
    teacher, student = models()
    images, targets = batch()
    with torch.autocast("cpu", torch.bfloat16):
        plain = {"student": {".": {"output": student(images)}}}
        plain["teacher"] = {".": {"output": teacher(images)}}
        assert plain["student"]["."]["output"].dtype == torch.bfloat16
        loss = plugin.DisWOTPlusLoss(0.5, 0.5, 0.0, 0.0)
        inside = loss(plain, {}, targets)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, loss(plain, {}, targets))
    assert {value.dtype for value in loss.terms.values()} == {torch.float32}


@pytest.mark.parametrize(
    "key", [k for k in COMPARISONS if plugin.COMPARISONS[k].kind != "relevance"]
)
def test_each_process_relates_the_samples_of_its_own_part_of_the_batch(key):
    teacher, student = (model.eval() for model in models())  # so that images do not mix
    images, targets = batch()
    procedure = plugin.recorder(LAYERS, get_method(key))

    def value(part: slice) -> Tensor:
        parts = io(student, procedure, images[part]), io(teacher, procedure, images[part])
        return plugin.RecordedLoss(key)(*parts, targets[part]).detach()

    halves = [value(slice(0, 2)), value(slice(2, 4))]
    whole = value(slice(0, 4))
    assert abs(sum(halves) / 2 - whole) > 0.01 * whole
    of_student, of_teacher = (
        io(model, procedure, images)["."]["output"] for model in (student, teacher)
    )
    comparison = plugin.COMPARISONS[key]
    recordings = [(logits._kd_lrp_recording, logits) for logits in (of_student, of_teacher)]
    signed = comparison.signed
    both = [
        r.activations if comparison.methods is None else r.maps(logits, targets, signed=signed)
        for r, logits in recordings
    ]
    own = [comparison.distance(s[:2], t[:2]) for s, t in zip(*both, strict=True)]
    torch.testing.assert_close(halves[0], torch.stack(own).mean().detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["semantic_cosine", "semantic_l2", "kl_divergence"])
def test_the_other_losses_are_means_over_the_parts(name):
    shape = (4, 5) if name == "kl_divergence" else (4, 3, 3)
    student, teacher = torch.rand(2, *shape)
    loss = losses.LOSSES[name]
    parts = [loss(student[part], teacher[part]) for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(sum(parts) / 2, loss(student, teacher))
