"""timm's own weights: asked for, told apart, and how to come by them without a network."""

import json

import pytest
import timm
import torch
from small_runs import BASELINE, SMALL
from timm.models import save_for_hf

from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.models.factory import build_model, get_pretrained_hash
from kd_lrp_plugin.models.weights import hash_state
from kd_lrp_plugin.runs.loading import load_run
from kd_lrp_plugin.training.trainer import distill

NAME = "test_resnet"  # of which timm has weights


def body(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: t for key, t in model.state_dict().items() if not key.startswith("fc.")}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def hub(monkeypatch) -> torch.nn.Module:
    """timm's hub, of one model; what it hands out counts as downloaded."""
    source = timm.create_model(NAME)
    offline = timm.create_model

    def create_model(name, pretrained=False, **kwargs):
        model = offline(name, **kwargs)
        if pretrained:
            assert name == NAME
            model.load_state_dict(source.state_dict())
        return model

    monkeypatch.setattr(timm, "create_model", create_model)
    return source


@pytest.fixture
def folder(tmp_path) -> str:
    """A model of three classes in a folder of timm's."""
    model = timm.create_model(NAME, num_classes=3)
    save_for_hf(model, tmp_path / "mine", model_config={"num_classes": 3})
    return f"local-dir:{tmp_path / 'mine'}"


class TestHub:
    def test_the_weights_are_those_of_timm_but_for_the_classifier(self, hub):
        model = build_model(NAME, 4, pretrained=True)
        assert equal(body(model), body(hub))
        assert model.get_classifier().out_features == 4
        assert get_pretrained_hash(model) == hash_state(hub.state_dict())

    def test_random_weights_have_no_hash(self, hub):
        model = build_model(NAME, 4)
        assert get_pretrained_hash(model) is None
        assert not equal(body(model), body(hub))

    def test_without_a_network_the_error_says_how_to_fetch_them(self, monkeypatch, tmp_path):
        for name in ("HF_HUB_CACHE", "HF_HOME", "TORCH_HOME"):
            monkeypatch.setenv(name, str(tmp_path))

        def no_network(*_, **__):
            raise ConnectionError("Name or service not known")

        monkeypatch.setattr("timm.models._hub.hf_hub_download", no_network)
        with pytest.raises(FileNotFoundError) as caught:
            build_model(NAME, 4, pretrained=True)
        text = str(caught.value)
        assert "build_model: pretrained: expected the weights of test_resnet" in text
        assert "ConnectionError: Name or service not known" in text
        assert "save_file(timm.create_model('test_resnet', pretrained=True).state_dict()" in text
        assert "set weights to its path" in text

    def test_the_command_that_the_error_names_makes_weights_that_fit(self, hub, tmp_path):
        from safetensors.torch import save_file

        save_file(timm.create_model(NAME, pretrained=True).state_dict(), tmp_path / "w.safetensors")
        model = build_model(NAME, 4, weights=tmp_path / "w.safetensors")
        assert equal(body(model), body(hub))

    def test_a_model_of_which_timm_has_none_is_refused(self):
        with pytest.raises(ValueError, match=r"none for mobilenetv2_035; .*'mobilenetv2_050"):
            build_model("mobilenetv2_035", 4, pretrained=True)

    def test_two_kinds_of_weights_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"expected pretrained: True, or weights, got"):
            build_model(NAME, 4, pretrained=True, weights=tmp_path / "w.pt")
        with pytest.raises(ValueError, match="got pretrained 'yes'"):
            build_model(NAME, 4, pretrained="yes")


class TestLocalFolder:
    def test_weights_and_classifier_of_a_folder(self, folder):
        model = build_model(folder, 3, pretrained=True)
        torch.manual_seed(1)
        assert equal(model.state_dict(), build_model(folder, 3, pretrained=True).state_dict())
        assert get_pretrained_hash(model) == hash_state(model.state_dict())

    def test_its_architecture_alone_without_pretrained(self, folder):
        model = build_model(folder, 4)
        assert model.get_classifier().out_features == 4
        assert not equal(body(model), body(build_model(folder, 4, pretrained=True)))

    def test_a_folder_without_a_config_is_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"a config.json of timm, got none in"):
            build_model(f"local-dir:{tmp_path}", 3)

    def test_an_architecture_that_timm_lacks_is_refused(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet10x"}))
        with pytest.raises(ValueError, match=r"architecture: expected one of .*'resnet10t'"):
            build_model(f"local-dir:{tmp_path}", 3)

    def test_a_folder_without_weights_is_refused(self, folder, tmp_path):
        for file in (tmp_path / "mine").glob("*.*"):
            if file.name != "config.json":
                file.unlink()
        with pytest.raises(FileNotFoundError, match=r"Put model\.safetensors beside its config"):
            build_model(folder, 3, pretrained=True)


class TestRuns:
    def spec(self, tmp_path, **options) -> RunSpec:
        changes = [*SMALL, "+models.model.kwargs.pretrained=True", "train.num_epochs=2"]
        return RunSpec(BASELINE, changes, tmp_path / "run", device="cpu", **options)

    def test_the_run_records_the_hash_and_is_read_without_timms_weights(
        self, hub, tmp_path, monkeypatch
    ):
        distill(self.spec(tmp_path))
        about = json.loads((tmp_path / "run/environment.json").read_text())
        assert about["files"]["models.model.pretrained"] == hash_state(hub.state_dict())

        def refuse(*_, **__):
            raise AssertionError("timm was asked for weights")

        monkeypatch.setattr("kd_lrp_plugin.models.factory._read_pretrained", refuse)
        load_run(tmp_path / "run")

    def test_other_weights_on_resuming_are_refused(self, hub, tmp_path):
        distill(self.spec(tmp_path))
        (tmp_path / "run/summary.json").unlink()
        with torch.no_grad():
            next(hub.parameters()).add_(1)
        with pytest.raises(FileExistsError, match=r"began with others: models.model.pretrained"):
            distill(self.spec(tmp_path))
