"""Rows of tables, which are parquet files or sets of the Hugging Face hub: columns are found by their types."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.captions import NAMES, Template, clean
from train.hashes import FileHashes
from train.pictures import Example, Stored, digest


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are used."""

    image: str
    text: str  # the column of the captions; "" with a template
    classes: dict[str, list[str]]  # columns of class numbers -> the names of the classes
    template: Template | None = None
    bare: bool = False  # captions are not read: all are the empty one

    @property
    def used(self) -> list[str]:
        return [] if self.bare else [*(self.template.names if self.template else [self.text])]

    @property
    def origin(self) -> str:
        if self.template:
            return f"column {self.image!r} and the template {self.template.template!r}"
        if self.bare:
            return f"column {self.image!r} alone"
        return f"columns {self.image!r} and {self.text!r}" + (" as text" if self.text in self.classes else "")

    def captions(self, row: dict[str, Any]) -> tuple[str, ...]:
        if self.bare:
            return ("",)
        named = {name: self._named(name, row[name]) for name in self.used}
        if self.template:
            return self.template(named)
        text = named[self.text]
        return clean([text] if isinstance(text, str) else text or [])

    def _named(self, name: str, value: Any) -> Any:
        if name not in self.classes:
            return value
        return self.classes[name][value] if value is not None and value >= 0 else None


def find_columns(features: Any, where: str, template: Template | None = None, *, bare: bool = False) -> Columns:
    """features: `datasets.Features`. ValueError, which names the columns, where that of pictures or texts is missing.

    bare: texts are not read."""
    import datasets

    images = [n for n, f in features.items() if isinstance(f, datasets.Image) or _image_struct(f)]
    texts = [n for n, f in features.items() if _is_text(f)]
    classes = {n: f.names for n, f in features.items() if isinstance(f, datasets.ClassLabel)}
    if images and bare:
        return Columns(images[0], "", {}, bare=True)
    if images and template:
        template.check([n for n in features if n not in images], where)
        return Columns(images[0], "", classes, template)
    texts.sort(key=lambda n: NAMES.index(n) if n in NAMES else len(NAMES))
    texts = texts or list(classes)  # MNIST and CIFAR-10 as most have them: the names of the classes are captions
    if not images or not texts:
        kinds = ", ".join(f"{n}: {f}" for n, f in features.items())
        raise ValueError(f"{where} needs a column of pictures and one of texts or classes; its columns are {kinds}")
    return Columns(images[0], texts[0], classes)


def has_pictures(file: Path) -> bool:
    """Whether a parquet file has a column of pictures; True where it cannot be read, as is said where it is opened."""
    import datasets

    try:
        features = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True).features
    except (OSError, ValueError):
        return True
    return not features or any(isinstance(f, datasets.Image) or _image_struct(f) for f in features.values())


@dataclass
class ParquetSource:
    """Rows of a table on this machine's disk."""

    rows: Any  # datasets.Dataset, whose pictures stay undecoded
    columns: Columns
    files: list[Path]  # that decide what it holds
    where: str  # what messages call it: rows of several files are counted through
    notes: list[str] = field(default_factory=list)

    @property
    def origin(self) -> str:
        return self.columns.origin

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return row_of(self.rows[index], self.columns, f"{self.where}: row {index}").example()

    def picture_size(self, index: int) -> tuple[int, int]:
        """(width, height), from the header alone."""
        return row_of(self.rows[index], self.columns, f"{self.where}: row {index}").size()

    def first_captions(self) -> set[str]:
        """The distinct canonical captions, without a look at the pictures."""
        said = self.rows.select_columns(self.columns.used)
        groups = (self.columns.captions(row) for row in said)
        return {captions[0] for captions in groups if captions}

    def fingerprint(self, hashes: FileHashes | None = None) -> str:
        return digest(self.columns.origin, *(hashes or FileHashes()).of(self.files))


def open_parquet(files: list[Path], template: Template | None = None, *, bare: bool = False) -> ParquetSource:
    """Parquet files of one folder, as one set."""
    import datasets

    try:
        rows = datasets.load_dataset("parquet", data_files=[str(f) for f in files], split="train")
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        raise ValueError(f"cannot read {files[0]} as parquet: {error.__cause__ or error}") from None
    where = str(files[0]) + (f" to {files[-1].name}" if len(files) > 1 else "")
    return source_of(rows, where, files, template, bare)


def open_hub(name: str, split: str, template: Template | None = None, *, bare: bool = False) -> ParquetSource:
    """A set of the Hugging Face hub, downloaded to the cache of `datasets`."""
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # whatever the network, the hub or the set's own files bring up
        raise ValueError(
            f"--data {name!r} is nothing on this machine, and as a data set of the hub (split {split!r}) it cannot be "
            f"loaded: {type(error).__name__}: {error}"
        ) from None
    return source_of(rows, f"{name}:{split}", [Path(f["filename"]) for f in rows.cache_files], template, bare)


def source_of(rows: Any, where: str, files: list[Path], template: Template | None, bare: bool) -> ParquetSource:
    """A table of `datasets`, with its columns found; ValueError where it has none of pictures, or no rows."""
    import datasets

    if not len(rows):
        raise ValueError(f"{where} holds no rows")
    columns = find_columns(rows.features, where, template, bare=bare)
    return ParquetSource(rows.cast_column(columns.image, datasets.Image(decode=False)), columns, files, where)


def row_of(row: dict[str, Any], columns: Columns, key: str) -> Stored:
    """Of a row as it lies in the file: pictures as bytes, or as a struct that holds them."""
    picture = row[columns.image]
    if isinstance(picture, dict):
        stored, path = picture["bytes"], picture.get("path")
        picture = Path(path).read_bytes() if stored is None and path and Path(path).is_file() else stored
    return Stored(picture, columns.captions(row), key)


def _image_struct(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _is_text(feature: Any) -> bool:
    kind = getattr(feature, "feature", feature)  # a list of texts is several captions
    return getattr(kind, "dtype", None) in ("string", "large_string")
