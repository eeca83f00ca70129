"""Trains the autoencoder on pictures:  accelerate launch train/vae.py --data my_pictures/

Settings and presets are in `train/vae_settings.py`. One update sees `batch_size` random crops; every random draw is a
function of (seed, update, position in the batch), so the same command goes on exactly where it was stopped.
"""

import copy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

if not __package__:  # as a script, this folder is first on the path, where ldm.py would hide the package ldm
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from pipelines.files import save_network
from pipelines.picture import to_pil
from train.build import begin_at_zero, open_autoencoder, own_size
from train.checkpoints import common_state, resume, save_checkpoint, take_up
from train.config import flags_in, parse
from train.data import batch_indices, generator, permutation, read_pictures, sent, to_unit
from train.grid import grid
from train.launch import errors_said, matrix_type, memory_format, start
from train.metrics import psnr
from train.muon import Muon
from train.progress import Progress, follow_gradient
from train.sources import describe, open_source
from train.state import EMA, clamp_warmup, learning_rate
from train.vae_settings import PRESETS, Config
from vae.autoencoder import Autoencoder, AutoencoderConfig
from vae.losses import (
    PatchDiscriminator,
    adaptive_weight,
    adversarial_weight,
    autoencoder_loss,
    discriminator_loss,
    generator_loss,
    load_perceptual,
)


