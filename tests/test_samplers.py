"""Samplers against closed-form denoisers (marginals, orders, what is exact) and, step for step, against diffusers."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from scipy import stats
from torch import nn

from ldm.denoiser import Denoiser
from ldm.samplers import SAMPLERS, Churn, ddim, ddpm, dpmpp_2m, euler, euler_ancestral, heun, picture_noise
from ldm.schedule import EDM, RectifiedFlow, VariancePreserving, step_grid

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VP = VariancePreserving.scaled_linear()
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- Data whose denoiser is known -------------------------------------------------------------------------------------


class Mixture:
    """One-dimensional Gaussian mixture: its denoiser at any level, and the quantiles of x = x_0 + sigma * eps."""

    weights, means, stds = (0.35, 0.25, 0.4), (-1.2, 0.1, 1.0), (0.3, 0.15, 0.4)

    def denoise(self, x, sigma):
        parts = []
        for w, m, s in zip(self.weights, self.means, self.stds, strict=True):
            v = s**2 + sigma**2
            parts.append((math.log(w) - (x - m) ** 2 / (2 * v) - math.log(v) / 2, m + s**2 / v * (x - m)))
        share = torch.softmax(torch.stack([log for log, _ in parts]), 0)
        return (share * torch.stack([mean for _, mean in parts])).sum(0)

    def cdf(self, x, sigma):
        return sum(
            w * stats.norm.cdf(x, m, math.hypot(s, sigma))
            for w, m, s in zip(self.weights, self.means, self.stds, strict=True)
        )

    def quantiles(self, p, sigma):
        low, high = np.full(len(p), -10 - 10 * sigma), np.full(len(p), 10 + 10 * sigma)
        for _ in range(70):  # bisection down to rounding
            middle = (low + high) / 2
            below = self.cdf(middle, sigma) < p
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return torch.from_numpy(low).view(-1, 1, 1, 1)


P = np.linspace(0.02, 0.98, 49)
TOP, BOTTOM = 20.0, 0.05


def grid(steps, top=TOP, bottom=BOTTOM):
    """Even in log sigma, and ending above 0, so that no step is of lower order for its end."""
    return step_grid(EDM(1.0, bottom, top), steps, "exponential")[:-1]


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2), (dpmpp_2m, 2)])
def test_orders_of_convergence(sampler, order):
    """In one dimension the probability flow keeps every point at its quantile: an exact reference at each level."""
    data = Mixture()
    start, end = data.quantiles(P, TOP), data.quantiles(P, BOTTOM)
    errors = [float((sampler(data.denoise, start, grid(n + 1)) - end).abs().mean()) for n in (20, 40, 80, 160)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders[-1] == pytest.approx(order, abs=0.15), (errors, orders)
    assert orders[-2] == pytest.approx(order, abs=0.3), (errors, orders)


@pytest.mark.parametrize(("name", "tolerance"), [("euler", 0.1), ("ddim", 0.1), ("heun", 0.004), ("dpmpp_2m", 0.004)])
def test_deterministic_samplers_reproduce_a_mixture(name, tolerance):
    data = Mixture()
    start, wanted = data.quantiles(P, 80.0), data.quantiles(P, 0.0)
    sigmas = step_grid(EDM(1.0), 100, "karras")
    got = SAMPLERS[name].function(data.denoise, start, sigmas)
    assert float((got - wanted).abs().max()) < tolerance


@pytest.mark.parametrize(
    ("name", "options"),
    [("ddpm", {}), ("ddpm", {"variance": "large"}), ("euler_ancestral", {}), ("ddim", {"eta": 0.5}),
     ("heun", {"churn": Churn(40, 0.05, 50, 1.003)}), ("stochastic_heun", {})],
)  # fmt: skip
def test_stochastic_samplers_come_closer_to_a_mixture_with_the_steps(name, options):
    data, number = Mixture(), 16_000
    start = data.quantiles((np.arange(400) + 0.5) / 400, 80.0).repeat(number // 400, 1, 1, 1)
    errors = []
    for steps in (8, 64):
        generator = torch.Generator().manual_seed(steps)
        sigmas = step_grid(EDM(1.0), steps, "karras")
        got = SAMPLERS[name].function(
            data.denoise, start, sigmas, noise=lambda x, g=generator: torch.randn(x.shape, generator=g).to(x), **options
        )
        ordered = np.sort(got.flatten().numpy())
        reached = data.cdf(ordered, 0.0) - (np.arange(number) + 0.5) / number
        errors.append(float(np.abs(reached).max()))  # Kolmogorov's distance; chance alone gives 0.01
    assert errors[1] < 0.025 < errors[0], errors


def moments(sampler, denoise, sigmas, start_variance, **options):
    """Mean and variance of a sampler's result when the denoiser is affine in x: exact, from its response to each draw.

    Row 0 starts at 0 and draws nothing; row 1 starts one higher; every other row draws a single 1 at one step.
    """
    steps = len(sigmas) - 1
    x = torch.zeros(steps + 2, 1, 1, 1, dtype=torch.float64)
    x[1] = 1
    draws = iter(range(steps))

    def noise(x):
        one = torch.zeros_like(x)
        one[2 + next(draws)] = 1
        return one

    out = sampler(denoise, x, sigmas, noise=noise, **options).flatten()
    response = out[1:] - out[0]
    return float(out[0]), float(response[0] ** 2 * start_variance + (response[1:] ** 2).sum())


@pytest.mark.parametrize("steps", [1, 3, 17])
def test_ancestral_sampling_is_exact_where_the_design_says(steps):
    sigmas = grid(steps + 1)
    normal = lambda x, sigma: x / (1 + sigma**2)  # noqa: E731  data N(0, 1)
    point = lambda x, sigma: torch.full_like(x, 0.7)  # noqa: E731  data in one point
    end = float(sigmas[-1])
    _, variance = moments(ddpm, normal, sigmas, 1 + TOP**2, variance="large")
    assert variance == pytest.approx(1 + end**2, rel=1e-12)
    for sampler in (ddpm, euler_ancestral):
        mean, variance = moments(sampler, point, sigmas, TOP**2)
        assert mean == pytest.approx(0.7 * (1 - (end / TOP) ** 2))  # the start is around 0, the data at 0.7
        assert variance == pytest.approx(end**2, rel=1e-9)
    # And not the other way round: the small variance is too narrow on N(0, 1), the large one too wide on a point.
    assert moments(ddpm, normal, sigmas, 1 + TOP**2)[1] < 0.99 * (1 + end**2)
    assert moments(ddpm, point, sigmas, TOP**2, variance="large")[1] > 1.5 * end**2


def test_what_is_not_exact_shrinks_with_the_steps():
    normal = lambda x, sigma: x / (1 + sigma**2)  # noqa: E731
    errors = [1 + BOTTOM**2 - moments(euler_ancestral, normal, grid(n + 1), 1 + TOP**2)[1] for n in (20, 40, 80, 160)]
    rates = [a / b for a, b in itertools.pairwise(errors)]
    assert errors[-1] > 0
    assert rates[-1] == pytest.approx(2, abs=0.1)


def test_a_gaussian_is_followed_in_closed_form():
    """On N(0, s²) the flow scales x by sqrt((s² + lower²) / (s² + sigma²))."""
    s, x = 0.6, draw(5, 2, 3, 3) * 20
    denoise = lambda x, sigma: s**2 / (s**2 + sigma**2) * x  # noqa: E731
    exact = x * math.sqrt((s**2 + BOTTOM**2) / (s**2 + TOP**2))
    for sampler, tolerance in ((euler, 0.05), (heun, 5e-4), (dpmpp_2m, 5e-4)):
        torch.testing.assert_close(sampler(denoise, x, grid(200)), exact, rtol=tolerance, atol=0)


def test_one_formula_has_several_names():
    data, x, sigmas = Mixture(), 80 * draw(6, 1, 2, 2), step_grid(EDM(1.0), 12, "karras")
    noises = [draw(6, 1, 2, 2, seed=i) for i in range(12)]

    def run(sampler, **options):
        stream = iter(noises)
        return sampler(data.denoise, x, sigmas, noise=lambda x: next(stream), **options)

    assert torch.equal(run(euler), run(ddim, eta=0.0))
    torch.testing.assert_close(run(euler_ancestral), run(ddpm))
    torch.testing.assert_close(run(ddim, eta=1.0), run(ddpm, variance="small"))
    assert not torch.allclose(run(ddpm), run(ddpm, variance="large"))


# --- EDM's algorithms, written down a second time ---------------------------------------------------------------------


def algorithm_2(denoise, x, t, noises, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    """EDM's stochastic sampler, line by line, in numpy; without churn it is algorithm 1."""
    n = len(t) - 1
    noises = iter(noises)
    for i in range(n):
        gamma = min(s_churn / n, 2**0.5 - 1) if s_tmin <= t[i] <= s_tmax else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x
        if gamma > 0:
            x_hat = x + np.sqrt(t_hat**2 - t[i] ** 2) * s_noise * next(noises)
        d = (x_hat - denoise(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_prime = (x - denoise(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_prime / 2)
    return x


@pytest.mark.parametrize(
    "churn",
    [None, Churn(0.0), Churn(5.0), Churn(40.0, 0.05, 50.0, 1.003), Churn(1e9), Churn(10.0, 1.0, 2.0, 0.9)],
)
def test_heun_is_edms_algorithm(churn):
    data, sigmas, x = Mixture(), step_grid(EDM(1.0), 18, "karras"), 80 * draw(4, 1, 3, 3)
    noises = [draw(4, 1, 3, 3, seed=10 + i) for i in range(18)]
    options = {} if churn is None else vars(churn)
    numpy_denoise = lambda x, t: data.denoise(torch.from_numpy(x), float(t)).numpy()  # noqa: E731
    expected = algorithm_2(numpy_denoise, x.numpy(), sigmas.numpy(), [n.numpy() for n in noises], **options)
    stream = iter(noises)
    got = heun(data.denoise, x, sigmas, churn=churn, noise=lambda x: next(stream))
    torch.testing.assert_close(got, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VP.zero_terminal_snr()], ids=["flow", "zero_terminal"])
def test_from_a_clamped_level_the_first_step_is_eulers(schedule):
    """On N(0, 1) with an exact denoiser the result has standard deviation 1; Heun's own first step blows it up."""
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)  # all is linear in x, so one number shows the factor
    denoise = lambda x, sigma: x / (1 + sigma**2)  # noqa: E731
    scale = math.sqrt(1 + schedule.sigma_max**2)
    for name, tolerance in (("heun", 0.06), ("dpmpp_2m", 0.1), ("euler", 0.2)):
        sigmas = step_grid(schedule, 8, SAMPLERS[name].grid_for(schedule))
        assert float(SAMPLERS[name].function(denoise, x * scale, sigmas)) == pytest.approx(1, abs=tolerance), name
    sigmas = step_grid(schedule, 8, SAMPLERS["heun"].grid_for(schedule))
    assert algorithm_2(denoise, np.array(scale), sigmas.numpy(), []) > 2
    levels = []
    heun(lambda x, sigma: levels.append(sigma) or x * 0, x, [4096.0, 10.0, 1.0, 0.0])
    assert levels == [4096.0, 10.0, 1.0, 1.0]  # one evaluation at the clamp, two, and one for the step to 0


# --- diffusers, step for step -----------------------------------------------------------------------------------------


class Network(nn.Module):
    """A fixed random function of the picture and the clock, smooth enough that rounding does not grow."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        with torch.no_grad():
            self.conv.weight.copy_(draw(3, 3, 3, 3, seed=5) * 0.15)
            self.conv.bias.copy_(draw(3, seed=6) * 0.1)

    def forward(self, sample, timestep):
        timestep = torch.as_tensor(timestep, dtype=torch.float32).expand(len(sample)).view(-1, 1, 1, 1)
        return torch.sin(self.conv(sample) + timestep / 300) + 0.3 * sample


LATENTS = draw(2, 3, 6, 6, seed=7, dtype=torch.float32)


@torch.no_grad()
def theirs(scheduler, steps, latents, clock=None, **options):
    """States before each step and the last one, as the loop of diffusers' pipelines has them."""
    network = Network()
    scheduler.set_timesteps(steps)
    x, states = latents * scheduler.init_noise_sigma, []
    for i, t in enumerate(scheduler.timesteps):
        states.append(x)
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(seen, t if clock is None else clock[i]), t, x, **options).prev_sample
    return [*states, x]


