"""Trains a small network that says what clean pictures show: the judge of samples, and the features of distances.

    accelerate launch train/recogniser.py --preset cifar10 --data cifar10-train.parquet --test cifar10-test.parquet

The network is that of K. Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU" (arXiv:2404.00498), of any width
and depth, with an answer for each task: a picture's class, which is its first caption, or of drawn pictograms the
object and the style, of the pairs held out of training, too, so that it can tell whether a generator composes them.
Every random draw is a function of (seed, update, process), so the same command goes on exactly where it was stopped;
another number of processes shifts and mirrors pictures otherwise, and normalises other batches.
"""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

if not __package__:  # as a script, this folder is first on the path, where ldm.py would hide the package ldm
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ldm.blocks import ModelConfig, Network
from pipelines.files import newest, open_network, read_weights, save_network
from train.answers import Tasks, augmented, numbered, read_answers, softened
from train.config import at_least_one, parse
from train.data import batch_indices, generator, permutation, refuse_other_data, sent, to_unit
from train.extractors import ACCURACY
from train.launch import MixedPrecision, errors_said, matrix_type, start
from train.muon import Muon
from train.pictograms import is_drawn
from train.pictures import digest
from train.progress import Progress, refuse_bad_step
from train.state import clamp_warmup, learning_rate, load_scaler, resume, save_checkpoint, scaler_state

BEFORE_LOGITS = 1 / 9  # that paper's: logits of an untrained network are small
SMOOTHING = 0.2  # of the answers, likewise


@dataclass(frozen=True)
class RecogniserConfig(ModelConfig):
    """Each entry of `widths` is a block, which halves the sides."""

    tasks: Tasks = ()  # name of what is asked -> names of the answers
    in_channels: int = 3  # 1: pictures are made grey
    sample_size: int = 32  # side to which pictures are brought, in pixels
    widths: tuple[int, ...] = (32, 128, 128)

    class_name: ClassVar[str] = "Recogniser"
    fixed: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        if self.in_channels not in (1, 3):
            raise ValueError(f"in_channels={self.in_channels}: expected 1 (grey) or 3")
        if not self.widths or min(self.widths) < 1 or self.sample_size < 2 ** len(self.widths) + 1:
            raise ValueError(
                f"widths={self.widths} at {self.sample_size} pixels: expected at least one, and sides of more than "
                f"{2 ** len(self.widths)} pixels for so many halvings"
            )


class Recogniser(Network):
    """Pictures [B, C, H, W] in [-1, 1] to logits.

    The first layer is 2×2 patches along their principal axes, set by `whiten` and not trained.

    Raises:
        ValueError: a config with no task, or a task with fewer than two answers.
    """

    config_class = RecogniserConfig

    def __init__(self, config: RecogniserConfig):
        super().__init__()
        if not config.tasks or any(len(answers) < 2 for _, answers in config.tasks):
            raise ValueError(f"tasks={config.tasks}: expected at least one, each with the names of two answers or more")
        self.config = config
        patches = 2 * 4 * config.in_channels
        self.conv_in = nn.Conv2d(config.in_channels, patches, 2)
        self.conv_in.weight.requires_grad_(False)
        self.blocks = nn.ModuleList(_Block(a, b) for a, b in pairwise((patches, *config.widths)))
        self.linear_out = nn.Linear(config.widths[-1], sum(len(answers) for _, answers in config.tasks), bias=False)

    @property
    def dim(self) -> int:
        """Number of features."""
        return self.config.widths[-1]

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Sets the first layer: the eigenvectors of 2×2 patches by the root of their eigenvalues, and their negatives.

        images: [N, C, H, W], some thousand pictures of the kind.
        """
        moment, count = torch.zeros(4 * images.shape[1], 4 * images.shape[1], dtype=torch.float64), 0
        for some in images.split(64):
            patches = F.unfold(some.double(), 2).transpose(1, 2).flatten(0, 1)
            moment, count = moment + patches.T @ patches, count + len(patches)
        values, vectors = torch.linalg.eigh(moment / count)
        filters = (vectors / (values + 5e-4).sqrt()).T.flip(0).reshape(-1, *self.conv_in.weight.shape[1:])
        self.conv_in.weight.copy_(torch.cat((filters, -filters)))
        nn.init.zeros_(self.conv_in.bias)  # type: ignore[arg-type]

    def features(self, images: Tensor) -> Tensor:
        """The last layer but one, [B, dim]."""
        h = F.gelu(self.conv_in(images.to(self.dtype)))
        for block in self.blocks:
            h = block(h)
        return h.amax((2, 3))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of each task, [B, answers] float32."""
        return self.answer(self.features(images))

    def answer(self, features: Tensor) -> tuple[Tensor, ...]:
        """Logits of each task from the features."""
        logits = BEFORE_LOGITS * self.linear_out(features).float()
        return logits.split([len(answers) for _, answers in self.config.tasks], dim=1)


