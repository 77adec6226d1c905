"""Student spaces: the published counts, timm's own networks, every choice, clear refusals."""

import pytest
import timm
import torch

from kd_lrp_plugin.metrics.efficiency import count_parameters
from kd_lrp_plugin.models.mobilenetv2 import MobileNetV2, mobilenetv2
from kd_lrp_plugin.selection.spaces import LARGE, SPACES, THESIS, Space


class TestMobileNetV2:
    @pytest.mark.parametrize(("width", "name"), [(0.35, "035"), (0.75, "075"), (1.4, "140")])
    def test_is_timms_network_where_timm_has_one(self, width, name):
        ours = MobileNetV2(width).build(4).eval()
        timms = timm.create_model(f"mobilenetv2_{name}", num_classes=4).eval()
        timms.load_state_dict(ours.state_dict())
        images = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(ours(images), timms(images))

    @pytest.mark.parametrize(
        ("student", "classes", "count"),
        [
            (MobileNetV2(), 0, 2_257_984),
            (MobileNetV2(0.35), 0, 410_208),
            (MobileNetV2(head="mlp"), 4, 2_619_332),
            (MobileNetV2(head="flatten_mlp"), 4, 18_347_972),
        ],
    )
    def test_has_the_published_counts(self, student, classes, count):
        assert count_parameters(student.build(classes), buffers=True) == count

    def test_has_the_kernels_and_expansions_of_its_stages(self):
        student = MobileNetV2(kernels=(5, 3, 7, 3, 3, 3, 5), expansions=(2, 3, 4, 5, 6, 1))
        model = student.build(4)
        sides = [stage[0].conv_dw.kernel_size[0] for stage in model.blocks]
        assert sides == [5, 3, 7, 3, 3, 3, 5]
        ratios = []
        for stage in model.blocks[1:]:
            block = stage[0]
            inputs = block.conv_pw.in_channels
            ratios.append(block.conv_dw.in_channels / inputs)
        assert ratios == [2, 3, 4, 5, 6, 1]

    def test_has_as_many_blocks_as_its_depth_says(self):
        assert [len(s) for s in MobileNetV2(depth=0.5).build(4).blocks] == [1, 1, 2, 2, 2, 2, 1]
        assert [len(s) for s in MobileNetV2(depth=1.5).build(4).blocks] == [2, 3, 5, 6, 5, 5, 2]

    @pytest.mark.parametrize("pooling", ["avg", "max", "avgmax"])
    def test_pools_as_asked(self, pooling):
        model = MobileNetV2(0.35, pooling=pooling).build(4).eval()
        maps = model.forward_features(torch.randn(2, 3, 32, 32))
        mean, most = maps.mean((2, 3)), maps.amax((2, 3))
        expected = {"avg": mean, "max": most, "avgmax": (mean + most) / 2}[pooling]
        assert torch.allclose(model.forward_head(maps, pre_logits=True), expected, atol=1e-6)

    def test_is_named_by_what_it_is(self):
        assert str(MobileNetV2(0.35)) == "width0.35-depth1-linear"
        student = MobileNetV2(kernels=[3, 3, 5, 3, 3, 3, 3], pooling="max", dropout=0.2)
        assert str(student) == "width1-depth1-k3353333-max-linear-drop0.2"

    @pytest.mark.parametrize(
        ("choices", "words"),
        [
            ({"width": 0}, "width: expected > 0"),
            ({"kernels": (3, 3)}, "seven odd sides"),
            ({"kernels": (4,) * 7}, "seven odd sides"),
            ({"expansions": (6,) * 7}, "six >= 1"),
            ({"head": "mpl"}, "Did you mean 'mlp'"),
            ({"pooling": "mean"}, "expected one of"),
            ({"wdith": 1}, "Did you mean 'width'"),
        ],
    )
    def test_refuses_what_makes_no_network(self, choices, words):
        with pytest.raises(ValueError, match=words):
            mobilenetv2(4, **choices)


class TestSpace:
    def test_the_spaces_are_as_large_as_they_say(self):
        assert len(THESIS) == len({str(student) for student in THESIS}) == 16
        assert len(LARGE) == 344_064
        assert set(SPACES) >= {"thesis", "large"}

    def test_the_thesis_space_holds_its_best_student(self):
        assert MobileNetV2(head="mlp") in list(THESIS)

    def test_a_stage_is_an_axis_of_its_own(self):
        space = Space({"kernels": (3, 5), "width": (0.5,)})
        assert len(space) == 2**7
        assert space.axes()["kernels.3"] == [3, 5]
        chosen = {f"kernels.{stage}": 3 for stage in range(7)} | {"kernels.2": 5, "width": 0.5}
        assert space.student(chosen) == MobileNetV2(0.5, kernels=(3, 3, 5, 3, 3, 3, 3))

    @pytest.mark.parametrize("choices", [{"colour": [1]}, {"width": []}, {"width": [0]}])
    def test_refuses_wrong_choices(self, choices):
        with pytest.raises(ValueError, match="expected"):
            Space(choices)