@torch.no_grad()
def ours(name, prediction, steps, latents, schedule=VP, grid_options=None, **options):
    """The same of ours, in x = x_0 + sigma * eps, and the levels."""
    sampler = SAMPLERS[name]
    spaced = sampler.grid_for(schedule, **(grid_options or {}))
    sigmas = step_grid(schedule, steps, spaced)
    x, states = latents * sampler.initial_scale(spaced, sigmas[0]), []
    denoiser = Denoiser(Network(), schedule, prediction)
    last = sampler.function(denoiser, x, sigmas, callback=lambda i, sigma, x, x0: states.append(x), **options)
    return [*states, last], sigmas


def close(got, expected, tolerance=3e-4):
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        error = float((a - b).abs().max() / b.abs().max())
        assert error < tolerance, f"step {i}: {error}"


def unscaled(states, sigmas, schedule=VP):
    """x_t = alpha * x."""
    return [float(schedule.alpha(sigma)) * x for x, sigma in zip(states, sigmas, strict=True)]


NAMES = {"epsilon": "epsilon", "v": "v_prediction"}
LEADING = {"spacing": "leading", "offset": 1}


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_is_that_of_diffusers(prediction, variance):
    config = SD | {"prediction_type": NAMES[prediction], "variance_type": f"fixed_{variance}", "clip_sample": False}
    scheduler = DDPMScheduler(**config)
    expected = theirs(scheduler, 25, LATENTS, generator=generators(1, 2))
    got, sigmas = ours("ddpm", prediction, 25, LATENTS, variance=variance, noise=picture_noise(generators(1, 2)))
    close(unscaled(got, sigmas), expected)


