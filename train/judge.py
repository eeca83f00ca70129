"""Does it paint what was asked for? The verdict of a classifier that was trained apart, on clean pictures.

    accelerate launch train/classifier.py --preset clean --data mnist-train.parquet
    atelier evaluate runs/mnist --judge runs/judge

It is asked at its lowest noise level. How often it is right about real pictures is said when it is trained: no share
of right samples means more than that.
"""

import json
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from conditioning.context import Unconditional
from ldm.classifier import NoisyClassifier
from pipelines import TextToImagePipeline
from pipelines.classifier import load_classifier
from train.data import fit, generator, to_unit
from train.grid import grid
from vae.autoencoder import Identity

LEVEL = 0.05  # of the noise that the judge is shown: the least that it was trained on, nearly
SHOWN = 8  # samples of a class on the sheet


@torch.no_grad()
def verdicts(judge: NoisyClassifier, images: list[Image.Image]) -> torch.Tensor:
    """The likeliest class of each picture, its place in `judge.config.labels`: [N]."""
    config = judge.config
    pixels = torch.stack([torch.from_numpy(fit(image, config.sample_size).copy()) for image in images])
    found = []
    for i, part in enumerate(pixels.split(100)):
        x0 = Identity(config.in_channels).encode(to_unit(part)).mean
        noise = torch.randn(x0.shape, generator=generator(i))
        found.append(judge(x0 + LEVEL * noise, LEVEL).argmax(1))
    return torch.cat(found)


def evaluate_classes(model: str, judge: Path, out: Path, *, prompts: int = 100, seed: int = 0) -> dict:
    """Paints `prompts` pictures, as many of each of the judge's classes, and writes figures and a sheet.

    Of a model that is told nothing it says which classes came, evenly or not. Returns what evaluation.json holds.
    """
    classifier = load_classifier(judge)
    names, channels = classifier.config.labels, classifier.config.in_channels
    if channels not in (1, 3):
        raise ValueError(
            f"the judge {judge} looks at latents of {channels} channels: expected one of pixels "
            "(train/classifier.py --preset clean)"
        )
    pipe = TextToImagePipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    each = prompts // len(names)
    if not each:
        raise ValueError(f"--prompts {prompts}: expected at least {len(names)}, one for each class of the judge")
    told = not isinstance(pipe.model.conditioner, Unconditional)
    asked = [name for name in names for _ in range(each)]
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(asked), 50), desc="painting"):
        part = asked[start : start + 50]
        images += pipe(part if told else [""] * len(part), seed=seed + start).images
    found = verdicts(classifier, images)
    out.mkdir(parents=True, exist_ok=True)
    shown = [image for i in range(len(names)) for image in images[i * each : i * each + min(each, SHOWN)]]
    grid(shown, columns=2 * min(each, SHOWN)).save(out / "samples.png")
    result: dict = {"model": model, "judge": str(judge), "pictures": len(images), "seed": seed}
    if told:
        right = found == torch.arange(len(names)).repeat_interleave(each)
        by_class = right.view(len(names), each).float().mean(1)
        result |= {"right": float(right.float().mean()), "by_class": dict(zip(names, by_class.tolist(), strict=True))}
        print(f"{result['right']:.1%} of {len(images)} pictures are what was asked for, says {judge}")
    else:
        shares = torch.bincount(found, minlength=len(names)) / len(images)
        result["share_of_class"] = dict(zip(names, shares.tolist(), strict=True))
        print(", ".join(f"{name} {share:.1%}" for name, share in result["share_of_class"].items()))
    (out / "evaluation.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"figures and sheet in {out}")
    return result
