"""What the samplers share: the types of the call that `ldm.samplers` describes, their levels, and the one-step form."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from ldm.denoiser import Denoise

Noise = Callable[[Tensor], Tensor]
Callback = Callable[[int, float, Tensor, Tensor], None]  # step, sigma, x at sigma, estimate of x_0
# (x, sigma, lower) -> the level to go down to along the flow, and the standard deviation of the noise added there
Spread = Callable[[Tensor, float, float], tuple[float, Tensor | float]]


def steps_of(sigmas: Tensor | Sequence[float]) -> Iterator[tuple[int, float, float]]:
    """(step, its noise level, the next one), as numbers: the arithmetic of levels is in double precision."""
    levels = sigmas.tolist() if isinstance(sigmas, Tensor) else [float(sigma) for sigma in sigmas]
    falls = len(levels) > 1 and all(upper > lower > 0 for upper, lower in itertools.pairwise(levels[:-1]))
    if not falls or not math.inf > levels[0] or not levels[-2] >= levels[-1] >= 0 or levels[-2] == 0:
        raise ValueError(f"sigmas should be at least two and decrease from a finite level to 0 or above; got {levels}")
    for i in range(len(levels) - 1):
        yield i, levels[i], levels[i + 1]


def rising(sigmas: Tensor | Sequence[float]) -> list[float]:
    """The levels of a way to noise, as numbers; ValueError unless at least two, increasing from 0 or above."""
    levels = sigmas.tolist() if isinstance(sigmas, Tensor) else [float(sigma) for sigma in sigmas]
    rises = len(levels) > 1 and all(lower < upper for lower, upper in itertools.pairwise(levels))
    if not rises or not levels[0] >= 0 or not levels[-1] < math.inf:
        raise ValueError(f"sigmas should be at least two and increase from 0 or above to a finite level; got {levels}")
    return levels


def step_and_spread(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    spread: Spread,
    noise: Noise | None,
    callback: Callback | None,
) -> Tensor:
    """Each step goes down the probability flow to one level and adds noise of another: `spread` is both."""
    for i, sigma, lower in steps_of(sigmas):
        x0 = denoise(x, sigma)
        down, up = spread(x, sigma, lower)  # before the callback: a learned variance is that of the last run
        if callback:
            callback(i, sigma, x, x0)
        x = x0 + down / sigma * (x - x0)
        if isinstance(up, Tensor) or up > 0:
            x = x + up * drawn(noise, x)
    return x


def drawn(noise: Noise | None, x: Tensor) -> Tensor:
    """Noise like x; ValueError where the caller gave none."""
    if noise is None:
        raise ValueError("this sampler draws noise: give noise=, for instance picture_noise(generators)")
    return noise(x)
