"""Aspect-ratio buckets: pictures of all ratios in batches of one shape each, with little of them cropped away.

Sides are multiples of what autoencoder and U-Net need, ratios go from 1:2 to 2:1, and no bucket has more pixels than
the square (as NovelAI, 2022, and SDXL: Podell et al., 2023, section 2.3, have it).
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from pipelines.image import UNREADABLE
from train.aside import written_aside
from train.data import failures_named
from train.hashes import FileHashes
from train.pictures import Source, digest, refuse_failing_disk
from train.sources import parts_of

LEAST_AREA = 0.75  # of a bucket, in squares
WIDEST = 2.0  # ratio of the sides


def bucket_sides(size: int, multiple: int) -> list[tuple[int, int]]:
    """(width, height) of the buckets about a square of `size`, both multiples of `multiple`, from tall to wide.

    Raises ValueError where there is none.
    """
    found: dict[float, tuple[int, int]] = {}  # of each ratio the largest
    for width in range(multiple, int(size * math.sqrt(WIDEST)) + 1, multiple):
        height = min(size * size // width, int(width * WIDEST)) // multiple * multiple
        if height >= width and width * height >= LEAST_AREA * size * size:
            found |= {width / height: (width, height), height / width: (height, width)}
    if not found:
        raise ValueError(f"--size {size}: expected a multiple of {multiple}, or more, for buckets")
    return [found[ratio] for ratio in sorted(found)]


class Assigned(NamedTuple):
    """The bucket of each picture."""

    sides: list[tuple[int, int]]  # of each picture: (width, height) of its bucket
    report: str  # the histogram, and what was merged


def assign(
    sizes: Sequence[tuple[int, int] | None], size: int, multiple: int, *, repeats: Sequence[float], global_batch: int
) -> Assigned:
    """Each picture's bucket: that of the closest ratio. Buckets with fewer pictures (times `repeats`) than the global
    batch are merged into the nearest.

    sizes: (width, height) of each picture; None where it is not known, which goes where squares go.
    """
    buckets = bucket_sides(size, multiple)
    own = [_closest(w / h, buckets) for w, h in (s or (1, 1) for s in sizes)]
    counts: Counter[tuple[int, int]] = Counter()
    for side, times in zip(own, repeats, strict=True):
        counts[side] += times  # type: ignore[assignment]
    pictures = Counter(own)
    merged: dict[tuple[int, int], tuple[int, int]] = {}
    lines = []
    while len(counts) > 1 and min(counts.values()) < global_batch:
        small = min(counts, key=lambda side: (counts[side], side))
        into = _closest(small[0] / small[1], [side for side in counts if side != small])
        lines.append(
            f"  {_name(small)}: merged into {_name(into)}, because its {counts[small]:g} pictures an epoch are fewer "
            f"than an update takes ({global_batch})"
        )
        counts[into] += counts.pop(small)
        pictures[into] += pictures.pop(small)
        merged = {side: into if to == small else to for side, to in merged.items()} | {small: into}
    sides = [merged.get(side, side) for side in own]
    enlarged = Counter(
        side for s, side in zip(sizes, sides, strict=True) if s and max(side[0] / s[0], side[1] / s[1]) > 1
    )
    most = max(pictures.values())
    rows = [
        f"  {_name(side):>11} {pictures[side]:>9,} {'#' * math.ceil(40 * pictures[side] / most)}"
        + (f" ({enlarged[side]:,} are smaller: enlarged)" if enlarged[side] else "")
        for side in buckets
        if pictures[side]
    ]
    return Assigned(sides, "\n".join([f"buckets, width×height, multiples of {multiple}:", *rows, *lines]))


def _closest(ratio: float, buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return min(buckets, key=lambda side: (abs(math.log(side[0] / side[1]) - math.log(ratio)), -side[0] * side[1], side))


def _name(side: tuple[int, int]) -> str:
    return f"{side[0]}×{side[1]}"


def picture_sizes(
    source: Source, folder: Path, hashes: FileHashes, *, progress: bool = True
) -> list[tuple[int, int] | None]:
    """(width, height) of each picture, read once from its header and remembered in `folder`; None for broken ones."""
    found: list[tuple[int, int] | None] = []
    for part, _ in parts_of(source):
        file = folder / f"sizes-{digest(part.fingerprint(hashes))}.json"
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            measured = read_sizes(part, progress=progress)
            with written_aside(file) as partial:
                partial.write_text(json.dumps(measured))
        found += [tuple(s) if s else None for s in json.loads(file.read_text())]
    return found


def read_sizes(source: Source, *, progress: bool = True) -> list[tuple[int, int] | None]:
    """(width, height) of every picture, from its header; None where it has none. ValueError where the disk fails."""

    def one(index: int) -> tuple[int, int] | None:
        try:
            return source.picture_size(index)
        except UNREADABLE as error:
            refuse_failing_disk(error, f"picture {index}")
            return None

    with failures_named(), ThreadPoolExecutor(4) as pool:  # which wait for the disk more than they compute
        many = pool.map(one, range(len(source)), chunksize=64)
        return list(tqdm(many, total=len(source), desc="sizes", unit="pictures", disable=not progress))
