"""Captioned pictures: where they come from, and what is said when something is wrong with them.

A source is map-style: `len(source)`, `source[i] -> Example`, and `source.fingerprint()`, a hash of everything that
decides its pictures. `open_source` chooses one, with this precedence: the drawn sets `shapes` and `pictograms` by name;
a .parquet or a .tar file, a folder of either, or tars by a pattern such as data-{000..012}.tar; a folder of pictures
whose captions are in metadata.jsonl, else in metadata.csv, else in .txt files beside the pictures (one caption a line),
else are the names of the class folders; a set of the Hugging Face hub, owner/name or owner/name:split.

Several are joined by "+", each with the number of times that its pictures come in an epoch: "20*mine/+regular/". What
is read as a stream, remote paths for instance, is in `train.shards`.
"""

import bisect
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.image import UNREADABLE
from train.captions import Template
from train.folders import FolderSource, open_bare, open_folder, pictures_in
from train.hashes import FileHashes
from train.pictures import Example, Source, digest
from train.tables import ParquetSource, has_pictures, open_hub, open_parquet
from train.tars import TarSource, open_tars

HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
SPLIT = re.compile(r"(?:^|[-_.])(train|test|dev|val|valid|validation)[-_.]", re.IGNORECASE)  # in the name of a file
EXPECTED = (
    "expected a folder of captioned pictures, a .parquet or .tar file or a folder of them, 'shapes' or 'pictograms' "
    "('pictograms:all' for every object, 'pictograms:fox,house' for some), or a data set of the hub, owner/name or "
    "owner/name:split"
)


@dataclass
class Drawn:
    """A set that code draws; its fingerprint is that of the code, the settings and the font."""

    drawing: Any
    settings: str
    size: int
    font: Path | None = None
    origin: str = "drawn by code"
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.drawing)

    def __getitem__(self, index: int) -> Example:
        return self.drawing[index]

    def picture_size(self, index: int) -> tuple[int, int]:
        return self.size, self.size

    def fingerprint(self, hashes: FileHashes | None = None) -> str:
        here = Path(__file__).parent
        code = [(here / name).read_bytes() for name in ("pictograms.py", "styles.py", "shapes.py", "objects.csv")]
        return digest(self.settings, *code, self.font.read_bytes() if self.font else b"")


@dataclass
class Joined:
    """Several sources, one after the other, each with how often its pictures come in an epoch."""

    parts: list[Any]
    numbers: list[float]

    def __post_init__(self) -> None:
        self.ends = list(itertools.accumulate(len(part) for part in self.parts))
        self.notes = [note for part in self.parts for note in part.notes]
        pairs = zip(self.parts, self.numbers, strict=True)
        self.origin = "; ".join(
            part.origin + (f" ({len(part):,} pictures, each {number:g} times an epoch)" if number != 1 else "")
            for part, number in pairs
        )

    def __len__(self) -> int:
        return self.ends[-1]

    def _place(self, index: int) -> tuple[Any, int]:
        part = bisect.bisect_right(self.ends, index)
        return self.parts[part], index - (self.ends[part - 1] if part else 0)

    def __getitem__(self, index: int) -> Example:
        part, place = self._place(index)
        return part[place]

    def picture_size(self, index: int) -> tuple[int, int]:
        part, place = self._place(index)
        return part.picture_size(place)

    def fingerprint(self, hashes: FileHashes | None = None) -> str:
        return digest(*(part.fingerprint(hashes) for part in self.parts))


def open_source(
    data: str,
    size: int,
    *,
    split: str = "train",
    font: str | None = None,
    views: int = 1,
    template: str = "",
    captions: bool = True,
) -> Source:
    """The source that `--data` names (see the module's text for the precedence).

    size: the side in pixels at which drawn pictures are drawn. split: "train" | "held_out" | "all"; only drawn
    pictograms have held-out pairs, of other sources it is the same pictures. template: makes the captions, such as
    "a photo of {label}" (`train.captions.Template`). captions: False for those who read none; all are the empty one
    then. Raises ValueError naming what is missing.
    """
    made = Template(template) if template else None
    parts = split_parts(data)
    opened = [_open(name, size, split, font, views, made, not captions) for _, name in parts]
    if len(parts) == 1 and parts[0][0] == 1:
        return opened[0]
    return Joined(opened, [number for number, _ in parts])


