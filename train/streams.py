"""Feeding training from streams: of a set that may be larger than any disk, in constant memory.

A set is cut into V streams, file f belonging to stream f modulo V. Of the positions of a global batch each stream
serves a share that is always the same, and consecutive ones, in order. So what an update sees depends on (seed, files,
global batch) and not on the number of processes: each process reads the streams that its positions need, and decodes
its own pictures.

A stream's files come in an order that is a function of (seed, stream, epoch). Their rows are read in blocks of at most
1000, still undecoded, and each block is permuted. Where a block begins is enough to go on from it: nothing before it is
read again.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from train.data import generator, refuse_share
from train.pictures import Stored
from train.shards import Place, Shards

BLOCK_ROWS = 1000
BLOCK_BYTES = 512 * 2**20  # of the blocks of all streams of a set together
STREAMS = 64  # at most, of one set
JUDGED = 1000  # rows after which the share of unusable ones counts


class Cursor(NamedTuple):
    """Where a block begins."""

    item: int  # the number of its first row among all that the stream has given
    epoch: int
    file: int  # how many of the epoch's files are done
    place: Place  # in the file


@dataclass
class Unusable:
    """The running count of what cannot be used of a set; past a share it is too much."""

    rows: int = 0
    unusable: int = 0
    named: set[str] = field(default_factory=set)

    def count(self, key: str, error: str) -> None:
        """Names an unusable row. Raises ValueError past a share of all rows (`judge`), from the first 1000 on."""
        self.unusable += 1
        if len(self.named) <= 10 and key not in self.named:
            self.named.add(key)
            more = "… more rows are left out; they are counted"
            print(f"left out {key}: {error}" if len(self.named) <= 10 else more)
        if self.rows >= JUDGED:
            refuse_share(self.unusable, self.rows, key, error)


class Block(NamedTuple):
    rows: list[Stored]  # in the order in which they are given
    cursor: Cursor


class Stream:
    """One of a set's streams: an endless sequence of rows, each at its number."""

    def __init__(
        self, shards: Shards, number: int, streams: int, seed: int, held: set[tuple[int, ...]], unusable: Unusable
    ):
        """held: (file, *place) of rows that are left out."""
        self.shards, self.number, self.seed, self.held, self.unusable = shards, number, seed, held, unusable
        self.files = range(number, len(shards.files), streams)
        self.bytes = BLOCK_BYTES // streams
        self.blocks: Iterator[Block] | None = None
        self.block: Block | None = None

    def start(self, cursor: Cursor) -> None:
        """Begins at a block's beginning."""
        self.blocks, self.block = self._blocks(cursor), None

    def block_of(self, item: int) -> Block:
        """The block that holds row number `item`, which must not lie before the one last asked for."""
        if self.blocks is None:
            self.start(Cursor(0, 0, 0, []))
        assert self.blocks
        while self.block is None or item >= self.block.cursor.item + len(self.block.rows):
            self.block = next(self.blocks)
        assert item >= self.block.cursor.item
        return self.block

    def _blocks(self, cursor: Cursor) -> Iterator[Block]:
        rows: list[Stored] = []
        size, begin, nothing_since = 0, cursor, cursor.epoch
        for row, epoch, file, place in self._rows(cursor):
            full = len(rows) >= BLOCK_ROWS or size >= self.bytes or epoch != begin.epoch
            if rows and full:
                yield self._shuffled(rows, begin)
                begin, rows, size = Cursor(begin.item + len(rows), epoch, file, place), [], 0
            elif not rows:
                begin = Cursor(begin.item, epoch, file, place)
            if row is None:  # the end of an epoch
                if nothing_since < epoch - 1:
                    raise ValueError(f"{self.shards.name}: no row of stream {self.number} can be used")
                continue
            nothing_since = epoch
            rows.append(row)
            size += len(row.picture or b"")

    def _shuffled(self, rows: list[Stored], begin: Cursor) -> Block:
        order = torch.randperm(len(rows), generator=generator(self.seed, self.number, begin.item, 2))
        return Block([rows[i] for i in order.tolist()], begin)

    def _rows(self, cursor: Cursor) -> Iterator[tuple[Stored | None, int, int, Place]]:
        """Usable rows from a cursor on, with epoch, file and place; None where an epoch begins."""
        epoch, first, place = cursor.epoch, cursor.file, cursor.place
        while True:
            order = torch.randperm(len(self.files), generator=generator(self.seed, self.number, epoch, 3)).tolist()
            for done in range(first, len(order)):
                file = self.files[order[done]]
                for row, where in self.shards.rows(file, place):
                    if (file, *where) in self.held:
                        continue
                    self.unusable.rows += 1
                    if row.captions and row.picture is not None:
                        yield row, epoch, done, where
                    else:
                        missing = "no caption" if row.picture is not None else "no picture in this row"
                        self.unusable.count(row.key, missing)
                place = []
            epoch, first = epoch + 1, 0
            yield None, epoch, 0, []


class First(NamedTuple):
    """A usable row near the beginning of a set."""

    row: Stored
    place: tuple[int, ...]  # (file, *place in it)
    spare: bool  # whether it may be held out: every second row of a file, so that no stream runs dry


def first_held_out(shards: Shards, number: int) -> tuple[list[Stored], set[tuple[int, ...]]]:
    """`number` rows from the beginning of a set, and where they lie, so that training leaves them out.

    A set that ends before holds out a twentieth of itself, or, with fewer than 100 rows, none: then the rows are those
    that training sees, and the set of places is empty. Raises ValueError where no row can be decoded.
    """
    some: list[First] = []
    spare: list[First] = []
    total = 0
    for total, first in enumerate(first_rows(shards), 1):  # noqa: B007, what it is at the end counts
        if first.spare:
            spare.append(first)
        if len(some) < number:
            some.append(first)
        if len(spare) == number:
            break
    else:
        number = total // 20 if total >= 100 else 0
    if not some:
        raise ValueError(f"{shards.name}: no picture with a caption can be read")
    return [one.row for one in spare[:number] or some], {one.place for one in spare[:number]}


def first_rows(shards: Shards) -> Iterator[First]:
    """The rows from the beginning on that have a caption and a picture whose header can be read."""
    tried = found = 0
    for file in range(len(shards.files)):
        spare = False
        for row, place in shards.rows(file, []):
            tried += 1
            try:
                usable = bool(row.captions) and bool(row.size())
            except ValueError:
                usable = False
            if usable:
                yield First(row, (file, *place), spare)
                spare = not spare
                found += 1
            if tried >= JUDGED and found < tried / 2:
                raise ValueError(
                    f"{shards.name}: {tried - found} of the first {tried} rows have no caption, or no picture that can "
                    f"be read, for instance {row.key}"
                )
