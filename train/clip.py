"""Trains a CLIP from nothing on captioned pictures:  accelerate launch train/clip.py --data my_pictures/

Its text tower becomes the text encoder of a text-to-image model, the whole of it judges pictures (Radford et al. 2021;
model and loss are open_clip's). Reads top to bottom: settings, batches, then one loop. Every random draw is a function
of (seed, update), so the same command goes on exactly where it was stopped, and one process or several see the same
batches. A ResNet's batch norm takes its statistics of each process's share alone: there, their number shows.

In the output: text_encoder/ and tokenizer/, which transformers, diffusers and `train/ldm.py --text-encoder` open;
clip/, for `train.clip_model.load_clip` and `open_clip.create_model("local-dir:...")`; the newest checkpoints; the logs.
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # as a script, this folder is first on the path, where ldm.py would hide the package ldm
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from conditioning.tokenizer import ClipTokenizer
from train.build import decaying
from train.checkpoints import common_state, resume, save_checkpoint, take_up
from train.clip_model import WEIGHTS, ClipModel, save_clip, tokenise
from train.config import at_least_one, check_clip, flags_in, parse
from train.data import Pictures, generator, read_pictures, sent, to_unit
from train.launch import MixedPrecision, errors_said, start
from train.progress import Progress, follow_gradient
from train.sources import describe, open_source
from train.state import clamp_warmup, learning_rate

MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5


@dataclass(frozen=True)
class Config:
    """Settings of one CLIP."""

    data: str = "shapes"  # folder, .parquet, .tar, hub set, "shapes", "pictograms[:NAMES]" (or ":all"); joined by +
    output: Path = Path("runs/clip")  # text encoder, tokenizer, CLIP, checkpoint and logs
    size: int = 64  # side of the pictures that the picture tower sees, in pixels
    views: int = 1  # how often each drawn pictogram is drawn, each time a little differently
    jitter: float = 0.08  # pictures are moved and scaled by up to this share of their side
    vocabulary: int = 1500  # tokens at most, learnt from the captions
    context_length: int = 32  # tokens of a caption, start and end included
    embed_dim: int = 128  # of the space where captions and pictures meet
    text_width: int = 128
    text_layers: int = 4
    text_heads: int = 4
    vision_layers: tuple[int, ...] = (1, 1, 1, 1)  # four numbers: open_clip's ModifiedResNet; one: a ViT
    vision_width: int = 16
    vision_head_width: int = 32  # channels of an attention head
    patch_size: int = 8  # of a ViT, in pixels
    updates: int = 600  # optimizer updates in all
    batch_size: int = 128  # pictures in one update, on all processes together: their captions are told apart
    learning_rate: float = 1e-3
    warmup: int = 100  # updates of linear warm-up before the cosine
    weight_decay: float = 0.1
    clip: float = 1.0  # largest norm of the gradient
    mixed_precision: MixedPrecision | None = None  # None: what the launcher was told
    seed: int = 0
    measure_every: int = 50  # updates between measurements on pictures that are not trained on
    checkpoint_every: int = 500  # updates
    workers: int = 2  # processes that read pictures
    cache: Path = Path("cache")  # decoded pictures
    font: str | None = None  # the colour emoji font's file, for pictograms

    def __post_init__(self) -> None:
        at_least_one(self, "updates", "measure_every", "checkpoint_every", "views")
        if self.batch_size < 2:
            raise ValueError(f"--batch-size is {self.batch_size}: expected at least 2, a caption to tell from another")
        check_clip(self)
        if not 514 <= self.vocabulary <= 4000:
            raise ValueError(f"--vocabulary is {self.vocabulary}: expected 514 (every byte, start and end) to 4000")
        if self.context_length < 3:
            raise ValueError(f"--context-length is {self.context_length}: expected a token between start and end")
        if self.text_width % self.text_heads:
            raise ValueError(f"--text-width is {self.text_width}: expected a multiple of {self.text_heads} heads")
        if len(self.vision_layers) not in (1, 4):
            raise ValueError(f"--vision-layers is {self.vision_layers}: expected one number (ViT) or four (ResNet)")
        patch = self.patch_size if len(self.vision_layers) == 1 else 32
        if self.size % patch:
            raise ValueError(f"--size is {self.size}: expected a multiple of {patch}, what the tower divides it by")

    def arguments(self, tokens: int) -> dict[str, Any]:
        """Those of `open_clip.CLIP`, as the config files of open_clip write them."""
        layers: Any = self.vision_layers[0] if len(self.vision_layers) == 1 else list(self.vision_layers)
        vision = {"image_size": self.size, "layers": layers, "width": self.vision_width}
        text = {"context_length": self.context_length, "vocab_size": tokens, "width": self.text_width}
        return {
            "embed_dim": self.embed_dim,
            "vision_cfg": vision | {"head_width": self.vision_head_width, "patch_size": self.patch_size},
            "text_cfg": text | {"heads": self.text_heads, "layers": self.text_layers},
        }


NEW = Config(data="", updates=1500, warmup=200)
PRESETS = {
    # Taken without --data: first steps, about 3 minutes on 2 cores.
    "shapes": Config(),
    # Taken when --data is given.
    "new": NEW,
    # The bundled model's text encoder. Its card has times and scores.
    "bundled": replace(NEW, data="pictograms+shapes", output=Path("runs/bundled-clip"), mixed_precision="bf16"),
}


def draw_pairs(pictures: Pictures, size: int, *numbers: int, fullest: bool = False) -> list[tuple[int, str]]:
    """`size` pictures, each with one of its captions: a pure function of `numbers`, (seed, update).

    No picture of a batch bears another's caption, as long as there are enough that differ: contrastive learning would
    take a true pair for a wrong one. fullest: always a picture's first caption, instead of any.
    """
    draws = generator(*numbers)
    order = torch.randperm(len(pictures.captions), generator=draws).numpy()  # of which few are looked at
    choice = torch.rand(len(order), generator=draws).numpy()
    pairs: list[tuple[int, str]] = []
    alike: list[tuple[int, str]] = []
    chosen: set[str] = set()
    borne: set[str] = set()
    for i in map(int, order):
        if len(pairs) == size:
            break
        captions = pictures.captions[i]
        caption = captions[0 if fullest else int(float(choice[i]) * len(captions))]
        if caption in borne or not chosen.isdisjoint(captions):
            alike.append((i, caption))
            continue
        pairs.append((i, caption))
        chosen.add(caption)
        borne.update(captions)
    return pairs + alike[: size - len(pairs)]


def jittered(images: Tensor, amount: float, draws: torch.Generator, rank: int = 0, processes: int = 1) -> Tensor:
    """[B, 3, H, W], each picture moved and scaled by up to `amount` of its side; its border is drawn out.

    rank, processes: which share of the whole batch these are, every one of which has its own draws."""
    if not amount:
        return images
    every = torch.rand(3, len(images) * processes, generator=draws)
    scale, x, y = amount * (2 * every[:, rank::processes] - 1)
    zero = torch.zeros_like(scale)
    # Rows of [2, 3] maps from places in the new picture to places in the old one, which both run from -1 to 1.
    maps = torch.stack([1 + scale, zero, 2 * x, zero, 1 + scale, 2 * y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def retrieval(clip: ClipModel, pictures: Pictures, pairs: list[tuple[int, str]]) -> float:
    """The share of the pictures whose own caption is the closest of all in `pairs`."""
    images = clip.encode_image(to_unit(pictures.pixels[[i for i, _ in pairs]]))
    texts = clip.encode_text([caption for _, caption in pairs])
    return float(((images @ texts.T).argmax(1).cpu() == torch.arange(len(pairs))).float().mean())


def main(config: Config) -> Path:
    accelerator = start(config.mixed_precision, log_with="tensorboard", project_dir=config.output)
    device, rank, processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    config = replace(config, mixed_precision=accelerator.mixed_precision)
    if config.batch_size % processes:
        raise ValueError(f"--batch-size is {config.batch_size}: expected a multiple of the {processes} processes")

    free = ("measure_every", "updates")
    found = resume(config.output, config, may_change=free)

    # Drawn sets hold pictures out, which are measured; of other data, the same are trained on and measured.
    with accelerator.main_process_first():
        sources = [
            open_source(config.data, config.size, split=split, font=config.font, views=config.views)
            for split in ("train", "held_out")
        ]
        accelerator.print(describe(sources[0], config.size))
        show = accelerator.is_main_process
        pictures, unseen = (read_pictures(s, config.size, config.cache, workers=config.workers, progress=show)
                            for s in sources)  # fmt: skip
    if (count := len(pictures.captions)) < config.batch_size:
        raise ValueError(
            f"--data {config.data} holds {count} pictures, fewer than --batch-size {config.batch_size}: set it to "
            f"{count} or less"
        )
    if not unseen.keys:  # of so few drawn objects no pair is held out
        accelerator.print("no picture is held out: retrieval is measured on training pictures")
        unseen = pictures
    exam = draw_pairs(unseen, min(256, len(unseen.keys)), config.seed, -1, fullest=True)

    captions = sorted({caption for group in pictures.captions for caption in group})
    tokenizer = ClipTokenizer.train(captions, config.vocabulary, length=config.context_length)
    long = [caption for caption in captions if len(tokenizer.encode(caption)) > config.context_length - 2]
    if long:
        accelerator.print(
            f"{len(long)} of {len(captions)} captions are cut at {config.context_length} tokens (--context-length), "
            f"for instance {long[0]!r}"
        )

    torch.manual_seed(config.seed)
    arguments = config.arguments(len(tokenizer))
    layout = torch.channels_last  # narrow convolutions are faster so, in bfloat16 as well
    network = open_clip.CLIP(**arguments).to(memory_format=layout)
    groups = decaying(network, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)
    update = take_up(accelerator, optimizer, pictures.contents, found)  # other captions have another vocabulary
    if found:
        network.load_state_dict(load_file(found[0] / "clip" / WEIGHTS))
    model, optimizer = accelerator.prepare(network, optimizer)
    contrast = open_clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=processes)
    accelerator.init_trackers("logs")
    parameters = sum(p.numel() for p in network.parameters())
    accelerator.print(f"{len(tokenizer)} tokens, {parameters / 1e6:.2f} M parameters, {config.updates} updates")

    warmup = clamp_warmup(config.warmup, config.updates, accelerator.print)
    progress = Progress(accelerator, update, config.updates, config.checkpoint_every)
    for update in progress:
        rate = learning_rate(update, peak=config.learning_rate, warmup=warmup, updates=config.updates)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Each process draws the whole batch and takes its share: their number changes no batch.
        pairs = draw_pairs(pictures, config.batch_size, config.seed, update)
        images = to_unit(pictures.pixels[[i for i, _ in pairs[rank::processes]]])
        images = jittered(images, config.jitter, generator(config.seed, update, 1), rank, processes)
        ids = tokenise(tokenizer, [caption for _, caption in pairs[rank::processes]], config.context_length)

        model.train()
        seen, said, scale = model(sent(images, device).to(memory_format=layout), sent(ids, device))
        loss = contrast(seen.float(), said.float(), scale)
        learns, about = model.parameters(), partial("captions {} …".format, [caption for _, caption in pairs[:3]])
        norm = follow_gradient(
            accelerator, optimizer, loss, learns, update, config.output, clip=config.clip, about=about
        )
        with torch.no_grad():
            network.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

        due, done = progress.advance(), progress.done
        if done % config.measure_every == 0 or done == config.updates:
            right = (seen @ said.T).argmax(1) == torch.arange(len(seen), device=device)
            numbers = {"loss": float(accelerator.reduce(loss.detach(), "mean"))}
            numbers |= {"in_batch": float(right.float().mean()), "scale": scale.item()}
            if accelerator.is_main_process:
                numbers["retrieval"] = retrieval(ClipModel(network, tokenizer), unseen, exam)
            accelerator.log(numbers | {"gradient_norm": float(norm), "learning_rate": rate}, done)
            progress.bar.set_postfix_str(" ".join(f"{name} {number:.3f}" for name, number in numbers.items()))
        if due:
            if accelerator.is_main_process:
                state = common_state(accelerator, optimizer, config.batch_size, pictures.contents)
                save_checkpoint(
                    config.output, done, lambda f: save_clip(f, network, arguments, tokenizer), state, config
                )
            accelerator.wait_for_everyone()
    progress.end()
    if accelerator.is_main_process:
        save_clip(config.output, network, arguments, tokenizer)
        share = retrieval(ClipModel(network, tokenizer), unseen, exam)
        print(f"done: {share:.1%} of {len(exam)} pictures are closest to their own caption; saved in {config.output}")
    accelerator.end_training()
    return config.output


if __name__ == "__main__":
    with errors_said():
        main(parse(Config, PRESETS, default="new" if "--data" in flags_in(sys.argv) else "shapes"))
