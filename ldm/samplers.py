"""Samplers: from noise to x_0 by a denoiser, each a plain function to hold beside its paper.

Here are the one-step samplers and the table of all; the others are in `ldm.multistep` and `ldm.langevin`. All share one
call, `sampler(denoise, x, sigmas, *, noise=None, callback=None, ...) -> x at sigmas[-1]`:

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.denoiser import Denoise, epsilon_from
from ldm.forward import large_variance, posterior_variance
from ldm.langevin import langevin, predictor_corrector
from ldm.multistep import dpmpp_2m, dpmpp_2m_sde, lms, plms, unipc
from ldm.schedule import RAMPS, SIGMA_INFINITY, Grid, NoiseSchedule, RectifiedFlow
from ldm.steps import Callback, Noise, drawn, rising, step_and_spread, steps_of

LogVariance = Callable[[Tensor, float], Tensor]  # (x, sigma) -> v like x, as `ddpm` takes it


def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM (arXiv:2010.02502, equations 12 and 16): eta 0 is deterministic, eta 1 is ancestral sampling.

    Raises ValueError unless 0 <= eta <= 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}: expected from 0 (no noise is added) to 1 (as much as in ancestral sampling)")

    def spread(x: Tensor, sigma: float, lower: float) -> tuple[float, float]:
        up = eta * math.sqrt(posterior_variance(sigma, lower))
        return math.sqrt(max(lower**2 - up**2, 0.0)), up

    return step_and_spread(denoise, x, sigmas, spread, noise, callback)


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
    variance: str | LogVariance = "small",
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling (DDPM, arXiv:2006.11239, algorithm 2 and section 3.2): no noise on a step to 0.

    Args:
        variance: of the noise that a step adds. "small", the posterior's beta-tilde, is exact where the data is one
            point; "large", beta, where it is N(0, I). In between the error shrinks with the steps. Or a learned one
            (arXiv:2102.09672, equation 15): a function to v, where the log-variance lies between the small one (0) and
            the large one (1), like x. It is called right after `denoise`, with the same x and sigma, so that both can
            share one run of the network.
    """
    if not callable(variance) and variance not in ("small", "large"):
        raise ValueError(f"variance of ddpm should be small or large, or a function; got {variance!r}")

    def spread(x: Tensor, sigma: float, lower: float) -> tuple[float, Tensor | float]:
        if lower in (0, sigma):
            return lower, 0.0
        small, large = math.sqrt(posterior_variance(sigma, lower)), math.sqrt(large_variance(sigma, lower))
        if callable(variance):
            return lower**2 / sigma, small * (large / small) ** variance(x, sigma)
        return lower**2 / sigma, small if variance == "small" else large

    return step_and_spread(denoise, x, sigmas, spread, noise, callback)


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
    for i, sigma, lower in steps_of(sigmas):
        if churn and churn.s_tmin <= sigma <= churn.s_tmax and churn.s_churn > 0:
            raised = sigma * (1 + min(churn.s_churn / steps, math.sqrt(2) - 1))
            x = x + math.sqrt(raised**2 - sigma**2) * churn.s_noise * drawn(noise, x)
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


def stochastic_heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """`heun` with the churn that EDM's paper found for ImageNet (its table 5), never raising sigma above the level that
    sampling starts from."""
    churn = Churn(40, 0.05, min(50.0, float(sigmas[0]) / math.sqrt(2)), 1.003)
    return heun(denoise, x, sigmas, churn=churn, noise=noise, callback=callback)


def invert(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    order: int = 1,
    callback: Callback | None = None,
) -> Tensor:
    """Encoding: up the probability flow, to the noise that the deterministic samplers turn back into x.

    Order 1 is DDIM's inversion (arXiv:2010.02502, section 4.3), Euler's method, order 2 Heun's, with two evaluations a
    step. The step from 0, where the flow's slope has no quotient, is an Euler step along the slope at its upper end;
    one to pure noise (sigma >= 4096) is an Euler step as in `heun`, which it undoes.

    Args:
        x: [B, C, H, W], x_0 where sigmas[0] is 0.
        sigmas: [steps + 1], increasing: those of sampling, flipped.
        callback: as in all samplers; at level 0 the estimate is that of the level above.

    Returns:
        x at sigmas[-1]; unit-normal latents are that over `Sampler.initial_scale`.
    """
    levels = rising(sigmas)
    if order not in (1, 2):
        raise ValueError(f"order of invert should be 1 (Euler) or 2 (Heun), got {order}")
    for i, (sigma, upper) in enumerate(itertools.pairwise(levels)):
        level = sigma or upper
        x0 = denoise(x, level)
        if callback:
            callback(i, sigma, x, x0)
        slope = epsilon_from(x, x0, level)
        ahead = x + (upper - sigma) * slope
        if order == 2 and sigma > 0 and upper < SIGMA_INFINITY:
            slope_ahead = epsilon_from(ahead, denoise(ahead, upper), upper)
            ahead = x + (upper - sigma) * (slope + slope_ahead) / 2
        x = ahead
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
        pictures = [torch.randn(x.shape[1:], generator=g, device=g.device, dtype=torch.float32) for g in generators]
        return torch.stack([picture.to(x.device, x.dtype) for picture in pictures])

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
        evenly, from 1 to 1/1000 as in FlowMatchEulerDiscreteScheduler, for DPM++ and UniPC to 1/steps as with their
        use_flow_sigmas. For EDM it is Karras; "trailing" is that without the lowest level, from which a step of its own
        would hardly change a picture. A sampler whose own grid is a ramp takes that everywhere.

        Args:
            spacing, offset, final: as in Grid; a model folder's scheduler config may name them.
            ramp: "karras" or "exponential" (diffusers' use_karras_sigmas, use_exponential_sigmas).
        """
        if spacing in RAMPS:
            spacing, ramp = None, spacing
        grid, own_ramp = self.grid, self.grid.spacing in RAMPS
        if schedule.entries == 0 and spacing == "trailing":
            return Grid(ramp or "karras", extra=1, final=final or "zero")
        if schedule.entries == 0:
            return Grid(ramp or spacing or (grid.spacing if own_ramp else "karras"), final=final or "zero")
        if isinstance(schedule, RectifiedFlow) and not own_ramp:
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
        return replace(grid, spacing=ramp, extra=0, span=grid.spacing if self.euler_family else "table")

    def initial_scale(self, grid: Grid, sigma: Tensor | float) -> float:
        """What unit-normal latents are multiplied by to start at noise level sigma.

        sqrt(1 + sigma²): x = x_0 + sigma * eps, where x_0 has unit variance, so that the network sees the latents
        themselves; diffusers' Euler family differs (`euler_family`).
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
    "stochastic_heun": Sampler(stochastic_heun, Grid("linspace", whole=False), euler_family=True),
    "dpmpp_2m": Sampler(dpmpp_2m, Grid("linspace", extra=1)),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, Grid("linspace", extra=1)),
    "unipc": Sampler(unipc, Grid("linspace", extra=1)),
    "lms": Sampler(lms, Grid("linspace", whole=False), euler_family=True),
    "plms": Sampler(plms, Grid("leading", final="sigma_min")),
    # Their papers' geometric levels, whatever the schedule.
    "langevin": Sampler(langevin, Grid("exponential")),
    "predictor_corrector": Sampler(predictor_corrector, Grid("exponential")),
}
