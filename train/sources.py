"""Captioned pictures: where they come from, and what is said when something is wrong with them.

A source is map-style: `len(source)`, `source[i] -> Example`, and `source.fingerprint()`, a hash of everything that
decides its pictures. `open_source` chooses one, or several joined by "+", with this precedence: the drawn sets `shapes`
and `pictograms` by name; a .parquet file, or a folder of them; a folder of pictures whose captions are in
metadata.jsonl, else in metadata.csv, else in .txt files beside the pictures (one caption a line), else are the names of
the class folders.
"""

import bisect
import csv
import hashlib
import io
import itertools
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageOps

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MAX_UNUSABLE = 0.05  # share of pictures without a caption, or broken, above which training is refused
# What Pillow raises, and what its decoders let through.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class Example(NamedTuple):
    image: Image.Image  # RGB
    captions: tuple[str, ...]  # any of them may be used; the first is the canonical one
    key: str  # names the picture in messages


class Source(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...
    def fingerprint(self) -> str: ...


@dataclass
class FolderSource:
    """Picture files and their captions; nothing is decoded before it is asked for."""

    files: list[Path]
    captions: list[tuple[str, ...]]
    origin: str  # where the captions were found
    notes: list[str] = field(default_factory=list)  # what was left out, for the person at the terminal

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        file = self.files[index]
        try:
            with Image.open(file) as image:
                return Example(rgb(image), self.captions[index], str(file))
        except UNREADABLE as error:
            raise ValueError(f"{file}: {error}") from None

    def fingerprint(self) -> str:
        return digest(json.dumps(self.captions), *map(_file_hash, self.files))


@dataclass
class ParquetSource:
    """Rows of parquet files: the picture column and the caption column are found by their types."""

    rows: Any  # datasets.Dataset
    image_column: str
    text_column: str
    files: list[Path]
    notes: list[str] = field(default_factory=list)

    @property
    def origin(self) -> str:
        return f"columns {self.image_column!r} and {self.text_column!r}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        if row[self.image_column] is None:
            raise ValueError("no picture in this row")
        text = row[self.text_column]
        captions = _captions([text] if isinstance(text, str) else text or [])
        return Example(rgb(row[self.image_column]), captions, f"row {index}")

    def fingerprint(self) -> str:
        return digest(self.image_column, *map(_file_hash, self.files))


@dataclass
class Drawn:
    """A set that code draws; its fingerprint is that of the code, the settings and the font."""

    drawing: Any
    settings: str
    font: Path | None = None
    origin: str = "drawn by code"
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.drawing)

    def __getitem__(self, index: int) -> Example:
        return self.drawing[index]

    def fingerprint(self) -> str:
        here = Path(__file__).parent
        code = [(here / name).read_bytes() for name in ("pictograms.py", "styles.py", "shapes.py", "objects.csv")]
        return digest(self.settings, *code, self.font.read_bytes() if self.font else b"")


@dataclass
class Joined:
    """Several sources, one after the other."""

    parts: list[Any]

    def __post_init__(self) -> None:
        self.ends = list(itertools.accumulate(len(part) for part in self.parts))
        self.notes = [note for part in self.parts for note in part.notes]
        self.origin = "; ".join(part.origin for part in self.parts)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Example:
        part = bisect.bisect_right(self.ends, index)
        return self.parts[part][index - (self.ends[part - 1] if part else 0)]

    def fingerprint(self) -> str:
        return digest(*(part.fingerprint() for part in self.parts))


