"""`atelier data check` and `atelier data cache`: what is found is said, and the exit status says what training does."""

import io
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import atelier
import train.streams
from pipelines.find import BUNDLED
from tests.sets import fill, metadata, png, truncate, write_parquet, write_tar
from train.cache import cache_latents
from train.check import check
from train.data import read_pictures
from train.shards import open_shards
from train.sources import open_source
from train.streamed import StreamFeed
from vae.autoencoder import Identity

pytestmark = pytest.mark.usefixtures("in_process", "own_datasets_cache")


def call(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int | str | None:
    """The exit status of the command."""
    monkeypatch.setattr("sys.argv", ["atelier", *map(str, words)])
    try:
        atelier.main()
    except SystemExit as stopped:
        return stopped.code
    return 0


@pytest.fixture
def flawed(tmp_path: Path) -> Path:
    """Forty pictures: one without a caption, one broken, two copies, some wide ones."""
    folder = tmp_path / "p"
    metadata(fill(folder, 40), *({"file_name": f"{i}.png", "text": [f"number {i}", "one"]} for i in range(39)))
    truncate(folder / "7.png")
    for i in (12, 13):
        (folder / f"{i}.png").write_bytes((folder / "11.png").read_bytes())
    for i in range(20, 26):
        Image.new("RGB", (160, 80), (i, 0, 0)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("tar", [False, True])
def test_pictures_without_captions_are_for_those_who_read_none(
    tar: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    data = tmp_path / "p"
    if tar:
        data = write_tar(tmp_path / "p.tar", *((f"{i}.png", png(size=(8 + i, 8))) for i in range(30)))
    else:
        fill(data, 30)
    words = ("data", "check", data, "--workers", "0", *["--streaming"] * tar)
    refused = call(monkeypatch, *words)
    assert "no caption" in f"{refused}{capsys.readouterr().out}"
    assert refused
    assert call(monkeypatch, *words, "--text-encoder", "none") == 0
    out = capsys.readouterr().out
    assert "training would" in out
    assert "no caption" not in out
    assert "tokens" not in out


def test_everything_is_said(flawed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    words = ("--size", "64", "--buckets", "--multiple", "8", "--batch", "4", "--workers", "0")
    assert call(monkeypatch, "data", "check", flawed, *words) == 0
    out = re.sub(" +", " ", capsys.readouterr().out)
    for line in (
        "39 pictures, captions: metadata.jsonl",
        f"{flawed}/0.png: 8×8",
        f"{flawed}/9.png: 8×8",
        f"no caption: {flawed}/39.png",
        "1 pictures cannot be used:",
        f"{flawed}/7.png: image file is truncated",
        "2 pictures are copies of another:",
        f"{flawed}/12.png = {flawed}/11.png",
        "8–15 32 ####",
        "64–127 6 ####",
        "32 are smaller than 64",
        "captions: 76, 39 of them different; 38 pictures have several",
        "0 are longer than the",
        "80×40 6 ",
        "training would start",
    ):
        assert line in out, line
    assert "NOT" not in out
    for i in (15, 16):
        truncate(flawed / f"{i}.png")
    assert call(monkeypatch, "data", "check", flawed, "--workers", "0") == 1
    out = capsys.readouterr().out
    assert "training would NOT start: 3 of 39 pictures cannot be used (at most 5% may be), for instance" in out
    with pytest.raises(ValueError, match=r"3 of 39 pictures cannot be used"):  # as training says
        cache_latents(open_source(str(flawed), 8), Identity(), 8, flawed / "c", Accelerator(cpu=True), 0)


def test_what_cannot_be_opened_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 3)
    assert "3 of 3 pictures" in str(call(monkeypatch, "data", "check", tmp_path))
    assert "does not exist" in str(call(monkeypatch, "data", "check", tmp_path / "nothing"))


def test_rows_and_streams_are_checked_alike(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rng = np.random.default_rng(0)
    images: list[bytes] = []
    for _ in range(30):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (12, 20, 3), dtype=np.uint8)).save(file, "png")
        images.append(file.getvalue())
    images[4], images[9] = b"broken", images[8]
    texts = [None if i == 6 else "a fox " * 40 for i in range(30)]
    write_parquet(tmp_path / "a.parquet", image=images, text=texts)
    for streaming in (False, True):
        assert not check(str(tmp_path / "a.parquet"), size=8, workers=0, streaming=streaming)
        out = capsys.readouterr().out
        assert "2 pictures cannot be used" in out
        assert f"{tmp_path / 'a.parquet'}: row 6" in out
        assert "1 pictures are copies of another" in out
        assert "1 are longer than the" in out
        assert "8–15            29 ####" in out
        assert f"NOT {'get through' if streaming else 'start'}: 2 of 30 pictures cannot be used" in out
        assert out.count("20×12, cropped to the middle 12×12, resized to 8") == 3
    with pytest.raises(ValueError, match="which a stream has not"):
        check(str(tmp_path), streaming=True, buckets=True)
    write_tar(tmp_path / "a.tar", ("0.png", png()), ("0.txt", b"red"))
    assert check(f"{tmp_path / 'a.tar'}+shapes", size=8, workers=0)
    assert "4,097 pictures" in capsys.readouterr().out


def test_each_part_is_judged_as_training_judges_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Not all of them together: three broken of twenty are too many, whatever else there is."""
    few, many = (fill(tmp_path / name, count) for name, count in (("few", 20), ("many", 200)))
    for folder, count in ((few, 20), (many, 200)):
        metadata(folder, *({"file_name": f"{i}.png", "text": f"number {i}"} for i in range(count)))
    for i, start in ((0, True), (1, False), (2, False)):
        truncate(few / f"{i}.png")
        data = f"{few}+{many}"
        assert check(data, size=8, workers=0) is start
        said = f"training would NOT start: {few}: {i + 1} of 20 pictures cannot be used"
        assert (said in capsys.readouterr().out) is not start
        with nullcontext() if start else pytest.raises(ValueError, match=f"{i + 1} of 20 pictures cannot be used"):
            cache_latents(open_source(data, 8), Identity(), 8, tmp_path / "c", Accelerator(cpu=True), 0)
        with nullcontext() if start else pytest.raises(ValueError, match=f"{i + 1} of 20 pictures cannot be used"):
            read_pictures(open_source(data, 8), 8, tmp_path / "pixels", workers=0, progress=False)


def test_copies_of_one_number_in_two_tables_are_found(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one, other = (tmp_path / f"{name}.parquet" for name in ("one", "other"))
    for file in (one, other):
        write_parquet(file, image=[png(colour) for colour in ("red", "green", "blue")], text=["a", "b", "c"])
    check(f"{one}+{other}", size=8, workers=0)
    assert f"{other}: row 2 = {one}: row 2" in capsys.readouterr().out


def test_a_stream_is_refused_as_training_refuses_it(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A beginning in which nothing can be used, of a set that is good as a whole; and a bad set beside a good one."""
    monkeypatch.setattr(train.streams, "JUDGED", 100)
    pixel = png()

    def rows(broken: int, whole: int) -> dict[str, list]:
        return {"image": [b"broken"] * broken + [pixel] * whole, "text": ["a"] * (broken + whole)}

    write_parquet(tmp_path / "late.parquet", **rows(101, 2100))
    data = str(tmp_path / "late.parquet")
    assert not check(data, size=8, workers=0, streaming=True)
    assert "NOT get through" in (out := capsys.readouterr().out)
    with pytest.raises(ValueError, match="100 of the first 100 rows have no caption, or no picture") as error:
        StreamFeed([open_shards(data)], [1.0], Identity(), 8, 0, torch.device("cpu"))
    assert str(error.value) in out
    write_parquet(tmp_path / "bad.parquet", **rows(20, 190))
    write_parquet(tmp_path / "good.parquet", **rows(0, 400))
    names = [str(tmp_path / f"{name}.parquet") for name in ("bad", "good")]
    assert not check("+".join(names), size=8, workers=0, streaming=True)
    assert f"NOT get through: {names[0]}: 20 of 210 pictures cannot be used" in capsys.readouterr().out
    feed = StreamFeed([open_shards(name) for name in names], [1.0, 1.0], Identity(), 8, 0, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"of \d+ pictures cannot be used \(at most 5% may be\), for instance .*bad"):
        [feed.take(update, 0, 64, 64) for update in range(20)]


def test_latents_are_cached_beforehand(
    picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ("--vae", "none", "--size", "16", "--cache", tmp_path / "c", "--workers", "0")
    run = tmp_path / "clip" / "checkpoint-0000005"  # as train/clip.py leaves it: no U-Net
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(BUNDLED / part, run / part)
    assert call(monkeypatch, "data", "cache", picture_folder, *words, "--text-encoder", run.parent) == 0
    assert call(monkeypatch, "data", "check", picture_folder, "--text-encoder", run.parent) == 0
    capsys.readouterr()
    shutil.rmtree(tmp_path / "c")
    assert call(monkeypatch, "data", "cache", picture_folder, *words, "--text-encoder", "bundled") == 0
    out = capsys.readouterr().out
    assert "1 of 1 shards to compute, 0 MB to write" in out
    assert "the captions' states fit into memory" in out
    cache_latents(open_source(str(picture_folder), 16), Identity(), 16, tmp_path / "c", Accelerator(cpu=True), 0)
    assert "to compute" not in capsys.readouterr().out
    assert call(monkeypatch, "data", "cache", picture_folder, *words, "--buckets", "--multiple", "8") == 0
    out = capsys.readouterr().out
    assert "16×16         8 ####" in out
    assert "1 of 1 shards to compute" in out
    usage = train_disk_usage(monkeypatch, free=100)
    assert usage in str(call(monkeypatch, "data", "cache", picture_folder, *words[:3], "32", *words[4:]))


@pytest.mark.slow
def test_two_writers_leave_one_whole_cache(picture_folder: Path, tmp_path: Path) -> None:
    words = ["data", "cache", str(picture_folder), "--vae", "none", "--size", "16", "--workers", "0"]
    program = Path(sys.executable).with_name("atelier")
    writers = [subprocess.Popen([program, *words, "--cache", str(tmp_path / "c")]) for _ in range(2)]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    assert not list((tmp_path / "c").rglob("*.partial"))
    source = open_source(str(picture_folder), 16)
    both = cache_latents(source, Identity(), 16, tmp_path / "c", Accelerator(cpu=True), 0)
    alone = cache_latents(source, Identity(), 16, tmp_path / "alone", Accelerator(cpu=True), 0)
    assert both.mean.equal(alone.mean)
    assert both.captions == alone.captions


def train_disk_usage(monkeypatch: pytest.MonkeyPatch, free: int) -> str:
    """A disk with hardly any room, and what is said of it."""
    import train.cache

    whole = train.cache.shutil.disk_usage
    monkeypatch.setattr(train.cache.shutil, "disk_usage", lambda place: whole(place)._replace(free=free))
    return "has 0 MB free: name another place with --cache, or make room"
