"""Training a noisy classifier: what it learns and leaves behind, and that nothing of how it was run shows in it."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw

import train.classifier
from ldm.classifier import NoisyClassifierConfig
from pipelines.classifier import load_classifier
from pipelines.files import checkpoints
from train.classifier import PRESETS, Config, main
from train.sources import FolderSource, classes_of

pytestmark = pytest.mark.usefixtures("in_process")

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ("bar", "disc", "frame")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of three classes, forty white shapes in each, of about equal area, anywhere on black."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for shape in SHAPES:
        (folder / shape).mkdir()
        for i in range(40):
            image = Image.new("L", (16, 16))
            pen, (x, y) = ImageDraw.Draw(image), random.integers(0, 6, 2).tolist()
            if shape == "bar":
                pen.rectangle((x, y + 3, x + 10, y + 6), fill=255)
            elif shape == "disc":
                pen.ellipse((x + 2, y + 2, x + 9, y + 9), fill=255)
            else:
                pen.rectangle((x + 1, y + 1, x + 9, y + 9), outline=255, width=1)
            image.save(folder / shape / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def config(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Config(
        data=str(pictures),
        output=tmp_path_factory.mktemp("unused"),
        cache=tmp_path_factory.mktemp("cache"),
        model=NoisyClassifierConfig(block_out_channels=(8, 16), norm_num_groups=4),
        size=16,
        updates=120,
        batch_size=32,
        learning_rate=4e-3,
        warmup=10,
        checkpoint_every=1000,
        workers=0,
    )


def weights(run: Path) -> bytes:
    return (checkpoints(run)[-1] / "diffusion_pytorch_model.safetensors").read_bytes()


def test_another_set_of_the_same_name_is_refused(config: Config, pictures: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(pictures, tmp_path / "mine")
    job = replace(config, data=str(mine), output=tmp_path / "run", updates=2, checkpoint_every=2)
    main(job)
    assert main(replace(job, updates=3)) == job.output
    (mine / "bar" / "39.png").unlink()
    with pytest.raises(ValueError, match="--data is not what this run was trained on"):
        main(replace(job, updates=4))


def test_it_learns_and_says_at_which_noise(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[dict] = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: numbers.append(values))
    run = main(replace(config, output=tmp_path))
    losses = [n["loss"] for n in numbers if "loss" in n]
    assert losses[-1] < 0.5 * np.log(3)
    shares = {float(k.split()[-1]): v for k, v in numbers[-1].items() if k.startswith("accuracy/")}
    assert min(shares[0.1], shares[0.25]) >= 0.8  # of 6 pictures held out
    assert shares[8.0] < shares[0.1]
    classifier = load_classifier(run)  # its newest checkpoint
    assert classifier.config.labels == SHAPES
    assert (classifier.config.in_channels, classifier.config.sample_size) == (1, 16)
    pixels = np.stack([np.asarray(Image.open(f), np.float32) / 127.5 - 1 for f in Path(config.data).glob("*/*.png")])
    assert classifier.config.sigma_data == pytest.approx(pixels.std(), rel=0.05)
    images = torch.from_numpy(pixels)[:, None]
    truth = [SHAPES.index(f.parent.name) for f in Path(config.data).glob("*/*.png")]
    right = (classifier(images, 0.1).argmax(1) == torch.tensor(truth)).float().mean()
    assert float(right) > 0.95
    confident = classifier(20 * torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0)), 20.0)
    assert float(confident.softmax(1).mean(1).max()) < 0.5  # in noise alone there is nothing to be sure of


def test_a_killed_run_ends_with_the_same_bytes(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(config, updates=4, warmup=2, checkpoint_every=2, batch_size=8)
    whole = main(replace(short, output=tmp_path / "whole"))

    class Killed(Exception):
        pass

    def rate(update: int, **kwargs) -> float:
        if update == 3:
            raise Killed
        return learning_rate(update, **kwargs)

    learning_rate = train.classifier.learning_rate
    monkeypatch.setattr(train.classifier, "learning_rate", rate)
    with pytest.raises(Killed):
        main(replace(short, output=tmp_path / "killed"))
    monkeypatch.undo()
    again = main(replace(short, output=tmp_path / "killed"))
    assert weights(whole) == weights(again)
    assert weights(main(replace(short, output=tmp_path / "other", seed=1))) != weights(whole)
    with pytest.raises(ValueError, match="noise_mean"):
        main(replace(short, output=tmp_path / "killed", noise_mean=1.0))


def test_in_the_latents_of_an_autoencoder(config: Config, model_folder: Path, tmp_path: Path) -> None:
    run = main(replace(config, output=tmp_path, vae=str(model_folder), updates=2, warmup=1, batch_size=8))
    classifier = load_classifier(run)
    assert (classifier.config.in_channels, classifier.config.sample_size) == (4, 4)
    notes = json.loads((checkpoints(run)[-1] / "training" / "config.json").read_text())
    assert (notes["noise_mean"], notes["noise_std"]) == (0.0, 1.7)


def test_bad_settings_say_what_was_got(config: Config, pictures: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(ValueError, match="--data: expected a folder"):
        main(replace(config, data="", output=tmp_path))
    with pytest.raises(ValueError, match="--size 18: expected a multiple of 4"):
        main(replace(config, output=tmp_path, size=18, vae=str(tiny_autoencoder(tmp_path))))
    with pytest.raises(ValueError, match=r"3 pictures of 3 classes \(the first captions, for instance 'a'\)"):
        classes_of(captioned([("a",), ("b",), ("c",)]))
    with pytest.raises(ValueError, match=r"0 pictures of 0 classes \(the first captions, for instance None"):
        classes_of(captioned([]))
    with pytest.raises(ValueError, match="3 pictures of 1 classes"):
        classes_of(captioned([("a",)] * 3))
    assert classes_of(captioned([("b", "x"), ("a",), ("b",), ("a", "y")])) == ("a", "b")
    with pytest.raises(ValueError, match="--batch-size is 0"):
        replace(config, batch_size=0)
    assert all(isinstance(preset, Config) for preset in PRESETS.values())


def captioned(captions: list[tuple[str, ...]]) -> FolderSource:
    return FolderSource([Path("unread.png")] * len(captions), captions, "a test")


def tiny_autoencoder(folder: Path) -> Path:
    from pipelines.files import save_network
    from tests.conftest import tiny_model

    save_network(tiny_model().vae, folder / "vae")
    return folder / "vae"


def test_the_script_runs_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train" / "classifier.py"), "--data", "nowhere", "--size", "16"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip().startswith("error: --data 'nowhere' does not exist")
