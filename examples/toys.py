"""What the examples on points share: data, a closed-form denoiser, a training loop, distances, the look of figures."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ldm.denoiser import Denoise, Denoiser
from ldm.loss import TrainingNoise, Weight, denoising_loss
from ldm.steps import Noise

matplotlib.rc("font", size=9)
matplotlib.rc("axes", titlesize=9)
matplotlib.rc("axes.spines", top=False, right=False)
matplotlib.rc("lines", linewidth=1.4, markersize=4)
matplotlib.rc("legend", frameon=False, fontsize=8)
matplotlib.rc("savefig", dpi=140)


class Mixture:
    """Gaussian mixture: its denoiser, density and quantiles at every noise level are known.

    Args:
        weights: [K], of any sum.
        means: [K, D]; the parts are N(mean, std² I).
        stds: [K]; 0 is a point.
    """

    def __init__(self, weights: Sequence[float], means: Sequence[Sequence[float]], stds: Sequence[float]):
        self.weights, self.means, self.stds = (torch.tensor(v, dtype=torch.float64) for v in (weights, means, stds))
        self.weights = self.weights / self.weights.sum()

    def draw(self, number: int, noise: Noise, sigma: float = 0.0) -> Tensor:
        """[number, D] at noise level sigma."""
        uniform = torch.special.ndtr(noise(torch.empty(number, dtype=torch.float64)))
        part = torch.searchsorted(self.weights.cumsum(0)[:-1], uniform)
        return self.means[part] + (self.stds[part] ** 2 + sigma**2).sqrt()[:, None] * noise(self.means[part])

    def _parts(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Log of each part's share in the density at x [..., K], and the mean [..., K, D] and variance of x_0 in it."""
        level = torch.as_tensor(sigma, dtype=torch.float64).view(-1, *[1] * (x.ndim - 1))
        total = self.stds**2 + level**2  # [..., K]
        away = x.double()[..., None, :] - self.means
        log = self.weights.log() - (away**2).sum(-1) / (2 * total) - x.shape[-1] / 2 * (2 * math.pi * total).log()
        shrink = self.stds**2 / total
        return log, self.means + shrink[..., None] * away, shrink * level**2

    def log_density(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """Of x = x_0 + sigma * eps: [...] from [..., D]; sigma is one number, or one for each row."""
        return self._parts(x, sigma)[0].logsumexp(-1)

    def denoise(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x_0 | x], like x: the samplers' `denoise`."""
        log, mean, _ = self._parts(x, sigma)
        return (log.softmax(-1)[..., None] * mean).sum(-2).to(x)

    def variance(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Var[x_0 | x] of each coordinate, like x."""
        log, mean, variance = self._parts(x, sigma)
        second = (log.softmax(-1)[..., None] * (mean**2 + variance[..., None])).sum(-2)
        return (second - self.denoise(x, sigma).double() ** 2).clamp(min=0).to(x)

    def quantiles(self, number: int, sigma: float = 0.0) -> Tensor:
        """[number, 1] points that share the probability evenly, where D = 1. The flow keeps each at its quantile."""
        std = (self.stds**2 + sigma**2).sqrt()
        wanted = (torch.arange(number, dtype=torch.float64)[:, None] + 0.5) / number
        reach = 10 * float(std.max()) + float(self.means.abs().max())
        low, high = torch.full_like(wanted, -reach), torch.full_like(wanted, reach)
        for _ in range(60):  # bisection
            middle = (low + high) / 2
            below = (self.weights * torch.special.ndtr((middle - self.means[:, 0]) / std)).sum(1, keepdim=True) < wanted
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


def normal(seed: int) -> Noise:
    """x -> standard normal like x, from one generator for all."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def counted(denoise: Denoise, calls: list[float]) -> Denoise:
    """The same denoiser, which adds the noise level of each call to a list."""

    def call(x: Tensor, sigma: Tensor | float) -> Tensor:
        calls.append(float(sigma))
        return denoise(x, sigma)

    return call


def spiral(number: int, seed: int, turns: int = 2) -> Tensor:
    """Points the same everywhere along an arm of so many turns, of zero mean and about unit variance: [number, 2]."""
    generator = torch.Generator().manual_seed(seed)
    part, angle = torch.rand(number, generator=generator).sqrt(), 2 * math.pi * turns
    x = 2 * part[:, None] * torch.stack([(angle * part).cos(), (angle * part).sin()], 1)
    return x + 0.04 * torch.randn(number, 2, generator=generator) - torch.tensor([8 / angle**2, -4 / angle])


def fit(
    denoiser: Denoiser, data: Tensor, levels: TrainingNoise, weight: Weight, *, updates: int, batch: int = 512,
    rate: float = 2e-3, seed: int = 0,
) -> list[float]:  # fmt: skip
    """Trains the denoiser's network on points [N, D] by Adam, the rate falling to 0; returns the losses."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    losses = []
    for _ in range(updates):
        x0 = data[torch.randint(len(data), (batch,), generator=generator)]
        sigma = levels.sigma(torch.rand(batch, generator=generator))
        noise = torch.randn(x0.shape, generator=generator)
        loss = denoising_loss(denoiser, x0, None, sigma, noise, weight).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 64) -> float:
    """Mean over directions of Wasserstein's first distance of the projections; a and b [N, D], in their units."""
    if a.shape != b.shape:
        raise ValueError(f"the distance is of sets of one size, got {tuple(a.shape)} and {tuple(b.shape)}")
    along = torch.nn.functional.normalize(normal(0)(a.new_empty(directions, a.shape[1])).to(torch.float64))
    sorted_a, sorted_b = ((points.double() @ along.T).sort(0).values for points in (a, b))
    return float((sorted_a - sorted_b).abs().mean())


def distance(x: Tensor, exact: Tensor) -> float:
    """Wasserstein's first distance of x [N, 1] from as many quantiles, in their standard deviations."""
    return float((x.sort(0).values - exact).abs().mean() / exact.std())


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of so many inches, and its axes."""
    fig = Figure((width, height), layout="constrained")
    return fig, fig.subplots(rows, columns, **options)


def square(axes: Any, title: str, reach: float) -> None:
    """Makes a panel a piece of the plane, from -reach to reach."""
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[], title=title)
    axes.spines[:].set_visible(True)


def save(fig: Figure, out: Path, name: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    fig.savefig(out / f"{name}.png")