def open_source(data: str, size: int, *, split: str = "train", font: str | None = None, views: int = 1) -> Source:
    """The source that `--data` names (see the module's text for the precedence).

    size: the side in pixels at which drawn pictures are drawn. split: "train" | "held_out" | "all"; only drawn
    pictograms have held-out pairs, of other sources it is the same pictures. Raises ValueError naming what is missing.
    """
    if "+" in data and not Path(data).exists():
        return Joined([open_source(d, size, split=split, font=font, views=views) for d in data.split("+")])
    if data == "shapes":
        from train.shapes import Shapes

        seed = {"train": 0, "held_out": 1, "all": 0}[split]
        count = 256 if split == "held_out" else 4096
        return Drawn(Shapes(size=size, count=count, seed=seed), f"shapes {size} {count} {seed}")
    if data.split(":")[0] == "pictograms":
        from train.pictograms import Pictograms, find_font

        objects = data.partition(":")[2] or "everyday"
        drawing = Pictograms(size=size, objects=objects, split=split, views=views, font=font)
        return Drawn(drawing, f"pictograms {size} {objects} {split} {views}", find_font(font))
    path = Path(data).expanduser()
    if not data:  # which pathlib takes for the current folder
        raise ValueError("--data: expected a folder of captioned pictures, or a .parquet file")
    if not path.exists():
        raise ValueError(
            f"--data {data!r} does not exist: expected a folder of captioned pictures, a .parquet file, "
            "'shapes' or 'pictograms' ('pictograms:all' for every object)"
        )
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"--data {data!r} is a file but not .parquet: expected a .parquet file or a folder")
        return _open_parquet([path])
    if parquet := sorted(path.glob("*.parquet")):
        return _open_parquet(parquet)
    return _open_folder(path)


def _open_folder(folder: Path) -> FolderSource:
    pictures = sorted(f for f in folder.rglob("*") if f.suffix.lower() in PICTURES and not f.name.startswith("."))
    if not pictures:
        raise ValueError(
            f"no pictures in {folder}: expected files ending in {', '.join(sorted(PICTURES))}, or .parquet files"
        )
    origin, found = _folder_captions(folder, pictures)
    captioned = [(f, found[f]) for f in pictures if found.get(f)]
    notes = [f"no caption: {f}" for f in pictures if not found.get(f)]
    there = set(pictures)
    notes += [f"named in {origin}, but not there: {f}" for f in found if f not in there]
    if len(pictures) - len(captioned) > MAX_UNUSABLE * len(pictures):
        raise ValueError(
            f"{len(pictures) - len(captioned)} of {len(pictures)} pictures in {folder} have no caption (captions from "
            f"{origin}; at most {MAX_UNUSABLE:.0%} may lack one), for instance {notes[0].removeprefix('no caption: ')}."
            ' Add metadata.jsonl with lines {"file_name": ..., "text": ...}, or a .txt file beside each picture'
        )
    return FolderSource([f for f, _ in captioned], [c for _, c in captioned], origin, notes)


def _folder_captions(folder: Path, pictures: list[Path]) -> tuple[str, dict[Path, tuple[str, ...]]]:
    """(where captions were found, file -> captions), by the precedence in the module's text."""
    for name in ("metadata.jsonl", "metadata.csv"):
        if (folder / name).is_file():
            return name, _read_metadata(folder / name)
    if any(f.with_suffix(".txt").is_file() for f in pictures):
        texts = {f: f.with_suffix(".txt") for f in pictures}
        return ".txt files", {f: _captions(_text(t).splitlines()) for f, t in texts.items() if t.is_file()}
    return "class folders", {f: (f.parent.name.replace("_", " "),) for f in pictures if f.parent != folder}


def _read_metadata(file: Path) -> dict[Path, tuple[str, ...]]:
    lines = io.StringIO(_text(file), newline="")
    if file.suffix == ".csv":
        rows: list[tuple[int, dict]] = list(enumerate(csv.DictReader(lines), 2))
    else:
        rows = [(n, _json_object(line, file, n)) for n, line in enumerate(lines, 1) if line.strip()]
    found: dict[Path, tuple[str, ...]] = {}
    for number, row in rows:
        text = next((row[k] for k in ("text", "caption", "prompt") if row.get(k)), None)
        if not row.get("file_name") or not isinstance(row["file_name"], str):
            raise ValueError(f"{file}, line {number}: expected 'file_name' and 'text', got {sorted(map(str, row))}")
        texts = text if isinstance(text, list) else [text or ""]
        if not all(isinstance(t, str) for t in texts):
            raise ValueError(f"{file}, line {number}: expected a text, or a list of texts, got {text!r}")
        picture = file.parent / row["file_name"]
        found[picture] = found.get(picture, ()) + _captions(texts)
    return found


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")  # some editors begin a file with a byte-order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}): save it as UTF-8") from None


