"""What training needs of a picture, computed once: the autoencoder's posterior.

The latent cache is a folder of shards, each written aside and renamed, so that a killed run goes on with the next shard
and two writers do not disturb one another. Its name is a hash of the pictures, the transform and the weights that
encode: when one of them changes it is another cache, and it is the same one after `train/vae.py --decoder-only`.
"""

import hashlib
import json
import shutil
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from train.aside import opened_whole, save_whole
from train.data import Side, read, refuse_unusable, sent, to_unit
from train.hashes import FileHashes
from train.pictures import Source, digest, refuse_numbers
from train.sources import parts_of
from vae.autoencoder import Autoencoder, Identity, Posterior

SHARD = 512  # pictures in one file
FORMAT = "3"  # of the shards: raised when what lies in them changes
DECODING = ("decoder.", "post_quant_conv.")  # weights of an autoencoder that its latents know nothing of


class Latents(NamedTuple):
    """The posteriors of a set: mean and log-variance, [N, C, h, w] in float16, and the captions."""

    mean: Tensor
    logvar: Tensor
    captions: list[tuple[str, ...]]

    def posterior(self, indices: Tensor, device: torch.device) -> Posterior:
        return Posterior(sent(self.mean[indices], device).float(), sent(self.logvar[indices], device).float())

    def select(self, indices: Tensor) -> "Latents":
        return Latents(self.mean[indices], self.logvar[indices], [self.captions[i] for i in indices.tolist()])


class Cached:
    """The posteriors of a set on the disk, mapped into memory: pictures may have several shapes."""

    def __init__(self) -> None:
        self.moments: list[tuple[Tensor, Tensor]] = []  # of each shard and shape: mean and log-variance, float16
        self.captions: list[tuple[str, ...]] = []
        self.contents: list[str] = []  # of each part of --data the fingerprint
        # Of each picture seven to ten numbers, which as Python's own would take more memory than a small latent:
        self._where = array("q")  # which of `moments`, and the row there
        self._framing = array("q")
        self._index = array("q")
        self._parts = array("q")

    def add(self, file: Path, part: int, begin: int) -> list[tuple[str, str]]:
        """Maps a shard of the part that begins at `begin`; (key, error) of the pictures that it lacks."""
        with opened_whole(file) as opened:
            said = json.loads(opened.metadata()["pictures"])
            place = {}
            for shape in said["shapes"]:
                place[shape] = len(self.moments)
                self.moments.append((opened.get_tensor(f"mean {shape}"), opened.get_tensor(f"logvar {shape}")))
        rows = dict.fromkeys(place, 0)
        for captions, framing, index, shape in said["pictures"]:
            self.captions.append(tuple(captions))
            self._where.extend((place[shape], rows[shape]))
            self._framing.extend(framing)
            self._index.append(begin + index)
            self._parts.append(part)
            rows[shape] += 1
        return [(key, error) for key, error in said["unusable"]]

    @property
    def where(self) -> Tensor:
        """[N, 2]: which of `moments`, and the row there."""
        return torch.frombuffer(self._where, dtype=torch.int64).view(-1, 2)

    @property
    def framing(self) -> Tensor:
        """[N, 6], as `train.data.framing` has it."""
        return torch.frombuffer(self._framing, dtype=torch.int64).view(-1, 6)

    @property
    def index(self) -> Tensor:
        """[N]: of each picture in the (joined) source."""
        return torch.frombuffer(self._index, dtype=torch.int64)

    def fingerprint(self) -> str:
        """Of the pictures and captions, which of them can be used, and how each is framed; not of where they lie."""
        return digest(*self.contents, self._index.tobytes(), self._framing.tobytes())

    @property
    def parts(self) -> Tensor:
        """[N]: the part of --data that each picture is of."""
        return torch.frombuffer(self._parts, dtype=torch.int64)

    def shapes(self) -> tuple[list[tuple[int, ...]], Tensor]:
        """The shapes (C, h, w) that there are, the largest first; and which of them each picture has, [N]."""
        every = [tuple(mean.shape[1:]) for mean, _ in self.moments]
        shapes = sorted(set(every), key=lambda shape: (-shape[1] * shape[2], shape))
        return shapes, torch.tensor([shapes.index(shape) for shape in every])[self.where[:, 0]]

    def posterior(self, indices: Tensor, device: torch.device) -> Posterior:
        """Of pictures of one shape."""
        mean, logvar, _ = self.select(indices)
        return Posterior(sent(mean, device).float(), sent(logvar, device).float())

    def select(self, indices: Tensor) -> Latents:
        """Pictures of one shape, copied into memory."""
        where = self.where[indices].tolist()
        mean = torch.stack([self.moments[m][0][row] for m, row in where])
        logvar = torch.stack([self.moments[m][1][row] for m, row in where])
        return Latents(mean, logvar, [self.captions[i] for i in indices.tolist()])


