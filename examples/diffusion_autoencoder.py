"""A picture is two codes (arXiv:2111.15640): what it shows, and the noise that makes it this picture of all such.

    python examples/diffusion_autoencoder.py --model runs/mnist-diffae --judge runs/judge

Rows: reconstructions from both codes, variations from other noise, the way from one picture to another, two attributes
taken away and added, pictures of nothing given. Beside them what reconstructions lose to the number of steps. The model
is one of `train/diffae.py --preset mnist`, shown on digits that it did not train on; the judge, one of
`train/classifier.py --preset clean`, says whether variations show the same digit: 199 of 200 do. Two minutes of a core.
"""

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from conditioning.semantic import SemanticConfig
from examples.toys import save
from pipelines.classifier import load_classifier
from pipelines.codes import Codes, fit_attribute
from pipelines.diffusion_autoencoder import DiffusionAutoencoderPipeline
from train import diffae
from train.data import fit, permutation
from train.grid import grid
from train.judge import verdicts
from train.sources import open_source

COLUMNS, REACH = 8, 3.0  # pictures in a row; how far an attribute is moved, in standard deviations of the codes
ERRORS = {"reconstruction": "from both codes", "variation": "from other noise"}  # number: row


def ink(pixels: np.ndarray) -> np.ndarray:
    """Mean brightness, [N] of [N, H, W] in [0, 1]: of digits, how thick the strokes are."""
    return pixels.mean((1, 2))


def slant(pixels: np.ndarray) -> np.ndarray:
    """How far what is bright leans to the right from its foot to its head, over its height: [N]."""
    share = pixels / pixels.sum((1, 2), keepdims=True).clip(1e-6)
    y, x = np.mgrid[: pixels.shape[1], : pixels.shape[2]]
    up = (share * y).sum((1, 2), keepdims=True) - y
    return (share * x * up).sum((1, 2)) / (share * up**2).sum((1, 2)).clip(1e-6)


def grey(images: list[Image.Image]) -> np.ndarray:
    """[N, H, W] in [0, 1]."""
    return np.stack([np.asarray(image.convert("L"), np.float32) / 255 for image in images])


def error(images: list[Image.Image], others: list[Image.Image]) -> float:
    """Mean square difference, where the range of a pixel is 1."""
    return float(np.square(grey(images) - grey(others)).mean())


def trained(out: Path) -> Path:
    """A model of 64 straight strokes at 16×16, learnt in seconds."""
    for width, lean, x in product((1, 2, 3, 4), np.linspace(-4, 4, 8), (7, 9)):
        image = Image.new("L", (16, 16))
        ImageDraw.Draw(image).line((x - lean, 13, x + lean, 3), fill=255, width=width)
        (out / "strokes" / f"{width} wide").mkdir(parents=True, exist_ok=True)
        image.save(out / "strokes" / f"{width} wide" / f"{lean:.1f} from {x}.png")
    config = replace(
        diffae.PRESETS["mnist"],
        data=str(out / "strokes"),
        output=out / "diffae",
        cache=out / "cache",
        unet=replace(diffae.TEXT_IN_PIXELS, block_out_channels=(16, 16, 16)),
        encoder=SemanticConfig(code_dim=8, in_channels=1, block_out_channels=(8, 16)),
        size=16,
        noise_mean=1.0,
        updates=80,
        batch_size=24,
        learning_rate=1e-2,
        ema_decay=0.95,
        steps=6,
        code_width=64,
        code_updates=50,
        workers=0,
    )
    return diffae.main(config)


def judged(pipe: DiffusionAutoencoderPipeline, judge: Path, images: list[Image.Image], classes: list[str]) -> float:
    """The share of variations, one of each picture, that are of the picture's class."""
    classifier = load_classifier(judge)
    found = verdicts(classifier, pipe.vary(images, seed=0)).tolist()
    return float(np.mean([classifier.config.labels[i] == name for i, name in zip(found, classes, strict=True)]))


