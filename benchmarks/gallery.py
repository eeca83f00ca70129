"""The README's gallery, a random draw: pairs that the bundled model was trained on, in seeds 0 to 23, and below them
pairs that it never saw, in seeds 24 to 47:  python benchmarks/gallery.py"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from pipelines import TextToImagePipeline
from train.evaluate import draw_rows
from train.grid import grid
from train.pictograms import captions, chosen

COUNT = 24  # of each


def main() -> None:
    pipe = TextToImagePipeline.from_pretrained()
    rows = [row for split in ("train", "held_out") for row in draw_rows(split, COUNT, chosen(), seed=0, font=None)]
    prompts = [captions(*row[:3])[0] for row in rows]
    images = pipe(prompts, seed=0).images
    grid(images, prompts, columns=8).save(Path(__file__).resolve().parents[1] / "docs" / "gallery.png")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
