"""Inpainting: equal to diffusers' for both kinds of U-Net, what stays outside of the mask, and bad input."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image

from ldm.guidance import classifier_free
from ldm.samplers import SAMPLERS
from ldm.unet import UNet
from pipelines import TextToImagePipeline
from pipelines.folder import Model, load_model, save_model
from pipelines.image import image_batch
from pipelines.inpainting import mask_batch
from tests.conftest import tiny_model


def inpainting_model() -> Model:
    model = tiny_model()
    torch.manual_seed(5)
    unet = UNet(replace(model.unet.config, in_channels=9)).eval().requires_grad_(False)
    return Model(unet, model.vae, model.conditioner, model.scheduler, model.defaults)


@pytest.fixture(scope="module")
def folders(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Channels of the U-Net -> a model's folder."""
    folder = tmp_path_factory.mktemp("inpainting")
    save_model(inpainting_model(), folder)
    return {4: model_folder, 9: folder}


def opened(folder: Path) -> TextToImagePipeline:
    pipe = TextToImagePipeline.from_pretrained(folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    y, x = np.mgrid[:32, :48].astype(np.float32)
    return Image.fromarray(np.stack([x * 5, y * 7, 255 - x * 5], -1).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    """A disc with a grey edge, whose levels on both sides of one half are there."""
    y, x = np.mgrid[:32, :48].astype(np.float32)
    return Image.fromarray((255 * (1.2 - np.hypot(x - 25, y - 13) / 11).clip(0, 1)).astype(np.uint8))


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("ddim", "DDIMScheduler"),
        ("dpmpp_2m", "DPMSolverMultistepScheduler"),
        ("heun", "HeunDiscreteScheduler"),
        ("euler_ancestral", "EulerAncestralDiscreteScheduler"),
    ],
)
def test_equals_diffusers(
    folders: dict[int, Path],
    picture: Image.Image,
    mask: Image.Image,
    channels: int,
    strength: float,
    sampler: str,
    scheduler: str,
) -> None:
    import diffusers

    theirs = StableDiffusionInpaintPipeline.from_pretrained(folders[channels], safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = getattr(diffusers, scheduler).from_config(
        theirs.scheduler.config, clip_sample=False, thresholding=False
    )
    ours = opened(folders[channels])
    call = {"image": picture, "strength": strength, "num_inference_steps": 10, "guidance_scale": 3.0}
    call |= {"height": 32, "width": 48, "output_type": "np"}
    wanted = theirs("a fox", mask_image=mask, generator=torch.Generator().manual_seed(3), **call).images
    got = ours("a fox", mask=mask, generator=torch.Generator().manual_seed(3), sampler=sampler, **call).images
    assert got.shape == wanted.shape == (1, 32, 48, 3)
    np.testing.assert_allclose(got, wanted, atol=3e-3)
    other = ours("a fox", mask=mask, generator=torch.Generator().manual_seed(4), sampler=sampler, **call).images
    assert np.abs(other - got).mean() > 0.01


def test_the_folder_is_diffusers_own(folders: dict[int, Path], picture: Image.Image, mask: Image.Image) -> None:
    index = json.loads((folders[9] / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInpaintPipeline"
    assert json.loads((folders[4] / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    assert load_model(folders[9]).inpaints
    assert not load_model(folders[4]).inpaints


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_outside_of_the_mask_the_picture_stays(
    folders: dict[int, Path], picture: Image.Image, mask: Image.Image, sampler: str
) -> None:
    """In the latents, to rounding, by every sampler; inside they are others."""
    pipe = opened(folders[4])
    posterior = pipe.model.vae.encode(image_batch(picture, 1, 1, None, None, 4))
    start = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))  # given: the posterior's mode is taken
    call = {"image": picture, "mask": mask, "steps": 5, "sampler": sampler, "latents": start, "output_type": "latent"}
    x = pipe("a fox", **call).images
    inside = torch.nn.functional.interpolate(mask_batch(mask, 1, 1, 32, 48), size=(8, 12)).bool().expand_as(x)
    assert 0 < inside.float().mean() < 1
    assert (x - posterior.mode)[~inside].abs().max() < 1e-5
    assert (x - posterior.mode)[inside].abs().mean() > 0.1


def test_an_inpainting_model_sees_the_picture_outside_alone(
    folders: dict[int, Path], picture: Image.Image, mask: Image.Image
) -> None:
    """What is under the white is not shown to it at full strength, what is outside is."""
    pipe = opened(folders[9])
    white = np.asarray(mask)[..., None] >= 128

    def with_blot(under: bool) -> Image.Image:
        pixels = np.asarray(picture)
        return Image.fromarray(np.where(white == under, 255 - pixels, pixels))

    call = {"mask": mask, "steps": 4, "seed": 1, "output_type": "latent"}
    plain, under, outside = (
        pipe("a fox", image=i, **call).images for i in (picture, with_blot(True), with_blot(False))
    )
    assert under.equal(plain)
    assert not torch.allclose(outside, plain, atol=1e-3)


def test_each_picture_alone_and_in_a_batch(folders: dict[int, Path], picture: Image.Image, mask: Image.Image) -> None:
    other, turned = (one.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for one in (picture, mask))
    call = {"steps": 4, "output_type": "pt"}
    for folder in folders.values():
        pipe = opened(folder)
        images, masks = [picture, other], [mask, turned]
        both = pipe(["a fox", "a cat"], image=images, mask=masks, num_images_per_prompt=2, seed=5, **call).images
        alone = pipe("a cat", image=other, mask=turned, seed=8, **call).images
        torch.testing.assert_close(both[3:], alone, atol=1e-4, rtol=1e-4)


def test_masks_of_all_types(mask: Image.Image) -> None:
    numbers = np.asarray(mask, np.float32) / 255
    wanted = torch.from_numpy(numbers >= 0.5).float()[None, None]
    tensor = torch.from_numpy(numbers)
    given: list[Any] = [mask, mask.convert("RGB"), numbers, numbers[..., None], numbers[None, ..., None], tensor]
    given += [tensor[None], tensor[None, None], numbers >= 0.5, tensor >= 0.5, [mask], [numbers]]
    for one in given:
        assert mask_batch(one, 1, 1, 32, 48).equal(wanted)
    assert mask_batch([mask, numbers], 4, 2, 32, 48).equal(wanted.expand(4, 1, 32, 48))
    deep = Image.fromarray((numbers * 65535).astype(np.uint16))
    assert mask_batch(deep, 1, 1, 32, 48).equal(wanted)
    half = mask_batch(mask, 1, 1, 16, 24)
    assert half.shape == (1, 1, 16, 24)
    assert half.unique().tolist() == [0, 1]
    assert half.mean() == pytest.approx(float(wanted.mean()), abs=0.05)


def test_concatenated_channels_are_the_equations(folders: dict[int, Path]) -> None:
    """D = c_skip x + c_out F([alpha x, beside]), and guidance shows both sides the same."""
    model = load_model(folders[9])
    x, beside = torch.randn(1, 4, 4, 4), torch.randn(1, 5, 4, 4)
    states = [torch.randn(1, 3, 32) for _ in range(2)]
    cond, uncond = ({"encoder_hidden_states": one, "concat": beside} for one in states)
    sigma = torch.tensor(2.0)
    alpha, t = model.schedule.alpha(sigma), model.schedule.timestep(sigma)
    cond_eps, uncond_eps = (model.unet(torch.cat([alpha * x, beside], 1), t, one) for one in states)
    torch.testing.assert_close(model.denoiser(x, sigma, cond), x - sigma * cond_eps)
    guided = classifier_free(model.denoiser, cond, uncond, 3.0)(x, 2.0)
    torch.testing.assert_close(guided, x - sigma * (uncond_eps + 3 * (cond_eps - uncond_eps)), atol=1e-4, rtol=1e-4)
    assert "concat" in cond  # the caller's own dict is left alone


def test_bad_calls_say_what_to_do(folders: dict[int, Path], picture: Image.Image, mask: Image.Image) -> None:
    pipes = {channels: opened(folder) for channels, folder in folders.items()}
    thin = torch.zeros(32, 48)
    thin[:, 9:11] = 1
    bad: list[tuple[int, dict[str, Any], str]] = [
        (9, {}, "this is an inpainting model: give image= and mask="),
        (9, {"image": picture}, "give image= and mask="),
        (9, {"mask": mask}, "give image= and mask="),
        (4, {"mask": mask}, "give image=, too"),
        (4, {"image": picture, "mask": "mask.png"}, "mask, white where to paint: got str"),
        (4, {"image": picture, "mask": [mask] * 3}, "mask, white where to paint: got 3 pictures for 1 prompts"),
        (4, {"image": picture, "mask": thin}, "mask: what is white of number 0 is thinner than a latent, 4 pixels"),
        (4, {"image": picture, "mask": torch.full((32, 48), 2.0)}, r"mask, .* in \[0, 1\]"),
        (4, {"image": picture, "mask": torch.zeros(2, 2, 2, 2, 2)}, r"mask, .* got \(2, 2, 2, 2, 2\)"),
    ]
    for channels, call, message in bad:
        with pytest.raises(ValueError, match=message):
            pipes[channels]("a fox", steps=2, **call)
    settings = pipes[4]("a fox", steps=2, image=picture, mask=mask).images[0].settings
    assert (settings["strength"], settings["mask"]) == (1.0, True)
    model = tiny_model()
    for channels in (5, 8):
        unet = UNet(replace(model.unet.config, in_channels=channels))
        with pytest.raises(ValueError, match=f"takes {channels} channels for latents of 4: expected 4, or 9 with"):
            Model(unet, model.vae, model.conditioner, model.scheduler)