def crops(
    pixels: Tensor, config: Config, update: int, rank: int, processes: int, noise_shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """This process's share of an update's crops, the posterior noise for them, and what is added to their latents.

    Returns ([batch, 3, crop, crop] in [-1, 1], twice [batch, *noise_shape]).
    """
    first = rank * config.batch_size  # position in the global batch
    start = update * config.batch_size * processes + first
    cut, noise, added = [], [], []
    for row, index in enumerate(batch_indices(len(pixels), config.seed, start, config.batch_size).tolist()):
        draw = generator(config.seed, update, first + row)
        y, x = torch.randint(0, pixels.shape[1] - config.crop + 1, (2,), generator=draw).tolist()
        square = pixels[index, y : y + config.crop, x : x + config.crop]
        if config.mirror and torch.rand((), generator=draw) < 0.5:
            square = square.flip(1)
        cut.append(square)
        noise.append(torch.randn(noise_shape, generator=draw))
        if config.latent_noise:
            level = config.latent_noise * torch.randn((), generator=draw).abs()
            added.append(level * torch.randn(noise_shape, generator=draw))
    return to_unit(torch.stack(cut)), torch.stack(noise), torch.stack(added) if added else None


def means_of(terms: dict[str, Tensor]) -> dict[str, float]:
    """Of the loss's terms, [B] each."""
    return {name: term.mean().item() for name, term in terms.items()}


@torch.no_grad()
def new_autoencoder(model: AutoencoderConfig) -> Autoencoder:
    """New weights, with posteriors of standard deviation exp(-3) and residual branches that begin at zero.

    PyTorch's own weights give a deviation of about 1, which drowns the means, and branches that drown the shortcuts:
    hundreds of updates would pass before a colour comes through.
    """
    vae = Autoencoder(model)
    begin_at_zero(vae)
    last = vae.quant_conv or vae.encoder.conv_out
    last.bias[model.latent_channels :] = -6.0  # type: ignore[index]
    return vae


@torch.no_grad()
def reconstruct(vae: nn.Module, pixels: Tensor, device: torch.device) -> tuple[Tensor, float]:
    """(reconstructions of whole pictures from their posterior means, mean PSNR in dB over pictures)."""
    outputs, decibels = [], 0.0
    for batch in pixels.split(16):
        images = to_unit(batch).to(device)
        output = vae.decode(vae.encode(images).mode).clamp(-1, 1)  # type: ignore[operator]
        decibels += float(psnr(output, images).sum())
        outputs.append(output.cpu())
    return torch.cat(outputs), decibels / len(pixels)


@torch.no_grad()
def normalise_latents(vae: Autoencoder, pixels: Tensor, device: torch.device) -> Autoencoder:
    """The same autoencoder with latents of zero mean and unit variance in each channel over these pictures."""
    posteriors = [vae.encode(to_unit(batch).to(device)) for batch in pixels.split(16)]
    means = torch.cat([p.mean for p in posteriors]).transpose(0, 1).flatten(1)
    variances = torch.cat([p.logvar.exp() for p in posteriors]).transpose(0, 1).flatten(1)
    vae.fold_latent_statistics(means.mean(1).cpu(), (means.var(1) + variances.mean(1)).sqrt().cpu())
    return vae


@torch.no_grad()
def paint_prior(vae: Autoencoder, size: int, device: torch.device) -> list[Image.Image]:
    """32 pictures decoded from the prior of a plain VAE: the raw latent is N(0, I), before latents are normalised."""
    side = size // vae.downscale
    raw = torch.randn(32, vae.latent_channels, side, side, generator=generator(0)).to(device)
    return [to_pil(picture) for picture in vae.decode((raw - vae.shift) * vae.scale).cpu()]


def save(vae: Autoencoder, config: Config, update: int, pixels: Tensor, shown: Tensor, state: dict) -> float:
    """Writes a checkpoint, whose latents are normalised unless the decoder alone has learnt, and a sheet: pictures
    beside their reconstructions, then, where the bound is trained on, samples. Returns the reconstructions' PSNR."""
    device = next(vae.parameters()).device
    some = permutation(len(pixels), config.seed, -1)[:1024]
    samples = paint_prior(vae.eval(), pixels.shape[1], device) if config.loss.elbo else []
    finished = vae if config.decoder_only else normalise_latents(vae, pixels[some], device)
    output, decibels = reconstruct(finished, shown, device)
    rows = [tile for pair in zip(shown[:32].numpy(), map(to_pil, output[:32]), strict=True) for tile in pair]
    rows += samples
    (config.output / "samples").mkdir(parents=True, exist_ok=True)
    grid(rows, columns=8).save(config.output / "samples" / f"{update:07d}.png")
    save_checkpoint(config.output, update, lambda folder: save_network(finished, folder), state, config)
    return decibels


def main(config: Config) -> Path:
    accelerator = start(config.mixed_precision, log_with="tensorboard", project_dir=config.output)
    config = replace(config, mixed_precision=accelerator.mixed_precision)
    if config.init and config.model not in [preset.model for preset in PRESETS.values()]:
        raise ValueError(f"--init {config.init} brings its own --model: leave out --init, or --model")

    # What can be refused is refused before a large set is read.
    torch.manual_seed(config.seed)
    if config.init:
        vae = open_autoencoder(config.init).requires_grad_(True).train()
        if not isinstance(vae, Autoencoder):
            raise ValueError(f"--init {config.init} has no weights: expected an autoencoder's folder, or bundled")
        config = replace(config, size=config.size or own_size(vae))
    else:
        if config.size is None:
            raise ValueError("--size is missing: the side of the pictures in pixels")
        vae = new_autoencoder(config.model)
    assert config.size
    if any(side % vae.downscale for side in (config.size, config.crop)):
        raise ValueError(
            f"--size {config.size}, --crop {config.crop}: expected multiples of {vae.downscale}, the network's factor"
        )
    if config.loss.halved and config.crop % (2 * vae.downscale):
        raise ValueError(f"--crop {config.crop}: expected a multiple of {2 * vae.downscale}, or --loss.halved 0")
    vae.config = replace(vae.config, sample_size=config.size)  # what train/ldm.py goes by
    if config.decoder_only:
        for part in (vae.encoder, vae.quant_conv):
            if part is not None:
                part.requires_grad_(False)
    elif vae.quant_conv is None or vae.post_quant_conv is None:
        raise ValueError("set use_quant_conv and use_post_quant_conv: the latents' statistics are folded into them")
    layout = memory_format(accelerator, vae)
    vae = vae.to(accelerator.device).to(memory_format=layout)
    parameters = sum(p.numel() for p in vae.parameters() if p.requires_grad)
    accelerator.print(f"autoencoder: {parameters / 1e6:.2f} M weights learn, {config.updates} updates")
    ema = EMA(vae, config.ema_decay)
    optimizer = Muon(vae, lr=config.learning_rate, dtype=matrix_type(accelerator))
    discriminator = PatchDiscriminator(width=config.discriminator_width).to(accelerator.device)
    discriminator_optimizer = torch.optim.AdamW(
        discriminator.parameters(), lr=config.learning_rate, betas=(0.5, 0.9), fused=True
    )
    perceptual = load_perceptual().to(accelerator.device) if config.loss.perceptual else None

    global_batch = config.batch_size * accelerator.num_processes
    free = ("updates", "batch_size")
    found = resume(config.output, config, may_change=free, global_batch=global_batch)
    source = open_source(config.data, config.size, split="all", font=config.font, views=config.views, captions=False)
    accelerator.print(describe(source, config.size))
    with accelerator.main_process_first():
        pictures = read_pictures(source, config.size, config.cache, workers=config.workers)
    pixels = pictures.pixels
    shown = pixels[torch.linspace(0, len(pixels) - 1, min(64, len(pixels))).long()]
    update = take_up(accelerator, optimizer, pictures.contents, found)
    if found:
        state = found[1]
        vae.load_state_dict(state["model"])
        ema.load(state["ema"])
        discriminator.load_state_dict(state["judge"])
        discriminator_optimizer.load_state_dict(state["judge_optimizer"])
    network, optimizer = accelerator.prepare(vae, optimizer)
    discriminator, discriminator_optimizer = accelerator.prepare(discriminator, discriminator_optimizer)
    accelerator.init_trackers("vae")

    warmup = clamp_warmup(config.warmup, config.updates, accelerator.print)
    mean = partial(accelerator.reduce, reduction="mean")
    latent_shape = (vae.latent_channels, config.crop // vae.downscale, config.crop // vae.downscale)
    progress = Progress(accelerator, update, config.updates, config.checkpoint_every)
    for update in progress:
        for group in (*optimizer.param_groups, *discriminator_optimizer.param_groups):
            group["lr"] = learning_rate(update, peak=config.learning_rate, warmup=warmup, updates=config.updates)
        rank, processes = accelerator.process_index, accelerator.num_processes
        images, noise, added = crops(pixels, config, update, rank, processes, latent_shape)
        images = sent(images, accelerator.device).to(memory_format=layout)
        noise = sent(noise, accelerator.device)
        added = None if added is None else sent(added, accelerator.device)

        with accelerator.autocast():
            turns = int(torch.randint(4, (), generator=generator(config.seed, update))) if config.turned else 0
            output, posterior, halved = network(images, noise, config.loss.halved > 0, turns, added)
        loss, terms = autoencoder_loss(output, images, posterior, config.loss, perceptual, halved, mean)
        if weight := adversarial_weight(config.loss, update):
            discriminator.requires_grad_(False)
            fooled = generator_loss(discriminator(output.float()))
            scale = accelerator.scaler.get_scale() if accelerator.scaler else 1.0
            loss = loss + weight * adaptive_weight(loss, fooled, vae.last_layer, mean=mean, scale=scale) * fooled
            discriminator.requires_grad_(True)
        learns, here = network.parameters(), (update, config.output)
        about = partial(means_of, terms)
        norm = follow_gradient(accelerator, optimizer, loss, learns, *here, clip=config.clip, about=about)
        if weight:
            judged = discriminator_loss(discriminator(images), discriminator(output.detach().float()))
            learns, judge = discriminator.parameters(), "of the discriminator".format
            follow_gradient(accelerator, discriminator_optimizer, judged, learns, *here, about=judge)
        ema.step(update)

        due, done = progress.advance(), progress.done
        if done % 50 == 0 or done == config.updates:
            means = means_of(terms)
            rate = progress.rate(global_batch)
            accelerator.log(
                {**means, "gradient_norm": float(norm), "ema_distance": ema.distance(), "crops_per_second": rate},
                done,
            )
            progress.bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in means.items()) + f" {rate:.0f} crops/s")
        if due:
            if accelerator.is_main_process:
                state = {
                    "model": vae.state_dict(),
                    "ema": ema.weights,
                    "judge": accelerator.unwrap_model(discriminator).state_dict(),
                    "judge_optimizer": discriminator_optimizer.state_dict(),
                    **common_state(accelerator, optimizer, global_batch, pictures.contents),
                }
                with ema.applied():
                    finished = copy.deepcopy(vae)
                decibels = save(finished, config, done, pixels, shown, state)
                tqdm.write(f"update {done}: {decibels:.2f} dB on {len(shown)} pictures, saved in {config.output}")
                accelerator.log({"psnr": decibels}, done)
            accelerator.wait_for_everyone()
    progress.end()
    accelerator.end_training()
    accelerator.print(f"done: {config.output}")
    return config.output


if __name__ == "__main__":
    given = flags_in(sys.argv)
    with errors_said():
        preset = "fine-tune" if "--init" in given else "new" if "--data" in given else "shapes"
        main(parse(Config, PRESETS, default=preset))