def split_parts(data: str) -> list[tuple[float, str]]:
    """[NUMBER*]SOURCE+… as (number, source): how often the pictures of each come in an epoch, 1 without a number."""
    if os.path.exists(Path(data).expanduser()):  # a name may hold a plus, or a star; Path.exists fails for long ones
        return [(1.0, data)]
    parts = []
    for part in data.split("+"):
        number = re.match(r"(\d+(?:\.\d*)?|\.\d+)\*(?=.)", part)
        if number and not float(number[1]):
            raise ValueError(f"--data {part!r}: expected a number above 0 before the *, or leave the source out")
        parts.append((float(number[1]) if number else 1.0, part[number.end() :] if number else part))
    return parts


def _open(data: str, size: int, split: str, font: str | None, views: int, template: Template | None, bare: bool) -> Any:
    if data == "shapes" or data.split(":")[0] == "pictograms":
        if template:
            raise ValueError(f"--template is for captions that are in fields, and {data} is drawn with its own")
        return _drawn(data, size, split, font, views)
    path = Path(data).expanduser()
    if not data:  # which pathlib takes for the current folder
        raise ValueError(f"--data: {EXPECTED}")
    if not path.exists():
        return _elsewhere(data, template, bare)
    if path.is_file():
        if path.suffix == ".parquet":
            return open_parquet([path], template, bare=bare)
        if path.suffix == ".tar":
            return open_tars([path], template, bare=bare)
        raise ValueError(f"--data {data!r} is a file but not .parquet or .tar: {EXPECTED}")
    tables, tars = shards_in(path)
    if tables and (has_pictures(tables[0]) or not (tars or pictures_in(path))):
        return open_parquet(tables, template, bare=bare)
    if tars:
        found: Any = open_tars(tars, template, bare=bare)
    else:
        found = open_bare(path) if bare else open_folder(path, template)
    if tables:
        found.notes.insert(0, f"left out, {len(tables)} tables without a column of pictures: {tables[0].name}")
    return found


def shards_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """The parquet files and the tars of a folder; ValueError where they are of several splits by their names."""
    tables, tars = sorted(folder.glob("*.parquet")), sorted(folder.glob("*.tar"))
    for files in (tables, tars):
        refuse_several_splits([str(file) for file in files])
    return tables, tars


def refuse_several_splits(files: Sequence[str]) -> None:
    """ValueError for files of a folder of which some are to train on by their names, and others to measure by."""
    splits: dict[str, list[str]] = {}
    for file in files:
        if named := SPLIT.search(file.rpartition("/")[2]):
            splits.setdefault(named[1].lower(), []).append(file)
    train = splits.pop("train", None)
    if train and splits:
        folder, _, _ = train[0].rpartition("/")
        stems = [file[len(folder) + 1 :].rpartition(".")[0] for file in train[:3]] + ["…"] * (len(train) > 3)
        alone = train[0] if len(train) == 1 else f"{folder}/{{{','.join(stems)}}}.{train[0].rpartition('.')[2]}"
        other = next(iter(splits.values()))[0]
        raise ValueError(
            f"--data: {train[0]} and {other} are of several splits by their names, and would be one set: name the "
            f"files of one, as {alone} (several sources are joined by +)"
        )


def _drawn(data: str, size: int, split: str, font: str | None, views: int) -> Drawn:
    if data == "shapes":
        from train.shapes import Shapes

        seed = {"train": 0, "held_out": 1, "all": 0}[split]
        count = 256 if split == "held_out" else 4096
        return Drawn(Shapes(size=size, count=count, seed=seed), f"shapes {size} {count} {seed}", size)
    from train.pictograms import Pictograms, find_font, objects_of

    objects = objects_of(data)
    drawing = Pictograms(size=size, objects=objects, split=split, views=views, font=font)
    return Drawn(drawing, f"pictograms {size} {','.join(objects)} {split} {views}", size, find_font(font))


