"""What a person watches while a model trains: errors by noise level, painted prompts, and a rehearsal before it all."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from conditioning.context import Context
from conditioning.labels import Labels
from ldm.denoiser import Denoiser
from ldm.loss import denoising_loss
from pipelines.folder import Model, save_model
from pipelines.text_to_image import TextToImagePipeline
from train.cache import Latents, Texts
from train.data import generator, permutation
from train.grid import grid
from train.settings import Config
from train.state import save_checkpoint


@torch.no_grad()
def validate(
    denoiser: Denoiser, latents: Latents, texts: Texts, device: torch.device, batch_size: int = 128
) -> dict[str, float]:
    """`errors_by_level` of a set's first 128 pictures."""
    captions = [group[0] for group in latents.captions[:128]]
    x0 = latents.posterior(torch.arange(len(captions)), device).mean
    return errors_by_level(denoiser, x0, lambda rows: texts([captions[i] for i in rows.tolist()]), batch_size)


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


def paint_grid(model: Model, config: Config, prompts: list[str], file: Path, steps: int | None = None) -> None:
    """Samples of the prompts, in seeds 0 … n - 1, each over its prompt."""
    pipe = TextToImagePipeline(model)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(prompts, steps=steps, seed=0, height=config.size, width=config.size).images
    file.parent.mkdir(parents=True, exist_ok=True)
    grid(images, prompts, columns=4).save(file)


def rehearse(model: Model, config: Config, latents: Latents, texts: Texts, prompts: list[str], state: dict) -> None:
    """Measures a batch, paints one prompt and saves, into a folder that goes: what can't work fails before training."""
    place = config.output / ".rehearsal"
    device = next(model.unet.parameters()).device
    model.unet.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            model.conditioner(prompts)
            first = latents.select(torch.arange(min(config.batch_size, len(latents.captions))))
            validate(model.denoiser, first, texts, device, config.batch_size)
            save_checkpoint(place, 0, lambda folder: save_model(model, folder), state, config)
            paint_grid(model, config, prompts[:1], place / "samples.png", steps=2)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        model.unet.train()


def sample_prompts(config: Config, model: Model, latents: Latents) -> list[str]:
    """The prompts of the grid: those of the settings, of a drawn set, names of labels, or some pictures' captions."""
    if config.prompts:
        return list(config.prompts)
    if isinstance(model.conditioner, Labels):
        return list(model.conditioner.names[:8])
    if config.data == "shapes":
        from train.shapes import CANONICAL_PROMPTS

        return list(CANONICAL_PROMPTS)
    if config.data.startswith("pictograms"):
        from train.pictograms import CANONICAL_PROMPTS

        return list(CANONICAL_PROMPTS)
    order = permutation(len(latents.captions), config.seed, -2).tolist()
    return list(dict.fromkeys(latents.captions[i][0] for i in order))[:8]
