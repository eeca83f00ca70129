"""Classifier-free guidance where everything is known: what a larger scale gains and what it costs.

Three classes overlap in the plane. With scale 1 the samples have exactly the distribution of their class; a larger
scale (arXiv:2207.12598) makes the class surer and the samples fewer of a kind. Guiding only at middle noise levels
(arXiv:2404.07724) keeps most of the one at less of the other; rescaling (arXiv:2305.08891) brings back the size of the
network's output, here of a class's whole cloud of points, as of a picture's pixels.
"""

import sys
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro
from torch import Tensor, nn

from examples.toys import Mixture, figure, normal, save, sliced_wasserstein, square
from ldm.denoiser import Context, Denoiser
from ldm.guidance import classifier_free
from ldm.samplers import heun
from ldm.schedule import EDM, VariancePreserving, step_grid

CENTRES = [[[0.1, 1.5], [0.75, 0.5], [-0.4, 0.45]], [[-1.4, -0.6], [-0.5, -0.1], [-0.6, -0.95]],
           [[1.4, -0.6], [0.55, -0.15], [0.5, -1.0]]]  # fmt: skip
CLASSES = [Mixture([0.3, 0.4, 0.3], means, [0.3, 0.3, 0.3]) for means in CENTRES]
NULL = len(CLASSES)
EVERY = Mixture([0.3, 0.4, 0.3] * NULL, [mean for means in CENTRES for mean in means], [0.3] * 3 * NULL)
WAYS: dict[str, dict[str, Any]] = {
    "always": {},
    "rescaled by 0.7": {"rescale": 0.7},
    "0.2 < σ ≤ 1": {"interval": (0.2, 1.0)},
}
SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)


class Exact(Denoiser):
    """The denoiser of a class, or of all: x [B, N, 2], class_labels [B], where NULL is all."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), VariancePreserving.linear(), "epsilon")

    def forward(self, x: Tensor, sigma: Tensor | float, context: Context | None = None) -> Tensor:
        labels = context["class_labels"] if context else [NULL] * len(x)
        return torch.stack(
            [[*CLASSES, EVERY][label].denoise(cloud, sigma) for cloud, label in zip(x, labels, strict=True)]
        )


def measured(x: Tensor) -> dict[str, float]:
    """Means over the classes, of clouds [3, N, 2]."""
    log = torch.stack([data.log_density(x) for data in CLASSES])  # [class, cloud, N]
    wished = torch.arange(NULL)[:, None]
    exact = [data.draw(x.shape[1], normal(9)) for data in CLASSES]
    return {
        "right class": float((log.argmax(0) == wished).double().mean()),
        "spread": sum(float(a.std(0).norm() / b.std(0).norm()) for a, b in zip(x, exact, strict=True)) / NULL,
        "distance": sum(sliced_wasserstein(a, b) for a, b in zip(x, exact, strict=True)) / NULL,
    }


def main(out: Path = Path("runs/examples"), small: bool = False) -> dict[str, dict[float, dict[str, float]]]:
    """Returns for each way of guiding and each scale: the share of samples that a Bayes classifier gives to their
    class, their standard deviation over that of the class, and their sliced Wasserstein distance to it; under "data"
    those of exact draws."""
    number, scales = (500, (0.0, 1.0, 4.0)) if small else (4000, SCALES)
    sigmas = step_grid(EDM(1.0, 0.01, 80.0), 20 if small else 40, "karras")
    start = 80 * normal(0)(torch.empty(NULL, number, 2, dtype=torch.float64))
    cond, null = ({"class_labels": torch.tensor(labels)} for labels in (range(NULL), [NULL] * NULL))
    samples = {
        (way, scale): heun(classifier_free(Exact(), cond, null, scale, **options), start, sigmas)
        for way, options in WAYS.items()
        for scale in scales
    }
    exact = torch.stack([data.draw(number, normal(1)) for data in CLASSES])
    results = {way: {scale: measured(samples[way, scale]) for scale in scales} for way in WAYS}

    fig, axes = figure(11, 5.6, 2, 4)
    panels = [("always", scale) for scale in (0.0, 1.0, 4.0)] + [(way, 4.0) for way in list(WAYS)[1:]]
    for ax, (way, scale) in zip([*axes[0, :3], *axes[1, :2]], panels, strict=True):
        square(ax, f"scale {scale:g}" + ("" if way == "always" else f", {way}"), 3)
        for x in samples[way, scale]:
            ax.scatter(*x[:1000].T, s=1.5, alpha=0.5)
    for ax, key, label in (
        (axes[0, 3], "right class", "share in the right class"),
        (axes[1, 2], "spread", "standard deviation / the class's"),
        (axes[1, 3], "distance", "distance to the class"),
    ):
        for way in WAYS:
            ax.plot(scales, [results[way][scale][key] for scale in scales], "o-", label=way)
        ax.axhline(measured(exact)[key], color="0.6", linestyle="--", label="the data itself")
        ax.set(xlabel="scale", title=label)
        ax.grid(alpha=0.25)
    axes[0, 3].legend()
    save(fig, out, "guidance")
    return results | {"data": {1.0: measured(exact)}}


if __name__ == "__main__":
    print(tyro.cli(main))
