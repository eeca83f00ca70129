"""Features of a set: computed once, whatever format the pictures are in, and never of another set."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import train.reference
from pipelines.files import save_network
from train.extractors import Extractor, open_extractor
from train.folders import FolderSource, open_folder
from train.metrics import Moments
from train.recogniser_model import Recogniser, RecogniserConfig
from train.reference import Reference, open_reference
from train.samples import common_side, read_samples

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def extractor(tmp_path: Path) -> Extractor:
    torch.manual_seed(0)
    network = Recogniser(RecogniserConfig(tasks=(("class", ("a", "b")),), sample_size=9, widths=(8, 6)))
    network(torch.randn(64, 3, 9, 9))
    save_network(network, tmp_path / "extractor")
    return open_extractor(str(tmp_path / "extractor"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng, folder = np.random.default_rng(0), tmp_path / "pictures"
    folder.mkdir()
    for i in range(7):
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


def opened(folder: Path, extractor: Extractor, cache: Path, size: int = 12) -> Reference:
    return open_reference(open_folder(folder), extractor, size, cache, Accelerator(), workers=0)


def test_features_are_those_of_the_pictures(
    extractor: Extractor, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.reference, "SHARD", 3)
    found = opened(folder, extractor, tmp_path / "cache")
    assert len(found.shards) == 3
    pixels = [np.asarray(Image.open(f)) for f in sorted(folder.glob("*.png"))]
    assert torch.allclose(found.features(), extractor(pixels), atol=1e-6)
    assert found.captions == [f"picture {i}" for i in range(7)]
    assert np.array_equal(np.asarray(found.picture(4)), pixels[4])
    whole = Moments.of([found.features()])
    for _ in range(2):  # computed, and as they were kept
        assert torch.allclose(found.moments().covariance, whole.covariance)
        assert torch.allclose(found.moments().mean, whole.mean)
        assert found.moments().count == 7
    some = found.features(3)
    assert some.shape == (3, 6)
    assert all(any(torch.equal(row, one) for one in found.features()) for row in some)
    assert torch.equal(some, found.features(3))


def test_it_is_computed_once(
    extractor: Extractor, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.reference, "SHARD", 3)
    cache = tmp_path / "cache"
    first = opened(folder, extractor, cache)
    asked: list[int] = []
    compute = Extractor.__call__

    def counted(self: Extractor, pixels: list[np.ndarray]) -> torch.Tensor:
        asked.append(len(pixels))
        return compute(self, pixels)

    monkeypatch.setattr(Extractor, "__call__", counted)
    again = opened(folder, extractor, cache)
    assert (again.hash, asked) == (first.hash, [])
    first.shards[1].unlink()  # as a run leaves it that was killed before
    assert torch.equal(opened(folder, extractor, cache).features(), first.features())
    assert asked == [3]
    assert opened(folder, extractor, cache, size=8).folder != first.folder
    extractor.digest = "another"
    assert opened(folder, extractor, cache).folder != first.folder
    (folder / "0.txt").write_text("another caption")
    assert opened(folder, extractor, cache).hash != first.hash
    assert sum(asked) == 3 + 3 * 7
    first.shards[0].write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"is broken .* delete it and start again"):
        Reference(first.source, 12, first.folder, first.hash, first.shards)


def test_formats_are_read_alike(extractor: Extractor, folder: Path, tmp_path: Path) -> None:
    """The same pixels from a JPEG file, a PNG file of them, and one with an alpha channel that hides nothing."""
    kinds: dict[str, Path] = {name: tmp_path / name for name in ("jpeg", "png", "alpha", "turned")}
    for place in kinds.values():
        place.mkdir()
    for file in sorted(folder.glob("*.png")):
        Image.open(file).save(kinds["jpeg"] / f"{file.stem}.jpg", quality=80)
        image = Image.open(kinds["jpeg"] / f"{file.stem}.jpg").convert("RGB")
        image.save(kinds["png"] / f"{file.stem}.png")
        image.convert("RGBA").save(kinds["alpha"] / f"{file.stem}.webp", lossless=True)
        exif = Image.Exif()
        exif[0x0112] = 6  # lies on its side, as cameras write it
        image.rotate(90, expand=True).save(kinds["turned"] / f"{file.stem}.png", exif=exif)
    sets = [read_samples(str(place), None) for place in kinds.values()]
    found = [open_reference(s, extractor, 12, tmp_path / "cache", Accelerator(), workers=0) for s in sets]
    for other in found[1:]:
        assert torch.equal(found[0].features(), other.features())
    assert common_side(sets[0]) == 12


def test_broken_pictures_are_named(extractor: Extractor, folder: Path, tmp_path: Path, capsys) -> None:
    source = open_folder(folder)
    files = [*source.files * 4, folder / "broken.png"]
    (folder / "broken.png").write_bytes(b"no picture")
    many = FolderSource(files, [("a",)] * len(files), "a test")
    found = open_reference(many, extractor, 12, tmp_path / "cache", Accelerator(), workers=0)
    assert len(found) == 28
    assert "broken.png" in capsys.readouterr().out
    few = FolderSource(files[-3:], [("a",)] * 3, "a test")
    with pytest.raises(ValueError, match="1 of 3 pictures cannot be used"):
        open_reference(few, extractor, 12, tmp_path / "cache", Accelerator(), workers=0)


def test_weights_that_give_nonsense_are_found_out(extractor: Extractor, folder: Path, tmp_path: Path) -> None:
    extractor.compute = lambda pixels: torch.full((len(pixels), 6), float("nan"))
    with pytest.raises(ValueError, match="not finite: are its weights whole"):
        opened(folder, extractor, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
