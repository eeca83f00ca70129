"""Ancestral sampling and the variance of its noise: small, large, or that of the exact reverse step.

DDPM's small variance is exact where the data is one point, the large one where it is N(0, I) (arXiv:2006.11239,
section 3.2), with any number of steps. The reverse step's own variance is the small one plus what is not known of x_0,
    lower² (1 - r²) + (1 - r²)² Var[x_0 | x],    r = lower / sigma
(Analytic-DPM, arXiv:2201.06503, here at each x): a learned variance tends to it. It is exact on both, and on a mixture,
where no normal distribution is, it needs the fewest steps. Runs end above noise level 0, to which no noise is added.
"""

import itertools
import math
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro
from torch import Tensor

from examples.toys import Mixture, distance, figure, normal, save
from ldm.forward import large_variance, posterior_variance
from ldm.samplers import LogVariance, ddpm
from ldm.schedule import EDM, step_grid

TOP, BOTTOM = 80.0, 0.05  # noise levels
DATA = {
    "one point": Mixture([1], [[0.5]], [0.0]),
    "N(0, 1)": Mixture([1], [[0.0]], [1.0]),
    "mixture": Mixture([0.4, 0.25, 0.35], [[-1.2], [0.1], [1.1]], [0.25, 0.2, 0.25]),
}


def optimal(data: Mixture, sigmas: Tensor) -> LogVariance:
    """The exact variance, as `ddpm` takes it: where its logarithm lies between the small (0) and the large (1)."""
    below = dict(itertools.pairwise(sigmas.tolist()))

    def variance(x: Tensor, sigma: float) -> Tensor:
        lower = below[sigma]
        small, large = posterior_variance(sigma, lower), large_variance(sigma, lower)
        exact = small + (1 - lower**2 / sigma**2) ** 2 * data.variance(x, sigma)
        return (exact / small).log() / math.log(large / small)

    return variance


def main(out: Path = Path("runs/examples"), small: bool = False) -> dict[str, dict[str, list[float]]]:
    """Returns by data and variance the distance for each number of steps; under "chance" that of exact draws."""
    number, counts = (4000, (4, 16, 64)) if small else (40_000, (2, 4, 8, 16, 32, 64, 128, 256))
    distances: dict[str, dict[str, list[float]]] = {}
    for title, data in DATA.items():
        start, end = data.quantiles(number, TOP), data.quantiles(number, BOTTOM)
        shuffled = start[torch.randperm(number, generator=torch.Generator().manual_seed(0))]
        chance = sum(distance(data.draw(number, normal(seed), BOTTOM), end) for seed in range(10)) / 10
        distances[title] = {"small": [], "large": [], "optimal": [], "chance": [chance]}
        for steps in counts:
            sigmas = step_grid(EDM(1.0, BOTTOM, TOP), steps + 1, "exponential")[:-1]
            for name, variance in (("small", "small"), ("large", "large"), ("optimal", optimal(data, sigmas))):
                x = ddpm(data.denoise, shuffled, sigmas, variance=variance, noise=normal(2))
                distances[title][name].append(distance(x, end))

    fig, axes = figure(10, 3.4, 1, 3, sharey=True)
    for ax, (title, results) in zip(axes, distances.items(), strict=True):
        (chance,) = results["chance"]
        ax.axhspan(1e-6, chance, color="0.93", label="what chance gives")
        for name, marker, size in (("small", "v-", 4), ("large", "^-", 4), ("optimal", "o-", 8)):
            ax.plot(counts, results[name], marker, fillstyle="none", markersize=size, label=f"{name} variance")
        ax.set(xscale="log", yscale="log", xlabel="steps", title=f"data: {title}", ylim=(chance / 4, None))
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("distance to the exact result,\nin its standard deviations")
    axes[2].legend()
    save(fig, out, "ancestral")
    return distances


if __name__ == "__main__":
    print(tyro.cli(main))
