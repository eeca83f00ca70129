"""Does it paint what was asked for? Retrieval of the object by nearest neighbour in pixels, over all candidate objects.

A sample of "an oil painting of a fox on a blue background" counts as right when, of all objects painted by the data's
own code in that style on that ground, the fox is the closest. Pictures are compared at 32×32 pixels, where strokes and
grain have averaged out; each candidate is drawn in two placements that no model was trained on.

With a judge (train/recogniser.py --preset pictograms) it also says which objects and styles that one sees, how near the
samples come to the pictures of training, and how much those of one prompt differ.
"""

import json
import time
from dataclasses import dataclass
from functools import cache as remembered
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from pipelines import TextToImagePipeline
from train.data import generator, to_unit
from train.extractors import open_extractor
from train.grid import grid
from train.hashes import FileHashes
from train.judge import answers_of, open_judge, verdicts
from train.launch import start
from train.metrics import diversity
from train.neighbours import memorisation
from train.pictograms import Pictograms, Row, captions, paint, things
from train.pictures import Example, digest
from train.recogniser import Recogniser
from train.reference import Reference, open_reference
from train.sources import open_source

SIDE = 32  # pixels at which pictures are compared
PLACEMENTS = (10_001, 10_002)  # seeds of the candidates' drawings
UNSEEN = 20_001  # of the drawings that stand for real pictures which no model was trained on
ALIKE, EACH = 8, 6  # prompts whose samples are compared with one another, and how many of each


def small(image: Image.Image) -> np.ndarray:
    """A picture as the vector that is compared: [SIDE * SIDE * 3] float32."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32).ravel()


@remembered
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
        pixels = torch.from_numpy(np.array(paint(*row[:3], size, UNSEEN, font=font)))[None]
        images = to_unit(pixels).to(pipe.device, pipe.dtype)
        output = pipe.model.vae.decode(pipe.model.vae.encode(images).mode).clamp(-1, 1)
        error = ((output.float() - images.float()) / 2).square().mean()
        by_style.setdefault(row.style, []).append(float(-10 * error.log10()))
    every = [value for values in by_style.values() for value in values]
    return {"all": float(np.mean(every)), **{style: float(np.mean(v)) for style, v in sorted(by_style.items())}}


@dataclass
class InMemory:
    """Pictures in memory, as a source."""

    images: list[Image.Image]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return Example(self.images[index], (self.captions[index],), f"picture {index}")

    def picture_size(self, index: int) -> tuple[int, int]:
        return self.images[index].size

    def fingerprint(self, hashes: FileHashes | None = None) -> str:
        return digest(*self.captions, *(image.tobytes() for image in self.images))


def judged(judge: Recogniser, images: list[Image.Image], rows: list[Row]) -> dict[str, float]:
    """Share of the pictures in which the judge sees what was asked for, by task: object, style."""
    asked = {"object": [row.object for row in rows], "style": [row.style for row in rows]}
    shares = {}
    for i, (task, answers) in enumerate(judge.config.tasks):
        found = [answers[place] for place in verdicts(judge, images, i).tolist()]
        shares[task] = sum(a == b for a, b in zip(found, asked[task], strict=True)) / len(rows)
    return shares


def open_pictogram_judge(where: Path, objects: tuple[str, ...]) -> Recogniser:
    """A judge of objects and styles; ValueError where it is none, or does not know all objects of the model."""
    judge = open_judge(where)
    known = answers_of(judge)
    if not isinstance(judge, Recogniser) or set(known) != {"object", "style"}:
        raise ValueError(
            f"the judge {where} tells {', '.join(known)}: expected one of train/recogniser.py --preset pictograms"
        )
    if strange := set(objects) - set(known["object"]):
        raise ValueError(
            f"the judge {where} does not know {len(strange)} of the model's {len(objects)} objects, such as "
            f"{min(strange)!r}: train one with --data pictograms:all"
        )
    return judge


def beside_training(
    pipe: TextToImagePipeline,
    images: list[Image.Image],
    rows: list[Row],
    judge: Path,
    out: Path,
    *,
    data: str,
    seed: int,
    font: str | None,
    cache: Path,
) -> dict[str, Any]:
    """Memorisation and diversity of the samples of training pairs, in the judge's features."""
    accelerator, size = start(), pipe.model.size
    extractor = open_extractor(str(judge), accelerator.device)

    def opened(images: list[Image.Image], captions: list[str]) -> Reference:
        return open_reference(InMemory(images, captions), extractor, size, out / "features", accelerator, workers=0)

    asked = [captions(*row[:3])[0] for row in rows]
    real = [paint(*row[:3], size, UNSEEN, font=font) for row in rows]
    training = open_reference(open_source(data, size, font=font), extractor, size, cache, accelerator, workers=0)
    sheet = out / "neighbours.png"
    found = {"memorisation": memorisation(opened(images, asked), opened(real, asked), training, sheet)}
    some = [prompt for prompt in asked[:ALIKE] for _ in range(EACH)]
    alike: list[Image.Image] = []
    for i in tqdm(range(0, len(some), EACH), desc="several of a prompt"):
        alike += pipe(some[i : i + EACH], seed=seed + 1000 + i).images
    drawn = [paint(*row[:3], size, UNSEEN + i, font=font) for row in rows[:ALIKE] for i in range(EACH)]
    ours, theirs = (diversity(opened(pictures, some).features(), some)[0] for pictures in (alike, drawn))
    found["diversity"] = {"of_a_prompt": ours, "of_its_drawings": theirs, "prompts": len(rows[:ALIKE]), "each": EACH}
    near = found["memorisation"]
    print(
        f"to the nearest training picture, median: of samples {near['samples_to_training']:.3g}, of drawings that were "
        f"not trained on {near['held_out_to_training']:.3g}; between pictures of one prompt: samples {ours:.3g}, "
        f"drawings {theirs:.3g} (features of {judge})"
    )
    return found