def _elsewhere(data: str, template: Template | None, bare: bool) -> TarSource | ParquetSource:
    """What is no file and no folder by its name."""
    if is_remote(data):
        raise ValueError(f"--data {data!r} is not on this machine: it can be streamed (train/ldm.py), or copied here")
    if (files := expand(data)) != [data]:
        missing = [file for file in files if not Path(file).expanduser().is_file()]
        if missing:
            raise ValueError(f"--data {data!r}: {len(missing)} of {len(files)} files are not there, first {missing[0]}")
        paths = [Path(file).expanduser() for file in files]
        if all(path.suffix == ".tar" for path in paths):
            return open_tars(paths, template, bare=bare)
        if all(path.suffix == ".parquet" for path in paths):
            return open_parquet(paths, template, bare=bare)
        raise ValueError(f"--data {data!r}: expected a pattern of .tar or of .parquet files")
    if HUB.fullmatch(data):
        name, _, part = data.partition(":")
        return open_hub(name, part or "train", template, bare=bare)
    raise ValueError(f"--data {data!r} does not exist: {EXPECTED}")


def is_remote(data: str) -> bool:
    """Whether --data is an address, of `hf://`, `https://` or `s3://`."""
    return "://" in data


def expand(pattern: str) -> list[str]:
    """The names that a pattern of shards stands for: {000..012} counts, {a,b} lists, as a shell has it."""
    found = re.search(r"\{([^{}]+)\}", pattern)
    if not found:
        return [pattern]
    if limits := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        first, last = limits.groups()
        width = len(first) if first.startswith("0") else 0
        choices = [f"{i:0{width}d}" for i in range(int(first), int(last) + 1)]
    else:
        choices = found[1].split(",")
    return [name for c in choices for name in expand(pattern[: found.start()] + c + pattern[found.end() :])]


def first_captions(source: Source) -> set[str]:
    """The distinct canonical captions of a source, without decoding its pictures where they can be had so."""
    if isinstance(source, FolderSource | TarSource):
        return {group[0] for group in source.captions}
    if isinstance(source, ParquetSource):
        return source.first_captions()
    if isinstance(source, Joined):
        return set().union(*map(first_captions, source.parts))
    return {source[i].captions[0] for i in range(len(source))}


def classes_of(source: Source) -> tuple[str, ...]:
    """The distinct first captions, sorted; ValueError where they can't be classes."""
    names = tuple(sorted(first_captions(source)))
    if len(names) < 2 or 2 * len(names) > len(source):
        some = names[0] if names else None
        raise ValueError(
            f"{len(source)} pictures of {len(names)} classes (the first captions, for instance {some!r}): "
            "expected at least two classes, and two pictures of each: give a folder of class folders, or a parquet "
            "file whose text names the class"
        )
    return names


def parts_of(source: Source) -> list[tuple[Source, float]]:
    """The parts that "+" joins, and how often the pictures of each come in an epoch."""
    if isinstance(source, Joined):
        return list(zip(source.parts, source.numbers, strict=True))
    return [(source, 1.0)]


def describe(source: Source, size: int | None) -> str:
    """What was found, with three parsed rows, for the first lines that a training run prints.

    size: of the squares that pictures are brought to; None for buckets.
    """
    lines = [f"{len(source):,} pictures, captions: {getattr(source, 'origin', type(source).__name__)}"]
    for index in dict.fromkeys((0, len(source) // 2, len(source) - 1)):
        try:
            lines.append(describe_row(source[index], size))
        except UNREADABLE as error:
            lines.append(f"  {index}: broken: {error}")
    notes = getattr(source, "notes", [])
    lines += [f"  {note}" for note in notes[:10]]
    if len(notes) > 10:
        lines.append(f"  … and {len(notes) - 10} more such lines")
    return "\n".join(lines)


def describe_row(example: Example, size: int | None) -> str:
    """A line on a parsed row."""
    w, h = example.image.size
    crop = "" if w == h or not size else f", cropped to the middle {min(w, h)}×{min(w, h)}"
    resized = f", resized to {size}" if size else ""
    others = f" (+{len(example.captions) - 1} more captions)" if len(example.captions) > 1 else ""
    return f"  {example.key}: {w}×{h}{crop}{resized}: {example.captions[:1]}{others}"
