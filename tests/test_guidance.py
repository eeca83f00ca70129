"""Guidance against the formula, diffusers' rescaling, and a count of what the network is asked."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import nn

from ldm.denoiser import Denoiser
from ldm.guidance import autoguided, classifier_free, classifier_guided
from ldm.likelihood import log_likelihood
from ldm.schedule import RectifiedFlow, VariancePreserving

VP = VariancePreserving.scaled_linear()


class Network(nn.Module):
    """Depends on the picture, the clock and the words; counts the pictures it is given."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, sample, timestep, encoder_hidden_states, added_cond_kwargs=None):
        self.batches.append(len(sample))
        words = encoder_hidden_states.mean((1, 2)) + timestep / 1000
        if added_cond_kwargs:
            words = words + added_cond_kwargs["text_embeds"].mean(1)
        return torch.sin(2 * sample + words.view(-1, 1, 1, 1)) * (1 + words.view(-1, 1, 1, 1))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


COND = {"encoder_hidden_states": draw(3, 5, 4, seed=1) + 0.5}
UNCOND = {"encoder_hidden_states": draw(3, 5, 4, seed=2) - 0.5}
X = 3 * draw(3, 2, 6, 6, seed=3)


def outputs(sigma, schedule=VP):
    """The network's own two answers, as a pipeline of diffusers would ask for them."""
    level = torch.full((3,), sigma, dtype=torch.float64)
    scaled, t = schedule.alpha(level).view(3, 1, 1, 1) * X, schedule.timestep(level)
    return tuple(Network()(scaled, t, **context) for context in (UNCOND, COND))


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_guiding_x0_is_guiding_the_output(prediction):
    denoiser = Denoiser(Network(), VP, prediction)
    guided = classifier_free(denoiser, COND, UNCOND, 7.5)(X, 2.0)
    uncond, cond = outputs(2.0)
    torch.testing.assert_close(guided, denoiser.to_sample(X, uncond + 7.5 * (cond - uncond), 2.0))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescaling_is_that_of_diffusers(prediction, rescale):
    denoiser = Denoiser(Network(), VP, prediction)
    guided = classifier_free(denoiser, COND, UNCOND, 5.0, rescale=rescale)(X, 0.8)
    uncond, cond = outputs(0.8)
    wanted = rescale_noise_cfg(uncond + 5.0 * (cond - uncond), cond, guidance_rescale=rescale)
    torch.testing.assert_close(guided, denoiser.to_sample(X, wanted, 0.8))


def test_rescaling_on_x0_would_be_something_else():
    denoiser = Denoiser(Network(), VP, "epsilon")
    x0_uncond, x0_cond = denoiser(X, 0.8, UNCOND), denoiser(X, 0.8, COND)
    on_x0 = rescale_noise_cfg(x0_uncond + 5.0 * (x0_cond - x0_uncond), x0_cond, guidance_rescale=0.7)
    assert not torch.allclose(on_x0, classifier_free(denoiser, COND, UNCOND, 5.0, rescale=0.7)(X, 0.8), atol=1e-2)


def test_both_contexts_go_through_in_one_batch_and_the_null_only_where_it_counts():
    network = Network()
    denoiser = Denoiser(network, VP, "v")
    classifier_free(denoiser, COND, UNCOND, 3.0)(X, 1.0)
    assert network.batches == [6]
    network.batches.clear()
    alone = classifier_free(denoiser, COND, UNCOND, 1.0)(X, 1.0)
    assert network.batches == [3]
    torch.testing.assert_close(alone, denoiser(X, 1.0, COND))
    network.batches.clear()
    limited = classifier_free(denoiser, COND, UNCOND, 3.0, rescale=0.5, interval=(0.1, 8.0))
    for sigma, batch in ((0.05, 3), (0.1, 3), (0.2, 6), (8.0, 6), (8.1, 3), (14.0, 3)):
        for level in (sigma, torch.tensor(sigma, dtype=torch.float64), torch.full((3,), sigma, dtype=torch.float64)):
            network.batches.clear()
            out = limited(X, level)
            assert network.batches == [batch], (sigma, level)
            if batch == 3:
                torch.testing.assert_close(out, denoiser(X, sigma, COND))


