"""The feed of sets that are read as streams: decoded ahead of the training, encoded when their turn comes."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.cache import Latents
from train.data import fit, framing, sent, to_unit
from train.shards import Shards
from train.streams import STREAMS, Block, Cursor, Stream, Unusable, first_held_out
from train.taken import VALIDATION, Taken
from vae.autoencoder import Autoencoder, Identity, Posterior

OPENERS = 8  # streams that are read at once, which matters where each has to wait for a network


def stream_count(shards: Shards, positions: int) -> int:
    """Into how many streams the files of a set are dealt, that has so many positions of a global batch."""
    return min(len(shards.files), STREAMS, positions)


class Call(NamedTuple):
    """The arguments of `take`."""

    update: int
    first: int
    size: int
    global_batch: int


class Decoded(NamedTuple):
    """What was read for a call."""

    pixels: np.ndarray  # [B, size, size, 3] uint8
    captions: list[tuple[str, ...]]
    sizes: list[tuple[int, ...]]
    parts: list[int]
    cursors: dict[str, Cursor]  # of each stream that was read: where the block begins that it came to


class StreamFeed:
    """Pictures of sets that are read as they come, each set a share of every global batch."""

    count: int | None = None

    def __init__(
        self,
        sets: list[Shards],
        shares: list[float],
        vae: Autoencoder | Identity,
        size: int,
        seed: int,
        device: torch.device,
        *,
        workers: int = 2,
        pixels: bool = False,
        gather: Callable[[list], list] = list,
    ):
        """shares: of the positions of a batch, in any unit. workers: threads that decode. pixels: `Taken.pixels` are
        wanted, too. gather: lists of all processes, joined. Raises ValueError where a set has nothing to train on."""
        self.sets, self.shares, self.vae, self.size, self.seed, self.device = sets, shares, vae, size, seed, device
        self.with_pixels, self.gather = pixels, gather
        side = size // vae.downscale
        self.shapes: list[tuple[int, ...]] = [(vae.latent_channels, side, side)]
        self.unusable = [Unusable() for _ in sets]
        self.held: list[set[tuple[int, ...]]] = []
        self.seen = self._seen(VALIDATION // len(sets))
        self.captions = self.seen.captions
        self.streams: dict[str, Stream] = {}
        self.begins: dict[str, Cursor] = {}  # where streams stood when the run was stopped
        self.served: dict[str, Cursor] = {}
        self.global_batch = 0
        self.decoders = ThreadPoolExecutor(max(1, workers))
        self.openers = ThreadPoolExecutor(OPENERS)
        self.ahead = ThreadPoolExecutor(1)  # one: streams are read in the order of the calls
        self.last: Decoded
        self.prepared: tuple[Call, Future[Decoded]] | None = None
        self.calls: deque[Call] = deque(maxlen=2)
        self.steps: dict[tuple[int, int], tuple[int, int, int]] = {}  # (first, size) -> (updates on, first, size)

    def take(self, update: int, first: int, size: int, global_batch: int) -> Taken:
        """As `train.taken.Feed` has it. Raises ValueError where the calls go back: a stream only goes on."""
        call = Call(update, first, size, global_batch)
        again = bool(self.calls) and call == self.calls[-1]  # of a rehearsal, for instance
        if self.calls and call[:2] <= self.calls[-1][:2] and not again:
            raise ValueError(
                f"update {update}, position {first} asked of a stream after update {self.calls[-1].update}, position "
                f"{self.calls[-1].first}: it only goes on. Open it anew to begin from the beginning"
            )
        if self.global_batch not in (0, global_batch):
            raise ValueError(
                f"a global batch of {global_batch} asked of a stream that was cut for {self.global_batch}, on which "
                "depends what an update sees: keep batch size × processes × accumulation, or start a new run"
            )
        self.global_batch = global_batch
        if not again:
            self.last = self._prepared(call)
            self._prepare_next(call)
        decoded = self.last
        self.served |= decoded.cursors
        posterior, images = self._encode(decoded.pixels)
        return Taken(
            posterior.mean.float(),
            posterior.logvar.clamp(min=-30).float(),
            decoded.captions,
            torch.tensor(decoded.sizes),
            torch.tensor(decoded.parts),
            images if self.with_pixels else None,
        )

    @torch.no_grad()
    def _encode(self, pixels: np.ndarray) -> tuple[Posterior, Tensor]:
        images = to_unit(sent(torch.from_numpy(pixels.copy()), self.device))
        return self.vae.encode(images), images

    def _seen(self, number: int) -> Latents:
        """The held-out pictures of each set: `number` rows of its first ones, whose places are noted in `held`."""
        means, logvars, captions = [], [], []
        for shards in self.sets:
            rows, places = first_held_out(shards, number)
            self.held.append(places)
            for row in rows[:number]:
                with contextlib.suppress(ValueError):  # its header could be read, but not all of it
                    posterior, _ = self._encode(fit(row.example().image, self.size)[None])
                    means.append(posterior.mean.half().cpu())
                    logvars.append(posterior.logvar.clamp(min=-30).half().cpu())
                    captions.append(row.captions)
        if not captions:
            raise ValueError(f"none of the first pictures of {self.sets[0].name} can be read")
        return Latents(torch.cat(means), torch.cat(logvars), captions)

    def validation(self, number: int = VALIDATION) -> Latents:
        """Some of the first pictures of each set, held out."""
        return self.seen.select(torch.arange(min(number, len(self.captions))))

    def rehearsing(self) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()  # all batches have one shape

    def state(self) -> dict[str, Any]:
        """Where the streams stand, of all processes; a collective call: every process has to make it."""
        served: dict[str, list] = {}
        for name, cursor in self.gather([(name, list(cursor)) for name, cursor in self.served.items()]):
            served[name] = min(cursor, served.get(name, cursor))  # where several read a stream, the hindmost counts
        streams = {name: list(cursor) for name, cursor in self.begins.items()} | served
        return {
            "global_batch": self.global_batch,
            "sets": [shards.fingerprint() for shards in self.sets],
            "streams": streams,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from there. Streams that it says nothing of are read from their beginning, which takes its time.

        Raises ValueError where the sets are others."""
        if state["sets"] != [shards.fingerprint() for shards in self.sets]:
            raise ValueError(
                "--data names other streams than those of the checkpoint: give the same, or another --output"
            )
        if self.prepared:
            self.prepared[1].cancel()
            wait([self.prepared[1]])  # or it would go on reading
        self.global_batch = state["global_batch"]
        self.begins = {name: Cursor(*cursor) for name, cursor in state["streams"].items()}
        self.served, self.streams, self.prepared = {}, {}, None
        self.calls.clear()

    # Reading

    def _prepared(self, call: Call) -> Decoded:
        if self.prepared:
            expected, future = self.prepared
            self.prepared = None
            if expected == call:
                return future.result()
            raise ValueError(
                f"a stream was read ahead for {expected}, and then asked for {call}: keep the order of the calls"
            )
        return self._decode(call)

    def _prepare_next(self, call: Call) -> None:
        """Once calls have come a whole update long, the next one is known, and is read while this one trains."""
        if self.calls:
            last = self.calls[-1]
            self.steps[last[1:3]] = (call.update - last.update, call.first, call.size)
        self.calls.append(call)
        if step := self.steps.get(call[1:3]):
            following = Call(call.update + step[0], step[1], step[2], call.global_batch)
            self.prepared = (following, self.ahead.submit(self._decode, following))

    def _decode(self, call: Call) -> Decoded:
        where = [self._where(call, position) for position in range(call.first, call.first + call.size)]
        items: dict[str, list[int]] = {}  # of each stream, in order; streams stand in the order of the positions
        for part, name, item in where:
            self._stream(part, name, call.global_batch)
            items.setdefault(name, []).append(item)
        blocks = dict(zip(items, self.openers.map(self._blocks, items, items.values()), strict=True))
        jobs = [(self.unusable[int(name.partition(".")[0])], *job) for name in items for job in blocks[name]]
        pixels, captions, sizes = zip(*self.decoders.map(self._picture, jobs), strict=True)
        cursors = {name: some[-1][0].cursor for name, some in blocks.items()}
        return Decoded(np.stack(pixels), list(captions), list(sizes), [part for part, _, _ in where], cursors)

    def _blocks(self, name: str, items: list[int]) -> list[tuple[Block, int]]:
        """The block of each row, and its number in the stream."""
        return [(self.streams[name].block_of(item), item) for item in items]

    def _picture(self, job: tuple[Unusable, Block, int]) -> tuple[np.ndarray, tuple[str, ...], tuple[int, ...]]:
        """The row of this number; where it is broken, the next one of its block that is not."""
        unusable, (rows, cursor), item = job
        place = item - cursor.item
        for offset in range(len(rows)):
            row = rows[(place + offset) % len(rows)]
            try:
                example = row.example()
            except ValueError as error:
                if not offset:
                    unusable.count(row.key, str(error).removeprefix(f"{row.key}: "))
                continue
            width, height = example.image.size
            return fit(example.image, self.size), example.captions, framing(width, height, self.size)
        raise ValueError(f"not one of {len(rows)} pictures can be read, for instance {rows[place].key}")

    def _where(self, call: Call, position: int) -> tuple[int, str, int]:
        """(part, stream, number of the row in it) of a position of a global batch."""
        part = 0
        counts = self._counts(call.global_batch)
        while position >= counts[part]:
            position -= counts[part]
            part += 1
        n = counts[part]
        streams = stream_count(self.sets[part], n)
        stream = position * streams // n
        begin, end = -(-stream * n // streams), -(-(stream + 1) * n // streams)
        return part, f"{part}.{stream}", call.update * (end - begin) + position - begin

    def uneven(self, global_batch: int) -> Iterator[str]:
        """Of each set some of whose files are read faster than others, a sentence that says so."""
        for shards, n in zip(self.sets, self._counts(global_batch), strict=True):
            files, streams = len(shards.files), stream_count(shards, n)
            shares = [-(-(s + 1) * n // streams) + (-s * n // streams) for s in range(streams)]  # of a batch
            rates = [share / len(range(s, files, streams)) for s, share in enumerate(shares)]
            if max(rates) > 1.25 * min(rates):
                yield (
                    f"{shards.name}: with {n} of its pictures in an update, those of some of its {files} files come "
                    f"{max(rates) / min(rates):.2g} times as often as others; all come equally often where the number "
                    f"of files divides that of pictures, or both are multiples of {STREAMS}"
                )

    def _counts(self, global_batch: int) -> list[int]:
        """How many positions of a global batch each set has: its share, rounded by the largest remainders."""
        exact = [global_batch * share / sum(self.shares) for share in self.shares]
        counts = [int(one) for one in exact]
        rest = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
        for i in rest[: global_batch - sum(counts)]:
            counts[i] += 1
        if 0 in counts:
            raise ValueError(
                f"--data: a global batch of {global_batch} has no position for {self.sets[counts.index(0)].name}: its "
                "share is too small. Raise the batch size, or its number"
            )
        return counts

    def _stream(self, part: int, name: str, global_batch: int) -> Stream:
        if name not in self.streams:
            shards = self.sets[part]
            streams = stream_count(shards, self._counts(global_batch)[part])
            number = int(name.partition(".")[2])
            self.streams[name] = Stream(shards, number, streams, self.seed, self.held[part], self.unusable[part])
            if name in self.begins:
                self.streams[name].start(self.begins[name])
        return self.streams[name]
