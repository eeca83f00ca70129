"""Samplers: from noise to x_0 by a denoiser, each a plain function to hold beside its paper.

All share one call, `sampler(denoise, x, sigmas, *, noise=None, callback=None, ...) -> x at sigmas[-1]`:

    denoise: (x, sigma) -> estimate of x_0; sigma is one number.
    x: [B, C, H, W], x_0 + sigmas[0] * eps: in practice unit-normal latents times `Sampler.initial_scale`.
    sigmas: [steps + 1], decreasing, from `schedule.step_grid`; the last two may be equal.
    noise: x -> standard normal like x, for the samplers that draw (see `picture_noise`).
    callback: called once a step, before it moves, with (step, sigma, x at sigma, estimate of x_0 there).

In x = x_0 + sigma * eps the probability flow is dx/dsigma = (x - D) / sigma (arXiv:2206.00364, equation 1), and going
from sigma to a lower level along it in one step is D + lower / sigma * (x - D): the noise shrinks around the estimate.
Call them under `torch.no_grad()`, unless you want gradients through the whole run.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.schedule import RAMPS, SIGMA_INFINITY, Grid, NoiseSchedule, RectifiedFlow

Noise = Callable[[Tensor], Tensor]
Callback = Callable[[int, float, Tensor, Tensor], None]


def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM (arXiv:2010.02502, equations 12 and 16): eta 0 is deterministic, eta 1 is ancestral sampling."""

    def spread(sigma: float, lower: float) -> tuple[float, float]:
        up = eta * _posterior(sigma, lower)
        return math.sqrt(max(lower**2 - up**2, 0.0)), up

    return _step_and_spread(denoise, x, sigmas, spread, noise, callback)


def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method on the probability flow; the same as DDIM with eta 0. Draws no noise. Order 1."""
    return ddim(denoise, x, sigmas, noise=noise, callback=callback)


def euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler down past the next level, noise back up to it; the same as DDIM with eta 1, and DDPM's small variance."""
    return ddim(denoise, x, sigmas, eta=1.0, noise=noise, callback=callback)


