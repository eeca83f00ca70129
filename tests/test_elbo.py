"""Both forms of the bound against closed forms of Gaussian models, the training loss, scipy, and the bound itself."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.distributions import Normal, kl_divergence

from ldm.denoiser import Denoiser
from ldm.elbo import (
    ancestral_step,
    consistency_elbo,
    elbo,
    gaussian_log_likelihood,
    latent_elbo,
    pixel_log_likelihood,
)
from ldm.forward import transition
from ldm.likelihood import bits_per_dim
from ldm.loss import DiscreteELBO, denoising_loss
from ldm.samplers import ddpm
from ldm.schedule import EDM, VariancePreserving
from vae.autoencoder import Posterior

T = 6
TABLE = VariancePreserving(torch.linspace(0.02, 0.6, T, dtype=torch.float64))
SIGMAS = TABLE.table.tolist()
COPIES = 16_000
FORMS = {"denoising": elbo, "consistency": consistency_elbo}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stream(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def gaussian(mean, std):
    """The denoiser of N(mean, std²)."""
    return lambda x, sigma: mean + std**2 / (std**2 + sigma**2) * (x - mean)


def model_density(step):
    """Mean and variance of x_0 under an affine Gaussian model, followed from p(x_T) down."""
    mean, variance = 0.0, 1 + SIGMAS[-1] ** 2
    for sigma, lower in zip(SIGMAS[::-1], [*SIGMAS[-2::-1], 0.0], strict=True):
        at = [step(torch.tensor([[x]], dtype=torch.float64), sigma, lower) for x in (0.0, 1.0)]
        offset, slope = float(at[0].mean), float(at[1].mean - at[0].mean)
        mean, variance = offset + slope * mean, slope**2 * variance + float(at[0].variance)
    return Normal(mean, math.sqrt(variance))


MODELS = {  # what the data is taken for, and the variance of a step
    "small": ancestral_step(gaussian(0.3, 0.5)),
    "large": ancestral_step(gaussian(-0.2, 0.8), "large"),
    "exact": ancestral_step(gaussian(0.0, 1.0), "large"),
}


def exact_terms(x0, step):
    """The means of the three terms of `elbo` at one value x_0, by the moments of affine functions of a normal."""

    def mean_square(sigma, lower, mean_of_q):  # E (mean of p - mean of q)² over x = x_0 + sigma * eps
        points = torch.tensor([[x0], [x0 + sigma]], dtype=torch.float64)
        at = (step(points, sigma, lower).mean - mean_of_q(points)).flatten().tolist()
        return at[0] ** 2 + (at[1] - at[0]) ** 2

    variance = lambda sigma, lower: float(step(torch.zeros(1, 1, dtype=torch.float64), sigma, lower).variance)  # noqa: E731
    v = variance(SIGMAS[0], 0.0)
    reconstruction = -(math.log(2 * math.pi * v) + mean_square(SIGMAS[0], 0.0, lambda x: x0) / v) / 2
    bar = 1 / (1 + SIGMAS[-1] ** 2)
    prior = (bar * x0**2 + (1 - bar) - 1 - math.log(1 - bar)) / 2
    denoising = 0.0
    for lower, sigma in itertools.pairwise(SIGMAS):
        share = (lower / sigma) ** 2
        ratio = lower**2 * (1 - share) / (v := variance(sigma, lower))
        square = mean_square(sigma, lower, lambda x, share=share: x0 + share * (x - x0))
        denoising += (ratio - 1 - math.log(ratio) + square / v) / 2
    return reconstruction, prior, denoising


def within(samples, mean, errors=4.5):
    standard_error = float(samples.std()) / math.sqrt(len(samples))
    return abs(float(samples.mean()) - mean) <= errors * standard_error + 1e-12


# --- Two forms, one mean ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("value", [0.4, -1.5])
def test_both_forms_have_the_exact_mean_and_the_consistency_form_varies_more(model, value):
    x0, step, totals = torch.full((COPIES, 1), value, dtype=torch.float64), MODELS[model], {}
    for name, form in FORMS.items():
        totals[name] = form(step, x0, TABLE, stream(1), log_likelihood=gaussian_log_likelihood)
    exact = exact_terms(value, step)
    for got, wanted in zip(totals["denoising"], exact, strict=True):
        assert within(got, wanted)
    bound = exact[0] - exact[1] - exact[2]
    assert within(totals["denoising"].total, bound)
    assert within(totals["consistency"].total, bound)
    assert float(totals["consistency"].denoising.var()) > 1.3 * float(totals["denoising"].denoising.var())
    assert float(totals["consistency"].prior.var()) > float(totals["denoising"].prior.var())
    # It bounds the density of the model itself, and reaches it where a step is the true reverse of q.
    density = float(model_density(step).log_prob(torch.tensor(value)))
    if model == "exact":
        assert bound == pytest.approx(density, abs=1e-6)
        assert density == pytest.approx(stats.norm.logpdf(value), abs=1e-6)
    else:
        assert bound < density - 0.005


def test_the_consistency_term_is_no_divergence():
    """Luo's equation 45 writes it as one, of q(x_s | x_r) from p(x_s | x_t): that has another mean."""
    x0, step = torch.full((COPIES, 1), 0.4, dtype=torch.float64), MODELS["small"]
    bound = consistency_elbo(step, x0, TABLE, stream(1), log_likelihood=gaussian_log_likelihood, rows=[3])
    got = bound.denoising / (T - 1)
    noise = stream(2)
    before = x0 + SIGMAS[1] * noise(x0)
    up = transition(before, SIGMAS[1], SIGMAS[2])
    x = up.mean + up.stddev * noise(x0)
    x = x + math.sqrt(SIGMAS[3] ** 2 - SIGMAS[2] ** 2) * noise(x)
    divergence = kl_divergence(up, step(x, SIGMAS[3], SIGMAS[2])).sum(1)
    assert not within(divergence, float(got.mean()), errors=20)


