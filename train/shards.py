"""Sets that are read from one end to the other: parquet files and tars, local or remote, and sets of the hub.

Nothing is copied to the disk, and a file is opened when its turn comes. Remote paths are whatever `datasets` opens
(fsspec is below it): https://…, s3://…, hf://….
"""

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from train.captions import Template
from train.pictures import Stored, digest
from train.sources import HUB, expand, is_remote, refuse_several_splits, shards_in
from train.tables import Columns, find_columns, has_pictures, row_of
from train.tars import samples, tar_captions

COMMIT = re.compile(r"@[0-9a-f]{40}(?=/)")  # in the name of a file of the hub
READ = 256  # rows of a parquet file that are in memory at once

Place = list[int]  # where in a file a row begins: [row group, row] of parquet, [byte] of a tar; [] is the beginning


@dataclass
class Shards:
    """The files of a set, each an endless source of rows for who reads it again."""

    name: str
    files: list[str]
    template: Template | None = None
    bare: bool = False  # captions are not read: all are the empty one
    columns: Columns | None = field(init=False, default=None)  # of parquet files
    table: Any = field(init=False, default=None)  # of parquet files: datasets.IterableDataset, a shard for each

    def __post_init__(self) -> None:
        with naming(self.files[0]):
            if self.files[0].endswith(".parquet"):
                self.columns = find_columns(
                    _table(self.files[:1], None).features, self.files[0], self.template, bare=self.bare
                )
                self.table = _table(self.files, [self.columns.image, *self.columns.used])
            elif self.template:
                with _opened(self.files[0]) as opened:
                    some = itertools.islice(samples(opened, self.files[0]), 16)
                    self.template.check({name for sample in some for name in sample.fields}, self.files[0])

    @property
    def origin(self) -> str:
        said = self.columns.origin if self.columns else ".txt and .json files in tars"
        return f"{said}, a stream of {len(self.files):,} file(s)"

    @property
    def classes(self) -> list[str] | None:
        """The names of all classes, where captions are such names and the first file's table lists them."""
        return self.columns.classes.get(self.columns.text) if self.columns else None

    @property
    def on_disk(self) -> bool:
        """Whether all files are on this machine, so that they can be read whole."""
        return not any(is_remote(file) for file in self.files)

    def fingerprint(self) -> str:
        """Of the names of the files, and of what is taken from them; a set of the hub stays itself when its owner
        changes a sentence of its card, and the commit in the names is another."""
        return digest(*(COMMIT.sub("", name) for name in (self.origin, *self.files)))

    def rows(self, file: int, place: Place) -> Iterator[tuple[Stored, Place]]:
        """The rows of a file from `place` on, each with where it begins. Raises ValueError, which names the file."""
        with naming(self.files[file]):
            yield from self._parquet_rows(file, place) if self.columns else self._tar_rows(self.files[file], place)

    def _tar_rows(self, name: str, place: Place) -> Iterator[tuple[Stored, Place]]:
        with _opened(name) as opened:
            for sample in samples(opened, name, *place):
                if sample.picture is None:
                    continue
                begin, length = sample.picture
                opened.seek(begin)
                try:
                    captions = ("",) if self.bare else tar_captions(sample, name, self.template)
                except ValueError:  # of one among millions: counted as one without a caption
                    captions = ()
                yield Stored(opened.read(length), captions, f"{name}: {sample.key}"), [sample.begin]

    def _parquet_rows(self, file: int, place: Place) -> Iterator[tuple[Stored, Place]]:
        assert self.columns
        groups = self.table.shard(len(self.files), file).reshard().with_format("arrow")
        first, skipped = place or (0, 0)
        for group in range(first, groups.num_shards):
            row = 0
            for part in groups.shard(groups.num_shards, group).iter(READ):
                if row + len(part) > skipped:
                    for values in part.slice(max(0, skipped - row)).to_pylist():
                        number = max(row, skipped)
                        key = f"{self.files[file]}: row {number} of group {group}"
                        yield row_of(values, self.columns, key), [group, number]
                        row, skipped = number + 1, 0
                else:
                    row += len(part)
            skipped = 0


@contextmanager
def naming(file: str) -> Iterator[None]:
    """ValueError, which names the file and says what to do, for what goes wrong while it is read: it is gone, broken or
    out of reach, after as many tries as `datasets` makes."""
    try:
        yield
    except ImportError as error:  # of what fsspec needs for this kind of path
        raise ValueError(f"--data {file!r}: {error}: install what it names with pip") from None
    except Exception as error:
        if isinstance(error, ValueError) and file in str(error):
            raise
        if is_remote(file):  # whatever the network, and who speaks with it, bring up
            do = "see that it is there and can be reached"
        elif isinstance(error, FileNotFoundError):
            do = "put it back where it was"
        elif isinstance(error, OSError | ValueError):
            do = "see that a whole file is in its place, and may be read"
        else:
            raise
        raise ValueError(
            f"{file} cannot be read ({type(error).__name__}: {error}): {do}, and type the same command again: a "
            "training goes on from its last checkpoint"
        ) from None


def _opened(name: str) -> IO[bytes]:
    from datasets.utils.file_utils import xopen

    return xopen(name, "rb")


def _table(files: list[str], columns: list[str] | None) -> Any:
    import datasets

    return datasets.load_dataset(
        "parquet", data_files=files, split="train", streaming=True, batch_size=READ, columns=columns
    )


def open_shards(data: str, template: str = "", *, captions: bool = True) -> Shards:
    """What one part of `--data` names, as a stream. captions: as of `train.sources.open_source`.

    Raises ValueError where it is nothing that can be streamed."""
    made = Template(template) if template else None
    files = _listed(data)
    kinds = {Path(file).suffix for file in files}
    if len(kinds) != 1 or not kinds <= {".parquet", ".tar"}:
        raise ValueError(
            f"--data {data!r} cannot be streamed: expected .parquet files or .tar files, a folder of either, or a set "
            f"of the hub that is made of them; found {', '.join(sorted(kinds)) or 'none'}. Leave out --streaming for "
            "other local data"
        )
    return Shards(data, files, made, not captions)


def _listed(data: str) -> list[str]:
    import datasets
    from datasets.data_files import resolve_pattern

    path = Path(data).expanduser()
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        here, packed = shards_in(path)
        return [str(f) for f in (here if here and (not packed or has_pictures(here[0])) else packed)]
    if (files := expand(data)) != [data] or Path(data).suffix in (".parquet", ".tar"):
        missing = [f for f in files if not is_remote(f) and not Path(f).expanduser().is_file()]
        if missing:
            raise ValueError(f"--data {data!r}: {len(missing)} of {len(files)} files are not there, first {missing[0]}")
        return files
    try:
        if is_remote(data):
            found = resolve_pattern(data.rstrip("/") + "/*", "")
            tables, tars = (sorted(f for f in found if f.endswith(ending)) for ending in (".parquet", ".tar"))
            refuse_several_splits(tables)
            refuse_several_splits(tars)
            return tables or tars
        if HUB.fullmatch(data):
            name, _, split = data.partition(":")
            every = datasets.load_dataset_builder(name).config.data_files or {}
            if (split or "train") not in every:
                raise ValueError(f"its splits are {', '.join(map(str, every)) or 'unknown'}: name one as {name}:SPLIT")
            return [str(f) for f in every[split or "train"]]
    except Exception as error:  # whatever the network, the hub or the path's kind bring up
        raise ValueError(f"--data {data!r} cannot be opened: {type(error).__name__}: {error}") from None
    raise ValueError(f"--data {data!r} does not exist: expected .parquet or .tar files, a folder of them, or a hub set")
