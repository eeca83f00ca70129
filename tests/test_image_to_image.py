"""Beginning from a picture: equal to diffusers' img2img, nearer to the picture with less strength, bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from pipelines import TextToImagePipeline
from pipelines.image import image_batch, trained_sides


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    y, x = np.mgrid[:32, :48].astype(np.float32)
    return Image.fromarray(np.stack([x * 5, y * 7, 255 - x * 5], -1).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def pipe(model_folder: Path) -> TextToImagePipeline:
    pipe = TextToImagePipeline.from_pretrained(model_folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("strength", [0.3, 0.85, 1.0])
def test_equals_diffusers(model_folder: Path, pipe: TextToImagePipeline, picture: Image.Image, strength: float) -> None:
    theirs = StableDiffusionImg2ImgPipeline.from_pretrained(model_folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    call = {"image": picture, "strength": strength, "num_inference_steps": 12, "guidance_scale": 3.0}
    expected = theirs("a fox", generator=torch.Generator().manual_seed(3), output_type="np", **call).images
    ours = pipe("a fox", generator=torch.Generator().manual_seed(3), output_type="np", sampler="ddim", **call).images
    assert ours.shape == expected.shape == (1, 32, 48, 3)
    assert np.abs(ours - expected).mean() < 1 / 255


def test_less_strength_stays_nearer(pipe: TextToImagePipeline, picture: Image.Image) -> None:
    posterior = pipe.model.vae.encode(image_batch(picture, 1, 1, None, None, 4))
    away = []
    for strength in (0.1, 0.4, 1.0):
        latents = pipe("a fox", image=picture, strength=strength, steps=20, seed=0, output_type="latent").images
        away.append(float((latents - posterior.mean).square().mean()))
    assert away[0] < away[1] < away[2]


def test_each_picture_alone_and_in_a_batch(pipe: TextToImagePipeline, picture: Image.Image) -> None:
    other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    call = {"strength": 0.6, "steps": 4, "output_type": "pt"}
    both = pipe(["a fox", "a cat"], image=[picture, other], num_images_per_prompt=2, seed=5, **call).images
    alone = pipe("a cat", image=other, seed=8, **call).images
    torch.testing.assert_close(both[3:], alone, atol=1e-4, rtol=1e-4)


def test_what_a_call_returns_can_be_given_back(pipe: TextToImagePipeline, picture: Image.Image) -> None:
    batch = image_batch([picture, picture], 4, 2, 16, 24, 4)
    assert batch.shape == (4, 3, 16, 24)
    assert batch.abs().max() <= 1
    pixels = np.asarray(picture, np.float32) / 255
    one = image_batch(picture, 1, 1, None, None, 4)
    for same in (pixels, pixels[None], torch.from_numpy(pixels).permute(2, 0, 1)):
        torch.testing.assert_close(image_batch(same, 1, 1, None, None, 4), one, atol=1e-6, rtol=0)
    assert image_batch(picture.crop((0, 0, 47, 31)), 1, 1, None, None, 4).shape == (1, 3, 28, 44)  # cut to multiples


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": 0.0}, "strength=0.0"),
        ({"strength": 1.5}, "strength=1.5"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"strength": "0.5"}, "strength=0.5"),
        ({"strength": 0.1, "steps": 4}, "at least one step"),
        ({"image": "fox.png"}, "got str"),
        ({"image": np.zeros((8, 8, 4))}, r"got \(8, 8, 4\)"),
        ({"image": torch.full((3, 8, 8), 2.0)}, r"in \[0, 1\]"),
        ({"image": [Image.new("RGB", (8, 8))] * 3}, "3 pictures for 1 prompts"),
        ({"image": torch.full((3, 8, 8), float("nan"))}, r"in \[0, 1\]"),
        ({"image": Image.new("RGB", (2, 8))}, "got 8 × 2 pixels, expected 4 at least"),
        ({"height": 10}, "expected multiples of"),
    ],
)
def test_bad_calls_say_what_to_do(pipe: TextToImagePipeline, picture: Image.Image, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe("a fox", **{"image": picture, "steps": 4, **change})
    sizes = [picture, picture.resize((8, 8))]
    with pytest.raises(ValueError, match="several sizes"):
        pipe(["a fox", "a cat"], image=sizes)


def test_photos_are_turned_upright_and_what_is_clear_is_white(picture: Image.Image) -> None:
    lying = picture.transpose(Image.Transpose.ROTATE_90)
    lying.getexif()[0x0112] = 6  # "turn me clockwise"
    assert torch.equal(image_batch(lying, 1, 1, None, None, 1), image_batch(picture, 1, 1, None, None, 1))
    assert trained_sides(lying, 32, 4) == trained_sides(picture, 32, 4) == (40, 28)
    assert trained_sides(lying, 32, 4, width=24) == (24, 16)  # the other side by the ratio, of 48×32
    assert trained_sides(lying, 32, 4, height=24) == (36, 24)
    assert trained_sides(lying, 32, 4, 20, 30) == (20, 30)
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert image_batch(clear, 1, 1, None, None, 1).min() == 1