@pytest.mark.parametrize("form", FORMS)
def test_rows_drawn_evenly_estimate_the_sum(form):
    x0, noise = draw(3, 2, 2, 2), draw(3, 2, 2, 2, seed=1)
    options = {"log_likelihood": gaussian_log_likelihood}
    bound = lambda rows: FORMS[form](MODELS["small"], x0, TABLE, lambda x: noise, rows=rows, **options)  # noqa: E731
    whole = bound(None)
    each = [bound([row]).denoising for row in range(1, T)]
    torch.testing.assert_close(sum(each) / (T - 1), whole.denoising)
    torch.testing.assert_close(bound(torch.tensor([2, 4, 4])).denoising, (each[1] + 2 * each[3]) / 3)
    assert torch.equal(bound([1]).reconstruction, whole.reconstruction)
    torch.testing.assert_close(whole.total, whole.reconstruction - whole.prior - whole.denoising)


def test_a_picture_is_the_sum_of_its_values():
    x0, noise = draw(3, 2, 2, 2), draw(3, 2, 2, 2, seed=1)
    for form in FORMS.values():
        options = {"log_likelihood": gaussian_log_likelihood}
        together = form(MODELS["small"], x0, TABLE, lambda x: noise, **options)
        apart = form(MODELS["small"], x0.view(24, 1), TABLE, lambda x: noise.view(24, 1), **options)
        for a, b in zip(together, apart, strict=True):
            torch.testing.assert_close(a, b.view(3, 8).sum(1))


# --- What it shares with training and sampling ------------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)
        with torch.no_grad():
            self.conv.weight.copy_(draw(2, 2, 3, 3, seed=9) / 5)
            self.conv.bias.zero_()

    def forward(self, sample, timestep):
        return torch.sin(self.conv(sample)) + timestep.view(-1, 1, 1, 1) / 10


