"""Multistep samplers: against diffusers step for step, their orders, and polynomials, which they integrate exactly."""

import itertools
import math
from functools import partial

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, LMSDiscreteScheduler, PNDMScheduler, UniPCMultistepScheduler
from numpy.polynomial import Polynomial
from scipy.integrate import quad

from ldm.denoiser import Denoiser, epsilon_from
from ldm.multistep import dpmpp_2m, dpmpp_2m_sde, lms, plms, unipc
from ldm.samplers import SAMPLERS, euler_ancestral, picture_noise
from ldm.schedule import EDM, RectifiedFlow, VariancePreserving, step_grid
from pipelines.folder import schedule_from, scheduler_config
from pipelines.scheduler import grid_of
from tests.sampling import (
    BOTTOM,
    LATENTS,
    LEADING,
    SD,
    TOP,
    VP,
    Mixture,
    Network,
    P,
    close,
    draw,
    generators,
    grid,
    moments,
    ours,
    theirs,
    unscaled,
)

NAMES = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}
GRIDS = {
    "linspace": {},
    "leading": LEADING,
    "trailing": {"spacing": "trailing"},
    "sigma_min": {"final": "sigma_min"},
    "karras": {"ramp": "karras"},
}
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def config(prediction, options):
    """Of a diffusers scheduler with these options of a grid."""
    made = SD | {"prediction_type": NAMES[prediction], "steps_offset": options.get("offset", 0)}
    made |= {"timestep_spacing": options.get("spacing", "linspace")}
    return made | ({"use_karras_sigmas": True} if "ramp" in options else {})


# --- diffusers, step for step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("steps", [5, 14, 20])
@pytest.mark.parametrize("options", GRIDS.values(), ids=GRIDS)
def test_dpmpp_2m_sde_is_that_of_diffusers(prediction, steps, options):
    scheduler = DPMSolverMultistepScheduler(
        **config(prediction, options),
        algorithm_type="sde-dpmsolver++",
        final_sigmas_type=options.get("final", "zero"),
    )
    got, sigmas = ours(
        "dpmpp_2m_sde", prediction, steps, LATENTS, grid_options=options, noise=picture_noise(generators(1, 2))
    )
    # With Karras theirs rounds the clock to whole rows; the network is asked at ours.
    clock = VP.timestep(sigmas[:-1]).float() if "ramp" in options else None
    close(unscaled(got, sigmas), theirs(scheduler, steps, LATENTS, clock=clock, generator=generators(1, 2)))


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize(("order", "steps"), [(1, 7), (2, 1), (2, 2), (2, 20), (3, 3), (3, 20)])
@pytest.mark.parametrize("options", GRIDS.values(), ids=GRIDS)
def test_unipc_is_that_of_diffusers(prediction, order, steps, options):
    scheduler = UniPCMultistepScheduler(
        **config(prediction, options), solver_order=order, final_sigmas_type=options.get("final", "zero")
    )
    got, sigmas = ours("unipc", prediction, steps, LATENTS, grid_options=options, order=order)
    clock = VP.timestep(sigmas[:-1]).float() if "ramp" in options else None
    close(unscaled(got, sigmas), theirs(scheduler, steps, LATENTS, clock=clock))


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("options", [{}, LEADING, {"spacing": "trailing"}, {"ramp": "karras"}])
def test_lms_is_that_of_diffusers(prediction, order, options):
    scheduler = LMSDiscreteScheduler(**config(prediction, options))
    expected = theirs(scheduler, 10, LATENTS, order=order)  # 10 points of linspace are whole rows: 999 / 9 = 111
    got, _ = ours("lms", prediction, 10, LATENTS, grid_options=options, order=order)
    close(got, expected)


@pytest.mark.parametrize("steps", [2, 4, 10, 50])
@pytest.mark.parametrize("options", [{"offset": 1}, {"offset": 0}, {"offset": 1, "final": "zero"}])
def test_plms_is_that_of_diffusers(steps, options):
    to_one = options.get("final") == "zero"
    scheduler = PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=options["offset"], set_alpha_to_one=to_one)
    first, _, *others = theirs(scheduler, steps, LATENTS)  # they count the first step's second evaluation as a step
    got, sigmas = ours("plms", "epsilon", steps, LATENTS, grid_options=options)
    close(unscaled(got, sigmas), [first, *others])
    timesteps = VP.timestep(sigmas[:-1]).tolist()
    assert scheduler.timesteps.tolist() == [*timesteps[:2], *timesteps[1:]]


