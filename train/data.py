"""Pictures on their way into training: read by several processes, decoded once, in an order that is a pure function."""

import bisect
import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pipelines.image import UNREADABLE
from train.aside import remove_dead, written_aside
from train.hashes import FileHashes
from train.pictures import (
    MAX_UNUSABLE,
    FailingDisk,
    Source,
    digest,
    refuse_failing_disk,
    refuse_numbers,
)

Side = int | tuple[int, int]  # of a square, or (width, height), in pixels


def fit(image: Image.Image, size: Side) -> np.ndarray:
    """The middle of a picture in the ratio of `size`, resized to it: uint8 [height, width, 3]."""
    sides = (size, size) if isinstance(size, int) else size
    if image.size != sides:
        image = ImageOps.fit(image, sides, Image.Resampling.LANCZOS)
    return np.asarray(image, dtype=np.uint8)


def framing(width: int, height: int, size: Side) -> tuple[int, int, int, int, int, int]:
    """What SDXL is told of a picture that `fit` brought to `size`: original height and width, top and left of the crop
    in the resized picture, target height and width (Podell et al., 2023, sections 2.2 and 2.3), in pixels."""
    w, h = (size, size) if isinstance(size, int) else size
    scale = max(w / width, h / height)
    return height, width, round((height * scale - h) / 2), round((width * scale - w) / 2), h, w


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1


class Loaded(NamedTuple):
    pixels: np.ndarray | None  # uint8 [height, width, 3]; None when the picture is broken
    captions: tuple[str, ...]
    key: str
    error: str
    number: int  # its index in the source
    framing: tuple[int, ...]  # as the function of that name has it; () when the picture is broken


def load(source: Source, size: Side, index: int) -> Loaded:
    """One picture, or what is wrong with it."""
    try:
        image, captions, key = source[index]
        pixels = fit(image, size)
    except UNREADABLE as error:
        refuse_failing_disk(error, f"picture {index}")
        return Loaded(None, (), f"picture {index}", str(error), index, ())
    return Loaded(pixels, captions, key, "" if captions else "no caption", index, framing(*image.size, size))


class _Reading(Dataset):
    def __init__(self, source: Source, size: Side | list[Side], indices: Sequence[int]):
        self.source, self.size, self.indices = source, size, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Loaded:
        index = self.indices[position]
        return load(self.source, self.size[index] if isinstance(self.size, list) else self.size, index)


def read(
    source: Source, size: Side | list[Side], indices: Sequence[int], *, batch: int, workers: int, progress: str | None
) -> Iterator[list[Loaded]]:
    """Lists of `batch` loaded pictures in the order of `indices`, read by `workers` processes.

    size: that of all pictures, or a list with that of each picture of the source.
    """
    loader: DataLoader = DataLoader(
        _Reading(source, size, indices), batch_size=batch, num_workers=workers, collate_fn=list
    )
    bar = tqdm(total=len(indices), desc=progress, unit="pictures", disable=progress is None)
    with bar, failures_named():
        for loaded in loader:
            bar.update(len(loaded))
            yield loaded


@contextlib.contextmanager
def failures_named() -> Iterator[None]:
    """ValueError where the disk fails, or a process that reads pictures dies."""
    try:
        yield
    except FailingDisk as error:
        of_worker = f"{FailingDisk.__name__}: "  # before the message, where it comes with another process's traceback
        raise ValueError(str(error).rstrip().rpartition(of_worker)[2]) from None
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):  # what is raised in one comes as it is
            raise
        raise ValueError(
            f"a process that reads pictures died ({error}), often for want of memory: lower --workers, and start again "
            "with the same command, which goes on where this one was"
        ) from None


def refuse_unusable(unusable: Sequence[tuple[str, str]], total: int, say: Callable[[str], None] = print) -> None:
    """Names the pictures of a part of --data that cannot be used; ValueError when they are too many."""
    for key, error in unusable[:10]:
        say(f"left out {key}: {error}")
    if len(unusable) > 10:
        say(f"… and {len(unusable) - 10} more pictures left out")
    if unusable:
        refuse_share(len(unusable), total, *unusable[0])


def refuse_share(unusable: int, total: int, key: str, error: str) -> None:
    """ValueError when the pictures that cannot be used, such as `key`, are more than `MAX_UNUSABLE` of all."""
    if unusable > MAX_UNUSABLE * total:
        raise ValueError(
            f"{unusable} of {total} pictures cannot be used (at most {MAX_UNUSABLE:.0%} may be), "
            f"for instance {key}: {error}"
        )


class Pictures(NamedTuple):
    """A whole set, decoded: what the autoencoder and CLIP train on."""

    pixels: torch.Tensor  # uint8 [N, size, size, 3], mapped from the disk
    captions: list[tuple[str, ...]]
    keys: list[str]
    contents: str = ""  # fingerprint of the source


