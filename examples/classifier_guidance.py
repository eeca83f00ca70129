"""Classifier guidance (arXiv:2105.05233): a model that is told nothing, and a classifier of noisy points or pictures.

Where everything is known, the plane of `examples/guidance.py`: with the exact classifier and scale 1 the samples have
the distribution of their class; a larger scale makes the class surer and the samples fewer of a kind.

With `--model` (unconditional digits), `--classifier` (of noisy ones) and `--judge` (another, of finished ones), as
`train/ldm.py --preset mnist-unconditional`, `train/classifier.py` and `train/classifier.py --preset clean` leave them,
it paints digits on demand, and the share that the judge takes for what was asked for. Measured, of 200 digits from 20
ancestral steps: 9.5, 27.5, 51.5, 76.5, 89 and 93.5% at scales 0, 0.5, 1, 2, 4 and 8. An exact classifier would do at
scale 1; this one, trained for minutes, wants more, as the paper's did (section 4.3). The judge is right about 98.9% of
the digits that it was not trained on.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from examples.guidance import CLASSES, EVERY, measured
from examples.toys import normal, save, square
from ldm.guidance import classifier_guided
from ldm.samplers import heun
from ldm.schedule import EDM, step_grid
from pipelines import TextToImagePipeline
from pipelines.classifier import load_classifier
from train.judge import verdicts

SCALES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)


def log_probability(x: Tensor, sigma: Tensor | float) -> Tensor:
    """Exact log p(y | x; sigma) of clouds [3, N, 2], class y wished for cloud y; summed over its points: [3]."""
    log = torch.stack([data.log_density(x, sigma) for data in CLASSES])  # [class, cloud, N]
    return log.log_softmax(0).diagonal().sum(0)


def points(scale: float, number: int, steps: int) -> Tensor:
    """[3, number, 2], each cloud guided to its class."""
    start = 80 * normal(0)(torch.empty(3, number, 2, dtype=torch.float64))
    guided = classifier_guided(EVERY.denoise, log_probability, scale)
    return heun(guided, start, step_grid(EDM(1.0, 0.01, 80.0), steps, "karras"))


def digits(
    folders: list[Path], scales: Sequence[float], each: int, steps: int
) -> tuple[Sequence[str], dict[float, Tensor], dict[float, dict[str, float]]]:
    """Names of the classes; by scale pictures [classes, each, H, W] in [0, 1], from the same noise at every scale; and
    by scale the share that the judge puts into the class wished for."""
    pipe = TextToImagePipeline.from_pretrained(folders[0], device="cpu")
    classifier, judge = load_classifier(folders[1]), load_classifier(folders[2])
    names = classifier.config.labels
    wished = [name for name in names for _ in range(each)]
    answers = torch.tensor([judge.config.labels.index(name) for name in wished])
    pictures, numbers = {}, {}
    for scale in scales:
        guided: dict[str, Any] = {"classifier": classifier, "classifier_scale": scale}
        images = pipe(wished, steps=steps, sampler="ddpm", seed=0, **guided).images
        x = torch.from_numpy(np.stack([np.asarray(image.convert("L")) for image in images])) / 255
        pictures[scale] = x.view(len(names), each, *x.shape[1:])
        numbers[scale] = {"right class": float((verdicts(judge, images) == answers).double().mean())}
    return names, pictures, numbers


def main(
    out: Path = Path("runs/examples"),
    small: bool = False,
    model: Path | None = None,
    classifier: Path | None = None,
    judge: Path | None = None,
) -> dict[str, dict[float, dict[str, float]]]:
    """Returns by scale what `examples.guidance.measured` finds of the points ("data": of exact draws), and under
    "digits", with all three folders, what `digits` does.

    Raises ValueError when some of the three are given and others not.
    """
    folders = [folder for folder in (model, classifier, judge) if folder]
    if len(folders) in (1, 2):
        raise ValueError("digits need --model, --classifier and --judge: give all three, or none for the plane alone")
    scales = (0.0, 1.0, 8.0) if small else SCALES
    clouds = {scale: points(scale, 500 if small else 4000, 20 if small else 40) for scale in scales}
    found = {"points": {scale: measured(x) for scale, x in clouds.items()}}
    exact = torch.stack([data.draw(clouds[1.0].shape[1], normal(1)) for data in CLASSES])
    found["data"] = {1.0: measured(exact)}

    fig = Figure((11, 6.6 if folders else 3), layout="constrained")
    parts: Any = fig.subfigures(2, 1, height_ratios=(1, 1.2)) if folders else [fig]
    axes = parts[0].subplots(1, 4)
    around = torch.linspace(-3, 3, 100, dtype=torch.float64)
    plane = torch.stack(torch.meshgrid(around, around, indexing="xy"), -1)
    for ax, scale, title in ((axes[0], 1.0, "the class itself"), (axes[1], scales[-1], "surer, fewer of a kind")):
        square(ax, f"scale {scale:g}: {title}", 3)
        for i, (data, x) in enumerate(zip(CLASSES, clouds[scale], strict=True)):
            ax.scatter(*x[:1000].T, s=1.5, alpha=0.5, color=f"C{i}")
            ax.contour(around, around, data.log_density(plane).exp(), [0.02, 0.15], colors=f"C{i}", linewidths=0.8)
    for ax, key, label in (
        (axes[2], "right class", "share in the right class"),
        (axes[3], "distance", "distance to the class"),
    ):
        ax.plot(scales, [found["points"][scale][key] for scale in scales], "o-")
        ax.axhline(found["data"][1.0][key], color="0.6", linestyle="--", label="the data itself")
        ax.set(xlabel="scale", title=label)
        ax.grid(alpha=0.25)
        ax.legend()
    if folders:
        names, pictures, found["digits"] = digits(folders, scales, 2 if small else 20, 4 if small else 20)
        left, right = parts[1].subplots(1, 2, width_ratios=(2, 1))
        rows = [torch.cat(list(pictures[scale][:, 0]), dim=1) for scale in scales]
        side = len(rows[0])
        left.imshow(torch.cat(rows).numpy(), cmap="gray", vmin=0, vmax=1)
        left.set(yticks=[side * (i + 0.5) for i in range(len(scales))], yticklabels=[f"{scale:g}" for scale in scales])
        left.set(xticks=[side * (i + 0.5) for i in range(len(names))], xticklabels=[name.split()[-1] for name in names])
        left.set(ylabel="scale", title="digits on demand, each column from one noise")
        left.tick_params(length=0)
        right.plot(scales, [found["digits"][scale]["right class"] for scale in scales], "o-")
        right.set(xlabel="scale", ylim=(0, 1.05), title="share that the judge takes for the digit wished for")
        right.grid(alpha=0.25)
    save(fig, out, "classifier_guidance")
    return found


if __name__ == "__main__":
    try:
        print(tyro.cli(main))
    except ValueError as error:
        sys.exit(f"error: {error}")