def test_plms_extrapolates_epsilon_whatever_the_network_predicts():
    """Theirs extrapolates the network's v, against the paper; from epsilons made of v the two agree."""

    class AsEpsilon(torch.nn.Module):
        def forward(self, sample, timestep):
            sigma = VP.sigma(torch.as_tensor(timestep).float())
            x = sample / VP.alpha(sigma)
            return epsilon_from(x, Denoiser(Network(), VP, "v")(x, sigma), sigma)

    scheduler, x_t, network = PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1), LATENTS, AsEpsilon()
    scheduler.set_timesteps(12)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x_t = scheduler.step(network(x_t, t), t, x_t).prev_sample
    got, sigmas = ours("plms", "v", 12, LATENTS, grid_options=LEADING)
    close(unscaled(got[-1:], sigmas[-1:]), [x_t])
    by_v = theirs(PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1, prediction_type="v_prediction"), 12, LATENTS)
    assert float((by_v[-1] - x_t).abs().max()) > 0.01


# --- Orders -----------------------------------------------------------------------------------------------------------


def errors_on_a_mixture(sampler, numbers, *, top=TOP, at_last_level=False):
    """Mean error at BOTTOM, where each point of one dimension should keep its quantile."""
    data, errors = Mixture(), []
    start, end = data.quantiles(P, top), data.quantiles(P, BOTTOM)
    for number in numbers:
        sigmas = step_grid(EDM(1.0, BOTTOM, top), number + 1, "exponential")
        if at_last_level:
            states = []
            sampler(data.denoise, start, sigmas, callback=lambda i, sigma, x, x0, s=states: s.append(x))
            got = states[-1]
        else:
            got = sampler(data.denoise, start, sigmas[:-1])
        errors.append(float((got - end).abs().mean()))
    return errors


def orders(errors):
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


@pytest.mark.parametrize(
    ("sampler", "order"),
    [(plms, 2), (unipc, 2), (partial(unipc, order=1), 2), (partial(unipc, order=3), 2), (partial(lms, order=1), 1),
     (partial(lms, order=2), 2), (partial(lms, order=3), 3)],
    ids=["plms", "unipc", "unipc-1", "unipc-3", "lms-1", "lms-2", "lms-3"],
)  # fmt: skip
def test_orders_of_convergence(sampler, order):
    """The whole run: the last step of unipc, like diffusers', is an Euler step, whose error is of order 2."""
    errors = errors_on_a_mixture(sampler, (80, 160, 320))
    assert orders(errors)[-1] == pytest.approx(order, abs=0.15), errors


def test_unipc_has_one_order_more_than_its_predictor_before_its_last_step():
    for order, numbers, wanted in ((1, (40, 80, 160), 2), (2, (40, 80, 160), 3), (3, (20, 40), 4)):
        errors = errors_on_a_mixture(partial(unipc, order=order), numbers, at_last_level=True)
        assert orders(errors)[-1] == pytest.approx(wanted, abs=0.4 if wanted == 4 else 0.1), (order, errors)


def test_lms_comes_to_order_4_where_its_first_steps_cost_nothing():
    """The Euler step at its start leaves order 2 in the limit: far off from high up, where the flow is straight."""
    errors = errors_on_a_mixture(lms, (80, 160, 320), top=1000.0)
    assert orders(errors)[-1] == pytest.approx(4, abs=0.2), errors


def test_second_order_beats_first_order_on_the_reverse_sde():
    """On N(0, 1) the variance after n steps, exactly: dpmpp_2m_sde comes closer than ancestral sampling, and faster."""
    normal = lambda x, sigma: x / (1 + sigma**2)  # noqa: E731
    first, second = (
        [abs(1 + BOTTOM**2 - moments(sampler, normal, grid(n + 1), 1 + TOP**2)[1]) for n in (40, 80, 160)]
        for sampler in (euler_ancestral, dpmpp_2m_sde)
    )
    assert orders(first)[-1] == pytest.approx(1, abs=0.1)
    assert orders(second)[-1] == pytest.approx(2, abs=0.2), second
    assert second[-1] < first[-1] / 10


# --- What is exact ----------------------------------------------------------------------------------------------------


def test_lms_integrates_slopes_that_are_polynomials_of_sigma():
    slope, levels = Polynomial([0.3, -1.1, 0.7, 0.2]), [9.0, 7.5, 6.9, 5.0, 3.1, 3.0, 0.8, 0.0]
    for order in (1, 2, 3, 4):
        flow = slope.cutdeg(order - 1)
        states = []
        last = lms(
            lambda x, sigma, flow=flow: x - sigma * flow(sigma),
            draw(2, 1, 1, 1),
            levels,
            order=order,
            callback=lambda i, sigma, x, x0, s=states: s.append(x),
        )
        states.append(last)
        whole = flow.integ()
        for i in range(order - 1, 7):  # from the step on that knows `order` slopes
            wanted = whole(levels[i + 1]) - whole(levels[i])
            torch.testing.assert_close(states[i + 1] - states[i], torch.full_like(last, wanted))