class Learned(nn.Module):
    """A network that also puts out the variance; what it said last is kept beside what it predicts."""

    def __init__(self):
        super().__init__()
        self.mean, self.spread, self.runs = Network(), nn.Conv2d(3, 3, 1), 0
        nn.init.constant_(self.spread.bias, 0.3)
        nn.init.eye_(self.spread.weight[:, :, 0, 0])

    def both(self, sample, timestep):
        return torch.cat([self.mean(sample, timestep), torch.tanh(self.spread(sample))], 1)  # [B, 6, H, W]

    def forward(self, sample, timestep):
        self.runs += 1
        output, self.said = self.both(sample, timestep).chunk(2, 1)
        return output


@pytest.mark.parametrize("prediction", NAMES)
def test_the_learned_variance_is_that_of_diffusers(prediction):
    """Theirs is learned_range: the network's second half, from -1 to 1, is where between the logs the variance lies."""
    config = SD | {"prediction_type": NAMES[prediction], "variance_type": "learned_range", "clip_sample": False}
    scheduler, network, x_t, expected, got = DDPMScheduler(**config), Learned(), LATENTS, [], []
    scheduler.set_timesteps(25)
    drawers = generators(1, 2)
    sigmas = step_grid(VP, 25, SAMPLERS["ddpm"].grid_for(VP))
    with torch.no_grad():
        for t in scheduler.timesteps:
            expected.append(x_t)
            x_t = scheduler.step(network.both(x_t, t), t, x_t, generator=drawers).prev_sample
        last = ddpm(
            Denoiser(network, VP, prediction),
            LATENTS / float(VP.alpha(sigmas[0])),
            sigmas,
            variance=lambda x, sigma: (network.said + 1) / 2,
            noise=picture_noise(generators(1, 2)),
            callback=lambda i, sigma, x, x0: got.append(x),
        )
    close(unscaled([*got, last], sigmas), [*expected, x_t])
    assert network.runs == 25
    assert float(network.said.std()) > 0.1


