"""Tables: which columns are taken for pictures and captions, and what rows lack."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.sets import png, said, write_parquet
from train.data import read_pictures
from train.sources import describe, open_source

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def test_parquet_written_by_datasets(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {
            "source": datasets.Value("int64"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "photo": datasets.Image(),
            "words": datasets.Value("string"),
        }
    )
    rows = {
        "source": [1, 2],
        "label": [0, 1],
        "photo": [Image.new("L", (6, 4), 9), Image.new("RGB", (8, 8), "lime")],
        "words": ["grey", "green"],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"), 8)
    assert said(source) == [("grey",), ("green",)]
    assert source[0].image.size == (6, 4)
    assert source[0].image.getpixel((0, 0)) == (9, 9, 9)
    assert source[1].image.getpixel((0, 0)) == (0, 255, 0)
    assert "columns 'photo' and 'words'" in describe(source, 8)


def test_names_of_classes_are_captions_where_there_are_no_texts(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"label": datasets.ClassLabel(names=["cat", "dog"]), "image": datasets.Image()})
    rows = {"label": [1, 0, -1], "image": [Image.new("RGB", (8, 8), c) for c in ("red", "lime", "blue")]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"), 8)
    assert said(source) == [("dog",), ("cat",), ()]  # -1 is no class
    assert source[1].image.getpixel((0, 0)) == (0, 255, 0)
    assert "columns 'image' and 'label' as text" in describe(source, 8)


@pytest.mark.parametrize("images", ["struct", "binary"])
def test_parquet_columns_are_found_by_type(tmp_path: Path, images: str) -> None:
    data = [png("red"), png("blue")]
    file = write_parquet(
        tmp_path / "rows.parquet",
        url=["http://1", "http://2"],  # texts too, but "caption" goes before
        width=[8, 8],
        data=data if images == "binary" else [{"bytes": d, "path": None} for d in data],
        caption=[["red", "a red one"], ["blue"]],
    )
    source = open_source(str(file), 8)
    assert said(source) == [("red", "a red one"), ("blue",)]
    assert source[1].image.getpixel((0, 0)) == (0, 0, 255)


def test_parquet_without_pictures_or_texts_names_its_columns(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", number=[1], words=["a"])
    with pytest.raises(ValueError, match=r"needs a column of pictures.*number.*words"):
        open_source(str(file), 8)
    file = write_parquet(tmp_path / "b.parquet", image=[png()], label=[3])
    with pytest.raises(ValueError, match=r"one of texts.*image.*label"):
        open_source(str(file), 8)


def test_parquet_rows_that_lack_something_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    n = 60
    images: list[bytes | None] = [png() for _ in range(n)]
    texts: list[str | None] = [f"number {i}" for i in range(n)]
    images[10], images[20], texts[30] = None, b"nothing", None
    file = write_parquet(tmp_path / "a.parquet", image=images, text=texts)
    pictures = read_pictures(open_source(str(file), 8), 8, tmp_path / "cache", workers=0, progress=False)
    assert [c for (c,) in pictures.captions] == [f"number {i}" for i in range(n) if i not in (10, 20, 30)]
    out = capsys.readouterr().out
    assert "left out picture 10" in out
    assert "left out picture 20" in out
    assert f"left out {file}: row 30: no caption" in out


def test_parquet_files_of_a_folder_are_one_set(tmp_path: Path) -> None:
    write_parquet(tmp_path / "0.parquet", image=[png()], text=["a"])
    write_parquet(tmp_path / "1.parquet", image=[png()], text=["b"])
    assert said(open_source(str(tmp_path), 8)) == [("a",), ("b",)]
    assert len(open_source(str(tmp_path / "1.parquet"), 8)) == 1


@pytest.mark.parametrize(
    ("name", "rows", "side", "words"),
    [("mnist-test", 10_000, 28, "the handwritten digit"), ("cifar10-test", 10_000, 32, "a photo of a")],
)
def test_real_sets_open(name: str, rows: int, side: int, words: str) -> None:
    file = REAL / f"{name}.parquet"
    if not file.is_file():
        pytest.skip(f"{file.name} is not on this machine")
    source = open_source(str(file), 32)
    assert len(source) == rows
    for i in (0, rows - 1):
        image, captions, _ = source[i]
        assert (image.mode, image.size) == ("RGB", (side, side))
        assert captions[0].startswith(words)
        assert np.asarray(image).std() > 5
    assert describe(source, 32).count("resized to 32") == 3
