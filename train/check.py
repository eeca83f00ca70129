"""`atelier data check`: what a set of pictures holds, and whether a training on it would start."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from conditioning.tokenizer import ClipTokenizer
from pipelines.image import UNREADABLE
from train.buckets import assign
from train.build import text_folder
from train.data import failures_named, refuse_unusable
from train.pictures import Example, Source, Stored, refuse_failing_disk
from train.shards import Shards, open_shards
from train.sources import describe, describe_row, is_remote, open_source, parts_of, split_parts
from train.streams import first_held_out
from train.taken import VALIDATION

NAMED = 20  # lines of a kind that are printed


class Seen(NamedTuple):
    """What is left of a picture that was decoded."""

    key: str
    size: tuple[int, int] | None  # (width, height), None where it is broken
    content: bytes  # a hash of its pixels
    captions: tuple[str, ...]
    error: str  # why it cannot be used; "" where it can


def seen(example: Example) -> Seen:
    """What is kept of a picture that could be read."""
    content = hashlib.blake2b(repr(example.image.size).encode() + example.image.tobytes(), digest_size=8).digest()
    error = "" if example.captions else "no caption"
    return Seen(example.key, example.image.size, content, example.captions, error)


def broken(key: str, error: Exception) -> Seen:
    """What is kept of one that could not."""
    return Seen(key, None, b"", (), str(error).removeprefix(f"{key}: "))


@dataclass
class Part:
    """What training judges each part of --data by."""

    total: int = 0
    unusable: list[tuple[str, str]] = field(default_factory=list)  # (key, error)
    refused: str = ""  # why a stream of it cannot begin


@dataclass
class Found:
    """What was found so far; a few bytes for each picture."""

    sizes: list[tuple[int, int] | None] = field(default_factory=list)
    unusable: list[tuple[str, str]] = field(default_factory=list)
    parts: dict[str, "Part"] = field(default_factory=dict)  # of --data
    contents: dict[bytes, tuple[str, str]] = field(default_factory=dict)  # hash of pixels -> the first one's part, key
    copies: list[tuple[str, str]] = field(default_factory=list)  # (key, the key of what it is a copy of)
    captions: Counter[str] = field(default_factory=Counter)
    several: int = 0  # pictures with more than one caption

    def add(self, one: Seen, part: str) -> None:
        """part: of --data, its name."""
        self.sizes.append(one.size)
        self.parts.setdefault(part, Part()).total += 1
        if one.error:
            self.unusable.append((one.key, one.error))
            self.parts[part].unusable.append(self.unusable[-1])
        if one.size:
            of, first = self.contents.setdefault(one.content, (part, one.key))
            if (of, first) != (part, one.key):
                self.copies.append((one.key, first))
        self.captions.update(one.captions)
        self.several += len(one.captions) > 1

    def report(self, size: int, text_encoder: str | None) -> Iterator[str]:
        """The lines to print. text_encoder: as of `check`."""
        yield from _some("cannot be used", [f"{key}: {error}" for key, error in self.unusable])
        yield from _sizes([s for s in self.sizes if s], size)
        yield from _some("are copies of another", [f"{key} = {first}" for key, first in self.copies])
        if text_encoder == "none":
            return
        yield (
            f"captions: {self.captions.total():,}, {len(self.captions):,} of them different; {self.several:,} pictures "
            "have several"
        )
        yield from _lengths(self.captions, text_encoder)

    def verdict(self) -> str:
        """Why a training would not start; "" where it would."""
        for name, part in self.parts.items():
            try:
                refuse_unusable(part.unusable, part.total, lambda line: None)  # all of them were printed already
            except ValueError as error:
                return f"{name}: {error}" if len(self.parts) > 1 else str(error)
            if part.refused:
                return part.refused
        return ""


def check(
    data: str,
    *,
    size: int = 512,
    buckets: bool = False,
    multiple: int = 64,
    batch: int = 32,
    template: str = "",
    streaming: bool = False,
    text_encoder: str | None = None,
    font: str | None = None,
    workers: int = 2,
) -> bool:
    """Decodes every picture, prints what was found, and says whether a training would start.

    multiple: of the buckets' sides, in pixels. batch: pictures of an update; buckets with fewer are merged.
    text_encoder: the model whose tokens are counted, the bundled one by default; "none" for a training that reads no
    captions. Raises ValueError for what `--data` cannot be at all (`train.sources.open_source`,
    `train.shards.open_shards`).
    """
    reads = text_encoder != "none"
    streaming = streaming or any(is_remote(name) for _, name in split_parts(data))
    if buckets and streaming:
        raise ValueError("--buckets needs the sizes of all pictures beforehand, which a stream has not")
    found = Found()
    repeats: list[float] = []
    parts = split_parts(data)
    if streaming:
        for _, name in parts:
            shards = open_shards(name, template, captions=reads)
            print(f"{name}: captions: {shards.origin}")
            for one in tqdm(_of_shards(shards, size, workers), desc="checking", unit="pictures"):
                found.add(one, name)
            try:
                first_held_out(shards, VALIDATION // len(parts))
            except ValueError as error:
                found.parts.setdefault(name, Part()).refused = str(error)
        print(f"{len(found.sizes):,} rows")
    else:
        source = open_source(data, size, font=font, template=template, captions=reads)
        print(describe(source, None if buckets else size))
        opened = zip(parts, parts_of(source), strict=True)
        names = itertools.chain.from_iterable(itertools.repeat(name, len(part)) for (_, name), (part, _) in opened)
        every = tqdm(_of_source(source, workers), desc="checking", unit="pictures", total=len(source))
        for one, name in zip(every, names, strict=True):
            found.add(one, name)
        repeats = [number for part, number in parts_of(source) for _ in range(len(part))]
    for line in found.report(size, text_encoder):
        print(line)
    if buckets:
        print(assign(found.sizes, size, multiple, repeats=repeats, global_batch=batch).report)
    why = found.verdict()
    start = "get through" if streaming else "start"  # of a stream it judges what it has read
    print(f"training would NOT {start}: {why}" if why else "training would start")
    return not why


class _Checked(Dataset):
    def __init__(self, source: Source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Seen:
        try:
            return seen(self.source[index])
        except UNREADABLE as error:
            refuse_failing_disk(error, f"picture {index}")
            return broken(f"picture {index}", error)


def _of_source(source: Source, workers: int) -> Iterator[Seen]:
    loader: DataLoader = DataLoader(_Checked(source), batch_size=16, num_workers=workers, collate_fn=list)
    with failures_named():
        yield from itertools.chain.from_iterable(loader)


def _of_shards(shards: Shards, size: int, workers: int) -> Iterator[Seen]:
    """In the order of the files, `workers` pictures at a time; the first three rows are printed."""

    def one(row: Stored) -> Seen:
        try:
            return seen(row.example())
        except ValueError as error:
            return broken(row.key, error)

    shown = 0
    rows = (row for file in range(len(shards.files)) for row, _ in shards.rows(file, []))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        while some := list(itertools.islice(rows, 64)):
            for row, result in zip(some, pool.map(one, some), strict=True):
                if shown < 3 and result.size:
                    print(describe_row(row.example(), size))
                    shown += 1
                yield result


def _some(what: str, lines: list[str]) -> Iterator[str]:
    if lines:
        yield f"{len(lines):,} pictures {what}:"
        yield from (f"  {line}" for line in lines[:NAMED])
        if len(lines) > NAMED:
            yield f"  … and {len(lines) - NAMED:,} more"


def _sizes(sizes: list[tuple[int, int]], size: int) -> Iterator[str]:
    """A histogram of the shorter sides, from one power of two to the next."""
    if not sizes:
        return
    powers = Counter(min(s).bit_length() - 1 for s in sizes)
    yield "shorter sides, in pixels:"
    for power in range(min(powers), max(powers) + 1):
        bar = "#" * -(-40 * powers[power] // max(powers.values()))
        yield f"  {2**power:>6}–{2 ** (power + 1) - 1:<6} {powers[power]:>9,} {bar}"
    if small := sum(min(s) < size for s in sizes):
        yield f"  {small:,} are smaller than {size}, and enlarged"


def _lengths(captions: Counter[str], text_encoder: str | None) -> Iterator[str]:
    """How many captions need more than one window of the text encoder."""
    tokenizer = ClipTokenizer.from_folder(text_folder(text_encoder or "bundled") / "tokenizer")
    window = tokenizer.length or 77
    longer = sum(len(tokenizer.encode(caption)) + 2 > window for caption in captions)
    yield f"  {longer:,} are longer than the {window} tokens of {text_encoder or 'the bundled model'}"
