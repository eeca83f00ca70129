"""Trains a diffusion autoencoder (Preechakul et al. 2022, arXiv:2111.15640):

    accelerate launch train/diffae.py --data my_pictures/

A semantic encoder and a U-Net are trained as one: the encoder sees the picture, the U-Net the noisy picture and the
encoder's code, and both learn from the U-Net's error alone. Then comes a small diffusion over the codes
(`train.codes`). Reads top to bottom; draws, order and resuming are those of `train/ldm.py`. Captions are not looked at.
"""

import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

if not __package__:  # as a script, this folder is first on the path, where ldm.py would hide the package ldm
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from conditioning.semantic import SemanticConfig, SemanticEncoder
from ldm.loss import Weight, denoising_loss, training_noise, training_weight
from ldm.unet import UNetConfig
from pipelines.defaults import Defaults
from pipelines.diffusion_autoencoder import DiffusionAutoencoderPipeline
from pipelines.files import checkpoints
from pipelines.folder import Model, save_model, scheduler_config
from train.build import fitted, new_unet, open_autoencoder, side_for
from train.cache import cache_latents
from train.checkpoints import common_state, resume, save_checkpoint, take_up
from train.codes import train_codes
from train.config import at_least_one, check_clip, parse
from train.data import draws, permutation, read_pictures, sent, to_unit
from train.grid import grid
from train.launch import MixedPrecision, errors_said, matrix_type, memory_format, start
from train.muon import Muon
from train.progress import Progress, follow_gradient
from train.set_presets import TEXT_IN_PIXELS
from train.settings import SMALL
from train.sources import describe, open_source
from train.state import EMA, clamp_warmup, learning_rate
from train.watch import errors_by_level


@dataclass(frozen=True)
class Config:
    """Settings of one training run."""

    data: str = "shapes"  # folder, .parquet file, "shapes", "pictograms[:NAMES]" (or ":all"); several joined by +
    output: Path = Path("runs/diffae")  # checkpoints, sample grids and logs
    unet: UNetConfig = SMALL  # its channels follow the autoencoder, its cross-attention the code
    encoder: SemanticConfig = field(default_factory=SemanticConfig)
    vae: str = "bundled"  # autoencoder: folder, hub id, "bundled", or "none" for pixels, "grey" for grey ones
    path: Literal["scaled_linear", "linear", "cosine", "flow", "edm"] = "scaled_linear"
    prediction: Literal["epsilon", "sample", "v", "velocity", "edm"] = "v"
    sigma_data: float = 1.0  # of the path "edm": standard deviation of the data; latents have 1, pixels about 0.5
    noise_mean: float = 0.4  # of log(sigma) in training
    noise_std: float = 1.4
    size: int | None = None  # side of the pictures in pixels; None: what the autoencoder was trained on
    views: int = 1  # how often each drawn pictogram is drawn, each time a little differently
    updates: int = 2000  # optimizer updates in all
    batch_size: int = 32  # pictures in one update on one process
    learning_rate: float = 2e-3  # of Muon, with a cosine to 0
    warmup: int = 100  # updates of linear warm-up
    ema_decay: float = 0.995
    clip: float = 1.0  # largest norm of the gradient
    mixed_precision: MixedPrecision | None = None  # None: what the launcher was told
    seed: int = 0
    checkpoint_every: int = 500  # updates; also how often errors are measured and a sample grid is painted
    steps: int = 50  # of inversion and sampling, the model's default
    sampler: Literal["ddim", "heun"] = "ddim"  # likewise
    code_width: int = 256  # of the network that learns the distribution of the codes
    code_depth: int = 4
    code_updates: int = 4000
    workers: int = 2  # processes that read pictures
    cache: Path = Path("cache")  # decoded pictures and latents
    font: str | None = None  # the colour emoji font's file, for pictograms

    def __post_init__(self) -> None:
        of_codes = ("code_width", "code_depth", "code_updates")
        at_least_one(self, "updates", "batch_size", "checkpoint_every", "steps", "views", "size", *of_codes)
        check_clip(self)


PRESETS = {
    "shapes": Config(),
    # --data mnist-train.parquet: 14 minutes of one core. On digits that it does not train on, at 50 steps: square error
    # 0.0001 of reconstructions and 0.0085 of variations, where the range of a pixel is 1; a classifier reads 98% of
    # 256 test digits and 97% of their variations right.
    "mnist": Config(
        data="",
        output=Path("runs/mnist-diffae"),
        unet=TEXT_IN_PIXELS,
        encoder=SemanticConfig(code_dim=32, in_channels=1),
        vae="grey",
        path="linear",
        noise_mean=0.0,
        size=28,
        updates=1000,
        batch_size=64,
        learning_rate=3e-3,
        checkpoint_every=250,
        code_updates=3000,
    ),
}


