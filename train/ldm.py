"""Trains or fine-tunes a text-to-image model:  accelerate launch train/ldm.py --data my_pictures/

Reads top to bottom; the settings are in `train.settings`, where to start from in `train.presets`. Every random draw of
the loop is a function of (seed, update, position in the global batch) and the order of the pictures one of (seed,
epoch): a run that is started again with the same command goes on where its last checkpoint stands, and one process or
several see the same batches.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # as a script, this folder is first on the path, where this very file would hide the package ldm
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from tqdm import tqdm

from conditioning.labels import Labels
from ldm.loss import HybridLoss, denoising_loss, training_noise, training_weight
from ldm.unet import UNet
from pipelines.files import read_weights
from pipelines.folder import save_model
from train.build import build
from train.cache import Latents, Texts, cache_latents
from train.config import parse
from train.data import draws, permutation
from train.launch import matrix_type, memory_format, start
from train.muon import BETAS, Muon
from train.presets import PRESETS, check_model_settings, preset_for
from train.settings import Config, settled
from train.sources import describe, open_source
from train.state import EMA, clamp_warmup, learning_rate, resume, save_checkpoint
from train.watch import paint_grid, rehearse, sample_prompts, validate


@dataclass
class Batch:
    """One step's pictures on one process, and every random draw that it needs."""

    x0: Tensor  # [B, C, h, w], samples of the posterior
    captions: list[str]  # one for each picture; "" where it was dropped
    noise: Tensor  # like x0
    u: Tensor  # [B], uniform numbers that choose the noise levels


def draw_batch(
    config: Config, latents: Latents, update: int, first: int, global_batch: int, device: torch.device
) -> Batch:
    """Positions first … first + batch_size - 1 of an update's global batch."""
    count, shape = len(latents.captions), latents.mean.shape[1:]
    drawn = draws(config.seed, update, first, config.batch_size, global_batch, count, shape)
    captions = []
    for index, chance in zip(drawn.indices.tolist(), drawn.chance, strict=True):
        group = latents.captions[index]
        chosen = group[int(chance[0] * len(group))]
        captions.append("" if chance[1] < config.caption_dropout else chosen)
    posterior_noise, noise = drawn.normal.to(device)
    x0 = latents.posterior(drawn.indices, device).sample(posterior_noise)
    return Batch(x0, captions, noise, drawn.u.to(device))


