"""Five networks, each trained on the plain square error of what it puts out, sample one distribution.

x_0, the noise, the score, v and the velocity of the flow are one denoiser written five ways (`ldm.denoiser`). Colour
shows where a point's starting noise lay: the networks, trained apart, even agree on which noise becomes which point.

The one that predicts x_0 learns the arm's width last: its own square error is least where there is little noise.

The score's network puts out -sigma * score, as in arXiv:2006.09011 (technique 3). That is epsilon, here on the path
x_0 + sigma * eps, and its plain square error is that of the score times sigma² (arXiv:1907.05600, equation 6).
"""

import math
import sys
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro

from examples.toys import figure, fit, normal, save, sliced_wasserstein, spiral, square
from ldm.denoiser import Denoiser
from ldm.loss import Plain, training_noise
from ldm.mlp import MLP
from ldm.samplers import heun
from ldm.schedule import EDM, RectifiedFlow, VariancePreserving, step_grid

DDPM = VariancePreserving.linear()
PREDICTIONS = {
    "x_0": (DDPM, "sample"),
    "noise": (DDPM, "epsilon"),
    "score": (EDM(1.0), "epsilon"),
    "v": (DDPM, "v"),
    "velocity": (RectifiedFlow(), "velocity"),
}
TOP = 20.0  # noise level where sampling starts


def main(out: Path = Path("runs/examples"), small: bool = False) -> dict[str, dict[str, float]]:
    """Returns for each network, in units of about the data's standard deviation: the "distance" of its samples to fresh
    data (sliced Wasserstein); how far they are "astray", the mean way to the next of 5000 points of the data; and how
    far from the others' samples of the same noise, "apart", a median. "data" is another draw of it."""
    number, turns = (2000, 1) if small else (5000, 2)
    width, updates, rate = (64, 300, 8e-3) if small else (96, 2000, 5e-3)
    data, fresh, another = (spiral(n, seed, turns) for seed, n in enumerate((20_000, number, number)))
    start = normal(3)(fresh)
    samples = {}
    for name, (schedule, prediction) in PREDICTIONS.items():
        torch.manual_seed(0)
        denoiser = Denoiser(MLP(2, width=width), schedule, prediction)
        levels = training_noise("log_normal", schedule, mean=-0.5, std=1.8)
        fit(denoiser, data, levels, Plain(denoiser), updates=updates, batch=256, rate=rate)
        with torch.no_grad():
            x = math.sqrt(1 + TOP**2) * start
            samples[name] = heun(denoiser, x, step_grid(EDM(1.0, 0.002, TOP), 18, "karras"))

    middle = torch.stack(list(samples.values())).median(0).values
    results = {
        name: {
            "distance": sliced_wasserstein(x, fresh),
            "astray": float(torch.cdist(x, data[:5000]).amin(1).mean()),
            "apart": float((x - middle).norm(dim=1).median()),
        }
        for name, x in {**samples, "data": another}.items()
    }

    fig, axes = figure(9, 6.4, 2, 3)
    turn = torch.atan2(start[:, 1], start[:, 0])
    for ax, (name, x) in zip(axes.flat, {"data": another, **samples}.items(), strict=True):
        title = "another draw of the data" if name == "data" else f"network that predicts {name}"
        square(ax, f"{title}\ndistance {results[name]['distance']:.3f}, astray {results[name]['astray']:.3f}", 2.4)
        colours: dict[str, Any] = {"color": "0.4"} if name == "data" else {"c": turn, "cmap": "twilight_shifted"}
        ax.scatter(*x.T, s=1, **colours)
    save(fig, out, "interpretations")
    return results


if __name__ == "__main__":
    print(tyro.cli(main))