def test_learned_variances_of_0_and_1_are_the_small_and_the_large():
    data, x, sigmas = Mixture(), 80 * draw(6, 1, 2, 2), [*step_grid(EDM(1.0), 12, "karras")[:-1], 0.002]

    def run(variance):
        stream = iter([draw(6, 1, 2, 2, seed=i) for i in range(12)])
        return ddpm(data.denoise, x, sigmas, variance=variance, noise=lambda x: next(stream))

    for name, value in (("small", 0.0), ("large", 1.0)):
        torch.testing.assert_close(run(lambda x, sigma, v=value: torch.full_like(x, v)), run(name))


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_is_that_of_diffusers(prediction, eta, to_one):
    scheduler = DDIMScheduler(
        **SD, prediction_type=NAMES[prediction], clip_sample=False, set_alpha_to_one=to_one, steps_offset=1
    )
    expected = theirs(scheduler, 20, LATENTS, eta=eta, generator=generators(3, 4))
    options = LEADING | {"final": "zero" if to_one else "sigma_min"}
    got, sigmas = ours(
        "ddim", prediction, 20, LATENTS, grid_options=options, eta=eta, noise=picture_noise(generators(3, 4))
    )
    close(unscaled(got, sigmas), expected)


def test_ddim_with_given_variance_noise():
    scheduler = DDIMScheduler(**SD, clip_sample=False)
    scheduler.set_timesteps(10)
    network, x_t = Network(), LATENTS
    noises = [draw(2, 3, 6, 6, seed=20 + i, dtype=torch.float32) for i in range(10)]
    with torch.no_grad():
        for t, noise in zip(scheduler.timesteps, noises, strict=True):
            x_t = scheduler.step(network(x_t, t), t, x_t, eta=0.7, variance_noise=noise).prev_sample
    stream = iter(noises)
    got, _ = ours("ddim", "epsilon", 10, LATENTS, eta=0.7, noise=lambda x: next(stream))
    close([got[-1]], [x_t])


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("options", [{}, LEADING, {"spacing": "trailing"}], ids=["linspace", "leading", "trailing"])
def test_euler_is_that_of_diffusers(prediction, options):
    config = {"timestep_spacing": options.get("spacing", "linspace"), "steps_offset": options.get("offset", 0)}
    scheduler = EulerDiscreteScheduler(**SD, prediction_type=NAMES[prediction], **config)
    expected = theirs(scheduler, 28, LATENTS)  # 28 points of linspace are whole rows: 999 / 27 = 37
    got, _ = ours("euler", prediction, 28, LATENTS, grid_options=options)
    close(got, expected)


