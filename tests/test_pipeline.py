"""The pipeline against diffusers on the same folder, and what it promises to its callers."""

import itertools
import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import TextToImagePipeline
from pipelines.folder import load_model, save_model
from tests.conftest import tiny_model

PROMPTS = ["a red circle on a blue background", "an oil painting of a fox"]


@pytest.fixture(scope="module")
def pipe(model_folder: Path) -> TextToImagePipeline:
    pipe = TextToImagePipeline.from_pretrained(model_folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize(
    ("sampler", "scheduler", "options"),
    [
        ("ddim", "DDIMScheduler", {}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {}),
        ("euler", "EulerDiscreteScheduler", {}),
        ("heun", "HeunDiscreteScheduler", {}),
        ("ddpm", "DDPMScheduler", {"variance_type": "fixed_small"}),
    ],
)
def test_diffusers_opens_the_folder_and_paints_the_same(
    tmp_path: Path, sampler: str, scheduler: str, options: dict, prediction: str
) -> None:
    diffusers = pytest.importorskip("diffusers")
    TextToImagePipeline(tiny_model(prediction=prediction)).save_pretrained(tmp_path)
    ours = TextToImagePipeline.from_pretrained(tmp_path, device="cpu")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    # from_config of another class would fill in its own defaults for what DDIM has and it has not.
    theirs.scheduler = getattr(diffusers, scheduler).from_config(
        theirs.scheduler.config, clip_sample=False, thresholding=False, **options
    )
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    # A number that divides 1000: for others diffusers' DDIM takes steps of T // steps rows, off its own grid.
    call = {"num_inference_steps": 5, "guidance_scale": 3.0, "latents": latents}
    # diffusers multiplies the latents by its own initial sigma, in place of ours: both begin unit normal.
    got = ours(PROMPTS, sampler=sampler, generator=[torch.Generator().manual_seed(i) for i in range(2)], **call)
    wanted = theirs(PROMPTS, generator=[torch.Generator().manual_seed(i) for i in range(2)], **call)
    difference = np.mean([np.abs(pixels(a) - pixels(b)).mean() for a, b in zip(got.images, wanted.images, strict=True)])
    assert difference < 1.0  # of 255
    assert np.std([pixels(image) for image in got.images]) > 1.0  # not one flat grey, which would agree by itself


def test_save_and_load_give_the_same_picture(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "copy")
    again = TextToImagePipeline.from_pretrained(tmp_path / "copy", device="cpu")
    a, b = (p(PROMPTS[0], seed=5).images[0] for p in (pipe, again))
    assert (pixels(a) == pixels(b)).all()


def test_flow_model_is_kept_for_atelier_and_refused_to_diffusers(tmp_path: Path) -> None:
    model = tiny_model("flow", "velocity")
    with pytest.raises(ValueError, match="flow"):
        TextToImagePipeline(model).save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    save_model(model, tmp_path / "kept")
    again = load_model(tmp_path / "kept")
    a, b = (TextToImagePipeline(m)(PROMPTS[0], seed=1, steps=3).images[0] for m in (model, again))
    assert (pixels(a) == pixels(b)).all()


def test_seed_gives_the_same_picture_alone_and_in_a_batch(pipe: TextToImagePipeline) -> None:
    batch = pipe(PROMPTS, seed=7, sampler="ddpm", output_type="np")
    assert batch.seeds == [7, 8]
    alone = pipe(PROMPTS[1], seed=8, sampler="ddpm", output_type="np")
    assert np.allclose(batch.images[1], alone.images[0], atol=1e-4)
    assert not np.allclose(batch.images[0], alone.images[0], atol=1e-2)


def test_output_types_and_counts(pipe: TextToImagePipeline) -> None:
    assert len(pipe(PROMPTS, num_images_per_prompt=2, steps=1).images) == 4
    assert pipe(PROMPTS[0], output_type="np", steps=1).images.shape == (1, 16, 16, 3)
    assert pipe(PROMPTS[0], output_type="pt", steps=1, height=20, width=24).images.shape == (1, 3, 20, 24)
    assert pipe(PROMPTS[0], output_type="latent", steps=1).images.shape == (1, 4, 4, 4)
    images, _ = pipe(PROMPTS[0], steps=1, return_dict=False)
    assert images[0].size == (16, 16)


def test_saved_png_carries_prompt_seed_and_settings(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    image = pipe("ein Öl-Fuchs", seed=11, steps=2, negative_prompt="grey").images[0]
    image.save(tmp_path / "fox.png")
    with Image.open(tmp_path / "fox.png") as opened:
        text = opened.text  # type: ignore[attr-defined]
        assert (np.asarray(opened) == np.asarray(image)).all()
    assert (text["prompt"], text["seed"]) == ("ein Öl-Fuchs", "11")
    settings = json.loads(text["atelier"])
    assert settings["steps"] == 2
    assert settings["negative_prompt"] == "grey"
    image.save(tmp_path / "fox.jpg")  # other formats are as PIL has them


def test_negative_prompt_and_guidance_change_the_picture(pipe: TextToImagePipeline) -> None:
    plain = pixels(pipe(PROMPTS[0], seed=1, guidance_scale=3.0).images[0])
    assert np.abs(plain - pixels(pipe(PROMPTS[0], seed=1, guidance_scale=1.0).images[0])).max() > 0
    assert np.abs(plain - pixels(pipe(PROMPTS[0], seed=1, negative_prompt="a fox").images[0])).max() > 0


def test_callback_sees_every_step(pipe: TextToImagePipeline) -> None:
    seen: list[tuple[int, float]] = []
    pipe(PROMPTS[0], steps=5, callback=lambda i, sigma, x, x0: seen.append((i, sigma)))
    assert [i for i, _ in seen] == [0, 1, 2, 3, 4]
    assert all(a > b for (_, a), (_, b) in itertools.pairwise(seen))


def test_long_prompts_are_not_cut(pipe: TextToImagePipeline) -> None:
    long = "a red circle on a blue background " * 8
    first = pixels(pipe(long + "a fox", seed=1).images[0])
    assert np.abs(first - pixels(pipe(long + "a green square", seed=1).images[0])).max() > 0


def test_guidance_on_a_model_trained_without_dropout_warns(model_folder: Path) -> None:
    model = load_model(model_folder)
    model.defaults = replace(model.defaults, caption_dropout=0.0)
    with pytest.warns(UserWarning, match="caption dropout"):
        TextToImagePipeline(model)(PROMPTS[0], steps=1, guidance_scale=5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TextToImagePipeline(model)(PROMPTS[0], steps=1, guidance_scale=1.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": []}, "empty list"),
        ({"prompt": [3]}, "text"),
        ({"height": 17}, "multiples of 4"),
        ({"steps": 0}, "at least one step"),
        ({"steps": -3}, "at least one step"),
        ({"sampler": "magic"}, "dpmpp_2m"),
        ({"steps": 3, "num_inference_steps": 4}, "two names"),
        ({"seed": 1, "generator": torch.Generator()}, "give one"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "shape"),
        ({"output_type": "gif"}, "pil"),
        ({"eta": 0.5, "sampler": "euler"}, "ddim"),
        ({"num_images_per_prompt": 0}, "at least 1"),
        ({"negative_prompt": ["a", "b"]}, "negative"),
        ({"spacing": "odd"}, "spacing"),
    ],
)
def test_bad_calls_say_what_to_do(pipe: TextToImagePipeline, arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pipe(**{"prompt": PROMPTS[0], **arguments})
    with pytest.raises(TypeError):
        pipe(PROMPTS[0], promt="a typo is not swallowed")


def test_bad_folders_say_what_to_do(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no model folder"):
        TextToImagePipeline.from_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="not a model folder"):
        TextToImagePipeline.from_pretrained(tmp_path / "nothing")
    broken = tmp_path / "broken"
    save_model(load_model(model_folder), broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"unet.*not complete"):
        TextToImagePipeline.from_pretrained(broken)
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(ValueError, match="pickled"):
        TextToImagePipeline.from_pretrained(broken)


def test_half_precision_folder_opens_in_diffusers(tmp_path: Path, model_folder: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    TextToImagePipeline.from_pretrained(model_folder, device="cpu").save_pretrained(tmp_path, dtype=torch.float16)
    ours = TextToImagePipeline.from_pretrained(tmp_path, device="cpu")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    call = {"num_inference_steps": 3, "latents": latents}
    got = ours(PROMPTS[0], sampler="ddim", guidance_scale=7.5, **call).images[0]
    assert np.abs(pixels(got) - pixels(theirs(PROMPTS[0], **call).images[0])).mean() < 1.0
