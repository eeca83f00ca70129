"""Noise schedules: how noise level, clock and the scale of the network's input belong together, and step grids.

A path is x_t = alpha * (x_0 + sigma * eps). Everything here is a function of sigma, the noise over the signal, in the
units of x_0: latents of unit variance, unless EDM is told otherwise (docs/equations.md). A schedule answers three
questions about it:

    alpha(sigma)     the factor on the signal, so that alpha * x is what the network sees
    timestep(sigma)  the network's clock
    sigma(t)         the level at a time of the clock, the inverse of `timestep`

and `step_grid` lists the levels of a sampling run.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

# Where alpha is 0 (t = 1 of the flow, zero terminal SNR) sigma is infinite. This level stands for it: the signal is
# 1/4096 of the noise, less than a half-precision network resolves. Samplers take levels from here on for pure noise.
SIGMA_INFINITY = 4096.0

SPACINGS = ("leading", "trailing", "linspace")
RAMPS = ("karras", "exponential")


def _floating(value: Tensor | float) -> Tensor:
    """The value as a tensor of float32 or better."""
    value = torch.as_tensor(value)
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


class NoiseSchedule(ABC):
    """What all schedules share.

    Attributes:
        sigma_min, sigma_max: the lowest and the highest noise level that sampling uses.
        clamped: sigma_max stands for infinity, because alpha is 0 there.
        entries: how many rows the table of timesteps has, from which grids are spaced; 0 for a schedule without one.
    """

    sigma_min: float
    sigma_max: float
    clamped: bool = False
    entries: int = 0

    @property
    def ends_in_noise(self) -> bool:
        """Whether nothing is left of the signal at sigma_max: of what is clamped, and of the cosine table."""
        return self.sigma_max >= SIGMA_INFINITY

    @abstractmethod
    def alpha(self, sigma: Tensor | float) -> Tensor:
        """Factor on the signal at noise level sigma; the shape of sigma."""

    @abstractmethod
    def sigma(self, t: Tensor | float) -> Tensor:
        """Noise level at time t of the network's clock; the shape of t."""

    @abstractmethod
    def timestep(self, sigma: Tensor | float) -> Tensor:
        """Time on the network's clock at noise level sigma; the shape of sigma."""

    def entry(self, index: Tensor) -> Tensor:
        """Noise level of row `index` of the table, between rows too; float64."""
        raise ValueError(f"{type(self).__name__} has no table of timesteps: space the steps by one of {RAMPS}")

    def clamp(self, sigma: Tensor) -> Tensor:
        """Sigma cut to the range where the clock tells levels apart."""
        return sigma.clamp(self.sigma_min, self.sigma_max)