def ddpm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    variance: str = "small",
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling (DDPM, arXiv:2006.11239, algorithm 2 and section 3.2): no noise on a step to 0.

    Args:
        variance: of the noise that a step adds. "small", the posterior's beta-tilde, is exact where the data is one
            point; "large", beta, where it is N(0, I). In between the error shrinks with the steps.
    """
    if variance not in ("small", "large"):
        raise ValueError(f"variance of ddpm should be small or large, got {variance!r}")

    def spread(sigma: float, lower: float) -> tuple[float, float]:
        up = _posterior(sigma, lower)
        if variance == "large" and lower > 0:
            up = math.sqrt((1 + lower**2) * (sigma**2 - lower**2) / (1 + sigma**2))
        return lower**2 / sigma, up

    return _step_and_spread(denoise, x, sigmas, spread, noise, callback)


@dataclass(frozen=True)
class Churn:
    """Noise that `heun` adds and removes again (arXiv:2206.00364, algorithm 2), by the paper's names.

    Attributes:
        s_churn: how much, over the whole run; a step raises sigma by s_churn / steps of itself, at most by 41%.
        s_tmin, s_tmax: the levels between which it does. On a table of timesteps keep s_tmax under the table's top.
        s_noise: standard deviation of the noise added.
    """

    s_churn: float
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    churn: Churn | None = None,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's method (EDM, arXiv:2206.00364, algorithm 1; with churn algorithm 2). Order 2, two evaluations a step.

    Steps to 0 and from pure noise (sigma >= 4096) are Euler steps: the correction scales with
    (sigma - lower) / (2 lower), which ends or blows up there.
    """
    steps = len(sigmas) - 1
    for i, sigma, lower in _steps(sigmas):
        if churn and churn.s_tmin <= sigma <= churn.s_tmax and churn.s_churn > 0:
            raised = sigma * (1 + min(churn.s_churn / steps, math.sqrt(2) - 1))
            x = x + math.sqrt(raised**2 - sigma**2) * churn.s_noise * _drawn(noise, x)
            sigma = raised
        x0 = denoise(x, sigma)
        if callback:
            callback(i, sigma, x, x0)
        ahead = x0 + lower / sigma * (x - x0)
        if lower > 0 and sigma < SIGMA_INFINITY:
            slope = (x - x0) / sigma
            slope_ahead = (ahead - denoise(ahead, lower)) / lower
            ahead = x + (lower - sigma) * (slope + slope_ahead) / 2
        x = ahead
    return x


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2). Order 2 from one evaluation a step. Draws no noise.

    The first step, having no step before it, is an Euler step; so are the last one to 0, and, as in diffusers, the
    last of a run of less than 15 steps.
    """
    steps = len(sigmas) - 1
    x0_before, h_before = x, 0.0
    for i, sigma, lower in _steps(sigmas):
        x0 = denoise(x, sigma)
        if callback:
            callback(i, sigma, x, x0)
        h = math.log(sigma / lower) if lower > 0 else math.inf
        first_order = i == 0 or (i == steps - 1 and (lower == 0 or steps < 15))
        # Second order: D extrapolated to half of the step ahead, in log sigma.
        target = x0 if first_order else x0 + h / (2 * h_before) * (x0 - x0_before)
        x = target + lower / sigma * (x - target)
        x0_before, h_before = x0, h
    return x


def picture_noise(generators: Sequence[torch.Generator]) -> Noise:
    """Noise from one generator for each picture: picture i's numbers are the same alone and in a batch.

    Returns:
        A function of x [B, ...], B = len(generators), to standard normal numbers of x's shape, dtype and device. They
        are drawn in float32 on the generator's device, as diffusers does for a list of generators.
    """

    def noise(x: Tensor) -> Tensor:
        if len(x) != len(generators):
            raise ValueError(f"{len(generators)} generators for {len(x)} pictures: give one to each")
        drawn = [torch.randn(x.shape[1:], generator=g, device=g.device, dtype=torch.float32) for g in generators]
        return torch.stack([picture.to(x.device, x.dtype) for picture in drawn])

    return noise


@dataclass(frozen=True)
class Sampler:
    """A sampler by its name, with what the diffusers scheduler of that name does by default.

    Attributes:
        function: the sampler.
        grid: the scheduler's step grid on a table of timesteps.
        euler_family: in diffusers these start spaced by linspace or trailing at sigma times the latents, not at
            sqrt(1 + sigma²) times, and their ramps run over the levels of the spacing, not of the table.
    """

    function: Callable[..., Tensor]
    grid: Grid
    euler_family: bool = False

    def grid_for(
        self,
        schedule: NoiseSchedule,
        *,
        spacing: str | None = None,
        offset: int | None = None,
        final: str | None = None,
        ramp: str | None = None,
    ) -> Grid:
        """The grid to take on a schedule; what is given replaces the default.

        The default is the scheduler's own on a table of betas, but "trailing" instead of "leading" where the table
        ends in pure noise, which leading steps never visit (arXiv:2305.08891, section 3.3). On the flow t is spaced
        evenly, from 1 to 1/1000 as in FlowMatchEulerDiscreteScheduler, for DPM++ to 1/steps as with its
        use_flow_sigmas. For EDM it is Karras.

        Args:
            spacing, offset, final: as in Grid; a model folder's scheduler config may name them.
            ramp: "karras" or "exponential" (diffusers' use_karras_sigmas, use_exponential_sigmas).
        """
        if spacing in RAMPS:
            spacing, ramp = None, spacing
        if schedule.entries == 0:
            return Grid(ramp or spacing or "karras", final=final or "zero")
        grid = self.grid
        if isinstance(schedule, RectifiedFlow):
            grid = Grid("trailing") if grid.extra else Grid("linspace", whole=False)
        if schedule.clamped and grid.spacing == "leading":
            grid = replace(grid, spacing="trailing")
        grid = replace(
            grid,
            spacing=grid.spacing if spacing is None else spacing,
            offset=grid.offset if offset is None else offset,
            final=grid.final if final is None else final,
        )
        if ramp is None:
            return grid
        return replace(grid, spacing=ramp, span=grid.spacing if self.euler_family else "table")

    def initial_scale(self, grid: Grid, sigma: Tensor | float) -> float:
        """What unit-normal latents are multiplied by to start at noise level sigma.

        sqrt(1 + sigma²): x = x_0 + sigma * eps, where x_0 has unit variance, so that the network sees the latents
        themselves; for diffusers' Euler family see above.
        """
        spacing = grid.spacing if grid.spacing not in RAMPS else grid.span
        if self.euler_family and spacing != "leading":
            return float(sigma)
        return math.sqrt(1 + float(sigma) ** 2)


SAMPLERS = {
    "ddpm": Sampler(ddpm, Grid("leading")),
    "ddim": Sampler(ddim, Grid("leading")),
    "euler": Sampler(euler, Grid("linspace", whole=False), euler_family=True),
    "euler_ancestral": Sampler(euler_ancestral, Grid("linspace", whole=False), euler_family=True),
    "heun": Sampler(heun, Grid("linspace", whole=False), euler_family=True),
    "dpmpp_2m": Sampler(dpmpp_2m, Grid("linspace", extra=1)),
}


def _step_and_spread(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    spread: Callable[[float, float], tuple[float, float]],
    noise: Noise | None,
    callback: Callback | None,
) -> Tensor:
    """Each step goes down the probability flow to one level and adds noise of another: spread(sigma, lower) is both."""
    for i, sigma, lower in _steps(sigmas):
        x0 = denoise(x, sigma)
        if callback:
            callback(i, sigma, x, x0)
        down, up = spread(sigma, lower)
        x = x0 + down / sigma * (x - x0)
        if up > 0:
            x = x + up * _drawn(noise, x)
    return x


def _posterior(sigma: float, lower: float) -> float:
    """Standard deviation of x at the lower level, given x at sigma and x_0 (arXiv:2006.11239, equation 7)."""
    return lower * math.sqrt(max(1 - (lower / sigma) ** 2, 0.0))


def _steps(sigmas: Tensor | Sequence[float]) -> Iterator[tuple[int, float, float]]:
    """(step, its noise level, the next one), as numbers: the arithmetic of levels is in double precision."""
    levels = sigmas.tolist() if isinstance(sigmas, Tensor) else [float(sigma) for sigma in sigmas]
    falls = len(levels) > 1 and all(upper > lower > 0 for upper, lower in itertools.pairwise(levels[:-1]))
    if not falls or not math.inf > levels[0] or not levels[-2] >= levels[-1] >= 0 or levels[-2] == 0:
        raise ValueError(f"sigmas should be at least two and decrease from a finite level to 0 or above; got {levels}")
    for i in range(len(levels) - 1):
        yield i, levels[i], levels[i + 1]


def _drawn(noise: Noise | None, x: Tensor) -> Tensor:
    if noise is None:
        raise ValueError("this sampler draws noise: give noise=, for instance picture_noise(generators)")
    return noise(x)