def _json_object(line: str, file: Path, number: int) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {number} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{file}, line {number}: expected a JSON object, got {line.strip()[:60]}")
    return row


def _open_parquet(files: list[Path]) -> ParquetSource:
    import datasets

    try:
        rows = datasets.load_dataset("parquet", data_files=[str(f) for f in files], split="train")
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        raise ValueError(f"cannot read {files[0]} as parquet: {error.__cause__ or error}") from None
    if not len(rows):
        raise ValueError(f"{files[0]} holds no rows")
    features = rows.features
    images = [n for n, f in features.items() if isinstance(f, datasets.Image) or _image_struct(f)]
    texts = [n for n, f in features.items() if _is_text(f)]
    classes = [n for n, f in features.items() if isinstance(f, datasets.ClassLabel)]
    if images and classes and not texts:  # MNIST and CIFAR-10 as most have them: the names of the classes are captions
        names = features[classes[0]].names
        said = [names[label] if label is not None and label >= 0 else None for label in rows[classes[0]]]
        texts = [f"{classes[0]} as text"]
        rows = rows.add_column(texts[0], said)
    if not images or not texts:
        kinds = ", ".join(f"{n}: {f}" for n, f in features.items())
        raise ValueError(f"{files[0]} needs a column of pictures and one of texts or classes; its columns are {kinds}")
    texts.sort(key=lambda n: ("text", "caption", "prompt").index(n) if n in ("text", "caption", "prompt") else 3)
    for name in images:
        if not isinstance(features[name], datasets.Image):
            rows = rows.cast_column(name, datasets.Image())
    return ParquetSource(rows, images[0], texts[0], files)


def _image_struct(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _is_text(feature: Any) -> bool:
    kind = getattr(feature, "feature", feature)  # a list of texts is several captions
    return getattr(kind, "dtype", None) in ("string", "large_string")


def _captions(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(t.strip() for t in texts if t and t.strip())


def first_captions(source: Source) -> set[str]:
    """The distinct canonical captions of a source, without decoding its pictures where they can be had so."""
    if isinstance(source, FolderSource):
        return {group[0] for group in source.captions}
    if isinstance(source, ParquetSource):
        groups = ([text] if isinstance(text, str) else text or [] for text in source.rows[source.text_column])
        return {captions[0] for group in groups if (captions := _captions(group))}
    if isinstance(source, Joined):
        return set().union(*map(first_captions, source.parts))
    return {source[i].captions[0] for i in range(len(source))}


def describe(source: Source, size: int) -> str:
    """What was found, with three parsed rows, for the first lines that a training run prints."""
    lines = [f"{len(source):,} pictures, captions: {getattr(source, 'origin', type(source).__name__)}"]
    for index in dict.fromkeys((0, len(source) // 2, len(source) - 1)):
        try:
            example = source[index]
        except UNREADABLE as error:
            lines.append(f"  {index}: broken: {error}")
            continue
        w, h = example.image.size
        crop = "" if w == h else f", cropped to the middle {min(w, h)}×{min(w, h)}"
        others = f" (+{len(example.captions) - 1} more captions)" if len(example.captions) > 1 else ""
        lines.append(f"  {example.key}: {w}×{h}{crop}, resized to {size}: {example.captions[:1]}{others}")
    notes = getattr(source, "notes", [])
    lines += [f"  {note}" for note in notes[:10]]
    if len(notes) > 10:
        lines.append(f"  … and {len(notes) - 10} more such lines")
    return "\n".join(lines)


def rgb(image: Image.Image) -> Image.Image:
    """RGB, turned as its EXIF data says, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def _file_hash(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def digest(*parts: str | bytes) -> str:
    """What names a cache: a hash of everything that decides what lies in it."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part.encode() if isinstance(part, str) else part)
        hashed.update(b"\0")
    return hashed.hexdigest()[:24]
