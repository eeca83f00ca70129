"""Samplers against closed-form denoisers: marginals, orders, what is exact; and EDM's algorithm, written once more."""

import itertools
import math

import numpy as np
import pytest
import torch

from ldm.denoiser import Denoiser
from ldm.samplers import SAMPLERS, Churn, ddim, ddpm, dpmpp_2m, euler, euler_ancestral, heun, picture_noise
from ldm.schedule import EDM, RectifiedFlow, step_grid
from tests.sampling import BOTTOM, TOP, VP, Mixture, Network, P, draw, generators, grid, moments

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


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


def test_learned_variances_of_0_and_1_are_the_small_and_the_large():
    data, x, sigmas = Mixture(), 80 * draw(6, 1, 2, 2), [*step_grid(EDM(1.0), 12, "karras")[:-1], 0.002]

    def run(variance):
        stream = iter([draw(6, 1, 2, 2, seed=i) for i in range(12)])
        return ddpm(data.denoise, x, sigmas, variance=variance, noise=lambda x: next(stream))

    for name, value in (("small", 0.0), ("large", 1.0)):
        torch.testing.assert_close(run(lambda x, sigma, v=value: torch.full_like(x, v)), run(name))


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


@pytest.mark.parametrize("eta", [-1.0, 1.7])
def test_an_eta_that_leaves_the_marginals_is_refused(eta: float) -> None:
    with pytest.raises(ValueError, match="from 0"):
        ddim(lambda x, sigma: x, draw(2, 3), [2.0, 1.0, 0.0], eta=eta)
