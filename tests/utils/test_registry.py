"""The registry and the checks: what they refuse, and in which words."""

import pytest
import torch

from kd_lrp_plugin.utils.registry import Registry, unknown_name
from kd_lrp_plugin.utils.validation import (
    check_class_weights,
    check_known,
    check_same_shape,
    check_targets,
    message,
)


@pytest.fixture
def rules() -> Registry:
    rules: Registry = Registry("rule")
    rules.register("the epsilon rule", "epsilon")
    rules.register("the gamma rule", "gamma")
    return rules


class TestRegistry:
    def test_reads_like_a_dict(self, rules):
        assert rules["gamma"] == "the gamma rule"
        assert list(rules) == ["epsilon", "gamma"]
        assert len(rules) == 2
        assert "alpha" not in rules
        assert rules.get("alpha") is None

    def test_register_returns_the_entry_under_its_own_name(self):
        registry: Registry = Registry("shape")

        @registry.register
        def circle(): ...

        assert circle is not None
        assert dict(registry) == {"circle": circle}

    def test_a_taken_name_is_refused_and_the_first_entry_stays(self, rules):
        with pytest.raises(ValueError, match=r"rule: expected a new name, got 'gamma'"):
            rules.register("another", "gamma")
        assert rules["gamma"] == "the gamma rule"

    def test_a_missing_key_names_the_nearest(self, rules):
        with pytest.raises(KeyError, match=r"rule: expected one of .* Did you mean 'epsilon'"):
            rules["epsilom"]

    def test_an_entry_without_a_name_needs_one(self):
        with pytest.raises(AttributeError, match="__name__"):
            Registry("rule").register(object())


class TestUnknownName:
    def test_no_hint_where_nothing_is_near(self):
        text = unknown_name("rule", "xyz", ["epsilon", "gamma"])
        assert text == "rule: expected one of ['epsilon', 'gamma'], got 'xyz'."

    def test_a_long_list_is_cut_to_the_nearest(self):
        names = [f"model_{i:03}" for i in range(50)] + ["epsilon"]
        assert unknown_name("model", "epsilom", names).startswith(
            "model: expected one of 51 names such as ['epsilon'], got"
        )
        assert unknown_name("model", "xyz", names).count("model_") == 6 - 1

    def test_any_kind_of_value_can_be_unknown(self):
        assert unknown_name("rule", None, ["gamma"]).endswith("got None.")


class TestChecks:
    def test_message_has_the_house_form(self):
        assert message("f", "a", 1, "Do b.") == "f: expected a, got 1. Do b."

    def test_check_known_lets_known_names_pass(self):
        check_known("rule", "gamma", ["gamma"])
        with pytest.raises(ValueError, match=r"rule: expected one of .*got 'gama'. Did you mean"):
            check_known("rule", "gama", ["gamma"])

    def test_check_same_shape_names_every_shape(self):
        one, other = torch.zeros(3, 4), torch.zeros(3, 2)
        check_same_shape("f", "", one=one, two=one.clone())
        with pytest.raises(ValueError, match=r"\{'one': \(3, 4\), 'other': \(3, 2\)\}. Resize"):
            check_same_shape("f", "Resize.", one=one, other=other)


class TestCheckTargets:
    logits = torch.zeros(2, 3)

    @pytest.mark.parametrize(
        "targets",
        [
            torch.tensor([0, 2]),
            torch.tensor([1, 1], dtype=torch.uint8),
            torch.rand(2, 3).softmax(1),
            torch.rand(2, 3).softmax(1).bfloat16(),
            torch.eye(3)[:2],
        ],
    )
    def test_indices_and_soft_labels_pass(self, targets):
        check_targets("loss", targets, self.logits)
        check_class_weights("maps", targets, self.logits)

    @pytest.mark.parametrize(
        "targets",
        [
            [[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]],  # two classes at once
            [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]],  # none
            [[1.5, -0.5, 0.0], [0.0, 1.0, 0.0]],
            [[0.9, 0.0, 0.0], [0.0, 1.0, 0.0]],
            [[float("nan"), 0.0, 0.0], [0.0, 1.0, 0.0]],
            [[100.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
        ],
    )
    def test_weights_that_are_no_probabilities_are_no_labels(self, targets):
        with pytest.raises(ValueError, match=r"loss: expected probabilities.*multi-label"):
            check_targets("loss", torch.tensor(targets), self.logits)
        check_class_weights("maps", torch.tensor(targets), self.logits)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
    def test_multi_label_targets_of_integers_are_refused(self, dtype):
        with pytest.raises(ValueError, match=r"class indices of shape \(2,\), got \(2, 3\)"):
            check_targets("loss", torch.ones(2, 3, dtype=dtype), self.logits)

    def test_an_empty_batch_passes(self):
        check_targets("maps", torch.zeros(0, dtype=torch.long), torch.zeros(0, 3))

    @pytest.mark.parametrize("targets", [[0, 3], [-1, 0]])
    def test_labels_outside_the_head_are_named(self, targets):
        with pytest.raises(ValueError, match=r"labels in \[0, 3\).*num_classes") as error:
            check_targets("maps", torch.tensor(targets), self.logits)
        assert str(sorted(targets)) in str(error.value)

    def test_the_wrong_number_of_indices_is_refused(self):
        with pytest.raises(ValueError, match=r"class indices of shape \(2,\), got \(3,\)"):
            check_targets("maps", torch.tensor([0, 1, 2]), self.logits)

    @pytest.mark.parametrize("shape", [(2,), (2, 4), (3, 3)])
    def test_weights_of_another_shape_are_refused(self, shape):
        with pytest.raises(ValueError, match=r"class weights of shape \(2, 3\), got"):
            check_targets("maps", torch.rand(shape), self.logits)