def test_euler_between_rows_is_that_of_diffusers_but_for_the_clock():
    """Between rows their sigma is linear and ours log-linear in the row: at equal sigma the clocks differ by < 0.01."""
    got, sigmas = ours("euler", "epsilon", 20, LATENTS)
    scheduler = EulerDiscreteScheduler(**SD)
    close(got, theirs(scheduler, 20, LATENTS), 1e-3)
    torch.testing.assert_close(VP.timestep(sigmas[:-1]).float(), scheduler.timesteps, rtol=0, atol=0.01)
    close(got, theirs(EulerDiscreteScheduler(**SD), 20, LATENTS, clock=VP.timestep(sigmas[:-1]).float()))


@pytest.mark.parametrize("prediction", NAMES)
def test_euler_ancestral_is_that_of_diffusers(prediction):
    scheduler = EulerAncestralDiscreteScheduler(**SD, prediction_type=NAMES[prediction])
    expected = theirs(scheduler, 28, LATENTS, generator=generators(8, 9))
    got, _ = ours("euler_ancestral", prediction, 28, LATENTS, noise=picture_noise(generators(8, 9)))
    close(got, expected)


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("options", [{}, LEADING, {"ramp": "karras"}], ids=["linspace", "leading", "karras"])
def test_heun_is_that_of_diffusers(prediction, options):
    config = {"timestep_spacing": options.get("spacing", "linspace"), "steps_offset": options.get("offset", 0)}
    scheduler = HeunDiscreteScheduler(
        **SD, prediction_type=NAMES[prediction], use_karras_sigmas="ramp" in options, **config
    )
    expected = theirs(scheduler, 10, LATENTS)
    got, _ = ours("heun", prediction, 10, LATENTS, grid_options=options)
    close(got, [*expected[:-1:2], expected[-1]])  # theirs counts the second evaluation as a step


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("steps", [3, 14, 20])
@pytest.mark.parametrize(
    "options",
    [{}, LEADING, {"spacing": "trailing"}, {"final": "sigma_min"}, {"ramp": "karras"},
     {"ramp": "karras", "final": "sigma_min"}],
    ids=["linspace", "leading", "trailing", "sigma_min", "karras", "karras_sigma_min"],
)  # fmt: skip
def test_dpmpp_2m_is_that_of_diffusers(prediction, steps, options):
    if options == {"ramp": "karras", "final": "sigma_min"} and steps >= 15:
        steps = 14  # theirs ends in a step of no length, where its second order divides by 0
    scheduler = DPMSolverMultistepScheduler(
        **SD,
        prediction_type=NAMES[prediction],
        timestep_spacing=options.get("spacing", "linspace"),
        steps_offset=options.get("offset", 0),
        final_sigmas_type=options.get("final", "zero"),
        use_karras_sigmas="ramp" in options,
    )
    got, sigmas = ours("dpmpp_2m", prediction, steps, LATENTS, grid_options=options)
    # With Karras theirs rounds the clock to whole rows; the network is asked at ours.
    clock = VP.timestep(sigmas[:-1]).float() if "ramp" in options else None
    expected = theirs(scheduler, steps, LATENTS, clock=clock)
    close(unscaled(got, sigmas), expected)
    torch.testing.assert_close(VP.timestep(sigmas[:-1]).float(), scheduler.timesteps.float(), rtol=0, atol=0.501)


