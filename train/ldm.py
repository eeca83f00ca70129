"""Trains or fine-tunes a text-to-image model:  accelerate launch train/ldm.py --data my_pictures/

Reads top to bottom; the settings are in `train.settings`, where to start from in `train.presets`. Every random draw of
the loop is a function of (seed, update, position in the global batch) and the order of the pictures one of (seed,
epoch): a run that is started again with the same command goes on where its last checkpoint stands, and one process or
several see the same batches.
"""

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

if not __package__:  # as a script, this folder is first on the path, where this very file would hide the package ldm
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from tqdm import tqdm

from conditioning.labels import Labels
from train.aside import remove_dead
from train.batch import Batch, draw_batch
from train.build import build, optimizer_for, share_statistics, side_for
from train.checkpoints import resume, save_checkpoint
from train.config import parse
from train.data import generator
from train.feed import CachedFeed, Feed, open_feed
from train.launch import Interruption, errors_said, memory_format, precision, prepare, sharding, start
from train.learner import Learner
from train.meter import Meter
from train.objective import Objective, denoising
from train.presets import check_model_settings, preset_for, presets_for
from train.prior import with_prior
from train.progress import refuse_not_finite
from train.settings import Config, settled
from train.sources import split_parts
from train.state import EMA, Carried, clamp_warmup, learning_rate
from train.texts import Texts, longest
from train.trained import (
    check_token,
    learning,
    make_trainable,
    refuse_shards,
    save_trained,
    statistics,
    tells,
    unsharded,
)
from train.watch import check_room, evaluating, paint_grid, sample_prompts, validate

LOG_EVERY = 25  # updates
SAVINGS = " with a larger --accumulate, --gradient-checkpointing"  # of memory
MAY_CHANGE = (
    "keep",
    "tracker",
    "prompts",
    "updates",
    "batch_size",
    "accumulate",
    "gradient_checkpointing",
    "compile",
    "clip",
)