def cache_latents(
    source: Source, vae: Autoencoder | Identity, size: int, folder: Path, accelerator: Accelerator, workers: int
) -> Latents:
    """`open_cache` of squares, copied into memory."""
    refuse_numbers(source)
    cached = open_cache(source, vae, size, folder, accelerator, workers)
    means, logvars = zip(*cached.moments, strict=True)
    return Latents(torch.cat(means), torch.cat(logvars), cached.captions)


def open_cache(
    source: Source,
    vae: Autoencoder | Identity,
    size: int,
    folder: Path,
    accelerator: Accelerator,
    workers: int,
    sides: Sequence[Side] | None = None,
) -> Cached:
    """Encodes what is not yet in the cache, each process its share of the shards, and maps all of it.

    sides: (width, height) of each picture, for aspect-ratio buckets; without them every picture is a square of `size`.

    Raises ValueError when more pictures than `train.pictures.MAX_UNUSABLE` of a part are broken or without a caption,
    or when the disk has no room for what is to be written.
    """
    encoding = encoding_digest(vae)
    parts, jobs, begin = [], [], 0
    cached = Cached()
    for part, _ in parts_of(source):
        of_part: list[Side] = list(sides[begin : begin + len(part)]) if sides is not None else [size] * len(part)
        transform = str(size) if sides is None else f"{size} in buckets"
        with accelerator.main_process_first():  # whose hashes of the files the others then find in the cache
            cached.contents.append(part.fingerprint(FileHashes(folder)))
        place = folder / f"latents-{digest(cached.contents[-1], transform, encoding, FORMAT)}"
        shards = [_shard(place, of_part, s, sides is not None) for s in range(-(-len(part) // SHARD))]
        parts.append((part, begin, shards))
        jobs += [(part, of_part, s, file) for s, file in enumerate(shards)]
        begin += len(part)
    missing = [job for job in jobs if not job[3].is_file()]
    if missing:
        _check_disk(missing, len(jobs), vae, folder, accelerator)
    # Shares of all shards, not of the missing ones: those are fewer for a process that looks when others have begun.
    for part, of_part, s, file in jobs[accelerator.process_index :: accelerator.num_processes]:
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            _encode_shard(part, vae, of_part, file, s, workers, accelerator)
    accelerator.wait_for_everyone()
    for number, (part, begin, shards) in enumerate(parts):
        unusable = [one for file in shards for one in cached.add(file, number, begin)]
        refuse_unusable(unusable, len(part), accelerator.print)
    if not cached.captions:
        raise ValueError("no picture is left to train on")
    return cached


def _check_disk(missing: list, jobs: int, vae: Autoencoder | Identity, folder: Path, accelerator: Accelerator) -> None:
    """Says how much the shards that are missing will take, and refuses what the disk has no room for."""
    pixels = 0
    for _, sides, shard, _ in missing:
        for side in sides[shard * SHARD : (shard + 1) * SHARD]:
            pixels += side * side if isinstance(side, int) else side[0] * side[1]
    needed = pixels // vae.downscale**2 * vae.latent_channels * 4 / 1e6  # mean and log-variance, two bytes each
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / 1e6
    accelerator.print(
        f"latent cache in {folder}: {len(missing)} of {jobs} shards to compute, {needed:,.0f} MB to write "
        f"({free:,.0f} MB are free)"
    )
    if needed > free:
        raise ValueError(
            f"the latent cache needs {needed:,.0f} MB, and the disk of {folder} has {free:,.0f} MB free: name another "
            "place with --cache, or make room"
        )


@torch.no_grad()
def _encode_shard(
    source: Source,
    vae: Autoencoder | Identity,
    sides: list[Side],
    file: Path,
    shard: int,
    workers: int,
    accelerator: Accelerator,
) -> None:
    indices = range(shard * SHARD, min((shard + 1) * SHARD, len(source)))
    moments: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    pictures, unusable = [], []
    name = f"encoding shard {shard}" if accelerator.is_local_main_process else None
    for batch in read(source, sides, indices, batch=32, workers=workers, progress=name):
        unusable += [(one.key, one.error) for one in batch if one.error]
        usable = [one for one in batch if one.pixels is not None and not one.error]
        shapes = [shape_name(one.pixels.shape, vae.downscale) for one in usable]  # type: ignore[union-attr]
        pictures += [(u.captions, u.framing, u.number, shape) for u, shape in zip(usable, shapes, strict=True)]
        for shape in dict.fromkeys(shapes):
            alike = [one.pixels for one, its in zip(usable, shapes, strict=True) if its == shape]
            pixels = torch.stack([torch.from_numpy(p.copy()) for p in alike if p is not None])
            posterior = vae.encode(to_unit(sent(pixels, accelerator.device)))
            means, logvars = moments.setdefault(shape, ([], []))
            means.append(posterior.mean.half())  # which a GPU is not waited for
            logvars.append(posterior.logvar.clamp(min=-30).half())
    said = json.dumps({"shapes": list(moments), "pictures": pictures, "unusable": unusable})
    tensors: dict[str, Tensor] = {}
    for shape, (means, logvars) in moments.items():
        tensors |= {f"mean {shape}": torch.cat(means).cpu(), f"logvar {shape}": torch.cat(logvars).cpu()}
    save_whole(tensors, file, {"pictures": said})


def shape_name(pixels: tuple[int, ...], downscale: int) -> str:
    """Height×width of the latents of a picture [H, W, 3], which names their tensors in a shard."""
    return f"{pixels[0] // downscale}x{pixels[1] // downscale}"


def _shard(place: Path, sides: list[Side], shard: int, in_buckets: bool) -> Path:
    """A shard's file; of buckets, which may change with the other pictures of a set, one for each way to divide it."""
    ways = f"-{digest(repr(sides[shard * SHARD : (shard + 1) * SHARD]))}" if in_buckets else ""
    return place / f"{shard:06d}{ways}.safetensors"


def encoding_digest(vae: Autoencoder | Identity) -> str:
    """What latents hang on: a hash of the weights that encode and their configuration, or the number of channels."""
    if isinstance(vae, Identity):
        return f"{vae.latent_channels} channels"
    config = replace(vae.config, sample_size=0, force_upcast=True)  # notes, which change nothing
    return weights_digest(vae, config, but=DECODING)


def weights_digest(network: nn.Module, config: object = None, but: tuple[str, ...] = ()) -> str:
    """A hash of a network's weights and configuration: its own, where none is given.

    but: how the names of weights begin that don't count.
    """
    digest = hashlib.sha256(repr(getattr(network, "config", "") if config is None else config).encode())
    for name, weight in sorted(network.state_dict().items()):
        if name.startswith(but):
            continue
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
