"""Folders of pictures, and where their captions are found: in the first that is there of metadata.jsonl, metadata.csv,
these two in the folders below, .txt files beside pictures, and the names of the folders that they are in."""

import csv
import io
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from pipelines.image import UNREADABLE, rgb
from train.captions import Template, captions_of, clean
from train.hashes import FileHashes
from train.pictures import (
    FOREIGN,
    MAX_UNUSABLE,
    PICTURES,
    Example,
    digest,
    refuse_failing_disk,
    upright_size,
)


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
            refuse_failing_disk(error, str(file))
            raise ValueError(f"{file}: {error}") from None

    def picture_size(self, index: int) -> tuple[int, int]:
        """(width, height), from the header alone."""
        try:
            with Image.open(self.files[index]) as image:
                return upright_size(image)
        except UNREADABLE as error:
            refuse_failing_disk(error, str(self.files[index]))
            raise ValueError(f"{self.files[index]}: {error}") from None

    def fingerprint(self, hashes: FileHashes | None = None) -> str:
        said = [() if captions == ("",) else captions for captions in self.captions]
        return digest(json.dumps(said), *(hashes or FileHashes()).of(self.files))


class Found(NamedTuple):
    """What a place that holds captions says."""

    where: str
    captions: dict[Path, tuple[str, ...]]
    broken: dict[Path, str]  # what is wrong with those that cannot be read


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder and of those below it, in the order of their names."""
    return _files(folder, PICTURES)


def _files(folder: Path, endings: Collection[str]) -> list[Path]:
    """But for hidden ones, and those in hidden folders: thumbnails, what was thrown away."""
    found = (f for f in folder.rglob("*") if f.suffix.lower() in endings)
    return sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(folder).parts))


def _some_pictures(folder: Path) -> list[Path]:
    if pictures := pictures_in(folder):
        return pictures
    raise ValueError(
        f"no pictures in {folder}: expected files ending in {', '.join(sorted(PICTURES))}, .parquet or .tar files"
        + "".join(f"; {note}" for note in _foreign(folder)[:1])
    )


def _foreign(folder: Path) -> list[str]:
    files = _files(folder, FOREIGN)
    return [f"left out, a format that is not read (convert it to JPEG or PNG): {file}" for file in files]


def open_pictures(folder: Path, say: Callable[[str], None] = print) -> FolderSource:
    """All pictures of a folder, for those who can do without captions: with the captions of those that have some."""
    files, said, origin = pictures_in(folder), {}, "none"
    if files:
        try:
            known = open_folder(folder)
            said, origin = dict(zip(known.files, known.captions, strict=True)), known.origin
        except ValueError as error:
            say(f"no captions in {folder}: {error}")
    return FolderSource(files, [said.get(file, ()) for file in files], origin)


def open_bare(folder: Path) -> FolderSource:
    """All pictures of a folder, with the empty caption; ValueError where there are none."""
    pictures = _some_pictures(folder)
    return FolderSource(pictures, [("",)] * len(pictures), "not read", _foreign(folder))


def open_folder(folder: Path, template: Template | None = None) -> FolderSource:
    """The pictures of a folder and of those below it; ValueError where too many have no caption."""
    pictures = _some_pictures(folder)
    origin, found, broken = _captions(folder, pictures, template)
    captioned = [(f, found[f]) for f in pictures if found.get(f)]
    notes = [broken.get(f, f"no caption: {f}") for f in pictures if not found.get(f)]
    there = set(pictures)
    notes += [f"named in {origin}, but not there: {f}" for f in found if f not in there]
    notes += _foreign(folder)
    if len(pictures) - len(captioned) > MAX_UNUSABLE * len(pictures):
        raise ValueError(
            f"{len(pictures) - len(captioned)} of {len(pictures)} pictures in {folder} have no caption (captions from "
            f"{origin}; at most {MAX_UNUSABLE:.0%} may lack one), for instance {notes[0].removeprefix('no caption: ')}."
            ' Add metadata.jsonl with lines {"file_name": ..., "text": ...}, or a .txt file beside each picture'
        )
    return FolderSource([f for f, _ in captioned], [c for _, c in captioned], origin, notes)


def _captions(folder: Path, pictures: list[Path], template: Template | None) -> Found:
    """Where captions were found, the first of what the module's text lists, and file -> captions."""
    names = ("metadata.jsonl", "metadata.csv")
    for name in names:
        if (folder / name).is_file():
            return Found(name, _read_metadata(folder / name, template), {})
    below = {above for file in pictures for above in file.parents if above.is_relative_to(folder)}
    for name in names:  # of each split a folder, as `datasets` has them
        files = sorted(file for place in below if (file := place / name).is_file())
        found = {picture: said for file in files for picture, said in _read_metadata(file, template).items()}
        if 2 * sum(file in found for file in pictures) > len(pictures):  # and not of some other table in there
            return Found(f"{name} in {len(files)} of its folders", found, {})
    if any(f.with_suffix(".txt").is_file() for f in pictures):
        said, broken = _texts_beside(pictures)
        return Found(".txt files", _made(said, "text", ".txt files", template), broken)
    said = {f: (f.parent.name.replace("_", " "),) for f in pictures if f.parent != folder}
    return Found("class folders", _made(said, "label", "class folders", template), {})


def _texts_beside(pictures: list[Path]) -> tuple[dict[Path, tuple[str, ...]], dict[Path, str]]:
    """The lines of the .txt files of pictures, and what is wrong with those that cannot be read."""
    said, broken = {}, {}
    for file in pictures:
        if (text := file.with_suffix(".txt")).is_file():
            try:
                said[file] = clean(read_text(text).splitlines())
            except ValueError as error:  # which names it
                broken[file] = str(error)
    return said, broken


def _made(
    said: dict[Path, tuple[str, ...]], name: str, where: str, template: Template | None
) -> dict[Path, tuple[str, ...]]:
    if not template:
        return said
    template.check([name], where)
    return {file: template({name: list(captions)}) for file, captions in said.items()}


def _read_metadata(file: Path, template: Template | None) -> dict[Path, tuple[str, ...]]:
    lines = io.StringIO(read_text(file), newline="")
    if file.suffix == ".csv":
        rows: list[tuple[int, dict]] = list(enumerate(csv.DictReader(lines), 2))
    else:
        rows = [(n, _json_object(line, file, n)) for n, line in enumerate(lines, 1) if line.strip()]
    if template:
        template.check({str(name) for _, row in rows for name in row}, file.name)
    found: dict[Path, tuple[str, ...]] = {}
    for number, row in rows:
        if not row.get("file_name") or not isinstance(row["file_name"], str):
            raise ValueError(f"{file}, line {number}: expected 'file_name' and 'text', got {sorted(map(str, row))}")
        captions = template(row) if template else captions_of(row, f"{file}, line {number}")
        picture = file.parent / row["file_name"]
        found[picture] = found.get(picture, ()) + captions
    return found


def read_text(file: Path) -> str:
    """ValueError where a file is not UTF-8."""
    return decoded(file.read_bytes(), str(file))


def decoded(text: bytes, name: str) -> str:
    """UTF-8; ValueError that names what is none."""
    try:
        return text.decode("utf-8-sig")  # some editors begin a file with a byte-order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 ({error}): save it as UTF-8") from None


def _json_object(line: str, file: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {number} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{file}, line {number}: expected a JSON object, got {line.strip()[:60]}")
    return row