def test_flow_euler_is_that_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.init_noise_sigma = 1.0
    scheduler.scale_model_input = lambda x, t: x
    scheduler.set_timesteps(12)
    expected = theirs(scheduler, 12, LATENTS, clock=scheduler.timesteps / 1000)
    got, sigmas = ours("euler", "velocity", 12, LATENTS, schedule=RectifiedFlow())
    close(unscaled(got, sigmas, RectifiedFlow()), expected, 1e-3)  # theirs starts at t = 1, ours at 0.99976


def test_ddim_at_zero_terminal_snr_is_that_of_diffusers():
    config = SD | {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    scheduler = DDIMScheduler(**config, clip_sample=False)
    schedule = VP.zero_terminal_snr()
    got, sigmas = ours("ddim", "v", 20, LATENTS, schedule=schedule)
    close(unscaled(got, sigmas, schedule), theirs(scheduler, 20, LATENTS), 1e-3)


# --- The rest of the contract -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_callback_sees_each_step(name):
    data, seen = Mixture(), []
    sigmas = step_grid(EDM(1.0), 9, "karras")
    out = SAMPLERS[name].function(
        data.denoise, 80 * draw(2, 1, 2, 2), sigmas, noise=picture_noise(generators(0, 1)),
        callback=lambda *state: seen.append(state),
    )  # fmt: skip
    assert [i for i, *_ in seen] == list(range(9))
    churned = math.sqrt(2) if name == "stochastic_heun" else 1
    assert all(low <= sigma <= churned * low for (_, sigma, *_), low in zip(seen, sigmas.tolist(), strict=False))
    for _, sigma, x, x0 in seen:
        torch.testing.assert_close(x0, data.denoise(x, sigma))
    if name not in ("lms", "plms"):  # which know no step but their own
        torch.testing.assert_close(out, seen[-1][3])  # the step to 0 ends at the estimate
    assert out.dtype == torch.float64


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_is_the_same_alone_and_in_a_batch(name):
    def paint(seeds):
        options = {"heun": {"churn": Churn(10)}, "ddim": {"eta": 0.5}, "langevin": {"updates": 5}}.get(name, {})
        drawers = generators(*seeds)
        x = 14.6 * picture_noise(drawers)(torch.empty(len(seeds), 3, 6, 6))
        sampled = SAMPLERS[name]
        sigmas = step_grid(VP, 8, sampled.grid_for(VP))
        with torch.no_grad():
            return sampled.function(Denoiser(Network(), VP, "v"), x, sigmas, noise=picture_noise(drawers), **options)

    together = paint([3, 4, 5])
    for i, seed in enumerate([3, 4, 5]):
        torch.testing.assert_close(paint([seed])[0], together[i], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_noise_is_that_of_diffusers_for_a_list_of_generators():
    from diffusers.utils.torch_utils import randn_tensor

    got = picture_noise(generators(1, 2))(torch.empty(2, 3, 5, 5))
    assert torch.equal(got, randn_tensor((2, 3, 5, 5), generator=generators(1, 2)))
    one = picture_noise(generators(2))(torch.empty(1, 3, 5, 5))
    assert torch.equal(one[0], got[1])
    assert picture_noise(generators(1))(torch.empty(1, 2, 2, 2, dtype=torch.float64)).dtype == torch.float64


def test_latents_start_where_diffusers_starts_them():
    for scheduler, name, options in (
        (EulerDiscreteScheduler(**SD), "euler", {}),
        (EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1), "euler", LEADING),
        (EulerDiscreteScheduler(**SD, use_karras_sigmas=True), "euler", {"ramp": "karras"}),
        (HeunDiscreteScheduler(**SD, timestep_spacing="trailing"), "heun", {"spacing": "trailing"}),
    ):
        scheduler.set_timesteps(15)
        chosen = SAMPLERS[name].grid_for(VP, **options)
        sigma = float(step_grid(VP, 15, chosen)[0])
        assert SAMPLERS[name].initial_scale(chosen, sigma) == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-6)
    chosen = SAMPLERS["ddim"].grid_for(VP)
    assert SAMPLERS["ddim"].initial_scale(chosen, 13.0) * float(VP.alpha(13.0)) == pytest.approx(1)