def evaluate(
    model: str | Path | None,
    out: Path,
    *,
    prompts: int = 100,
    seed: int = 0,
    font: str | None = None,
    judge: Path | None = None,
    cache: Path = Path("cache"),
) -> dict:
    """Paints `prompts` training pairs and half as many held-out ones, judges them, and writes figures and sheets.

    Returns what evaluation.json holds: the shares of right objects, the misses, the autoencoder's PSNR, the settings;
    with a judge the shares that it finds right, and what `beside_training` says.
    """
    if prompts < 2:
        raise ValueError(f"--prompts {prompts}: expected at least 2")
    pipe = TextToImagePipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    trained_on = pipe.model.defaults.data
    if not trained_on.startswith("pictograms"):
        raise ValueError(
            f"this model was trained on {trained_on or 'unknown data'}, not on pictograms: where it paints classes, "
            "train a judge of them (train/recogniser.py) and give --judge RUN; or a --reference to compare with"
        )
    everything = trained_on.split("+")[0] == "pictograms:all"
    objects = tuple(name for name, thing in things().items() if everything or thing.everyday)
    network = open_pictogram_judge(judge, objects) if judge else None
    out.mkdir(parents=True, exist_ok=True)
    result: dict = {"model": str(model), "objects": len(objects), "seed": seed, "judge": "nearest in 32×32 pixels"}
    for split, count in (("train", prompts), ("held_out", prompts // 2)):
        rows = draw_rows(split, count, objects, seed, font)
        count = len(rows)  # fewer where the split has no more
        asked = [captions(*row[:3])[0] for row in rows]
        images: list[Image.Image] = []
        began = time.perf_counter()
        for i in tqdm(range(0, len(asked), 8), desc=f"painting {split} pairs"):
            images += pipe(asked[i : i + 8], seed=seed + i).images
        seconds = (time.perf_counter() - began) / len(asked)
        found = [nearest(image, row, objects, font) for image, row in zip(images, rows, strict=True)]
        misses = [f"{row.style} {row.object} -> {f}" for row, f in zip(rows, found, strict=True) if f != row.object]
        said = [a if f == row.object else f"wrong ({f}): {a}" for a, f, row in zip(asked, found, rows, strict=True)]
        grid(images, said, columns=10).save(out / f"{split}.png")
        result[split] = {"prompts": count, "right": 1 - len(misses) / count, "misses": misses}
        result[split]["seconds_per_picture"] = seconds
        print(f"{split} pairs: {1 - len(misses) / count:.1%} of {count} closest to their own object")
        if network and judge:
            shares = judged(network, images, rows)
            result[split]["judged"] = shares
            print(f"{split} pairs, by {judge}: " + ", ".join(f"{task} {share:.1%}" for task, share in shares.items()))
            if split == "train":
                beside: dict[str, Any] = {"data": trained_on.split("+")[0], "seed": seed, "font": font, "cache": cache}
                result |= {"judged_by": str(judge), **beside_training(pipe, images, rows, judge, out, **beside)}
    rows = draw_rows("train", 60, objects, seed + 1, font)
    result["reconstruction_psnr_db"] = reconstruction_psnr(pipe, rows, pipe.model.size, font)
    print("reconstructions, dB: " + ", ".join(f"{k} {v:.1f}" for k, v in result["reconstruction_psnr_db"].items()))
    (out / "evaluation.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"figures and sheets in {out}")
    return result