def main(
    out: Path = Path("runs/examples"),
    small: bool = False,
    model: Path = Path("runs/mnist-diffae"),
    judge: Path | None = None,
) -> dict[str, float]:
    """Returns the errors of reconstructions and variations, how much of each attribute pictures have at both ends of
    their row, and with a judge the share of 200 variations that show what their pictures show."""
    pipe = DiffusionAutoencoderPipeline.from_pretrained(trained(out) if small else model)
    source = open_source(pipe.model.defaults.data, pipe.model.size, captions=judge is not None)
    examples = [source[i] for i in permutation(len(source), 0, -1)[:1000].tolist()]  # the first were not trained on
    images = [Image.fromarray(fit(example.image, pipe.model.size)) for example in examples]
    semantic, first = pipe.semantic(images), images[:COLUMNS]
    codes = pipe.encode(first)

    rows = {"pictures": first, "from both codes": pipe.decode(codes)}
    rows |= {name: pipe.vary(first, seed=i * COLUMNS) for i, name in enumerate(("from other noise", "and other"))}
    rows |= {f"picture {i + 1} to {i + 2}": pipe.interpolate(first[i], first[i + 1], COLUMNS) for i in (0, 2)}
    numbers = {name: error(first, rows[row]) for name, row in ERRORS.items()}
    fig = Figure((10.5, 7.6), layout="constrained")
    axes = fig.subplot_mosaic([["rows", "errors"], ["rows", "attributes"]], width_ratios=(1.9, 1))
    shares = np.linspace(-REACH, REACH, COLUMNS)
    for measure, label in ((ink, "ink"), (slant, "slant")):
        amounts = measure(grey(images))
        plane = fit_attribute(semantic, torch.from_numpy(amounts > np.median(amounts)))
        moved = torch.cat([plane.move(codes.semantic, share) for share in shares])
        painted = pipe.decode(Codes(moved, codes.stochastic.repeat(COLUMNS, 1, 1, 1)))
        rows |= {f"picture {i + 1}, {label}": painted[i::COLUMNS] for i in (0, 1)}
        means = (measure(grey(painted)).reshape(COLUMNS, -1).mean(1) - amounts.mean()) / amounts.std()
        axes["attributes"].plot(shares, means, "o-", label=label)
        numbers |= {f"least {label}": float(means[0]), f"most {label}": float(means[-1])}
    rows |= {name: pipe.sample(COLUMNS, seed=i * COLUMNS) for i, name in enumerate(("new", "and new"))}

    steps = (3, 6) if small else (5, 10, 20, 50, 100)
    for sampler, cost in (("ddim", 1), ("heun", 2)):
        encoded = [(n, pipe.encode(first, steps=n, sampler=sampler)) for n in steps]
        errors = [error(first, pipe.decode(codes, steps=n, sampler=sampler)) for n, codes in encoded]
        axes["errors"].loglog([cost * n for n in steps], errors, "o-", label=sampler)
    axes["errors"].axhline(numbers["variation"], color="0.6", linestyle="--", label="from other noise")
    axes["errors"].set(xlabel="evaluations of the network, each way", ylabel="mean square error of reconstructions")
    axes["attributes"].set(
        xlabel="semantic code moved by, standard deviations", ylabel="measured, standard deviations of all"
    )
    for ax in (axes["errors"], axes["attributes"]):
        ax.grid(alpha=0.25)
        ax.legend()
    sheet = grid([image for row in rows.values() for image in row], columns=COLUMNS)
    middles = (np.arange(len(rows)) + 0.5) * sheet.height / len(rows)
    axes["rows"].imshow(sheet)
    axes["rows"].set(xticks=[], yticks=middles, yticklabels=list(rows))
    axes["rows"].tick_params(length=0)
    axes["rows"].spines[:].set_visible(False)
    save(fig, out, "diffusion_autoencoder")
    if judge:
        numbers["variations of the right class"] = judged(
            pipe, judge, images[:200], [example.captions[0] for example in examples[:200]]
        )
    return numbers


if __name__ == "__main__":
    try:
        print(tyro.cli(main))
    except ValueError as wrong:
        sys.exit(f"error: {wrong}")