def test_levels_inside_and_outside_the_interval_in_one_batch():
    denoiser = Denoiser(Network(), VP, "v")
    sigma = torch.tensor([0.05, 1.0, 10.0], dtype=torch.float64)
    out = classifier_free(denoiser, COND, UNCOND, 3.0, interval=(0.1, 8.0))(X, sigma)
    plain, guided = denoiser(X, sigma, COND), classifier_free(denoiser, COND, UNCOND, 3.0)(X, sigma)
    torch.testing.assert_close(out, torch.stack([plain[0], guided[1], plain[2]]))


def test_guidance_on_the_flow():
    denoiser = Denoiser(Network(), RectifiedFlow(), "velocity")
    guided = classifier_free(denoiser, COND, UNCOND, 4.0, rescale=0.3)(X, 1.5)
    uncond, cond = outputs(1.5, RectifiedFlow())
    wanted = rescale_noise_cfg(uncond + 4.0 * (cond - uncond), cond, guidance_rescale=0.3)
    torch.testing.assert_close(guided, denoiser.to_sample(X, wanted, 1.5))


def test_nested_contexts():
    extra = {"added_cond_kwargs": {"text_embeds": draw(3, 4, seed=5)}}
    null = {"added_cond_kwargs": {"text_embeds": draw(3, 4, seed=6)}}
    denoiser = Denoiser(Network(), VP, "v")
    guided = classifier_free(denoiser, COND | extra, UNCOND | null, 2.0)(X, 1.0)
    expected = 2 * denoiser(X, 1.0, COND | extra) - denoiser(X, 1.0, UNCOND | null)
    torch.testing.assert_close(guided, expected)
    with pytest.raises(ValueError, match=r"same names in both contexts at added_cond_kwargs"):
        classifier_free(denoiser, COND | extra, UNCOND | {"added_cond_kwargs": {}}, 2.0)


def test_bad_calls_say_what_was_got():
    denoiser = Denoiser(Network(), VP, "v")
    long = {"encoder_hidden_states": draw(3, 10, 4)}
    with pytest.raises(ValueError, match=r"one shape: the condition has \(3, 10, 4\), the null \(3, 5, 4\)"):
        classifier_free(denoiser, long, UNCOND, 3.0)
    with pytest.raises(ValueError, match="same names"):
        classifier_free(denoiser, COND | {"encoder_attention_mask": draw(3, 5)}, UNCOND, 3.0)
    with pytest.raises(ValueError, match="rescale should be between 0 and 1"):
        classifier_free(denoiser, COND, UNCOND, 3.0, rescale=1.5)
    with pytest.raises(ValueError, match="low < high"):
        classifier_free(denoiser, COND, UNCOND, 3.0, interval=(8.0, 0.1))


# Classifier guidance, on a mixture of two Gaussians whose classes are its parts

MEANS = torch.tensor([[-1.0, 0.5], [1.5, -0.5]], dtype=torch.float64)
SHARES = torch.tensor([0.3, 0.7], dtype=torch.float64)
VARIANCE = 0.2


def log_parts(x, sigma):
    """log p(y, x; sigma) [B, 2], but for a constant."""
    away = (x[:, None, :, 0, 0] - MEANS).square().sum(2)
    return SHARES.log() - away / (2 * (VARIANCE + sigma**2))


def denoise_part(x, sigma, part):
    mean = MEANS[part].view(1, 2, 1, 1)
    return mean + VARIANCE / (VARIANCE + sigma**2) * (x - mean)


def denoise_all(x, sigma):
    share = log_parts(x, sigma).softmax(1)
    return sum(share[:, k].view(-1, 1, 1, 1) * denoise_part(x, sigma, k) for k in range(2))


