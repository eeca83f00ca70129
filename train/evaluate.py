"""Does it paint what was asked for? Retrieval of the object by nearest neighbour in pixels, over all candidate objects.

A sample of "an oil painting of a fox on a blue background" counts as right when, of all objects painted by the data's
own code in that style on that ground, the fox is the closest. Pictures are compared at 32×32 pixels, where strokes and
grain have averaged out; each candidate is drawn in two placements that no model was trained on.
"""

import json
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from pipelines import TextToImagePipeline
from train.data import generator, to_unit
from train.grid import grid
from train.pictograms import Pictograms, Row, captions, paint, things

SIDE = 32  # pixels at which pictures are compared
PLACEMENTS = (10_001, 10_002)  # seeds of the candidates' drawings


def small(image: Image.Image) -> np.ndarray:
    """A picture as the vector that is compared: [SIDE * SIDE * 3] float32."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32).ravel()


@cache
def candidates(objects: tuple[str, ...], style: str, ground: str, size: int, font: str | None) -> np.ndarray:
    """All objects in this style on this ground, [objects, placements, SIDE * SIDE * 3]."""
    return np.stack([[small(paint(o, style, ground, size, seed, font=font)) for seed in PLACEMENTS] for o in objects])


def nearest(image: Image.Image, row: Row, objects: tuple[str, ...], font: str | None = None) -> str:
    """The object whose painting, in the row's style and ground, is closest to the picture."""
    known = candidates(objects, row.style, row.ground, image.width, font)
    distances = np.square(known - small(image)).sum(-1).min(1)
    return objects[int(distances.argmin())]


def draw_rows(split: str, count: int, objects: tuple[str, ...], seed: int, font: str | None) -> list[Row]:
    """`count` distinct rows of the split, drawn at random."""
    rows = Pictograms(size=64, objects=objects, split=split, font=font).rows
    order = torch.randperm(len(rows), generator=generator(seed, len(split)))
    return [rows[i] for i in order[:count].tolist()]


@torch.no_grad()
def reconstruction_psnr(pipe: TextToImagePipeline, rows: list[Row], size: int, font: str | None) -> dict[str, float]:
    """PSNR in dB of the autoencoder's reconstructions of freshly drawn pictures, in all and by style."""
    by_style: dict[str, list[float]] = {}
    for row in rows:
        pixels = torch.from_numpy(np.array(paint(*row[:3], size, 20_001, font=font)))[None]
        images = to_unit(pixels).to(pipe.device, pipe.dtype)
        output = pipe.model.vae.decode(pipe.model.vae.encode(images).mode).clamp(-1, 1)
        error = ((output.float() - images.float()) / 2).square().mean()
        by_style.setdefault(row.style, []).append(float(-10 * error.log10()))
    every = [value for values in by_style.values() for value in values]
    return {"all": float(np.mean(every)), **{style: float(np.mean(v)) for style, v in sorted(by_style.items())}}


def evaluate(
    model: str | Path | None, out: Path, *, prompts: int = 100, seed: int = 0, font: str | None = None
) -> dict:
    """Paints `prompts` training pairs and half as many held-out ones, judges them, and writes figures and sheets.

    Returns what evaluation.json holds: the shares of right objects, the misses, the autoencoder's PSNR, the settings.
    """
    if prompts < 2:
        raise ValueError(f"--prompts {prompts}: expected at least 2")
    pipe = TextToImagePipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    trained_on = pipe.model.defaults.data
    if not trained_on.startswith("pictograms"):
        raise ValueError(
            f"this model was trained on {trained_on or 'unknown data'}, not on pictograms: where it paints classes, "
            "train a classifier of them (train/classifier.py --preset clean) and give --judge RUN"
        )
    everything = trained_on.split("+")[0] == "pictograms:all"
    objects = tuple(name for name, thing in things().items() if everything or thing.everyday)
    out.mkdir(parents=True, exist_ok=True)
    result: dict = {"model": str(model), "objects": len(objects), "seed": seed, "judge": "nearest in 32×32 pixels"}
    for split, count in (("train", prompts), ("held_out", prompts // 2)):
        rows = draw_rows(split, count, objects, seed, font)
        count = len(rows)  # fewer where the split has no more
        asked = [captions(*row[:3])[0] for row in rows]
        images: list[Image.Image] = []
        began = time.perf_counter()
        for start in tqdm(range(0, len(asked), 8), desc=f"painting {split} pairs"):
            images += pipe(asked[start : start + 8], seed=seed + start).images
        seconds = (time.perf_counter() - began) / len(asked)
        found = [nearest(image, row, objects, font) for image, row in zip(images, rows, strict=True)]
        misses = [f"{row.style} {row.object} -> {f}" for row, f in zip(rows, found, strict=True) if f != row.object]
        said = [a if f == row.object else f"wrong ({f}): {a}" for a, f, row in zip(asked, found, rows, strict=True)]
        grid(images, said, columns=10).save(out / f"{split}.png")
        result[split] = {"prompts": count, "right": 1 - len(misses) / count, "misses": misses}
        result[split]["seconds_per_picture"] = seconds
        print(f"{split} pairs: {1 - len(misses) / count:.1%} of {count} closest to their own object")
    rows = draw_rows("train", 60, objects, seed + 1, font)
    result["reconstruction_psnr_db"] = reconstruction_psnr(pipe, rows, pipe.model.size, font)
    print("reconstructions, dB: " + ", ".join(f"{k} {v:.1f}" for k, v in result["reconstruction_psnr_db"].items()))
    (out / "evaluation.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"figures and sheets in {out}")
    return result
