"""Training from streams, buckets and several sources: stopped and started again, it ends with the same bytes."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import train.ldm
from pipelines.files import newest, read_weights
from tests.sets import parquet, tars
from train.ldm import main
from train.settings import Config

pytestmark = pytest.mark.usefixtures("in_process", "own_datasets_cache")


def ends_alike(config: Config, place: Path) -> None:
    """Six updates at once, and three and then the rest."""
    config = replace(config, updates=6, checkpoint_every=3, schedule="constant")
    main(replace(config, output=place / "whole"))
    main(replace(config, output=place / "parts", updates=3))
    main(replace(config, output=place / "parts"))
    whole, parts = (read_weights(newest(place / name) / "unet") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(whole[name].equal(parts[name]) for name in whole)


@pytest.mark.parametrize("make", [tars, parquet])
def test_streams(pixels: Any, tmp_path: Path, make: Any) -> None:
    make(tmp_path / "set", 3, 60)
    template = "{text}, blue" if make is tars else ""
    ends_alike(
        replace(pixels, data=str(tmp_path / "set"), streaming=True, accumulate=2, template=template), tmp_path / "runs"
    )
    assert not list(Path(pixels.cache).glob("latents-*/*"))  # nothing is cached of a stream


def test_a_shard_that_vanishes_ends_the_run_and_it_goes_on(
    pixels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars(tmp_path / "set", 2, 20)
    config = replace(pixels, data=str(tmp_path / "set"), streaming=True, updates=12, checkpoint_every=3)
    whole = main(replace(config, output=tmp_path / "whole"))
    gone, rate = tmp_path / "set" / "001.tar", train.ldm.learning_rate

    def removing(update: int, **kwargs: Any) -> float:
        if update == 4:
            gone.rename(tmp_path / "kept")
        return rate(update, **kwargs)

    monkeypatch.setattr(train.ldm, "learning_rate", removing)
    with pytest.raises(ValueError, match=r"001.tar cannot be read .*put it back .* a training goes on from its last"):
        main(replace(config, output=tmp_path / "parts"))
    monkeypatch.undo()
    assert newest(tmp_path / "parts").name == "checkpoint-0000009"  # before the second epoch
    (tmp_path / "kept").rename(gone)
    parts = main(replace(config, output=tmp_path / "parts"))
    one, other = (read_weights(newest(run) / "unet") for run in (whole, parts))
    assert all(one[name].equal(other[name]) for name in one)


def test_buckets_tags_and_numbers(latents: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, size in (("square", (32, 32)), ("wide", (42, 24)), ("tall", (24, 42))):
        (tmp_path / name).mkdir()
        for i in range(12):
            Image.new("RGB", size, (i * 9, 0, 0)).save(tmp_path / name / f"{i}.png")
            (tmp_path / name / f"{i}.txt").write_text(f"{name}, red, number {i}")
    data = f"0.5*{tmp_path / 'square'}+{tmp_path / 'wide'}+2*{tmp_path / 'tall'}"
    ends_alike(
        replace(latents, data=data, size=32, buckets=True, shuffle_tags=True, keep_tags=1, caption_dropout=0.3),
        tmp_path / "runs",
    )
    out = capsys.readouterr().out
    assert "buckets, width×height, multiples of 8:" in out
    assert "12 pictures, each 2 times an epoch" in out


def test_the_rehearsal_takes_what_needs_most_memory(
    latents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count, size in (("wide", 24, (42, 24)), ("square", 4, (32, 32))):
        (tmp_path / "p" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, (i * 9, 0, 0)).save(tmp_path / "p" / name / f"{i}.png")
    seen, drawn = [], train.ldm.draw_batch
    monkeypatch.setattr(train.ldm, "draw_batch", lambda *a, **kw: seen.append(drawn(*a, **kw)) or seen[-1])
    main(replace(latents, data=str(tmp_path / "p"), output=tmp_path / "run", size=32, buckets=True))
    shapes = [tuple(batch.x0.shape[2:]) for batch in seen]
    assert shapes == [(8, 8), (6, 10), (6, 10)]


def test_a_run_goes_on_with_the_pictures_that_it_began_with(pixels: Any, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "p")
    config = replace(pixels, data=str(tmp_path / "p"), output=tmp_path / "run")
    main(config)
    for end in (".png", ".txt"):
        shutil.copy(tmp_path / "p" / f"0{end}", tmp_path / "p" / f"8{end}")
    with pytest.raises(ValueError, match="8 pictures then, 9 now"):
        main(replace(config, updates=3))
    whole = {"unet": Config.unet, "vae": Config.vae, "text_encoder": Config.text_encoder}  # --model brings these
    main(replace(config, output=tmp_path / "new", model=str(tmp_path / "run"), **whole))  # as it says
    for end in (".png", ".txt"):
        (tmp_path / "p" / f"8{end}").unlink()
    assert newest(main(replace(config, updates=3))).name == "checkpoint-0000003"