@pytest.mark.parametrize("sigma", [0.1, 1.0, 7.0])
def test_classifier_guidance_is_the_conditional_denoiser(sigma):
    x = 2 * draw(16, 2, 1, 1, seed=5)
    for part in range(2):

        def log_probability(place, level, part=part):
            return log_parts(place, level).log_softmax(1)[:, part]

        with torch.inference_mode():  # as somebody may call it
            guided = classifier_guided(denoise_all, log_probability)(x, sigma)
        torch.testing.assert_close(guided, denoise_part(x, sigma, part))
        levels = torch.full((16,), sigma, dtype=torch.float64)
        by_row = classifier_guided(
            lambda x, s: denoise_all(x, sigma), lambda place, s, part=part: log_probability(place, sigma, part)
        )
        torch.testing.assert_close(by_row(x, levels), guided)
        unguided = classifier_guided(denoise_all, log_probability, scale=0.0)(x, sigma)
        torch.testing.assert_close(unguided, denoise_all(x, sigma))


def test_classifier_guidance_at_other_scales_adds_so_much_of_the_gradient():
    """Ho & Salimans (2022), section 3: it is classifier-free guidance with scale 1 + w, where both are exact."""
    x, sigma, scale = 2 * draw(16, 2, 1, 1, seed=6), 0.8, 3.5
    guided = classifier_guided(denoise_all, lambda p, s: log_parts(p, s).log_softmax(1)[:, 0], scale)(x, sigma)
    expected = denoise_all(x, sigma) + scale * (denoise_part(x, sigma, 0) - denoise_all(x, sigma))
    torch.testing.assert_close(guided, expected)


def test_a_guided_denoiser_has_the_likelihood_of_the_conditional() -> None:
    def by_row(function):  # the flow gives each picture a level of its own
        return lambda x, sigma: torch.cat([function(x[i : i + 1], sigma[i]) for i in range(len(x))])

    guided = classifier_guided(by_row(denoise_all), by_row(lambda x, sigma: log_parts(x, sigma).log_softmax(1)[:, 1]))
    x = draw(4, 2, 1, 1, seed=5)
    got = log_likelihood(guided, x, 0.05, 80.0)
    wanted = log_likelihood(by_row(lambda x, sigma: denoise_part(x, sigma, 1)), x, 0.05, 80.0)
    torch.testing.assert_close(got.nats, wanted.nats, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(got.code, wanted.code, rtol=1e-6, atol=1e-5)


def test_scale_0_asks_no_classifier() -> None:
    assert classifier_guided(denoise_all, lambda x, sigma: pytest.fail("asked"), 0.0) is denoise_all


def test_one_level_in_a_list_is_that_of_all_pictures() -> None:
    guided = classifier_free(Denoiser(Network(), VP, "v"), COND, UNCOND, 3.0)
    assert torch.equal(guided(X, torch.tensor([2.0], dtype=torch.float64)), guided(X, 2.0))


@pytest.mark.parametrize("scale", [1.0, 2.0, 3.5])
def test_autoguidance_is_the_score_of_the_powers_product(scale):
    """Two normals: p1^w p0^(1 - w) is a normal too, of precision w P1 + (1 - w) P0, at each noise level."""

    def normal(mean, deviation):
        return lambda x, sigma: (deviation**2 * x + sigma**2 * mean) / (deviation**2 + sigma**2)

    sigma = 0.8
    good, poor = (0.3, 0.5), (-0.2, 1.5)
    precision = [1 / (deviation**2 + sigma**2) for _, deviation in (good, poor)]
    whole = scale * precision[0] + (1 - scale) * precision[1]
    centre = (scale * precision[0] * good[0] + (1 - scale) * precision[1] * poor[0]) / whole
    got = autoguided(normal(*good), normal(*poor), scale)(X, sigma)
    torch.testing.assert_close((got - X) / sigma**2, -whole * (X - centre))
