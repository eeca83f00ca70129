"""A picture turns to noise: in pixels, and in the latents of the bundled model, decoded again.

Below, the chain of arXiv:2006.11239 (equation 2), row by row of its table, has at every row the moments of the closed
form (equation 4). And the two stochastic differential equations (arXiv:2011.13456, equations 5 and 6), run by
Euler-Maruyama on a mixture in one dimension, forwards and back, come to the exact distributions with order 1.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from examples.toys import Mixture, distance, normal, save
from ldm.forward import forward_sde, in_paper_units, marginal, reverse_sde
from ldm.schedule import EDM, VariancePreserving, step_grid
from pipelines import TextToImagePipeline
from pipelines.image import image_batch
from pipelines.picture import to_pil
from train.pictograms import paint

DATA = Mixture([0.4, 0.25, 0.35], [[-1.2], [0.1], [1.1]], [0.25, 0.2, 0.25])
TOP, BOTTOM = 10.0, 0.05  # noise levels
UNITS: dict[str, Callable[[Tensor], Tensor]] = {
    "exploding": torch.ones_like,
    "preserving": VariancePreserving.linear().alpha,
}
ROWS = (0, 50, 150, 300, 450, 600, 800, 999)


def moments(schedule: VariancePreserving, x0: float, number: int) -> Tensor:
    """Mean and standard deviation at each row, [rows, 2], of the chain from x_0: a small step and a little noise."""
    noise, x, found = normal(0), torch.full((number,), x0, dtype=torch.float64), []
    for beta in schedule.betas.double():
        x = (1 - beta).sqrt() * x + beta.sqrt() * noise(x)
        found.append(torch.stack([x.mean(), x.std()]))
    return torch.stack(found)


def errors(number: int, counts: tuple[int, ...]) -> dict[str, list[float]]:
    """Distance to the exact result of both equations in both units; "chance" is that of exact draws."""
    low, high = DATA.quantiles(number, BOTTOM), DATA.quantiles(number, TOP)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(1))
    found = {"chance": [distance(DATA.draw(number, normal(3), BOTTOM), low)]}
    for steps in counts:
        sigmas = step_grid(EDM(1.0, BOTTOM, TOP), steps + 1, "exponential")[:-1]
        for units, alpha in UNITS.items():
            up = forward_sde(low[order], sigmas.flip(0), normal(2), alpha=alpha)
            down = reverse_sde(DATA.denoise, high[order], sigmas, alpha=alpha, noise=normal(2))
            for way, x, exact in (("forward", up, high), ("reverse", down, low)):
                found.setdefault(f"{way}, {units}", []).append(distance(x, exact))
    return found


@torch.no_grad()
def main(out: Path = Path("runs/examples"), small: bool = False) -> dict[str, list[float]]:
    """Returns "mean" and "std", the largest difference of the chain's moments from the closed form; the distances of
    each equation for each number of steps; and "pixels" and "latents", the correlation of the noisy with the clean."""
    number, counts = (40_000, (8, 32)) if small else (100_000, (8, 16, 32, 64, 128, 256))
    model = TextToImagePipeline.from_pretrained(device="cpu").model
    assert isinstance(model.schedule, VariancePreserving)
    picture = image_batch(paint("fox", "oil", "blue", model.size), 1, 1, None, None, model.vae.downscale)
    levels = model.schedule.table[list(ROWS)].float()
    results: dict[str, list[float]] = {}
    strips: dict[str, Tensor] = {}
    for name, x0 in (("pixels", picture), ("latents", model.vae.encode(picture).mode)):
        eps = normal(5)(x0)
        noisy = in_paper_units(marginal(x0.expand(len(levels), -1, -1, -1), levels), model.schedule.alpha(levels))
        x_t = noisy.mean + noisy.stddev * eps
        results[name] = [float(torch.corrcoef(torch.stack([x.flatten(), x0.flatten()]))[0, 1]) for x in x_t]
        strips[name] = x_t if name == "pixels" else model.vae.decode(x_t)

    table, start = VariancePreserving.linear(), 0.8
    chain = moments(table, start, number)
    closed = in_paper_units(marginal(torch.full_like(table.table, start), table.table), table.alpha(table.table))
    exact = torch.stack([closed.mean, closed.stddev], 1)
    results |= dict(zip(("mean", "std"), (chain - exact).abs().amax(0)[:, None].tolist(), strict=True))
    results |= errors(number, counts)

    fig = Figure((10, 6), layout="constrained")
    parts: Any = fig.subfigures(2, 1, height_ratios=(1, 1.05))
    above, below = parts
    for line, (name, strip) in zip(above.subplots(2, len(ROWS)), strips.items(), strict=True):
        line[0].set_ylabel({"pixels": "in pixels", "latents": "in latents,\ndecoded"}[name])
        for ax, image, row, sigma in zip(line, strip, ROWS, levels, strict=True):
            ax.imshow(to_pil(image))
            ax.set(xticks=[], yticks=[], title=f"row {row}\nσ = {sigma:.2g}" if name == "pixels" else "")
            ax.spines[:].set_visible(False)
    left, *others = below.subplots(1, 3, width_ratios=(1.2, 1, 1))
    for i, name in enumerate(("mean", "standard deviation")):
        left.plot(exact[:, i], color="0.5", label=None if i else "closed form")
        left.plot(range(0, 1000, 50), chain[::50, i], "o", color=f"C{i}", label=f"{name}, {number} chains")
    left.set(xlabel="row of the table (linear betas)", title=f"chain of one value, x₀ = {start}")
    left.set(ylabel="of x_t", ylim=(-0.05, 1.5))
    left.legend(loc="upper left")
    for ax, way in zip(others, ("forward", "reverse"), strict=True):
        for units, marker in zip(UNITS, "os", strict=True):
            ax.plot(counts, results[f"{way}, {units}"], f"{marker}-", label=f"variance {units}")
        (chance,), (top, *_) = results["chance"], results[f"{way}, preserving"]
        ax.plot(counts, [0.6 * top * counts[0] / steps for steps in counts], "--", color="0.6", label="order 1")
        ax.axhspan(1e-6, chance, color="0.93", label="what chance gives")
        ax.set(xscale="log", yscale="log", ylim=(chance / 2, 2 * top), title=f"{way} SDE of a mixture")
        ax.set(xlabel="steps of Euler-Maruyama", xticks=counts, xticklabels=counts)
        ax.minorticks_off()
        ax.grid(alpha=0.25)
    others[0].set_ylabel("distance to the exact result,\nin its standard deviations")
    others[0].legend()
    save(fig, out, "forward_process")
    return results


if __name__ == "__main__":
    print(tyro.cli(main))
