"""Pictures and captions: every way in, and what is said of everything that is wrong with them."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train.data import batch_indices, fit, generator, permutation, read, read_pictures, to_unit, written_aside
from train.sources import describe, open_source, rgb

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


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


# Folders


def test_metadata_lines_are_captions_and_repeated_ones_add_up(tmp_path: Path) -> None:
    metadata(
        fill(tmp_path, 4),
        {"file_name": "1.png", "text": "one"},
        {"file_name": "0.png", "text": " nought ", "other": 3},
        {"file_name": "./1.png", "caption": "a one"},
        {"file_name": "2.png", "prompt": "two"},
        {"file_name": "3.png", "text": ["three", "", "a three"]},
    )
    source = open_source(str(tmp_path), 8)
    assert said(source) == [("nought",), ("one", "a one"), ("two",), ("three", "a three")]
    assert [Path(source[i].key).name for i in range(4)] == ["0.png", "1.png", "2.png", "3.png"]
    assert source[2].image.getpixel((0, 0)) == (2, 100, 200)


def test_metadata_csv(tmp_path: Path) -> None:
    fill(tmp_path / "deep", 2)
    (tmp_path / "metadata.csv").write_text('file_name,text\ndeep/0.png,"a, b"\ndeep/1.png,c\ndeep/1.png,d\n')
    assert said(open_source(str(tmp_path), 8)) == [("a, b",), ("c", "d")]


def test_text_files_hold_one_caption_a_line(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    (tmp_path / "0.txt").write_text("first\n\n second \n")
    (tmp_path / "1.txt").write_text("Ölbild")
    assert said(open_source(str(tmp_path), 8)) == [("first", "second"), ("Ölbild",)]


def test_class_folders_name_their_pictures(tmp_path: Path) -> None:
    fill(tmp_path / "hot_dog", 2)
    fill(tmp_path / "cat", 1)
    assert said(open_source(str(tmp_path), 8)) == [("cat",), ("hot dog",), ("hot dog",)]


def test_precedence(tmp_path: Path) -> None:
    folder = fill(tmp_path / "all" / "class", 1).parent

    def found():
        return open_source(str(folder), 8)

    assert said(found()) == [("class",)]
    (folder / "class" / "0.txt").write_text("from txt")
    assert said(found()) == [("from txt",)]
    (folder / "metadata.csv").write_text("file_name,text\nclass/0.png,from csv\n")
    assert said(found()) == [("from csv",)]
    metadata(folder, {"file_name": "class/0.png", "text": "from jsonl"})
    assert said(found()) == [("from jsonl",)]
    write_parquet(folder / "rows.parquet", image=[png()], text=["from parquet"])
    assert said(found()) == [("from parquet",)]


def test_all_kinds_of_files_are_found(tmp_path: Path) -> None:
    for name in ("a.PNG", "b.jpg", "c.webp", "d.bmp", "e.gif", "f.tiff"):
        Image.new("RGB", (4, 4), "blue").save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(name)
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.md").write_text("no picture")
    source = open_source(str(tmp_path), 4)
    assert [c for (c,) in said(source)] == ["a.PNG", "b.jpg", "c.webp", "d.bmp", "e.gif", "f.tiff"]
    assert all(source[i].image.mode == "RGB" for i in range(len(source)))


def test_missing_captions_are_named_counted_and_past_a_share_refused(tmp_path: Path) -> None:
    fill(tmp_path, 40)
    for i in range(2, 40):
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    source = open_source(str(tmp_path), 8)  # 2 of 40 are 5%
    assert len(source) == 38
    text = describe(source, 8)
    assert f"no caption: {tmp_path / '0.png'}" in text
    assert f"no caption: {tmp_path / '1.png'}" in text
    (tmp_path / "7.txt").write_text("  \n")
    with pytest.raises(ValueError, match=rf"3 of 40 .*at most 5%.*{tmp_path / '0.png'}.*metadata.jsonl"):
        open_source(str(tmp_path), 8)


def test_what_the_metadata_names_but_is_not_there_is_said(tmp_path: Path) -> None:
    metadata(fill(tmp_path, 1), {"file_name": "0.png", "text": "a"}, {"file_name": "gone.png", "text": "b"})
    source = open_source(str(tmp_path), 8)
    assert len(source) == 1
    assert f"named in metadata.jsonl, but not there: {tmp_path / 'gone.png'}" in describe(source, 8)


def test_broken_pictures_are_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    metadata(fill(tmp_path, 40), *({"file_name": f"{i}.png", "text": f"number {i}"} for i in range(40)))
    truncate(tmp_path / "3.png")
    (tmp_path / "5.png").write_bytes(b"no picture at all")
    source = open_source(str(tmp_path), 8)
    pictures = read_pictures(source, 8, tmp_path / "cache", workers=0, progress=False)
    out = capsys.readouterr().out
    assert str(tmp_path / "3.png") in out
    assert str(tmp_path / "5.png") in out
    assert len(pictures.pixels) == len(pictures.captions) == 38
    for picture, (caption,) in zip(pictures.pixels, pictures.captions, strict=True):
        assert f"number {int(picture[0, 0, 0])}" == caption  # what is left keeps its own caption
    truncate(tmp_path / "39.png")
    with pytest.raises(ValueError, match=rf"3 of 40 .*at most 5%.*{tmp_path / '3.png'}"):
        read_pictures(open_source(str(tmp_path), 8), 8, tmp_path / "cache", workers=0, progress=False)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metadata.jsonl", '{"file_name": "0.png", "text": "a"}\n{"file_name": \n', "line 2 is not JSON"),
        ("metadata.jsonl", '\n["0.png", "a"]\n', "line 2: expected a JSON object"),
        ("metadata.jsonl", '{"image": "0.png", "text": "a"}\n', r"line 1: expected 'file_name' and 'text'.*image"),
        ("metadata.jsonl", '{"file_name": "0.png", "text": 5}\n', "line 1: .*5"),
        ("metadata.jsonl", '{"file_name": "0.png", "text": ["a", 5]}\n', "line 1: .*5"),
        ("metadata.jsonl", '{"file_name": 0, "text": "a"}\n', "line 1: .*file_name"),
        ("metadata.csv", "picture,text\n0.png,a\n", r"metadata.csv, line 2: expected 'file_name'.*picture"),
    ],
)
def test_bad_metadata_is_refused_with_its_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    (fill(tmp_path, 1) / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        open_source(str(tmp_path), 8)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "0.txt"])
def test_texts_may_begin_with_a_mark_and_must_be_utf8(tmp_path: Path, name: str) -> None:
    text = {
        "metadata.jsonl": '{"file_name": "0.png", "text": "un œuf"}\n',
        "metadata.csv": "file_name,text\n0.png,un œuf\n",
        "0.txt": "un œuf\n",
    }[name]
    file = fill(tmp_path, 1) / name
    file.write_text(text, encoding="utf-8-sig")
    assert said(open_source(str(tmp_path), 8)) == [("un œuf",)]
    file.write_text(text, encoding="cp1252")
    with pytest.raises(ValueError, match=rf"{name} is not UTF-8 .*save it as UTF-8"):
        open_source(str(tmp_path), 8)


def test_what_is_no_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for where, words in (
        (tmp_path / "empty", "no pictures in"),
        (tmp_path / "nothing", "does not exist: expected a folder"),
        (fill(tmp_path / "p", 1) / "0.png", "is a file but not .parquet"),
        (tmp_path / "p", "1 of 1 pictures .* have no caption"),
    ):
        with pytest.raises(ValueError, match=words):
            open_source(str(where), 8)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(ValueError, match=r"cannot read .*broken.parquet"):
        open_source(str(tmp_path / "broken.parquet"), 8)


# Parquet


def write_parquet(file: Path, **columns: list) -> Path:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table(columns), file)
    return file


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets copies what it reads: not into the home of whoever runs the tests."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


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
    assert "columns 'image' and 'label as text'" in describe(source, 8)


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
    assert "left out row 30: no caption" in out


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


# Drawn sets, and several sets


def test_drawn_sets_open_by_name() -> None:
    train, held_out = open_source("shapes", 16), open_source("shapes", 16, split="held_out")
    assert (len(train), len(held_out)) == (4096, 256)
    assert train[0].image.size == (16, 16)
    assert train.fingerprint() != held_out.fingerprint() != open_source("shapes", 32, split="held_out").fingerprint()
    with pytest.raises(ValueError, match="dragons"):
        open_source("pictograms:dragons", 16)


def test_plus_joins_sets(tmp_path: Path) -> None:
    a, b = fill(tmp_path / "a", 2), fill(tmp_path / "b", 3)
    for folder in (a, b):
        for file in folder.glob("*.png"):
            file.with_suffix(".txt").write_text(f"{folder.name} {file.stem}")
    both = open_source(f"{a}+{b}", 8)
    assert [c for (c,) in said(both)] == ["a 0", "a 1", "b 0", "b 1", "b 2"]
    assert both.fingerprint() != open_source(f"{b}+{a}", 8).fingerprint()
    assert describe(both, 8).startswith("5 pictures")
    with pytest.raises(ValueError, match="does not exist"):
        open_source(f"{a}+{tmp_path / 'c'}", 8)
    plus = fill(tmp_path / "a+b", 1)  # a folder whose name holds a plus is that folder
    (plus / "0.txt").write_text("plus")
    assert said(open_source(str(plus), 8)) == [("plus",)]


# Pictures


def test_exif_rotation(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10), "red")
    image.paste("blue", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter: what is on the left comes to the top
    image.save(tmp_path / "0.png", exif=exif)
    (tmp_path / "0.txt").write_text("turned")
    turned = open_source(str(tmp_path), 8)[0].image
    assert turned.size == (10, 20)
    assert turned.getpixel((5, 2)) == (0, 0, 255)
    assert turned.getpixel((5, 17)) == (255, 0, 0)


def test_transparency_lies_on_white_and_every_mode_becomes_rgb() -> None:
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 128))
    assert rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    assert rgb(clear).getpixel((1, 0)) == (255, 127, 127)
    assert rgb(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([0, 0, 255])
    assert rgb(palette).getpixel((0, 0)) == (0, 0, 255)
    palette.info["transparency"] = 0
    assert rgb(palette).getpixel((0, 0)) == (255, 255, 255)
    assert rgb(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert rgb(Image.new("CMYK", (1, 1), (0, 255, 255, 0))).getpixel((0, 0)) == (255, 0, 0)
    sixteen = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert np.asarray(rgb(sixteen))[0, :, 0].tolist() == [0, 128, 255]


def test_the_middle_square_is_kept() -> None:
    image = Image.new("RGB", (30, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    for picture in (image, image.transpose(Image.Transpose.ROTATE_90)):
        pixels = fit(picture, 10)
        assert pixels.shape == (10, 10, 3)
        assert (pixels == (0, 0, 255)).all()
    assert fit(Image.new("RGB", (7, 7), "red"), 16).shape == (16, 16, 3)
    unit = to_unit(torch.tensor([[[[0, 127, 255]]]], dtype=torch.uint8))
    assert unit.shape == (1, 3, 1, 1)
    torch.testing.assert_close(unit.flatten(), torch.tensor([-1.0, -1 / 255, 1.0]))


def test_describe_shows_three_rows(tmp_path: Path) -> None:
    rows = [{"file_name": f"{i}.png", "text": f"number {i}"} for i in range(9)]
    metadata(fill(tmp_path, 9), *rows, {"file_name": "8.png", "text": "another"})
    Image.new("RGB", (12, 8)).save(tmp_path / "4.png")
    lines = describe(open_source(str(tmp_path), 6), 6).splitlines()
    assert lines[0] == "9 pictures, captions: metadata.jsonl"
    assert len(lines) == 4
    for line, number in zip(lines[1:], (0, 4, 8), strict=True):
        assert f"{number}.png" in line
        assert f"number {number}" in line
        assert "resized to 6" in line
    assert "12×8, cropped to the middle 8×8" in lines[2]
    assert "+1 more captions" in lines[3]
    truncate(tmp_path / "0.png")
    assert "broken" in describe(open_source(str(tmp_path), 6), 6).splitlines()[1]


# The cache of pictures


def test_pictures_are_read_once(picture_folder: Path, tmp_path: Path) -> None:
    source = open_source(str(picture_folder), 8)
    first = read_pictures(source, 8, tmp_path / "cache", workers=0, progress=False)
    assert first.pixels.shape == (8, 8, 8, 3)
    assert first.captions[2] == ("a blue square",)
    assert first.pixels[2].float().mean((0, 1)).tolist() == [0, 0, 255]
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    assert len(files) == 2
    again = read_pictures(open_source(str(picture_folder), 8), 8, tmp_path / "cache", workers=0, progress=False)
    assert again.pixels.equal(first.pixels)
    assert again[1:] == first[1:]
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    assert read_pictures(source, 4, tmp_path / "cache", workers=0, progress=False).pixels.shape == (8, 4, 4, 3)


def test_changed_pictures_and_captions_are_read_anew(picture_folder: Path, tmp_path: Path) -> None:
    def read():
        return read_pictures(open_source(str(picture_folder), 8), 8, tmp_path / "cache", workers=0, progress=False)

    read()
    Image.new("RGB", (16, 16), "lime").save(picture_folder / "0.png")
    assert read().pixels[0].float().mean((0, 1)).tolist() == [0, 255, 0]
    lines = (picture_folder / "metadata.jsonl").read_text()
    (picture_folder / "metadata.jsonl").write_text(lines.replace("a red", "a lime green"))
    assert read().captions[0] == ("a lime green square",)


@pytest.mark.parametrize("error", [EOFError("end"), struct.error("short"), zlib.error("bad")])
def test_errors_of_decoders_break_one_picture(error: Exception) -> None:
    class Failing:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int):
            raise error

    ((loaded,),) = read(Failing(), 8, range(1), batch=1, workers=0, progress=None)  # type: ignore[arg-type]
    assert (loaded.pixels, loaded.error) == (None, str(error))


def test_two_writers_of_one_file_write_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cache.json"
    with written_aside(file) as one:
        one.write_text("one")
        monkeypatch.setenv("RANK", "1")
        with written_aside(file) as other:
            other.write_text("other")
            assert not file.exists()
        assert file.read_text() == "other"
    assert file.read_text() == "one"
    with pytest.raises(TypeError), written_aside(file) as partial:
        partial.write_text(partial.touch())  # type: ignore[func-returns-value, arg-type]
    assert [f.name for f in tmp_path.iterdir()] == ["cache.json"]
    assert file.read_text() == "one"


def test_a_killed_reading_leaves_nothing_that_counts(
    picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(picture_folder), 8)
    whole = type(source).__getitem__

    def killed(self, index: int):
        if index == 5:
            raise KeyboardInterrupt
        return whole(self, index)

    monkeypatch.setattr(type(source), "__getitem__", killed)
    with pytest.raises(KeyboardInterrupt):
        read_pictures(source, 8, tmp_path / "cache", workers=0, progress=False)
    monkeypatch.undo()
    pictures = read_pictures(source, 8, tmp_path / "cache", workers=0, progress=False)
    assert pictures.pixels[7].float().mean((0, 1)).tolist() == [255, 165, 0]


# Order and randomness


def test_every_epoch_is_a_permutation_and_a_function_of_seed_and_epoch() -> None:
    count, size = 10, 4
    seen = torch.cat([batch_indices(count, 7, start, size) for start in range(0, 3 * count, size)])[: 3 * count]
    epochs = seen.view(3, count)
    for epoch in range(3):
        assert epochs[epoch].sort().values.equal(torch.arange(count))
        assert epochs[epoch].equal(permutation(count, 7, epoch))
    assert not epochs[0].equal(epochs[1])
    assert not permutation(count, 7, 0).equal(permutation(count, 8, 0))
    # From any start and in batches of any size, the same: also one batch over several epochs.
    assert batch_indices(count, 7, 3, 25).equal(seen[3:28])
    assert torch.cat([batch_indices(count, 7, 16, 2), batch_indices(count, 7, 18, 2)]).equal(seen[16:20])


def test_generators_are_functions_of_their_numbers() -> None:
    state = torch.get_rng_state()
    draws = {numbers: torch.rand(4, generator=generator(*numbers)) for numbers in ((0, 1), (1, 0), (0, 1, 0), (0,))}
    assert torch.rand(4, generator=generator(0, 1)).equal(draws[0, 1])
    assert len({tuple(d.tolist()) for d in draws.values()}) == 4
    assert torch.get_rng_state().equal(state)  # the global one is left alone
