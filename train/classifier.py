"""Trains a classifier of noisy pictures, for classifier guidance:

    accelerate launch train/classifier.py --data mnist-train.parquet

Reads top to bottom: settings, then one loop. A picture's class is its first caption (a class folder's name, a parquet
file's text). Every random draw is a function of (seed, update, position in the batch), so the same command goes on
exactly where it was stopped. It guides any model of the same pixels, or of the same autoencoder's latents:
`TextToImagePipeline.from_pretrained(MODEL)(CLASS, classifier=OUTPUT, classifier_scale=2)`.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

if not __package__:  # as a script, this folder is first on the path, where ldm.py would hide the package ldm
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.classifier import NoisyClassifier, NoisyClassifierConfig, classification_loss
from ldm.loss import training_noise
from pipelines.files import read_weights, save_network
from train.build import begin_at_zero, decaying, open_autoencoder, side_for
from train.cache import Latents, cache_latents
from train.checkpoints import common_state, resume, save_checkpoint, take_up
from train.config import at_least_one, check_clip, parse
from train.data import draws, generator, permutation, sent
from train.hashes import FileHashes
from train.launch import MixedPrecision, errors_said, memory_format, start
from train.progress import Progress, follow_gradient
from train.sources import classes_of, describe, open_source
from train.state import clamp_warmup, learning_rate

SMALL = NoisyClassifierConfig()
LEVELS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # at which the accuracy is measured


@dataclass(frozen=True)
class Config:
    """Settings of one classifier."""

    data: str = ""  # folder of class folders, .parquet, .tar, hub set; the first caption of a picture is its class
    output: Path = Path("runs/classifier")  # checkpoints and logs
    model: NoisyClassifierConfig = SMALL  # channels, classes and sigma_data are those of the data
    vae: str = "grey"  # what the model that it guides works in: "grey" or "none" for pixels, "bundled", or a folder
    size: int | None = None  # side of the pictures in pixels; None: 32, or what the autoencoder was trained on
    noise: Literal["uniform", "log_normal", "logit_normal"] = "log_normal"  # distribution of training noise
    noise_mean: float | None = None  # of log(sigma), not for uniform; None: 0, and the paper's for logit_normal
    noise_std: float | None = None  # likewise; None: 1.7, and the paper's for logit_normal
    updates: int = 3000  # optimizer updates in all
    batch_size: int = 64  # pictures in one update on one process
    learning_rate: float = 1e-3
    warmup: int = 100  # updates of linear warm-up before the cosine
    weight_decay: float = 0.05
    clip: float = 1.0  # largest norm of the gradient
    mixed_precision: MixedPrecision | None = None  # None: what the launcher was told
    seed: int = 0
    checkpoint_every: int = 500  # updates; also how often the accuracy is measured
    workers: int = 2  # processes that read pictures
    cache: Path = Path("cache")  # latents
    font: str | None = None  # the colour emoji font's file, for pictograms

    def __post_init__(self) -> None:
        at_least_one(self, "updates", "batch_size", "checkpoint_every", "size")
        check_clip(self)


DIGITS = Config(size=28, updates=1300, learning_rate=2e-3, mixed_precision="bf16")
PRESETS = {
    # MNIST and FashionMNIST in pixels, --data FILE.parquet: of MNIST's 10,000 test pictures 98.3% are right at sigma
    # 0.1, 97.9% at 0.5, 96.1% at 1, 79.6% at 2, 40.8% at 4.
    "grey": DIGITS,
    # CIFAR-10 in pixels, 9 min 47 s of one core: of 1,000 pictures that it does not train on 54.9% are right at sigma
    # 0.1, 52.4% at 0.5, 47.4% at 1, 39.5% at 2, 29.9% at 4.
    "colour": Config(vae="none"),
    # Of any classes in an autoencoder's latents; CIFAR-10 in those of `train/vae.py --preset cifar10` (--vae
    # runs/cifar10-vae), 1 min 27 s: 55.6% at sigma 0.1, 55.3% at 0.5, 51.8% at 1, 45.9% at 2, 36.1% at 4.
    "latents": Config(vae="bundled", noise_mean=0.4),
    # A judge of finished pictures: it sees hardly any noise. Likewise, 2 min 40 s of processor time on an AMD
    # EPYC: 99.0% of the 10,000 test pictures are right.
    "clean": replace(DIGITS, output=Path("runs/judge"), noise_mean=-3.0, noise_std=0.5, seed=1),
}


@torch.no_grad()
def accuracies(classifier: nn.Module, latents: Latents, labels: Tensor, device: torch.device) -> dict[str, float]:
    """Share of pictures whose class is the likeliest, on fixed noise: {"accuracy/sigma 0.1": ...}."""
    classifier.eval()
    right = dict.fromkeys(LEVELS, 0.0)
    for part in torch.arange(len(labels)).split(64):
        x0 = latents.posterior(part, device).mean
        noise = torch.randn(x0.shape, generator=generator(0, int(part[0]))).to(device)
        for sigma in LEVELS:
            right[sigma] += float((classifier(x0 + sigma * noise, sigma).argmax(1).cpu() == labels[part]).sum())
    classifier.train()
    return {f"accuracy/sigma {sigma}": number / len(labels) for sigma, number in right.items()}


def main(config: Config) -> Path:
    accelerator = start(config.mixed_precision, log_with="tensorboard", project_dir=config.output)
    device, rank = accelerator.device, accelerator.process_index
    config = replace(config, mixed_precision=accelerator.mixed_precision)
    if config.noise == "log_normal":
        mean, std = config.noise_mean, config.noise_std
        config = replace(config, noise_mean=0.0 if mean is None else mean, noise_std=1.7 if std is None else std)
    vae = open_autoencoder(config.vae).to(device)
    size = side_for(config.size, vae)

    source = open_source(config.data, size, font=config.font)
    accelerator.print(describe(source, size))
    names = classes_of(source)  # before the pictures are read, which may take long
    everything = cache_latents(source, vae, size, config.cache, accelerator, config.workers)
    contents = source.fingerprint(FileHashes(config.cache))
    place = {name: i for i, name in enumerate(names)}
    classes = torch.tensor([place[group[0]] for group in everything.captions])
    count = len(classes)
    order = permutation(count, config.seed, -1)
    held = min(1000, count // 20) if count >= 100 else 0
    latents, labels = everything.select(order[held:]), classes[order[held:]]
    chosen = order[:held] if held else order[:1000]
    unseen, answers = everything.select(chosen), classes[chosen]
    accelerator.print(
        f"{len(names)} classes: {', '.join(names[:12])}{' …' if len(names) > 12 else ''}; {count - held} pictures to "
        f"train on, {held} held out" + ("" if held else " (too few: the accuracy is that on the training pictures)")
    )

    torch.manual_seed(config.seed)
    some = latents.posterior(torch.arange(min(4096, len(labels))), torch.device("cpu"))
    spread = float((some.mean.var() + some.logvar.exp().mean()).sqrt())
    model = replace(
        config.model,
        labels=names,
        in_channels=vae.latent_channels,
        sample_size=size // vae.downscale,
        sigma_data=float(f"{spread:.3g}") or 1.0,
    )
    classifier = NoisyClassifier(model)
    begin_at_zero(classifier)
    classifier.to(device, memory_format=memory_format(accelerator, classifier))  # type: ignore[call-overload]
    noise_levels = training_noise(config.noise, classifier.schedule, mean=config.noise_mean, std=config.noise_std)
    warmup = clamp_warmup(config.warmup, config.updates, accelerator.print)
    groups = decaying(classifier, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    global_batch = config.batch_size * accelerator.num_processes
    found = resume(config.output, config, may_change=("updates", "batch_size"), global_batch=global_batch)
    update = take_up(accelerator, optimizer, contents, found)
    if found:
        classifier.load_state_dict(read_weights(found[0]))
    network, optimizer = accelerator.prepare(classifier, optimizer)
    accelerator.init_trackers("classifier")
    parameters = sum(p.numel() for p in classifier.parameters())
    accelerator.print(f"classifier: {parameters / 1e6:.2f} M parameters, {config.updates} updates of {global_batch}")

    progress = Progress(accelerator, update, config.updates, config.checkpoint_every)
    for update in progress:
        rate = learning_rate(update, peak=config.learning_rate, warmup=warmup, updates=config.updates)
        for group in optimizer.param_groups:
            group["lr"] = rate
        first = rank * config.batch_size
        shape = latents.mean.shape[1:]
        drawn = draws(config.seed, update, first, config.batch_size, global_batch, len(labels), shape)
        posterior_noise, noise = sent(drawn.normal, device)
        x0 = latents.posterior(drawn.indices, device).sample(posterior_noise)
        sigma = noise_levels.sigma(sent(drawn.u, device))
        loss = classification_loss(network, x0, sent(labels[drawn.indices], device), sigma, noise).mean()
        norm = follow_gradient(
            accelerator, optimizer, loss, network.parameters(), update, config.output, clip=config.clip
        )

        due, done = progress.advance(), progress.done
        if done % 25 == 0 or done == config.updates:
            numbers = {"loss": float(accelerator.reduce(loss.detach(), "mean")), "gradient_norm": float(norm)}
            numbers |= {"pictures_per_second": progress.rate(global_batch), "learning_rate": rate}
            accelerator.log(numbers, done)
            progress.bar.set_postfix_str(f"loss {numbers['loss']:.4f}, {numbers['pictures_per_second']:.0f} pictures/s")
        if due:
            if accelerator.is_main_process:
                state = common_state(accelerator, optimizer, global_batch, contents)
                saved = save_checkpoint(config.output, done, lambda f: save_network(classifier, f), state, config)
                shares = accuracies(classifier, unseen, answers, device)
                accelerator.log(shares, done)
                shown = ", ".join(f"{key.split()[-1]}: {share:.3f}" for key, share in shares.items())
                tqdm.write(f"update {done}: accuracy by sigma {shown}; saved {saved}")
            accelerator.wait_for_everyone()
    progress.end()
    accelerator.end_training()
    accelerator.print(
        f"done: {config.output}; guide by it (atelier CLASS --classifier {config.output}), or let it judge "
        f"(atelier evaluate MODEL --judge {config.output})"
    )
    return config.output


if __name__ == "__main__":
    with errors_said():
        main(parse(Config, PRESETS, default="grey"))
