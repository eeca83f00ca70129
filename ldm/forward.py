"""The forward process: its closed forms, and the two stochastic differential equations, forwards and back.

In x = x_0 + sigma * eps no distribution below knows the path: noise is added to x, and nothing is scaled. The papers'
x_t = alpha * x has the same distributions, scaled: `in_paper_units`. Levels are one number, or [B] for B pictures.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributions import Normal

from ldm.denoiser import Denoise, per_picture, score_from
from ldm.steps import Callback, Noise, drawn, rising, steps_of

Level = Tensor | float


def marginal(x0: Tensor, sigma: Level) -> Normal:
    """q(x_t | x_0) = N(x_0, sigma²), the closed form of the whole chain (DDPM, arXiv:2006.11239, equation 4)."""
    return _normal(x0, _like(sigma, x0))


def transition(x: Tensor, lower: Level, sigma: Level) -> Normal:
    """q(x_t | x_s) = N(x_s, sigma² - lower²) from x_s at the lower level to sigma, over one row of the table or many.

    In the papers' units of neighbouring rows: N(sqrt(1 - beta_t) x_s, beta_t) (arXiv:2006.11239, equation 2).
    """
    return _normal(x, _like((sigma**2 - lower**2) ** 0.5, x))


def posterior(x: Tensor, x0: Tensor, sigma: Level, lower: Level) -> Normal:
    """q(x_s | x_t, x_0) at the lower level, from x at sigma and x_0 (arXiv:2006.11239, equations 6 and 7).

    With an estimate for x_0 it is the model's p(x_s | x_t) of the small variance.
    """
    std = posterior_variance(sigma, lower) ** 0.5
    return _normal(x0 + _like(lower / sigma, x) ** 2 * (x - x0), _like(std, x))


def posterior_variance(sigma: Level, lower: Level) -> Level:
    """The papers' beta-tilde, DDPM's small variance: of x at the lower level, given x at sigma and x_0."""
    return lower**2 * (1 - (lower / sigma) ** 2)


def large_variance(sigma: Level, lower: Level) -> Level:
    """The papers' beta, DDPM's large variance, in x's units at the lower level: the true one where x_0 is N(0, I)."""
    return (1 + lower**2) * (sigma**2 - lower**2) / (1 + sigma**2)


def in_paper_units(normal: Normal, alpha: Level) -> Normal:
    """The distribution of x_t = alpha * x, where `normal` is that of x; alpha is `schedule.alpha` at x's own level."""
    factor = _like(alpha, normal.mean)
    return _normal(factor * normal.mean, factor * normal.stddev)


def forward_sde(
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    noise: Noise,
    *,
    alpha: Callable[[Tensor], Tensor] = torch.ones_like,
) -> Tensor:
    """From x at sigmas[0] to x at sigmas[-1] by Euler-Maruyama: weak order 1.

    In x_t = alpha * x, with the level itself for time (arXiv:2011.13456, equation 5, any clock's coefficients):

        dx_t = (dlog(alpha)/dsigma) x_t dsigma + alpha sqrt(2 sigma) dw

    With alpha = 1 that is the variance-exploding one, EDM's sigma(t) = t and s(t) = 1; with VariancePreserving's alpha
    it is dx_t = -beta(t)/2 x_t dt + sqrt(beta(t)) dw. They are one process in different units, but their steps differ.

    Args:
        x: [B, ...], at sigmas[0]; x_0 itself where that is 0.
        sigmas: [steps + 1], increasing.
        noise: drawn once a step.
        alpha: sigma -> factor on the signal; tells in which units the steps are taken. x is never scaled by it.

    Raises:
        ValueError: levels that do not increase from 0 or above.
    """
    for sigma, higher in itertools.pairwise(rising(sigmas)):
        x = _euler_maruyama(x, sigma, higher, 0.0, noise(x), alpha)
    return x


def reverse_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    alpha: Callable[[Tensor], Tensor] = torch.ones_like,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """The time-reversed process by Euler-Maruyama, from noise to data: weak order 1.

        dx_t = (dlog(alpha)/dsigma x_t - 2 sigma alpha² score(x_t)) dsigma + alpha sqrt(2 sigma) dw, sigma falling

    (arXiv:2011.13456, equation 6; score(x_t) = (D - x) / (alpha sigma²) by Tweedie's formula.) Ancestral sampling has
    the same limit. At 0 the score is infinite: on a step there x becomes the estimate of x_0. The call is that of
    `ldm.samplers`; alpha as in `forward_sde`.
    """
    for i, sigma, lower in steps_of(sigmas):
        x0 = denoise(x, sigma)
        if callback:
            callback(i, sigma, x, x0)
        if lower == 0:
            return x0
        drift = -2 * sigma * score_from(x, x0, sigma)
        x = _euler_maruyama(x, sigma, lower, drift, drawn(noise, x), alpha)
    return x


def _euler_maruyama(
    x: Tensor, sigma: float, to: float, drift: Tensor | float, z: Tensor, alpha: Callable[[Tensor], Tensor]
) -> Tensor:
    """One step of x_t = alpha * x from sigma to another level; drift: of x, without what scaling adds."""
    ends = torch.tensor([sigma, to], dtype=torch.float64)
    before, after = alpha(ends).tolist()
    slope = float(torch.func.grad(lambda level: alpha(level).log())(ends[0]))
    spread = (2 * sigma * abs(to - sigma)) ** 0.5
    return before / after * (x + (slope * x + drift) * (to - sigma) + spread * z)


def _normal(mean: Tensor, std: Level) -> Normal:
    return Normal(mean, std, validate_args=False)  # at level 0 a point, which torch would refuse


def _like(values: Level, x: Tensor) -> Level:
    """Values [B] in x's dtype, on its device and in the shape to multiply it; one number stays one number."""
    return per_picture(values.to(x), x) if isinstance(values, Tensor) else values
