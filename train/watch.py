"""What a person watches while a model trains: errors by noise level and painted prompts."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conditioning.context import Conditioner, Context
from conditioning.labels import Labels
from ldm.denoiser import Denoiser
from ldm.loss import denoising_loss
from pipelines.files import checkpoints
from pipelines.folder import Model
from pipelines.text_to_image import TextToImagePipeline
from train import pictograms, shapes
from train.aside import written_aside
from train.cache import Latents
from train.data import generator, permutation
from train.grid import grid
from train.inpainting import nothing_known
from train.settings import Config
from train.sources import split_parts


@torch.no_grad()
def validate(
    model: Model, latents: Latents, texts: Conditioner, device: torch.device, batch_size: int = 128
) -> dict[str, float]:
    """`errors_by_level` of a set's first 128 pictures; of an inpainting model where it is shown nothing of them."""
    captions = [group[0] for group in latents.captions[:128]]
    x0 = latents.posterior(torch.arange(len(captions)), device).mean
    beside = nothing_known(model.vae, x0) if model.inpaints else None

    def contexts(rows: Tensor) -> Context:
        told = texts([captions[i] for i in rows.tolist()])
        return told if beside is None else {**told, "concat": beside[rows]}

    return errors_by_level(model.denoiser, x0, contexts, batch_size)


@torch.no_grad()
def errors_by_level(
    denoiser: Denoiser, x0: Tensor, contexts: Callable[[Tensor], Context], batch_size: int
) -> dict[str, float]:
    """Error of x_0 over its variance at five fixed noise levels, on fixed noise: {"validation/sigma 0.25": ...}.

    x0: [N, C, h, w]; contexts: rows of it -> what the network is told of them.
    """
    noise = torch.randn(x0.shape, generator=generator(0)).to(x0)
    errors = dict.fromkeys((0.25, 0.5, 1.0, 2.0, 8.0), 0.0)
    for rows in torch.arange(len(x0)).split(batch_size):  # no more memory than training takes
        context = contexts(rows)
        for sigma in errors:
            level = torch.full((len(rows),), sigma, device=x0.device)
            error = denoising_loss(denoiser, x0[rows], context, level, noise[rows], torch.ones_like)
            errors[sigma] += float(error.sum())
    return {f"validation/sigma {sigma}": e / len(x0) / max(float(x0.var()), 1e-12) for sigma, e in errors.items()}


@torch.no_grad()
def paint_grid(
    model: Model, config: Config, prompts: list[str], latents: Latents, file: Path | None, steps: int | None = None
) -> None:
    """Samples of the prompts, in seeds 0 … n - 1, each over its prompt; an inpainting model paints the middles of
    pictures. No file: painted, for others that need this process's share of the weights, and thrown away."""
    pipe = TextToImagePipeline(model)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"height": config.size, "width": config.size}
    if model.inpaints:
        chosen = torch.arange(len(prompts)) % len(latents.captions)
        decoded = model.vae.decode(latents.posterior(chosen, pipe.device).mean)
        height, width = decoded.shape[2:]
        mask = torch.zeros(1, height, width)
        mask[:, height // 4 : height - height // 4, width // 4 : width - width // 4] = 1
        call = {"image": (decoded.float().clamp(-1, 1) + 1) / 2, "mask": mask}
    images = pipe(prompts, steps=steps, seed=0, **call).images
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(file) as partial:  # there or not: a run that goes on looks whether it is
            grid(images, prompts, columns=4).save(partial, format="PNG")


@contextmanager
def evaluating(model: Model, device: torch.device) -> Iterator[None]:
    """Inside, all parts of the model are on the device and none is in training mode; afterwards each is as it was."""
    parts = model.parts()
    before = [(part.training, next((p.device for p in part.parameters()), device)) for part in parts]
    try:
        for part in parts:
            part.eval().to(device)
        yield
    finally:
        for part, (mode, place) in zip(parts, before, strict=True):
            part.train(mode).to(place)


def check_room(output: Path, checkpoint: Path, keep: int) -> None:
    """ValueError unless there is room for the checkpoints that stay, and the next; this one, as large, is to go."""
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    free = shutil.disk_usage(output).free + size
    there = len(checkpoints(output))
    if free < size * max(1, keep + 1 - there):
        raise ValueError(
            f"{output} has {free / 1e9:.2f} GB left, and a checkpoint takes {size / 1e9:.2f}, of which {keep} stay and "
            "one more is written: make room, choose another --output, or --keep fewer"
        )


def sample_prompts(config: Config, model: Model, latents: Latents) -> list[str]:
    """The prompts of the grid: those of the settings, of a drawn set, names of labels, or some pictures' captions."""
    if config.prompts:
        return list(config.prompts)
    if not model.is_told:
        return [""] * 8
    if isinstance(model.conditioner, Labels):
        return list(model.conditioner.names[:8])
    first = split_parts(config.data)[0][1]
    if first == "shapes":
        return list(shapes.CANONICAL_PROMPTS)
    if first in ("pictograms", "pictograms:all"):
        return list(pictograms.CANONICAL_PROMPTS)
    order = permutation(len(latents.captions), config.seed, -2).tolist()
    return list(dict.fromkeys(latents.captions[i][0] for i in order))[:8]
