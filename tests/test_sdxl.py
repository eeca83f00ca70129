"""Stable Diffusion XL against diffusers on the same folders: what is painted, and what is saved."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline
from PIL import Image

from ldm.unet import UNet, UNetConfig
from pipelines import TextToImagePipeline
from pipelines.folder import load_model, save_model, scheduler_config
from tests.conftest import tiny_model
from tests.sdxl import PROMPT, SUMMARY, UNET, WAVES, assert_same, opened, painted, their_pipeline, told

LONG = "a red circle on a blue background and a green square on a white background and an oil painting of a fox"


@pytest.fixture(scope="module")
def theirs(xl_folder: Path) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(xl_folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ours(xl_folder: Path) -> TextToImagePipeline:
    return opened(xl_folder)


@pytest.mark.parametrize(
    ("sampler", "scheduler", "options"),
    [
        ("euler", "EulerDiscreteScheduler", {}),
        ("euler", "EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),  # as it was published
        ("euler", "EulerDiscreteScheduler", {"timestep_spacing": "leading"}),  # where an offset of 0 stays 0
        ("ddim", "DDIMScheduler", {"clip_sample": False, "timestep_spacing": "leading", "steps_offset": 1}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("heun", "HeunDiscreteScheduler", {}),
        ("unipc", "UniPCMultistepScheduler", {}),
    ],
)
def test_paints_what_diffusers_paints(
    tmp_path: Path, theirs: StableDiffusionXLPipeline, sampler: str, scheduler: str, options: dict
) -> None:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipe = StableDiffusionXLPipeline(**{**theirs.components, "scheduler": None}, add_watermarker=False)
    pipe.scheduler = getattr(diffusers, scheduler)(**betas, **options)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    ours = opened(tmp_path)
    prompts = [PROMPT, "a red circle"]
    assert_same(painted(ours, prompts), painted(pipe, prompts))
    assert ours.model.defaults.guidance_scale == 5.0
    assert ours(PROMPT, steps=1).images[0].settings["sampler"] == sampler


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("negative", [None, "", "a green square"])
def test_guidance_negative_prompts_and_the_null(tmp_path: Path, zeros: bool, negative: str | None) -> None:
    theirs = their_pipeline(tmp_path, zeros=zeros)
    theirs.save_pretrained(tmp_path)
    ours = opened(tmp_path)
    assert told(ours).zero_null == zeros
    call: dict[str, Any] = {"negative_prompt": negative, "guidance_rescale": 0.3}
    assert_same(painted(ours, **call), painted(theirs, **call))
    assert_same(painted(ours, guidance_scale=1.0), painted(theirs, guidance_scale=1.0))
    unlike = painted(ours, negative_prompt="" if negative is None else None)
    assert (np.abs(unlike - painted(ours, negative_prompt=negative)).max() > 1e-3) == (
        zeros or negative not in (None, "")
    )


def test_sizes_reach_the_picture_and_the_png(
    tmp_path: Path, ours: TextToImagePipeline, theirs: StableDiffusionXLPipeline
) -> None:
    plain = painted(ours)
    got = painted(ours, original_size=(64, 48), crop=(4, 8), target_size=(32, 16))
    wanted = painted(theirs, original_size=(64, 48), crops_coords_top_left=(4, 8), target_size=(32, 16))
    assert_same(got, wanted)
    assert np.abs(got - plain).max() > 0.01
    latents = torch.randn(1, 4, 4, 12, generator=torch.Generator().manual_seed(0))
    wide: dict[str, Any] = {"height": 8, "width": 24, "latents": latents}
    assert_same(painted(ours, **wide), painted(theirs, **wide))
    ours(PROMPT, steps=1, crop=(1, 2), height=8, width=24).images[0].save(tmp_path / "a.png")
    settings = json.loads(Image.open(tmp_path / "a.png").text["atelier"])
    assert {k: settings[k] for k in ("original_size", "crop", "target_size")} == {
        "original_size": [8, 24], "crop": [1, 2], "target_size": [8, 24]
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"crop=\(1, 2, 3\): expected \(top, left\)"):
        ours(PROMPT, crop=(1, 2, 3))
    with pytest.raises(ValueError, match=r"original_size=\(8, 8\) belongs to SDXL's kind of model"):
        TextToImagePipeline(tiny_model())(PROMPT, original_size=(8, 8))


def test_long_prompts_and_batches(ours: TextToImagePipeline) -> None:
    pair, prompts = told(ours), [LONG, PROMPT]
    both = painted(ours, prompts, negative_prompt="a green square")
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    for i, prompt in enumerate(prompts):  # each alone: the shorter one in as many windows
        context = pair([prompt], chunks=pair.chunks(prompts))
        assert context["encoder_hidden_states"].shape[1] == 16 * pair.chunks(prompts)
        if i == 0:
            alone = painted(ours, prompt, latents=latents[:1], negative_prompt="a green square")
            np.testing.assert_allclose(both[0], alone[0], atol=1e-4)
    assert np.abs(painted(ours, LONG) - painted(ours, LONG[:40])).max() > 1e-3


def test_a_saved_folder_opens_in_diffusers_and_is_the_same(
    tmp_path: Path, ours: TextToImagePipeline, theirs: StableDiffusionXLPipeline, xl_folder: Path
) -> None:
    ours.save_pretrained(tmp_path)
    again = opened(tmp_path)
    np.testing.assert_array_equal(painted(again), painted(ours))
    reopened = StableDiffusionXLPipeline.from_pretrained(tmp_path, add_watermarker=False)
    reopened.set_progress_bar_config(disable=True)
    assert reopened.config.force_zeros_for_empty_prompt
    np.testing.assert_array_equal(painted(reopened), painted(theirs))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        before, after = (getattr(pipe, part).state_dict() for pipe in (theirs, reopened))
        assert before.keys() == after.keys()
        assert all(value.equal(after[name]) for name, value in before.items())
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert {k: v for k, v in json.loads((xl_folder / "model_index.json").read_text()).items() if k[0] != "_"} == {
        k: v for k, v in index.items() if k[0] != "_"
    }


def test_kept_for_atelier_alone_it_keeps_its_null(tmp_path: Path, xl_folder: Path) -> None:
    model = load_model(xl_folder)
    model = replace(model, scheduler=scheduler_config("flow", "velocity"))
    told(TextToImagePipeline(model)).zero_null = False
    save_model(model, tmp_path)
    assert not (tmp_path / "model_index.json").exists()
    again = TextToImagePipeline(load_model(tmp_path))
    assert not told(again).zero_null
    np.testing.assert_array_equal(painted(again), painted(TextToImagePipeline(model)))


def test_half_precision_files_and_the_autoencoder_that_stays_in_float32(tmp_path: Path) -> None:
    theirs = their_pipeline(tmp_path)
    theirs.save_pretrained(tmp_path)
    theirs.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    whole, half = opened(tmp_path), opened(tmp_path, variant="fp16")
    assert whole.dtype == half.dtype == torch.float32
    assert not whole.model.unet.conv_in.weight.equal(half.model.unet.conv_in.weight)
    assert_same(painted(half), painted(theirs.to(torch.float32)))
    pipe = opened(tmp_path, variant="fp16", dtype=torch.float16)
    assert (pipe.dtype, told(pipe).second.dtype, pipe.model.vae.dtype) == (torch.float16, torch.float16, torch.float32)
    assert pipe.to(torch.float16).model.vae.dtype == torch.float32
    assert pipe.to(torch.bfloat16).model.vae.dtype == torch.bfloat16
    assert np.isfinite(painted(pipe)).all()


def test_from_a_picture(ours: TextToImagePipeline, theirs: StableDiffusionXLPipeline) -> None:
    pipe = StableDiffusionXLImg2ImgPipeline(**theirs.components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
    call: dict[str, Any] = {"image": picture, "strength": 0.6, "num_inference_steps": 5, "guidance_scale": 3.0}
    got, wanted = (
        one(PROMPT, generator=torch.Generator().manual_seed(0), output_type="np", **call).images for one in (ours, pipe)
    )
    assert_same(got, wanted)


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting(tmp_path: Path, channels: int) -> None:
    made = their_pipeline(tmp_path, in_channels=channels)
    theirs = StableDiffusionXLInpaintPipeline(**made.components, add_watermarker=False)
    theirs.save_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    ours = opened(tmp_path)
    assert ours.model.inpaints == (channels == 9)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
    mask = Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 12, 16))
    call: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 5, "guidance_scale": 3.0, "strength": 1.0}

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    got = ours(PROMPT, image=picture, mask=mask, generator=seeded(), output_type="np", **call).images
    wanted = theirs(PROMPT, image=picture, mask_image=mask, generator=seeded(), output_type="np", **call).images
    assert_same(got, wanted)
    ours.save_pretrained(tmp_path / "again")
    kind = json.loads((tmp_path / "again" / "model_index.json").read_text())["_class_name"]
    assert kind == ("StableDiffusionXLInpaintPipeline" if channels == 9 else "StableDiffusionXLPipeline")


def test_what_is_of_another_kind_is_refused_by_name(tmp_path: Path, xl_folder: Path) -> None:
    model = load_model(xl_folder)
    index = json.loads((xl_folder / "model_index.json").read_text())
    made = their_pipeline(tmp_path)
    made.save_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionXLImg2ImgPipeline"}))
    with pytest.raises(ValueError, match="holds a StableDiffusionXLImg2ImgPipeline; only the layouts of"):
        load_model(tmp_path)  # as the refiner is
    with pytest.raises(ValueError, match="with addition_embed_type=text_time told by ClipTextEncoder: expected a Clip"):
        replace(model, conditioner=tiny_model().conditioner)
    with pytest.raises(ValueError, match="addition_embed_type=None told by ClipTextPair: expected one text encoder"):
        replace(model, unet=tiny_model().unet)
    small = UNet(UNetConfig(**{**UNET, "projection_class_embeddings_input_dim": SUMMARY + 5 * WAVES}))
    with pytest.raises(ValueError, match=r"takes 56 and 20 with 5 sizes: expected 6 \(SDXL's refiner"):
        replace(model, unet=small)
