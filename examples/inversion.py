"""DDIM run backwards: from a picture to the noise that becomes it again (arXiv:2010.02502, sections 4.3, 5.3 and 5.4).

Pictures are drawn, encoded by the bundled model, inverted up its probability flow and sampled down again. What comes
back differs by an error that falls with the steps; of order 2 soon only the step from and to noise level 0 is left of
it. Between the noises of two pictures, along a great circle, and between their captions lie other pictures.

Below, other members of DDIM's family on a mixture in one dimension: with every eta the distribution at each noise level
is the same (section 3.1), but with more of the noise drawn anew a path forgets where it began.
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
from ldm.denoiser import Denoise, Denoiser
from ldm.samplers import ddim, heun, invert
from ldm.schedule import EDM, step_grid
from pipelines import TextToImagePipeline
from pipelines.codes import slerp
from pipelines.image import image_batch
from pipelines.picture import to_pil
from train.pictograms import captions, paint

PICTURES = (
    *(("fox", "plain", "blue"), ("owl", "plain", "yellow")),
    *(("apple", "oil", "white"), ("strawberry", "oil", "pink")),
)
SAMPLERS: dict[int, Callable[..., Tensor]] = {1: ddim, 2: heun}  # by order
COLUMNS = 8
DATA = Mixture([0.4, 0.25, 0.35], [[-1.2], [0.1], [1.1]], [0.25, 0.2, 0.25])
TOP, BOTTOM = 20.0, 0.02  # noise levels
ETAS = (0.0, 0.5, 1.0)


def family(number: int, steps: int) -> dict[float, dict[float, Tensor]]:
    """By eta and noise level: x [number], from the same start."""
    sigmas = step_grid(EDM(1.0, BOTTOM, TOP), steps + 1, "exponential")[:-1]
    start = DATA.quantiles(number, TOP)[torch.randperm(number, generator=torch.Generator().manual_seed(0))]
    paths: dict[float, dict[float, Tensor]] = {}
    for eta in ETAS:
        path = paths[eta] = {}

        def keep(step: int, sigma: float, x: Tensor, x0: Tensor, path: dict[float, Tensor] = path) -> None:
            path[sigma] = x[:, 0]

        path[BOTTOM] = ddim(DATA.denoise, start, sigmas, eta=eta, noise=normal(1), callback=keep)[:, 0]
    return paths


def rank_correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double())[0, 1])


def told(denoiser: Denoiser, hidden: Tensor) -> Denoise:
    """The denoiser of pictures with these captions, [B, words, width]."""
    return lambda x, sigma: denoiser(x, sigma, {"encoder_hidden_states": hidden})


@torch.no_grad()
def main(out: Path = Path("runs/examples"), small: bool = False) -> dict[str, dict[float, float]]:
    """Returns "order 1" and "order 2", the root mean square error of the returned latents (of about unit variance) by
    the number of steps each way; "distance" by eta, the largest at any level, in standard deviations there; and
    "correlation" by eta, of the ranks at the end with those at the start."""
    counts, shares, number = ((5, 10), 3, 4000) if small else ((5, 10, 20, 40), COLUMNS, 40_000)
    model = TextToImagePipeline.from_pretrained(device="cpu").model
    chosen = PICTURES[:2] if small else PICTURES
    pictures = image_batch([paint(*one, model.size) for one in chosen], len(chosen), 1, None, None, model.vae.downscale)
    x0 = model.vae.encode(pictures).mode
    hidden = model.conditioner([captions(*one)[0] for one in chosen])["encoder_hidden_states"]

    results: dict[str, dict[float, float]] = {}
    returned = {"drawn": pictures[-1]}
    for order, sampler in SAMPLERS.items():
        results[f"order {order}"] = {}
        for steps in counts:
            sigmas = step_grid(model.schedule, steps, "karras")
            denoise = told(model.denoiser, hidden)
            noises = invert(denoise, x0, sigmas.flip(0), order=order)
            back = sampler(denoise, noises, sigmas)
            results[f"order {order}"][steps] = float((back - x0).square().mean().sqrt())
            returned[f"order {order},\n{steps} steps"] = model.vae.decode(back[-1:])[0]
    between = []  # [shares, 3, H, W] each, from the noises of order 2 and the most steps
    for a in range(0, len(chosen), 2):
        ways = torch.linspace(0, 1, shares).tolist()
        noise = torch.cat([slerp(noises[a : a + 1], noises[a + 1 : a + 2], share) for share in ways])
        captioned = torch.stack([torch.lerp(hidden[a], hidden[a + 1], share) for share in ways])
        between.append(model.vae.decode(heun(told(model.denoiser, captioned), noise, sigmas)))
    paths = family(number, 50 if small else 200)
    exact = {sigma: DATA.quantiles(number, sigma) for sigma in [*paths[0.0]][:: 1 if small else 5]}
    results["distance"] = {
        eta: max(distance(path[sigma][:, None], points) for sigma, points in exact.items())
        for eta, path in paths.items()
    }
    kept = {eta: [rank_correlation(path[TOP], x) for x in path.values()] for eta, path in paths.items()}
    results["correlation"] = {eta: values[-1] for eta, values in kept.items()}

    fig = Figure((10, 7.2), layout="constrained")
    parts: Any = fig.subfigures(2, 1, height_ratios=(1.2, 1))
    above, below = parts
    rows = above.subplots(1 + len(between), 2 + max(shares, len(returned) - 2), squeeze=False)
    for ax in rows.flat:
        ax.axis("off")
    for ax, (name, picture) in zip(rows[0], returned.items(), strict=False):
        ax.imshow(to_pil(picture))
        ax.set_title(name)
    for line, a, strip in zip(rows[1:], range(0, len(chosen), 2), between, strict=True):
        for ax, picture in zip(line, [pictures[a], *strip, pictures[a + 1]], strict=False):
            ax.imshow(to_pil(picture))
        line[0].set_title("drawn")
        line[shares + 1].set_title("drawn")
        line[(shares + 1) // 2].set_title("from the noise of one to that of the other")
    left, middle, right = below.subplots(1, 3)
    for order, marker in zip(SAMPLERS, "os", strict=True):
        errors = results[f"order {order}"]
        left.plot([order * steps for steps in errors], list(errors.values()), f"{marker}-", label=f"order {order}")
    left.set(xscale="log", yscale="log", xlabel="evaluations each way", ylabel="root mean square error of the latents")
    left.set(title="pictures there and back", xticks=[5, 10, 20, 40, 80], xticklabels=["5", "10", "20", "40", "80"])
    left.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    left.grid(alpha=0.25)
    left.legend()
    places = torch.linspace(-2.2, 2.2, 300, dtype=torch.float64)
    middle.fill_between(places, DATA.log_density(places[:, None], BOTTOM).exp(), color="0.88", label="density")
    for i, (eta, path) in enumerate(paths.items()):
        label = f"η = {eta:g}"
        middle.hist(
            path[BOTTOM].numpy(), 60, range=(-2.2, 2.2), density=True, histtype="step", color=f"C{i}", label=label
        )
        right.plot(list(path), kept[eta], color=f"C{i}", label=label)
    middle.set(
        xlabel="x at the end",
        ylabel="density",
        title="the distribution is the same for every η",
        yticks=[],
        ylim=(0, 0.85),
    )
    middle.legend(loc="upper center", ncols=2)
    right.set(xscale="log", xlim=(TOP, BOTTOM), xlabel="noise level σ (sampling runs to the right)", ylim=(0, 1.05))
    right.set(ylabel="rank correlation", title="what a path keeps of its start")
    right.legend(loc="upper right", bbox_to_anchor=(1, 0.93))
    save(fig, out, "inversion")
    return results


if __name__ == "__main__":
    print(tyro.cli(main))
