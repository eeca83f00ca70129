"""Writes the bundled model: what three trainings left, in 8 bits, as the package carries it.

python train/bundle.py --model runs/bundled --clip runs/bundled-clip --student runs/bundled-student
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # as a script, this folder is first on the path, where ldm.py would hide the package ldm
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro
from safetensors.torch import save_file

from pipelines.files import newest, read_json, read_tensors, read_weights, write_json
from pipelines.find import BUNDLED, LORA
from pipelines.folder import load_model, save_model
from pipelines.quantized import quantize
from train.clip_model import CONFIG, WEIGHTS


@dataclass(frozen=True)
class Config:
    """What becomes the bundled model."""

    model: Path  # a run of train/ldm.py
    clip: Path  # the run of train/clip.py that told it
    student: Path | None = None  # a run of train/distill.py with --lora-rank
    out: Path = BUNDLED


def main(config: Config) -> None:
    """Writes the folder, and says how large it is. Raises ValueError for runs that are none."""
    save_model(load_model(config.model), config.out, torch.int8)

    clip, stem = config.out / "clip", WEIGHTS.removesuffix(".safetensors")
    clip.mkdir(exist_ok=True)
    read_json(config.clip / "clip" / CONFIG)  # or an error that says what is missing
    for file in (config.clip / "clip").glob("*.*"):
        if file.suffix != ".safetensors":
            shutil.copy(file, clip / file.name)
    save_file(quantize(read_weights(config.clip / "clip", stem)), clip / f"{stem}.int8.safetensors")

    if config.student:
        folder, place = newest(config.student), config.out / "student"
        tensors, header = read_tensors(folder / LORA)
        notes = read_json(folder / "atelier.json")
        place.mkdir(exist_ok=True)
        save_file({name: tensor.half() for name, tensor in tensors.items()}, place / LORA, metadata=header)
        write_json(place / "atelier.json", {**notes, "base": "bundled"})

    for file in config.out.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # safetensors lets only the owner read
    size = sum(file.stat().st_size for file in config.out.rglob("*") if file.is_file())
    print(f"{config.out}: {size:,} bytes, {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except ValueError as error:
        sys.exit(f"error: {error}")
