"""Bits per dimension: what pictures cost under a model, by its variational bound or by its exact likelihood.

Pixels of 8 bits are the alphabet. A model in pixels is asked directly; one in latents through the bound of its
autoencoder (`ldm.elbo.latent_elbo`), whose decoder is given the one variance that suits these pictures best. What a
model was trained to be told, captions or labels, it is told here, without guidance: these are bits given the caption.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Normal
from tqdm import tqdm

from ldm.denoiser import Denoise
from ldm.elbo import ancestral_step, consistency_elbo, elbo, gaussian_log_likelihood, latent_elbo, pixel_log_likelihood
from ldm.likelihood import PIXEL, bits_per_dim, dequantise, draw_probes, log_likelihood
from ldm.samplers import picture_noise
from ldm.schedule import VariancePreserving
from pipelines import TextToImagePipeline
from pipelines.device import exact_float32
from pipelines.folder import Model
from train.data import Loaded, generator, permutation, read, refuse_unusable, to_unit
from train.pictures import refuse_numbers
from train.sources import Source, open_source
from vae.autoencoder import Autoencoder, Identity

Method = Literal["elbo", "consistency", "flow"]
FORMS = {"elbo": elbo, "consistency": consistency_elbo}
Nats = Callable[[Denoise, Tensor, list[torch.Generator]], Tensor]  # (D, latents, draws) -> log p: [B]


@exact_float32()
def measure_bits(
    model: str | None,
    data: str,
    *,
    method: Method = "elbo",
    count: int = 256,
    rows: int = 100,
    tolerance: float = 1e-3,
    batch: int = 32,
    seed: int = 0,
    workers: int = 2,
    source: Source | None = None,
) -> dict[str, float]:
    """Bits per dimension of `count` pictures drawn from a source, {"bits_per_dim": …, "standard_error": …, …}.

    Of the bound of a model in pixels also its three terms, which add up to it. The error is that of the choice of
    pictures; a batch shares its rows.

    Args:
        method: "elbo", the bound over the rows of the beta table, or "consistency", its other form; "flow", the
            likelihood under the probability flow, with Hutchinson's trace: a bound as well, because pixels are spread
            over their level, and often tighter.
        rows: how many rows of the table a batch asks, see `some_rows`: the mean is that of all of them.
        tolerance: of the flow's solver.
        source: the pictures, where they are open already.

    Raises:
        ValueError: a bound for a path that has no table, a model that inpaints, or counts that measure nothing.
    """
    if count < 2 or rows < 1 or batch < 1:
        raise ValueError(f"--count {count}, --rows {rows}, --batch {batch}: expected at least 2, 1 and 1")
    pipe = TextToImagePipeline.from_pretrained(model, dtype=torch.float32)
    opened, device = pipe.model, pipe.device
    schedule, size = opened.schedule, opened.size
    if opened.inpaints:
        raise ValueError(f"bits are of models of whole pictures, and {model} paints what is missing in one")
    last = len(schedule.table) - 1 if isinstance(schedule, VariancePreserving) else 0
    if method in FORMS and not last:
        raise ValueError(f"the path of {model} has no table of rows to sum over: take --method flow")
    told = opened.is_told
    pictures = _read(source or open_source(data, size, split="held_out", captions=told), size, count, seed, workers)
    if len(pictures) < 2:
        raise ValueError(f"{data} has {len(pictures)} pictures to measure: expected two or more")
    images = to_unit(torch.from_numpy(np.stack([np.asarray(picture.pixels) for picture in pictures])))
    captions = [picture.captions[0] if told else "" for picture in pictures]

    def bound(denoise: Denoise, x0: Tensor, draws: list[torch.Generator]) -> Tensor:
        likelihood = pixel_log_likelihood if isinstance(opened.vae, Identity) else gaussian_log_likelihood
        asked, sizes = some_rows(last, rows, draws[0])
        with opened.denoiser.learned_variance() as variance:
            step = ancestral_step(denoise, variance if opened.learned_variance else "small")
            noise = picture_noise(draws)
            bound = FORMS[method](step, x0, schedule, noise, log_likelihood=likelihood, rows=asked, weights=sizes)
        if isinstance(opened.vae, Identity):
            costs = {"reconstruction": -bound.reconstruction, "prior": bound.prior, "denoising": bound.denoising}
            for name, cost in costs.items():
                terms[name] = terms.get(name, 0.0) + float(bits_per_dim(-cost, x0[0].numel()).sum())
        return bound.total

    def flow(denoise: Denoise, x0: Tensor, draws: list[torch.Generator]) -> Tensor:
        probes = draw_probes(x0, picture_noise(draws))
        low, high = schedule.sigma_min, schedule.sigma_max
        return log_likelihood(denoise, x0, low, high, probes=probes, tolerance=tolerance).nats

    terms: dict[str, float] = {}  # summed over pictures
    nats = flow if method == "flow" else bound
    deviation = 0.0 if isinstance(opened.vae, Identity) else _deviation(opened.vae, images[:256].to(device))
    bits = []
    for part in tqdm(torch.arange(len(pictures)).split(batch), desc=f"bits by the {method}"):
        context = opened.conditioner([captions[i] for i in part.tolist()])
        draws = [generator(seed, i) for i in part.tolist()]
        shown, denoise = images[part].to(device), _told(opened, context)
        if isinstance(opened.vae, Identity):
            bits.append(_of_pixels(opened.vae, shown, denoise, draws, nats, method))
        else:
            bits.append(_of_latents(opened.vae, shown, denoise, draws, nats, deviation))
    every = torch.cat(bits)
    result = {"bits_per_dim": float(every.mean()), "standard_error": float(every.std()) / math.sqrt(len(every))}
    result |= {name: bits / len(every) for name, bits in terms.items()}
    return result | {"pictures": len(every)} | ({"decoder_deviation": deviation} if deviation else {})


def _read(source: Source, size: int, count: int, seed: int, workers: int) -> list[Loaded]:
    """`count` pictures, drawn by the seed, of which no more are broken than a training would accept."""
    refuse_numbers(source)
    chosen = permutation(len(source), seed, 0)[:count].tolist()
    parts = read(source, size, chosen, batch=64, workers=workers, progress="reading pictures")
    every = [picture for part in parts for picture in part]
    broken = [picture for picture in every if picture.pixels is None or picture.error]
    refuse_unusable([(picture.key, picture.error) for picture in broken], len(every))
    return [picture for picture in every if picture.pixels is not None and not picture.error]


def some_rows(last: int, number: int, draw: torch.Generator) -> tuple[list[int], list[int]]:
    """Rows from 1 to `last`, at most `number` of them, and how many rows each stands for.

    One is drawn from each of `number` runs of rows whose lengths grow geometrically, because the terms of the bound
    fall about as 1 / row: the lowest rows are all asked.
    """
    number = min(number, last)
    edges = [1]
    for left in range(number, 0, -1):
        edges.append(max(edges[-1] + 1, round(edges[-1] * ((last + 1) / edges[-1]) ** (1 / left))))
    sizes = [high - low for low, high in pairwise(edges)]
    chance = torch.rand(number, generator=draw).tolist()
    return [low + int(u * size) for low, u, size in zip(edges, chance, sizes, strict=False)], sizes


def _told(model: Model, context: dict[str, Tensor]) -> Denoise:
    return lambda x, sigma: model.denoiser(x, sigma, context)


@torch.no_grad()
def _of_pixels(
    vae: Identity, images: Tensor, denoise: Denoise, draws: list[torch.Generator], nats: Nats, method: Method
) -> Tensor:
    levels = ((vae.encode(images).mean + 1) * 127.5).round()  # [B, 1 or 3, H, W]; a mean of three is none yet
    x0 = levels / 127.5 - 1
    if method in FORMS:
        return bits_per_dim(nats(denoise, x0, draws), x0[0].numel())
    uniform = torch.stack([torch.rand(x0.shape[1:], generator=draw) for draw in draws]).to(x0)
    x0 = dequantise(levels, uniform)
    return bits_per_dim(nats(denoise, x0, draws), x0[0].numel(), PIXEL)


@torch.no_grad()
def _of_latents(
    vae: Autoencoder, images: Tensor, denoise: Denoise, draws: list[torch.Generator], nats: Nats, deviation: float
) -> Tensor:
    posterior = vae.encode(images)
    latents = posterior.sample(picture_noise(draws)(posterior.mean))
    said = pixel_log_likelihood(images, Normal(vae.decode(latents), deviation))
    return bits_per_dim(latent_elbo(said, nats(denoise, latents, draws), posterior), images[0].numel())


@torch.no_grad()
def _deviation(vae: Autoencoder, images: Tensor) -> float:
    """Root mean square error of the reconstructions: the standard deviation under which they are likeliest."""
    total = 0.0
    for i, part in enumerate(images.split(32)):
        posterior = vae.encode(part)
        latents = posterior.sample(torch.randn(posterior.mean.shape, generator=generator(i)).to(part))
        total += float((vae.decode(latents) - part).square().sum())
    return math.sqrt(total / images.numel())
