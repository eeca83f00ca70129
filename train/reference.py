"""Features of whole sets of pictures, computed once: keyed by the pictures, the size they are brought to and the
extractor's weights, written in shards by as many processes as there are, so that a killed run goes on where it was."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from train.aside import opened_whole, save_whole, written_aside
from train.data import fit, permutation, read, refuse_unusable
from train.extractors import Extractor
from train.hashes import FileHashes
from train.metrics import Moments
from train.pictures import Example, Source, digest, refuse_numbers

SHARD = 512  # pictures whose features are in one file
FORMAT = "1"
MOMENTS = "moments.safetensors"


class Reference:
    """The features of a set, on the disk, and what was found on the way."""

    def __init__(self, source: Source, size: int, folder: Path, fingerprint: str, shards: Sequence[Path]):
        self.source, self.size, self.folder, self.shards = source, size, folder, shards
        self.hash = fingerprint  # of the pictures and their captions
        self.broken: list[tuple[str, str]] = []
        self.captions: list[str] = []  # the first of each picture, "" where there is none
        self.rows: list[int] = []  # of each feature: the place of its picture in the source
        for file in shards:
            with opened_whole(file) as opened:
                said = json.loads(opened.metadata()["pictures"])
            self.captions += said["captions"]
            self.rows += said["rows"]
            self.broken += [(key, error) for key, error in said["broken"]]

    def __len__(self) -> int:
        return len(self.rows)

    def parts(self) -> Iterator[Tensor]:
        """The features of a shard after the other, [n, d] float32."""
        for file in self.shards:
            with opened_whole(file) as opened:
                part = opened.get_tensor("features")
            if len(part):
                yield part

    def features(self, most: int | None = None) -> Tensor:
        """[N, d]: all, or `most` of them, drawn at random once and for all, in the order of the set."""
        every = torch.cat(list(self.parts()))
        if most is None or most >= len(every):
            return every
        return every[permutation(len(every), 0, 0)[:most].sort().values]

    def moments(self) -> Moments:
        """Mean and covariance of all; kept beside the features."""
        file = self.folder / MOMENTS
        if file.is_file():
            with opened_whole(file) as opened:
                return Moments(len(self), opened.get_tensor("mean"), opened.get_tensor("scatter"))
        found = Moments.of(self.parts())
        with written_aside(file) as partial:
            save_file({"mean": found.mean, "scatter": found.scatter.contiguous()}, partial)
        return found

    def picture(self, row: int) -> Image.Image:
        """As the extractor was shown it, but for its own resizing."""
        return Image.fromarray(fit(self.source[self.rows[row]].image, self.size))


def warn_of_few(pictures: Reference, what: str, say: Callable[[str], None]) -> None:
    """Says that their Fréchet distance is one of too few pictures, where it is."""
    count, dim = len(pictures), pictures.moments().mean.numel()
    if count <= dim:
        say(
            f"warning: {count} {what}, and {dim} features: a covariance of fewer pictures than features is singular, "
            "and the Fréchet distance far off; compare it only at equal counts"
        )


@dataclass
class InMemory:
    """Pictures in memory, as a source."""

    images: list[Image.Image]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return Example(self.images[index], (self.captions[index],), f"picture {index}")

    def picture_size(self, index: int) -> tuple[int, int]:
        return self.images[index].size

    def fingerprint(self, hashes: FileHashes | None = None) -> str:
        return digest(*self.captions, *(image.tobytes() for image in self.images))


def open_reference(
    source: Source, extractor: Extractor, size: int, cache: Path, accelerator: Accelerator, *, workers: int = 2
) -> Reference:
    """The features of all pictures of a source, each process its share of what the cache lacks.

    size: of the squares to which pictures are brought, in pixels, before the extractor's own resizing: the middle, by
    Lanczos' filter, as in training.

    Raises ValueError where more pictures than a training would accept are broken, or none is left.
    """
    refuse_numbers(source)
    with accelerator.main_process_first():  # whose hashes of the files the others then find in the cache
        fingerprint = source.fingerprint(FileHashes(cache))
    folder = cache / f"features-{digest(fingerprint, str(size), extractor.digest, extractor.resize, FORMAT)}"
    folder.mkdir(parents=True, exist_ok=True)
    shards = [folder / f"{i:06d}.safetensors" for i in range(-(-len(source) // SHARD))]
    for i in range(accelerator.process_index, len(shards), accelerator.num_processes):
        if not shards[i].is_file():
            said = f"features, part {i + 1} of {len(shards)}" if accelerator.is_local_main_process else None
            indices = range(i * SHARD, min((i + 1) * SHARD, len(source)))
            _write_shard(source, extractor, size, indices, shards[i], workers, said)
    accelerator.wait_for_everyone()
    found = Reference(source, size, folder, fingerprint, shards)
    refuse_unusable(found.broken, len(source), accelerator.print)
    if not len(found):
        raise ValueError("no picture is left to measure")
    return found


def _write_shard(
    source: Source, extractor: Extractor, size: int, indices: range, file: Path, workers: int, progress: str | None
) -> None:
    features, captions, rows, broken = [], [], [], []
    for batch in read(source, size, indices, batch=64, workers=workers, progress=progress):
        whole = [one for one in batch if one.pixels is not None]
        broken += [(one.key, one.error) for one in batch if one.pixels is None]
        if whole:
            features.append(extractor([np.asarray(one.pixels) for one in whole]))
        captions += [one.captions[0] if one.captions else "" for one in whole]
        rows += [one.number for one in whole]
    every = torch.cat(features) if features else torch.zeros(0, 1)
    if not torch.isfinite(every).all():
        raise ValueError(f"the extractor {extractor.name} gives numbers that are not finite: are its weights whole?")
    said = json.dumps({"captions": captions, "rows": rows, "broken": broken})
    save_whole({"features": every}, file, {"pictures": said})