class VariancePreserving(NoiseSchedule):
    """Variance-preserving path over a table of betas: DDPM (arXiv:2006.11239, equation 4) and Stable Diffusion.

    alpha² = 1 / (1 + sigma²) is the papers' alpha-bar. The clock is the row of the table, log-linear in sigma between
    rows and held at either end. Rows hold float32 numbers, so that a level and its row turn into each other exactly.

    Args:
        betas: [T] with T >= 2, each inside (0, 1). Products are taken in the dtype given: float32 betas give
            diffusers' tables to the bit, anything else is float64.
        clamped: the last row stands for infinite sigma.

    Raises:
        ValueError: betas that are not such a list.
    """

    def __init__(self, betas: Tensor | Sequence[float], *, clamped: bool = False):
        betas = betas if isinstance(betas, Tensor) and betas.dtype == torch.float32 else _double(betas)
        if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(
                f"betas should be a list of at least two numbers inside (0, 1), got shape {tuple(betas.shape)}"
                + (f" from {betas.min():g} to {betas.max():g}" if betas.numel() else "")
                + "; for a table that ends in pure noise (beta 1) call zero_terminal_snr() on the one before rescaling"
            )
        self.betas = betas.cpu()
        self.alphas_cumprod = torch.cumprod(1 - self.betas, 0).double()
        self.clamped = clamped
        self.table = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().float().double()  # [T], increasing
        self.entries = len(self.table)
        self.sigma_min, self.sigma_max = float(self.table[0]), float(self.table[-1])
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor | Sequence[float], *, clamped: bool = False) -> Self:
        """From the products alpha-bar, [T], decreasing inside (0, 1); taken in float64."""
        alphas_cumprod = _double(alphas_cumprod)
        return cls(1 - alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]]), clamped=clamped)

    @classmethod
    def linear(cls, beta_start: float = 1e-4, beta_end: float = 0.02, num_train_timesteps: int = 1000) -> Self:
        """Betas evenly spaced (DDPM, arXiv:2006.11239, section 4)."""
        return cls(torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float32))

    @classmethod
    def scaled_linear(cls, beta_start: float = 85e-5, beta_end: float = 0.012, num_train_timesteps: int = 1000) -> Self:
        """Roots of the betas evenly spaced (latent diffusion, arXiv:2112.10752), by default Stable Diffusion's."""
        return cls(torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float32) ** 2)

    @classmethod
    def cosine(cls, num_train_timesteps: int = 1000) -> Self:
        """alpha-bar = cos² of time, betas at most 0.999 (arXiv:2102.09672, eq. 17); diffusers' squaredcos_cap_v2."""
        times = (i / num_train_timesteps for i in range(num_train_timesteps + 1))
        bars = [math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 for t in times]
        betas = [min(1 - after / before, 0.999) for before, after in itertools.pairwise(bars)]
        return cls(torch.tensor(betas, dtype=torch.float32))

    def zero_terminal_snr(self) -> Self:
        """The same table shifted and scaled to end in pure noise (arXiv:2305.08891, algorithm 1).

        Sigma is infinite at the last row. It is clamped to 4096 there (`SIGMA_INFINITY`), which stays above the row
        before it, 2254 for Stable Diffusion's table; where that is higher (15406 for DDPM's) the last is twice as high.
        """
        if self.clamped:
            return self
        root = self.alphas_cumprod.sqrt()
        bars = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        before_last = float(((1 - bars[-2]) / bars[-2]).sqrt())
        last = SIGMA_INFINITY if before_last < SIGMA_INFINITY else 2 * before_last
        bars[-1] = 1 / (1 + last**2)
        return type(self).from_alphas_cumprod(bars, clamped=True)

    def alpha(self, sigma: Tensor | float) -> Tensor:
        return (1 + _floating(sigma) ** 2).rsqrt()

    def sigma(self, t: Tensor | float) -> Tensor:
        t = _floating(t)
        table, log_table = self._tables(t.device)
        row = t.to(table.dtype).clamp(0, self.entries - 1)
        low = row.long().clamp(max=self.entries - 2)
        return torch.lerp(log_table[low], log_table[low + 1], row - low).exp().to(t.dtype)

    def timestep(self, sigma: Tensor | float) -> Tensor:
        sigma = _floating(sigma)
        table, log_table = self._tables(sigma.device)
        level = sigma.to(table.dtype).clamp(self.sigma_min, self.sigma_max)
        low = torch.searchsorted(table, level.contiguous(), right=True).clamp(1, self.entries - 1) - 1
        part = (level.log() - log_table[low]) / (log_table[low + 1] - log_table[low])
        return (low + part).to(sigma.dtype)

    def entry(self, index: Tensor) -> Tensor:
        low = index.long().clamp(0, self.entries - 2)
        return torch.lerp(self.table[low], self.table[low + 1], index.double() - low)

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The table and its logarithm on a device: copied there once, in float64 where the device has it."""
        if device not in self._on_device:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._on_device[device] = (self.table.to(device, dtype), self.table.log().to(device, dtype))
        return self._on_device[device]


class RectifiedFlow(NoiseSchedule):
    """Straight path x_t = (1 - t) x_0 + t eps (arXiv:2209.03003): alpha = 1 - t and t = sigma / (1 + sigma).

    At t = 1 sigma is infinite; it is clamped to 4096 (`SIGMA_INFINITY`), t = 0.99976. For grids the clock has the
    thousand rows t = 1/1000, ..., 1 of diffusers' FlowMatchEulerDiscreteScheduler.
    """

    entries = 1000
    clamped = True

    def __init__(self) -> None:
        self.sigma_min, self.sigma_max = 1 / (self.entries - 1), SIGMA_INFINITY

    def alpha(self, sigma: Tensor | float) -> Tensor:
        return 1 / (1 + _floating(sigma))

    def sigma(self, t: Tensor | float) -> Tensor:
        t = _floating(t)
        return (t / (1 - t)).clamp(max=self.sigma_max)

    def timestep(self, sigma: Tensor | float) -> Tensor:
        sigma = _floating(sigma)
        return sigma / (1 + sigma)

    def entry(self, index: Tensor) -> Tensor:
        return self.sigma((index.double() + 1) / self.entries)


class EDM(NoiseSchedule):
    """x = x_0 + sigma eps, scaled to unit variance for the network (arXiv:2206.00364, table 1): clock log(sigma) / 4.

    Args:
        sigma_data: standard deviation of the data, d in the formulas.
        sigma_min, sigma_max: range of sampling. The clock goes on beyond both.

    Raises:
        ValueError: numbers that are not 0 < sigma_min < sigma_max, sigma_data > 0.
    """

    def __init__(self, sigma_data: float, sigma_min: float = 0.002, sigma_max: float = 80.0):
        if not (sigma_data > 0 and 0 < sigma_min < sigma_max):
            raise ValueError(
                f"EDM needs sigma_data > 0 and 0 < sigma_min < sigma_max, got {sigma_data=}, {sigma_min=}, {sigma_max=}"
            )
        self.sigma_data, self.sigma_min, self.sigma_max = sigma_data, sigma_min, sigma_max

    def alpha(self, sigma: Tensor | float) -> Tensor:
        return (self.sigma_data**2 + _floating(sigma) ** 2).rsqrt()

    def sigma(self, t: Tensor | float) -> Tensor:
        return (4 * _floating(t)).exp()

    def timestep(self, sigma: Tensor | float) -> Tensor:
        sigma = _floating(sigma)
        return sigma.clamp(min=torch.finfo(sigma.dtype).tiny).log() / 4  # finite at 0, where c_out takes it times 0

    def clamp(self, sigma: Tensor) -> Tensor:
        return sigma


@dataclass(frozen=True)
class Grid:
    """How a sampler spaces its steps. The fields are where diffusers' schedulers differ (`samplers.SAMPLERS`).

    Attributes:
        spacing: "leading", "trailing" or "linspace" over the rows of the schedule's table (arXiv:2305.08891, table 2);
            or "karras" (rho = 7, arXiv:2206.00364, equation 5) or "exponential" (even in log sigma) between two levels.
        offset: rows added to every leading step (diffusers' steps_offset), or as many as there are after the first.
        final: where the last step ends: "zero", or "sigma_min", the schedule's lowest level.
        extra: 1 to space steps + 1 points, or levels of a ramp, and drop the last (DPM++), else 0.
        whole: round linspace to whole rows.
        span: between which levels a ramp runs: those of the whole "table", or of the first and last step of a spacing.
    """

    spacing: str
    offset: int = 0
    final: str = "zero"
    extra: int = 0
    whole: bool = True
    span: str = "table"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("spacing", self.spacing, SPACINGS + RAMPS),
            ("final", self.final, ("zero", "sigma_min")),
            ("span", self.span, ("table", *SPACINGS)),
        ):
            if value not in known:
                raise ValueError(f"{name} of a step grid should be one of {', '.join(known)}; got {value!r}")


def step_grid(schedule: NoiseSchedule, steps: int, grid: Grid | str) -> Tensor:
    """The noise levels of a sampling run.

    Where the schedule's top stands for infinity, a Karras or exponential ramp over it would spend its steps on pure
    noise: there the first step goes from the top to 80 (EDM's own sigma_max) and the ramp starts at that.

    Args:
        schedule: gives the table and the range.
        steps: number of steps, at least 1; for a spacing over the table at most as many as it has rows.
        grid: how steps are spaced, or the name of a spacing.

    Returns:
        [steps + 1] in float64 on the CPU, decreasing; with final "sigma_min" the last two may be equal.

    Raises:
        ValueError: a number of steps that the spacing does not have, or a spacing the schedule does not have.
    """
    grid = Grid(grid) if isinstance(grid, str) else grid
    if steps < 1:
        raise ValueError(f"sampling takes at least one step, got steps={steps}")
    sigmas = _ramp(schedule, steps, grid) if grid.spacing in RAMPS else schedule.entry(_rows(schedule, steps, grid))
    final = schedule.sigma_min if grid.final == "sigma_min" else 0.0
    return torch.cat([sigmas, sigmas.new_tensor([final])])


def _rows(schedule: NoiseSchedule, steps: int, grid: Grid) -> Tensor:
    """Rows of the table that a spacing visits: [steps] in float64, decreasing."""
    spacing, rows = grid.spacing, schedule.entries
    extra = 0 if spacing == "trailing" else grid.extra
    points = steps + extra
    if rows == 0:
        schedule.entry(torch.zeros(1))  # says which spacings there are instead
    if points > rows:
        raise ValueError(f"{spacing} spacing has at most {rows - extra} steps on this schedule, got steps={steps}")
    if spacing == "leading":
        visited = torch.arange(points, dtype=torch.float64).flip(0)[:steps] * (rows // points)
        return visited + min(grid.offset, rows - 1 - int(visited[0]))  # all rows at most, where theirs has one too many
    if spacing == "trailing":
        # numpy's arange, because its rounding decides rows that fall on a half, and diffusers uses it.
        return torch.from_numpy(np.arange(rows, 0, -rows / steps)[:steps].round() - 1)
    visited = torch.linspace(rows - 1, 0, points, dtype=torch.float64)[:steps]  # a single point is the noisiest
    return visited.round() if grid.whole else visited


def _ramp(schedule: NoiseSchedule, steps: int, grid: Grid) -> Tensor:
    """Levels between the ends of the span: [steps] in float64, decreasing."""
    top, bottom = schedule.sigma_max, schedule.sigma_min
    if grid.span != "table":
        ends = schedule.entry(_rows(schedule, steps, replace(grid, spacing=grid.span))[[0, -1]])
        top, bottom = float(ends[0]), float(ends[1])
    if top >= SIGMA_INFINITY and steps > 1:
        ramp = _between(80.0, bottom, steps - 1 + grid.extra, grid.spacing)[: steps - 1]
        return torch.cat([torch.tensor([top], dtype=torch.float64), ramp])
    return _between(top, bottom, steps + grid.extra, grid.spacing)[:steps]


def _between(top: float, bottom: float, steps: int, ramp: str) -> Tensor:
    if ramp == "karras":
        rho = 7.0
        sigmas = torch.linspace(top ** (1 / rho), bottom ** (1 / rho), steps, dtype=torch.float64) ** rho
    else:
        sigmas = torch.linspace(math.log(top), math.log(bottom), steps, dtype=torch.float64).exp()
    sigmas[-1] = bottom  # both ends to the last bit; of one step the top
    sigmas[0] = top
    return sigmas


def _double(values: Tensor | Sequence[float]) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)
