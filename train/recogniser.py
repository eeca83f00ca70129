"""Trains a small network that says what clean pictures show: the judge of samples, and the features of distances.

    accelerate launch train/recogniser.py --preset cifar10 --data cifar10-train.parquet --test cifar10-test.parquet

The network (`train.recogniser_model`) has an answer for each task: a picture's class, which is its first caption, or of
drawn pictograms the object and the style, of the pairs held out of training, too, so that it can tell whether a
generator composes them.
Every random draw is a function of (seed, update, process), so the same command goes on exactly where it was stopped;
another number of processes shifts and mirrors pictures otherwise, and normalises other batches.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:  # as a script, this folder is first on the path, where ldm.py would hide the package ldm
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from pipelines.files import read_weights, save_network
from train.answers import augmented, numbered, read_answers, softened
from train.checkpoints import common_state, resume, save_checkpoint, take_up
from train.config import at_least_one, parse
from train.data import batch_indices, generator, permutation, sent, to_unit
from train.extractors import ACCURACY
from train.launch import MixedPrecision, errors_said, matrix_type, start
from train.muon import Muon
from train.pictograms import is_drawn
from train.pictures import digest
from train.progress import Progress, follow_gradient
from train.recogniser_model import Recogniser, RecogniserConfig, as_seen
from train.state import clamp_warmup, learning_rate

SMOOTHING = 0.2  # of the answers, as in the network's paper
SMALL = RecogniserConfig()


@dataclass(frozen=True)
class Config:
    """Settings of one recogniser."""

    data: str = ""  # folder of class folders, .parquet file, or "pictograms[:NAMES]" (or ":all")
    test: str = ""  # pictures to measure the accuracy on; without, some of --data are not trained on
    output: Path = Path("runs/recogniser")  # checkpoints and logs
    model: RecogniserConfig = SMALL  # its tasks are those of the data
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
    updates = -(-config.epochs * len(shown) // global_batch)
    warmup = clamp_warmup(config.warmup, updates, accelerator.print)
    found = resume(config.output, config, may_change=("epochs", "batch_size"), global_batch=global_batch)
    update = take_up(accelerator, optimizer, pictures.contents, found)
    if found:
        network.load_state_dict(read_weights(found[0]))
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
            logits = learner(images.contiguous(memory_format=torch.channels_last))
        losses = [F.cross_entropy(a, b, label_smoothing=SMOOTHING) for a, b in zip(logits, truths, strict=True)]
        loss = torch.stack(losses).sum()
        follow_gradient(accelerator, optimizer, loss, network.parameters(), update, config.output)
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

                state = common_state(accelerator, optimizer, global_batch, pictures.contents)
                saved = save_checkpoint(config.output, done, write, state, config)
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
