"""Writes the bundled model: what its trainings left, in 8 bits, as the package carries it.

python train/bundle.py --model runs/bundled-3 --vae runs/textured --clip runs/bundled-clip --student runs/student
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
from torch import Tensor

from conditioning.clip import ClipTextEncoder
from pipelines.files import load_autoencoder, newest, read_json, read_tensors, read_weights
from pipelines.find import BUNDLED, LORA
from pipelines.folder import Model, load_model, save_model
from pipelines.quantized import LEVELS, quantize
from train.clip_model import CONFIG, WEIGHTS, export_text_tower, load_clip
from train.launch import errors_said
from vae.autoencoder import Autoencoder


@dataclass(frozen=True)
class Config:
    """What becomes the bundled model."""

    model: Path  # a run of train/ldm.py
    clip: Path  # the run of train/clip.py that told it
    student: Path | None = None  # a run of train/distill.py with --lora-rank
    out: Path = BUNDLED
    vae: Path | None = None  # a run of train/vae.py --decoder-only: another decoder of the model's latents


def main(config: Config) -> None:
    """Writes the folder and says how large it is; what was there before is replaced, but for README.md.

    Raises ValueError for runs that are none, or where a folder that is no model would be replaced, and leaves it as it
    was.
    """
    before = config.out.with_name(f".{config.out.name}.before.partial")
    if before.is_dir() and not config.out.exists():  # an earlier call was killed between moving this and its own
        before.rename(config.out)
    for run in filter(None, (config.model, config.clip, config.vae, config.student)):
        if run.resolve().is_relative_to(config.out.resolve()):
            raise ValueError(f"--out {config.out} would be replaced, and {run} is in it: name another")
    if config.out.exists() and not (config.out / "atelier.json").is_file() and any(config.out.iterdir()):
        raise ValueError(f"--out {config.out} would be replaced, and is no model's folder: name a new one")
    model, stem = load_model(config.model), WEIGHTS.removesuffix(".safetensors")
    if config.vae:
        model.vae = _other_decoder(model, config.vae)
    clip = config.clip / "clip"
    read_json(clip / CONFIG)  # or an error that says what is missing
    weights = read_weights(clip, stem)
    _check_same(model, config)
    student = _read_student(model, config.student) if config.student else None

    aside = config.out.with_name(f".{config.out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    save_model(model, aside, torch.int8)
    (aside / "clip").mkdir()
    for file in clip.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, aside / "clip")
    save_file(quantize(weights), aside / "clip" / f"{stem}.int8.safetensors")
    if student:
        tensors, header = student
        (aside / "student").mkdir()
        halved = {name: tensor.half() for name, tensor in tensors.items()}
        save_file(halved, aside / "student" / LORA, metadata=header)
    elif (config.out / "student").is_dir():
        print(f"the student in {config.out} is of the model before: without --student there is none any more")
    if (config.out / "README.md").is_file():
        shutil.copy(config.out / "README.md", aside)
    files = [file for file in aside.rglob("*") if file.is_file()]
    for file in files:
        file.chmod(0o644)  # safetensors lets only the owner read
    shutil.rmtree(before, ignore_errors=True)
    if config.out.is_dir():
        config.out.rename(before)
    aside.rename(config.out)
    shutil.rmtree(before, ignore_errors=True)
    size = sum(file.stat().st_size for file in config.out.rglob("*") if file.is_file())
    print(f"{config.out}: {size:,} bytes, {size / 2**20:.1f} MiB")


def _check_same(model: Model, config: Config) -> None:
    """ValueError where the CLIP is not the one whose text tower told the model."""
    judge = load_clip(config.clip / "clip")
    theirs = export_text_tower(judge.model, judge.tokenizer).state_dict()
    ours = model.conditioner.state_dict() if isinstance(model.conditioner, ClipTextEncoder) else {}
    if not _same(theirs, {name: weight for name, weight in ours.items() if name in theirs}):
        raise ValueError(
            f"--clip {config.clip} is another than the one whose text encoder is in {config.model}: give the run of "
            "train/clip.py that the model was trained with"
        )


def _other_decoder(model: Model, vae: Path) -> Autoencoder:
    """The autoencoder of --vae; ValueError where its latents are not those that the model paints."""
    found = load_autoencoder(vae)
    theirs, ours = (
        {name: weight for name, weight in one.state_dict().items() if name.startswith(("encoder.", "quant_conv."))}
        for one in (found, model.vae)
    )
    if not _same(theirs, ours):
        raise ValueError(
            f"--vae {vae} has another encoder than --model, so that its decoder is of other latents: give a run of "
            "train/vae.py --decoder-only whose --init was the autoencoder that the model was trained with"
        )
    return found.eval()


def _read_student(model: Model, run: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A student's file; ValueError where it learnt from another model, whose layers may well be of the same shapes."""
    folder = newest(run)
    tensors = read_tensors(folder / LORA)
    base = read_json(folder / "atelier.json").get("base", "")
    if not _same(load_model(base).unet.state_dict(), model.unet.state_dict()):
        raise ValueError(f"--student {run} learnt from another model than --model, from {base!r}: train it anew")
    return tensors


def _same(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> bool:
    """Whether these are the same weights, either of which may have been in 16 or in 8 bits."""
    return theirs.keys() == ours.keys() and all(_near(weight, ours[name]) for name, weight in theirs.items())


def _near(a: Tensor, b: Tensor) -> bool:
    """Whether they differ by no more than rounding (`pipelines.quantized`)."""
    if a.shape != b.shape:
        return False
    a, b = a.float(), b.float()
    # Half a step of 8 bits, with room for 16; of vectors, which are never in 8 bits, float16's own.
    step = b.flatten(1).abs().amax(1).view(-1, *[1] * (b.ndim - 1)) / LEVELS if b.ndim > 1 else b.abs() / 500
    return bool(((a - b).abs() <= 0.6 * step + 1e-6).all())


if __name__ == "__main__":
    with errors_said():
        main(tyro.cli(Config))
