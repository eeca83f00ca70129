"""Every sampler on one plot: how far from the truth after so many evaluations of an exact denoiser.

The data is a mixture in one dimension, where the probability flow keeps every point at its quantile: the exact end of
each path is known, and so is the distribution for the samplers that draw noise. Both errors are Wasserstein's first
distance. All runs end at a noise level above 0, so that no step is of lower order for its end.
"""

import sys
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib
import tyro

from examples.toys import Mixture, counted, figure, normal, save
from ldm.samplers import SAMPLERS
from ldm.schedule import EDM, step_grid

DATA = Mixture([0.4, 0.25, 0.35], [[-1.2], [0.1], [1.1]], [0.25, 0.2, 0.25])
TOP, BOTTOM = 20.0, 0.05  # noise levels
DRAWS_NOISE = ("ddpm", "euler_ancestral", "stochastic_heun", "dpmpp_2m_sde", "langevin", "predictor_corrector")
EVALUATIONS_A_STEP = {"heun": 2, "stochastic_heun": 2, "langevin": 8, "predictor_corrector": 2}  # one for all others
COLOURS = [*matplotlib.color_sequences["tab10"], *matplotlib.color_sequences["Dark2"]]
OPTIONS: dict[str, dict[str, Any]] = {
    "langevin": {"updates": 7, "step_size": 0.5},
    "predictor_corrector": {"ancestral": True},
}


def error(name: str, budget: int, number: int) -> tuple[int, float]:
    """Evaluations made, at most about `budget`, and mean distance in x after them."""
    sigmas = step_grid(EDM(1.0, BOTTOM, TOP), budget // EVALUATIONS_A_STEP.get(name, 1) + 1, "exponential")[:-1]
    # One "picture" of all points: the corrector measures its step on a picture, and one number is none.
    start, end = DATA.quantiles(number, TOP)[None], DATA.quantiles(number, BOTTOM)[None]
    calls: list[float] = []
    x = SAMPLERS[name].function(counted(DATA.denoise, calls), start, sigmas, noise=normal(0), **OPTIONS.get(name, {}))
    if name in DRAWS_NOISE:
        x = x.sort(1).values
    return len(calls), float((x - end).abs().mean())


def main(out: Path = Path("runs/examples"), small: bool = False) -> dict[str, dict[int, float]]:
    """Returns of each sampler its error by the number of evaluations; of "chance" that of exact draws."""
    number, budgets = (2000, (16, 64)) if small else (30_000, (8, 16, 32, 64, 128, 256))
    errors = {
        name: dict(error(name, budget, number if name in DRAWS_NOISE else 300) for budget in budgets)
        for name in SAMPLERS
    }
    exact = DATA.quantiles(number, BOTTOM)
    draws = [DATA.draw(number, normal(seed), BOTTOM).sort(0).values for seed in range(10)]
    chance = sum(float((draw - exact).abs().mean()) for draw in draws) / len(draws)

    together: dict[tuple[float, ...], list[str]] = {}  # samplers that are the same here share a line
    for name, points in errors.items():
        together.setdefault(tuple(round(value, 9) for value in points.values()), []).append(name)
    fig, ax = figure(9, 5)
    ax.axhspan(1e-9, chance, color="0.93", label=f"what chance gives\n{number} exact draws")
    for i, names in enumerate(together.values()):
        style = "s--" if names[0] in DRAWS_NOISE else "o-"
        ax.plot(*zip(*errors[names[0]].items(), strict=True), style, color=COLOURS[i], label=", ".join(names))
    bottom = min(min(points.values()) for points in errors.values())
    ax.set(xscale="log", yscale="log", ylim=(bottom / 2, 1), title="solid: along the flow; dashed: drawing noise")
    ax.set(xlabel="evaluations of the denoiser", ylabel="mean distance from the exact result, in units of x")
    ax.grid(alpha=0.25)
    fig.legend(loc="outside right center")
    save(fig, out, "samplers")
    return errors | {"chance": {0: chance}}


if __name__ == "__main__":
    print(tyro.cli(main))
