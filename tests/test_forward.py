"""The forward process against the seeds' formulas, Bayes' rule and diffusers; the two SDEs against exact moments."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from ldm.forward import (
    forward_sde,
    in_paper_units,
    large_variance,
    marginal,
    posterior,
    posterior_variance,
    reverse_sde,
    transition,
)
from ldm.schedule import EDM, RectifiedFlow, VariancePreserving, step_grid
from tests.sampling import Mixture, moments

VP, FLOW = VariancePreserving.linear(), RectifiedFlow()
BETAS = VP.betas.double()
BARS = torch.cumprod(1 - BETAS, 0)
LEVELS = ((1 - BARS) / BARS).sqrt().tolist()  # as the schedule's table, but not rounded to float32
ROWS = (1, 2, 17, 500, 999)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(normal, mean, variance):
    torch.testing.assert_close(normal.mean, mean.expand_as(normal.mean), rtol=1e-9, atol=1e-9)
    variance = torch.as_tensor(variance, dtype=torch.float64).expand_as(normal.variance)
    torch.testing.assert_close(normal.variance, variance, rtol=1e-9, atol=0)


# --- Closed forms -----------------------------------------------------------------------------------------------------


def test_the_chain_step_by_step_has_the_moments_of_the_closed_form():
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps, from its own recursion of mean and variance."""
    x0, factor, variance = draw(1, 2, 2, 2), 1.0, 0.0
    for row, beta in enumerate(BETAS.tolist()):
        factor, variance = math.sqrt(1 - beta) * factor, (1 - beta) * variance + beta
        if row in ROWS:
            sigma = LEVELS[row]
            close(
                in_paper_units(marginal(x0, sigma), VP.alpha(torch.tensor(sigma, dtype=torch.float64))),
                factor * x0,
                variance,
            )


@pytest.mark.parametrize("row", ROWS)
def test_one_step_and_the_posterior_are_the_papers(row):
    sigma, lower = LEVELS[row], LEVELS[row - 1]
    alpha, alpha_lower = VP.alpha(torch.tensor([sigma, lower], dtype=torch.float64))
    a_t, bar, bar_before = 1 - BETAS[row], BARS[row], BARS[row - 1]
    x_s, x_t, x0 = draw(3, 2, 2, 2, seed=1), draw(3, 2, 2, 2, seed=2), draw(3, 2, 2, 2)
    close(in_paper_units(transition(x_s / alpha_lower, lower, sigma), alpha), a_t.sqrt() * x_s, 1 - a_t)
    mean = (a_t.sqrt() * (1 - bar_before) * x_t + bar_before.sqrt() * (1 - a_t) * x0) / (1 - bar)
    variance = (1 - a_t) * (1 - bar_before) / (1 - bar)
    close(in_paper_units(posterior(x_t / alpha, x0, sigma, lower), alpha_lower), mean, variance)


