"""Langevin samplers: against their papers' algorithms and diffusers, and on mixtures whose marginals are known."""

import math

import numpy as np
import pytest
import torch
from diffusers import ScoreSdeVeScheduler

from ldm.denoiser import score_from
from ldm.langevin import langevin, predictor_corrector
from ldm.samplers import ddpm
from ldm.schedule import EDM, step_grid
from tests.sampling import Mixture, draw


def geometric(top, bottom, levels):
    return step_grid(EDM(1.0, bottom, top), levels, "exponential")


def fresh(seed):
    """Noise in double precision."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def stream(noises):
    """Noise from a list, each used once."""
    rest = iter(noises)
    return lambda x: next(rest)


class Modes:
    """Two far modes in the plane of unequal weights, as in arXiv:1907.05600, figure 3."""

    weights = torch.tensor([0.2, 0.8], dtype=torch.float64)
    means = torch.tensor([[-5.0, -5.0], [5.0, 5.0]], dtype=torch.float64)

    def denoise(self, x, sigma):
        """x: [N, 2, 1, 1]; every mode has unit variance."""
        variance, away = 1 + sigma**2, x.flatten(1)[:, None] - self.means
        share = torch.softmax(self.weights.log() - (away**2).sum(-1) / (2 * variance), 1)
        return (share[..., None] * (self.means + away / variance)).sum(1).view_as(x)

    def share_of_second(self, x):
        return float((x.sum(1) > 0).double().mean())


# --- Annealed Langevin dynamics ---------------------------------------------------------------------------------------


def algorithm_1(score, x, levels, epsilon, updates, noises):
    """arXiv:1907.05600, line by line, in numpy; levels: sigma_1 to sigma_L."""
    noises = iter(noises)
    for level in levels:
        alpha = epsilon * level**2 / levels[-1] ** 2
        for _ in range(updates):
            z = next(noises)
            x = x + alpha / 2 * score(x, level) + np.sqrt(alpha) * z
    return x


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_langevin_is_the_papers_algorithm(final):
    data, x = Mixture(), 20 * draw(3, 1, 2, 2)
    sigmas = [20.0, 7.0, 2.0, 0.3, final]
    levels = [sigma for sigma in sigmas[1:] if sigma > 0]
    noises = [draw(3, 1, 2, 2, seed=i) for i in range(5 * len(levels))]

    def score(x, sigma):
        x = torch.from_numpy(x)
        return score_from(x, data.denoise(x, sigma), sigma).numpy()

    epsilon = 0.15 * levels[-1] ** 2
    wanted = torch.from_numpy(algorithm_1(score, x.numpy(), levels, epsilon, 5, [n.numpy() for n in noises]))
    if final == 0:  # ours ends with the estimate of x_0
        wanted = data.denoise(wanted, levels[-1])
    got = langevin(data.denoise, x, sigmas, step_size=0.15, updates=5, noise=stream(noises))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_annealing_finds_the_weights_of_far_modes_where_plain_langevin_does_not():
    data, noise = Modes(), fresh(0)
    start = 16 * torch.rand(2000, 2, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 8
    plain = langevin(data.denoise, start, [8.0, 0.1, 0.0], updates=600, noise=noise)
    assert data.share_of_second(plain) == pytest.approx(0.5, abs=0.05)  # that of the start
    annealed = langevin(data.denoise, 20 * noise(start), geometric(20, 0.1, 20), updates=30, noise=noise)
    assert data.share_of_second(annealed) == pytest.approx(0.8, abs=0.04)  # chance alone: 0.009
    second = annealed[annealed.sum(1).flatten() > 0].flatten(1)
    torch.testing.assert_close(second.mean(0), data.means[1], rtol=0, atol=0.1)
    assert second.std(0).tolist() == pytest.approx([1, 1], abs=0.08)


def test_langevin_leaves_the_variance_that_its_step_size_says():
    """On data in one point x is linear in the draws; row k draws a single 1, at update k: exact."""
    updates, sigma, step = 120, 0.7, 0.3
    point = lambda x, sigma: torch.full_like(x, 0.4)  # noqa: E731
    noises = torch.eye(updates, dtype=torch.float64).view(updates, updates, 1, 1, 1)
    x = torch.full((updates, 1, 1, 1), 0.4, dtype=torch.float64)
    out = langevin(point, x, [2.0, sigma], step_size=step, updates=updates, noise=stream(noises))
    variance = float(((out - 0.4) ** 2).sum())
    assert variance == pytest.approx(sigma**2 / (1 - step / 4), rel=1e-9)


def test_from_pure_noise_few_updates_are_enough():
    """Langevin alone would carry less than a third of the way from 4096 to 80 in ten updates."""
    x = 4096 * draw(1, 1, 64, 64)
    out = langevin(lambda x, sigma: x / (1 + sigma**2), x, [4096.0, 80.0], updates=10, noise=fresh(1))
    assert float(out.std()) == pytest.approx(80, rel=0.05)


# --- Predictor and corrector ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corrections", [0, 1, 2])
def test_predictor_corrector_is_that_of_diffusers(corrections):
    """Of one picture: theirs averages the norms of a batch, ours keeps pictures apart."""
    data, levels = Mixture(), 12
    x = 50 * draw(1, 1, 6, 6, dtype=torch.float32)
    scheduler = ScoreSdeVeScheduler(snr=0.16)
    scheduler.set_timesteps(levels)
    scheduler.set_sigmas(levels, sigma_min=0.05, sigma_max=50.0)
    sigmas = torch.cat([scheduler.discrete_sigmas.flip(0), torch.zeros(1)])

    def score(x, i):
        return score_from(x, data.denoise(x, float(sigmas[i])), float(sigmas[i]))

    generator, expected = torch.Generator().manual_seed(3), x
    for i in range(levels):
        t = (levels - i - 0.5) / (levels - 1)  # the middle of row levels - 1 - i
        predicted = scheduler.step_pred(score(expected, i), t, expected, generator=generator)
        expected = predicted.prev_sample if i < levels - 1 else predicted.prev_sample_mean
        for _ in range(corrections if i < levels - 1 else 0):
            expected = scheduler.step_correct(score(expected, i + 1), expected, generator=generator).prev_sample
    drawer = torch.Generator().manual_seed(3)
    noise = lambda x: torch.randn(x.shape, generator=drawer)  # noqa: E731
    got = predictor_corrector(data.denoise, x, sigmas, corrections=corrections, noise=noise)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_ancestral_predictor_alone_is_ddpms():
    data, x, sigmas = Mixture(), 20 * draw(2, 1, 3, 3), geometric(20, 0.05, 9)
    noises = [draw(2, 1, 3, 3, seed=i) for i in range(9)]
    got = predictor_corrector(data.denoise, x, sigmas, ancestral=True, corrections=0, noise=stream(noises))
    torch.testing.assert_close(got, ddpm(data.denoise, x, sigmas, noise=stream(noises)))


def distance(data, x):
    """Kolmogorov's distance of the numbers in x from the mixture; by chance about 0.9 / sqrt(their number)."""
    ordered = np.sort(x.flatten().numpy())
    return float(np.abs(data.cdf(ordered, 0.0) - (np.arange(len(ordered)) + 0.5) / len(ordered)).max())


