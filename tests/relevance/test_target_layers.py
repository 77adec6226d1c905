"""Which layers are recorded: of models that say it, of models that are traced, under a prefix."""

import logging

import pytest
import timm
import torch
import torchdistill.models.wrapper  # noqa: F401  registers the auxiliary wrappers
import torchvision
from torch import nn
from torchdistill.models.registry import MODEL_DICT, get_auxiliary_model_wrapper

from kd_lrp_plugin import record
from kd_lrp_plugin.relevance.target_layers import choose_layers, resolve_layers

STAGES = {  # by hand, from the models' definitions
    "resnet18": ["relu", "layer1", "layer2", "layer3"],
    "mobilenet_v2": ["features.1", "features.3", "features.6", "features.13"],
    "vgg11": [f"features.{n}" for n in (1, 4, 9, 14, 19)],
    "densenet121": ["features.relu0", *(f"features.denseblock{n}" for n in (1, 2, 3))],
    "efficientnet_b0": ["features.1", "features.2", "features.3", "features.5"],
    "googlenet": ["conv1", "conv3", "inception3b", "inception4e"],
    "inception_v3": ["Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e"],
    "regnet_y_400mf": ["stem", *(f"trunk_output.block{n}" for n in (1, 2, 3))],
    "alexnet": ["features.1", "features.4"],
}
OF_TORCHDISTILL = {
    "resnet20": ["layer1", "layer2"],
    "wide_resnet40_4": ["layer1", "layer2"],
    "densenet_bc_k12_depth100": ["features.denseblock1", "features.denseblock2"],
}
OLD = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}


def torchvisions(name: str) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, **OLD.get(name, {}))


@pytest.mark.parametrize("name", sorted(STAGES))
def test_torchvisions_stages_are_found(name):
    assert choose_layers(torchvisions(name)) == STAGES[name]


@pytest.mark.parametrize("name", sorted(OF_TORCHDISTILL))
def test_torchdistills_stages_are_found(name):
    kwargs = {"dropout_p": 0.0} if name.startswith("wide") else {}
    model = MODEL_DICT[name](num_classes=10, **kwargs)
    assert choose_layers(model) == OF_TORCHDISTILL[name]


@pytest.mark.parametrize("name", ["mobilenetv2_035", "resnet10t"])
def test_timms_own_stages_are_taken(name):
    model = timm.create_model(name, num_classes=4)
    info = model.feature_info[:-1]
    assert choose_layers(model) == [entry["module"] for entry in info]
    wrapped = nn.ModuleDict({"inner": model})
    assert choose_layers(wrapped) == [f"inner.{entry['module']}" for entry in info]


class _Small(nn.Module):
    """Three stages, an input that is normalised, a dropout, a counter of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize = nn.BatchNorm2d(1, affine=False)
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.down1 = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.Dropout(0.5), nn.ReLU())
        self.down2 = nn.Conv2d(6, 8, 3, 2, 1)
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.sizes: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.sizes.append(len(images))
        x = self.down2(self.down1(self.stem(self.normalize(images))))
        return self.head(self.squeeze(x).flatten(1))


class TestTrace:
    @pytest.mark.parametrize("training", [True, False])
    def test_the_model_and_the_random_numbers_are_left_as_they_were(self, untouched, training):
        model = _Small().train(training)
        torch.nn.utils.parametrizations.spectral_norm(model.stem[0])
        model.stem.eval()  # as a frozen part
        generator = torch.get_rng_state()
        with untouched(model):
            model.sizes.clear()
            layers = choose_layers(model)
        assert layers == ["stem", "down1"]  # neither the normalised image nor the last
        assert torch.equal(torch.get_rng_state(), generator)

    def test_steps_cost_no_forward_pass_more(self, caplog):
        model = _Small()
        with caplog.at_level(logging.INFO):
            for _ in range(3):
                with record(model) as recording:
                    logits = model(torch.rand(5, 1, 32, 32))
        assert model.sizes == [2, 5, 5, 5]
        assert [tuple(m.shape) for m in recording.maps(logits, torch.zeros(5, dtype=torch.long))]
        said = [r.getMessage() for r in caplog.records if "'auto'" in r.getMessage()]
        assert said == ["layers of _Small for 'auto': ['stem', 'down1']"]

    def test_a_graph_that_waits_for_its_backward_pass_is_not_hurt(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 2))
        model = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        logits = model(torch.rand(2, 3, 32, 32))
        choose_layers(model)
        logits.sum().backward()

    @pytest.mark.parametrize("name", ["vit_b_16", "swin_t"])
    def test_transformers_are_refused(self, name):
        with pytest.raises(ValueError, match=r"more for 'auto', got .*Name the layers"):
            choose_layers(torchvision.models.get_model(name, weights=None))

    def test_a_model_of_one_size_is_refused(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        with pytest.raises(ValueError, match="two sizes or more"):
            choose_layers(model)

    def test_a_model_that_does_not_run_says_why(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(7, 3))
        with pytest.raises(ValueError, match=r"runs on zeros for 'auto', got .* 64 px: .*shape"):
            choose_layers(model)

    @pytest.mark.parametrize(
        ("name", "method"),
        [
            ("resnet18", "lrp_epsilon"),
            ("mobilenet_v2", "lrp_epsilon"),
            ("vgg11_bn", "lrp_epsilon"),
            ("densenet121", "gradient_activation"),  # its functional ReLU has no rule
        ],
    )
    def test_the_chosen_layers_have_maps(self, name, method):
        model = torchvisions(name).eval()
        with record(model, "auto", method) as recording:
            logits = model(torch.rand(2, 3, 64, 64))
        maps = recording.maps(logits, torch.tensor([0, 1]), signed=True)
        sides = [m.shape[-1] for m in maps]
        assert sides == sorted(sides, reverse=True)
        assert all(m.isfinite().all() and m.abs().sum() > 0 for m in maps)


class TestPrefix:
    def wrapped(self) -> nn.Module:
        kwargs = {"input_module": {"path": "model.avgpool", "io": "output"}, "feat_dim": 512}
        return get_auxiliary_model_wrapper(
            "SSWrapper4SSKD",
            student_model=torchvisions("resnet18"),
            ss_module_ckpt="none.pt",
            device=torch.device("cpu"),
            device_ids=None,
            distributed=False,
            **kwargs,
        )

    def test_a_wrappers_prefix_is_found(self):
        model = self.wrapped()
        assert resolve_layers(model, ["layer2", "layer3"]) == ["model.layer2", "model.layer3"]
        assert resolve_layers(model, ["model.layer2"]) == ["model.layer2"]

    def test_auto_looks_into_the_wrapper(self):
        layers = choose_layers(self.wrapped())
        assert layers == [f"model.{name}" for name in STAGES["resnet18"]]

    def test_what_could_be_several_is_refused_with_suggestions(self):
        model = nn.ModuleDict({"one": _Small(), "two": _Small()})
        with pytest.raises(ValueError, match=r"got 'down1'. Did you mean .*'one\.down1'"):
            resolve_layers(model, ["down1"])

    def test_names_under_different_prefixes_are_refused(self):
        model = nn.ModuleDict({"one": nn.ModuleDict({"relu": nn.ReLU()}), "down": nn.ReLU()})
        with pytest.raises(ValueError, match=r"got 'relu'. Did you mean 'one.relu'"):
            resolve_layers(model, ["relu", "down"])
