"""The command line with adapters, embeddings and masks, and files that come from the hub."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import TextToImagePipeline
from pipelines.adapters import NAME, save_lora
from pipelines.embeddings import save_embedding
from pipelines.folder import load_model
from tests.lora import factors
from tests.test_cli import call


@pytest.fixture
def lora(tmp_path: Path, model_folder: Path) -> Path:
    return save_lora(tmp_path / "lora", factors(load_model(model_folder)), {"unet": 2, "text_encoder": 2})


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"), np.float32)


def test_everything_at_once(
    tmp_path: Path, model_folder: Path, lora: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    word = save_embedding(tmp_path / "cat.safetensors", "<cat>", torch.ones(2, 32))
    picture, mask = tmp_path / "in.png", tmp_path / "mask.png"
    Image.new("RGB", (32, 16), "orange").save(picture)
    half = Image.new("L", (32, 16))
    half.paste(255, (16, 0, 32, 16))
    half.save(mask)
    out = tmp_path / "out.png"
    words = ["a <cat>", "--model", model_folder, "--device", "cpu", "--seed", 3, "--steps", 2, "--out", out]
    words += ["--lora", lora, lora.parent, "--lora-weight", 0.5, -0.25, "--embedding", word]
    call(monkeypatch, *words, "--image", picture, "--mask", mask)
    assert "learned <cat>" in capsys.readouterr().err
    with Image.open(out) as written:
        settings = json.loads(written.info["atelier"])
        assert written.size == (24, 12)  # about as many pixels as the model's 16×16
    assert settings["loras"] == {str(lora): 0.5, str(lora.parent): -0.25}
    assert settings["embeddings"] == ["<cat>"]
    assert (settings["mask"], settings["strength"]) == (True, 1.0)

    pipe = TextToImagePipeline.from_pretrained(model_folder, device="cpu")
    pipe.load_lora(lora, 0.25)  # the two are one file, and add up
    pipe.load_embedding(word)
    same = pipe("a <cat>", image=Image.open(picture), mask=half, width=24, height=12, seed=3, steps=2).images[0]
    assert np.abs(pixels(out) - np.asarray(same, np.float32)).max() <= 1


def test_every_flag_reaches_the_pipeline(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict] = []
    paint = TextToImagePipeline.__call__

    def noted(self: TextToImagePipeline, prompt: str, **named: Any) -> Any:
        calls.append({"prompt": prompt} | named)
        return paint(self, prompt, steps=1)

    monkeypatch.setattr(TextToImagePipeline, "__call__", noted)
    picture, mask = tmp_path / "in.png", tmp_path / "mask.png"
    Image.new("RGB", (16, 16), "orange").save(picture)
    Image.new("L", (16, 16)).save(mask)
    words = ["a fox", "--model", model_folder, "--device", "cpu", "--out", tmp_path / "out.png", "--seed", 5]
    words += ["--steps", 7, "--guidance", 2.5, "--negative", "blue", "--sampler", "ddim", "--height", 20, "--width", 24]
    words += ["--classifier", "runs/judge", "--classifier-scale", 3.5, "--strength", 0.4]
    words += ["--guidance-interval", 0.3, 6]
    call(monkeypatch, *words, "--image", picture, "--mask", mask)
    (given,) = calls
    assert given.pop("image").size == given.pop("mask").size == (16, 16)
    numbers = {"steps": 7, "guidance_scale": 2.5, "height": 20, "width": 24, "classifier_scale": 3.5, "strength": 0.4}
    numbers |= {"seed": 5, "num_images_per_prompt": 1}
    said = {"prompt": "a fox", "negative_prompt": "blue", "sampler": "ddim", "classifier": Path("runs/judge")}
    assert given == numbers | said | {"guidance_interval": (0.3, 6.0)}


def test_one_weight_for_all(tmp_path: Path, model_folder: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["a fox", "--model", model_folder, "--device", "cpu", "--seed", 3, "--steps", 2, "--out"]
    files = [tmp_path / f"{name}.png" for name in ("plain", "none", "two")]
    call(monkeypatch, *words, files[0])
    call(monkeypatch, *words, files[1], "--lora", lora, lora.parent, "--lora-weight", 0)
    call(monkeypatch, *words, files[2], "--lora", lora, lora.parent)
    again = tmp_path / "again.png"
    call(monkeypatch, *words, again, "--lora", lora, "--device", "cpu", f"--lora={lora.parent}")
    assert (pixels(again) == pixels(files[2])).all()
    assert (pixels(files[0]) == pixels(files[1])).all()
    assert (pixels(files[0]) != pixels(files[2])).any()
    with Image.open(files[0]) as written:
        assert "loras" not in json.loads(written.info["atelier"])


def test_a_folder_of_adapters_alone_is_no_model(lora: Path) -> None:
    with pytest.raises(ValueError, match=r"no model folder: .* it is loaded into a model by load_lora \(--lora\)"):
        TextToImagePipeline.from_pretrained(lora.parent)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lora x.safetensors --lora-weight 1 2", "2 --lora-weight for 1 --lora: give one, or as many"),
        ("--mask mask.png", "give --image, too"),
        ("--lora x.safetensors", "x.safetensors: no such file"),
        ("--embedding x.safetensors", "x.safetensors: no such file"),
        ("--image x.png", "--image x.png can't be opened"),
    ],
)
def test_errors_are_one_line(model_folder: Path, monkeypatch: pytest.MonkeyPatch, words: str, message: str) -> None:
    with pytest.raises(SystemExit, match="error: ") as stopped:
        call(monkeypatch, "a fox", "--model", model_folder, "--device", "cpu", *words.split())
    assert message in str(stopped.value)


def test_from_the_hub_one_file_is_fetched(lora: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hf_hub_download(hub_id: str, name: str) -> str:
        asked.append((hub_id, name))
        if hub_id == "some/where":
            return str(lora)
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    pipe = TextToImagePipeline.from_pretrained(model_folder, device="cpu")
    pipe.load_lora("some/where")
    pipe.load_lora("some/where/deep/style.safetensors", 0.5)
    assert asked == [("some/where", NAME), ("some/where", "deep/style.safetensors")]
    assert pipe.loras == {"some/where": 1.0, "some/where/deep/style.safetensors": 0.5}
    for where in ("no/where", "no/where/x.safetensors"):
        with pytest.raises(ValueError, match=r"no/where/\w+.safetensors .* could not be fetched .* offline"):
            pipe.load_lora(where)
