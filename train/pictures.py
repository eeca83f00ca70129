"""What every source of pictures shares: an example, what counts as a picture, how it becomes RGB, and hashes."""

import errno
import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from PIL import Image, UnidentifiedImageError

from pipelines.image import UNREADABLE, rgb

if TYPE_CHECKING:
    from train.hashes import FileHashes

PICTURES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"}
FOREIGN = {".heic", ".heif", ".jxl"}  # pictures, too, but Pillow by itself opens none of them
MAX_UNUSABLE = 0.05  # share of pictures without a caption, or broken, above which training is refused
FAILING = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.ECONNRESET}


class Example(NamedTuple):
    image: Image.Image  # RGB
    captions: tuple[str, ...]  # any of them may be used; the first is the canonical one
    key: str  # names the picture in messages


class Source(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...
    def picture_size(self, index: int) -> tuple[int, int]: ...  # (width, height), where it can be without decoding
    def fingerprint(self, hashes: "FileHashes | None" = None) -> str: ...  # hashes: of files, remembered


class Stored(NamedTuple):
    """A captioned picture as it lies in its file."""

    picture: bytes | None
    captions: tuple[str, ...]
    key: str

    def example(self) -> Example:
        """Decoded. Raises ValueError, which names the picture."""
        if self.picture is None:
            raise ValueError(f"{self.key}: no picture in this row")
        try:
            with Image.open(io.BytesIO(self.picture)) as image:
                return Example(rgb(image), self.captions, self.key)
        except UNREADABLE as error:
            raise ValueError(f"{self.key}: {_plain(error)}") from None

    def size(self) -> tuple[int, int]:
        """(width, height), from the header alone. Raises what `example` does."""
        if self.picture is None:
            raise ValueError(f"{self.key}: no picture in this row")
        try:
            with Image.open(io.BytesIO(self.picture)) as image:
                return upright_size(image)
        except UNREADABLE as error:
            raise ValueError(f"{self.key}: {_plain(error)}") from None


def _plain(error: Exception) -> str:
    """Without the address in memory that Pillow gives bytes for a name."""
    return "no picture in a format that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)


class FailingDisk(RuntimeError):
    """On its way no ValueError, which would be taken for a broken picture; `train.data.failures_named` makes it one."""


def refuse_failing_disk(error: Exception, key: str) -> None:
    """FailingDisk for what says nothing of the picture: it would be remembered as broken and left out for good."""
    if isinstance(error, OSError) and error.errno in FAILING:
        raise FailingDisk(
            f"{key} could not be read ({error}): the disk, the network or the number of open files. Nothing is wrong "
            "with the picture as far as is known; once that is mended, type the same command again"
        ) from error


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) once it is turned as its EXIF data says; nothing is decoded."""
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else image.size


def refuse_numbers(source: Source) -> None:
    """ValueError where --data says how often pictures come, but who reads them takes each once."""
    if any(number != 1 for number in getattr(source, "numbers", ())):
        raise ValueError("--data: a number before a source (20*mine/) is for train/ldm.py; leave it out here")


def digest(*parts: str | bytes) -> str:
    """What names a cache: a hash of everything that decides what lies in it."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part.encode() if isinstance(part, str) else part)
        hashed.update(b"\0")
    return hashed.hexdigest()[:24]


def file_hash(file: Path) -> str:
    """SHA-256 of what it holds, in hexadecimal digits."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
