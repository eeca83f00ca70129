"""The pictures of `--prior`: each process paints its share, all together the same as one alone."""

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from pipelines.folder import load_model
from tests.killing import run_killed
from train.build import build
from train.prior import with_prior
from train.settings import Config

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def config(pictures: Path, model_folder: Path, tmp_path: Path) -> Config:
    """Three batches of pictures, the last of them smaller."""
    return Config(
        data=str(pictures),
        model=str(model_folder),
        output=tmp_path / "run",
        cache=tmp_path / "cache",
        prior=("a square", "a red circle", "a tree"),
        prior_pictures=18,
        updates=2,
        batch_size=4,
        warmup=1,
        prompts=("a red square",),
        steps=2,
        seed=5,
        workers=0,
    )


def paint(config: Config, accelerator: object) -> str:
    return with_prior(load_model(Path(config.model)), config, 16, accelerator)


def painted(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((output / "prior").glob("*.png"))}


class Process:
    """One of two, which waits for the other in a way of its own."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, rank: int, wait: Callable[[], object]):
        self.process_index, self.is_main_process, self.wait_for_everyone = rank, not rank, wait


def test_two_processes_paint_what_one_does(config: Config, tmp_path: Path) -> None:
    alone = replace(config, output=tmp_path / "alone")
    data = paint(alone, Accelerator(cpu=True))
    assert data == f"{config.data}+0.444444444*{tmp_path / 'alone' / 'prior'}"
    whole = painted(alone.output)
    assert list(whole) == [f"{i:05d}.png" for i in range(18)]
    assert len(set(whole.values())) == 18
    told = [(alone.output / "prior" / name).with_suffix(".txt").read_text() for name in whole]
    assert told == 6 * list(config.prior)

    shares: list[set[str]] = []

    def other() -> None:
        """The second process looks when the first has painted its share."""
        shares.append(set(painted(config.output)))
        paint(config, Process(1, lambda: None))

    paint(config, Process(0, other))
    assert shares == [{f"{i:05d}.png" for i in (*range(8), 16, 17)}]
    assert painted(config.output) == whole

    # Killed within the second batch: that one is painted again, by whoever has it, and nothing else is.
    for i in (11, 12):
        (config.output / "prior" / f"{i:05d}.txt").unlink()
    (config.output / "prior" / "00011.png").write_bytes(b"half")
    times = {file: file.stat().st_mtime_ns for file in (config.output / "prior").glob("*.png")}
    with pytest.raises(ValueError, match=r"lacks 2 of 18 pictures.*--output has to be a folder that all of them share"):
        paint(config, Process(0, lambda: None))
    paint(config, Process(1, lambda: None))
    assert painted(config.output) == whole
    again = {int(file.stem) for file, time in times.items() if file.stat().st_mtime_ns != time}
    assert again == set(range(8, 16))

    other_words = replace(config, prior=("a square", "a green circle", "a tree"))  # and no checkpoint yet
    paint(other_words, Accelerator(cpu=True))
    assert (config.output / "prior" / "00001.txt").read_text() == "a green circle"
    assert painted(config.output) != whole

    for again_with in (replace(config, seed=9), config):  # likewise of another seed
        paint(again_with, Accelerator(cpu=True))
        assert (painted(config.output) == whole) == (again_with is config)
    paint(replace(config, prior_pictures=20), Accelerator(cpu=True))  # and of those, two are no longer wanted
    paint(config, Accelerator(cpu=True))
    assert painted(config.output) == whole
    assert len(list((config.output / "prior").glob("*.txt"))) == 18
    other = load_model(Path(config.model))
    other.defaults = replace(other.defaults, guidance_scale=1.5)  # and painted otherwise
    with_prior(other, config, 16, Accelerator(cpu=True))
    assert painted(config.output) != whole
    paint(config, Accelerator(cpu=True))
    assert painted(config.output) == whole
    with Image.open(config.output / "prior" / "00000.png") as first:
        first.resize((8, 8)).save(config.output / "prior" / "00000.png")  # and of another size
    paint(config, Accelerator(cpu=True))
    assert painted(config.output) == whole


def test_an_inpainting_model_paints_whole_pictures(config: Config) -> None:
    model = build(replace(config, inpainting=True), None)
    with_prior(model, config, 16, Accelerator(cpu=True))
    assert len(painted(config.output)) == 18


@pytest.mark.slow
def test_two_real_processes_that_are_killed(config: Config, tmp_path: Path) -> None:
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    settings |= {"unet": dataclasses.asdict(config.unet), "prior_pictures": 40}
    alone = run_killed(settings | {"output": tmp_path / "alone"})
    two = settings | {"output": tmp_path / "two", "batch_size": 2}
    run_killed(two | {"seconds": alone["seconds"][0] * 0.7}, processes=2, kills=2)
    assert painted(tmp_path / "two") == painted(tmp_path / "alone")
    assert len(painted(tmp_path / "two")) == 40