def main(config: Config, objective: Callable[..., Objective] = denoising) -> Path:
    accelerator = start(
        config.mixed_precision,
        log_with=config.tracker,
        project_dir=config.output,
        accumulate=config.accumulate,
        shards=True,
    )
    device, rank = accelerator.device, accelerator.process_index
    config = settled(config, precision(accelerator))
    check_model_settings(config)
    global_batch = config.batch_size * accelerator.num_processes * config.accumulate
    found = resume(config.output, config, may_change=MAY_CHANGE, global_batch=global_batch)

    # The model, and what of it learns.
    model = build(config, found and found[0])
    size = side_for(config.size or model.size, model.vae)
    for part in model.parts():
        part.to(device)
    for network in (model.unet, model.vae):
        eight_bit = config.optimizer == "adamw8bit"  # which lays weights out anew
        layout = torch.contiguous_format if eight_bit else memory_format(accelerator, network)
        network.to(memory_format=layout)
    share_statistics(model.unet, accelerator)
    if sharding(accelerator) == "FSDP":
        refuse_shards(model, config)
    make_trainable(model, config, found and found[0])
    if objective is denoising:
        denoising(model, config, None)  # what it refuses is refused before everything is read and computed

    # The data: latents, and the context of every caption.
    data = config.data
    if config.prior:
        with evaluating(model, device):
            data = with_prior(model, config, size, accelerator)
    feed = open_feed(
        data,
        model.vae,
        size,
        seed=config.seed,
        global_batch=global_batch,
        cache=config.cache,
        accelerator=accelerator,
        workers=config.workers,
        streaming=config.streaming,
        buckets=config.buckets,
        multiple=model.vae.downscale * 2 ** (len(model.unet.config.block_out_channels) - 1),
        template=config.template,
        font=config.font,
        views=config.views,
        captions=model.is_told,
        pixels=model.inpaints,
    )
    prior = len(split_parts(data)) - 1 if config.prior else -1
    validation = feed.validation()
    every = [group[:1] for group in feed.captions] if isinstance(model.conditioner, Labels) else feed.captions
    check_token(config, every)
    texts = (
        model.conditioner
        if tells(config)
        else Texts(model.conditioner, every, device, cache=config.cache, accelerator=accelerator)
    )
    prompts = sample_prompts(config, model, validation)
    if isinstance(feed, CachedFeed):  # till samples are painted, what is not needed leaves its memory free
        if not model.inpaints:
            model.vae.to("cpu")
        if isinstance(texts, Texts) and not texts.encodes and not config.shuffle_tags:
            model.conditioner.to("cpu")

    # The loss, and what follows its gradient.
    goal = objective(model, config, texts)
    windows = longest(model.conditioner, every) if tells(config) else 1
    learner = Learner(model, partial(goal.loss, weight=goal.weight), tells(config), windows)
    optimizer = optimizer_for(learner, config, accelerator)
    if config.compile:
        model.denoiser.network = torch.compile(model.unet)  # type: ignore[assignment]
    learner, optimizer = prepare(accelerator, learner, optimizer, batch_size=config.batch_size, clip=config.clip)
    weights = learning(model, config)  # after FSDP has put its own in their place
    ema = EMA(weights.values(), config.ema_decay)  # they are the average still, if a checkpoint was opened
    meter = Meter(accelerator)
    carried = Carried({**weights, **statistics(model)}, optimizer, accelerator.scaler, {"feed": feed, "meter": meter})
    warmup = clamp_warmup(config.warmup, config.updates, accelerator.print)
    drops = any(isinstance(module, nn.Dropout) and module.p for part in model.parts() for module in part.modules())
    update, stop = 0, False
    if found:
        carried.load(found[1])
        update = found[1]["update"]
        accelerator.print(f"going on from {found[0]}")
    resumed, found = bool(found), None  # its memory is large

    ahead: dict[int, Batch] = {}  # the first step of the next update

    def drawn(number: int, first: int) -> Batch:
        return draw_batch(config, feed, number, first, global_batch, device, model=model, prior=prior)

    def learn() -> tuple[float, float]:
        """One update: the loss on this process, and the norm of the gradient."""
        lost: list[Tensor] = []  # the loss of each step
        seen: list[list[str]] = []  # its captions, the first three
        for micro in range(config.accumulate):
            first = (micro * accelerator.num_processes + rank) * config.batch_size
            if drops:  # else a run that goes on, or another process, would leave out other parts, or the same
                torch.manual_seed(generator(config.seed, update, first).initial_seed())
            batch = (ahead.pop(update, None) if micro == 0 else None) or drawn(update, first)
            sigma = goal.sigma(batch.u)
            told = batch.captions if tells(config) else texts(batch.captions)
            with accelerator.accumulate(learner):  # processes meet in the last step alone
                with accelerator.autocast():
                    losses = learner(batch.x0, told, batch.sizes, sigma, batch.noise, batch.beside, **batch.options)
                losses = batch.weight * losses
                loss = losses.mean()
                accelerator.backward(loss)
            meter.add(sigma, losses)
            lost.append(loss.detach())
            seen.append(batch.captions[:3])
        norm = accelerator.clip_grad_norm_(weights.values(), config.clip)
        if draws_ahead(device, feed):
            ahead.clear()
            ahead[update + 1] = drawn(update + 1, rank * config.batch_size)
        norm, each = float(norm), torch.stack(lost).tolist()  # here a GPU is waited for
        for number, captions in zip(each, seen, strict=True):
            refuse_not_finite("loss", number, update, config.output, partial("captions {} …".format, captions))
        if not accelerator.scaler:  # which leaves such a step out
            refuse_not_finite("gradient", norm, update, config.output, partial("captions {} …".format, seen[-1]))
        optimizer.step()
        optimizer.zero_grad()
        total = sum(each) / len(each)
        if meter.is_spike(total):
            tqdm.write(f"update {update}: the loss jumped to {total:.3g} (captions {seen[-1]} …)")
        return total, norm

    def save(output: Path) -> Path | None:
        """A checkpoint; every process has to make this call, because each may hold a part of the weights."""
        state = carried.state(keep=accelerator.is_main_process) | {"global_batch": global_batch}
        with ema.applied():
            shown = unsharded(model)
            if not accelerator.is_main_process:
                return None
            return save_checkpoint(
                output, update, partial(save_trained, shown, config), state, config, keep=config.keep
            )

    def due() -> bool:
        return update % config.checkpoint_every == 0 or update == config.updates

    def sheet() -> Path:
        return config.output / "samples" / f"{update:07d}.png"

    def look(count: int, prompts: list[str], file: Path, steps: int | None = None) -> None:
        """Validation errors and a grid of samples, by the averaged weights."""
        with ema.applied(), evaluating(model, device):
            shown = validation.select(torch.arange(count))
            errors = validate(model, shown, texts, device, config.batch_size)
            paint_grid(model, config, prompts, shown, file if accelerator.is_main_process else None, steps)
        if steps is None:
            accelerator.log(errors, update)
            said = ", ".join(f"{k.split()[-1]}: {v:.3f}" for k, v in errors.items())
            accelerator.print(f"\nupdate {update}: validation error by sigma {said}; samples in {file}")

    # A rehearsal: what can't work shows before hours of training, not after them; then all is as it was.
    place, before = config.output / ".rehearsal", carried.state()
    try:
        with feed.rehearsing():
            learn()
        with evaluating(model, device):
            model.conditioner(prompts)
        if saved := save(place):  # with the optimizer's moments (unless fp16 left that step out)
            check_room(config.output, saved, config.keep)
        look(min(len(validation.captions), config.batch_size), prompts, place / "samples.png", steps=2)
        carried.load(before)
    finally:
        if accelerator.is_main_process:
            for left in (place, *config.output.glob(".checkpoint-*.partial")):  # the second: of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            remove_dead(config.output / "samples")
    del before
    meter.measure(model, feed.shapes[0], texts([""]), update)
    accelerator.init_trackers("ldm")
    count = sum(weight.numel() for weight in weights.values())
    accelerator.print(f"{count:,} weights learn; {config.updates} updates of {global_batch}")

    if resumed and due() and not sheet().is_file():  # killed between a checkpoint and its samples
        look(len(validation.captions), prompts, sheet())
    bar = tqdm(total=config.updates, initial=update, unit="update", disable=not accelerator.is_main_process)
    with Interruption() as interruption:
        while update < config.updates:
            rate = learning_rate(
                update, peak=config.learning_rate, warmup=warmup, updates=config.updates, schedule=config.schedule
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, norm = learn()
            ema.step(update)

            update += 1
            bar.update()
            if update % LOG_EVERY == 0 or update == config.updates:
                mean = accelerator.reduce(torch.tensor(loss, device=device), "mean")
                numbers = {"loss": float(mean), "gradient_norm": norm, "learning_rate": rate}
                numbers |= meter.read(update, global_batch) | {"ema_distance": ema.distance()}
                accelerator.log(numbers, update)
                bar.set_postfix_str(f"loss {numbers['loss']:.4f}, {numbers['pictures_per_second']:.0f} pictures/s")
            stop = interruption.asked(accelerator) and update < config.updates
            with meter.paused():
                if stop or due():
                    save(config.output)
                if stop:
                    accelerator.wait_for_everyone()  # a launcher ends all as soon as one has ended
                    break
                if due():
                    look(len(validation.captions), prompts, sheet())
    bar.close()
    accelerator.end_training()
    if stop:
        accelerator.print(f"told to end: update {update} is saved, and the same command goes on with it")
        sys.exit(interruption.exit_code())
    paint = f"--model {config.output}"
    if config.token or config.lora_rank:
        paint = f"--model {config.model} {'--embedding' if config.token else '--lora'} {config.output}"
    accelerator.print(f"done. Look at {config.output}/samples, and paint: atelier PROMPT {paint}")
    return config.output


def draws_ahead(device: torch.device, feed: Feed) -> bool:
    """Whether the next update's pictures and noise are drawn while the device computes this one; a stream does that by
    itself, and what it has given counts as seen."""
    return device.type == "cuda" and isinstance(feed, CachedFeed)


if __name__ == "__main__":
    with errors_said(SAVINGS):
        settings = parse(Config, presets_for(sys.argv), default=preset_for(sys.argv))
        check_model_settings(settings, sys.argv)
        main(settings)