def test_it_is_the_loss_with_the_elbo_weight():
    """With the small variance, summed over the rows: `DiscreteELBO` on the square error, and what needs no learning."""
    denoiser = Denoiser(Network(), TABLE, "epsilon")
    x0, noise = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1)
    got = elbo(ancestral_step(denoiser), x0, TABLE, lambda x: noise, log_likelihood=gaussian_log_likelihood)
    losses = [
        denoising_loss(denoiser, x0, None, torch.full((3,), s, dtype=torch.float64), noise, DiscreteELBO(TABLE))
        for s in SIGMAS
    ]
    values = x0[0].numel()
    torch.testing.assert_close(got.denoising, values * sum(losses[1:]))
    constant = -values / 2 * math.log(2 * math.pi * SIGMAS[0] ** 2)
    torch.testing.assert_close(got.reconstruction, constant - values * losses[0])
    (-got.total.mean()).backward()
    ours = denoiser.network.conv.weight.grad.clone()
    denoiser.zero_grad()
    (values * sum(losses).mean()).backward()
    torch.testing.assert_close(ours, denoiser.network.conv.weight.grad)


@pytest.mark.parametrize("variance", ["small", "large", lambda x, sigma: torch.sigmoid(x)])
def test_its_steps_are_those_of_ancestral_sampling(variance):
    x, noise = 3 * draw(2, 1, 3, 3), draw(2, 1, 3, 3, seed=1)
    denoise = gaussian(0.3, 0.5)
    for lower, sigma in ((0.1, 0.3), (2.0, 9.0)):
        step = ancestral_step(denoise, variance)(x, sigma, lower)
        sampled = ddpm(denoise, x, [sigma, lower], variance=variance, noise=lambda x: noise)
        torch.testing.assert_close(step.mean + step.stddev * noise, sampled)
    end = ancestral_step(denoise, variance)(x, 0.3, 0.0)
    torch.testing.assert_close(end.mean, denoise(x, 0.3))
    beta = 0.09 / 1.09
    assert float(end.variance.max()) == pytest.approx(beta if variance == "large" else 0.09)


def test_single_precision_is_enough():
    """A thousand rows of float32 arithmetic against float64, on pixels."""
    schedule, pixels = VariancePreserving.linear(), torch.randint(0, 256, (2, 1, 4, 4), generator=torch.manual_seed(0))
    rows, noise = range(1, 1000, 37), draw(2, 1, 4, 4, seed=1)
    bits = []
    for dtype in (torch.float64, torch.float32):
        x0 = pixels.to(dtype) / 127.5 - 1
        step = ancestral_step(gaussian(0.0, 0.57), "large")
        bits.append(bits_per_dim(elbo(step, x0, schedule, lambda x: noise.to(x), rows=rows).total, 16))
        assert bits[-1].dtype == dtype
    torch.testing.assert_close(bits[1].double(), bits[0], rtol=1e-4, atol=1e-4)
    assert bool((bits[0] > 0).all())


# --- Pixels -----------------------------------------------------------------------------------------------------------


LEVELS = torch.arange(256, dtype=torch.float64).view(256, 1) / 127.5 - 1


@pytest.mark.parametrize(("mean", "std"), [(0.1, 0.01), (-0.97, 0.05), (3.0, 0.2), (0.99, 1e-4), (0.0, 0.7)])
def test_pixels_have_the_probability_of_their_level(mean, std):
    got = pixel_log_likelihood(LEVELS, Normal(torch.full((256, 1), mean, dtype=torch.float64), std))
    assert float(got.exp().sum()) == pytest.approx(1, abs=1e-9)
    low = np.where(np.arange(256) == 0, -np.inf, LEVELS[:, 0].numpy() - 1 / 255)
    high = np.where(np.arange(256) == 255, np.inf, LEVELS[:, 0].numpy() + 1 / 255)
    from_below = stats.norm.cdf(high, mean, std) - stats.norm.cdf(low, mean, std)
    from_above = stats.norm.sf(low, mean, std) - stats.norm.sf(high, mean, std)
    mass = np.where(low > mean, from_above, from_below)  # in its own tail each keeps its digits
    seen = mass > 1e-280
    np.testing.assert_allclose(got.numpy()[seen], np.log(mass[seen]), rtol=1e-6, atol=1e-9)
    assert bool(got.isfinite().all())


def test_pixels_far_from_the_mean_keep_a_gradient():
    mean = torch.full((256, 1), 0.5, requires_grad=True)
    std = torch.full((256, 1), 0.01, requires_grad=True)
    got = pixel_log_likelihood(LEVELS.float(), Normal(mean, std))
    got.sum().backward()
    assert bool(got.isfinite().all() and mean.grad.isfinite().all() and std.grad.isfinite().all())
    assert float(got.detach().min()) < -1000
    assert bool((mean.grad[:150] < 0).all())  # the mean is pulled down to pixels below it
    assert bool((mean.grad[200:] > 0).all())


