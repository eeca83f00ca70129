"""What is computed once: the autoencoder's latents, kept apart by all they depend on."""

import contextlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import train.aside
import train.cache
import train.hashes
from tests.conftest import tiny_model
from train.cache import cache_latents
from train.data import fit, to_unit
from train.hashes import FileHashes
from train.sources import open_source
from vae.autoencoder import Autoencoder, Identity

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def vae() -> Autoencoder:
    vae = tiny_model().vae
    assert isinstance(vae, Autoencoder)
    return vae


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def encoded(folder: Path, vae: Autoencoder | Identity, size: int = 16):
    source = open_source(str(folder), size)
    pixels = [torch.from_numpy(fit(source[i].image, size).copy()) for i in range(len(source))]
    with torch.no_grad():
        return vae.encode(to_unit(torch.stack(pixels)))


def shards(cache: Path) -> list[Path]:
    return sorted(cache.glob("latents-*/*.safetensors"))


def test_latents_are_the_autoencoders(
    picture_folder: Path, tmp_path: Path, vae: Autoencoder, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.cache, "SHARD", 3)
    source = open_source(str(picture_folder), 16)
    latents = cache_latents(source, vae, 16, tmp_path / "cache", accelerator, workers=0)
    wanted = encoded(picture_folder, vae)
    assert latents.mean.dtype == latents.logvar.dtype == torch.float16
    assert latents.mean.shape == (8, 4, 4, 4)
    torch.testing.assert_close(latents.mean.float(), wanted.mean, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(latents.logvar.float(), wanted.logvar, atol=1e-3, rtol=1e-3)
    assert latents.captions[2] == ("a blue square",)
    assert len(shards(tmp_path / "cache")) == 3
    # A posterior, not one frozen sample of it: other noise gives another latent.
    posterior = latents.posterior(torch.tensor([5, 0]), torch.device("cpu"))
    torch.testing.assert_close(posterior.mean, wanted.mean[[5, 0]], atol=1e-3, rtol=1e-3)
    a, b = (posterior.sample(torch.randn(2, 4, 4, 4)) for _ in range(2))
    assert (a - b).abs().mean() > 0.1
    assert latents.select(torch.tensor([7])).captions == [("a orange square",)]
    again = cache_latents(source, vae, 16, tmp_path / "cache", accelerator, workers=0)
    assert again.mean.equal(latents.mean)
    assert again.captions == latents.captions


def test_a_picture_is_its_own_latent_without_an_autoencoder(
    picture_folder: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    source = open_source(str(picture_folder), 16)
    latents = cache_latents(source, Identity(), 16, tmp_path / "cache", accelerator, workers=0)
    wanted = encoded(picture_folder, Identity()).mean
    posterior = latents.posterior(torch.arange(8), torch.device("cpu"))
    torch.testing.assert_close(posterior.sample(torch.ones(8, 3, 16, 16)), wanted, atol=1e-3, rtol=0)
    grey = cache_latents(source, Identity(1), 16, tmp_path / "cache", accelerator, workers=0)
    assert grey.mean.shape == (8, 1, 16, 16)  # another cache


def test_caches_are_kept_apart_by_all_they_depend_on(
    picture_folder: Path, tmp_path: Path, vae: Autoencoder, accelerator: Accelerator
) -> None:
    def cache(size: int = 16):
        source = open_source(str(picture_folder), size)
        return cache_latents(source, vae, size, tmp_path / "cache", accelerator, workers=0)

    first = cache()
    assert len(shards(tmp_path / "cache")) == 1
    cache()
    assert len(shards(tmp_path / "cache")) == 1
    assert cache(32).mean.shape == (8, 4, 8, 8)
    assert len(shards(tmp_path / "cache")) == 2
    with torch.no_grad():  # a decoder may be tuned, and the latents stay what they are
        vae.decoder.conv_in.weight.mul_(1.01)
        assert vae.post_quant_conv is not None
        vae.post_quant_conv.weight.mul_(1.01)
    vae.config = replace(vae.config, sample_size=99)
    cache()
    assert len(shards(tmp_path / "cache")) == 2
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1.01)
    moved = cache()
    assert len(shards(tmp_path / "cache")) == 3
    assert (moved.mean != first.mean).any()
    Image.new("RGB", (16, 16), "pink").save(picture_folder / "0.png")
    other = cache()
    assert (other.mean[0] != moved.mean[0]).any()
    assert other.mean[1:].equal(moved.mean[1:])
    lines = (picture_folder / "metadata.jsonl").read_text()
    (picture_folder / "metadata.jsonl").write_text(lines.replace("a red", "a pink"))
    assert cache().captions[0] == ("a pink square",)  # captions lie in the cache, too


def test_files_are_hashed_anew_only_when_they_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_text(file.name)
        os.utime(file, (1e9, 1e9))
    first = FileHashes(tmp_path / "cache").of(files)
    assert first == FileHashes().of(files)
    read: list[str] = []
    whole = train.hashes.file_hash
    monkeypatch.setattr(train.hashes, "file_hash", lambda file: read.append(file.name) or whole(file))
    assert FileHashes(tmp_path / "cache").of(files) == first
    assert not read
    files[1].write_text("B")  # as long as before
    second = FileHashes(tmp_path / "cache").of(files)
    assert read == ["b"]
    assert [old == new for old, new in zip(first, second, strict=True)] == [True, False, True]
    files[1].write_text("C")  # which may change again before the clock does: what is new is read each time
    assert FileHashes(tmp_path / "cache").of(files) != second
    assert read == ["b"] * 2
    FileHashes(tmp_path / "cache").of(files)
    assert read == ["b"] * 3
    (tmp_path / "cache" / "hashes.json").write_text("{broken")
    assert FileHashes(tmp_path / "cache").of(files) == FileHashes().of(files)


def test_a_killed_caching_goes_on(
    picture_folder: Path, tmp_path: Path, vae: Autoencoder, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.cache, "SHARD", 2)
    source = open_source(str(picture_folder), 16)
    whole = cache_latents(source, vae, 16, tmp_path / "whole", accelerator, workers=0)
    encode, calls = vae.encode, []

    def killed(images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(images)

    monkeypatch.setattr(vae, "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        cache_latents(source, vae, 16, tmp_path / "killed", accelerator, workers=0)
    done = shards(tmp_path / "killed")
    assert [f.name for f in done] == ["000000.safetensors", "000001.safetensors"]
    times = [f.stat().st_mtime_ns for f in done]
    done[0].with_name("000002.0.partial").write_bytes(b"half a shard")
    again = cache_latents(source, vae, 16, tmp_path / "killed", accelerator, workers=0)
    assert sum(calls[3:]) == 4  # only the pictures of the two shards that were not there
    assert [f.stat().st_mtime_ns for f in done] == times
    assert again.mean.equal(whole.mean)
    assert again.logvar.equal(whole.logvar)
    assert again.captions == whole.captions


def test_a_kill_while_a_shard_is_written_leaves_none(
    picture_folder: Path, tmp_path: Path, vae: Autoencoder, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(tensors: dict, file: Path, metadata: dict) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    source = open_source(str(picture_folder), 16)
    monkeypatch.setattr(train.aside, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        cache_latents(source, vae, 16, tmp_path / "cache", accelerator, workers=0)
    monkeypatch.undo()
    assert not shards(tmp_path / "cache")
    assert len(cache_latents(source, vae, 16, tmp_path / "cache", accelerator, workers=0).mean) == 8


def test_broken_pictures_are_left_out_or_refused(
    tmp_path: Path, vae: Autoencoder, accelerator: Accelerator, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(20):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}")
    (folder / "7.png").write_bytes(b"broken")
    for _ in range(2):  # from the cache as well as at the first time
        source = open_source(str(folder), 16)
        latents = cache_latents(source, vae, 16, tmp_path / "cache", accelerator, workers=0)
        assert len(latents.mean) == 19
        assert ("number 7",) not in latents.captions
        assert str(folder / "7.png") in capsys.readouterr().out
    (folder / "8.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=rf"2 of 20 pictures cannot be used .*{folder}"):
        cache_latents(open_source(str(folder), 16), vae, 16, tmp_path / "cache", accelerator, workers=0)


def test_two_processes_divide_all_shards_whenever_each_looks(
    picture_folder: Path, tmp_path: Path, vae: Autoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Process:
        num_processes, device, is_main_process, is_local_main_process = 2, torch.device("cpu"), False, False

        def __init__(self, rank: int):
            self.process_index = rank

        def print(self, text: str) -> None: ...

        def main_process_first(self) -> contextlib.nullcontext[None]:
            return contextlib.nullcontext()

        def wait_for_everyone(self) -> None:
            """The other process looks now: what this one wrote is there, and it has to write the rest."""
            if self.process_index == 0:
                assert [f.name[5] for f in shards(tmp_path)] == ["0", "2"]
                encode(Process(1))

    def encode(process) -> train.cache.Latents:
        return cache_latents(source, vae, 16, tmp_path, process, workers=0)

    monkeypatch.setattr(train.cache, "SHARD", 2)
    source = open_source(str(picture_folder), 16)
    latents = encode(Process(0))
    torch.testing.assert_close(latents.mean.float(), encoded(picture_folder, vae).mean, atol=1e-3, rtol=1e-3)
    assert len(list((shards(tmp_path)[0].parent).iterdir())) == 4
