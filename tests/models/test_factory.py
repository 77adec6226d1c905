"""Models: the published counts, heads that fit or say why not, and weights that never half-load."""

import argparse
import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from kd_lrp_plugin.metrics.efficiency import count_parameters
from kd_lrp_plugin.models.factory import build_model, thesis_student, thesis_teacher
from kd_lrp_plugin.models.weights import load_weights
from kd_lrp_plugin.utils.progress import NullProgress

SMALL = "mobilenetv2_035"
SAME = {"pad_type": "same", "bn_eps": 1e-3}


class Notes(NullProgress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def weights_file(name: str) -> Path:
    root = os.environ.get("KD_LRP_DATA")
    if not root or not Path(root, "weights", name).is_file():
        pytest.skip("needs weights/ in the folder that KD_LRP_DATA names")
    return Path(root, "weights", name)


def logits(model: torch.nn.Module, size: int = 64, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model.eval()(torch.rand(2, channels, size, size, generator=generator))


class TestPublishedCounts:
    def test_teacher(self):
        assert count_parameters(thesis_teacher(), buffers=True) == 18_347_972

    def test_best_student(self):
        assert count_parameters(thesis_student(), buffers=True) == 2_619_332

    @pytest.mark.parametrize(
        ("name", "count"), [("mobilenetv2_100", 2_257_984), ("mobilenetv2_035", 410_208)]
    )
    def test_models_without_head(self, name, count):
        assert count_parameters(build_model(name, 0), buffers=True) == count


class TestHeads:
    @pytest.mark.parametrize(
        "name", [SMALL, "resnet18", "densenet121", "resnetv2_50", "mobilenetv3_small_050"]
    )
    @pytest.mark.parametrize("head", ["linear", "mlp", "flatten_mlp"])
    def test_fits_and_has_the_outputs_asked_for(self, name, head):
        model = build_model(name, 3, head, hidden=(8, 4), image_size=64)
        assert model.training
        assert model.num_classes == 3
        assert logits(model).shape == (2, 3)

    def test_linear_is_timms_own(self):
        torch.manual_seed(0)
        ours = build_model(SMALL, 3)
        torch.manual_seed(0)
        theirs = timm.create_model(SMALL, num_classes=3)
        theirs.classifier.load_state_dict(ours.classifier.state_dict())
        assert torch.equal(logits(ours), logits(theirs))

    def test_linear_starts_undecided(self):
        loss = torch.nn.functional.cross_entropy(
            build_model(SMALL, 4)(torch.randn(8, 3, 64, 64)), torch.arange(8) % 4
        )
        assert abs(float(loss) - 1.386) < 0.3

    def test_mlp_is_the_three_layers_behind_pooling(self):
        model = build_model(SMALL, 3, "mlp", hidden=(8, 4)).eval()
        images = torch.rand(2, 3, 64, 64)
        first, second, last = (m for m in model.classifier if isinstance(m, torch.nn.Linear))
        with torch.no_grad():
            pooled = model.forward_features(images).mean((2, 3))
            expected = last(second(first(pooled).relu()).relu())
            assert torch.allclose(model(images), expected, atol=1e-6)

    def test_flatten_mlp_sees_where_a_feature_is(self):
        torch.manual_seed(0)
        features = torch.rand(1, 1280, 2, 2)
        for head, blind in [("mlp", True), ("flatten_mlp", False)]:
            model = build_model(SMALL, 3, head, hidden=(8,), image_size=64).eval()
            turned = model.forward_head(features.rot90(1, (2, 3)))
            assert torch.allclose(model.forward_head(features), turned, atol=1e-6) == blind

    def test_flatten_mlp_names_the_image_size_as_the_reason(self):
        model = build_model(SMALL, 3, "flatten_mlp", image_size=64)
        with pytest.raises(ValueError, match=r"expected 5120 features, got 11520 .*image_size"):
            logits(model, size=96)

    def test_dropout_acts_in_training_only(self):
        model = build_model(SMALL, 3, "mlp", dropout=0.9)
        features = torch.ones(1, 1280, 2, 2)
        assert not torch.equal(model.forward_head(features), model.forward_head(features))
        model.eval()
        assert torch.equal(model.forward_head(features), model.forward_head(features))

    def test_flatten_mlp_follows_the_channels_of_the_input(self):
        kwargs = {"in_chans": 1}
        model = build_model(SMALL, 3, "flatten_mlp", (8,), image_size=64, timm_kwargs=kwargs)
        assert logits(model, channels=1).shape == (2, 3)

    @pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_s3_tiny_224"])
    def test_flatten_mlp_refuses_features_that_are_no_map(self, name):
        with pytest.raises(ValueError, match=rf"unpooled features are \(n, c, h, w\).*got {name}"):
            build_model(name, 3, "flatten_mlp")

    def test_mlp_refuses_a_model_with_two_classifiers(self):
        with pytest.raises(ValueError, match="one linear classifier for head='mlp', got tuple"):
            build_model("deit_tiny_distilled_patch16_224", 3, "mlp")


class TestBadArguments:
    def test_an_unknown_model_gets_near_names(self):
        with pytest.raises(ValueError, match=r"Did you mean .*'mobilenetv2_100'"):
            build_model("mobilnetv2_100", 3)

    @pytest.mark.parametrize("name", ["hf-hub:me/mine", "hf_hub:me/mine", "HF-HUB:me/mine"])
    def test_a_name_that_would_download_is_refused_with_the_way_out(self, name):
        with pytest.raises(ValueError, match=r"a folder of timm's on this machine") as caught:
            build_model(name, 3, pretrained=True)
        words = str(caught.value)
        assert "hf download me/mine --local-dir mine" in words
        assert "give local-dir:PATH/mine as the name, with pretrained: True" in words

    def test_a_name_of_timms_own_hub_is_refused_with_the_one_that_it_has_here(self):
        with pytest.raises(
            ValueError, match=r"Give resnet18.a1_in1k with pretrained: True. Or: wh"
        ):
            build_model("hf-hub:timm/resnet18.a1_in1k", 3)

    def test_an_unknown_head_gets_near_names(self):
        with pytest.raises(ValueError, match=r"head: expected one of .*Did you mean 'flatten_mlp'"):
            build_model(SMALL, 3, "flaten_mlp")

    def test_pretrained_in_timm_kwargs_is_refused_with_the_way_out(self):
        with pytest.raises(ValueError, match=r"'pretrained'. Give pretrained to build_model"):
            build_model(SMALL, 3, timm_kwargs={"pretrained": True})
        build_model(SMALL, 3, timm_kwargs={"pretrained": False})

    @pytest.mark.parametrize("key", ["num_classes", "drop_rate", "checkpoint_path", "global_pool"])
    def test_what_we_decide_is_refused_in_timm_kwargs(self, key):
        with pytest.raises(ValueError, match=f"build_model leaves open, got '{key}'"):
            build_model(SMALL, 3, timm_kwargs={key: 0})

    def test_an_argument_unknown_to_timm_is_named(self):
        with pytest.raises(TypeError, match=f"arguments that timm's {SMALL} takes.*pad_typ"):
            build_model(SMALL, 3, timm_kwargs={"pad_typ": "same"})

    @pytest.mark.parametrize(("head", "classes"), [("linear", -1), ("mlp", 0), ("flatten_mlp", 0)])
    def test_too_few_classes_are_refused(self, head, classes):
        with pytest.raises(ValueError, match=r"expected num_classes >= \d, got"):
            build_model(SMALL, classes, head)

    def test_timm_kwargs_are_left_as_they_were(self):
        kwargs = {"pretrained": False, "pad_type": "same"}
        build_model(SMALL, 3, dropout=0.1, timm_kwargs=kwargs)
        assert kwargs == {"pretrained": False, "pad_type": "same"}


class TestLoadWeights:
    @pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
    def test_a_saved_model_comes_back(self, tmp_path, suffix):
        source, model = build_model(SMALL, 3), build_model(SMALL, 3)
        path = tmp_path / f"model{suffix}"
        (save_file if suffix == ".safetensors" else torch.save)(source.state_dict(), path)
        assert load_weights(model, path) == []
        assert torch.equal(logits(model), logits(source))

    def test_a_checkpoint_of_torchdistills_scripts_is_read(self, tmp_path):
        source = build_model(SMALL, 3)
        optimizer = torch.optim.Adam(source.parameters())
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
        checkpoint = {
            "model": source.state_dict(),
            "optimizer": optimizer.state_dict(),
            "best_value": 0.5,
            "lr_scheduler": scheduler.state_dict(),
            "args": argparse.Namespace(config="a.yaml", device="cpu", seed=None),
        }
        torch.save(checkpoint, tmp_path / "model.pth")
        model = build_model(SMALL, 3, weights=tmp_path / "model.pth")
        assert torch.equal(logits(model), logits(source))

    @pytest.mark.parametrize(("head", "classes"), [("linear", 5), ("mlp", 3), ("linear", 0)])
    def test_another_head_is_left_whole_and_reported_once(self, tmp_path, head, classes):
        source, model = build_model(SMALL, 3), build_model(SMALL, classes, head)
        torch.save(source.state_dict(), tmp_path / "model.pth")
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with Notes() as notes:
            left = load_weights(model, tmp_path / "model.pth")
        assert left == [key for key in before if key.startswith("classifier.")]
        (note,) = notes.texts
        assert "the classifier of" in note
        after = model.state_dict()
        assert all(torch.equal(after[key], before[key]) for key in left)
        assert torch.equal(after["conv_stem.weight"], source.state_dict()["conv_stem.weight"])

    @pytest.mark.parametrize(("head", "classes"), [("linear", 5), ("mlp", 3), ("linear", 0)])
    def test_a_trained_model_is_taken_with_its_head_or_refused(self, tmp_path, head, classes):
        torch.save(build_model(SMALL, 3).state_dict(), tmp_path / "model.pth")
        model = build_model(SMALL, classes, head)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"tensors that differ, first .*num_classes"):
            load_weights(model, tmp_path / "model.pth", strict=True)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
        assert load_weights(build_model(SMALL, 3), tmp_path / "model.pth", strict=True) == []

    def test_a_head_that_fits_in_part_is_not_taken_in_part(self, tmp_path):
        source = build_model(SMALL, 3, "flatten_mlp", (8,), image_size=64)
        model = build_model(SMALL, 3, "flatten_mlp", (8,), image_size=96)
        torch.save(source.state_dict(), tmp_path / "model.pth")
        bias = model.classifier[-1].bias.clone()
        assert len(load_weights(model, tmp_path / "model.pth")) == 4
        assert torch.equal(model.classifier[-1].bias, bias)

    def test_weights_of_another_width_are_refused_and_change_nothing(self, tmp_path):
        torch.save(build_model("mobilenetv2_050", 3).state_dict(), tmp_path / "model.pth")
        model = build_model(SMALL, 3)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"tensors that differ, first .*\(16, .* for \(8, "):
            load_weights(model, tmp_path / "model.pth")
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    @pytest.mark.parametrize("change", ["absent", "not in the model"])
    def test_a_missing_or_extra_tensor_of_the_body_is_named(self, tmp_path, change):
        state = build_model(SMALL, 3).state_dict()
        kept = state.pop("conv_head.weight")
        if change == "not in the model":
            state.update({"conv_head.weight": kept, "conv_tail.weight": kept})
        torch.save(state, tmp_path / "model.pth")
        with pytest.raises(ValueError, match=rf"build_model: .*weight \({change}\).*timm_kwargs"):
            build_model(SMALL, 3, weights=tmp_path / "model.pth")

    def test_a_missing_file_is_an_error(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"expected a weights file, got .*nowhere\.pth"):
            build_model(SMALL, 3, weights=tmp_path / "nowhere.pth")

    @pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
    @pytest.mark.parametrize("content", [b"", b"not weights at all"])
    def test_a_broken_file_is_refused(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="expected a file of plain tensors, got"):
            load_weights(build_model(SMALL, 3), tmp_path / name)

    def test_a_pickled_model_is_refused(self, tmp_path):
        torch.save(build_model(SMALL, 3), tmp_path / "model.pth")
        with pytest.raises(ValueError, match=r"plain tensors, got .* Save model.state_dict\(\)"):
            load_weights(build_model(SMALL, 3), tmp_path / "model.pth")

    @pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}])
    def test_a_file_without_a_state_dict_is_refused(self, tmp_path, content):
        torch.save(content, tmp_path / "model.pth")
        with pytest.raises(ValueError, match="expected a state dict, got other content"):
            load_weights(build_model(SMALL, 3), tmp_path / "model.pth")


class TestImageNetWeights:
    def test_the_full_model_loads_with_its_classifier(self):
        path = weights_file("mobilenetv2_100_imagenet.safetensors")
        model = build_model("mobilenetv2_100", 1000, timm_kwargs=SAME)
        assert load_weights(model, path) == []

    def test_another_number_of_classes_leaves_the_head(self):
        path = weights_file("mobilenetv2_100_imagenet.safetensors")
        model = build_model("mobilenetv2_100", 4, "mlp", timm_kwargs=SAME)
        assert len(load_weights(model, path)) == 6

    def test_features_without_counters_load(self):
        path = weights_file("mobilenetv2_035_imagenet_features.safetensors")
        assert load_weights(build_model(SMALL, 0, timm_kwargs=SAME), path) == []
        left = load_weights(build_model(SMALL, 4, timm_kwargs=SAME), path)
        assert left == ["classifier.weight", "classifier.bias"]

    def test_the_other_width_is_refused(self):
        path = weights_file("mobilenetv2_100_imagenet.safetensors")
        with pytest.raises(ValueError, match="expected the weights of this model"):
            build_model(SMALL, 4, weights=path, timm_kwargs=SAME)