def test_the_posterior_obeys_bayes_rule():
    x0, x_s, x_t = draw(4, 1, 2, 2), draw(4, 1, 2, 2, seed=1), draw(4, 1, 2, 2, seed=2)
    for sigma, lower in ((0.3, 0.1), (5.0, 0.1), (80.0, 79.0)):
        joint = marginal(x0, lower).log_prob(x_s) + transition(x_s, lower, sigma).log_prob(x_t)
        conditional = joint - marginal(x0, sigma).log_prob(x_t)
        torch.testing.assert_close(posterior(x_t, x0, sigma, lower).log_prob(x_s), conditional, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("row", [1, 30, 999])
def test_noising_and_variances_are_those_of_diffusers(row):
    x0, eps = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    sigma, lower = VP.table[row], VP.table[row - 1]
    noised = in_paper_units(marginal(x0, sigma), VP.alpha(sigma))
    theirs = DDPMScheduler().add_noise(x0, eps, torch.tensor([row, row]))
    torch.testing.assert_close(noised.mean + noised.stddev * eps, theirs, rtol=1e-5, atol=1e-6)
    scale = VP.alpha(lower) ** 2
    small = DDPMScheduler(variance_type="fixed_small")._get_variance(row)
    large = DDPMScheduler(variance_type="fixed_large")._get_variance(row)
    # theirs subtracts float32 products that are nearly 1
    torch.testing.assert_close(scale * posterior_variance(sigma, lower), small.double(), rtol=2e-3, atol=0)
    torch.testing.assert_close(scale * large_variance(sigma, lower), large.double(), rtol=2e-3, atol=0)


def test_a_level_for_each_picture_is_each_picture_at_its_level():
    x, x0 = draw(3, 1, 2, 2), draw(3, 1, 2, 2, seed=1).float()
    sigma = torch.tensor([0.5, 2.0, 40.0], dtype=torch.float64)
    for function, arguments in (
        (marginal, (x0, sigma)),
        (transition, (x0, sigma / 3, sigma)),
        (posterior, (x.float(), x0, sigma, sigma / 3)),
    ):
        together = function(*arguments)
        assert together.mean.dtype == together.stddev.dtype == torch.float32
        for i in range(3):
            alone = function(*(a[i : i + 1] if a.ndim > 1 else float(a[i]) for a in arguments))
            torch.testing.assert_close(together.mean[i], alone.mean[0])
            torch.testing.assert_close(together.stddev[i], alone.stddev[0])


def test_at_level_0_there_is_no_noise():
    x0 = draw(2, 1, 2, 2)
    assert torch.equal(marginal(x0, 0.0).stddev, torch.zeros_like(x0))
    end = posterior(x0 + 3.0, x0, 3.0, 0.0)
    assert torch.equal(end.mean, x0)
    assert torch.equal(end.stddev, torch.zeros_like(x0))


# --- Stochastic differential equations --------------------------------------------------------------------------------


TOP, BOTTOM = 20.0, 0.05
UNITS = {"x": torch.ones_like, "variance_preserving": VP.alpha, "flow": FLOW.alpha, "edm": EDM(0.5).alpha}


def levels(steps):
    return step_grid(EDM(1.0, BOTTOM, TOP), steps + 1, "exponential")[:-1]


def orders(errors):
    return [math.log2(a / b) for a, b in itertools.pairwise(map(abs, errors))]


@pytest.mark.parametrize("units", UNITS)
def test_the_forward_sde_converges_to_the_closed_form_with_order_1(units):
    """Mean and variance are exact for a linear equation: from its response to each of the numbers drawn."""
    means, variances = [], []
    for steps in (20, 40, 80, 160):
        sampler = lambda denoise, x, sigmas, noise: forward_sde(x, sigmas, noise, alpha=UNITS[units])  # noqa: E731
        sigmas = levels(steps).flip(0)
        _, variance = moments(sampler, None, sigmas, 0.0)
        means.append(float(forward_sde(torch.ones(1, 1), sigmas, torch.zeros_like, alpha=UNITS[units])) - 1)
        variances.append(variance / (TOP**2 - BOTTOM**2) - 1)
    assert orders(variances)[-1] == pytest.approx(1, abs=0.1), variances
    if units == "x":
        assert means == [0, 0, 0, 0]
    else:
        assert orders(means)[-1] == pytest.approx(1, abs=0.1), means
    assert abs(variances[-1]) < 0.1


@pytest.mark.parametrize("s", [0.3, 1.0])
@pytest.mark.parametrize("units", UNITS)
def test_the_reverse_sde_converges_to_the_data_with_order_1(units, s):
    errors = []
    for steps in (40, 80, 160, 320):
        sampler = lambda denoise, x, sigmas, noise: reverse_sde(denoise, x, sigmas, noise=noise, alpha=UNITS[units])  # noqa: E731
        _, variance = moments(sampler, lambda x, sigma: s**2 / (s**2 + sigma**2) * x, levels(steps), s**2 + TOP**2)
        errors.append(variance / (s**2 + BOTTOM**2) - 1)
    assert orders(errors)[-1] == pytest.approx(1, abs=0.15), errors
    assert abs(errors[-1]) < 0.06


def test_its_step_is_the_papers_in_the_papers_units():
    """dx_t = -beta/2 x_t dt + sqrt(beta) dw, beta dt = d log(1 + sigma²); on the flow f = -1/(1-t), g² = 2t/(1-t)."""
    x, z, sigma, higher = draw(2, 3), draw(2, 3, seed=1), 1.3, 1.4
    alpha = VP.alpha(torch.tensor([sigma, higher], dtype=torch.float64))
    beta = 2 * sigma / (1 + sigma**2) * (higher - sigma)
    expected = (1 - beta / 2) * (alpha[0] * x) + math.sqrt(beta) * z
    got = alpha[1] * forward_sde(x, [sigma, higher], lambda x: z, alpha=VP.alpha)
    torch.testing.assert_close(got, expected)
    t, after = (float(FLOW.timestep(level)) for level in (sigma, higher))
    dt = (1 - t) ** 2 * (higher - sigma)  # dt/dsigma is (1 - t)²: the level is the time of a step
    expected = (1 - dt / (1 - t)) * ((1 - t) * x) + math.sqrt(2 * t / (1 - t) * dt) * z
    got = (1 - after) * forward_sde(x, [sigma, higher], lambda x: z, alpha=FLOW.alpha)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_the_reverse_step_is_the_forward_step_less_the_score():
    data, x, z, sigma, lower = Mixture(), 2 * draw(3, 1, 1, 1), draw(3, 1, 1, 1, seed=1), 1.3, 1.2
    a = VP.alpha(torch.tensor([sigma, lower], dtype=torch.float64))
    score = torch.func.grad(  # of x_t, by differentiating the density of the mixture itself
        lambda x_t: (
            sum(
                w * torch.exp(-((x_t / a[0] - m) ** 2) / (2 * (s**2 + sigma**2))) / math.hypot(s, sigma)
                for w, m, s in zip(data.weights, data.means, data.stds, strict=True)
            )
            .log()
            .sum()
        )
    )(a[0] * x)
    beta = 2 * sigma / (1 + sigma**2) * (sigma - lower)
    expected = a[0] * x + beta / 2 * (a[0] * x) + beta * score + math.sqrt(beta) * z
    got = a[1] * reverse_sde(data.denoise, x, [sigma, lower], noise=lambda x: z, alpha=VP.alpha)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("units", ["x", "variance_preserving"])
def test_the_reverse_sde_reaches_the_mixture(units):
    data, number = Mixture(), 16_000
    start = data.quantiles((np.arange(400) + 0.5) / 400, 80.0).repeat(number // 400, 1, 1, 1)
    errors = []
    for steps in (16, 256):
        generator = torch.Generator().manual_seed(steps)
        noise = lambda x, g=generator: torch.randn(x.shape, generator=g, dtype=x.dtype)  # noqa: E731
        sigmas = step_grid(EDM(1.0, 0.01), steps + 1, "karras")[:-1]
        got = reverse_sde(data.denoise, start, sigmas, noise=noise, alpha=UNITS[units])
        reached = data.cdf(np.sort(got.flatten().numpy()), 0.01) - (np.arange(number) + 0.5) / number
        errors.append(float(np.abs(reached).max()))  # Kolmogorov's distance; chance alone gives 0.01
    assert errors[1] < 0.02 < errors[0], errors


def test_bad_levels_are_refused():
    x = draw(1, 1, 1, 1)
    for sigmas in ([1.0], [2.0, 1.0], [0.0, 0.0], [-1.0, 1.0], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="increase from 0 or above"):
            forward_sde(x, sigmas, torch.zeros_like)
    with pytest.raises(ValueError, match="sigmas should be at least two and decrease"):
        reverse_sde(lambda x, sigma: x, x, [1.0, 2.0], noise=torch.zeros_like)
    with pytest.raises(ValueError, match="give noise="):
        reverse_sde(lambda x, sigma: x, x, [2.0, 1.0])


def test_the_reverse_sde_has_the_call_of_the_samplers():
    data, seen = Mixture(), []
    sigmas = step_grid(EDM(1.0), 9, "karras")
    noise = lambda x: draw(*x.shape)  # noqa: E731
    out = reverse_sde(
        data.denoise, 80 * draw(2, 1, 2, 2), sigmas, noise=noise, callback=lambda *step: seen.append(step)
    )
    assert [(i, sigma) for i, sigma, *_ in seen] == list(enumerate(sigmas[:-1].tolist()))
    for _, sigma, x, x0 in seen:
        torch.testing.assert_close(x0, data.denoise(x, sigma))
    assert torch.equal(out, seen[-1][3])
