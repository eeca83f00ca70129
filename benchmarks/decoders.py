"""Decoders of the bundled model's latents, side by side:

    python benchmarks/decoders.py runs/bundled-vae runs/decoder runs/crisper bundled --judge runs/pictograms-recogniser

What each makes of the latents of fresh drawings, as they are and with noise in them, and of latents that the bundled
model paints, the same for all: dB, fine detail (the mean absolute Laplacian, in grey levels, beside that of drawings),
and what the judge finds right in the samples. Beside the numbers a sheet of middles at four times their size:
a drawing, what each gives back of it, and a sample by each.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from benchmarks.files import RESULTS, write_aside
from benchmarks.leads import PAINTED, asked_rows, drawn
from pipelines import TextToImagePipeline
from pipelines.picture import to_pil
from train.build import open_autoencoder
from train.cache import weights_digest
from train.data import generator, to_unit
from train.evaluate import draw_rows, drawn_afresh, judged, open_pictogram_judge
from train.extractors import open_extractor
from train.grid import grid
from train.launch import errors_said
from train.machine import described
from train.metrics import Moments, frechet_distance, psnr
from train.pictograms import Row, captions, objects_of
from train.samples import NOISES, model_digest
from vae.autoencoder import Autoencoder

ZOOM = 4


@dataclass(frozen=True)
class Options:
    decoders: tyro.conf.Positional[tuple[str, ...]]  # autoencoders of the same latents: folders, or "bundled"
    judge: Path  # a run of train/recogniser.py --preset pictograms
    drawings: int = 240  # that are given back
    prompts: int = 200  # pairs that were trained on, and as many held out, whose latents the bundled model paints
    levels: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2)  # of noise, where latents have a deviation of 1
    out: Path = RESULTS / "decoders.json"

    def __post_init__(self) -> None:
        if self.levels[:1] != (0.0,):
            raise ValueError(f"--levels {' '.join(map(str, self.levels))}: expected 0 first, latents as they are")


@torch.no_grad()
def decoded(vae: Autoencoder, latents: Tensor) -> Tensor:
    return torch.cat([vae.decode(some).clamp(-1, 1) for some in latents.split(16)])


def detail(images: Tensor) -> Tensor:
    """The mean absolute Laplacian of pictures in [-1, 1], in grey levels of 255: [B]."""
    middle, x = images[..., 1:-1, 1:-1], images
    around = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
    return 127.5 * (4 * middle - around).abs().mean((1, 2, 3))


def first_of_styles(rows: list[Row]) -> dict[str, int]:
    return {row.style: i for i, row in sorted(enumerate(rows), key=lambda pair: (pair[1].style, -pair[0]))}


def by_style(values: Tensor, rows: list[Row]) -> dict[str, float]:
    """The means over the pictures of each style, and over all."""
    found = {"all": float(values.mean())}
    for style in first_of_styles(rows):
        found[style] = float(values[[i for i, row in enumerate(rows) if row.style == style]].mean())
    return found


def painted_latents(pipe: TextToImagePipeline, rows: list[Row]) -> Tensor:
    prompts = [captions(*row[:3])[0] for row in rows]
    latents = []
    for i in range(0, len(prompts), 50):
        found = pipe(prompts[i : i + 50], seed=PAINTED * NOISES + i, output_type="latent").images
        latents.append(torch.as_tensor(found).cpu())
    return torch.cat(latents)


def middles(images: Tensor) -> list[Image.Image]:
    """The middle half of each side, enlarged as squares."""
    height, width = images.shape[-2:]
    cut = images[..., height // 4 : height - height // 4, width // 4 : width - width // 4]
    size = (ZOOM * cut.shape[-1], ZOOM * cut.shape[-2])
    return [to_pil(one).resize(size, Image.Resampling.NEAREST) for one in cut]


@torch.no_grad()
def encoded(vae: Autoencoder, pictures: Tensor) -> Tensor:
    return torch.cat([vae.encode(some).mode for some in pictures.split(16)])


def main(options: Options) -> None:
    pipe = TextToImagePipeline.from_pretrained(device="cpu")
    pipe.set_progress_bar_config(disable=True)
    objects, size = objects_of(pipe.model.defaults.data), pipe.model.size
    judge, extractor = open_pictogram_judge(options.judge, objects), open_extractor(str(options.judge))
    networks = {name: open_autoencoder(name).eval() for name in options.decoders}

    rows = draw_rows("train", options.drawings, objects, 1, None)  # those of `atelier evaluate`
    pictures = to_unit(torch.from_numpy(np.stack([np.array(one) for one in drawn_afresh(rows, size, None)])))
    asked = asked_rows(options.prompts, objects)
    every = [row for some in asked.values() for row in some]
    shown, sampled = first_of_styles(rows), first_of_styles(every)
    if shown.keys() != sampled.keys():
        raise ValueError(f"--drawings {options.drawings}, --prompts {options.prompts}: not all styles are in both")
    own = encoded(pipe.model.vae, pictures)
    for name, vae in networks.items():  # an encoder in 8 bits gives nearly the same latents
        if not isinstance(vae, Autoencoder) or float((encoded(vae, pictures[:16]) - own[:16]).square().mean()) > 0.01:
            raise ValueError(f"{name} is of other latents than the bundled model's: expected one of the same encoder")
    noise = torch.randn(own.shape, generator=generator(PAINTED))
    latents, theirs = painted_latents(pipe, every), drawn(options.prompts, objects, size, options.judge)

    columns, found = [middles(pictures[list(shown.values())])], list[dict[str, Any]]()
    for name, vae in networks.items():
        given_back = {level: decoded(vae, own + level * noise) for level in options.levels}
        samples = decoded(vae, latents)
        tiles = [to_pil(one) for one in samples]
        ours = Moments.of([extractor([np.asarray(one) for one in tiles])])
        row: dict[str, Any] = {"decoder": name, "weights": weights_digest(vae)[:16]}
        row["psnr_db"] = {str(level): by_style(psnr(some, pictures), rows) for level, some in given_back.items()}
        row["detail"] = by_style(detail(given_back[0.0]), rows)
        row["detail_of_samples"] = by_style(detail(samples), every)
        row |= {"distance": frechet_distance(ours, theirs), "samples": len(tiles)}
        images = iter(tiles)
        for split, some in asked.items():
            row[split] = judged(judge, [next(images) for _ in some], some)
        found.append(row)
        columns.insert(len(found), middles(given_back[0.0][list(shown.values())]))
        columns.append(middles(samples[list(sampled.values())]))
        decibels = ", ".join(f"{one['all']:.1f}" for one in row["psnr_db"].values())
        print(f"{name}: {decibels} dB, detail {row['detail']['all']:.1f}", end=", ")
        print(f"of samples {row['detail_of_samples']['all']:.1f}, distance {row['distance']:.3g}", row["held_out"])

    settings = {"judge": extractor.digest, "drawings": len(rows), "levels": options.levels, "machine": described()}
    painter = {"weights": model_digest(pipe), "guidance": pipe.model.defaults.guidance_scale}
    settings |= {"painter": painter | {"steps": pipe.model.defaults.steps}, "prompts": options.prompts}
    settings |= {"detail_of_drawings": by_style(detail(pictures), rows)}
    fresh = torch.from_numpy(np.stack([np.array(one) for one in drawn_afresh(every, size, None)]))
    settings |= {"detail_of_drawings_asked_for": by_style(detail(to_unit(fresh)), every)}  # beside that of samples
    write_aside(options.out, {"settings": settings, "decoders": found})
    tiles = [tile for line in zip(*columns, strict=True) for tile in line]
    grid(tiles, columns=len(columns)).save(options.out.with_suffix(".png"))


if __name__ == "__main__":
    with errors_said():
        main(tyro.cli(Options))
