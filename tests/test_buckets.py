"""Aspect-ratio buckets: their sides, which picture goes where, and what is merged."""

import math
from fractions import Fraction
from pathlib import Path

import pytest
from PIL import Image

from train.buckets import assign, bucket_sides, picture_sizes, read_sizes
from train.data import fit, framing
from train.hashes import FileHashes
from train.sources import open_source


@pytest.mark.parametrize(("size", "multiple"), [(1024, 64), (512, 64), (128, 8), (64, 16), (100, 8)])
def test_sides(size: int, multiple: int) -> None:
    sides = bucket_sides(size, multiple)
    assert len(set(sides)) == len(sides)
    for width, height in sides:
        assert width % multiple == height % multiple == 0
        assert 0.75 * size**2 <= width * height <= size**2
        assert 0.5 <= width / height <= 2
        assert (height, width) in sides
    assert len({Fraction(w, h) for w, h in sides}) == len(sides)
    if size % multiple == 0:
        assert (size, size) in sides


def test_sides_are_those_of_sdxl() -> None:
    """Appendix I of Podell et al. (2023), from 1:2 to 2:1: ours are among theirs."""
    theirs = {704: (1344, 1408), 768: (1280, 1344), 832: (1152, 1216), 896: (1088, 1152), 960: (1024, 1088)}
    tall = [(w, h) for w, h in bucket_sides(1024, 64) if w < h]
    assert tall
    assert all(h in theirs[w] for w, h in tall)
    assert [w for w, _ in tall] == sorted(theirs)
    with pytest.raises(ValueError, match="--size 32: expected a multiple of 64"):
        bucket_sides(32, 64)


def test_a_picture_goes_to_the_closest_ratio() -> None:
    sizes = [(300, 100), (100, 300), (64, 64), (170, 100), None]
    sides = assign(sizes, 64, 8, repeats=[1] * 5, global_batch=1).sides
    buckets = bucket_sides(64, 8)
    assert sides[2] == sides[4] == (64, 64)
    for size, side in zip(sizes, sides, strict=True):
        w, h = size or (1, 1)
        assert all(abs(math.log(side[0] / side[1] * h / w)) <= abs(math.log(a / b * h / w)) + 1e-9 for a, b in buckets)


def test_small_buckets_are_merged_and_said() -> None:
    sizes = [(64, 64)] * 20 + [(84, 64)] * 3 + [(110, 64)] * 9 + [(64, 84)] * 2
    assigned = assign(sizes, 64, 8, repeats=[1] * 34, global_batch=8)
    assert len(set(assigned.sides)) == 2
    assert set(assigned.sides[23:32]) == {(80, 48)}
    assert set(assigned.sides[:23] + assigned.sides[32:]) == {(64, 64)}
    assert "because its 2 pictures an epoch are fewer than an update takes (8)" in assigned.report
    assert "72×56: merged into 64×64, because its 3 pictures" in assigned.report
    assert "64×64        25" in assigned.report
    repeated = assign(sizes, 64, 8, repeats=[1] * 32 + [4] * 2, global_batch=8)  # repeats count
    assert set(repeated.sides[32:]) == {(56, 72)}
    everything = assign(sizes, 64, 8, repeats=[1] * 34, global_batch=1000)
    assert len(set(everything.sides)) == 1


def test_small_pictures_are_said_to_be_enlarged() -> None:
    report = assign([(64, 64), (30, 30), (63, 64)], 64, 8, repeats=[1] * 3, global_batch=1).report
    assert "(2 are smaller: enlarged)" in report


def test_sizes_are_read_from_headers_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "p" / "class"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(folder / "0.png", exif=exif)
    Image.new("RGB", (30, 10)).save(folder / "1.png")
    (folder / "2.png").write_bytes(b"broken")
    source = open_source(str(tmp_path / "p"), 8)
    wanted = [(10, 20), (30, 10), None]
    assert read_sizes(source, progress=False) == wanted
    assert picture_sizes(source, tmp_path / "c", FileHashes(), progress=False) == wanted
    assert source[0].image.size == wanted[0]
    monkeypatch.setattr("train.buckets.read_sizes", lambda *a, **k: pytest.fail("read again"))
    assert picture_sizes(source, tmp_path / "c", FileHashes(), progress=False) == wanted


def test_framing_is_what_fit_cuts() -> None:
    """A picture whose pixels are its coordinates, doubled: what is left of it begins where the crop says."""
    image = Image.new("RGB", (60, 40))
    image.putdata([(x * 4, y * 4, 0) for y in range(40) for x in range(60)])
    original_h, original_w, top, left, h, w = framing(60, 40, (80, 80))
    assert (original_h, original_w, top, left, h, w) == (40, 60, 0, 20, 80, 80)
    pixels = fit(image, (80, 80)).astype(float)
    assert pixels.shape == (80, 80, 3)
    assert abs(pixels[40, 0, 0] / 4 * 2 - left) < 1.5
    assert abs(pixels[40, -1, 0] / 4 * 2 - (left + 79)) < 1.5
    assert abs(pixels[0, 40, 1] / 4 * 2 - top) < 1.5