def test_a_batch_of_pictures_is_summed_one_by_one():
    x0 = LEVELS[[3, 100, 255, 0]].view(2, 1, 2, 1)
    normal = Normal(torch.zeros_like(x0) + 0.1, 0.3)
    each = pixel_log_likelihood(LEVELS, Normal(torch.full_like(LEVELS, 0.1), 0.3))
    expected = torch.stack([each[3] + each[100], each[255] + each[0]])
    torch.testing.assert_close(pixel_log_likelihood(x0, normal), expected)


# --- Latents ----------------------------------------------------------------------------------------------------------


def posterior_of(mean, logvar):
    return Posterior(mean, logvar)


def test_under_a_unit_normal_prior_it_is_the_vaes_own_elbo():
    posterior = posterior_of(draw(3, 2, 2, 2), draw(3, 2, 2, 2, seed=1))
    reconstruction = draw(3, seed=2)
    z2 = posterior.mean**2 + posterior.logvar.exp()  # the mean of z² under the posterior
    prior = -(z2 + math.log(2 * math.pi)).flatten(1).sum(1) / 2
    torch.testing.assert_close(latent_elbo(reconstruction, prior, posterior), reconstruction - posterior.kl())


def test_around_exact_parts_it_is_the_likelihood():
    """z ~ N(0.3, 0.5²), x = 2 z + 0.4 eps and the true posterior: log p(x | z) + log p(z) - log q(z | x) = log p(x)."""
    x, slope, spread, mean, std = 1.1, 2.0, 0.4, 0.3, 0.5
    precision = 1 / std**2 + slope**2 / spread**2
    posterior = posterior_of(
        torch.full((4, 1), (mean / std**2 + slope * x / spread**2) / precision, dtype=torch.float64),
        torch.full((4, 1), -math.log(precision), dtype=torch.float64),
    )
    z = posterior.sample(draw(4, 1))
    reconstruction = stats.norm.logpdf(x, slope * z.numpy(), spread).sum(1)
    prior = stats.norm.logpdf(z.numpy(), mean, std).sum(1)
    bound = latent_elbo(torch.from_numpy(reconstruction), torch.from_numpy(prior), posterior)
    exact = stats.norm.logpdf(x, slope * mean, math.hypot(slope * std, spread))
    assert float(bound.mean()) < exact + 2  # each draw carries log q(z) less its mean
    entropy = -stats.norm.logpdf(z.numpy(), posterior.mean.numpy(), (posterior.logvar / 2).exp().numpy()).sum(1)
    expected = reconstruction + prior + entropy
    np.testing.assert_allclose(expected, exact)
    shift = entropy - 0.5 * (1 + math.log(2 * math.pi) - math.log(precision))
    np.testing.assert_allclose(bound.numpy(), expected - shift)


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_bad_calls_say_what_was_got(form):
    step, x0, bound = MODELS["small"], torch.zeros(2, 1, 2, 2), FORMS[form]
    options = {"log_likelihood": gaussian_log_likelihood}
    with pytest.raises(ValueError, match="rows of a beta table; got EDM"):
        bound(step, x0, EDM(1.0), torch.zeros_like)
    for rows in ([], [0], [T], [1, -1]):
        with pytest.raises(ValueError, match="rows should be some of 1 to 5; got"):
            bound(step, x0, TABLE, torch.zeros_like, rows=rows, **options)
    with pytest.raises(ValueError, match=r"got values off by 0\.5 of a level.*gaussian_log_likelihood"):
        bound(step, x0, TABLE, torch.zeros_like)
    with pytest.raises(ValueError, match="small or large, or a function; got 'learned'"):
        ancestral_step(gaussian(0, 1), "learned")
    with pytest.raises(ValueError, match="deterministic"):
        latent_elbo(draw(2), draw(2), posterior_of(draw(2, 1), torch.full((2, 1), -math.inf)))
