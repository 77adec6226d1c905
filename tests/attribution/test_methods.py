"""Explanations after training against loops over images, channels and pixels, and Quantus."""

from functools import cache, partial
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from skimage.segmentation import slic
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from torch.nn import functional

from kd_lrp_plugin.attribution import faithfulness, perturbation
from kd_lrp_plugin.attribution import randomisation as randomising
from kd_lrp_plugin.attribution.faithfulness import deletion, insertion
from kd_lrp_plugin.attribution.localisation import (
    pointing_game,
    rank_accuracy,
    rank_correlation,
    relevance_mass_accuracy,
)
from kd_lrp_plugin.attribution.methods import ATTRIBUTIONS, Attribution, attribute
from kd_lrp_plugin.attribution.randomisation import randomisation
from kd_lrp_plugin.relevance.methods import METHODS
from kd_lrp_plugin.relevance.recording import relevance_maps

LAYER = "blocks.2"


@cache
def network() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv2_035", num_classes=3)
    model.train()
    for _ in range(3):  # norms that have seen something
        model(torch.randn(8, 3, 32, 32))
    return model.eval().requires_grad_(False)


def batch(n: int = 3, side: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    small = torch.randn(n, 3, 4, 4, generator=generator)
    return functional.interpolate(small, (side, side), mode="bilinear"), torch.arange(n) % 3


class Spot(nn.Module):
    """Two classes; the logit of the second is the brightness of one quarter of the image."""

    def __init__(self, side: int = 16) -> None:
        super().__init__()
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        value = images[:, :, : self.side // 2, : self.side // 2].mean((1, 2, 3))
        return torch.stack([torch.zeros_like(value), 4 * value], 1)


def spot_images(side: int = 16) -> Tensor:
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    images[:, :, : side // 2, : side // 2] += 1
    return images


def quarter(side: int = 16) -> Tensor:
    """A map that knows what :class:`Spot` looks at."""
    maps = torch.zeros(2, side, side)
    maps[:, : side // 2, : side // 2] = 1
    return maps


class TestEveryMethod:
    @pytest.mark.parametrize("method", sorted(ATTRIBUTIONS))
    def test_gives_positive_maps_that_do_not_depend_on_the_other_images(self, method, monkeypatch):
        monkeypatch.setattr(perturbation, "LIME_SAMPLES", 40)
        monkeypatch.setattr(perturbation, "RISE_MASKS", 40)
        (images, _), model = batch(), network()
        targets = model(images).argmax(1)  # of a negative logit LRP-z⁺ has no positive relevance
        together = attribute(model, images, targets, method, LAYER)
        alone = attribute(model, images[1:2], targets[1:2], method, LAYER)
        size = (4, 4) if ATTRIBUTIONS[method].layered else (32, 32)
        assert together.shape == (3, *size)
        assert (together >= 0).all()
        assert (together[1] > 0).any()
        torch.testing.assert_close(together[1:2], alone, rtol=1e-3, atol=1e-5 * float(alone.max()))

    @pytest.mark.parametrize("method", sorted(ATTRIBUTIONS))
    def test_leaves_the_model_as_it_was(self, method, monkeypatch):
        monkeypatch.setattr(perturbation, "LIME_SAMPLES", 10)
        monkeypatch.setattr(perturbation, "RISE_MASKS", 10)
        (images, targets), model = batch(), network()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        state = torch.get_rng_state()
        attribute(model, images, targets, method, LAYER)
        assert torch.equal(torch.get_rng_state(), state)
        assert not model.training
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert not any(module._forward_hooks for module in model.modules())

    def test_those_of_training_are_among_them_and_the_same(self):
        images, targets = batch()
        for method in METHODS:
            (expected,) = relevance_maps(network(), images, targets, [LAYER], method)
            assert torch.equal(attribute(network(), images, targets, method, LAYER), expected)

    def test_one_entry_adds_another(self, monkeypatch):
        monkeypatch.setattr(ATTRIBUTIONS, "_entries", dict(ATTRIBUTIONS))
        even = Attribution(lambda model, images, targets, layer: torch.ones(len(images), 2, 2))
        ATTRIBUTIONS.register(even, "even")
        assert attribute(network(), *batch(), "even").tolist() == torch.ones(3, 2, 2).tolist()

    def test_a_model_in_train_mode_and_targets_that_do_not_fit_are_refused(self):
        images, targets = batch()
        with pytest.raises(ValueError, match=r"model\.eval"):
            attribute(timm.create_model("mobilenetv2_035"), images, targets, "grad_cam", LAYER)
        with pytest.raises(ValueError, match="one class index per image"):
            attribute(network(), images, targets[:2], "grad_cam", LAYER)
        with pytest.raises(ValueError, match="Did you mean 'score_cam'"):
            attribute(network(), images, targets, "score-cam", LAYER)


class TestScoreCam:
    def test_agrees_with_a_loop_over_the_channels(self):
        images, targets = batch(2)
        model = network()
        got = attribute(model, images, targets, "score_cam", LAYER)
        heard = []
        handle = model.get_submodule(LAYER).register_forward_hook(lambda *args: heard.append(args))
        model(images)
        handle.remove()
        for place in range(2):
            scores, channels = [], []
            for channel in heard[0][2][place]:
                large = functional.interpolate(channel[None, None], (32, 32), mode="bilinear")
                mask = (large - large.min()) / (large.max() - large.min())
                scores.append(float(model(images[place : place + 1] * mask)[0, targets[place]]))
                channels.append(channel)
            powers = np.exp(np.array(scores) - max(scores))
            weighted = [w * c for w, c in zip(powers / powers.sum(), channels, strict=True)]
            expected = sum(weighted).clamp(min=0)
            # the convolutions of a batch and of a single image differ in the last digits
            torch.testing.assert_close(got[place], expected.float(), rtol=1e-3, atol=1e-4)

    def test_agrees_with_the_package_grad_cam_once_corners_are_not_aligned(self, monkeypatch):
        package = pytest.importorskip("pytorch_grad_cam", reason="needs the package grad-cam")
        images, targets = batch(2)
        model = network()
        layer = model.get_submodule(LAYER)
        scores = [package.utils.model_targets.ClassifierOutputTarget(int(t)) for t in targets]

        def maps() -> Tensor:
            with package.ScoreCAM(model, [layer]) as theirs:
                theirs.activations_and_grads(images)
                (channels,) = theirs.activations_and_grads.activations
                found = theirs.get_cam_image(images, layer, scores, channels.numpy(), None, False)
            return torch.from_numpy(found).clamp(min=0)

        got = attribute(model, images, targets, "score_cam", LAYER)
        aligned = maps()
        monkeypatch.setattr(nn, "UpsamplingBilinear2d", partial(nn.Upsample, mode="bilinear"))
        torch.testing.assert_close(got, maps().float(), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(got, aligned.float(), rtol=1e-3, atol=1e-4)

    def test_even_channels_are_left_out_and_a_layer_of_them_has_no_relevance(self):
        class Even(nn.Module):
            def __init__(self, kept: int) -> None:
                super().__init__()
                self.layer, self.kept = nn.Conv2d(3, 4, 3, padding=1), kept
                self.layer.requires_grad_(False)

            def forward(self, images: Tensor) -> Tensor:
                return self.head(self.layer(images))

            def head(self, x: Tensor) -> Tensor:
                return x.mean((2, 3))

        model, (images, targets) = Even(0).eval(), batch(2)
        model.layer.weight.zero_()
        model.layer.bias.fill_(1)
        assert attribute(model, images, targets, "score_cam", "layer").tolist() == (
            torch.zeros(2, 32, 32).tolist()
        )
        model.layer.weight[0, 0, 1, 1] = 1
        maps = attribute(model, images, targets, "score_cam", "layer")
        torch.testing.assert_close(maps, (images[:, 0] + 1).relu())  # one channel, weight 1


class TestLime:
    def test_agrees_with_a_ridge_regression_on_the_same_draws(self, monkeypatch):
        monkeypatch.setattr(perturbation, "LIME_SAMPLES", 30)
        (images, targets), model = batch(1), network()
        got = attribute(model, images, targets, "lime")[0]
        image = images[0].double().permute(1, 2, 0).numpy()
        picture = (image - image.min()) / (image.max() - image.min())
        parts = slic(picture, 50, compactness=10, sigma=1, start_label=0)
        torch.manual_seed(0)
        draws = [torch.bernoulli(0.5 * torch.ones(1, parts.max() + 1))[0] for _ in range(30)]
        answers, weights = [], []
        for draw in draws:
            kept = draw[torch.from_numpy(parts)]
            colour = images.mean((2, 3), keepdim=True)
            answers.append(float(model(images * kept + colour * (1 - kept))[0, targets[0]]))
            cosine = float(draw.sum()) / np.sqrt(float(draw.sum()) * len(draw))
            weights.append(np.exp(-((1 - cosine) ** 2) / (2 * 0.25**2)))
        ridge = Ridge(alpha=1.0).fit(torch.stack(draws).numpy(), answers, weights)
        expected = torch.from_numpy(ridge.coef_.clip(0))[torch.from_numpy(parts)].float()
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("kind", [torch.rand, torch.randn, torch.zeros])
    def test_noise_and_even_images_have_superpixels_too(self, kind):
        assert int(perturbation._superpixels(kind(3, 64, 64)).max()) > 20

    def test_finds_what_a_model_looks_at(self):
        side = 32
        images = spot_images(side)
        maps = attribute(Spot(side).eval(), images, torch.tensor([1, 1]), "lime")
        inside = relevance_mass_accuracy(maps, quarter(side) > 0)
        assert (inside > 0.8).all()  # superpixels at the border reach out of it


class TestInsertionAndDeletion:
    @pytest.mark.parametrize("figure", [insertion, deletion])
    def test_agree_with_a_loop_over_pixels(self, figure):
        (images, targets), model = batch(2, 16), Spot()
        targets = targets.clamp(max=1)
        maps = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0))
        got = figure(model, images, targets, maps)
        mean = images.mean((2, 3), keepdim=True).expand_as(images)
        blurred = faithfulness._blurred(images)
        start, end = (images, mean) if figure is deletion else (blurred, images)
        for place in range(2):
            order = np.argsort(-maps[place].flatten().numpy())
            now, values = start[place].clone().flatten(1), []
            for step in range(17):
                for pixel in order[: 16 * step]:
                    now[:, pixel] = end[place].flatten(1)[:, pixel]
                logits = model(now.view(1, 3, 16, 16))
                values.append(float(logits.softmax(1)[0, targets[place]]))
            area = sum((a + b) / 2 / 16 for a, b in pairwise(values))
            assert float(got[place]) == pytest.approx(area, abs=1e-6)

    def test_prefer_a_map_that_knows_what_the_model_looks_at(self):
        model, images, targets = Spot(), spot_images(), torch.tensor([1, 1])
        knows, opposite = quarter(), 1 - quarter()
        assert (
            insertion(model, images, targets, knows) > insertion(model, images, targets, opposite)
        ).all()
        assert (
            deletion(model, images, targets, knows) < deletion(model, images, targets, opposite)
        ).all()

    def test_have_no_value_for_a_map_without_relevance(self):
        maps = quarter()
        maps[1] = 0
        for figure in (insertion, deletion):
            values = figure(Spot(), spot_images(), torch.tensor([1, 1]), maps)
            assert values.isnan().tolist() == [False, True]

    def test_refuse_different_numbers(self):
        with pytest.raises(ValueError, match=r"^deletion: expected images .* one map per image"):
            deletion(Spot(), spot_images(), torch.tensor([1, 1]), quarter()[:1])

    def test_the_blur_keeps_the_mean_and_takes_the_detail(self):
        images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        blurred = faithfulness._blurred(images)
        assert float(blurred.mean()) == pytest.approx(float(images.mean()), abs=0.02)
        assert float(blurred.std()) < 0.2 * float(images.std())


class TestRandomisation:
    def test_goes_from_the_classifier_down_to_the_first_layer_and_leaves_the_model(self):
        (images, targets), model = batch(4), network()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        maps = attribute(model, images, targets, "grad_cam", LAYER)
        found = randomisation(model, images, maps, "grad_cam", LAYER, points=3)
        assert len(found) == 3
        assert next(iter(found)) == "classifier"
        assert list(found)[-1] == "conv_stem"
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert all(len(values) == 4 for values in found.values())

    def test_a_method_that_ignores_the_weights_stays_the_same(self, monkeypatch):
        monkeypatch.setattr(ATTRIBUTIONS, "_entries", dict(ATTRIBUTIONS))
        edges = Attribution(lambda model, images, targets, layer: images.abs().sum(1))
        ATTRIBUTIONS.register(edges, "edges")
        images, targets = batch(4)
        maps = attribute(network(), images, targets, "edges")
        found = randomisation(network(), images, maps, "edges", points=2)
        for values in found.values():
            torch.testing.assert_close(values, torch.ones(4))

    def test_layers_above_are_reset_and_those_below_are_not(self, monkeypatch):
        seen = []
        monkeypatch.setattr(
            randomising, "relevance_maps", lambda model, *_: seen.append(weights(model)) or [maps]
        )

        def weights(model: nn.Module) -> dict[str, Tensor]:
            return {key: value.clone() for key, value in model.named_parameters()}

        (images, _), model = batch(4), network()
        maps = torch.rand(4, 2, 2)
        names = list(randomisation(model, images, maps, "grad_cam", LAYER, points=5))
        order = [name for name, module in model.named_modules() if hasattr(module, "weight")]
        for name, now in zip(names, seen, strict=True):
            kept = order[: order.index(name)]
            for layer in order:
                same = torch.equal(now[f"{layer}.weight"], model.get_parameter(f"{layer}.weight"))
                is_norm = "bn" in layer  # reset to ones, as this network has them
                assert same or layer not in kept
                assert not same or layer in kept or is_norm

    def test_features_of_the_random_network_do_not_vanish(self):
        images, _ = batch(4)
        for name, changed in randomising._forgetting(network(), images, 2):
            activations = []
            handle = changed.get_submodule(LAYER).register_forward_hook(
                lambda _, __, output, kept=activations: kept.append(output)
            )
            changed(images)
            handle.remove()
            assert 0.1 < float(activations[0].std()) < 10, name

    @pytest.mark.parametrize("bias", [3.0, -3.0])
    def test_a_random_network_has_relevance_whatever_the_sign_of_its_output(
        self, bias, monkeypatch
    ):
        def reset(self) -> None:
            nn.init.normal_(self.weight, std=0.01)
            nn.init.constant_(self.bias, bias)

        images, targets = batch(8)
        maps = attribute(network(), images, targets, "gradient_activation", LAYER)
        monkeypatch.setattr(nn.Linear, "reset_parameters", reset)
        found = randomisation(network(), images, maps, "lrp_zplus", LAYER, points=3)
        empty = int((maps.flatten(1).amax(1) == 0).sum())
        assert [int(values.isnan().sum()) for values in found.values()] == [empty] * 3

    def test_maps_of_another_size_are_refused(self):
        images, _ = batch(2)
        with pytest.raises(ValueError, match="this method's maps"):
            randomisation(network(), images, torch.rand(2, 3, 3), "grad_cam", LAYER, points=1)


PLAIN = {"abs": False, "normalise": False, "disable_warnings": True}


class TestAgainstQuantus:
    """The same figures from Quantus, on the same maps, with its normalisation switched off."""

    @pytest.fixture
    def quantus(self):
        return pytest.importorskip("quantus")

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            (relevance_mass_accuracy, "RelevanceMassAccuracy"),
            (rank_accuracy, "RelevanceRankAccuracy"),
            (pointing_game, "PointingGame"),
        ],
    )
    def test_figures_of_masks(self, quantus, ours, theirs):
        """Maps without equal pixels: of those Quantus takes any order, and any hit of a peak."""
        generator = torch.Generator().manual_seed(0)
        maps = torch.rand(6, 8, 8, generator=generator, dtype=torch.float64)
        masks = torch.rand(6, 8, 8, generator=generator) > 0.7
        masks[0] = maps[0] > 0.8  # a hit at least
        metric = getattr(quantus, theirs)(**PLAIN)
        expected = metric(
            model=None,
            x_batch=np.zeros((6, 1, 8, 8)),
            y_batch=np.zeros(6, int),
            a_batch=maps[:, None].numpy(),
            s_batch=masks[:, None].numpy(),
        )
        assert ours(maps, masks).tolist() == pytest.approx([*map(float, expected)], rel=1e-12)

    def test_deletion(self, quantus):
        """Quantus' curve begins after the first step and counts steps; ours before, and shares."""
        images = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        maps = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(1))
        model = Spot().eval()
        metric = quantus.PixelFlipping(
            features_in_step=16, perturb_baseline=float(images.mean()), **PLAIN
        )
        (curve,) = metric(
            model=model,
            x_batch=images.numpy(),
            y_batch=np.array([1]),
            a_batch=maps[:, None].numpy(),
            softmax=True,
            channel_first=True,
        )
        first = float(model(images).softmax(1)[0, 1])
        expected = np.trapezoid([first, *curve], dx=1 / 16)
        got = deletion(model, images, torch.tensor([1]), maps)
        assert float(got) == pytest.approx(expected, abs=1e-6)

    def test_randomisation(self, quantus):
        """The classifier alone: below it, Quantus draws the same numbers anew for each layer."""
        torch.manual_seed(0)
        layers = (nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3))
        model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *layers).eval()
        images, targets = batch(3, 8)
        maps = attribute(model, images, targets, "gradient_activation", "0")

        def explain_function(
            model: nn.Module, inputs: np.ndarray, targets: np.ndarray, **_: object
        ):
            arrays = torch.as_tensor(inputs), model.eval()(torch.as_tensor(inputs)).argmax(1)
            return attribute(model, *arrays, "gradient_activation", "0")[:, None].numpy()

        metric = quantus.MPRT(
            similarity_func=quantus.similarity_func.correlation_spearman, seed=-1, **PLAIN
        )
        state = torch.get_rng_state()
        expected = metric(
            model=model,
            x_batch=images.numpy(),
            y_batch=targets.numpy(),
            a_batch=maps[:, None].numpy(),
            explain_func=explain_function,
            channel_first=True,
        )
        torch.set_rng_state(state)
        got = randomisation(model, images, maps, "gradient_activation", "0", points=2)
        assert got["4"].tolist() == pytest.approx([*expected["4"]], abs=1e-6)

    def test_rank_correlation(self, quantus):
        one, other = torch.rand(3, 4, 4), torch.rand(3, 4, 4)
        spearman = quantus.similarity_func.correlation_spearman
        expected = spearman(one.flatten(1).numpy(), other.flatten(1).numpy(), batched=True)
        assert rank_correlation(one, other).tolist() == pytest.approx([*expected], abs=1e-6)