class _Block(nn.Module):
    def __init__(self, a: int, b: int):
        super().__init__()
        self.conv1 = nn.Conv2d(a, b, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(b, b, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(b, momentum=0.4), nn.BatchNorm2d(b, momentum=0.4)
        for norm in (self.norm1, self.norm2):
            norm.weight.requires_grad_(False)
        for conv in (self.conv1, self.conv2):
            nn.init.dirac_(conv.weight[: conv.in_channels].detach())  # the first channels pass through

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.norm2(self.conv2(x)))


def as_seen(config: RecogniserConfig, images: Tensor) -> Tensor:
    """[B, 3, H, W] in [-1, 1] -> [B, C, H, W], as such a network takes them."""
    return images if config.in_channels == 3 else images.mean(1, keepdim=True)


def load_recogniser(where: str | Path) -> Recogniser:
    """A recogniser's folder, frozen; a training run's folder stands for its newest checkpoint. ValueError without."""
    return open_network(Recogniser, newest(Path(where).expanduser()))


@dataclass(frozen=True)
class Config:
    """Settings of one recogniser."""

    data: str = ""  # folder of class folders, .parquet file, or "pictograms[:NAMES]" (or ":all")
    test: str = ""  # pictures to measure the accuracy on; without, some of --data are not trained on
    output: Path = Path("runs/recogniser")  # checkpoints and logs
    model: RecogniserConfig = RecogniserConfig()  # its tasks are those of the data
    flip: bool = True  # show pictures from the other side, too
    shift: int = 2  # and moved by up to so many pixels
    soften: float = 0.0  # share that is shown blurred and grainy, as samples may be
    views: int = 4  # of pictograms: drawings of each object in each style on each ground
    epochs: int = 20
    batch_size: int = 256  # pictures in one update on one process
    learning_rate: float = 1e-2  # of Muon
    warmup: int = 200  # updates
    weight_decay: float = 0.05
    mixed_precision: MixedPrecision | None = "bf16"
    seed: int = 0
    checkpoint_every: int = 1000  # updates; also how often the accuracy is measured
    workers: int = 2  # processes that read pictures
    cache: Path = Path("cache")  # decoded pictures
    font: str | None = None  # the colour emoji font's file, for pictograms

    def __post_init__(self) -> None:
        at_least_one(self, "views", "epochs", "batch_size", "checkpoint_every")
        if not 0 <= self.soften <= 1:
            raise ValueError(f"--soften is {self.soften}: expected a share from 0 to 1")
        if not 0 <= self.shift < self.model.sample_size // 2:
            raise ValueError(f"--shift is {self.shift}: expected 0 to less than half of {self.model.sample_size}")


PRESETS = {
    # 88.2% of the 10,000 test pictures after 17 min 30 s of processor time (another run, of two processes: 87.8%).
    "cifar10": Config(output=Path("runs/cifar10-recogniser"), learning_rate=2e-2),
    # 99.65% of the 10,000 test pictures after 1 min 55 s of processor time.
    "mnist": Config(
        output=Path("runs/mnist-recogniser"),
        learning_rate=5e-3,
        model=RecogniserConfig(in_channels=1, sample_size=28, widths=(16, 48, 96)),
        flip=False,
        epochs=5,
        checkpoint_every=400,
    ),
    # Judges samples, which may be a little out of focus, and is shown such.
    "pictograms": Config(
        data="pictograms",
        output=Path("runs/pictograms-recogniser"),
        model=RecogniserConfig(sample_size=64, widths=(16, 48, 96, 192)),
        flip=False,
        shift=3,
        soften=0.5,
        epochs=8,
    ),
}


@torch.no_grad()
def accuracies(network: Recogniser, pixels: Tensor, answers: Tensor, device: torch.device) -> dict[str, float]:
    """Share of pictures whose likeliest answer is right, by task."""
    network.eval()
    right = torch.zeros(answers.shape[1])
    for part, truth in zip(pixels.split(500), answers.split(500), strict=True):
        logits = network(as_seen(network.config, to_unit(part).to(device)))
        right += torch.stack([(a.argmax(1).cpu() == truth[:, i]).float().sum() for i, a in enumerate(logits)])
    network.train()
    return {task: float(r) / len(answers) for (task, _), r in zip(network.config.tasks, right, strict=True)}


def main(config: Config) -> Path:
    accelerator = start(config.mixed_precision, log_with="tensorboard", project_dir=config.output)
    device, rank = accelerator.device, accelerator.process_index
    config = replace(config, mixed_precision=accelerator.mixed_precision)
    with accelerator.main_process_first():  # which reads what the others then find in the cache
        of: dict[str, Any] = {"font": config.font, "workers": config.workers, "say": accelerator.print}
        where = (config.model.sample_size, config.cache)
        pictures, said = read_answers(config.data, *where, views=config.views, seed=1, **of)
        test = config.test or (config.data if is_drawn(config.data) else "")
        other = read_answers(test, *where, views=1, seed=2, **of) if test else None
    tasks = tuple((task, tuple(sorted(set(names)))) for task, names in said.items())
    answers, held = numbered(said, tasks), 0
    order = torch.arange(len(answers))
    if other:
        unseen, truth = other[0].pixels, numbered(other[1], tasks)
        if not config.test:  # pixel art has so few looks that drawings of another seed are the same
            known = {digest(one.tobytes()) for one in pictures.pixels.numpy()}
            new = [i for i, one in enumerate(unseen.numpy()) if digest(one.tobytes()) not in known]
            unseen, truth = unseen[new], truth[new]
    else:
        order, held = permutation(len(answers), config.seed, -1), max(1, min(1000, len(answers) // 20))
        unseen, truth = pictures.pixels[order[:held]], answers[order[:held]]
    shown = order[held:]
    counted = ", ".join(f"{len(names)} answers to {task!r}" for task, names in tasks)
    accelerator.print(f"{len(shown)} pictures to train on, {len(truth)} to measure; {counted}")

    torch.manual_seed(config.seed)
    network = Recogniser(replace(config.model, tasks=tasks))
    some = shown[permutation(len(shown), config.seed, -2)[:2000]]
    network.whiten(as_seen(network.config, to_unit(pictures.pixels[some])))
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = Muon(network, config.learning_rate, config.weight_decay, matrix_type(accelerator))
    global_batch = config.batch_size * accelerator.num_processes
    updates, update = -(-config.epochs * len(shown) // global_batch), 0
    warmup = clamp_warmup(config.warmup, updates, accelerator.print)
    free = ("epochs", "batch_size")
    if found := resume(config.output, config, may_change=free, global_batch=global_batch):
        folder, state = found
        refuse_other_data(state, pictures.contents)
        update = state["update"]
        network.load_state_dict(read_weights(folder))
        optimizer.load_state_dict(state["optimizer"])
        load_scaler(accelerator, state)
        accelerator.print(f"going on from {folder}")
    learner, optimizer = accelerator.prepare(network, optimizer)
    accelerator.init_trackers("recogniser")
    parameters = sum(p.numel() for p in network.parameters())
    accelerator.print(f"recogniser: {parameters / 1e6:.2f} M parameters, {updates} updates of {global_batch}")

    progress = Progress(accelerator, update, updates, config.checkpoint_every)
    for update in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(update, peak=config.learning_rate, warmup=warmup, updates=updates)
        first = update * global_batch + rank * config.batch_size
        chosen = shown[batch_indices(len(shown), config.seed, first, config.batch_size)]
        images = as_seen(network.config, to_unit(pictures.pixels[chosen]))
        draw = generator(config.seed, update, rank)
        images = augmented(images, config.shift, config.flip, draw)
        images = sent(softened(images, config.soften, draw) if config.soften else images, device)
        truths = sent(answers[chosen], device).unbind(1)
        with accelerator.autocast():
            found_logits = learner(images.contiguous(memory_format=torch.channels_last))
        losses = [
            F.cross_entropy(a, truth_, label_smoothing=SMOOTHING)
            for a, truth_ in zip(found_logits, truths, strict=True)
        ]
        loss = torch.stack(losses).sum()
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(network.parameters(), math.inf)  # is only asked for
        refuse_bad_step(accelerator, loss, norm, update, config.output)
        optimizer.step()
        optimizer.zero_grad()
        due, done = progress.advance(), progress.done
        if done % 25 == 0 or done == updates:
            numbers = {"loss": float(loss.detach()), "pictures_per_second": progress.rate(global_batch)}
            accelerator.log(numbers, done)
            progress.bar.set_postfix_str(f"loss {numbers['loss']:.3f}, {numbers['pictures_per_second']:.0f} pictures/s")
        if due:
            if accelerator.is_main_process:
                shares = accuracies(network, unseen, truth, device)

                def write(folder: Path, shares: dict[str, float] = shares) -> None:
                    save_network(network, folder)
                    (folder / ACCURACY).write_text(json.dumps(shares | {"pictures": len(truth)}) + "\n")

                kept = {"optimizer": optimizer.state_dict(), "scaler": scaler_state(accelerator)}
                kept |= {"global_batch": global_batch, "data": pictures.contents}
                saved = save_checkpoint(config.output, done, write, kept, config)
                accelerator.log({f"accuracy/{task}": share for task, share in shares.items()}, done)
                right = ", ".join(f"{task} {share:.2%}" for task, share in shares.items())
                tqdm.write(f"update {done}: right of {len(truth)} unseen pictures: {right}; saved {saved}")
            accelerator.wait_for_everyone()
    progress.end()
    accelerator.end_training()
    accelerator.print(f"done: {config.output}; features of it: atelier evaluate MODEL --extractor {config.output} …")
    return config.output


if __name__ == "__main__":
    with errors_said():
        main(parse(Config, PRESETS, default="cifar10"))
