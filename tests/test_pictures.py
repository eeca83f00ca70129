"""Pictures on their way into training: how they are brought to one size, read once, and ordered."""

import errno
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.image import rgb
from tests.sets import fill, metadata, truncate
from train.aside import written_aside
from train.buckets import read_sizes
from train.data import batch_indices, fit, generator, permutation, read, read_pictures, to_unit
from train.sources import describe, open_source

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
    for numbers, dtype in (([0, 32768, 65535], np.int32), ([0, 128, 255], np.int32), ([0, 0.5, 1], np.float32)):
        image = Image.fromarray(np.array([numbers], dtype))  # as Pillow opens PGM and TIFF
        assert image.mode == ("F" if dtype is np.float32 else "I")
        assert np.asarray(rgb(image))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("number", [-1, 70_000, 1.5, float("nan")])
def test_grey_without_a_white_is_refused(number: float) -> None:
    kind = np.int32 if isinstance(number, int) else np.float32
    with pytest.raises(ValueError, match=r"numbers from .* in mode [IF] expected 0 to (1|65535)$"):
        rgb(Image.fromarray(np.array([[0, number]], kind)))


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


@pytest.mark.parametrize("failure", [errno.EIO, errno.EMFILE])
def test_a_failing_disk_makes_no_broken_picture(
    picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: int
) -> None:
    source = open_source(str(picture_folder), 16)
    opened = Image.open

    def fail(file: Path) -> Image.Image:
        if str(file).endswith("3.png"):
            raise OSError(failure, os.strerror(failure), str(file))
        return opened(file)

    monkeypatch.setattr(Image, "open", fail)
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"^\S+3\.png could not be read .* type the same command again$"):
            list(read(source, 16, range(len(source)), batch=8, workers=workers, progress=None))
    with pytest.raises(ValueError, match=r"type the same command again$"):
        read_sizes(source, progress=False)
