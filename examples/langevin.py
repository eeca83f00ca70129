"""Langevin dynamics on a score field: it finds the modes, but their weights only with annealing.

A particle follows the score and a random push. Where modes lie far apart no particle crosses between them, so plain
Langevin dynamics leaves in each as many as started near it; begun with much noise, where all is one mode, and annealed
(arXiv:1907.05600), or with a predictor before each correction (arXiv:2011.13456), it finds the weights as well. Above
the exact score, below one learned by denoising score matching (arXiv:1907.05600, equation 2).
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro
from torch import Tensor

from examples.toys import Mixture, figure, fit, normal, save, square
from ldm.denoiser import Denoise, Denoiser, score_from
from ldm.langevin import langevin, predictor_corrector
from ldm.loss import Plain, training_noise
from ldm.mlp import MLP
from ldm.schedule import EDM, step_grid

DATA = Mixture([0.1, 0.3, 0.6], [[-1.3, 0.9], [1.2, 1.1], [0.1, -1.1]], [0.2, 0.15, 0.2])
PATH = EDM(1.0, 0.05, 10.0)


def trained(updates: int) -> Denoiser:
    """The score learned by its plain square error times sigma²: the network puts out -sigma * score, epsilon."""
    torch.manual_seed(0)
    denoiser = Denoiser(MLP(2, width=64), PATH, "epsilon")
    levels = training_noise("log_normal", PATH, mean=-0.5, std=1.6)
    fit(denoiser, DATA.draw(20_000, normal(0)).float(), levels, Plain(denoiser), updates=updates, batch=256)
    return denoiser


def weights(x: Tensor) -> list[float]:
    """Shares of the particles by the mode that they are nearest to."""
    nearest = torch.cdist(x.double(), DATA.means).argmin(1)
    return [float((nearest == mode).double().mean()) for mode in range(len(DATA.means))]


@torch.no_grad()
def main(out: Path = Path("runs/examples"), small: bool = False) -> dict[str, dict[str, list[float]]]:
    """Returns the weights of the modes that each sampler finds, with the exact score and the learned one."""
    number, updates = (1000, 300) if small else (4000, 3000)
    start = 4 * torch.rand(number, 2, generator=torch.Generator().manual_seed(1)) - 2
    with torch.enable_grad():
        learned = trained(updates)
    # The corrector measures its step on a whole "picture", for which all particles stand: x is [1, N, 2].
    scores: dict[str, Denoise] = {
        "exact score": DATA.denoise,
        "learned score": lambda x, sigma: learned(x[0], sigma)[None],
    }
    found: dict[str, dict[str, list[float]]] = {}
    fig, axes = figure(11.5, 6.2, 2, 4)
    for row, (name, denoise) in zip(axes, scores.items(), strict=True):
        fresh, levels = normal(2), step_grid(PATH, 20 if small else 40, "exponential")
        wide = 10 * normal(3)(start)[None]
        results = {
            "plain Langevin": langevin(denoise, start[None], [10.0, 0.1, 0.0], updates=500, noise=fresh),
            "annealed Langevin": langevin(denoise, wide, levels, updates=20, noise=fresh),
            "predictor-corrector": predictor_corrector(denoise, wide, levels, ancestral=True, noise=fresh),
        }
        found[name] = {way: weights(x[0]) for way, x in results.items()}

        ticks = torch.linspace(-1.9, 1.9, 20)
        places = torch.cartesian_prod(ticks, ticks)
        score = score_from(places[None], denoise(places[None], 0.3), 0.3)[0]
        square(row[0], f"{name} at σ = 0.3,\nand where plain Langevin starts", 2.1)
        row[0].scatter(*start[:400].T, s=2, color="tab:orange")
        row[0].quiver(*places.T, *(score / score.norm(dim=1, keepdim=True) ** 0.5).T, width=0.004)
        for ax, (way, x) in zip(row[1:], results.items(), strict=True):
            square(ax, f"{way}\n" + " / ".join(f"{share:.2f}" for share in found[name][way]), 2.1)
            ax.scatter(*x[0].T, s=1.5, c=torch.cdist(x[0].double(), DATA.means).argmin(1), cmap="Dark2", vmax=7)
    fig.suptitle("the weights of the modes are " + " / ".join(f"{weight:.2f}" for weight in DATA.weights))
    save(fig, out, "langevin")
    return found


if __name__ == "__main__":
    print(tyro.cli(main))