@pytest.mark.parametrize("ancestral", [False, True])
def test_corrections_bring_the_marginal_closer(ancestral):
    """Pictures of independent pixels from a mixture: correcting helps at equal steps, more steps help as well."""
    data, shape = Mixture(), (8, 1, 32, 32)
    number, options = math.prod(shape), {"ancestral": ancestral, "noise": fresh(1)}
    quantiles = data.quantiles((np.arange(number) + 0.5) / number, 20.0)
    start = quantiles[torch.randperm(number, generator=torch.Generator().manual_seed(1))].view(shape)

    def off(steps, corrections):
        sigmas = geometric(20, 0.02, steps)
        return distance(data, predictor_corrector(data.denoise, start, sigmas, corrections=corrections, **options))

    alone, corrected, longer = off(20, 0), off(20, 4), off(60, 1)
    assert alone > 0.03
    assert corrected < 0.02
    assert longer < 0.02


@pytest.mark.parametrize("ancestral", [False, True])
def test_reverse_diffusion_does_not_keep_pure_noise(ancestral):
    x = 4096 * draw(1, 1, 64, 64)
    normal = lambda x, sigma: x / (1 + sigma**2)  # noqa: E731
    out = predictor_corrector(normal, x, [4096.0, 80.0], ancestral=ancestral, noise=fresh(1))
    assert float(out.std()) == pytest.approx(80, rel=0.05)


def test_bad_arguments_say_what_was_got():
    data, x, sigmas = Mixture(), draw(1, 1, 2, 2), [2.0, 1.0, 0.0]
    for wrong in ({"step_size": 0.0}, {"step_size": 2.0}, {"updates": 0}):
        with pytest.raises(ValueError, match="langevin needs 0 < step_size < 2 and updates of at least 1"):
            langevin(data.denoise, x, sigmas, **wrong)
    for wrong in ({"snr": 0.0}, {"corrections": -1}):
        with pytest.raises(ValueError, match="needs snr > 0 and corrections of at least 0"):
            predictor_corrector(data.denoise, x, sigmas, **wrong)