def test_unipc_integrates_estimates_that_are_polynomials_of_log_sigma():
    """x' = r x + ∫ exp(s - h) D ds over the step, s from 0 to h = log(sigma / lower)."""
    levels, poly = [9.0, 7.5, 6.9, 5.0, 3.1, 3.0, 0.8, 0.5], Polynomial([0.3, -1.1, 0.7])
    denoise = lambda x, sigma: torch.full_like(x, poly(-math.log(sigma)))  # noqa: E731

    def exact(x, sigma, lower):
        h = math.log(sigma / lower)
        integral, _ = quad(lambda s: math.exp(s - h) * poly(s - math.log(sigma)), 0, h)
        return lower / sigma * x + integral

    # Three estimates make the prediction exact, from the third step to the last but two.
    states = []
    start = draw(2, 1, 1, 1)
    unipc(denoise, start, levels, order=3, callback=lambda i, sigma, x, x0: states.append(x))
    for i in (3, 4):
        torch.testing.assert_close(states[i + 1], exact(states[i], levels[i], levels[i + 1]))
    # The correction by a third one is exact too: undo the Euler step at the end of runs of several lengths to see it.
    corrected = []
    for number in (4, 5, 6):
        sigma, lower = levels[number], levels[number + 1]
        x = unipc(denoise, start, levels[: number + 2])
        corrected.append((x - (1 - lower / sigma) * denoise(x, sigma)) * sigma / lower)
    for i, number in enumerate((4, 5)):
        torch.testing.assert_close(corrected[i + 1], exact(corrected[i], levels[number], levels[number + 1]))


def test_samplers_need_one_evaluation_a_step():
    for sampler, wanted in ((dpmpp_2m, 12), (dpmpp_2m_sde, 12), (unipc, 12), (lms, 12), (plms, 13)):
        data, asked = Mixture(), []

        def denoise(x, sigma, data=data, asked=asked):
            asked.append(sigma)
            return data.denoise(x, sigma)

        sampler(denoise, 80 * draw(1, 1, 2, 2), step_grid(EDM(1.0), 12, "karras"), noise=picture_noise(generators(1)))
        assert len(asked) == wanted, sampler


@pytest.mark.parametrize(
    "schedule",
    [RectifiedFlow(), VP.zero_terminal_snr(), VariancePreserving.cosine()],
    ids=["flow", "zero_terminal", "cosine"],
)
def test_from_pure_noise_nothing_blows_up(schedule):
    """On N(0, 1) with an exact denoiser the result has standard deviation 1; all is linear in x."""
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    denoise = lambda x, sigma: x / (1 + sigma**2)  # noqa: E731
    for name in ("unipc", "lms", "plms"):
        sigmas = step_grid(schedule, 10, SAMPLERS[name].grid_for(schedule))
        scale = math.sqrt(1 + float(sigmas[0]) ** 2)
        wanted = math.sqrt(1 + float(sigmas[-1]) ** 2)
        got = float(SAMPLERS[name].function(denoise, x * scale, sigmas))
        assert got / wanted == pytest.approx(1, abs=0.06), name


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpmpp_2m", "unipc", "lms", "plms"])
@pytest.mark.parametrize(("path", "steps"), [("scaled_linear", 20), ("linear", 20), ("cosine", 20), ("cosine", 250)])
def test_a_new_model_that_predicts_epsilon_bears_its_networks_rounding(path, steps, name):
    """On the cosine table, too, whose last row is 20291: times that, the rounding would be all that is left."""

    class Exact(torch.nn.Module):
        """eps of N(0.3, 0.5²), rounded to a data type."""

        def __init__(self, dtype):
            super().__init__()
            self.dtype = dtype

        def forward(self, sample, timestep):
            sigma = schedule.sigma(timestep).to(sample)[:, None, None, None]
            x = sample / schedule.alpha(sigma)
            return ((x - 0.3) * sigma / (0.25 + sigma**2)).to(self.dtype).to(sample)

    config = scheduler_config(path, "epsilon")
    schedule, prediction = schedule_from(config)
    sigmas = step_grid(schedule, steps, grid_of(config, schedule, name, None, 1))
    x = draw(64, 1, 8, 8) * float(sigmas[0])
    exact, rounded = (
        SAMPLERS[name].function(partial(Denoiser(Exact(dtype), schedule, prediction), context={}), x, sigmas)
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert float((rounded - exact).square().mean().sqrt()) < 0.03
    assert float(exact.std()) == pytest.approx(0.5, abs=0.1)


def test_bad_orders_say_what_was_got():
    for sampler in (unipc, lms):
        with pytest.raises(ValueError, match=f"order of {sampler.__name__} should be at least 1, got 0"):
            sampler(Mixture().denoise, draw(1, 1, 2, 2), [2.0, 1.0, 0.0], order=0)
