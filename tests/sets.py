"""Sets of pictures that tests write to the disk."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def png(colour: str = "red", size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "png")
    return file.getvalue()


def fill(folder: Path, count: int) -> Path:
    """`count` pictures of different content, 0.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (i, 100, 200)).save(folder / f"{i}.png")
    return folder


def metadata(folder: Path, *rows: dict) -> Path:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def truncate(file: Path) -> None:
    """Half of a large picture: its header is whole, its pixels are not."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def said(source) -> list[tuple[str, ...]]:
    return [source[i].captions for i in range(len(source))]


def write_parquet(file: Path, **columns: list) -> Path:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table(columns), file)
    return file


def write_tar(file: Path, *members: tuple[str, bytes]) -> Path:
    """A tar as WebDataset has it: members one after the other."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def numbered(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(file, "png")
    return file.getvalue()


def tars(folder: Path, files: int, rows: int, first: int = 0) -> Path:
    for f in range(files):
        members = []
        for i in range(first + f * rows, first + (f + 1) * rows):
            members += [(f"{i:05d}.png", numbered(i)), (f"{i:05d}.txt", f"number {i}".encode())]
        write_tar(folder / f"{f:03d}.tar", *members)
    return folder


def parquet(folder: Path, files: int, rows: int, group: int = 7) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir(parents=True, exist_ok=True)
    for f in range(files):
        numbers = range(f * rows, (f + 1) * rows)
        table = pa.table(
            {
                "image": [{"bytes": numbered(i), "path": None} for i in numbers],
                "text": [[f"number {i}", f"no. {i}"] for i in numbers],
            }
        )
        pq.write_table(table, folder / f"{f:03d}.parquet", row_group_size=group)
    return folder
