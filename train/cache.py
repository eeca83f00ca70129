"""What training needs of a picture, computed once: the autoencoder's posterior, and the text encoder's states.

The latent cache is a folder of shards, each written aside and renamed, so that a killed run goes on with the next shard
and two writers do not disturb one another. Its name is a hash of the pictures, the transform and the autoencoder's
weights: when one of them changes it is another cache.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from conditioning.context import Conditioner, Context
from train.data import read, refuse_unusable, to_unit, written_aside
from train.sources import Source, digest
from vae.autoencoder import Autoencoder, Identity, Posterior

SHARD = 512  # pictures in one file
TABLE_BYTES = 10**9  # up to which the states of all captions are kept in memory


class Latents(NamedTuple):
    """The posteriors of a set: mean and log-variance, [N, C, h, w] in float16, and the captions."""

    mean: Tensor
    logvar: Tensor
    captions: list[tuple[str, ...]]

    def posterior(self, indices: Tensor, device: torch.device) -> Posterior:
        return Posterior(self.mean[indices].to(device).float(), self.logvar[indices].to(device).float())

    def select(self, indices: Tensor) -> "Latents":
        return Latents(self.mean[indices], self.logvar[indices], [self.captions[i] for i in indices.tolist()])


def cache_latents(
    source: Source, vae: Autoencoder | Identity, size: int, folder: Path, accelerator: Accelerator, workers: int
) -> Latents:
    """Encodes what is not yet in the cache, each process its share of the shards, and opens all of it.

    Raises ValueError when more pictures than `train.sources.MAX_UNUSABLE` are broken or without a caption.
    """
    key = digest(source.fingerprint(), str(size), _weights_digest(vae))
    place = folder / f"latents-{key}"
    shards = range(-(-len(source) // SHARD))
    missing = [s for s in shards if not _shard(place, s).is_file()]
    if missing:
        channels, side = vae.latent_channels, size // vae.downscale
        megabytes = len(source) * channels * side * side * 4 / 1e6
        accelerator.print(f"latent cache: {len(missing)} of {len(shards)} shards to compute, {megabytes:.0f} MB in all")
        place.mkdir(parents=True, exist_ok=True)
    # Shares of all shards, not of the missing ones: those are fewer for a process that looks when others have begun.
    for shard in shards[accelerator.process_index :: accelerator.num_processes]:
        if not _shard(place, shard).is_file():
            _encode_shard(source, vae, size, place, shard, workers, accelerator)
    accelerator.wait_for_everyone()
    means, logvars, captions, unusable = [], [], [], []
    for s in shards:
        with safe_open(_shard(place, s), framework="pt") as opened:
            said = json.loads(opened.metadata()["captions"])
            means.append(opened.get_tensor("mean"))
            logvars.append(opened.get_tensor("logvar"))
        captions += [tuple(c) for c in said["captions"]]
        unusable += [tuple(u) for u in said["unusable"]]
    refuse_unusable(unusable, len(source), accelerator.print)
    if not captions:
        raise ValueError("no picture is left to train on")
    return Latents(torch.cat(means), torch.cat(logvars), captions)


@torch.no_grad()
def _encode_shard(
    source: Source,
    vae: Autoencoder | Identity,
    size: int,
    place: Path,
    shard: int,
    workers: int,
    accelerator: Accelerator,
) -> None:
    indices = range(shard * SHARD, min((shard + 1) * SHARD, len(source)))
    means, logvars, captions, unusable = [], [], [], []
    name = f"encoding shard {shard}" if accelerator.is_local_main_process else None
    for batch in read(source, size, indices, batch=32, workers=workers, progress=name):
        unusable += [(one.key, one.error) for one in batch if one.error]
        usable = [one for one in batch if one.pixels is not None and not one.error]
        if not usable:
            continue
        images = to_unit(torch.stack([torch.from_numpy(one.pixels.copy()) for one in usable]))  # type: ignore[union-attr]
        posterior = vae.encode(images.to(accelerator.device))
        means.append(posterior.mean.half().cpu())
        logvars.append(posterior.logvar.clamp(min=-30).half().cpu())
        captions += [one.captions for one in usable]
    shape = (0, vae.latent_channels, size // vae.downscale, size // vae.downscale)
    empty = [torch.zeros(shape, dtype=torch.float16)]
    said = json.dumps({"captions": captions, "unusable": unusable})
    moments = {"mean": torch.cat(means or empty), "logvar": torch.cat(logvars or empty)}
    with written_aside(_shard(place, shard)) as partial:
        save_file({name: m.contiguous() for name, m in moments.items()}, partial, metadata={"captions": said})


class Texts:
    """Captions to context rows: all encoded once, or as they come, when they are too many to keep or one of them needs
    more than one window of the encoder: each batch then has as many windows as its longest caption needs."""

    def __init__(self, conditioner: Conditioner, captions: Sequence[tuple[str, ...]], device: torch.device):
        self.conditioner, self.device = conditioner, device
        distinct = sorted({caption for group in captions for caption in group} | {""})
        row = sum(value.numel() * value.element_size() for value in self._encode([""]).values())  # bytes
        chunks = getattr(conditioner, "chunks", None)
        fits = row * len(distinct) <= TABLE_BYTES and (chunks is None or chunks(distinct) == 1)
        self.row = {caption: i for i, caption in enumerate(distinct)}
        self.table = self._encode(distinct) if fits else None

    @torch.no_grad()
    def _encode(self, captions: list[str]) -> Context:
        parts = [self.conditioner(captions[i : i + 256]) for i in range(0, len(captions), 256)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Context:
        """The context of these captions; the empty one is the null."""
        if self.table is None:
            return self.conditioner(list(captions))
        rows = torch.tensor([self.row[caption] for caption in captions])
        return {name: value[rows.to(value.device)].to(self.device) for name, value in self.table.items()}


def _shard(place: Path, shard: int) -> Path:
    return place / f"{shard:06d}.safetensors"


def _weights_digest(network: nn.Module) -> str:
    digest = hashlib.sha256(repr(getattr(network, "config", "")).encode())
    for name, weight in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