def new_model(config: Config) -> Model:
    """A new U-Net, told the code of a new encoder, over an autoencoder that exists."""
    vae = open_autoencoder(config.vae)
    size = side_for(config.size, vae)
    defaults = Defaults(steps=config.steps, sampler=config.sampler, size=size, data=config.data)
    scheduler = scheduler_config(config.path, config.prediction, sigma_data=config.sigma_data)
    unet = fitted(config.unet, vae.latent_channels, size // vae.downscale, None, config.encoder.code_dim)
    torch.manual_seed(config.seed)
    model = Model(new_unet(unet), vae, SemanticEncoder(config.encoder), scheduler, defaults)
    if not model.unet.looks_at_context:
        raise ValueError("--unet has no CrossAttn blocks: without one it would not be told the semantic code")
    return model


class SemanticLearner(nn.Module):
    """The loss of encoder and denoiser as one module, for mixed precision and several processes to wrap: the model
    itself is looked at in float32."""

    def __init__(self, model: Model, weight: Weight):
        super().__init__()
        self.denoiser, self.encoder, self.weight = model.denoiser, model.conditioner, weight

    def forward(self, images: Tensor, x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """[B]: of pictures [B, 3, H, W], whose latents x0 are, at noise levels [B]."""
        return denoising_loss(self.denoiser, x0, self.encoder(images), sigma, noise, self.weight)


@dataclass
class Shown:
    """What a run is measured and looked at by: pictures that it does not train on."""

    x0: Tensor  # [N, C, h, w], latents
    images: Tensor  # [N, 3, size, size] in [-1, 1]
    originals: list[Image.Image]  # the first of them


@torch.no_grad()
def save(
    model: Model, shown: Shown, config: Config, to: Path, update: int, state: dict[str, Any], steps: int | None = None
) -> dict[str, float]:
    """Writes a checkpoint, then measures it and paints originals, reconstructions and two rows of variations.

    Returns the errors by noise level, and of what was painted: its square distance to the originals, whose range is 1.
    """
    save_checkpoint(to, update, lambda folder: save_model(model, folder), state, config)
    told = model.conditioner
    numbers = errors_by_level(model.denoiser, shown.x0, lambda rows: told(shown.images[rows]), config.batch_size)
    pipe, originals = DiffusionAutoencoderPipeline(model), shown.originals
    same = pipe.decode(pipe.encode(originals, steps=steps), steps=steps)
    others = [pipe.vary(originals, seed=row * len(originals), steps=steps) for row in range(2)]
    (to / "samples").mkdir(parents=True, exist_ok=True)
    sheet = grid([*originals, *same, *others[0], *others[1]], columns=len(originals))
    sheet.save(to / "samples" / f"{update:07d}.png")
    numbers["reconstruction error"] = _square_error(originals, same)
    numbers["variation error"] = _square_error(originals, others[0])
    return numbers


def _square_error(pictures: list[Image.Image], others: list[Image.Image]) -> float:
    one, other = (np.stack([np.asarray(p, np.float32) / 255 for p in group]) for group in (pictures, others))
    return float(np.square(one - other).mean())


def rehearse(model: Model, shown: Shown, config: Config, state: dict[str, Any]) -> None:
    """Saves, measures and paints into a folder that goes: what can't work fails before training."""
    place = config.output / ".rehearsal"
    try:
        save(model, shown, config, place, 0, state, steps=2)
    finally:
        shutil.rmtree(place, ignore_errors=True)


@torch.no_grad()
def finish(model: Model, config: Config, update: int, state: dict[str, Any], pixels: Tensor, rows: Tensor) -> None:
    """Trains the diffusion of the codes, writes the checkpoint again with it, and paints a sheet of new pictures."""
    pipe, parts = DiffusionAutoencoderPipeline(model), rows.split(config.batch_size)
    semantic = torch.cat([pipe.encoder.encode(to_unit(pixels[part]).to(pipe.device)) for part in parts])
    with torch.enable_grad():
        model.codes = train_codes(
            semantic, width=config.code_width, depth=config.code_depth, updates=config.code_updates, seed=config.seed
        )
    save_checkpoint(config.output, update, lambda folder: save_model(model, folder), state, config)
    (config.output / "samples").mkdir(parents=True, exist_ok=True)
    grid(pipe.sample(32, seed=0), columns=8).save(config.output / "samples" / f"{update:07d}-new.png")


def main(config: Config) -> Path:
    accelerator = start(config.mixed_precision, log_with="tensorboard", project_dir=config.output)
    device, rank = accelerator.device, accelerator.process_index
    config = replace(config, mixed_precision=accelerator.mixed_precision)
    model = new_model(config)
    layout = memory_format(accelerator, model.unet)
    for part in model.parts():
        part.to(device).to(memory_format=layout)

    DiffusionAutoencoderPipeline(model).levels()
    global_batch = config.batch_size * accelerator.num_processes
    free = ("updates", "batch_size")
    found = resume(config.output, config, may_change=free, global_batch=global_batch)

    source = open_source(config.data, model.size, font=config.font, views=config.views, captions=False)
    accelerator.print(describe(source, model.size))
    latents = cache_latents(source, model.vae, model.size, config.cache, accelerator, config.workers)
    with accelerator.main_process_first():
        pictures = read_pictures(source, model.size, config.cache, workers=config.workers)
    pixels = pictures.pixels
    assert len(pixels) == len(latents.mean)
    order = permutation(len(pixels), config.seed, -1)
    held = min(256, len(pixels) // 20) if len(pixels) >= 100 else 0
    trained_on, unseen = order[held:], (order[:held] if held else order)[:128]
    accelerator.print(f"{len(trained_on)} pictures to train on, {held} held out to be measured and shown")
    images = to_unit(pixels[unseen]).to(device)
    originals = [Image.fromarray(one) for one in pixels[unseen[:8]].numpy()]
    shown = Shown(latents.posterior(unseen, device).mean, images, originals)

    networks = nn.ModuleDict({"unet": model.unet, "encoder": model.conditioner}).requires_grad_(True)
    noise_levels = training_noise("log_normal", model.schedule, mean=config.noise_mean, std=config.noise_std)
    weight = training_weight("plain", model.denoiser, noise_levels)
    warmup = clamp_warmup(config.warmup, config.updates, accelerator.print)
    ema = EMA(networks, config.ema_decay)
    optimizer: torch.optim.Optimizer = Muon(networks, config.learning_rate, dtype=matrix_type(accelerator))
    update = take_up(accelerator, optimizer, pictures.contents, found)
    if found:
        networks.load_state_dict(found[1]["networks"])
        ema.load(found[1]["ema"])
    learner, optimizer = accelerator.prepare(SemanticLearner(model, weight), optimizer)
    accelerator.init_trackers("diffae")
    millions = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in networks.items()}
    accelerator.print(f"M parameters: {millions}, {config.updates} updates of {global_batch}")

    def state_now() -> dict[str, Any]:
        raw = {name: value.clone() for name, value in networks.state_dict().items()}
        learnt = {"networks": raw, "ema": [average.clone() for average in ema.weights]}
        return learnt | common_state(accelerator, optimizer, global_batch, pictures.contents)

    networks.eval()  # there is no dropout and no batch normalisation: it is the same in training
    if update == 0 and accelerator.is_main_process:
        rehearse(model, shown, config, state_now())
    accelerator.wait_for_everyone()

    progress = Progress(accelerator, update, config.updates, config.checkpoint_every)
    for update in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(update, peak=config.learning_rate, warmup=warmup, updates=config.updates)
        first = rank * config.batch_size
        drawn = draws(
            config.seed, update, first, config.batch_size, global_batch, len(trained_on), latents.mean.shape[1:]
        )
        rows = trained_on[drawn.indices]
        posterior_noise, noise = sent(drawn.normal, device)
        x0 = latents.posterior(rows, device).sample(posterior_noise)
        images = sent(to_unit(pixels[rows]), device).to(memory_format=layout)
        sigma = noise_levels.sigma(sent(drawn.u, device))
        loss = learner(images, x0, sigma, noise).mean()
        norm = follow_gradient(
            accelerator, optimizer, loss, networks.parameters(), update, config.output, clip=config.clip
        )
        ema.step(update)

        due, done = progress.advance(), progress.done
        if done % 25 == 0 or done == config.updates:
            numbers = {"loss": float(accelerator.reduce(loss.detach(), "mean")), "gradient_norm": float(norm)}
            numbers |= {"pictures_per_second": progress.rate(global_batch), "ema_distance": ema.distance()}
            accelerator.log(numbers, done)
            progress.bar.set_postfix_str(f"loss {numbers['loss']:.4f}, {numbers['pictures_per_second']:.0f} pictures/s")
        if due:
            if accelerator.is_main_process:
                state = state_now()  # the trained weights; the model's are the averaged ones from here on
                with ema.applied():
                    errors = save(model, shown, config, config.output, done, state)
                accelerator.log(errors, done)
                tqdm.write(f"update {done}: " + ", ".join(f"{name} {value:.4f}" for name, value in errors.items()))
            accelerator.wait_for_everyone()
    progress.end()

    if accelerator.is_main_process and not (checkpoints(config.output)[-1] / "codes").is_dir():
        state = state_now()
        with ema.applied():
            finish(model, config, progress.done, state, pixels, trained_on)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    accelerator.print(f"done. Look at {config.output}/samples; DiffusionAutoencoderPipeline opens {config.output}")
    return config.output


if __name__ == "__main__":
    with errors_said():
        main(parse(Config, PRESETS, default="shapes"))
