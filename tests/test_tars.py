"""WebDataset tars and patterns of shards; sets of the hub; captions from templates and tags."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from tests.sets import fill, metadata, png, said, write_parquet, write_tar
from train.captions import Template, choose
from train.sources import describe, expand, first_captions, open_source, split_parts
from train.tars import samples

pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def jpeg(value: int = 9, size: tuple[int, int] = (12, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, "jpeg", quality=100)
    return file.getvalue()


def shard(file: Path, first: int, count: int) -> Path:
    members = []
    for i in range(first, first + count):
        members += [(f"{i:04d}.jpg", jpeg(i)), (f"{i:04d}.txt", f"number {i}".encode())]
    return write_tar(file, *members)


def test_a_tar_of_every_kind_of_member(tmp_path: Path) -> None:
    file = write_tar(
        tmp_path / "a.tar",
        ("x/one.png", png("red")),
        ("x/one.txt", b"red\n a red one \n"),
        ("x/one.cls", b"3"),
        ("x/two.json", json.dumps({"caption": "grey", "width": 12}).encode()),
        ("x/two.jpg", jpeg(9)),
        ("y/two.webp.jpg", jpeg(7)),  # another folder is another example; its last ending is its kind
        ("y/two.json", json.dumps({"text": ["dark", "darker"]}).encode()),
        ("y/two.txt", b"dark grey"),
        ("y/.hidden", b""),
        ("readme.md", b"no example"),
        ("long/" + "n" * 150 + ".JPG", jpeg(5)),
        ("long/" + "n" * 150 + ".txt", b"a long name"),
    )
    source = open_source(str(file), 8)
    assert said(source) == [("red", "a red one"), ("grey",), ("dark grey",), ("a long name",)]
    assert source[0].image.getpixel((0, 0)) == (255, 0, 0)
    assert [source[i].image.getpixel((0, 0))[0] for i in (1, 2, 3)] == [9, 7, 5]
    assert source[1].key == f"{file}: x/two"
    assert source.picture_size(1) == (12, 8)
    assert first_captions(source) == {"red", "grey", "dark grey", "a long name"}
    with open(file, "rb") as opened:  # what a stream relies on: an example can be read from its first byte on
        every = list(samples(opened, "a"))
        for i, sample in enumerate(every):
            assert list(samples(opened, "a", sample.begin)) == every[i:]


def test_webdataset_reads_the_same(tmp_path: Path) -> None:
    import datasets

    shard(tmp_path / "a.tar", 0, 5)
    shard(tmp_path / "b.tar", 5, 4)
    ours = open_source(str(tmp_path), 8)
    theirs = datasets.load_dataset("webdataset", data_dir=str(tmp_path), split="train")
    assert [c for (c,) in said(ours)] == theirs["txt"]
    for i in range(9):
        assert list(ours[i].image.get_flattened_data()) == list(theirs[i]["jpg"].get_flattened_data())


def test_shards_by_folder_and_by_pattern(tmp_path: Path) -> None:
    for i in range(3):
        shard(tmp_path / f"data-{i:03d}.tar", 2 * i, 2)
    whole = open_source(str(tmp_path), 8)
    assert [c for (c,) in said(whole)] == [f"number {i}" for i in range(6)]
    assert len(open_source(str(tmp_path / "data-{000..001}.tar"), 8)) == 4
    assert said(open_source(str(tmp_path / "data-{002,000}.tar"), 8))[0] == ("number 4",)
    with pytest.raises(ValueError, match=r"1 of 4 files are not there, first .*data-003.tar"):
        open_source(str(tmp_path / "data-{000..003}.tar"), 8)
    assert expand("a{8..11}{x,y}") == [f"a{i}{c}" for i in (8, 9, 10, 11) for c in "xy"]
    assert whole.fingerprint() != open_source(str(tmp_path / "data-{000..001}.tar"), 8).fingerprint()


def test_what_is_wrong_with_a_tar_is_named(tmp_path: Path) -> None:
    members = [(f"{i}.png", png()) for i in range(40)]
    captioned = [m for i in range(40) for m in (members[i], (f"{i}.txt", b"red"))]
    del captioned[11]  # the caption of the sixth
    source = open_source(str(write_tar(tmp_path / "a.tar", *captioned)), 8)
    assert len(source) == 39
    assert f"no caption: {tmp_path / 'a.tar'}: 5" in describe(source, 8)
    with pytest.raises(ValueError, match=r"40 of 40 examples .* instance no caption: .*b.tar: 0:"):
        open_source(str(write_tar(tmp_path / "b.tar", *members)), 8)
    broken = write_tar(tmp_path / "c.tar", ("0.png", b"none"), ("0.txt", b"red"))
    with pytest.raises(ValueError, match=r"c.tar: 0: no picture in a format"):
        open_source(str(broken), 8)[0]
    (tmp_path / "d.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"d.tar cannot be read as an uncompressed tar"):
        open_source(str(tmp_path / "d.tar"), 8)
    with pytest.raises(ValueError, match=r"0.json is not JSON"):
        open_source(str(write_tar(tmp_path / "e.tar", ("0.png", png()), ("0.json", b"{"))), 8)
    with pytest.raises(ValueError, match="no pictures in"):
        open_source(str(write_tar(tmp_path / "f.tar", ("0.txt", b"red"))), 8)
    # Of many examples a few may be unreadable, a picture in another format among them.
    captioned[6:8] = [("3.png", png()), ("3.txt", "röt".encode("cp1252"))]
    source = open_source(str(write_tar(tmp_path / "g.tar", *captioned)), 8)
    assert len(source) == 38
    assert "3.txt is not UTF-8" in describe(source, 8)
    captioned[8:10] = [("4.jxl", png()), ("4.txt", b"red")]
    with pytest.raises(ValueError, match="3 of 40 examples"):
        open_source(str(write_tar(tmp_path / "h.tar", *captioned)), 8)
    captioned[6:8] = [("3.png", png()), ("3.txt", b"red")]
    source = open_source(str(write_tar(tmp_path / "i.tar", *captioned)), 8)
    assert f"no picture: {tmp_path / 'i.tar'}: 4" in describe(source, 8)


# The hub


def test_a_set_of_the_hub_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` with the network replaced by a folder."""
    import datasets

    write_parquet(tmp_path / "test-0.parquet", image=[png("red"), png("blue")], text=["red", "blue"])
    load, asked = datasets.load_dataset, []

    def local(name: str, split: str):
        asked.append((name, split))
        return load("parquet", data_files={split: str(tmp_path / "*.parquet")}, split=split)

    monkeypatch.setattr(datasets, "load_dataset", local)
    source = open_source("someone/colours:test", 8)
    assert said(source) == [("red",), ("blue",)]
    open_source("someone/colours", 8)
    assert asked == [("someone/colours", "test"), ("someone/colours", "train")]
    assert source.fingerprint() == open_source("someone/colours:test", 8).fingerprint()


