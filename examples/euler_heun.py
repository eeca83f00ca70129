"""Euler against Heun on the probability flow of a one-dimensional mixture, whose exact solution is known.

In one dimension the flow keeps every point at its quantile. Euler's method follows the slope at the start of a step
and leaves the bends to the outside; Heun's takes the mean of the slopes at both ends (EDM, arXiv:2206.00364, figure 3
and algorithm 1): for two evaluations a step, an error that falls with their square.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro

from examples.toys import Mixture, counted, figure, save
from ldm.samplers import euler, heun
from ldm.schedule import EDM, step_grid
from ldm.steps import Callback

DATA = Mixture([0.4, 0.25, 0.35], [[-1.2], [0.1], [1.1]], [0.25, 0.2, 0.25])
TOP, BOTTOM = 3.0, 0.05  # noise levels; the end is above 0, where every step is of full order
COLOURS = {"euler": "tab:orange", "heun": "tab:blue"}


def levels(steps: int) -> torch.Tensor:
    return step_grid(EDM(1.0, BOTTOM, TOP), steps + 1, "karras")[:-1]


def recorded(path: list[tuple[float, torch.Tensor]]) -> Callback:
    return lambda step, sigma, x, x0: path.append((sigma, x))


def main(out: Path = Path("runs/examples"), small: bool = False) -> dict[str, dict[int, float]]:
    """Returns, of each method, its mean error in x at the end by the number of evaluations."""
    samplers = {"euler": euler, "heun": heun}
    errors: dict[str, dict[int, float]] = {name: {} for name in samplers}
    start, end = DATA.quantiles(400, TOP), DATA.quantiles(400, BOTTOM)
    for name, sampler in samplers.items():
        for steps in [4, 8, 16, 32, 64, 128] if small else [3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256]:
            calls: list[float] = []
            x = sampler(counted(DATA.denoise, calls), start, levels(steps))
            errors[name][len(calls)] = float((x - end).abs().mean())

    fig, (left, right) = figure(10, 4, 1, 2, width_ratios=(1.5, 1))
    fine, height = torch.linspace(TOP, BOTTOM, 300), torch.linspace(-3, 3, 300, dtype=torch.float64)
    density = torch.stack([DATA.log_density(height[:, None], float(sigma)).exp() for sigma in fine], 1)
    left.pcolormesh(
        fine.numpy(),
        height.numpy(),
        ((density / density.amax(0)) ** 0.7).numpy(),
        cmap="Greys",
        vmax=2.5,
        rasterized=True,
    )
    exact = torch.stack([DATA.quantiles(6, float(sigma)) for sigma in fine])[..., 0]  # [levels, 6]
    left.plot(fine, exact, color="black", linewidth=1, label=["exact flow"] + [None] * 5)
    for name, sampler in samplers.items():
        path: list[tuple[float, torch.Tensor]] = []
        last = sampler(DATA.denoise, DATA.quantiles(6, TOP), levels(5), callback=recorded(path))
        places = torch.stack([x for _, x in path] + [last])[..., 0]
        label = f"{name.capitalize()}, 5 steps"
        left.plot(levels(5), places, "o-", color=COLOURS[name], linewidth=1, label=[label] + [None] * 5)
    left.set(xlim=(TOP, 0), ylim=(-3, 3), xlabel="noise level σ (sampling runs to the right)", ylabel="x = x₀ + σ ε")
    left.set(title="trajectories over the density of x")
    left.legend(loc="upper right")

    for order, name in ((1, "euler"), (2, "heun")):
        evaluations = torch.tensor([10.0, 200.0])  # a line a little below the points
        line = 0.6 * list(errors[name].values())[-1] * (list(errors[name])[-1] / evaluations) ** order
        right.plot(evaluations, line, "--", color="0.6", linewidth=1)
        right.annotate(f"order {order}", (10, float(line[0])), (-4, -10), textcoords="offset points", ha="right")
        right.plot(*zip(*errors[name].items(), strict=True), "o-", color=COLOURS[name], label=name.capitalize())
    right.set(xscale="log", yscale="log", xlabel="evaluations of the denoiser", ylabel="mean error of x at the end")
    right.set_title("error against cost")
    right.grid(alpha=0.25)
    right.legend()
    save(fig, out, "euler_heun")
    return errors


if __name__ == "__main__":
    print(tyro.cli(main))
