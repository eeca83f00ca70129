"""The loss: quantile functions against torch and scipy, weights against the identities that name them."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from scipy import stats
from torch import nn
from torch.nn.functional import mse_loss

from ldm.denoiser import Denoiser
from ldm.loss import (
    NOISES,
    WEIGHTS,
    X0,
    ContinuousELBO,
    Debiased,
    DiscreteELBO,
    EDMWeight,
    LogitNormal,
    LogNormal,
    MinSNR,
    Plain,
    SoftMinSNR,
    UniformTime,
    denoising_loss,
    training_noise,
    training_weight,
)
from ldm.schedule import EDM, SIGMA_INFINITY, RectifiedFlow, VariancePreserving

VP, FLOW = VariancePreserving.scaled_linear(), RectifiedFlow()
U = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Network(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1, dtype=dtype)
        with torch.no_grad():
            self.conv.weight.copy_(draw(2, 2, 3, 3, seed=9) / 5)
            self.conv.bias.copy_(draw(2, seed=8) / 5)

    def forward(self, sample, timestep, shift=None):
        out = torch.sin(self.conv(sample)) + timestep.view(-1, 1, 1, 1).to(sample.dtype) / 1000
        return out if shift is None else out + shift


# --- Training noise ---------------------------------------------------------------------------------------------------


def test_log_normal_quantiles_are_scipys():
    sigma = LogNormal(-0.4, 1.3).sigma(U)
    torch.testing.assert_close(sigma, torch.from_numpy(stats.lognorm.ppf(U.numpy(), s=1.3, scale=math.exp(-0.4))))
    theirs = torch.distributions.LogNormal(-0.4, 1.3).icdf(U.float())
    torch.testing.assert_close(LogNormal(-0.4, 1.3).sigma(U.float()), theirs, rtol=1e-4, atol=0)


def test_logit_normal_time_is_log_normal_sigma():
    sigma = LogitNormal(0.3, 0.9, FLOW).sigma(U)
    normal = torch.distributions.Normal(torch.tensor(0.3).double(), torch.tensor(0.9).double())
    t = torch.distributions.TransformedDistribution(normal, torch.distributions.SigmoidTransform()).icdf(U)
    torch.testing.assert_close(FLOW.timestep(sigma), t)
    assert LogitNormal() == LogitNormal(0.0, 1.0)
    assert LogNormal() == LogNormal(-1.2, 1.2)


def test_uniform_time_draws_every_row_equally_often():
    sigma = UniformTime(VP).sigma(U)
    torch.testing.assert_close(sigma, VP.table.repeat_interleave(4))
    torch.testing.assert_close(FLOW.timestep(UniformTime(FLOW).sigma(U[100:-100])), U[100:-100])
    edm = EDM(0.5, 0.01, 10.0)
    expected = stats.loguniform.ppf(U.numpy(), 0.01, 10.0)
    torch.testing.assert_close(UniformTime(edm).sigma(U), torch.from_numpy(expected))


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("schedule", [VP, VP.zero_terminal_snr(), FLOW, EDM(0.5)], ids=["vp", "zero", "flow", "edm"])
def test_draws_are_pure_finite_and_where_the_clock_tells_levels_apart(name, schedule):
    noise = training_noise(name, schedule)
    u = torch.tensor([0.0, 1e-9, 0.2, 0.5, 0.999, 1.0])  # a generator may give 0, and rounding 1
    sigma = noise.sigma(u)
    assert torch.equal(sigma, noise.sigma(u.clone()))
    assert sigma.dtype == torch.float32
    assert bool((sigma > 0).all() and sigma.isfinite().all() and (sigma.diff() >= 0).all())
    if not isinstance(schedule, EDM):
        # rounding of 1e-4 in the lowest level: float32 against the double that it is compared with
        assert bool(((sigma >= schedule.sigma_min * 0.9999) & (sigma <= schedule.sigma_max)).all())
    assert torch.isfinite(schedule.timestep(sigma)).all()


@pytest.mark.parametrize(
    "noise",
    [LogNormal(-0.4, 1.3), LogitNormal(0.2, 0.8), UniformTime(FLOW), UniformTime(EDM(1.0))],
    ids=["log_normal", "logit_normal", "flow", "edm"],
)
def test_densities_are_the_derivatives_of_the_quantile_functions(noise):
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    slope = (noise.sigma(u + 1e-6).log() - noise.sigma(u - 1e-6).log()) / 2e-6
    torch.testing.assert_close(noise.density(noise.sigma(u)), 1 / slope, rtol=1e-6, atol=0)


# --- Weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "prediction", "d"),
    [(VP, "epsilon", 1.0), (VP, "v", 1.0), (VP, "sample", 1.0), (FLOW, "velocity", 1.0), (EDM(0.5), "edm", 0.5)],
)
def test_the_plain_weight_is_plain_mse_on_the_networks_output(schedule, prediction, d):
    denoiser = Denoiser(Network(), schedule, prediction, d)
    x0, noise = d * draw(4, 2, 5, 5), draw(4, 2, 5, 5, seed=1)
    sigma = torch.tensor([0.05, 0.5, 2.0, 13.0], dtype=torch.float64)
    loss = denoising_loss(denoiser, x0, None, sigma, noise, Plain(denoiser))
    x = x0 + sigma.view(4, 1, 1, 1) * noise
    output = denoiser.network(schedule.alpha(sigma).view(4, 1, 1, 1) * x, schedule.timestep(sigma))
    square = (output - denoiser.network_target(x0, noise, sigma)) ** 2
    torch.testing.assert_close(loss, square.mean((1, 2, 3)))
    ours = torch.autograd.grad(loss.mean(), denoiser.network.conv.weight)[0]
    theirs = torch.autograd.grad(square.mean(), denoiser.network.conv.weight)[0]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_min_snr_is_the_formula_of_diffusers_training_examples(prediction):
    """There: min(snr, gamma) over snr for epsilon and over snr + 1 for v, on the error of the network's output."""
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    timesteps = torch.tensor([0, 10, 300, 999])
    x0, noise = draw(4, 2, 5, 5), draw(4, 2, 5, 5, seed=1)
    network = Network()
    noisy = scheduler.add_noise(x0, noise, timesteps)
    target = noise if prediction == "epsilon" else scheduler.get_velocity(x0, noise, timesteps)
    error = mse_loss(network(noisy, timesteps), target, reduction="none").mean((1, 2, 3))
    snr = compute_snr(scheduler, timesteps)
    expected = error * snr.clamp(max=5.0) / (snr if prediction == "epsilon" else snr + 1)
    denoiser = Denoiser(network, VP, prediction)
    loss = denoising_loss(denoiser, x0, {}, VP.table[timesteps], noise, MinSNR(5.0))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-7)