def test_what_is_neither_here_nor_on_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'no/such' is nothing on this machine, and as a data set of the hub"):
        open_source("no/such", 8)
    with pytest.raises(ValueError, match=r"'s3://b/a.tar' is not on this machine: it can be streamed"):
        open_source("s3://b/a.tar", 8)


# Captions


def test_templates() -> None:
    row = {"label": "fox", "style": ["oil", "pencil"], "year": 1890, "none": None}
    assert Template("a {label}, {style}")(row) == ("a fox, oil", "a fox, pencil")
    assert Template("{{{label}}} of {year}")(row) == ("{fox} of 1890",)
    assert Template("{style} {style}")(row) == ("oil oil", "pencil pencil")
    assert Template("{label} {none}")(row) == ()  # a missing caption, which is counted
    for wrong, words in (("{", "--template '{'"), ("fox", "names no field"), ("{}", "as {name}"), ("{a:3}", "format")):
        with pytest.raises(ValueError, match=words):
            Template(wrong)


def test_templates_over_every_format(tmp_path: Path) -> None:
    import datasets

    metadata(
        fill(tmp_path / "jsonl", 2),
        {"file_name": "0.png", "what": "fox", "how": "oil"},
        {"file_name": "1.png", "what": "cat", "how": "ink"},
    )
    fill(tmp_path / "classes" / "red_fox", 1)
    (fill(tmp_path / "texts", 1) / "0.txt").write_text("fox\ncat")
    features = datasets.Features(
        {"image": datasets.Image(), "what": datasets.ClassLabel(names=["cat", "fox"]), "how": datasets.Value("string")}
    )
    rows = {"image": [Image.new("RGB", (8, 8))] * 2, "what": [1, 0], "how": ["oil", "ink"]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    fields = [json.dumps({"what": w, "how": h}).encode() for w, h in (("fox", "oil"), ("cat", "ink"))]
    write_tar(tmp_path / "a.tar", ("0.png", png()), ("0.json", fields[0]), ("1.png", png()), ("1.json", fields[1]))
    for name in ("jsonl", "a.parquet", "a.tar"):
        source = open_source(str(tmp_path / name), 8, template="a {what} in {how}")
        assert said(source) == [("a fox in oil",), ("a cat in ink",)]
        with pytest.raises(ValueError, match=r"--template names 'who', but the fields of .* are .*how.*what"):
            open_source(str(tmp_path / name), 8, template="a {who}")
    assert said(open_source(str(tmp_path / "classes"), 8, template="a {label}!")) == [("a red fox!",)]
    assert said(open_source(str(tmp_path / "texts"), 8, template="a {text}!")) == [("a fox!", "a cat!")]
    with pytest.raises(ValueError, match="fields of class folders are label"):
        open_source(str(tmp_path / "classes"), 8, template="a {text}")
    with pytest.raises(ValueError, match="shapes is drawn with its own"):
        open_source("shapes", 8, template="a {text}")


def test_a_caption_is_chosen_and_its_tags_are_shuffled() -> None:
    assert [choose(["a", "b"], (c, 0.5)) for c in (0.0, 0.49, 0.5, 0.99)] == ["a", "a", "b", "b"]
    tags = "fox, red, night, snow, oil"
    seen = {choose([tags], (i / 50, 0.3), shuffle_tags=True, keep_tags=2) for i in range(50)}
    assert len(seen) == 6
    assert all(caption.startswith("fox, red, ") and sorted(caption) == sorted(tags) for caption in seen)
    assert choose([tags], (0.2, 0.3), shuffle_tags=True) == choose([tags], (0.2, 0.3), shuffle_tags=True)
    assert choose([tags], (0.2, 0.3), shuffle_tags=True) != choose([tags], (0.2, 0.4), shuffle_tags=True)
    assert choose(["no tags"], (0.2, 0.3), shuffle_tags=True) == "no tags"


def test_parts(tmp_path: Path) -> None:
    assert split_parts("20*mine/+regular/") == [(20, "mine/"), (1, "regular/")]
    assert split_parts("0.5*a") == [(0.5, "a")]
    assert split_parts(".25*a+shapes") == [(0.25, "a"), (1, "shapes")]
    assert split_parts("a*b") == [(1, "a*b")]
    (tmp_path / "2*a+b").mkdir()
    assert split_parts(str(tmp_path / "2*a+b")) == [(1, str(tmp_path / "2*a+b"))]
