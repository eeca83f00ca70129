"""Inversion: encoding against exact quantiles, against diffusers, and there and back."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMInverseScheduler

from ldm.denoiser import Denoiser
from ldm.samplers import SAMPLERS, ddim, dpmpp_2m, euler, heun, invert
from ldm.schedule import EDM, SIGMA_INFINITY, RectifiedFlow, step_grid
from tests.sampling import BOTTOM, LATENTS, LEADING, SD, TOP, VP, Mixture, Network, P, close, draw, grid, unscaled

STEPS = (40, 80, 160)


def orders(errors):
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


@pytest.mark.parametrize("order", [1, 2])
def test_encoding_follows_the_quantiles_upward(order):
    data = Mixture()
    start, end = data.quantiles(P, BOTTOM), data.quantiles(P, TOP)
    errors = [float((invert(data.denoise, start, grid(n + 1).flip(0), order=order) - end).abs().mean()) for n in STEPS]
    assert orders(errors)[-1] == pytest.approx(order, abs=0.1), errors


@pytest.mark.parametrize(
    ("sampler", "order", "wanted"),
    [(euler, 1, 1), (ddim, 1, 1), (heun, 2, 3), (dpmpp_2m, 2, 2)],
)
def test_there_and_back_the_error_shrinks_with_the_steps(sampler, order, wanted):
    """From x_0 and back to it. Heun's errors of order 2 up and down cancel: 3."""
    data = Mixture()
    x0, errors = data.quantiles(P, 0.0), []
    for n in STEPS:
        sigmas = step_grid(EDM(1.0), n, "karras")
        back = sampler(data.denoise, invert(data.denoise, x0, sigmas.flip(0), order=order), sigmas)
        errors.append(float((back - x0).abs().mean()))
    assert orders(errors)[-1] == pytest.approx(wanted, abs=0.35), errors


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_order_1_is_ddim_inversion_as_diffusers_has_it_but_for_the_clock(prediction):
    """They ask the network at the clock of the level gone to, which is not Euler's method; here both ask at x's own."""
    sigmas = step_grid(VP, 20, SAMPLERS["ddim"].grid_for(VP, **LEADING, final="sigma_min")).flip(0)
    clock = VP.timestep(sigmas).float()
    types = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}
    scheduler = DDIMInverseScheduler(
        **SD, steps_offset=1, clip_sample=False, set_alpha_to_one=False, prediction_type=types[prediction]
    )
    scheduler.set_timesteps(20)
    network, x_t, expected, got = Network(), LATENTS, [], []
    with torch.no_grad():
        for t, own in zip(scheduler.timesteps, clock, strict=False):
            expected.append(x_t)
            x_t = scheduler.step(network(x_t, own), t, x_t).prev_sample
        last = invert(
            Denoiser(network, VP, prediction),
            LATENTS / float(VP.alpha(sigmas[0])),
            sigmas,
            callback=lambda i, sigma, x, x0: got.append(x),
        )
    close(unscaled([*got, last], sigmas), [*expected, x_t])


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VP.zero_terminal_snr()], ids=["flow", "zero_terminal"])
@pytest.mark.parametrize("order", [1, 2])
def test_encoding_goes_up_to_pure_noise(schedule, order):
    """On N(0, 1) with an exact denoiser unit-normal pictures become unit-normal latents; all is linear in x."""
    sigmas = step_grid(schedule, 60, "karras").flip(0)
    up = invert(lambda x, sigma: x / (1 + sigma**2), torch.ones(1, 1, 1, 1, dtype=torch.float64), sigmas, order=order)
    assert float(up) / math.sqrt(1 + schedule.sigma_max**2) == pytest.approx(1, abs=0.15 if order == 1 else 0.01)


@pytest.mark.parametrize("order", [1, 2])
def test_the_step_from_0_undoes_the_samplers_step_to_0_to_first_order(order):
    """They go from x at the lowest level to D(x); so from x_0 up by x_0 - D(x_0), and no second evaluation."""
    data, x0 = Mixture(), draw(2, 1, 2, 2)
    torch.testing.assert_close(invert(data.denoise, x0, [0.0, 0.4], order=order), 2 * x0 - data.denoise(x0, 0.4))
    up = invert(data.denoise, x0, [0.4, SIGMA_INFINITY], order=order)  # to pure noise likewise
    slope = (x0 - data.denoise(x0, 0.4)) / 0.4
    torch.testing.assert_close(up, x0 + (SIGMA_INFINITY - 0.4) * slope)


def test_the_callback_sees_each_step():
    data, seen, levels = Mixture(), [], [0.0, 0.1, 0.5, 3.0]
    x = draw(2, 1, 2, 2)
    invert(data.denoise, x, levels, order=2, callback=lambda *state: seen.append(state))
    assert [(i, sigma) for i, sigma, *_ in seen] == list(enumerate(levels[:-1]))
    assert torch.equal(seen[0][2], x)
    for _, sigma, x, x0 in seen:
        torch.testing.assert_close(x0, data.denoise(x, sigma or 0.1))


def test_bad_calls_say_what_was_got():
    data, x = Mixture(), draw(1, 1, 2, 2)
    for wrong in ([0.0], [], [1.0, 0.0], [0.0, 1.0, 1.0], [-1.0, 1.0], [0.0, math.inf], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="increase from 0 or above to a finite level"):
            invert(data.denoise, x, wrong)
    with pytest.raises(ValueError, match=r"1 \(Euler\) or 2 \(Heun\), got 3"):
        invert(data.denoise, x, [0.0, 1.0], order=3)