def main(config: Config) -> Path:
    accelerator = start(config.mixed_precision, log_with="tensorboard", project_dir=config.output)
    device, rank = accelerator.device, accelerator.process_index
    config = settled(config, accelerator.mixed_precision)
    check_model_settings(config)
    model = build(config)
    size = config.size or model.size
    if size % model.vae.downscale:
        raise ValueError(f"--size {size}: expected a multiple of {model.vae.downscale}, the autoencoder's factor")
    for part in model.parts():
        part.to(device)
    layout = memory_format(accelerator)
    unet = model.unet.to(memory_format=layout)
    model.vae.to(memory_format=layout)

    source = open_source(config.data, size, font=config.font, views=config.views)
    if accelerator.is_main_process:
        print(describe(source, size))
    everything = cache_latents(source, model.vae, size, config.cache, accelerator, config.workers)
    if isinstance(model.conditioner, Labels):  # the names are the pictures' first captions
        everything = everything._replace(captions=[group[:1] for group in everything.captions])
    count = len(everything.captions)
    order = permutation(count, config.seed, -1)
    held = min(256, count // 20) if count >= 100 else 0
    latents, validation = everything.select(order[held:]), everything.select(order[:held] if held else order)
    accelerator.print(
        f"{count - held} pictures to train on, {held} held out for the validation loss"
        + ("" if held else " (too few to hold any out: it is measured on the training pictures)")
    )
    texts = Texts(model.conditioner, everything.captions, device)
    prompts = sample_prompts(config, model, latents)

    unet.train().requires_grad_(True)
    if isinstance(unet, UNet):
        unet.gradient_checkpointing = config.gradient_checkpointing
    noise_levels = training_noise(config.noise, model.schedule, mean=config.noise_mean, std=config.noise_std)
    floor, gamma = config.min_snr_floor, config.min_snr_gamma
    weight = training_weight(config.weight, model.denoiser, noise_levels, gamma=gamma, floor=floor)
    loss_of = HybridLoss(model.denoiser) if model.learned_variance else denoising_loss
    warmup = clamp_warmup(config.warmup, config.updates, accelerator.print)
    ema = EMA(unet, config.ema_decay)
    optimizer: torch.optim.Optimizer
    if config.optimizer == "muon":
        optimizer = Muon(unet, config.learning_rate, config.weight_decay, matrix_type(accelerator))
    else:
        rate, decay = config.learning_rate, config.weight_decay
        optimizer = torch.optim.AdamW(unet.parameters(), rate, betas=BETAS, weight_decay=decay, fused=True)
    update = 0
    global_batch = config.batch_size * accelerator.num_processes * config.accumulate
    free = ("workers", "cache", "checkpoint_every", "prompts", "updates", "batch_size", "accumulate")
    if found := resume(config.output, config, may_change=free, global_batch=global_batch):
        folder, state = found
        update = state["update"]
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        averaged = read_weights(folder / "unet")
        ema.load([averaged[name] for name, p in unet.named_parameters() if p.requires_grad])
        if accelerator.scaler and state.get("scaler"):
            accelerator.scaler.load_state_dict(state["scaler"])
        accelerator.print(f"going on from {folder}")
    if config.compile:
        model.denoiser.network = torch.compile(unet)  # type: ignore[assignment]
    denoiser, optimizer = accelerator.prepare(model.denoiser, optimizer)
    accelerator.init_trackers("ldm")
    parameters = sum(p.numel() for p in unet.parameters())
    accelerator.print(f"U-Net: {parameters / 1e6:.2f} M parameters, {config.updates} updates of {global_batch}")

    def state_now() -> dict[str, Any]:
        raw = {name: weight.clone() for name, weight in unet.state_dict().items()}
        scaler = accelerator.scaler.state_dict() if accelerator.scaler else None  # of fp16
        return {"unet": raw, "optimizer": optimizer.state_dict(), "scaler": scaler, "global_batch": global_batch}

    if update == 0 and accelerator.is_main_process:
        rehearse(model, config, validation, texts, prompts, state_now())
    accelerator.wait_for_everyone()

    bar = tqdm(total=config.updates, initial=update, unit="update", disable=not accelerator.is_main_process)
    began, seen = time.perf_counter(), 0
    while update < config.updates:
        rate = learning_rate(
            update, peak=config.learning_rate, warmup=warmup, updates=config.updates, schedule=config.schedule
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=device)
        for micro in range(config.accumulate):
            first = (micro * accelerator.num_processes + rank) * config.batch_size
            batch = draw_batch(config, latents, update, first, global_batch, device)
            sigma = noise_levels.sigma(batch.u)
            loss = loss_of(denoiser, batch.x0, texts(batch.captions), sigma, batch.noise, weight).mean()
            if not torch.isfinite(loss):
                raise ValueError(
                    f"the loss is {loss.item()} at update {update} (captions {batch.captions[:3]} …): lower "
                    f"--learning-rate or set --mixed-precision no; the checkpoints in {config.output} are untouched"
                )
            accelerator.backward(loss / config.accumulate)
            total += loss.detach() / config.accumulate
        norm = accelerator.clip_grad_norm_(unet.parameters(), config.clip)
        if not torch.isfinite(norm) and not accelerator.scaler:  # which leaves such a step out
            raise ValueError(
                f"the gradient is {norm.item()} at update {update} (captions {batch.captions[:3]} …): lower "
                f"--learning-rate or set --mixed-precision no; the checkpoints in {config.output} are untouched"
            )
        optimizer.step()
        optimizer.zero_grad()
        ema.step(update)

        update += 1
        seen += global_batch
        bar.update()
        if update % 25 == 0 or update == config.updates:
            numbers = {"loss": float(accelerator.reduce(total, "mean")), "gradient_norm": float(norm)}
            numbers |= {"pictures_per_second": seen / (time.perf_counter() - began), "learning_rate": rate}
            accelerator.log(numbers | {"ema_distance": ema.distance()}, update)
            bar.set_postfix_str(f"loss {numbers['loss']:.4f}, {numbers['pictures_per_second']:.0f} pictures/s")
        if update % config.checkpoint_every == 0 or update == config.updates:
            if accelerator.is_main_process:
                state = state_now()  # the trained weights; the model's are the averaged ones from here on
                with ema.applied():
                    unet.eval()
                    saved = save_checkpoint(config.output, update, lambda f: save_model(model, f), state, config)
                    errors = validate(model.denoiser, validation, texts, device, config.batch_size)
                    accelerator.log(errors, update)
                    shown = ", ".join(f"{k.split()[-1]}: {v:.3f}" for k, v in errors.items())
                    tqdm.write(f"update {update}: validation error by sigma {shown}; saved {saved}")
                    paint_grid(model, config, prompts, config.output / "samples" / f"{update:07d}.png")
                    unet.train()
            accelerator.wait_for_everyone()
    bar.close()
    accelerator.end_training()
    accelerator.print(f"done. Look at {config.output}/samples, and paint: atelier PROMPT --model {config.output}")
    return config.output


if __name__ == "__main__":
    try:
        main(parse(Config, PRESETS, default=preset_for(sys.argv)))
    except ValueError as error:
        sys.exit(f"error: {error}")
