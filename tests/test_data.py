"""Pictures and captions: every way in, and what is said of everything that is wrong with them."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.sets import fill, metadata, png, said, truncate, write_parquet, write_tar
from train.data import read_pictures
from train.shards import open_shards
from train.sources import describe, open_source

pytestmark = pytest.mark.usefixtures("own_datasets_cache")


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


def test_captions_of_folders_below(tmp_path: Path) -> None:
    """A folder for each split with a metadata file of its own, as `datasets` has them; one on top speaks for all."""
    for split in ("train", "test"):
        metadata(fill(tmp_path / split, 2), *({"file_name": f"{i}.png", "text": f"{split} {i}"} for i in range(2)))
    source = open_source(str(tmp_path), 8)
    assert said(source) == [("test 0",), ("test 1",), ("train 0",), ("train 1",)]
    assert "metadata.jsonl in 2 of its folders" in describe(source, 8)
    metadata(tmp_path, *({"file_name": f"{s}/{i}.png", "text": "on top"} for s in ("test", "train") for i in range(2)))
    assert said(open_source(str(tmp_path), 8)) == [("on top",)] * 4


def test_another_table_among_class_folders_says_nothing(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        fill(tmp_path / name, 3)
    metadata(tmp_path / "cat", {"file_name": "0.png", "text": "of something else"})
    assert said(open_source(str(tmp_path), 8)) == [("cat",)] * 3 + [("dog",)] * 3


def test_formats_that_are_not_read_are_named(tmp_path: Path) -> None:
    (fill(tmp_path, 3) / "0.png").rename(tmp_path / "0.HEIC")
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    source = open_source(str(tmp_path), 8)
    assert said(source) == [("number 1",), ("number 2",)]
    assert f"left out, a format that is not read (convert it to JPEG or PNG): {tmp_path / '0.HEIC'}" in describe(
        source, 8
    )
    for i in (1, 2):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(ValueError, match=r"no pictures in .* left out, a format that is not read .*0\.HEIC"):
        open_source(str(tmp_path), 8)


def test_captions_can_be_done_without(tmp_path: Path) -> None:
    """In every kind of source; those that are there are not read."""
    (fill(tmp_path / "folder", 3) / "1.txt").write_text("a number")
    for name in "ab":
        (tmp_path / name).mkdir()
    write_parquet(tmp_path / "a" / "bare.parquet", image=[png(), png("blue")])
    write_parquet(tmp_path / "b" / "some.parquet", image=[png(), png("blue")], text=["red", None])
    write_tar(tmp_path / "tar" / "0.tar", ("0.png", png()), ("1.png", png("blue")), ("1.txt", b"blue"))
    for name, found in (
        ("folder", 3),
        ("a/bare.parquet", 2),
        ("b/some.parquet", 2),
        ("tar/0.tar", 2),
    ):
        source = open_source(str(tmp_path / name), 8, captions=False)
        assert said(source) == [("",)] * found
        assert len(read_pictures(source, 8, tmp_path / "cache", workers=0, progress=False).keys) == found
        with pytest.raises(ValueError, match=r"caption|texts or classes|cannot be used"):
            read_pictures(open_source(str(tmp_path / name), 8), 8, tmp_path / "cache", workers=0, progress=False)
        if name != "folder":
            shards = open_shards(str(tmp_path / name), captions=False)
            assert [row.captions for row, _ in shards.rows(0, [])] == [("",)] * found


def test_a_disk_without_room_is_named_before_anything_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fill(tmp_path, 1) / "0.txt").write_text("a")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=8 * 8 * 3 - 1))
    with pytest.raises(ValueError, match=r"the decoded pictures need 0 MB, .*name another place with --cache"):
        read_pictures(open_source(str(tmp_path), 8), 8, tmp_path / "cache", workers=0, progress=False)
    assert not list((tmp_path / "cache").glob("pixels-*"))


def test_all_kinds_of_files_are_found(tmp_path: Path) -> None:
    for name in ("a.PNG", "b.jpg", "c.webp", "d.bmp", "e.gif", "f.tiff"):
        Image.new("RGB", (4, 4), "blue").save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(name)
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / ".thumbnails").mkdir()
    Image.new("RGB", (4, 4), "red").save(tmp_path / ".thumbnails" / "a.png")
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


def test_a_text_among_many_may_be_unreadable(tmp_path: Path) -> None:
    for i in range(20):
        (fill(tmp_path, 20) / f"{i}.txt").write_text("red")
    (tmp_path / "7.txt").write_text("un œuf", encoding="cp1252")
    source = open_source(str(tmp_path), 8)
    assert len(source) == 19
    assert "7.txt is not UTF-8" in describe(source, 8)


def test_files_of_several_splits_are_not_taken_for_one_set(tmp_path: Path) -> None:
    for name in ("train-0.parquet", "train-1.parquet", "validation-0.parquet"):
        write_parquet(tmp_path / name, image=[png()], text=["red"])
    with pytest.raises(ValueError, match=r"train-0.parquet and .*validation-0.parquet.*/\{train-0,train-1\}.parquet"):
        open_source(str(tmp_path), 8)
    assert len(open_source(str(tmp_path / "{train-0,train-1}.parquet"), 8)) == 2
    (tmp_path / "train-1.parquet").unlink()
    with pytest.raises(ValueError, match=r"as .*/train-0.parquet"):
        open_source(str(tmp_path), 8)
    (tmp_path / "train-0.parquet").rename(tmp_path / "trained-0.parquet")  # no name of a split
    assert len(open_source(str(tmp_path), 8)) == 2


def test_tables_that_downloaders_leave_beside_pictures(tmp_path: Path) -> None:
    """As img2dataset writes them: addresses and captions, beside tars or folders of pictures."""
    write_parquet(tmp_path / "00000.parquet", url=["https://a"], caption=["red"])
    with pytest.raises(ValueError, match="needs a column of pictures"):
        open_source(str(tmp_path), 8)
    (fill(tmp_path / "00000", 1) / "0.txt").write_text("red")
    source = open_source(str(tmp_path), 8)
    assert said(source) == [("red",)]
    assert "without a column of pictures: 00000.parquet" in describe(source, 8)
    write_tar(tmp_path / "00000.tar", ("0.png", png()), ("0.txt", b"blue"))
    assert said(open_source(str(tmp_path), 8)) == [("blue",)]


def test_what_is_no_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for where, words in (
        (tmp_path / "empty", "no pictures in"),
        (tmp_path / "nothing", "does not exist: expected a folder"),
        (fill(tmp_path / "p", 1) / "0.png", "is a file but not .parquet or .tar"),
        (tmp_path / "p", "1 of 1 pictures .* have no caption"),
    ):
        with pytest.raises(ValueError, match=words):
            open_source(str(where), 8)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(ValueError, match=r"cannot read .*broken.parquet"):
        open_source(str(tmp_path / "broken.parquet"), 8)


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
