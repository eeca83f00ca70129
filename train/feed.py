"""What the training loop is fed with: the pictures of an update, whether their latents are cached or streamed.

`open_feed` is the way in. Whatever the source, what positions first … first + size - 1 of an update's global batch hold
is a function of (seed, update, position, global batch): one process or several see the same.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from train.aside import remove_dead
from train.buckets import assign, picture_sizes
from train.cache import Cached, Latents, open_cache
from train.data import load, permutation, sent, to_unit
from train.hashes import FileHashes
from train.order import Order
from train.pictures import digest
from train.shards import open_shards
from train.sources import Source, describe, describe_row, is_remote, open_source, parts_of, split_parts
from train.streamed import StreamFeed
from train.streams import first_rows
from train.taken import VALIDATION, Feed, Taken
from vae.autoencoder import Autoencoder, Identity

AHEAD = 4  # batches of pictures that are decoded before they are asked for


class CachedFeed:
    """Pictures whose latents are on the disk."""

    def __init__(
        self,
        cached: Cached,
        source: Source,
        seed: int,
        device: torch.device,
        *,
        pixels: bool = False,
        workers: int = 2,
        say: Callable[[str], None] = print,
    ):
        """seed: of the order of the pictures, and of which are held out. pixels: the pictures too, decoded as they come
        by `workers` threads."""
        self.cached, self.source, self.device, self.captions = cached, source, device, cached.captions
        self.readers = ThreadPoolExecutor(max(1, workers)) if pixels else None
        self.reading: dict[tuple[int, ...], list[Future[Tensor]]] = {}  # the arguments of `take` -> pixels
        self.framing, self.parts, self.index = cached.framing, cached.parts, cached.index
        shapes, number = cached.shapes()
        count = len(number)
        order = permutation(count, seed, -1)
        common = int(number.bincount().argmax())  # pictures of the validation loss have one shape
        alike = order[number[order] == common]
        held = min(VALIDATION, count // 20, len(alike) // 2) if count >= 100 else 0
        self.held = alike[:held] if held else alike
        trained = torch.ones(count, dtype=torch.bool)
        trained[alike[:held]] = False
        order = order[trained[order]]
        weights = torch.tensor([repeats for _, repeats in parts_of(source)], dtype=torch.float64)[self.parts]
        groups = [order[number[order] == n] for n in range(len(shapes))]
        self.contents = digest(cached.fingerprint(), repr([repeats for _, repeats in parts_of(source)]))
        self.shapes = [shape for shape, group in zip(shapes, groups, strict=True) if len(group)]
        self.order = Order([group for group in groups if len(group)], weights, seed)
        self.rehearses = False
        self.count: int | None = round(float(weights[order].sum()))
        say(
            f"{count - held} pictures to train on, {held} held out for the validation loss"
            + ("" if held else " (too few to hold any out: it is measured on the training pictures)")
        )

    def take(self, update: int, first: int, size: int, global_batch: int) -> Taken:
        if self.rehearses:
            largest = self.order.groups[0].members
            chosen = largest[torch.arange(first, first + size) % len(largest)]
        else:
            _, chosen = self.order(update, first, size, global_batch)
        posterior = self.cached.posterior(chosen, self.device)
        captions = [self.captions[i] for i in chosen.tolist()]
        pixels = None
        if self.readers:
            reading = self._read_ahead(chosen, (update, first, size, global_batch))
            pixels = to_unit(sent(torch.stack([one.result() for one in reading]), self.device))
        return Taken(posterior.mean, posterior.logvar, captions, self.framing[chosen], self.parts[chosen], pixels)

    def _read_ahead(self, chosen: Tensor, call: tuple[int, int, int, int]) -> list[Future[Tensor]]:
        """`_read` of what this call chose; what the same call of the next update will choose is begun, too."""
        if self.rehearses:  # which has chosen otherwise
            return self._read(chosen)
        update, first, size, global_batch = call
        reading = self.reading.pop(call, None) or self._read(chosen)
        # These positions of the next update will be asked for soon; at once, unless updates have several steps.
        self.reading = {other: pixels for other, pixels in self.reading.items() if other[0] >= update}
        following = (update + 1, first, size, global_batch)
        if len(self.reading) < AHEAD and following not in self.reading:
            self.reading[following] = self._read(self.order(*following)[1])
        return reading

    def _read(self, chosen: Tensor) -> list[Future[Tensor]]:
        """The pixels of pictures, uint8 [height, width, 3], while other work goes on."""

        def one(i: int) -> Tensor:
            height, width = self.framing[i, 4:].tolist()
            loaded = load(self.source, (width, height), int(self.index[i]))
            if loaded.pixels is None:
                raise ValueError(
                    f"{loaded.key} could be read when its latent was cached, and now cannot: {loaded.error}"
                )
            return torch.from_numpy(loaded.pixels.copy())

        assert self.readers
        return [self.readers.submit(one, i) for i in chosen.tolist()]

    def validation(self, number: int = VALIDATION) -> Latents:
        return self.cached.select(self.held[:number])

    @contextlib.contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Inside, every batch has the largest shape."""
        self.rehearses = True
        try:
            yield
        finally:
            self.rehearses = False

    def state(self) -> dict[str, Any]:
        return {"pictures": len(self.captions), "contents": self.contents}

    def load(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the pictures are others, with which the run would go on in another order."""
        if state and state != self.state():  # checkpoints had none at first
            raise ValueError(
                f"--data is not what this run was trained on: {state['pictures']} pictures then, {len(self.captions)} "
                "now, or others, or other captions. Put back what was changed, and type the same command again; or "
                "begin a new run with another --output, from this one's weights if --model names its folder"
            )


def bucketed(
    source: Source, size: int, multiple: int, global_batch: int, cache: Path, accelerator: Accelerator
) -> list[tuple[int, int]]:
    """(width, height) of each picture's bucket; the histogram is printed."""
    with accelerator.main_process_first():  # which writes down what the others then find in the cache
        sizes = picture_sizes(source, cache, FileHashes(cache), progress=accelerator.is_local_main_process)
    repeats = [number for part, number in parts_of(source) for _ in range(len(part))]
    assigned = assign(sizes, size, multiple, repeats=repeats, global_batch=global_batch)
    accelerator.print(assigned.report)
    return assigned.sides


def open_feed(
    data: str,
    vae: Autoencoder | Identity,
    size: int,
    *,
    seed: int,
    global_batch: int,
    cache: Path,
    accelerator: Accelerator,
    workers: int = 2,
    streaming: bool = False,
    buckets: bool = False,
    multiple: int = 0,
    template: str = "",
    pixels: bool = False,
    font: str | None = None,
    views: int = 1,
    captions: bool = True,
) -> Feed:
    """Opens what `--data` names, prints what is there, and computes the latents that are not yet cached.

    vae: on the accelerator's device. size: side in pixels. streaming: parquet files, tars and sets of the hub are read
    as streams, as remote paths always are; a number before a part is then its share of the pictures.
    buckets: aspect-ratio buckets of about size² pixels, whose sides are multiples of `multiple` pixels (the
    autoencoder's factor times the U-Net's; 0: the autoencoder's alone); those with fewer pictures than `global_batch`
    are merged. template: makes the captions (`train.captions.Template`); captions: False for those who read none.
    pixels: `Taken.pixels` are wanted, too.

    Raises ValueError for data that cannot be used (`train.sources.open_source`, `train.cache.open_cache`).
    """
    if accelerator.is_local_main_process:
        remove_dead(cache, *cache.glob("latents-*"), *cache.glob("texts-*"))
    parts = split_parts(data)
    if streaming or any(is_remote(name) for _, name in parts):
        if buckets:
            raise ValueError(
                "--buckets needs the sizes of all pictures beforehand, which a stream has not: copy the data here and "
                "leave out --streaming, or leave out --buckets"
            )
        streams = _open_streams(
            parts,
            vae,
            size,
            seed=seed,
            accelerator=accelerator,
            workers=workers,
            template=template,
            pixels=pixels,
            captions=captions,
        )
        for said in streams.uneven(global_batch):
            accelerator.print(said)
        return streams
    source = open_source(data, size, font=font, views=views, template=template, captions=captions)
    if accelerator.is_main_process:
        print(describe(source, None if buckets else size))
    sides = None
    if buckets:
        sides = bucketed(source, size, multiple or vae.downscale, global_batch, cache, accelerator)
    cached = open_cache(source, vae, size, cache, accelerator, workers, sides)
    return CachedFeed(cached, source, seed, accelerator.device, pixels=pixels, workers=workers, say=accelerator.print)


def _open_streams(
    parts: list[tuple[float, str]],
    vae: Autoencoder | Identity,
    size: int,
    *,
    seed: int,
    accelerator: Accelerator,
    workers: int,
    template: str,
    pixels: bool,
    captions: bool,
) -> StreamFeed:
    sets = [open_shards(name, template, captions=captions) for _, name in parts]
    for shards in sets if accelerator.is_main_process else []:
        print(f"{shards.name}: captions: {shards.origin}")
        for first in itertools.islice(first_rows(shards), 3):
            with contextlib.suppress(ValueError):  # a broken row is named and counted when its turn comes
                print(describe_row(first.row.example(), size))
    shares = [number for number, _ in parts]
    device = accelerator.device
    feed = StreamFeed(sets, shares, vae, size, seed, device, workers=workers, pixels=pixels, gather=gather_object)
    held = sum(map(len, feed.held))
    accelerator.print(
        f"{held} pictures held out for the validation loss"
        if held
        else "too few pictures to hold any out: the validation loss is measured on training pictures"
    )
    return feed