def read_pictures(source: Source, size: int, cache: Path, *, workers: int = 2, progress: bool = True) -> Pictures:
    """Decodes a source once and maps it from `cache` ever after; keyed by content and size."""
    refuse_numbers(source)
    contents = source.fingerprint(FileHashes(cache))
    stem = cache / f"pixels-{digest(contents, str(size))}"
    pixel_file, caption_file = stem.with_suffix(".npy"), stem.with_suffix(".json")
    remove_dead(cache)
    if not caption_file.exists():  # written last: its presence says that the pixels are whole
        cache.mkdir(parents=True, exist_ok=True)
        captions: list[tuple[str, ...]] = []
        keys: list[str] = []
        ends = getattr(source, "ends", [len(source)])  # of the parts that "+" joins
        unusable: list[list[tuple[str, str]]] = [[] for _ in ends]
        name = "reading pictures" if progress else None
        shape = (len(source), size, size, 3)
        needed, free = math.prod(shape) / 1e6, shutil.disk_usage(cache).free / 1e6
        if needed > free:
            raise ValueError(
                f"the decoded pictures need {needed:,.0f} MB, and the disk of {cache} has {free:,.0f} MB free: name "
                "another place with --cache, or make room"
            )
        # Written, not mapped: a mapped file that the disk has no room for ends the program without a word.
        with written_aside(pixel_file) as partial, open(partial, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            begin = file.tell()
            for batch in read(source, size, range(len(source)), batch=64, workers=workers, progress=name):
                for loaded in batch:
                    if loaded.pixels is None or loaded.error:
                        unusable[bisect.bisect_right(ends, loaded.number)].append((loaded.key, loaded.error))
                        continue
                    file.write(loaded.pixels.tobytes())
                    captions.append(loaded.captions)
                    keys.append(loaded.key)
            for some, (begins, end) in zip(unusable, pairwise([0, *ends]), strict=True):
                refuse_unusable(some, end - begins)
            file.truncate(begin + math.prod(shape))  # as the header says: those left out are zeros, at the end
        with written_aside(caption_file) as partial:
            partial.write_text(json.dumps({"captions": captions, "keys": keys}))
    said = json.loads(caption_file.read_text())
    # Copy-on-write, so that torch gets memory that it may call writable.
    mapped = torch.from_numpy(np.load(pixel_file, mmap_mode="c"))[: len(said["keys"])]
    return Pictures(mapped, [tuple(c) for c in said["captions"]], said["keys"], contents)


@lru_cache(maxsize=2)
def permutation(count: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of the pictures in an epoch: a pure function of (seed, epoch). [count] int64."""
    return torch.randperm(count, generator=generator(seed, epoch))


def batch_indices(count: int, seed: int, start: int, size: int) -> torch.Tensor:
    """Which pictures the global positions start … start + size - 1 of a run hold, epoch after epoch. [size] int64."""
    positions = torch.arange(start, start + size)
    epochs = positions // count
    orders = {int(e): permutation(count, seed, int(e)) for e in epochs.unique()}
    return torch.stack([orders[int(e)][p] for e, p in zip(epochs, positions % count, strict=True)])


class Chances(NamedTuple):
    """The random draws of one step but for its pictures: functions of (seed, update, position in the global batch)."""

    chance: torch.Tensor  # [B, 2], uniform
    u: torch.Tensor  # [B], uniform over the global batch, stratified: each position has its share of the noise levels
    normal: torch.Tensor  # [2, B, *shape], standard normal


def chances(
    seed: int, update: int, first: int, size: int, global_batch: int, shape: Sequence[int], *, mixed: bool = False
) -> Chances:
    """Positions first … first + size - 1 of an update's global batch, for pictures (latents) of this shape.

    mixed: each position has another share of the noise levels in each update, for batches whose positions always hold
    pictures of the same file.
    """
    uniform, normals = [], []
    for position in range(first, first + size):
        draw = generator(seed, update, position)
        uniform.append(torch.rand(3, generator=draw))
        normals.append(torch.randn(2, *shape, generator=draw))
    chance = torch.stack(uniform)
    shares = torch.arange(global_batch)
    if mixed:
        shares = torch.randperm(global_batch, generator=generator(seed, update, "shares"))
    u = (shares[first : first + size] + chance[:, 2]) / global_batch
    return Chances(chance[:, :2], u, torch.stack(normals, dim=1))


class Draws(NamedTuple):
    """Every random draw of one step: pure functions of (seed, update, position in the global batch)."""

    indices: torch.Tensor  # [B] int64, which pictures
    chance: torch.Tensor  # [B, 2], uniform
    u: torch.Tensor  # [B], as of `Chances`
    normal: torch.Tensor  # [2, B, *shape], standard normal


def draws(seed: int, update: int, first: int, size: int, global_batch: int, count: int, shape: Sequence[int]) -> Draws:
    """Positions first … first + size - 1 of an update's global batch, of a set of `count` pictures."""
    indices = batch_indices(count, seed, update * global_batch + first, size)
    return Draws(indices, *chances(seed, update, first, size, global_batch, shape))


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor, copied to the device; to a GPU while that computes, and without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def generator(*numbers: float | str) -> torch.Generator:
    """A CPU generator that is a pure function of what it is given, such as (seed, update, position in the batch)."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
