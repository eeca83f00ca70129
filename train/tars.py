"""WebDataset tars: files one after the other that share a name up to its first dot are one example."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from train.captions import Template, captions_of, clean
from train.folders import decoded
from train.hashes import FileHashes
from train.pictures import MAX_UNUSABLE, PICTURES, Example, Stored, digest


class Sample(NamedTuple):
    """One example of a tar."""

    key: str
    begin: int  # where its first file's header is, in bytes
    picture: tuple[int, int] | None  # where its picture is: (begin, bytes)
    fields: dict[str, Any]  # of its .json file, and its .txt file's lines as "text"
    broken: str = ""  # what is wrong with these


def samples(file: IO[bytes], name: str, begin: int = 0) -> Iterator[Sample]:
    """The examples of an uncompressed tar from byte `begin` on, where one begins. Raises ValueError for what is no tar,
    or broken."""
    file.seek(begin)
    sample: Sample | None = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # which would grow with the tar
                path = PurePosixPath(member.name)
                if not member.isfile() or path.name.startswith("."):
                    continue
                stem, _, ending = path.name.partition(".")
                key = str(path.with_name(stem))
                if sample is None or sample.key != key:
                    if sample:
                        yield sample
                    sample = Sample(key, member.offset, None, {})
                sample = _with(sample, f".{ending}".lower(), member, file, name)
    except tarfile.TarError as error:
        raise ValueError(f"{name} cannot be read as an uncompressed tar: {error}") from None
    if sample:
        yield sample


def _with(sample: Sample, ending: str, member: tarfile.TarInfo, file: IO[bytes], name: str) -> Sample:
    if "." + ending.rpartition(".")[2] in PICTURES:
        return sample if sample.picture else sample._replace(picture=(member.offset_data, member.size))
    if ending not in (".txt", ".json"):
        return sample
    file.seek(member.offset_data)
    try:
        text = decoded(file.read(member.size), f"{name}: {member.name}")
        fields = _json(text, f"{name}: {member.name}") if ending == ".json" else {}
    except ValueError as error:
        return sample._replace(broken=str(error))
    if ending == ".txt":
        return sample._replace(fields=sample.fields | {"text": list(clean(text.splitlines()))})
    return sample._replace(fields=fields | sample.fields)  # of two captions, that of the .txt file


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected a JSON object, got {text.strip()[:60]}")
    return fields


def tar_captions(sample: Sample, name: str, template: Template | None) -> tuple[str, ...]:
    """Raises ValueError for texts that can't be read."""
    if sample.broken:
        raise ValueError(sample.broken)
    return template(sample.fields) if template else captions_of(sample.fields, f"{name}: {sample.key}")


@dataclass
class TarSource:
    """The examples of tars on this machine's disk: indexed once, each picture read where it lies."""

    files: list[Path]
    where: list[tuple[int, int, int]]  # of each picture: file, begin, bytes
    captions: list[tuple[str, ...]]
    keys: list[str]
    origin: str = ".txt and .json files in tars"
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.where)

    def row(self, index: int) -> Stored:
        file, begin, length = self.where[index]
        with open(self.files[file], "rb") as opened:
            opened.seek(begin)
            return Stored(opened.read(length), self.captions[index], self.keys[index])

    def __getitem__(self, index: int) -> Example:
        return self.row(index).example()

    def picture_size(self, index: int) -> tuple[int, int]:
        """(width, height), from the header alone."""
        return self.row(index).size()

    def fingerprint(self, hashes: FileHashes | None = None) -> str:
        return digest(json.dumps(self.captions), *(hashes or FileHashes()).of(self.files))


def open_tars(files: list[Path], template: Template | None = None, *, bare: bool = False) -> TarSource:
    """Tars as one set; ValueError where too many examples lack a caption, or a picture. bare: captions are not read."""
    where, captions, keys, unusable, total, pictures = [], [], [], [], 0, 0
    there: set[str] = set()
    for number, file in enumerate(files):
        with open(file, "rb") as opened:
            for sample in samples(opened, str(file)):
                if sample.picture is None and not (sample.fields or sample.broken):
                    continue
                total += 1
                there |= sample.fields.keys()
                key = f"{file}: {sample.key}"
                if sample.picture is None:
                    unusable.append(f"no picture: {key}")
                    continue
                pictures += 1
                try:
                    said = ("",) if bare else tar_captions(sample, str(file), template)
                except ValueError as error:  # which names it
                    unusable.append(str(error))
                    continue
                if not said:
                    unusable.append(f"no caption: {key}")
                    continue
                where.append((number, *sample.picture))
                captions.append(said)
                keys.append(key)
    if not pictures:
        raise ValueError(f"no pictures in {files[0]}: expected files ending in {', '.join(sorted(PICTURES))}")
    if template:
        template.check(there, str(files[0]))
    if len(unusable) > MAX_UNUSABLE * total:
        raise ValueError(
            f"{len(unusable)} of {total} examples in {files[0].parent} have no picture or no caption that is read (at "
            f"most {MAX_UNUSABLE:.0%} may), for instance {unusable[0]}: expected files ending in "
            f"{', '.join(sorted(PICTURES))}, and a .txt or a .json file with a field 'text' beside each"
        )
    return TarSource(files, where, captions, keys, notes=unusable)