def test_edm_weight_is_the_plain_one_of_edms_prediction():
    sigma = torch.logspace(-2, 2, 20, dtype=torch.float64)
    plain = Plain(Denoiser(Network(), EDM(0.5), "edm", 0.5))(sigma)
    torch.testing.assert_close(EDMWeight(0.5)(sigma), plain)


def test_x0_weight_is_the_plain_one_of_sample_prediction():
    sigma = torch.tensor([0.1, 4.0])
    assert torch.equal(X0()(sigma), Plain(Denoiser(Network(), VP, "sample"))(sigma))


def test_discrete_elbo_weights_are_the_halved_falls_of_the_signal_to_noise_ratio():
    snr = VP.alphas_cumprod / (1 - VP.alphas_cumprod)
    weight = DiscreteELBO(VP)(VP.table)
    torch.testing.assert_close(weight[1:], (snr[:-1] - snr[1:]) / 2, rtol=1e-4, atol=0)
    torch.testing.assert_close(weight.sum() * 2, 2 * snr[0] - snr[-1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("entries", [100, 1000, 10000])
def test_the_discrete_bound_of_an_exact_denoiser_comes_down_to_the_entropy(entries):
    """Data N(0, 1): the mean square error of E[x_0 | x] is sigma² / (1 + sigma²), the entropy log(2 pi e) / 2."""
    levels = torch.logspace(-2, 2, entries, dtype=torch.float64)
    schedule = VariancePreserving.from_alphas_cumprod(1 / (1 + levels**2))
    error = schedule.table**2 / (1 + schedule.table**2)
    terms = float((DiscreteELBO(schedule)(schedule.table) * error).sum())
    low, high = schedule.table[0], schedule.table[-1]
    prior = float(torch.log1p(high**-2) / 2)  # KL of the last row's N(0, 1 + sigma²), x_0 known, to its marginal
    decoder = float(torch.log(2 * math.pi * low**2) / 2)
    entropy = math.log(2 * math.pi * math.e) / 2
    gap = terms + prior + decoder - entropy
    assert 0 < gap < 60 / entries


@pytest.mark.parametrize(
    "noise",
    [LogNormal(-0.4, 2.5), LogitNormal(0.0, 2.5), UniformTime(EDM(1.0, 1e-3, 1e3)), UniformTime(FLOW)],
    ids=["log_normal", "logit_normal", "edm", "flow"],
)
def test_the_continuous_bound_is_the_same_under_every_training_noise(noise):
    """On the error of N(0, 1) data over a window of levels: the integral of 1 / (1 + sigma²) d log(sigma)."""
    sigma = noise.sigma((torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000)
    inside = (sigma > 0.1) & (sigma < 10)
    error = sigma**2 / (1 + sigma**2)
    got = float((ContinuousELBO(noise)(sigma) * error * inside).mean())
    log = lambda s: math.log(s) - math.log1p(s**2) / 2  # noqa: E731
    assert got == pytest.approx(log(10) - log(0.1), rel=2e-4)


@pytest.mark.parametrize(
    "noise",
    [LogNormal(0.4, 1.4, VariancePreserving.scaled_linear()), UniformTime(FLOW), LogitNormal(0.0, 2.0, FLOW)],
    ids=["log_normal", "flow", "logit_normal"],
)
def test_levels_that_were_cut_count_nothing_in_the_bound(noise):
    schedule = noise.schedule
    sigma = noise.sigma((torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000)
    assert (sigma == schedule.sigma_min).double().mean() > 1e-4
    got = float((ContinuousELBO(noise)(sigma) * sigma**2 / (1 + sigma**2)).mean())
    log = lambda s: math.log(s) - math.log1p(s**2) / 2  # noqa: E731
    assert got == pytest.approx(log(schedule.sigma_max) - log(schedule.sigma_min), rel=1e-3)


def test_discrete_and_continuous_elbo_agree_on_a_fine_table():
    """Row t of T stands for the levels between it and the one before: T times its term, over the continuous density."""
    fine = VariancePreserving.linear(1e-5, 2e-3, 10_000)
    rows = torch.tensor([3000, 6000, 9000])
    log_step = (fine.table[rows] / fine.table[rows - 1]).log()
    torch.testing.assert_close(
        DiscreteELBO(fine)(fine.table[rows]), fine.table[rows] ** -2 * log_step, rtol=2e-3, atol=0
    )


# --- The loss itself --------------------------------------------------------------------------------------------------


def test_the_loss_is_the_weighted_mean_square_of_each_picture():
    denoiser = Denoiser(Network(), VP, "v")
    x0, noise, shift = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1), draw(3, 2, 4, 4, seed=2)
    sigma = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    loss = denoising_loss(denoiser, x0, {"shift": shift}, sigma, noise, MinSNR())
    assert loss.shape == (3,)
    for i in range(3):
        x = x0[i : i + 1] + sigma[i] * noise[i : i + 1]
        estimate = denoiser(x, sigma[i], {"shift": shift[i : i + 1]})
        expected = min(float(sigma[i]) ** -2, 5.0) * ((estimate - x0[i : i + 1]) ** 2).mean()
        torch.testing.assert_close(loss[i], expected)


def test_a_perfect_denoiser_has_no_loss():
    class Perfect(nn.Module):
        def forward(self, sample, timestep):
            return target

    denoiser = Denoiser(Perfect(), VP, "v")
    x0, noise = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1)
    sigma = torch.tensor([0.03, 1.0, 14.0], dtype=torch.float64)
    target = denoiser.network_target(x0, noise, sigma)
    loss = denoising_loss(denoiser, x0, None, sigma, noise, Plain(denoiser))
    torch.testing.assert_close(loss, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-20)


@pytest.mark.parametrize(
    ("schedule", "prediction", "d"),
    [(VP, "epsilon", 1.0), (VP.zero_terminal_snr(), "v", 1.0), (FLOW, "velocity", 1.0), (EDM(0.5), "edm", 0.5)],
)
def test_float32_is_enough_at_both_ends(schedule, prediction, d):
    """The loss in x_0-space against double precision, where the weight is largest and where x is."""
    sigma = torch.tensor([schedule.sigma_min, schedule.sigma_max], dtype=torch.float32)
    x0, noise = d * draw(2, 2, 5, 5), draw(2, 2, 5, 5, seed=1)
    losses = []
    for dtype in (torch.float32, torch.float64):
        denoiser = Denoiser(Network(dtype), schedule, prediction, d)
        losses.append(
            denoising_loss(denoiser, x0.to(dtype), None, sigma.to(dtype), noise.to(dtype), Plain(denoiser)).double()
        )
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=0)


def test_half_precision_latents_and_networks_give_a_float32_loss():
    denoiser = Denoiser(Network(torch.bfloat16), VP, "v")
    x0, noise = draw(2, 2, 5, 5).bfloat16(), draw(2, 2, 5, 5, seed=1).bfloat16()
    assert denoising_loss(denoiser, x0, None, torch.tensor([0.1, 5.0]), noise, X0()).dtype == torch.float32


def test_names_choose_noises_and_weights():
    assert training_noise("uniform", VP) == UniformTime(VP)
    assert training_noise("log_normal", VP, mean=-0.1, std=1.3) == LogNormal(-0.1, 1.3, VP)
    assert training_noise("logit_normal", FLOW, std=0.7) == LogitNormal(0.0, 0.7, FLOW)
    denoiser = Denoiser(Network(), VP, "v")
    kinds = {"plain": Plain, "min_snr": MinSNR, "debiased": Debiased, "edm": EDMWeight, "x0": X0, "elbo": DiscreteELBO}
    kinds["soft_min_snr"] = SoftMinSNR
    assert set(kinds) == set(WEIGHTS)
    for name, kind in kinds.items():
        assert isinstance(training_weight(name, denoiser, UniformTime(VP)), kind)
    assert training_weight("elbo", denoiser, LogNormal()) == ContinuousELBO(LogNormal())
    assert training_weight("min_snr", denoiser, UniformTime(VP), gamma=3.0) == MinSNR(3.0)
    half = Denoiser(Network(), EDM(0.5), "edm", 0.5)
    assert training_weight("edm", half, LogNormal()) == EDMWeight(0.5)


def test_soft_min_snr_is_its_papers_formula():
    """4 SNR / (SNR + 4) for pixels of deviation 0.5, but for a factor; never above the weights it goes between."""
    sigma = torch.logspace(-3, 3, 50, dtype=torch.float64)
    torch.testing.assert_close(4 * SoftMinSNR(0.5)(sigma), 4 * sigma**-2 / (sigma**-2 + 4))
    assert (SoftMinSNR()(sigma) < MinSNR(1.0)(sigma)).all()
    assert (2 * SoftMinSNR()(sigma) >= MinSNR(1.0)(sigma)).all()
    with pytest.raises(ValueError, match="soft_min_snr gives pure noise no weight"):
        training_weight("soft_min_snr", Denoiser(Network(), FLOW, "velocity"), UniformTime(FLOW), floor=0.1)


def test_min_snr_at_pure_noise_is_floored_or_refused():
    denoiser = Denoiser(Network(), VP.zero_terminal_snr(), "v")
    with pytest.raises(ValueError, match="last step would stay untrained"):
        training_weight("min_snr", denoiser, UniformTime(denoiser.schedule))
    weight = training_weight("min_snr", denoiser, UniformTime(denoiser.schedule), floor=0.02)
    assert weight(torch.tensor([SIGMA_INFINITY, 1.0, 0.1])).tolist() == pytest.approx([0.02, 1.0, 5.0])


def test_min_snr_on_the_cosine_table_leaves_no_last_step_untrained():
    """It is no clamped one, but ends at sigma 20291; of epsilon's own error the weight there is 1, of v's 2e-9."""
    cosine = VariancePreserving.cosine()
    top = torch.tensor([cosine.sigma_max])
    for name in ("min_snr", "soft_min_snr"):
        with pytest.raises(ValueError, match="last step would stay untrained"):
            training_weight(name, Denoiser(Network(), cosine, "v"), UniformTime(cosine))
        denoiser = Denoiser(Network(), cosine, "epsilon")
        weight = training_weight(name, denoiser, UniformTime(cosine))
        of_epsilon = weight(top) / training_weight("plain", denoiser, UniformTime(cosine))(top)
        assert float(of_epsilon) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(("gamma", "floor"), [(0.0, 0.0), (-1.0, 0.0), (5.0, 10.0), (5.0, -0.1), (math.nan, 0.0)])
def test_min_snr_takes_what_is_a_weight(gamma, floor):
    with pytest.raises(ValueError, match="min_snr takes 0 <= floor <= gamma and gamma > 0"):
        MinSNR(gamma, floor)


def test_bad_choices_say_what_there_is():
    denoiser = Denoiser(Network(), VP, "v")
    with pytest.raises(ValueError, match=r"one of uniform, log_normal, logit_normal; got 'cosine'"):
        training_noise("cosine", VP)
    with pytest.raises(ValueError, match="uniform training noise has no mean and no std"):
        training_noise("uniform", VP, mean=0.0, std=1.0)
    with pytest.raises(ValueError, match="std of the training noise should be above 0"):
        training_noise("log_normal", VP, std=0.0)
    with pytest.raises(ValueError, match=r"one of plain, min_snr, soft_min_snr, debiased, edm, x0, elbo; got 'p2'"):
        training_weight("p2", denoiser, UniformTime(VP))
    with pytest.raises(ValueError, match=r"predicts the mean learns by the weight elbo.*got plain"):
        training_weight("plain", Denoiser(nn.Identity(), VP, "mean"), UniformTime(VP))
    with pytest.raises(ValueError, match="needs a beta table, got RectifiedFlow"):
        DiscreteELBO(FLOW)
    with pytest.raises(ValueError, match="no density"):
        ContinuousELBO(UniformTime(VP))(torch.ones(1))