class TestRegistry:
    def test_a_method_of_a_module_of_ones_own_works_by_its_name(self, monkeypatch):
        def brightness(model, images, targets, layer):
            return images.sum(1).relu()

        monkeypatch.setattr(ATTRIBUTIONS, "_entries", dict(ATTRIBUTIONS._entries))
        ATTRIBUTIONS.register(Attribution(brightness, layered=False), "brightness")
        (images, targets), model = batch(), network()
        maps = attribute(model, images, targets, "brightness")
        assert torch.equal(maps, images.sum(1).relu())
        found = randomisation(model, images, maps, "brightness", points=2)
        assert all(torch.allclose(values, torch.ones(len(images))) for values in found.values())

    def test_a_relevance_method_that_is_registered_later_is_one_too(self, monkeypatch):
        before = set(ATTRIBUTIONS)
        monkeypatch.setitem(METHODS._entries, "my_rule", METHODS["lrp_epsilon"])
        assert set(ATTRIBUTIONS) == before | {"my_rule"}
        assert len(ATTRIBUTIONS) == len(before) + 1
        (images, targets), model = batch(), network()
        got = attribute(model, images, targets, "my_rule", LAYER)
        assert torch.equal(got, attribute(model, images, targets, "lrp_epsilon", LAYER))

    @pytest.mark.parametrize("name", ["lime", "lrp_epsilon"])
    def test_a_name_that_is_taken_is_refused(self, name):
        with pytest.raises(ValueError, match="expected a new name"):
            ATTRIBUTIONS.register(Attribution(lambda *_: None), name)
