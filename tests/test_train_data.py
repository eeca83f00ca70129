"""Training from streams, buckets and several sources: stopped and started again, it ends with the same bytes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

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
