"""Data whose denoisers are known, and a network, to hold samplers against closed forms and against diffusers."""

import math

import numpy as np
import torch
from scipy import stats
from torch import nn

from ldm.denoiser import Denoiser
from ldm.samplers import SAMPLERS
from ldm.schedule import EDM, VariancePreserving, step_grid

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VP = VariancePreserving.scaled_linear()


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


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