def test_bad_calls_say_what_was_got():
    denoise, x = Mixture().denoise, draw(1, 1, 2, 2)
    wrong = [[1.0], [], [1.0, 2.0], [2.0, 1.0, 1.0, 0.0], [2.0, 0.0, 0.0], [1.0, -1.0], [math.inf, 1.0], [math.nan, 0]]
    for sigmas in wrong:
        with pytest.raises(ValueError, match="sigmas should be at least two and decrease"):
            euler(denoise, x, sigmas)
    for name, sampler in SAMPLERS.items():
        if name in ("ddpm", "euler_ancestral", "dpmpp_2m_sde", "langevin", "predictor_corrector", "stochastic_heun"):
            with pytest.raises(ValueError, match="give noise="):
                sampler.function(denoise, x, [2.0, 1.0, 0.0])
        else:
            sampler.function(denoise, x, [2.0, 1.0, 0.0])
        assert name == sampler.function.__name__
    with pytest.raises(ValueError, match="give noise="):
        heun(denoise, x, [2.0, 1.0, 0.0], churn=Churn(1.0))
    with pytest.raises(ValueError, match="small or large, or a function; got 'medium'"):
        ddpm(denoise, x, [2.0, 1.0, 0.0], variance="medium")
    with pytest.raises(ValueError, match="1 generators for 2 pictures"):
        picture_noise(generators(1))(torch.empty(2, 1, 2, 2))
