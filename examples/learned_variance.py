"""Learned variance: the bound on the likelihood, in few steps and in many, with a fixed variance and a learned one.

A network of twice the outputs (Nichol & Dhariwal, arXiv:2102.09672) learns on points of the plane, by the hybrid loss,
the noise and where a step's log-variance lies between the small one (v = 0) and the large one (v = 1). On evenly spaced
rows of its table of 1000 it is asked for the bound of `ldm.elbo`. Above the size of the data the true reverse step has
the large variance, between the clusters' distance and their width the small one, below it the large one again. The
learned variance follows from afar: it makes up for the errors of the network's mean as well. From 20 steps on its bound
is the best of the three; in 5 or 10, whose steps are a hundred times those that it was trained for, it is not.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro
from torch import Tensor

from examples.toys import Mixture, figure, normal, save
from ldm.denoiser import Denoiser, row_before
from ldm.elbo import ancestral_step, elbo, gaussian_log_likelihood
from ldm.likelihood import bits_per_dim
from ldm.loss import HybridLoss, Plain, UniformTime
from ldm.mlp import MLP
from ldm.schedule import VariancePreserving, step_grid

ANGLES = torch.arange(8) * torch.pi / 4
RING = Mixture([1] * 8, torch.stack([ANGLES.cos(), ANGLES.sin()], 1).mul(1.4).tolist(), [0.05] * 8)


def train(denoiser: Denoiser, updates: int) -> None:
    """By the hybrid loss on fresh draws, the rate falling to 0."""
    levels, loss_of = UniformTime(denoiser.schedule), HybridLoss(denoiser)
    weight, noise, draws = Plain(denoiser), normal(1), torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        x0, u = RING.draw(512, noise).float(), torch.rand(512, generator=draws)
        optimizer.zero_grad()
        loss_of(denoiser, x0, None, levels.sigma(u), noise(x0), weight).mean().backward()
        optimizer.step()
        rate.step()


def best(sigma: Tensor, x: Tensor, schedule: VariancePreserving) -> Tensor:
    """The v of the true reverse step at x: rho^v = 1 + g Var[x_0 | x] (`ldm.loss.step_divergence`)."""
    snr_s, snr_t = row_before(schedule, sigma)[:, None] ** -2, sigma[:, None] ** -2
    return torch.log1p((snr_s - snr_t) * RING.variance(x, sigma)) / (torch.log1p(snr_s) - torch.log1p(snr_t))


def main(out: Path = Path("runs/examples"), small: bool = False) -> dict[str, dict[str, list[float]]]:
    """Returns by variance the bits per dimension for each number of steps ("exact": of the data itself), and under
    "v" the mean of v, learned and best, at levels from the lowest to the highest."""
    torch.manual_seed(0)
    schedule = VariancePreserving.linear()
    denoiser = Denoiser(MLP(2, dim_out=4, width=64 if small else 128), schedule, "epsilon")
    train(denoiser, 700 if small else 4000)
    denoiser.requires_grad_(False)
    counts = (10, 40) if small else (5, 10, 20, 50, 100, 200, 500, 1000)
    x0 = RING.draw(1000, normal(3)).float()
    exact = float(bits_per_dim(RING.log_density(x0), 2).mean())
    bits: dict[str, list[float]] = {"small": [], "large": [], "learned": [], "exact": [exact]}
    levels = schedule.sigma(schedule.timestep(step_grid(schedule, 30, "exponential")[:-1].flip(0)).round().clamp(1))
    v: dict[str, list[float]] = {"learned": [], "best": []}
    with denoiser.learned_variance() as learned:
        for steps in counts:
            rows = torch.linspace(0, 999, steps).round().long()
            some = VariancePreserving.from_alphas_cumprod(schedule.alphas_cumprod[rows])
            for name, variance in (("small", "small"), ("large", "large"), ("learned", learned)):
                step = ancestral_step(denoiser, variance)
                bound = elbo(step, x0, some, normal(4), log_likelihood=gaussian_log_likelihood)
                bits[name].append(float(bits_per_dim(bound.total, 2).mean()))
        for sigma in levels:
            x, level = x0 + sigma.float() * normal(5)(x0), sigma.expand(len(x0))
            denoiser(x, level)
            v["learned"].append(float(learned(x, level).mean()))
            v["best"].append(float(best(level, x, schedule).mean()))

    fig, (left, right) = figure(9, 3.6, 1, 2)
    for name, marker in (("small", "v-"), ("large", "^-"), ("learned", "o-")):
        left.plot(counts, bits[name], marker, label=f"{name} variance")
    left.axhline(exact, color="0.4", linestyle=":", label="the data's entropy")
    left.set(xscale="log", xlabel="steps", ylabel="bound, bits per dimension", title="eight clusters on a circle")
    left.set_ylim(exact - 0.3, max(bits["learned"]) + 4)
    left.legend()
    right.plot(levels, v["best"], color="0.4", linestyle=":", label="of the true reverse step")
    right.plot(levels, v["learned"], "o-", color="C2", label="learned")
    for value, name in ((0, "small"), (1, "large")):
        right.axhline(value, color=f"C{value}", label=f"{name} variance")
    right.set(xscale="log", xlabel="noise level σ", ylabel="v, mean over x", title="variance of a step of one row")
    right.legend(loc="center right")
    save(fig, out, "learned_variance")
    return {**bits, "v": v}  # type: ignore[dict-item]


if __name__ == "__main__":
    print(tyro.cli(main))
