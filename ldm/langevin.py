"""Samplers by Langevin dynamics: random walks along the score that leave the density of a noise level as it is.

The score at sigma is (D - x) / sigma² (Tweedie's formula, `ldm.denoiser.score_from`). The call is that of
`ldm.samplers`, which lists all samplers.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.denoiser import Denoise, score_from
from ldm.forward import posterior_variance
from ldm.schedule import SIGMA_INFINITY
from ldm.steps import Callback, Noise, drawn, steps_of


def langevin(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    step_size: float = 0.2,
    updates: int = 100,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Annealed Langevin dynamics (arXiv:1907.05600, algorithm 1): at each level after sigmas[0] `updates` times

        x <- x + alpha / 2 * score(x) + sqrt(alpha) * z,    alpha = step_size * sigma²

    and, where sigmas[-1] is 0, the estimate of x_0 to end with (arXiv:2009.05475), which takes the last noise away.
    Many updates are needed because nothing else carries x to the next level: x forgets as (1 - step_size / 2)^updates.
    With only one level it is plain Langevin dynamics, which does not find the weights of modes that lie far apart. From
    pure noise (sigma >= 4096) x first goes to the next level along the flow.

    Args:
        step_size: the paper's epsilon / sigma_L², theirs 2e-5 / 0.01². It leaves at each level a variance too large by
            up to step_size / (4 - step_size) of itself.
        updates: of x at each level, at least 1: an evaluation of the denoiser each, and one more for the level before.
    """
    if not 0 < step_size < 2 or updates < 1:
        raise ValueError(f"langevin needs 0 < step_size < 2 and updates of at least 1, got {step_size=}, {updates=}")
    for i, sigma, lower in steps_of(sigmas):
        x0 = denoise(x, sigma)
        if callback:
            callback(i, sigma, x, x0)
        if lower == 0:
            return x0
        if sigma >= SIGMA_INFINITY:
            x = x0 + lower / sigma * (x - x0)
        for _ in range(updates):
            pull = lower**2 * score_from(x, denoise(x, lower), lower)
            x = x + step_size / 2 * pull + math.sqrt(step_size) * lower * drawn(noise, x)
    return x


def predictor_corrector(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    snr: float = 0.16,
    corrections: int = 1,
    ancestral: bool = False,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Predictor-corrector sampling (arXiv:2011.13456, algorithm 2 with the corrector of algorithm 4).

    The predictor goes to the next level by the reverse SDE ("reverse diffusion"); the corrector then moves x at that
    level by Langevin dynamics, towards its density. On a step to 0 x becomes the estimate of x_0.

    Args:
        snr: of a correction, r in the paper; its step is 2 (r |z| / |score|)², of each picture by itself, so
            pictures should have many pixels. 0.16 is the authors' for CIFAR-10.
        corrections: evaluations of the corrector at each level; with 0 the predictor is alone.
        ancestral: add the posterior's noise (appendix F) instead of reverse diffusion's, of variance sigma² - lower²,
            which is too much where steps are large. From pure noise (sigma >= 4096) it is always the posterior's.
    """
    if snr <= 0 or corrections < 0:
        raise ValueError(f"predictor_corrector needs snr > 0 and corrections of at least 0, got {snr=}, {corrections=}")
    for i, sigma, lower in steps_of(sigmas):
        x0 = denoise(x, sigma)
        if callback:
            callback(i, sigma, x, x0)
        if lower == 0:
            return x0
        drop = sigma**2 - lower**2
        variance = posterior_variance(sigma, lower) if ancestral or sigma >= SIGMA_INFINITY else drop
        x = x + drop * score_from(x, x0, sigma) + math.sqrt(variance) * drawn(noise, x)
        for _ in range(corrections):
            score, z = score_from(x, denoise(x, lower), lower), drawn(noise, x)
            step = 2 * (snr * _norm(z) / _norm(score)) ** 2
            x = x + step * score + (2 * step).sqrt() * z
    return x


def _norm(x: Tensor) -> Tensor:
    """Length of each picture as a vector: [B, 1, 1, 1]."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
