"""Multistep samplers: the estimates of earlier steps make a step exact to a higher order, at one evaluation a step.

Each takes the polynomial through what is known at this level and the levels before it and integrates it over the step:

    along sigma          dx/dsigma = eps                     lms: the polynomial in sigma
                                                             plms: the same, as if the levels were evenly spaced
    along log(sigma)     x' = r x + ∫ exp(s - h) D ds        unipc, and dpmpp_2m where h is the step, r = exp(-h)

The second is the same flow with its linear part solved exactly (arXiv:2211.01095, proposition 4.1). The call is that of
`ldm.samplers`, which lists all samplers.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.forward import posterior_variance
from ldm.schedule import SIGMA_INFINITY
from ldm.steps import Callback, Noise, Spread, drawn, steps_of

# Adams and Bashforth's weights of the slopes, the latest first, after one to four evenly spaced levels.
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2). Order 2. Draws no noise.

    The first step, having no step before it, is an Euler step; so are the last one to 0, and, as in diffusers, the
    last of a run of fewer than 15 steps.
    """
    return _second_order(denoise, x, sigmas, lambda x, sigma, lower: (lower, 0.0), noise, callback)


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """SDE-DPM-Solver++(2M) (arXiv:2211.01095): ancestral steps towards the estimate that dpmpp_2m extrapolates."""

    def spread(x: Tensor, sigma: float, lower: float) -> tuple[float, float]:
        return lower**2 / sigma, math.sqrt(posterior_variance(sigma, lower))

    return _second_order(denoise, x, sigmas, spread, noise, callback)


def unipc(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    order: int = 2,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """UniPC with B(h) = exp(h) - 1, "bh2" (arXiv:2302.04867), on estimates of x_0. Draws no noise.

    Each step predicts from `order` estimates. The next evaluation, at the predicted x, then also corrects the step that
    led to it, so that the result has order + 1, as far as the first steps, which have fewer before them, allow (3 in
    the limit). The last steps, as in diffusers, are of lower order: that to sigmas[-1] is an Euler step, which leaves
    order 2 where sigmas[-1] > 0. Order 2 predicts as dpmpp_2m does.

    Args:
        order: of the predictor, at least 1; 2 is the authors' for guided sampling, 3 for unguided.
    """
    if order < 1:
        raise ValueError(f"order of unipc should be at least 1, got {order}")
    steps, before = len(sigmas) - 1, x
    known: list[tuple[float, Tensor]] = []  # (level, estimate of x_0 there), the latest first
    for i, sigma, lower in steps_of(sigmas):
        x0 = denoise(x, sigma)
        if callback:
            callback(i, sigma, x, x0)
        if i > 0:
            x = _along_log_sigma(before, sigma, [*known, (sigma, x0)])
        known = [(sigma, x0), *known][: min(order, steps - i)]
        before, x = x, _along_log_sigma(x, lower, known)
    return x


def lms(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    order: int = 4,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Linear multistep: Adams and Bashforth's method on the probability flow, for any levels. Draws no noise.

    The polynomial through the last slopes is integrated exactly. The first steps, having fewer before them, are of
    order 1, 2, ...; the step to 0 is not an Euler step.

    Args:
        order: how many slopes, at least 1.
    """
    if order < 1:
        raise ValueError(f"order of lms should be at least 1, got {order}")
    known: list[tuple[float, Tensor]] = []  # (level, slope there), the latest first
    for i, sigma, lower in steps_of(sigmas):
        x0 = denoise(x, sigma)
        if callback:
            callback(i, sigma, x, x0)
        known = [(sigma, (x - x0) / sigma), *known][:order]
        reach = lower / sigma - 1  # in units of sigma, as the places are
        moments = [sigma * reach ** (j + 1) / (j + 1) for j in range(len(known))]
        weights = _weights([level / sigma - 1 for level, _ in known], moments)
        x = x + sum(weight * slope for weight, (_, slope) in zip(weights, known, strict=True))
    return x


def plms(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Pseudo linear multistep (PNDM, arXiv:2202.09778, equations 9 and 12): Stable Diffusion's first. Draws no noise.

    Euler steps along an average of the last four slopes whose weights are those of even steps, as the clock's are. That
    leaves order 2 in sigma. The first step is one of Heun's, with two evaluations, as in Stable Diffusion (the paper
    begins with three of Runge and Kutta's), but from pure noise or to 0 one of Euler's.
    """
    slopes: list[Tensor] = []  # the latest first
    for i, sigma, lower in steps_of(sigmas):
        x0 = denoise(x, sigma)
        if callback:
            callback(i, sigma, x, x0)
        slopes = [(x - x0) / sigma, *slopes][: len(ADAMS_BASHFORTH)]
        slope = torch.zeros_like(x)
        for weight, known in zip(ADAMS_BASHFORTH[len(slopes) - 1], slopes, strict=True):
            slope = slope + weight * known
        if i == 0 and lower > 0 and sigma < SIGMA_INFINITY:
            ahead = x + (lower - sigma) * slope
            slope = (slope + (ahead - denoise(ahead, lower)) / lower) / 2
        x = x + (lower - sigma) * slope
    return x


def _second_order(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    spread: Spread,
    noise: Noise | None,
    callback: Callback | None,
) -> Tensor:
    """One-step form, but with D extrapolated from the step before to half of the step ahead, in log sigma."""
    steps = len(sigmas) - 1
    x0_before, h_before = x, 0.0
    for i, sigma, lower in steps_of(sigmas):
        x0 = denoise(x, sigma)
        if callback:
            callback(i, sigma, x, x0)
        h = math.log(sigma / lower) if lower > 0 else math.inf
        first_order = i == 0 or (i == steps - 1 and (lower == 0 or steps < 15))
        target = x0 if first_order else x0 + h / (2 * h_before) * (x0 - x0_before)
        down, up = spread(x, sigma, lower)
        x = target + down / sigma * (x - target)
        if isinstance(up, Tensor) or up > 0:
            x = x + up * drawn(noise, x)
        x0_before, h_before = x0, h
    return x


def _along_log_sigma(x: Tensor, to: float, known: Sequence[tuple[float, Tensor]]) -> Tensor:
    """x at the level `to` from x at known[0]'s, where `known` are estimates of x_0 by their levels.

    Of two estimates the one beside known[0] takes half of its share's weight, which is where B(h) = exp(h) - 1 enters
    (arXiv:2302.04867, section 3.1); of more, B(h) cancels, and all is as the polynomial through them has it.
    """
    sigma = known[0][0]
    h = math.log(sigma / to) if to > 0 else math.inf
    moments = [-math.expm1(-h)]  # ∫ exp(s - h) s^j ds over the step, s from 0 to h
    if len(known) == 2:
        moments.append(h / 2 * moments[0])
    for j in range(len(moments), len(known)):
        moments.append(h**j - j * moments[-1])
    weights = _weights([math.log(sigma / level) for level, _ in known], moments)
    return to / sigma * x + sum(weight * x0 for weight, (_, x0) in zip(weights, known, strict=True))


def _weights(places: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Weights of values at places that give every polynomial through them its integral; moments: of 1, s, s², ..."""
    powers = torch.tensor(places, dtype=torch.float64) ** torch.arange(len(places)).view(-1, 1)
    return torch.linalg.solve(powers, torch.tensor(moments, dtype=torch.float64)).tolist()
